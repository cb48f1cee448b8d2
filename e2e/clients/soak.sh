#!/usr/bin/env bash
# Mixed load with disconnects, cancels, bad requests and preemption for MINUTES (30): nothing lost, nothing stuck, the
# block pool whole at the end, memory flat.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
. "$(dirname "$0")/server.sh"
cd "$REPO"
# A cache that is too small for what runs: some are preempted.
KV_BYTES=40M start_server --max-model-len 512 --max-num-seqs 24 --max-num-queued-reqs 64 --disable-access-log
status=0
ASHLAR_URL=http://$ADDRESS ASHLAR_PID=$SERVER python3 e2e/clients/soak.py || status=$?
[ "$status" = 0 ] || tail -20 "$LOG" >&2
exit "$status"
