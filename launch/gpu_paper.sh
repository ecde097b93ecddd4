#!/usr/bin/env bash
# CIFAR-10 and GTSRB at the paper's settings on one GPU, one seed after the other, within a time budget.
#
#   BUDGET=MINUTES launch/gpu_paper.sh OUT SEED... [--config.KEY=VALUE ...]
#
# Run it from the repository's root, with the virtual environment active that has `badloss`. BADLOSS_CIFAR10 names
# CIFAR-10 as a folder {train,test}/<class>/*, BADLOSS_GTSRB the folder GTSRB of the official archives; what is not named
# is left out. Runs lie in OUT/NAME/seedS. When the budget (480 minutes) is over, the run at work writes a checkpoint;
# the same command goes on from there, and passes over what is finished. A finished run's results.json is copied to
# configs/results/NAME/seedS.json, which git should see nothing else changed for: commit before. With other settings
# than the paper's nothing is copied, unless RESULTS names another folder for it.
#
# Exit codes: 0 all is done, 1 a run failed (the others went on), 2 wrong usage, 75 time is up, run it again.
set -uo pipefail

usage() {
  echo "usage: BUDGET=MINUTES launch/gpu_paper.sh OUT SEED... [--config.KEY=VALUE ...]" >&2
  exit 2
}
if (($# < 2)) || [[ $1 == -* ]]; then usage; fi
out=$1
shift
seeds=() overrides=()
for argument in "$@"; do
  case $argument in
    --config.*=*) overrides+=("$argument") ;;
    *[!0-9]* | "") usage ;;
    *) seeds+=("$argument") ;;
  esac
done
((${#seeds[@]})) || usage
results=${RESULTS:-}
if [[ -z $results && ${#overrides[@]} == 0 ]]; then results=configs/results; fi
budget=$(awk -v minutes="${BUDGET:-480}" 'BEGIN { print int(60 * minutes) }')
((budget > 0)) || usage
. "$(dirname "$0")/settings.sh"

child='' stopped=0
trap 'stopped=1; [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null' INT TERM

# Runs badloss until it ends or the time is up; sets `code`. SIGTERM makes it save and end with 75; ten minutes later,
# when something is wrong, it is killed.
train() {
  timeout --preserve-status --kill-after=600 "$((budget - SECONDS))" badloss run "$@" &
  child=$!
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break # else it was a signal to this script that ended `wait`
  done
  child=''
}

finish() { # NAME SEED
  if [[ -z $results ]]; then
    echo "$1 seed $2: done, in $out/$1/seed$2; not copied, as settings were changed"
    return
  fi
  mkdir -p "$results/$1" &&
    cp "$out/$1/seed$2/results.json" "$results/$1/.seed$2.json" &&
    mv "$results/$1/.seed$2.json" "$results/$1/seed$2.json" &&
    echo "$1 seed $2: done, copied to $results/$1/seed$2.json"
}

experiment() { # NAME SEED ARGUMENTS...
  local name=$1 seed=$2
  if [[ -n $results && -e $results/$name/seed$seed.json ]]; then
    echo "$name seed $seed: finished before"
    return
  fi
  if ((stopped || SECONDS >= budget)); then
    left=1
    return
  fi
  echo "$name seed $seed: $(((budget - SECONDS) / 60)) minutes left"
  train "${@:3}" "--config.seed=$seed" "${overrides[@]}" --workdir "$out/$name/seed$seed"
  if ((code == 0)); then
    finish "$name" "$seed" || failed=1
  elif ((code == 75 || stopped || SECONDS >= budget)); then
    echo "$name seed $seed: stopped; the same command goes on from here"
    left=1
  else
    echo "$name seed $seed: FAILED with exit code $code"
    failed=1
  fi
}

left=0 failed=0
for seed in "${seeds[@]}"; do
  if [[ -n ${BADLOSS_CIFAR10:-} ]]; then
    data=--config.data.dir=$BADLOSS_CIFAR10
    experiment cifar10-resnet18 "$seed" --config configs/cifar10.py:resnet18 "$data"
    experiment cifar10 "$seed" --config configs/cifar10.py "$data"
  else
    echo "BADLOSS_CIFAR10 is not set: CIFAR-10 is left out"
  fi
  if [[ -n ${BADLOSS_GTSRB:-} ]]; then
    experiment gtsrb "$seed" --config configs/gtsrb.py "--config.data.dir=$BADLOSS_GTSRB"
  else
    echo "BADLOSS_GTSRB is not set: GTSRB is left out"
  fi
done
if [[ -z ${BADLOSS_CIFAR10:-}${BADLOSS_GTSRB:-} ]]; then exit 2; fi
if ((failed)); then exit 1; fi
if ((left)); then
  echo "more is to do: run the same command again"
  exit 75
fi
