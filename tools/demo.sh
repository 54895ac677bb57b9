#!/bin/sh
# From a fresh Debian 12 to a trained model and a text from it: installs what is missing, builds, trains out of core,
# samples. Usage: tools/demo.sh [key=value ...]     (overrides of tools/demo.yaml)
# It takes about ten minutes on two cores, and writes 30 to 40 GiB to the disk, of which it holds 256 MiB at a time.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p}' tools/demo.sh; exit 0 ;;
esac

tools/install.sh
tools/build.sh
flap=build/tools/flap
mkdir -p runs/demo-disk # the folder of the extent file, which has no name once it is open

echo
echo "== the plan"
"$flap" plan tools/demo.yaml "$@"
echo
echo "== training"
"$flap" train tools/demo.yaml "$@"
echo
echo "== a sample"
"$flap" sample tools/demo.yaml "$@" --prompt "She had been " --max-new-tokens 300 --temperature 0.8 --seed 1
