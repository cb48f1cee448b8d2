#!/usr/bin/env bash
# Prints the folder of the sources that e2e/release/previous names, the last release's, with its operator in `ashlar-operator`;
# fails with 3 when this clone does not have that commit and cannot fetch it.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

read -r commit version < "$REPO/e2e/release/previous"
has_commit() { git -C "$REPO" cat-file -e "$commit^{commit}" 2> /dev/null; }

# It is there to be upgraded from: without optimisation it is built in a third of the time.
make_previous() {
    say "Building the operator of $version"
    git -C "$REPO" archive "$commit" | tar -x -C "$1"
    cd "$1"
    CARGO_PROFILE_DEV_DEBUG=0 cargo build --quiet --locked --bin ashlar-operator --target-dir "$1/target"
    mv target/debug/ashlar-operator .
    rm -rf target
}

has_commit || git -C "$REPO" fetch --quiet --depth 1 origin "$commit" 2> /dev/null || true
has_commit || {
    say "This clone has no commit $commit ($version)"
    exit 3
}
cached previous "$(hash_of "$commit" "$(declare -f make_previous)")" make_previous
