#!/usr/bin/env bash
# Checks the workflows of GitHub Actions: syntax, expressions, references between jobs.
set -euo pipefail
. "$(dirname "$0")/cluster/lib.sh"

VERSION=v1.7.12

make_actionlint() {
    say "Building actionlint $VERSION"
    cd "$1"
    CGO_ENABLED=0 GOBIN=$1 go install -trimpath "github.com/rhysd/actionlint/cmd/actionlint@$VERSION"
}

tool=$(cached actionlint "$(hash_of "$(go env GOVERSION GOARCH)" "$VERSION")" make_actionlint)
cd "$REPO"
"$tool/actionlint" -no-color
