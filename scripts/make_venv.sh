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
if [ -n "$packages" ]; then
    root=""
    if [ "$(id -u)" != 0 ]; then
        root="sudo -n"
        if ! sudo -n true 2>/dev/null; then
            echo "packages are missing; run: sudo apt-get install $packages" >&2
            exit 1
        fi
    fi
    $root apt-get update -qq
    # shellcheck disable=SC2086
    $root apt-get install -y -qq $packages
fi
"$python" -m venv "$venv"
