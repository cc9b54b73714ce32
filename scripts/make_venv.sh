#!/bin/sh
# make_venv.sh PYTHON FOLDER: a virtual environment, also on a Debian or Ubuntu without python3's venv module or gcc.
set -eu
python=$1
venv=$2
# Asked first, so that a PYTHON that does not run ends here, before anything is installed or changed.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
packages=""
# Debian's python3-venv is what brings ensurepip.
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages="python$version-venv"
# Triton compiles its launchers with the machine's C compiler.
command -v "${CC:-gcc}" >/dev/null || command -v clang >/dev/null || packages="$packages gcc libc6-dev"
# shellcheck disable=SC2086
[ -z "$packages" ] || sh "$(dirname "$0")/apt_install.sh" $packages
"$python" -m venv "$venv"
