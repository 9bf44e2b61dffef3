#!/usr/bin/env bash
# On a GPU machine, without network: what the kernels must show there, in the order of what matters. Run as `make gpu`.
#
#   tools/gpu.sh [step...]     the steps named, or all of them in this order but for what is measured already
#
#   facts     device, driver, versions, commit, clocks
#   import    the package with the native library that lies there or in build/gpu; one is built only if none loads
#   ladder    the Hopper kernels from one tile to the whole, without torch (tests/csrc/cuda/ladder.cu)
#   proof     real shapes against float64, and the same bits when repeated: what a VERIFIED entry rests on
#   speed     the table of goals: backends and eager formula, share of the library's rate, kernel by kernel
#   smoke     every loss, layout and dtype on every backend at tiny shapes
#   tiles     other tile sizes, for triton_kernels/configs.py
#   tests     the tests that use the GPU
#   bench     the whole benchmark           \
#   sanitizer, racecheck                     > only when named
#   ladder-memcheck, -racecheck, -synccheck /
#
#   PYTHON    interpreter that has torch (python3); nothing is installed
#   OUT       folder of the results (bench/results/gpu), at most eight files; logs of the steps are in logs.tar.gz
#   DEVICE    cuda; cpu rehearses the script on a machine without a GPU: same steps, same files, tiny sizes
#   JOBS      processes that compile at a time (all processors but two)
#   DEADLINE  seconds for the whole script (540); a step that has no time left is skipped
#   TILES     arguments of `python -m bench tune`; BENCH those of the benchmark; PYTEST those of pytest
#
# Machines without network or .git: `make gpu-files` puts library, ladder and commit into build/gpu, to be carried along.
#   COMMIT    what the results say they measured, where git does not know (build/gpu/commit.txt)
#   MEASURED  file with the steps whose committed results are of this code (build/gpu/measured.txt); not run unless named
# A failing step does not stop the later ones; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu}
DEVICE=${DEVICE:-cuda}
JOBS=${JOBS:-$(($(nproc) > 3 ? $(nproc) - 2 : $(nproc)))}
DEADLINE=${DEADLINE:-540}
MEASURED=${MEASURED:-build/gpu/measured.txt}
ALL_STEPS="facts import ladder tiles proof speed smoke tests"
measured=" $(cat "$MEASURED" 2> /dev/null | tr '\n' ' ') "
STEPS=" ${*:-$(for name in $ALL_STEPS; do [[ $measured == *" $name "* ]] || printf '%s ' "$name"; done)} "
LOGS=$(mktemp -d)
failed=0
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 # the tests turn deterministic mode on
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # ninja beside the interpreter
[[ -f build/gpu/commit.txt ]] && export COMMIT=${COMMIT:-$(< build/gpu/commit.txt)}
tiny=() few=()
[[ $DEVICE == cpu ]] && tiny=(--tiny) few=(--only "float32|tf32")

# step NAME SECONDS COMMAND...: run within its time into a log of its own and say how it ended
step() {
  local name=$1 limit=$2 began=$SECONDS status=0 result=ok log=$LOGS/$1.log
  shift 2
  [[ $STEPS == *" $name "* ]] || return 0
  ((limit = limit < DEADLINE - SECONDS ? limit : DEADLINE - SECONDS))
  if ((limit < 5)); then
    result="skipped: no time left"
  else
    echo "== $name, at $SECONDS s: $*"
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$log" 2>&1 || status=$?
    ((status == 0)) || failed=$((failed + 1))
    ((status == 0)) || result="FAILED ($status)"
    ((status == 124 || status == 137)) && result="FAILED (over $limit s)"
    tail -n "$((status == 0 ? 4 : 25))" "$log" | cut -c1-300
  fi
  printf '%-10s %s, %d s\n' "$name" "$result" $((SECONDS - began)) >> "$OUT/summary.txt"
  tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .
}

# in_shards COMMAND...: JOBS processes, each with its --shard i/JOBS; fails if one fails
in_shards() {
  local pids=() status=0
  for ((i = 0; i < JOBS; i++)); do
    OMP_NUM_THREADS=1 "$@" --shard "$i/$JOBS" &
    pids+=($!)
  done
  trap 'kill -INT "${pids[@]}" 2> /dev/null' INT TERM
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
  return $status
}

facts() {
  "$PYTHON" - "$DEVICE" "$OUT/facts.json" <<'PY'
import json, sys
from bench import environment
from bench.device import Device

facts = environment.facts(Device(sys.argv[1]))
open(sys.argv[2], "w").write(json.dumps(facts, indent=1) + "\n")
print(json.dumps(facts))
PY
  [[ $DEVICE == cpu ]] || nvidia-smi --query-gpu=name,clocks.sm,clocks.max.sm,power.draw,temperature.gpu --format=csv
}

import_library() {
  ls contrastive_ext/_C*.so > /dev/null 2>&1 || cp build/gpu/_C*.so contrastive_ext/ 2> /dev/null
  "$PYTHON" -c 'from contrastive_ext.backends import native; print(native.build_info())' && return 0
  CONTRASTIVE_EXT_NATIVE=1 "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m contrastive_ext doctor
}

ladder() {
  local program=build/gpu/ladder
  if [[ $DEVICE == cpu ]]; then
    [[ -x $program || ! -d build/gpu ]] && echo "rehearsed"
  elif [[ -x $program ]]; then
    "$program"
  else
    "$PYTHON" tools/cuda_gate.py ladder
  fi
}

proof() {
  local status=0
  in_shards "$PYTHON" -m bench proof --device "$DEVICE" --out "$LOGS/proof" $TINY $FEW $WITHOUT $FASTEST || status=1
  cat "$LOGS"/proof/*.jsonl > "$OUT/proof.jsonl"
  grep -h '"proven": false' "$OUT/proof.jsonl"
  echo "$(grep -c '"proven": true' "$OUT/proof.jsonl") proven, $(grep -c '"proven": false' "$OUT/proof.jsonl") not"
  return $status
}

speed() {
  local limit=80
  [[ $DEVICE == cpu ]] && limit=3 && COMPILE=--no-compile # a compiler of C++ takes longer than the rehearsal
  "$PYTHON" -m bench speed --device "$DEVICE" --out "$OUT" --time-limit $limit $TINY --without torch ${WITHOUT#--without} $FASTEST ${COMPILE:-}
}

smoke() { in_shards "$PYTHON" -m bench smoke --device "$DEVICE" $FEW $WITHOUT; }

tiles() {
  local arguments=(tune --device "$DEVICE")
  if [[ $DEVICE == cpu ]]; then
    arguments+=(--features 16 --rows 32 --dtype fp32 --most 1)
    export TRITON_INTERPRET=1
  else
    read -ra more <<< "${TILES:---features 128 256 768 --rows 34816 --dtype bf16}"
    arguments+=("${more[@]}")
  fi
  in_shards timeout --signal=INT 150 "$PYTHON" -m bench "${arguments[@]}" --out "$LOGS/tiles" > "$LOGS/tiles-compile.log" 2>&1
  "$PYTHON" -m bench "${arguments[@]}" --out "$OUT"
}

gpu_tests() {
  local chosen=(-k "${TESTS:-cuda or gpu}") workers=(-n "$JOBS" --dist worksteal) # neighbours, which share kernels, on one worker
  [[ -n $WITHOUT ]] && chosen=(-k "(cuda or gpu) and not test_hopper_forward.py and not cuda-cuda")
  [[ $DEVICE == cpu ]] && chosen=(tests/project/test_tables.py) workers=()
  "$PYTHON" -c "import xdist" 2> /dev/null || workers=()
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m "not interpreter" -p no:cacheprovider --maxfail 60 \
    --junitxml "$OUT/tests.xml" "${workers[@]}" "${chosen[@]}" ${PYTEST:-}
}
# functions run under `timeout` in a shell of their own
export -f in_shards facts import_library ladder tiles proof speed smoke gpu_tests
export PYTHON OUT DEVICE JOBS LOGS

date -u > "$OUT/summary.txt"
for name in $ALL_STEPS; do
  [[ $# -eq 0 && $measured == *" $name "* ]] && printf '%-10s skipped: measured with this code\n' "$name" >> "$OUT/summary.txt"
done
# the package is not installed there
"$PYTHON" -c 'import contrastive_ext.triton_kernels' 2> /dev/null || ln -sfn ../triton_kernels contrastive_ext/triton_kernels
step facts 30 bash -c facts
if [[ $DEVICE == cuda ]] && ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "make gpu needs a GPU that $PYTHON's torch can use; torch.cuda.is_available() is False." >&2
  exit 1
fi
step import 200 bash -c import_library
step ladder 60 bash -c ladder
# what fails the ladder may hang: nothing else may meet it
without=()
[[ $(tail -n 1 "$OUT/summary.txt") == "ladder "*FAILED* ]] && without=(--without cuda)
export WITHOUT="${without[*]}" TINY="${tiny[*]}" FEW="${few[*]}" FASTEST=""
step tiles 200 bash -c tiles
# what follows takes the fastest tiles that were found
[[ $STEPS == *" tiles "* ]] && fastest=$(ls "$OUT"/tiles-*.json 2> /dev/null | head -n 1)
[[ -n ${fastest:-} ]] && export FASTEST="--tiles $fastest"
step proof 150 bash -c proof
step speed 110 bash -c speed
step smoke 60 bash -c smoke
step tests 400 bash -c gpu_tests
for tool in memcheck racecheck synccheck; do
  step "ladder-$tool" 300 compute-sanitizer --tool "$tool" --error-exitcode 99 build/gpu/ladder
done
step sanitizer 600 compute-sanitizer --error-exitcode 99 "$PYTHON" -m bench smoke
step racecheck 900 compute-sanitizer --tool racecheck --error-exitcode 99 "$PYTHON" -m bench smoke
step bench 1800 "$PYTHON" -m bench --device "$DEVICE" --out "$OUT" ${BENCH:-}

rm -rf "$LOGS"
echo "== summary"
cat "$OUT/summary.txt"
exit "$failed"
