#!/bin/sh
# make_cpp.sh PYTHON: what cpp/ is built and tested with, and TensorRT's plugin; at once where all of it is there.
# ONNX Runtime goes to build/onnxruntime, laid out as a release: the library of PYTHON's package, Debian's headers.
set -eu
python=$1
here=$(dirname "$0")
mkdir -p "$here/../build/onnxruntime/lib"
runtime=$(cd "$here/../build/onnxruntime" && pwd)

packages=""
command -v g++ >/dev/null || packages="g++"
command -v make >/dev/null || packages="$packages make"
command -v cmake >/dev/null || packages="$packages cmake"
[ -e /usr/include/nlohmann/json.hpp ] || packages="$packages nlohmann-json3-dev"
[ -e /usr/include/boost/beast.hpp ] || packages="$packages libboost-dev"
[ -e /usr/include/png.h ] || packages="$packages libpng-dev"
command -v clang++ >/dev/null || packages="$packages clang"
# shellcheck disable=SC2086
[ -z "$packages" ] || sh "$here/apt_install.sh" $packages
# Clang's sanitizers are a package of its version's, which `clang` only recommends.
[ -e "$(clang++ -print-file-name="libclang_rt.asan-$(uname -m).a")" ] ||
    sh "$here/apt_install.sh" "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev"

no_headers() {
    echo "ONNX Runtime's headers: $1; unpack one of its releases as $runtime" >&2
    exit 1
}

# Needs no root: nothing is installed, and apt's lists stay as they are.
fetch_headers() {
    command -v apt-get >/dev/null || no_headers "no apt-get to fetch them with"
    scratch=$(mktemp -d "$runtime/.headers.XXXXXX")
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
    options="-qq -o APT::Sandbox::User= -o Dir::Cache=$scratch/cache -o Dir::State::Lists=$scratch/lists"
    # shellcheck disable=SC2086
    apt-get $options update
    # shellcheck disable=SC2086
    if ! apt-cache $options show libonnxruntime-dev >/dev/null 2>&1; then
        # Debian 12 does not have the package: Debian 13's, from the same mirror.
        # shellcheck disable=SC2086
        mirror=$(apt-get $options indextargets --format '$(ORIGIN) $(CODENAME) $(REPO_URI)' 'Identifier: Packages' |
            awk '$1 == "Debian" && $2 !~ /-/ { print $3; exit }')
        [ -n "$mirror" ] || no_headers "none of this machine's package sources has libonnxruntime-dev"
        keys=/usr/share/keyrings/debian-archive-keyring.gpg
        echo "deb [signed-by=$keys] $mirror trixie main" >"$scratch/sources.list"
        options="$options -o Dir::Etc::SourceList=$scratch/sources.list -o Dir::Etc::SourceParts=/dev/null"
        # shellcheck disable=SC2086
        apt-get $options update
    fi
    # shellcheck disable=SC2086
    (cd "$scratch" && apt-get $options download libonnxruntime-dev)
    dpkg-deb -x "$scratch"/libonnxruntime-dev_*.deb "$scratch/package"
    mv "$scratch/package/usr/include/onnxruntime" "$runtime/include"
}

[ -e "$runtime/include/onnxruntime_cxx_api.h" ] || fetch_headers
if [ ! -e "$runtime/lib/libonnxruntime.so" ]; then
    package=$("$python" -c 'import importlib.util as u; print(u.find_spec("onnxruntime").submodule_search_locations[0])')
    library=$(ls "$package"/capi/libonnxruntime.so.*)
    ln -sf "$library" "$runtime/lib/libonnxruntime.so.1"
    ln -sf libonnxruntime.so.1 "$runtime/lib/libonnxruntime.so"
fi
# fetch PACKAGE FOLDER TARGET: a folder of a pinned wheel, unpacked as build/tensorrt/TARGET.
fetch() {
    target=$here/../build/tensorrt/$3
    [ -e "$target" ] || (
        scratch=$(mktemp -d "$here/../build/.tensorrt.XXXXXX")
        trap 'rm -rf "$scratch"' EXIT
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps -c "$here/../constraints.txt" \
            -d "$scratch" "$1"
        "$python" -m zipfile -e "$scratch"/*.whl "$scratch"
        mkdir -p "$(dirname "$target")"
        mv "$scratch/$2" "$target"
    )
}

# TensorRT's headers, for a check that the loader compiles: a package that carries them, as NVIDIA's own do not.
fetch kernel-lens kernel_lens/include/tensorrt include
# Its Python classes, for a check that they take our plugin: without the libraries, which are large and need a GPU.
fetch tensorrt-cu13-bindings tensorrt_bindings python/tensorrt
