#!/bin/sh
# make_venv.sh PYTHON FOLDER: a virtual environment, also on a Debian or Ubuntu that ships python3 without its venv module.
set -eu
python=$1
venv=$2
# Asked first, so that a PYTHON that does not run ends here, before anything is installed or changed.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
# Debian's python3-venv is what brings ensurepip.
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    package="python$version-venv"
    root=""
    if [ "$(id -u)" != 0 ]; then
        root="sudo -n"
        if ! sudo -n true 2>/dev/null; then
            echo "python3's venv module is missing; run: sudo apt-get install $package" >&2
            exit 1
        fi
    fi
    $root apt-get update -qq
    $root apt-get install -y -qq "$package"
fi
"$python" -m venv "$venv"
