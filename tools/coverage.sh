#!/bin/bash
# How much of the code that must not lose anybody's work the tests run: lines and branches, and what is not covered.
# Usage: tools/coverage.sh [--lines] [file or folder...]      pager, io and the engine's store, unless others are named
#   --lines   also lists the lines that no test runs, and those with a branch that none takes
# Builds with gcc in build-coverage, runs the tests that need no GPU, and reads what gcov says (tools/coverage_table.py).
# It takes minutes, so tools/check.sh leaves it out.
set -eu
cd "$(dirname "$0")/.."

lines="" names=""
for argument in "$@"; do
  case "$argument" in
    --lines) lines=--lines ;;
    -h | --help) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    -*) echo "coverage.sh: error: unknown option $argument; see tools/coverage.sh --help" >&2; exit 1 ;;
    *) names="$names $argument" ;;
  esac
done
[ -n "$names" ] || names="pager io engine/store engine/machine/matmul_choice.c"

# Without inlining every line is counted where it stands (and gcc guesses wrong about initialisation). Threads count side by side without locks: a count that is lost does not matter, and
# tests would take several times as long.
cmake -S . -B build-coverage -G Ninja -DCMAKE_C_COMPILER=gcc -DFLAP_CUDA=OFF -DFLAP_BENCH=OFF -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_C_FLAGS="-O1 -g -fno-inline -Wno-maybe-uninitialized --coverage" >/dev/null
ninja -C build-coverage >build-coverage/build.log || { tail -n 20 build-coverage/build.log; exit 1; }
find build-coverage -name '*.gcda' -delete
# The tests of kernels run none of this code.
CK_FORK=no FLAP_TEST_SEED=${FLAP_TEST_SEED:-20261124} ctest --test-dir build-coverage -j 2 -LE gpu -E '^test_(ops_|cpu_|host_|measure_|matmul_table)' \
  >build-coverage/tests.log 2>&1 || { sed -n '/The following tests FAILED/,$p' build-coverage/tests.log; exit 1; }
python3 tools/coverage_table.py $lines build-coverage $names
