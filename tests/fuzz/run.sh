#!/bin/bash
# Runs the fuzzers of tests/fuzz, two at a time, and prints one table.
# Usage: tests/fuzz/run.sh [--minutes N] [--minimise] [name...]      5 minutes each, all of them
#   --minimise   afterwards puts into tests/fuzz/corpus the few inputs that cover all that was covered (-merge)
# Needs clang. Builds in build-fuzz; what is found on the way stays in build-fuzz/corpus, and the next run goes on from it.
# An input that a reader fails on is build-fuzz/findings/<name>-*; its fuzzer ends there. Exit status 0 only if there is none.
set -u
cd "$(dirname "$0")/../.."

minutes=5 minimise=no names=""
while [ $# -gt 0 ]; do
  case "$1" in
    --minutes) minutes=$2; shift ;;
    --minimise) minimise=yes ;;
    -h | --help) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) echo "run.sh: error: unknown option $1; see tests/fuzz/run.sh --help" >&2; exit 1 ;;
    *) names="$names $1" ;;
  esac
  shift
done
[ -n "$names" ] || names=$(ls tests/fuzz/fuzz_*.c | sed 's|.*/fuzz_||; s|\.c$||' | grep -v '^rig$')

cmake -S . -B build-fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DFLAP_FUZZ=ON -DFLAP_CUDA=OFF -DFLAP_BENCH=OFF >/dev/null &&
  ninja -C build-fuzz tests/fuzz/all >build-fuzz/build.log || { tail -n 20 build-fuzz/build.log; exit 1; }

# Files in memory where there is room for them: a disk would be the slowest part.
scratch=$(mktemp -d -p "$([ -w /dev/shm ] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" flap-fuzz-run-XXXXXX) || exit 1
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch
# Readers take buffers of megabytes; filling, mapping and keeping those anew would take most of the time.
export ASAN_OPTIONS=clear_shadow_mmap_threshold=67108864:max_malloc_fill_size=0:quarantine_size_mb=8

dictionary_of() {
  case $1 in
    index | safetensors | weights) echo safetensors ;;
    trainer_state | matmul_json) echo checkpoint ;;
    jsonl) echo json ;;
    *) echo "$1" ;;
  esac
}

# An input of kilobytes may not ask for more than 128 MiB at once, nor take 5 seconds.
fuzz_one() {
  local name=$1 folder=build-fuzz/corpus/$1 dictionary
  dictionary=tests/fuzz/$(dictionary_of "$name").dict
  mkdir -p "$folder" build-fuzz/findings
  nice build-fuzz/tests/fuzz/fuzz_"$name" -max_total_time=$((minutes * 60)) -max_len=6000 -timeout=5 -malloc_limit_mb=128 \
    -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=build-fuzz/findings/"$name"- \
    $([ -f "$dictionary" ] && echo -dict="$dictionary") "$folder" tests/fuzz/corpus/"$name" >build-fuzz/fuzz_"$name".log 2>&1
}

number() { sed -n "s/^stat::$2: *//p" build-fuzz/fuzz_"$1".log; }

started=$(date +%s)
for name in $names; do
  while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
  fuzz_one "$name" &
done
wait

total=0 findings=0
printf '%-16s %12s %10s %8s %8s %9s\n' harness executions 'a second' edges inputs findings
for name in $names; do
  units=$(number "$name" number_of_executed_units)
  edges=$(grep -o 'cov: [0-9]*' build-fuzz/fuzz_"$name".log | tail -n 1)
  found=$(find build-fuzz/findings -name "$name-*" -newermt "@$started" | wc -l)
  total=$((total + ${units:-0})) findings=$((findings + found))
  printf '%-16s %12s %10s %8s %8s %9s\n' "$name" "${units:-none}" "$(number "$name" average_exec_per_sec)" "${edges#cov: }" \
    "$(ls build-fuzz/corpus/"$name" | wc -l)" "$found"
done
printf '%-16s %12s %10s %8s %8s %9s\n' total "$total" '' '' '' "$findings"

# Inputs with names are there for a reason, and stay; libFuzzer's own are called by their SHA-1, and are chosen anew.
if [ $minimise = yes ] && [ $findings -eq 0 ]; then
  for name in $names; do
    find tests/fuzz/corpus/"$name" -type f -regextype posix-extended -regex '.*/[0-9a-f]{40}' \
      -exec mv -t build-fuzz/corpus/"$name" {} +
    build-fuzz/tests/fuzz/fuzz_"$name" -merge=1 -set_cover_merge=1 -use_counters=0 -max_len=6000 tests/fuzz/corpus/"$name" \
      build-fuzz/corpus/"$name" >build-fuzz/merge_"$name".log 2>&1 || { tail -n 5 build-fuzz/merge_"$name".log; exit 1; }
  done
  du -sb tests/fuzz/corpus
fi
[ $findings -eq 0 ]
