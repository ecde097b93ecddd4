#!/usr/bin/env bash
# N processes on this machine: what a cluster does, without one.
#
#   launch/local.sh N --config FILE[:VARIANT] --workdir OUT [--config.KEY=VALUE ...]
#
# On GPUs, process I gets GPU I (to use all GPUs of one machine, plain `badloss run` is enough). On CPUs:
#   JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 launch/local.sh 2 ...
#
# Ctrl-C or SIGTERM: all write a checkpoint and end with 75, and the same command goes on from there. If one process
# fails, the others are ended. The exit code is that of the first which did not end with 0.
set -uo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N --config FILE[:VARIANT] --workdir OUT [--config.KEY=VALUE ...]" >&2
  exit 2
fi
processes=$1
shift
. "$(dirname "$0")/settings.sh"
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])') || exit 1

pids=()
for ((i = 0; i < processes; i++)); do
  JAX_LOCAL_DEVICE_IDS=$i badloss run --distributed "$@" \
    --coordinator "localhost:$port" --num_processes "$processes" --process_id "$i" &
  pids+=("$!")
done

send() { kill -s "$1" "${pids[@]}" 2>/dev/null; }
# Not INT: a shell's background processes ignore it.
trap 'send TERM' INT TERM

code=0 deadline=
while ((${#pids[@]})); do
  for i in "${!pids[@]}"; do
    kill -0 "${pids[i]}" 2>/dev/null && continue
    wait "${pids[i]}"
    ended=$?
    unset "pids[i]"
    if ((code == 0 && ended == 75)); then
      deadline=$((SECONDS + 60)) # the others still write the checkpoint
    elif ((code == 0 && ended != 0)); then
      send TERM
      deadline=$((SECONDS + 10)) # stuck in a collective, they do not see it
    fi
    ((code == 0)) && code=$ended
  done
  if [[ -n $deadline ]] && ((SECONDS > deadline)); then send KILL; fi
  sleep 0.2 # not `wait`: a signal would interrupt it, and be mistaken for the end of a process
done
exit "$code"
