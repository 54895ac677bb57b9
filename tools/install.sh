#!/bin/sh
# Installs what FLAP needs to be built and tested, from Debian's own packages.
# Usage: tools/install.sh            as root, or with sudo at hand
# Where everything is installed it changes nothing, asks for no rights, and says so.
set -eu

packages="build-essential cmake ninja-build pkg-config
  liburing-dev liblz4-dev libzstd-dev libxxhash-dev libjansson-dev libyaml-dev libpcre2-dev libopenblas-dev
  check libsubunit-dev clang clang-format python3 python3-venv"

if ! command -v dpkg-query >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
  echo "install.sh: error: this system has no apt-get: install the equivalents of these Debian packages:" $packages >&2
  exit 1
fi

missing=""
for package in $packages; do
  state=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [ "$state" = "install ok installed" ] || missing="$missing $package"
done
if [ -z "$missing" ]; then
  echo "install.sh: everything is installed"
  exit 0
fi

if [ "$(id -u)" -eq 0 ]; then
  as_root=""
elif command -v sudo >/dev/null 2>&1; then
  as_root="sudo"
else
  echo "install.sh: error: not root, and there is no sudo; as root, run: apt-get install$missing" >&2
  exit 1
fi

echo "install.sh: installing$missing"
export DEBIAN_FRONTEND=noninteractive
$as_root apt-get update -q
# sudo drops the environment, so the variable is given again.
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
echo "install.sh: done"
