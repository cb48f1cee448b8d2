#!/usr/bin/env bash
# Makes the images called IMAGE... (see images.sh), gives them to the cluster NAME, and prints their references.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root
cluster_vars "${1:?name of the cluster}"
shift

archives=$("$CLUSTER_DIR/images.sh" "$@")
while read -r reference archive; do
    import_image "$archive"
    echo "$reference"
done <<< "$archives"
