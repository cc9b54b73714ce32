#!/bin/sh
# make_web.sh: what the tests of examples/web need: node, npm, a headless Chromium, and the pinned runtime.
set -eu
cd "$(dirname "$0")"
packages=""
command -v node >/dev/null || packages="nodejs"
command -v npm >/dev/null || packages="$packages npm"
# Ubuntu does not have Debian's package without the windows.
if grep -q '^ID=ubuntu' /etc/os-release; then browser=chromium-browser; else browser=chromium-headless-shell; fi
for name in chromium-headless-shell chromium chromium-browser google-chrome; do
    if command -v $name >/dev/null; then browser=""; fi
done
packages="$packages $browser"
# shellcheck disable=SC2086
[ "$packages" = " " ] || sh apt_install.sh $packages
cd ../examples/web
# npm writes this file last.
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --ignore-scripts --no-audit --no-fund
