#!/bin/bash
# Runs compute-sanitizer over the tests of the CUDA kernels of a build, and prints one table.
# Usage: bench/gpu/sanitize.sh [options] <build folder> [program ...]
#   program          test_cuda_rows and so on, in <build>/tests/kernels; all test_cuda_* by default
#   --tools LIST     of memcheck,racecheck,initcheck,synccheck; memcheck,racecheck by default
#   --seconds N      all of it ends within that, 500 by default
#   --limit N        seconds per run; by default the share of --seconds that lets every run have its turn
#   --jobs N         runs at a time, 4 by default: the oracle on the CPU is most of a run, so they do not slow each other
#   --seed N         FLAP_TEST_SEED of the random cases, 1 by default
#   --logs FOLDER    what everything printed; <build>/sanitize-logs by default
# A run that reaches its limit is "cut": what it did until then was checked, the rest was not.
# racecheck follows the barriers of attention on Hopper only in a build with -DFLAP_RACECHECK=ON; in others it names races
# of them (kernels/cuda/ATTENTION.md). Races that it reports within kernels of cuBLASLt (which synchronise by means that it does
# not know) are counted apart.
# Exit status 0: all runs ended and found nothing; 1: something was found, or a test failed; 2: nothing was found, but
# some were cut; 77: there is no compute-sanitizer, or no GPU.
set -u
usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; }
die() { echo "sanitize.sh: error: $*" >&2; exit 1; }

tools=memcheck,racecheck seconds=500 limit='' jobs=4 seed=1 logs='' build='' programs=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) usage; exit 0 ;;
    --tools | --seconds | --limit | --jobs | --seed | --logs)
      [ $# -ge 2 ] || die "$1 needs a value"
      declare "${1#--}=$2"; shift ;;
    -*) die "there is no option $1" ;;
    *) if [ -z "$build" ]; then build=$1; else programs+=("$(basename "$1")"); fi ;;
  esac
  shift
done
[ -n "$build" ] || { usage; exit 1; }
[ -d "$build/tests/kernels" ] || die "$build has no folder tests/kernels: is it a build?"
for word in "$seconds" "${limit:-1}" "$jobs" "$seed"; do
  [[ $word =~ ^[0-9]+$ ]] || die "$word is no whole number"
done
[ "$jobs" -gt 0 ] || die "--jobs must be at least 1"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
[ -n "$sanitizer" ] || { echo "skipped: there is no compute-sanitizer"; exit 77; }
logs=${logs:-$build/sanitize-logs}
mkdir -p "$logs" || exit 1
rm -f "$logs"/*.result

if [ ${#programs[@]} -eq 0 ]; then
  for path in "$build"/tests/kernels/test_cuda_*; do
    [ -f "$path" ] && [ -x "$path" ] && programs+=("$(basename "$path")")
  done
fi
[ ${#programs[@]} -gt 0 ] || die "$build/tests/kernels has no test_cuda_*: was it built with -DFLAP_CUDA=ON?"
for program in "${programs[@]}"; do
  [ -x "$build/tests/kernels/$program" ] || die "there is no program $build/tests/kernels/$program"
done
IFS=, read -ra chosen <<<"$tools"
for tool in "${chosen[@]}"; do
  case $tool in memcheck | racecheck | initcheck | synccheck) ;; *) die "compute-sanitizer has no tool $tool" ;; esac
done
runs=$((${#chosen[@]} * ${#programs[@]}))
waves=$(((runs + jobs - 1) / jobs))
limit=${limit:-$((seconds / waves - 6))} # 5 of them for a run that has to be killed
[ "$limit" -gt 0 ] || die "$seconds s are not enough for $waves turns of $jobs runs"

libraries='nvjet_|cutlass|sm[0-9]+_xmma|cublas' # kernels of cuBLASLt begin so

# One run; leaves a line for the table.
check() {
  local tool=$1 program=$2 log="$logs/$1-$2.log" start=$SECONDS status verdict findings library summary
  CK_FORK=no FLAP_TEST_SEED=$seed timeout -k 5 "$limit" "$sanitizer" --tool "$tool" --error-exitcode 99 \
    "$build/tests/kernels/$program" >"$log" 2>&1
  status=$?
  # A finding begins after "========= " at once; what belongs to it is indented further.
  local found='^========= (Invalid|Misaligned|Program hit|Error: |Warning: |Uninitialized|Barrier error|Leaked|Out-of-range)'
  library=$(grep -E "$found" "$log" | grep -cE "Race reported .* at (void )?($libraries)")
  findings=$(($(grep -cE "$found" "$log") - library))
  summary=$(grep -hoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)
  [ -n "$summary" ] || summary=$(grep -hoE 'Checks: [0-9]*, Failures: [0-9]*, Errors: [0-9]*' "$log" | tail -n 1)
  case $status in
    0) verdict=passed ;;
    77) verdict=skipped ;;
    124 | 137) verdict="cut"; [ "$findings" -gt 0 ] && verdict=FOUND ;;
    99) verdict=FOUND; [ "$findings" -eq 0 ] && [ "$library" -gt 0 ] && verdict=passed ;;
    *) verdict=FAILED ;;
  esac
  [ $verdict = passed ] && [ "$findings" -gt 0 ] && verdict=FOUND
  [ "$library" -gt 0 ] && summary="$summary; $library in cuBLASLt"
  printf '%-8s %-10s %-24s %5d s  %3d findings  %s\n' $verdict "$tool" "$program" $((SECONDS - start)) "$findings" "$summary" \
    >"$logs/$tool-$program.result"
}

echo "$runs runs, $jobs at a time, at most $limit s each; seed $seed; logs in $logs"
for tool in "${chosen[@]}"; do
  for program in "${programs[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    check "$tool" "$program" &
  done
done
wait
cat "$logs"/*.result
for log in "$logs"/*.log; do
  result=${log%.log}.result
  grep -qsE '^(FOUND|FAILED)' "$result" || continue
  echo "--- $(basename "$log" .log)"
  grep -E '^=========|:[EF]:|[Aa]ssert' "$log" | head -n 20 | cut -c 1-200 | sed 's/^/    /'
done
count() { cat "$logs"/*.result | grep -c "^$1"; }
found=$(count FOUND) failed=$(count FAILED) cut=$(count cut) passed=$(count passed) skipped=$(count skipped)
echo "$passed passed, $found with findings, $failed failed, $cut cut, $skipped skipped, in $SECONDS s"
[ $((found + failed)) -eq 0 ] || exit 1
[ "$cut" -eq 0 ] || exit 2
[ "$passed" -gt 0 ] || exit 77
