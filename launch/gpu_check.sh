#!/usr/bin/env bash
# Checks one GPU in under ten minutes: the GPU tests, then training throughput, what recording costs, and scoring.
#
#   [LIMITS=FACTOR] launch/gpu_check.sh [--quick] [OUT.json]
#
# It needs python3 with badloss_jax's dependencies and pytest, from `.[cuda,test]` for example, and takes badloss_jax
# itself from this checkout, whose root relative paths start from. BADLOSS_CIFAR10 names CIFAR-10 as a folder
# {train,test}/<class>/*; without it synthetic images of 32 px are taken. Every part has its own time limit, LIMITS times
# as long where programs compile slowly; one that fails is noted, and the others go on. OUT.json (gpu_check.json) has all
# figures of the parts that are over, at any moment. --quick takes tiny sizes, whose figures mean nothing; where there is
# no GPU it is taken by itself, and the tests run on the CPU.
#
# Exit codes: 0 all parts went well, 1 some did not, 2 wrong usage.
set -uo pipefail

usage() {
  echo "usage: [LIMITS=FACTOR] launch/gpu_check.sh [--quick] [OUT.json]" >&2
  exit 2
}
quick=0 out=gpu_check.json factor=${LIMITS:-1}
for argument in "$@"; do
  case $argument in
    --quick) quick=1 ;;
    *.json) out=$argument ;;
    *) usage ;;
  esac
done
# Not 0 either, which means no limit to `timeout`.
[[ $factor =~ ^[0-9]+(\.[0-9]+)?$ && $factor =~ [1-9] ]] || usage
cd "$(dirname "$0")/.." || exit 1
. launch/settings.sh
backend=$(python3 -c 'import jax; print(jax.default_backend())') || exit 1
if [[ $backend != gpu && $quick == 0 ]]; then
  echo "gpu_check: NO GPU (jax runs on $backend): --quick, which tries the script out and measures nothing" >&2
  quick=1
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
failed=0
touch "$folder/parts"
# Writes OUT.json with the parts that are over, and says in a line how they went. By a file beside it, so that a check
# that is cut off leaves the last whole one.
write_json() {
  python3 - "$folder" "$out" "$quick" "$backend" <<'PYTHON'
import json, os, pathlib, sys

folder, out, quick, backend = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4]
parts = {}
for line in (folder / "parts").read_text("utf-8").splitlines():
    name, code, seconds = line.split("\t")
    log = (folder / f"{name}.log").read_text("utf-8", "replace").splitlines()
    parts[name] = {"exit_code": int(code), "seconds": int(seconds), "last_lines": log[-20:]}
    if (folder / f"{name}.json").is_file():
        parts[name] |= json.loads((folder / f"{name}.json").read_text("utf-8"))
out.parent.mkdir(parents=True, exist_ok=True)
aside = out.with_name(f".{out.name}")
aside.write_text(json.dumps({"quick": quick, "backend": backend, "parts": parts}, indent=2) + "\n", "utf-8")
os.replace(aside, out)
print(f"{out}: " + ", ".join(f"{name} {'FAILED' if part['exit_code'] else 'ok'}" for name, part in parts.items()))
PYTHON
}
# Before any part: a place that cannot be written is said now, not after ten minutes.
write_json >"$folder/said" || exit 1

# NAME LIMIT COMMAND...: the limits, of which each may take 5 s more, add up to less than ten minutes.
part() {
  local name=$1 limit began=$SECONDS code=0
  limit=$(LC_ALL=C awk -v seconds="$2" -v factor="$factor" 'BEGIN { print seconds * factor }')
  shift 2
  echo "== $name, at most $limit s: $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.log"
  code=${PIPESTATUS[0]}
  if ((code)); then
    failed=1
    echo "== $name FAILED with exit code $code (124: out of time)"
  fi
  printf '%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - began))" >>"$folder/parts"
  write_json >"$folder/said" || failed=1
}
train() { # NAME LIMIT ARGUMENTS...
  part "$1" "$2" python3 -m badloss_jax bench train --out "$folder/$1.json" "${@:3}"
}
bench() { # NAME LIMIT ARGUMENTS...: a benchmark that the part is named after
  part "$1" "$2" python3 -m badloss_jax bench "$1" --out "$folder/$1.json" "${@:3}"
}

bf16=--config.model.dtype=bfloat16
# With it tests want the GPU, and one that is skipped fails.
wanted=
if [[ $backend == gpu ]]; then wanted=1; fi
# Without what the whole suite is run by: several processes, and a limit on what tests may take of a known machine's CPU.
options=(-q -o addopts=--strict-markers -o cpu_seconds=1000)
part tests 110 env "BADLOSS_TEST_GPU=$wanted" python3 -m pytest "${options[@]}" tests/gpu
if ((quick)); then
  # No --scan: on a CPU that takes minutes.
  tiny=("--config.model.stages=(8,)" --config.recording.batch_size=32 --config.evaluation.batch_size=32)
  train small 200 --models resnet_small --image_size 8 --examples 64 --seconds 0.1 "${tiny[@]}" "$bf16"
  bench buffer 100 --examples 2000 --epochs 3 --probes 20 --k 5
  bench scorer 100 --sizes 2000 --epochs 3 --probes 20 --k 5 --repeats 1
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
  # A part each: what one has not compiled in time does not take the other's figures along.
  train cifar10-resnet18 55 --models resnet18 --scan --seconds 15 "${images[@]}"
  train cifar10-resnet50 75 --models resnet50 --scan --seconds 15 "${images[@]}"
  bench buffer 45
  bench scorer 40 --sizes 50000,1281167 --methods "xla,jax top_k" --repeats 3
fi

cat "$folder/said"
exit "$failed"
