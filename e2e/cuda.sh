#!/usr/bin/env bash
# Source it (`. e2e/cuda.sh`) to build the feature `cuda`: where there is no CUDA toolkit, it fetches the compiler and its
# headers, a pinned version, from the Python package index, and sets CUDA_HOME. A GPU is not needed to build.
# Nothing of CUDA is linked or shipped: at run time the driver and cuBLASLt of the GPU host are loaded.

if [ -z "${NVCC:-}" ] && [ -z "${CUDA_HOME:-}" ] && [ ! -x /usr/local/cuda/bin/nvcc ]; then
    CUDA_HOME=$(
        set -euo pipefail
        . "$(dirname "${BASH_SOURCE[0]}")/cluster/lib.sh"
        VERSION=13.0.2
        make_cuda() {
            say "Fetching nvcc of CUDA $VERSION"
            python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-compile --only-binary :all: \
                --target "$1" "cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==$VERSION"
        }
        echo "$(cached cuda "$(hash_of "$VERSION" "$(uname -m)")" make_cuda)/nvidia/cu13"
    ) || return 1
    export CUDA_HOME
fi
