#!/usr/bin/env bash
# Prints the section of VERSION in CHANGELOG.md: the text of its release.
set -euo pipefail
version=${1:?a version}
cd "$(dirname "$0")/../.."
notes=$(awk -v head="## [$version]" 'index($0, head) == 1 { on = 1; next } /^## \[/ { on = 0 } on' CHANGELOG.md)
[ -n "${notes//[[:space:]]/}" ] || { echo "error: CHANGELOG.md says nothing of $version" >&2; exit 1; }
printf '%s\n' "$notes"
