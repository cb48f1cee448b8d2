#!/usr/bin/env bash
# Prints the version of this checkout; with TAG as argument fails unless the tag is that version's. Cargo.toml, the chart and
# CHANGELOG.md must agree.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=$(sed -n '/^\[workspace.package\]/,/^\[/ s/^version = "\(.*\)"/\1/p' Cargo.toml)
chart=$(sed -n 's/^version: //p' charts/ashlar/Chart.yaml)
app=$(sed -n 's/^appVersion: //p' charts/ashlar/Chart.yaml)
[ -n "$version" ] && [ "$version" = "$chart" ] && [ "$version" = "$app" ] || {
    echo "error: Cargo.toml says $version, Chart.yaml says version $chart and appVersion $app: make them one" >&2
    exit 1
}
if [ $# -gt 0 ]; then
    [ "$1" = "v$version" ] || { echo "error: tag $1 is not v$version" >&2; exit 1; }
    grep -q "^## \[$version\] - [0-9]" CHANGELOG.md || {
        echo "error: CHANGELOG.md has no section \`## [$version] - DATE\`" >&2
        exit 1
    }
fi
echo "$version"
