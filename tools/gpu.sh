#!/usr/bin/env bash
# On a GPU machine, without network: build against the torch found there, test, check, time. Run as `make gpu`.
#
#   tools/gpu.sh [step...]     the steps named, or all of them in the order of ALL_STEPS
#
#   smoke                 every loss, layout and dtype at tiny shapes on every backend: the first answer of a new device
#   tests                 in parallel where pytest-xdist is installed: they compile about 1,900 Triton kernels
#   ladder                the Hopper kernels from one tile to the whole, without torch (tests/cuda_kernels/ladder.cu);
#                         ladder-* the same under compute-sanitizer's tools
#   sanitizer, racecheck  every backend at tiny shapes under memcheck and racecheck
#   tune                  other tile sizes, for triton_kernels/configs.py
#
#   PYTHON   interpreter that has torch (python3); the package is installed there, editable
#   OUT      folder of the logs (bench/results/gpu-logs); every step writes its log as it runs
#   DEVICE   cuda; cpu rehearses the script on a machine without a GPU
#   LIMIT    seconds that any one step may take at most
#   BENCH    further arguments of the benchmark: --time-limit SECONDS, --only REGEX
#
# Ten minutes a call, on machines that forget in between:
#   LIMIT=280 tools/gpu.sh install smoke tests
#   LIMIT=400 tools/gpu.sh install ladder tune
#   BENCH="--time-limit 380" LIMIT=460 tools/gpu.sh install bench
#
# A failing step does not stop the later ones; the exit status is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results/gpu-logs}
DEVICE=${DEVICE:-cuda}
ALL_STEPS="install smoke ladder tests gradcheck ladder-memcheck ladder-racecheck ladder-synccheck sanitizer racecheck bench tune"
STEPS=" ${*:-$ALL_STEPS} "
failed=0
report=()
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1
PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # ninja beside the interpreter

describe() {
  "$PYTHON" - <<'PY'
import platform, subprocess


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().replace("\n", ", ")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


import torch

try:
    import triton
except ImportError:
    triton = None
found = torch.cuda.is_available()
print("device:", torch.cuda.get_device_name() if found else "no GPU", *(torch.cuda.get_device_capability() if found else ()))
print("driver:", output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
print("python:", platform.python_version())
print("torch: ", torch.__version__, "with CUDA", torch.version.cuda)
print("triton:", getattr(triton, "__version__", "not installed"))
print("commit:", output("git", "describe", "--always", "--dirty", "--abbrev=40"))
PY
}

# step NAME SECONDS COMMAND...: run under a time limit into a log of its own, remember how it ended; an interrupted
# pytest still prints the failures so far
step() {
  local name=$1 limit=$(($2 < ${LIMIT:-$2} ? $2 : LIMIT)) began=$SECONDS status=0 result=ok log
  shift 2
  [[ $STEPS == *" $name "* ]] || return 0
  log="$OUT/$name.log"
  echo "== $name: $*"
  timeout --signal=INT --kill-after=30 "$limit" "$@" > "$log" 2>&1 || status=$?
  if ((status == 0)); then
    tail -n 3 "$log"
  elif [[ $1 == compute-sanitizer ]] && grep -q "Device not supported" "$log"; then
    result="not allowed on this device"
  else
    ((status == 124 || status == 137)) && result="FAILED (over $limit s)" || result="FAILED ($status)"
    failed=$((failed + 1))
    tail -n 40 "$log"
  fi
  report+=("$(printf '%-16s %s, %d s' "$name" "$result" $((SECONDS - began)))")
}

describe > "$OUT/summary.txt" || exit 1
if [[ $DEVICE == cuda ]] && grep -q "^device: no GPU" "$OUT/summary.txt"; then
  echo "make gpu needs a GPU that $PYTHON's torch can use; torch.cuda.is_available() is False." >&2
  exit 1
fi

# NATIVE=1: a missing compiler is a failure here, not a pure-Python package
CONTRASTIVE_EXT_NATIVE=1 PIP_BREAK_SYSTEM_PACKAGES=1 \
  step install 300 "$PYTHON" -m pip install -v --no-build-isolation --no-deps --no-index -e .
step smoke 300 "$PYTHON" -m bench smoke --device "$DEVICE"
if [[ $DEVICE == cuda ]] && command -v nvcc > /dev/null; then
  step ladder 300 "$PYTHON" tools/cuda_gate.py ladder
else
  report+=("ladder           not run: needs a GPU and nvcc")
fi
parallel=()
if "$PYTHON" -c "import xdist" 2> /dev/null; then
  parallel=(-n "$(nproc)" --dist worksteal) # neighbours, which share kernels, on one worker
  export OMP_NUM_THREADS=1
fi
step tests 1500 "$PYTHON" -m pytest tests -q -m "not interpreter" "${parallel[@]}"
step gradcheck 600 "$PYTHON" -m pytest tests -q -m "not interpreter" -k gradcheck "${parallel[@]}"
unset OMP_NUM_THREADS
if command -v compute-sanitizer > /dev/null; then
  if [[ $DEVICE == cuda && -x build/ladder ]]; then
    for tool in memcheck racecheck synccheck; do
      step "ladder-$tool" 600 compute-sanitizer --tool "$tool" --error-exitcode 99 build/ladder
    done
  fi
  step sanitizer 600 compute-sanitizer --error-exitcode 99 "$PYTHON" -m bench smoke
  step racecheck 900 compute-sanitizer --tool racecheck --error-exitcode 99 "$PYTHON" -m bench smoke
elif [[ $STEPS == *" sanitizer "* ]]; then
  report+=("sanitizer        not installed")
fi
read -ra bench_arguments <<< "${BENCH:-}"
step bench 1800 "$PYTHON" -m bench --device "$DEVICE" --out bench/results "${bench_arguments[@]}"
[[ $DEVICE == cpu ]] || step tune 580 "$PYTHON" -m bench tune --out bench/results

printf '%s\n' "${report[@]}" >> "$OUT/summary.txt"
echo "== summary"
cat "$OUT/summary.txt"
exit "$failed"
