#!/bin/bash
# Installs, builds and checks everything that needs no GPU.
# Usage: tools/check.sh [--no-install] [--with-torch] [--quick] [--coverage]
#   --no-install   leave packages alone (they must be there)
#   --with-torch   also put PyTorch and transformers into .venv, for the tests that compare with them (gigabytes)
#   --quick        the gcc build and its tests only: no clang, no sanitizers
#   --coverage     also what tools/coverage.sh reports, at least 95% of lines and 85% of branches: a quarter of an hour more
# Random cases come from one fixed seed, so that a red run is the change's own doing; FLAP_TEST_SEED=$RANDOM tools/check.sh looks
# for more, and so does every test that is run by itself.
# Ends with one line: N passed, N failed, N skipped. Exit status 0 only if nothing failed.
# Folders: build (gcc), build-clang, build-asan, build-tsan; logs in build/check-logs.
set -u
cd "$(dirname "$0")/.."

install=yes torch=no quick=no coverage=no
for argument in "$@"; do
  case "$argument" in
    --no-install) install=no ;;
    --with-torch) torch=yes ;;
    --quick) quick=yes ;;
    --coverage) coverage=yes ;;
    -h | --help) sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "check.sh: error: unknown option $argument; see tools/check.sh --help" >&2; exit 1 ;;
  esac
done

export FLAP_TEST_SEED=${FLAP_TEST_SEED:-20261124}
passed=0 failed=0 skipped=0
logs=build/check-logs
rm -rf "$logs"
mkdir -p "$logs"

# step <name> <command...>: counts as one check; 77 skips, and the end of a failure's log is shown.
step() {
  local name=$1 start=$SECONDS status
  shift
  "$@" >"$logs/$name.log" 2>&1
  status=$?
  case $status in
    0) echo "passed   $name ($((SECONDS - start)) s)"; passed=$((passed + 1)) ;;
    77) echo "skipped  $name: $(tail -n 1 "$logs/$name.log")"; skipped=$((skipped + 1)) ;;
    *) echo "FAILED   $name ($((SECONDS - start)) s): see $logs/$name.log"; failed=$((failed + 1))
       tail -n 25 "$logs/$name.log" | sed 's/^/    /' ;;
  esac
  return $status
}

check_coverage() {
  tools/coverage.sh | awk '{ print } $1 == "total" { enough = $3 + 0 >= 95 && $5 + 0 >= 85 } END { exit !enough }'
}

# tests <name> <folder> [more arguments for ctest]: every test counts as one check.
tests() {
  local name=$1 folder=$2 start=$SECONDS junit="$PWD/$logs/$1.xml" counts
  shift 2
  ctest --test-dir "$folder" -j 3 --output-on-failure --output-junit "$junit" "$@" >"$logs/$name.log" 2>&1
  counts=$(python3 -c 'import sys, xml.etree.ElementTree as tree
suite = tree.parse(sys.argv[1]).getroot()
total, bad, skip = (int(suite.get(key) or 0) for key in ("tests", "failures", "skipped"))
skip += int(suite.get("disabled") or 0)
print(total - bad - skip, bad, skip)' "$junit" 2>/dev/null) || counts="0 1 0"
  set -- $counts
  [ "$1" -gt 0 ] || set -- 0 $(($2 + 1)) "$3" # no test at all is a failure too
  passed=$((passed + $1)) failed=$((failed + $2)) skipped=$((skipped + $3))
  if [ "$2" -gt 0 ]; then
    echo "FAILED   $name ($((SECONDS - start)) s): $1 passed, $2 failed, $3 skipped; see $logs/$name.log"
    sed -n '/The following tests FAILED/,$p' "$logs/$name.log" | sed 's/^/    /'
  else
    echo "passed   $name ($((SECONDS - start)) s): $1 passed, $3 skipped"
  fi
}

sources() { find base io kernels pager model engine tools tests bench -name '*.[ch]' ! -name '*_table.h' | sort; }
check_format() { sources | xargs clang-format --dry-run -Werror; }

# Marks that somebody meant to come back to, conflicts, blanks at line ends, tabs in C.
check_leftovers() {
  local words='\b(TO''DO|FIX''ME|XX''X|HA''CK)\b|^(<<<<<<<|>>>>>>>) '
  local status=0
  sources | xargs grep -nE "$words|[[:space:]]+$" && status=1
  sources | xargs grep -nP '\t' && status=1
  find tools tests .ci -name '*.sh' -o -name '*.py' | xargs grep -nE "$words|[[:space:]]+$" && status=1
  find . -name '*.md' -not -path './build*' -not -path './.venv/*' | xargs grep -nE "$words" && status=1
  return $status
}

# A faster linker where there is one, for 140 programs: seconds of each build.
linking=${LDFLAGS:-}
for name in gold lld; do
  command -v "ld.$name" >/dev/null 2>&1 && linking="${LDFLAGS:-} -fuse-ld=$name"
done

build() { # <folder> <targets> [cmake arguments]
  local folder=$1 targets=$2
  shift 2
  cmake -S . -B "$folder" -G Ninja "-DCMAKE_EXE_LINKER_FLAGS=$linking" "$@" && ninja -C "$folder" $targets
}

# For its warnings: what gcc compiled, once each, and nothing is made of it. Files with flags of their own, for vectors, are
# compiled, for that is where clang says what it cannot do with them.
check_clang() {
  cmake -S . -B build-clang -G Ninja -DCMAKE_C_COMPILER=clang -DFLAP_CUDA=OFF -DCMAKE_BUILD_TYPE=None \
    -DCMAKE_EXPORT_COMPILE_COMMANDS=ON && python3 - build-clang/compile_commands.json <<'END'
import concurrent.futures, json, shlex, subprocess, sys
checks = {}
for entry in json.load(open(sys.argv[1])):
    words = shlex.split(entry["command"])
    at = words.index("-o")
    own = any(word.startswith(("-O", "-mavx")) for word in words)
    end = ("-o", "/dev/null") if own else ("-fsyntax-only",)
    checks[(*words[:at], *words[at + 2:], *end)] = entry["directory"]
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    failed = sum(pool.map(lambda words: subprocess.run(words, cwd=checks[words]).returncode != 0, checks))
print(f"{len(checks)} files, {failed} with errors")
sys.exit(failed > 0 or not checks)
END
}

# Python packages that tests compare with; the tests skip what is not there.
make_venv() {
  [ -x .venv/bin/python ] || python3 -m venv .venv || return 1
  local packages="numpy safetensors tokenizers"
  [ $torch = yes ] && packages="$packages torch transformers"
  .venv/bin/python - $packages <<'END' && { echo "everything is installed"; return 0; }
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
END
  .venv/bin/pip install -q --disable-pip-version-check $packages || { echo "no package index: tests that compare are skipped"; return 77; }
}

finish_venv() {
  local status
  wait "$venv"
  status=$?
  cat "$logs/venv-begun.log"
  return $status
}

tree_state() { git status --porcelain 2>/dev/null; }
before=$(tree_state)
# Tests must leave the tree as they found it.
check_nothing_left() {
  local after
  after=$(tree_state)
  [ "$before" = "$after" ] && return 0
  echo "before:"; echo "$before"; echo "after:"; echo "$after"
  return 1
}

[ $install = no ] || step install tools/install.sh
make_venv >"$logs/venv-begun.log" 2>&1 & # which waits for the network more than it computes
venv=$!
step layering python3 tools/check_layering.py
step format check_format
step leftovers check_leftovers
# With the cuda device where nvcc is: the oldest generation and Hopper's own kernels, and nothing optimised where no GPU is, for nothing
# of it is run there. The other builds do without.
cuda="-O3" generations="80-real;90-real"
[ -e /dev/nvidiactl ] || cuda="-Xcicc -O0" generations=80-real
built=no
step build-gcc build build all "-DCMAKE_CUDA_ARCHITECTURES=$generations" "-DCMAKE_CUDA_FLAGS=$cuda" && built=yes
step venv finish_venv
[ $built = no ] || tests tests-gcc build
if [ $quick = no ]; then
  step clang check_clang
  # Under sanitizers -O2 takes half as long again to build, and its tests run no faster. -g1 has what a stack trace shows.
  sanitized=(-DFLAP_BENCH=OFF -DCMAKE_BUILD_TYPE=None "-DCMAKE_C_FLAGS=-O1 -g1")
  export CK_FORK=no UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 TSAN_OPTIONS=halt_on_error=1
  if step build-asan build build-asan all -DFLAP_SANITIZE=address,undefined "${sanitized[@]}"; then
    tests tests-asan build-asan -LE slow
  fi
  if step build-tsan build build-tsan "tests/base/all tests/block/all tests/pager/all" -DFLAP_SANITIZE=thread \
    "${sanitized[@]}"; then
    for folder in base block pager; do tests tests-tsan-$folder build-tsan/tests/$folder -LE "slow|pure"; done
  fi
fi
if [ $coverage = yes ]; then
  step coverage check_coverage
  tail -n 1 "$logs/coverage.log"
fi
step nothing-left check_nothing_left

echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
