#!/usr/bin/env bash
# Puts the built programs of this version into FOLDER as archives with their checksums, as a release has them:
#   ashlar-VERSION-x86_64-linux.tar.gz   ashlar, ashlar-operator, licence, changelog
#   ashlar-VERSION.tgz                   the chart, when helm is on PATH
#   SHA256SUMS
# The same sources give the same bytes: names are sorted, and all times are the commit's.
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
. "$(dirname "$0")/../cluster/lib.sh"
cd "$REPO"
version=$(e2e/release/version.sh)
ashlar=$("$CLUSTER_DIR/binaries.sh" ashlar)
operator=$("$CLUSTER_DIR/binaries.sh" ashlar-operator)
commit_time=$(git log -1 --format=%ct)
name=ashlar-$version-$(uname -m)-linux
mkdir -p "$folder"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/$name"
install -m 0755 "$ashlar" "$operator" "$tmp/$name/"
strip "$tmp/$name/ashlar" "$tmp/$name/ashlar-operator"
install -m 0644 LICENSE CHANGELOG.md README.md "$tmp/$name/"
tar --create --directory "$tmp" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$commit_time" "$name" | gzip -n -9 > "$folder/$name.tar.gz"
if command -v helm > /dev/null; then helm package charts/ashlar --destination "$folder" >&2; fi
cd "$folder"
sha256sum -- *.tar.gz *.tgz 2> /dev/null > SHA256SUMS || sha256sum -- *.tar.gz > SHA256SUMS
cat SHA256SUMS
