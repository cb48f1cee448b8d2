#!/usr/bin/env bash
# Prints the folder of the default model as an AWQ checkpoint, making it first when absent (a minute on two cores): the
# tool finds the scales on its own calibration text, and its report.json has the perplexity before and after.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

source=$REPO/runtime/examples/make_awq
evaluated=$REPO/runtime/tests/reference/passage.txt

make_checkpoint() {
    say "Quantising the default model by AWQ"
    cd "$REPO"
    cargo build --release --quiet -p ashlar --example make_awq
    "${CARGO_TARGET_DIR:-target}/release/examples/make_awq" "$2" "$1/checkpoint" --evaluate "$evaluated"
}

model=$("$CLUSTER_DIR/model.sh")
entry=$(cached awq "$(hash_of "$model" "$source"/*)" make_checkpoint "$model")
echo "$entry/checkpoint"
