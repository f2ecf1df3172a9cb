#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under 9 minutes: the GPU tests, a short real training
# at 352 px with edgenext_base, and the times of its step. Results: $OUT/<gpu>-<commit>.json and logs;
# the file is written after each section, so that a call that is cut off keeps what it measured.
#
#   OUT=benchmarks/results tools/gpu_check.sh            on a CUDA machine
#   tools/gpu_check.sh --only step options               the tests and these sections
#   tools/gpu_check.sh --smoke                           the same path with small sizes, on a CPU
#
# Wheels in the folder .whl are installed first, for a machine without internet access; with
# segmentation-models-pytorch among them its decoders are timed too.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-benchmarks/results}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"

if [ -d .whl ]; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
# The package need not be installed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

status=0
# Interrupted, pytest still says what failed until then.
timeout -s INT -k 10 100 "$PYTHON" -m pytest -m gpu tests/gpu tests/metrics/test_device.py -o addopts= \
  -p no:cacheprovider -v --tb=short -n 6 --timeout=60 --durations=15 2>&1 | tee "$OUT/gpu_tests.log"
tests="${PIPESTATUS[0]}"
# 5: no test ran, as on a machine without CUDA.
[ "$tests" -eq 0 ] || [ "$tests" -eq 5 ] || status=1

timeout -k 5 "${SECONDS_LEFT:-420}" "$PYTHON" tools/gpu_check.py --output "$OUT" --tests-exit-code "$tests" "$@" 2>&1 | tee "$OUT/gpu_check.log"
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
exit "$status"
