#!/usr/bin/env bash
# Prints the chart's values as OWNER/REPOSITORY publishes them: in the repository they name the project's images without a registry,
# and the book of the project itself.
set -euo pipefail
owner=${1:?an owner} repository=${2:?a repository}
registry=ghcr.io/${owner,,}
values=$(sed -e "s#image: ashlar/#image: $registry/#" \
    -e "s#cudaImage: \"\"#cudaImage: $registry/runtime-cuda#" \
    -e "s#runbookUrl: https://.*#runbookUrl: https://${owner,,}.github.io/$repository/runbooks#" \
    "$(dirname "$0")/../../charts/ashlar/values.yaml")
for named in "image: $registry/operator" "image: $registry/runtime" "cudaImage: $registry/runtime-cuda" \
    "runbookUrl: https://${owner,,}.github.io/$repository/runbooks"; do
    grep -qE "^ +$named(:|\$)" <<< "$values" || { echo "error: the chart's values have no place for \`$named\`" >&2; exit 1; }
done
printf '%s\n' "$values"
