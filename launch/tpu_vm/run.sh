#!/usr/bin/env bash
# A run on a slice of spot TPU VMs, which asks for another slice and goes on whenever one is taken away.
#
#   SHARE=IP:/NAME launch/tpu_vm/run.sh [--dry-run] --config FILE[:VARIANT] --workdir /mnt/badloss/OUT [...]
#
# SHARE is a Filestore (NFS) share in the slice's network; all workers mount it at /mnt/badloss. --dry-run prints what
# would be done. Run it from the repository's root, under tmux on a machine that stays: what is committed is installed.
# However it ends, the slice is deleted, for it costs by the second. gcloud has to know project and user.
set -euo pipefail

: "${SHARE:?SHARE=IP:/NAME, the Filestore share that holds data and workdir}"
NAME=${NAME:-badloss}
ZONE=${ZONE:-us-east5-b}
ACCELERATOR=${ACCELERATOR:-v6e-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} # v5e: v2-alpha-tpuv5-lite
SECONDS_BETWEEN_LOOKS=${SECONDS_BETWEEN_LOOKS:-60}

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

do_or_print() {
  if ((dry_run)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
tpus() { do_or_print gcloud compute tpus "$1" "$2" "$NAME" --zone="$ZONE" "${@:3}"; }
on_all_workers() { tpus tpu-vm ssh --worker=all --command="$1"; }
delete() { tpus queued-resources delete --force --quiet; }
state() {
  local answer
  if answer=$(tpus queued-resources describe --format='value(state.state)' 2>&1); then
    echo "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

wait_for_a_slice() {
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    echo "slice $NAME: $now" >&2
    case $now in
      NONE) create ;;
      FAILED | SUSPENDED) delete ;; # a request is served once
      *) sleep "$SECONDS_BETWEEN_LOOKS" ;;
    esac
  done
}
create() {
  tpus queued-resources create --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" --spot
}

# uv, because the VMs' own Python is older than 3.11. Huge pages: jax warns of slow starts without them.
install_badloss() {
  git archive --format=tar.gz --output="$archive" HEAD &&
    do_or_print gcloud compute tpus tpu-vm scp "$archive" "$NAME:badloss.tar.gz" --zone="$ZONE" --worker=all &&
    on_all_workers "set -e
      rm -rf badloss_jax && mkdir badloss_jax && tar xzf badloss.tar.gz -C badloss_jax && cd badloss_jax
      curl -LsSf https://astral.sh/uv/install.sh | sh
      ~/.local/bin/uv venv --python 3.12 .venv && ~/.local/bin/uv pip install --python .venv '.[tpu]'
      sudo sh -c 'echo always > /sys/kernel/mm/transparent_hugepage/enabled'
      sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common && sudo mkdir -p /mnt/badloss
      mountpoint -q /mnt/badloss || sudo mount -t nfs -o hard $(printf %q "$SHARE") /mnt/badloss
      sudo chmod 1777 /mnt/badloss"
}

train='cd badloss_jax && . .venv/bin/activate && . launch/settings.sh && exec badloss run --distributed "$@"'
train=$(printf '%q ' bash -c "$train" badloss "$@")
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"; delete || true' EXIT

if ((dry_run)); then
  create
  install_badloss
  on_all_workers "$train"
  exit
fi

while true; do
  wait_for_a_slice
  code=0
  { install_badloss && on_all_workers "$train"; } || code=$?
  if ((code == 0 || code == 2)); then exit "$code"; fi
  # The rest may be the slice's end: 75 if it was announced, 255 if ssh broke off, any other if peers were lost. The
  # state follows a little later; 75 and 255 are tried again even if it stays.
  sleep "$SECONDS_BETWEEN_LOOKS"
  if ((code != 75 && code != 255)) && [[ $(state) == ACTIVE ]]; then exit "$code"; fi
done
