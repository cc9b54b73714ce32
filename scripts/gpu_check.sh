#!/bin/sh
# gpu_check.sh [--minutes N] [--wheels DIR] [--out DIR] [--rehearse]: test, check and measure everything on this machine's GPU.
# It takes PYTHON's torch, triton, numpy and pytest, installs nothing and needs no network. Results go to DIR, $OUT or
# benchmarks/results, each part's as it ends. Without a GPU it says which parts it would have run; --rehearse runs them on
# one that is emulated. In a copy of the files without .git, FASTDDIM_COMMIT=$(git rev-parse HEAD) names what was measured.
set -eu
cd "$(dirname "$0")/.."
PYTHONPATH=".${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" benchmarks/gpu_check.py "$@"
