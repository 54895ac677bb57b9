#!/bin/sh
# Builds the release into build/. Usage: tools/build.sh [more arguments for cmake]
set -eu
cd "$(dirname "$0")/.."
cmake -S . -B build -G Ninja "$@" >/dev/null
ninja -C build flap
echo "build.sh: build/tools/flap"
