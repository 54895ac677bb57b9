#!/bin/bash
# Runs the tests that need a GPU, out of a build made with -DFLAP_CUDA=ON, and prints one table.
# Usage: tools/check-gpu.sh <build folder> [folder for logs]
# A test that needs a GPU has "cuda" in its name. The build may have been made elsewhere and copied here.
# Ends with one line: N passed, N failed, N skipped. Exit status 0 only if something passed and nothing failed.
set -u
case "${1:-}" in
  "" | -h | --help) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
esac
build=$1
logs=${2:-$build/check-gpu-logs}
[ -d "$build/tests" ] || { echo "check-gpu.sh: error: $build has no folder tests: is it a build?" >&2; exit 1; }
mkdir -p "$logs"

passed=0 failed=0 skipped=0
for test in "$build"/tests/*/test_*cuda*; do
  [ -f "$test" ] && [ -x "$test" ] || continue
  name=$(basename "$test") start=$(date +%s.%N)
  timeout 600 "$test" >"$logs/$name.log" 2>&1
  status=$?
  seconds=$(echo "$(date +%s.%N) $start" | awk '{printf "%.1f", $1 - $2}')
  checks=$(grep -o 'Checks: [0-9]*, Failures: [0-9]*, Errors: [0-9]*' "$logs/$name.log" | tail -n 1)
  case $status in
    0) verdict=passed; passed=$((passed + 1)) ;;
    77) verdict=skipped; skipped=$((skipped + 1)); checks=$(tail -n 1 "$logs/$name.log") ;;
    *) verdict=FAILED; failed=$((failed + 1)) ;;
  esac
  printf '%-8s %-24s %7s s  %s\n' "$verdict" "$name" "$seconds" "$checks"
  [ $verdict = FAILED ] && grep -E ':[EF]:|[Aa]ssert|rror|signal' "$logs/$name.log" | head -n 20 | cut -c 1-240 | sed 's/^/    /'
done
[ $((passed + failed + skipped)) -gt 0 ] ||
  echo "check-gpu.sh: error: no tests of the cuda device in $build: built without CUDA, or only flap was built (ninja -C $build)" >&2
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
