#!/usr/bin/env bash
# The official Python clients of OpenAI and Anthropic tour `ashlar serve` with the default model, on loopback.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
. "$(dirname "$0")/server.sh"
cd "$REPO"

install_clients() {
    python3 -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action ignore --target "$1/site" -r e2e/clients/requirements.txt
}

clients=$(cached clients "$(hash_of e2e/clients/requirements.txt "$(python3 --version)")" install_clients)
start_server --max-model-len 4096 --api-key sesame
status=0
ASHLAR_URL=http://$ADDRESS PYTHONPATH=$clients/site PYTHONDONTWRITEBYTECODE=1 \
    python3 -m unittest discover --start-directory e2e/clients --pattern '*_tour.py' || status=$?
[ "$status" = 0 ] || tail -40 "$LOG" >&2
exit "$status"
