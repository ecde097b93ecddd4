#!/usr/bin/env bash
# CIFAR-10 and GTSRB at the paper's settings on one GPU, one seed after the other, within a time budget.
#
#   [BUDGET=MINUTES] [NAMES="NAME..."] launch/gpu_paper.sh OUT SEED... [--config.KEY=VALUE ...]
#
# It needs python3 with badloss_jax's dependencies, and takes badloss_jax itself from this checkout, whose root relative
# paths start from. BADLOSS_CIFAR10 names CIFAR-10 as a folder {train,test}/<class>/*, BADLOSS_GTSRB the folder GTSRB of
# the official archives; what is not named is left out. NAMES says which experiments to run for each seed, and in which
# order: of cifar10-resnet18, cifar10 (ResNet-50) and gtsrb; by default these.
#
# Runs lie in OUT/NAME/seedS. When the budget (480 minutes) is over, the run at work writes a checkpoint, and what it has
# recorded is scored, in its folder rescored/, which may take five minutes more; the same command goes on from there, and
# passes over what is finished. A finished run's results.json is copied to configs/results/NAME/seedS.json, which git
# should see nothing else changed for: commit before. With other settings than the paper's nothing is copied, unless
# RESULTS names another folder for it. In a copy without .git, BADLOSS_COMMIT tells the commit.
#
# Exit codes: 0 all is done, 1 a run failed (the others went on), 2 wrong usage, 75 time is up, run it again.
set -uo pipefail

all="cifar10-resnet18 cifar10 gtsrb"
usage() {
  echo "usage: [BUDGET=MINUTES] [NAMES=\"$all\"] launch/gpu_paper.sh OUT SEED... [--config.KEY=VALUE ...]" >&2
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

# Each experiment's config, and what names its data.
declare -A config=(
  [cifar10-resnet18]=configs/cifar10.py:resnet18
  [cifar10]=configs/cifar10.py
  [gtsrb]=configs/gtsrb.py
)
declare -A data=([cifar10-resnet18]=BADLOSS_CIFAR10 [cifar10]=BADLOSS_CIFAR10 [gtsrb]=BADLOSS_GTSRB)
read -ra asked <<<"${NAMES:-$all}"
((${#asked[@]})) || usage
for name in "${asked[@]}"; do
  if [[ " $all " != *" $name "* ]]; then
    echo "NAMES has $name, which is none of $all" >&2
    usage
  fi
done
names=()
for name in "${asked[@]}"; do
  variable=${data[$name]}
  if [[ -n ${!variable:-} ]]; then
    names+=("$name")
  else
    echo "$variable is not set: $name is left out"
  fi
done
if ! ((${#names[@]})); then exit 2; fi
cd "$(dirname "$0")/.." || exit 1
. launch/settings.sh

child='' stopped=0
trap 'stopped=1; [[ -z $child ]] || kill -s TERM "$child" 2>/dev/null' INT TERM

# GRACE SECONDS ARGUMENTS...: runs badloss until it ends or the time is up; sets `code`. SIGTERM makes a run save and end
# with 75; GRACE seconds later, when something is wrong, it is killed.
badloss() {
  timeout --preserve-status --kill-after="$1" "$2" python3 -m badloss_jax "${@:3}" &
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

# What was recorded up to a stop says who is suspicious, even if nobody goes on.
score() { # WORKDIR
  echo "scoring what is recorded: python3 -m badloss_jax score --workdir $1"
  badloss 10 300 score --workdir "$1"
  ((code == 0)) || echo "nothing is scored (exit code $code)"
}

experiment() { # NAME SEED
  local name=$1 seed=$2
  local workdir=$out/$name/seed$seed variable=${data[$name]}
  if [[ -n $results && -e $results/$name/seed$seed.json ]]; then
    echo "$name seed $seed: finished before"
    return
  fi
  if ((stopped || SECONDS >= budget)); then
    left=1
    return
  fi
  echo "$name seed $seed: $(((budget - SECONDS) / 60)) minutes left"
  badloss 600 "$((budget - SECONDS))" run --config "${config[$name]}" "--config.data.dir=${!variable}" \
    "--config.seed=$seed" "${overrides[@]}" --workdir "$workdir"
  if ((code == 0)); then
    finish "$name" "$seed" || failed=1
  elif ((code == 75 || stopped || SECONDS >= budget)); then
    echo "$name seed $seed: stopped; the same command goes on from here"
    left=1
    score "$workdir"
  else
    echo "$name seed $seed: FAILED with exit code $code"
    failed=1
  fi
}

left=0 failed=0
for seed in "${seeds[@]}"; do
  for name in "${names[@]}"; do
    experiment "$name" "$seed"
  done
done
if ((failed)); then exit 1; fi
if ((left)); then
  echo "more is to do: run the same command again"
  exit 75
fi
