#!/bin/sh
# apt_install.sh PACKAGES...: with apt, as root or through sudo; without either, the line for an administrator.
set -eu
root=""
if [ "$(id -u)" != 0 ]; then
    root="sudo -n"
    if ! sudo -n true 2>/dev/null; then
        echo "packages are missing; run: sudo apt-get install $*" >&2
        exit 1
    fi
fi
$root apt-get update -qq
DEBIAN_FRONTEND=noninteractive $root apt-get install -y -qq --no-install-recommends "$@"
