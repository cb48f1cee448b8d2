#!/usr/bin/env bash
# Runs fuzz targets, MINUTES (10) each, one after another or JOBS at once; TARGETS picks some. What is found is written
# to .fuzz/TARGET in the build folder, and the run fails. The compiler is the project's own: the coverage that libFuzzer
# needs is switched on by hand.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${CARGO_TARGET_DIR:=$PWD/target}"
seconds=$((${MINUTES:-10} * 60))
targets=${TARGETS:-request chat_template gguf safetensors quantization tool_calls}
host=$(rustc -vV | sed -n 's/^host: //p')
coverage=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
  -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks)
# With --target, build scripts and macros stay as they are.
RUSTFLAGS="${coverage[*]}" ${CARGO:-cargo} build --release --target "$host" -p ashlar-fuzz --features libfuzzer
binary=$CARGO_TARGET_DIR/$host/release/fuzz
found=$CARGO_TARGET_DIR/.fuzz

run() {
  local target=$1 folder=$found/$1 rc=0
  mkdir -p "$folder/corpus" "$folder/trouble"
  ASHLAR_FUZZ_TARGET=$target RUST_BACKTRACE=1 "$binary" -max_total_time="$seconds" -timeout=100 -rss_limit_mb=4096 \
    -max_len=32768 -print_final_stats=1 -artifact_prefix="$folder/trouble/" \
    "$folder/corpus" "runtime/fuzz/corpus/$target" >"$folder/log" 2>&1 || rc=$?
  local count rate edges
  count=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/log")
  rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$folder/log")
  edges=$(grep -o 'cov: [0-9]*' "$folder/log" | tail -1) || true
  printf '%-14s %12s runs %8s a second  %-12s %s\n' "$target" "${count:-?}" "${rate:-?}" "${edges:-?}" \
    "$([ $rc = 0 ] && echo clean || echo "TROUBLE: $folder/log")"
  return $rc
}

failed=0
pids=()
for target in $targets; do
  while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n || true; done
  run "$target" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
exit $failed
