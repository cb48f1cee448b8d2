# Starts `ashlar serve` with the default model on loopback; sourced, never run. ASHLAR_BIN names a binary to use instead
# of building one.
# shellcheck shell=bash

# start_server FLAG...: sets ADDRESS and LOG, and ends the server when the script ends.
start_server() {
    local model binary=${ASHLAR_BIN:-}
    model=$(e2e/cluster/model.sh)
    if [ -z "$binary" ]; then
        cargo build --release --quiet -p ashlar
        binary=${CARGO_TARGET_DIR:-target}/release/ashlar
    fi
    LOG=$(mktemp)
    "$binary" serve "$model" --host 127.0.0.1 --port 0 --served-model-name smol \
        --kv-cache-memory-bytes "${KV_BYTES:-256M}" --log-format json "$@" 2> "$LOG" &
    SERVER=$!
    trap 'kill "$SERVER" 2> /dev/null || true; wait "$SERVER" || true; rm -f "$LOG"' EXIT
    for _ in $(seq 600); do
        ADDRESS=$(sed -n 's/.*"message":"ready".*"address":"\([^"]*\)".*/\1/p' "$LOG" | head -1)
        [ -z "$ADDRESS" ] || return 0
        kill -0 "$SERVER" 2> /dev/null || { cat "$LOG" >&2; die "the server ended before it was ready"; }
        sleep 0.1
    done
    cat "$LOG" >&2
    die "the server was not ready within a minute"
}
