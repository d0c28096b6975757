#!/usr/bin/env bash
# Everything that wants a GPU, within ten minutes and without a network:
#
#     tests/gpu.sh OUTDIR
#
# builds detops in place for the visible GPU, runs the whole test suite, then compute-sanitizer on a selection, then the
# benchmarks. Leaves build.log, tests.xml, memcheck.log, racecheck.log, initcheck.log, benchmarks.json and what each
# step printed in OUTDIR; prints a table last. Uses the torch, pytest and nvcc that are there; a missing or refused
# compute-sanitizer is said and passed over. Ends with status 1 if something failed.
#
#   PYTHON                 the interpreter (python3)
#   DETOPS_GPU_SELECTION   how many tests of each file run under compute-sanitizer (6)
#   DETOPS_GPU_BENCHMARKS  more arguments for benchmarks/run.py, such as "--quick nms"
set -uo pipefail

[ $# -eq 1 ] || { echo "usage: tests/gpu.sh OUTDIR" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "$0")/.." || exit
python="${PYTHON:-python3}"

total=580        # seconds
sanitizer=40     # of them for each of compute-sanitizer's tools
benchmarks=110   # and at least these for the benchmarks
table=()
failed=0

left() { echo $((total - SECONDS > 1 ? total - SECONDS : 1)); }

row() { table+=("$(printf '%-11s %5s s  %s' "$1" "$2" "$3")"); }

# step NAME SECONDS COMMAND...: runs it, with its output on the screen and in OUTDIR/NAME.log; sets `status` and `took`.
step() {
  local name="$1" limit="$2" began=$SECONDS
  shift 2
  printf '\n=== %s (at most %s s)\n' "$name" "$limit"
  # SIGINT lets Python and compute-sanitizer write what they have.
  timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  took=$((SECONDS - began))
}

outcome() {
  case "$status" in
    0) echo "ok" ;;
    124 | 137) echo "OUT OF TIME" ;;
    *) echo "FAILED (status $status)" ;;
  esac
}

# "12 passed, 3 skipped" of a junit file.
junit_counts() {
  "$python" - "$1" <<'EOF'
import sys
import xml.etree.ElementTree as xml

try:
    suites = list(xml.parse(sys.argv[1]).getroot().iter("testsuite"))
except (OSError, xml.ParseError):
    sys.exit("no result")
counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
counts["passed"] = counts.pop("tests") - counts["failures"] - counts["errors"] - counts["skipped"]
print(", ".join(f"{counts[name]} {name}" for name in ("passed", "failures", "errors", "skipped") if counts[name]))
EOF
}

build() {
  step build 200 env DETOPS_CUDA=1 "$python" setup.py build_ext --inplace
  [ "$status" -eq 0 ] || failed=1
  row build "$took" "$(outcome)"
}

run_tests() {
  local limit=$(($(left) - 3 * sanitizer - benchmarks))
  # The emulation needs no GPU and is tested where there is none.
  step tests "$((limit > 60 ? limit : 60))" env DETOPS_TEST_DEVICES=cpu,cuda "$python" -m pytest -q tests \
    --ignore=tests/test_emulation.py --junitxml="$out/tests.xml"
  [ "$status" -eq 0 ] || failed=1
  row tests "$took" "$(outcome): $(junit_counts "$out/tests.xml" 2>&1)"
}

# The names of a few CUDA tests of each file, evenly spread.
select_tests() {
  DETOPS_TEST_DEVICES=cuda timeout 60 "$python" -m pytest -q --collect-only tests --ignore=tests/test_emulation.py |
    awk -v want="${DETOPS_GPU_SELECTION:-6}" -F '::' '
      /::/ { names[$1, count[$1]++] = $0 }
      END  { for (file in count) {
               step = count[file] > want ? count[file] / want : 1
               for (i = 0; i < count[file]; i += step) print names[file, int(i)] } }'
}

check_with() {
  local tool="$1" report="$out/$1.log" summary
  # Each tensor in an allocation of its own: inside torch's pool of memory an overrun would stay unseen.
  step "$tool" "$sanitizer" env DETOPS_TEST_DEVICES=cuda PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 99 \
    "$python" -m pytest -q -p no:cacheprovider "${selection[@]}"
  summary="$(grep -oE '(ERROR|RACECHECK) SUMMARY: .*' "$report" | tail -n 1)"
  if [ -n "$summary" ]; then
    [[ "$summary" == *"SUMMARY: 0 "* ]] || failed=1
    row "$tool" "$took" "$summary; $(grep -oE '^[0-9]+ (passed|failed|skipped).* in ' "$report" | sed 's/ in $//')"
  elif [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    row "$tool" "$took" "passed over: no summary within $sanitizer s"
  else
    row "$tool" "$took" "passed over, cannot run here: $(grep -m 1 -iE 'not supported|unable|error' "$report" | tr -d =)"
  fi
}

check() {
  local tool
  if ! command -v compute-sanitizer >/dev/null; then
    row sanitizers 0 "passed over: no compute-sanitizer on PATH"
    return
  fi
  mapfile -t selection < <(select_tests)
  if [ "${#selection[@]}" -eq 0 ]; then
    row sanitizers 0 "passed over: no tests for CUDA were found"
    return
  fi
  for tool in memcheck racecheck initcheck; do check_with "$tool"; done
}

run_benchmarks() {
  # shellcheck disable=SC2086  # several arguments
  step benchmarks "$(left)" "$python" benchmarks/run.py --json "$out/benchmarks.json" ${DETOPS_GPU_BENCHMARKS:-}
  [ "$status" -eq 0 ] || failed=1
  row benchmarks "$took" "$(outcome): $(grep -c '"series"' "$out/benchmarks.json" 2>/dev/null || echo no) cases"
}

build
if [ "$failed" -eq 0 ]; then
  run_tests
  check
  run_benchmarks
fi

gpu="$("$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>/dev/null)"
printf '\n=== %s, %s s, results in %s\n' "${gpu:-no GPU is visible}" "$SECONDS" "$out"
printf '%s\n' "${table[@]}"
exit "$failed"
