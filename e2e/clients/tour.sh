#!/usr/bin/env bash
# The official clients of OpenAI (Python, and JavaScript where there is Node) and Anthropic (Python) tour `ashlar serve`
# with the default model, on loopback.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
. "$(dirname "$0")/server.sh"
cd "$REPO"

install_clients() {
    python3 -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action ignore --target "$1/site" -r e2e/clients/requirements.txt
}

install_node_client() {
    npm install --silent --no-audit --no-fund --prefix "$1" openai@6.49.0
    cp e2e/clients/openai_tour.mjs "$1/"
}

clients=$(cached clients "$(hash_of e2e/clients/requirements.txt "$(python3 --version)")" install_clients)
start_server --max-model-len 4096 --api-key sesame
status=0
ASHLAR_URL=http://$ADDRESS PYTHONPATH=$clients/site PYTHONDONTWRITEBYTECODE=1 \
    python3 -m unittest discover --start-directory e2e/clients --pattern '*_tour.py' || status=$?
if command -v npm > /dev/null; then
    # Beside the installed client, where Node looks for it.
    node_client=$(cached node-client "$(hash_of openai@6.49.0 e2e/clients/openai_tour.mjs)" install_node_client)
    ASHLAR_URL=http://$ADDRESS node --test "$node_client/openai_tour.mjs" || status=$?
else
    say "Node is not installed: the JavaScript client stays at home"
fi
[ "$status" = 0 ] || tail -40 "$LOG" >&2
exit "$status"
