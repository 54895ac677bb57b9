#!/bin/sh
# Builds the release into build/. Usage: tools/build.sh [more arguments for cmake]
# Where NVIDIA's compiler is, with the cuda device: for the GPUs that are there, or for all generations if there are none. Those
# before Ampere (8.0), which drive a display perhaps, do not count.
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
  -h | --help) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p}' tools/build.sh; exit 0 ;;
esac
cards=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^([89]|[0-9]{2})\.[0-9]$' | tr -d . | sort -u |
  sed 's/$/-real/' | paste -sd ';' - || true)
# What tools/check.sh has asked of that folder, two generations and nothing optimised, is no release.
cmake -S . -B build -G Ninja -U CMAKE_CUDA_ARCHITECTURES -U CMAKE_CUDA_FLAGS ${cards:+"-DCMAKE_CUDA_ARCHITECTURES=$cards"} "$@" >/dev/null
ninja -C build flap
echo "build.sh: build/tools/flap"
