#!/usr/bin/env bash
# Ashlar against llama.cpp's server on the same machine, model, requests and client, in turns; prints the ratios.
#
#   peer.sh [ROUNDS]      ROUNDS of each, alternating (default 3); the best round of each scenario counts
#
# llama.cpp is built natively from the source in the Python package `llama-cpp-python`: a peer to measure, not a
# dependency. Run it on a machine that does nothing else.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"

PEER=llama-cpp-python==0.3.36
SCENARIOS=single,chat16,prefill1k
rounds=${1:-3}
cores=$(nproc)

build_peer() {
    local into=$1
    say "Building llama-server from $PEER (some minutes)"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
        --dest "$into" "$PEER"
    tar -xzf "$into"/*.tar.gz -C "$into" --strip-components 1
    cmake -S "$into/vendor/llama.cpp" -B "$into/build" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DBUILD_SHARED_LIBS=OFF > "$into/build.log"
    cmake --build "$into/build" --target llama-server -j "$cores" >> "$into/build.log"
}

# with_server PORT COMMAND...: runs the load against COMMAND, which serves on PORT, and ends it.
with_server() {
    local port=$1 pid
    shift
    "$@" > "$scratch/server.log" 2>&1 &
    pid=$!
    until curl --silent --fail --max-time 2 "http://127.0.0.1:$port/health" > /dev/null; do
        kill -0 "$pid" 2> /dev/null || { cat "$scratch/server.log" >&2; die "$1 ended before it was ready"; }
        sleep 0.2
    done
    "$ashlar" bench serve --base-url "http://127.0.0.1:$port" --scenarios "$SCENARIOS"
    kill "$pid"
    wait "$pid" || true
}

peer=${LLAMA_SERVER:-}
if [ -z "$peer" ]; then
    entry=$(cached peer "$(hash_of "$PEER" "$(uname -m)" "$(grep -m1 '^flags' /proc/cpuinfo)")" build_peer)
    peer=$entry/build/bin/llama-server
fi
ashlar=$("$CLUSTER_DIR/binaries.sh" ashlar)
model=$("$CLUSTER_DIR/model.sh")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for round in $(seq "$rounds"); do
    say "Round $round of $rounds"
    with_server 18311 "$peer" --model "$model" --threads "$cores" --parallel 16 --ctx-size 32768 --host 127.0.0.1 --port 18311 \
        >> "$scratch/peer"
    with_server 18312 "$ashlar" serve "$model" --host 127.0.0.1 --port 18312 --drain-delay 0 >> "$scratch/ours"
done
python3 "$(dirname "$0")/ratios.py" "$scratch/ours" "$scratch/peer"
