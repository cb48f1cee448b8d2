#!/usr/bin/env bash
# Requests made up from /openapi.json, valid and invalid, against `ashlar serve`: no 5xx, and no answer that the
# description does not allow. EXAMPLES says how many for each operation and kind, SEED which.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
. "$(dirname "$0")/server.sh"
cd "$REPO"

install_tool() {
    python3 -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action ignore --target "$1/site" schemathesis==4.32.5
}

tool=$(cached schemathesis "$(hash_of schemathesis==4.32.5 "$(python3 --version)")" install_tool)
# Short answers, so that many requests fit.
start_server --max-model-len 96 --max-num-seqs 32 --disable-access-log
status=0
(
    cd "$(mktemp -d)"
    PYTHONPATH=$tool/site PYTHONDONTWRITEBYTECODE=1 python3 -m schemathesis.cli run "http://$ADDRESS/openapi.json" \
        --checks not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance \
        --phases examples,coverage,fuzzing --max-examples "${EXAMPLES:-50}" --seed "${SEED:-1}" --generation-database none \
        --request-timeout 60 --suppress-health-check all
) || status=$?
kill -0 "$SERVER" || status=1
[ "$status" = 0 ] || tail -20 "$LOG" >&2
exit "$status"
