#!/usr/bin/env bash
# One command for a machine with an NVIDIA GPU: builds the CUDA trainer, tests it, times it, and
# writes a JSON and a readable table under dev/results/, named by device and revision. --help lists
# the options, --dry-run says what it would do.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH

stop() {
    echo "gpu_check.sh: $1" >&2
    exit 2
}

command -v "$python" > /dev/null ||
    stop "needs Python 3: $python was not found (PYTHON names another)"
for argument in "$@"; do
    case $argument in
        --dry-run | --help | -h) exec "$python" "$here/gpu_check.py" "$@" ;;
    esac
done
command -v nvidia-smi > /dev/null ||
    stop "needs an NVIDIA GPU and its driver: nvidia-smi was not found"
command -v nvcc > /dev/null ||
    stop "needs the CUDA toolkit, 12 or 13: nvcc was not found (CUDA_HOME says where)"
command -v make > /dev/null || stop "needs make"
nvidia-smi --query-gpu=name --format=csv,noheader > /dev/null 2>&1 ||
    stop "nvidia-smi finds no GPU"
exec "$python" "$here/gpu_check.py" "$@"
