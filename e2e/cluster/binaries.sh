#!/usr/bin/env bash
# binaries.sh NAME [CARGO FLAG...]: builds one of Ashlar's binaries (ashlar-operator, ashlar) in release mode and prints its path.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

binary=${1:?ashlar-operator or ashlar}
shift
cd "$REPO"
say "Building $binary"
cargo build --release --locked --bin "$binary" "$@" >&2
echo "${CARGO_TARGET_DIR:-$REPO/target}/release/$binary"
