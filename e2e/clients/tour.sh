#!/usr/bin/env bash
# The official Python clients of OpenAI and Anthropic tour `ashlar serve` with the default model, on loopback.
# ASHLAR_BIN names a binary to use instead of building one.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
cd "$REPO"

install_clients() {
    python3 -m pip install --quiet --disable-pip-version-check --target "$1/site" -r e2e/clients/requirements.txt
}

clients=$(cached clients "$(hash_of e2e/clients/requirements.txt "$(python3 --version)")" install_clients)
model=$(e2e/cluster/model.sh)
server_binary=${ASHLAR_BIN:-}
if [ -z "$server_binary" ]; then
    cargo build --release --quiet -p ashlar
    server_binary=${CARGO_TARGET_DIR:-target}/release/ashlar
fi
log=$(mktemp)
"$server_binary" serve "$model" --host 127.0.0.1 --port 0 --served-model-name smol \
    --max-model-len 4096 --kv-cache-memory-bytes 256M --api-key sesame --log-format json 2> "$log" &
server=$!
trap 'kill "$server" 2> /dev/null || true; wait "$server" || true; rm -f "$log"' EXIT
for _ in $(seq 600); do
    address=$(sed -n 's/.*"message":"ready".*"address":"\([^"]*\)".*/\1/p; s/.*"address":"\([^"]*\)".*"message":"ready".*/\1/p' "$log" | head -1)
    [ -z "$address" ] || break
    kill -0 "$server" 2> /dev/null || { cat "$log" >&2; die "the server ended before it was ready"; }
    sleep 0.1
done
[ -n "${address:-}" ] || { cat "$log" >&2; die "the server was not ready within a minute"; }
status=0
ASHLAR_URL=http://$address PYTHONPATH=$clients/site PYTHONDONTWRITEBYTECODE=1 \
    python3 -m unittest discover --start-directory e2e/clients --pattern '*_tour.py' || status=$?
[ "$status" = 0 ] || tail -40 "$log" >&2
exit "$status"
