#!/usr/bin/env bash
# Makes the images called IMAGE... (see images.sh), gives them to the cluster NAME, and prints their references.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root
cluster_vars "${1:?name of the cluster}"
shift

archives=$("$CLUSTER_DIR/images.sh" "$@")
snapshotter=$(sed -n 's/.*snapshotter = "\(.*\)"/\1/p' "$STATE/containerd.toml")
while read -r reference archive; do
    "$STATE/tools/ctr" images import --snapshotter "$snapshotter" "$archive" > /dev/null
    echo "$reference"
done <<< "$archives"
