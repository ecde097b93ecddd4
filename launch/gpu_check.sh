#!/usr/bin/env bash
# Checks one GPU in under ten minutes: the GPU tests, then training throughput, what recording costs, and scoring.
#
#   launch/gpu_check.sh [--quick] [OUT.json]
#
# Run it from the repository's root, with the virtual environment active that has `.[cuda,test]`. BADLOSS_CIFAR10 names
# CIFAR-10 as a folder {train,test}/<class>/*; without it synthetic images of 32 px are taken. Every part has its own
# time limit; one that fails is noted, and the others go on. OUT.json (gpu_check.json) has all figures. --quick takes
# tiny sizes, whose figures mean nothing; where there is no GPU it is taken by itself.
#
# Exit codes: 0 all parts went well, 1 some did not, 2 wrong usage.
set -uo pipefail

quick=0 out=gpu_check.json
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    *.json) out=$argument ;;
    *)
      echo "usage: launch/gpu_check.sh [--quick] [OUT.json]" >&2
      exit 2
      ;;
  esac
done
. "$(dirname "$0")/settings.sh"
backend=$(python3 -c 'import jax; print(jax.default_backend())') || exit 1
if [[ $backend != gpu && $quick == 0 ]]; then
  echo "gpu_check: NO GPU (jax runs on $backend): --quick, which tries the script out and measures nothing" >&2
  quick=1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
# NAME LIMIT COMMAND...: the limits, of which each may take 5 s more, add up to less than ten minutes.
part() {
  local name=$1 limit=$2 began=$SECONDS code=0
  shift 2
  echo "== $name, at most $limit s: $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
  code=${PIPESTATUS[0]}
  if ((code)); then
    failed=1
    echo "== $name FAILED with exit code $code (124: out of time)"
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" >>"$folder/parts"
}
train() { # NAME LIMIT ARGUMENTS...
  part "$1" "$2" badloss bench train --out "$folder/$1.json" "${@:3}"
}

bf16=--config.model.dtype=bfloat16
part tests 110 env BADLOSS_TEST_GPU=1 python3 -m pytest -q -o addopts=--strict-markers tests/gpu
if ((quick)); then
  # No --scan: on a CPU that takes minutes.
  tiny=("--config.model.stages=(8,)" --config.recording.batch_size=32 --config.evaluation.batch_size=32)
  train small 200 --models resnet_small --image_size 8 --examples 64 --seconds 0.1 "${tiny[@]}" "$bf16"
  part buffer 100 badloss bench buffer --out "$folder/buffer.json" --examples 2000 --epochs 3 --probes 20 --k 5
  part scorer 100 badloss bench scorer --out "$folder/scorer.json" --sizes 2000 --epochs 3 --probes 20 --k 5 --repeats 1
else
  # The recording at the size at which it is to cost less than 1 % of a step: the steps are short, so many are needed.
  train small 45 --models resnet_small --seconds 20
  train resnet18-64 60 --models resnet18 --image_size 64 --classes 200 --seconds 15 "$bf16"
  train resnet50-224 115 --models resnet50 --image_size 224 --classes 1000 --examples 5120 --seconds 20 "$bf16"
  if [[ -n ${BADLOSS_CIFAR10:-} ]]; then
    images=(--config configs/cifar10.py "--config.data.dir=$BADLOSS_CIFAR10")
  else
    echo "BADLOSS_CIFAR10 is not set: synthetic images in CIFAR-10's place"
    images=(--image_size 32 --examples 50000)
  fi
  train cifar10 130 --models resnet18,resnet50 --scan --seconds 15 "${images[@]}"
  part buffer 45 badloss bench buffer --out "$folder/buffer.json"
  part scorer 40 badloss bench scorer --out "$folder/scorer.json" --sizes 50000,1281167 --methods "xla,jax top_k" --repeats 3
fi

python3 - "$folder" "$out" "$quick" "$backend" <<'PYTHON' || failed=1
import json, pathlib, sys

folder, out, quick, backend = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
parts = {}
for line in (folder / "parts").read_text("utf-8").splitlines():
    name, code, seconds = line.split("\t")
    log = (folder / f"{name}.log").read_text("utf-8", "replace").splitlines()
    parts[name] = {"exit_code": int(code), "seconds": int(seconds), "last_lines": log[-20:]}
    if (folder / f"{name}.json").is_file():
        parts[name] |= json.loads((folder / f"{name}.json").read_text("utf-8"))
out.write_text(json.dumps({"quick": quick, "backend": backend, "parts": parts}, indent=2) + "\n", "utf-8")
print(f"{out}: " + ", ".join(f"{name} {'FAILED' if part['exit_code'] else 'ok'}" for name, part in parts.items()))
PYTHON
exit "$failed"
