#!/usr/bin/env bash
# Puts cuBLASLt and its licence into FOLDER, for runtime/Dockerfile.cuda: the one library of CUDA that the runtime loads
# beside the driver. NVIDIA lets programs that use it ship it.
set -euo pipefail
folder=${1:?folder}
. "$(dirname "$0")/../cluster/lib.sh"
VERSION=13.1.0.3 # of CUDA 13.0.2, which e2e/cuda.sh compiles with

make_cublas() {
    say "Fetching cuBLASLt $VERSION"
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-compile --no-deps \
        --only-binary :all: --target "$1/site" "nvidia-cublas==$VERSION"
    mv "$1"/site/nvidia/cu13/lib/libcublasLt.so.13 "$1/"
    mv "$1"/site/nvidia_cublas-*.dist-info/licenses/License.txt "$1/LICENSE.cublas"
    rm -r "$1/site"
}

made=$(cached cublas "$(hash_of "$VERSION" "$(uname -m)")" make_cublas)
mkdir -p "$folder"
install -m 0644 "$made"/* "$folder/"
