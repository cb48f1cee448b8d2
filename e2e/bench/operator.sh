#!/usr/bin/env bash
# The operator at scale: a real API server, simulated nodes and pods, and the figures that matter.
#
#   operator.sh [--services N] [--foreign N] [--rest SECONDS] [--scaled]     sizes and times
#   operator.sh --faults [--services N]                                     an API server that misbehaves
#   operator.sh --rollouts                                                  rollouts under load
#
# etcd, API server and garbage collector run in namespaces of their own and end with this script. The operator is the release
# binary with exactly the chart's rights. Pods are simulated: HTTP servers in the benchmark's process that never were containers.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
need_root

# The part that runs inside: control plane first, then the benchmark; the namespaces end with it.
inside() {
    local dir=$1 kc=$2 bench=$3
    shift 3
    local controllers=ttl-controller
    # Rollouts need pods that the real controllers make, choose and place.
    [[ " $* " != *" --rollouts "* ]] || controllers=deployment-controller,replicaset-controller
    cd "$dir"
    ip link set lo up
    # The API server wants an address that is not the loopback's, though nobody calls it there.
    ip link add bench0 type bridge
    ip addr add 10.255.255.1/24 dev bench0
    ip link set bench0 up
    # Started again when it ends: one of the faults kills it.
    while :; do
        "$kc" etcd --name bench --data-dir etcd --unsafe-no-fsync --log-level error --quota-backend-bytes 8589934592 \
            --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
            --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
            --initial-cluster bench=http://127.0.0.1:2380 >> etcd.log 2>&1 &
        echo "$!" > etcd.pid
        wait "$!" || true
    done &
    "$kc" kube-apiserver --etcd-servers=http://127.0.0.1:2379 --cert-dir=certificates --bind-address=127.0.0.1 --secure-port=6443 \
        --advertise-address=10.255.255.1 --token-auth-file=tokens.csv --authorization-mode=RBAC --service-cluster-ip-range=10.96.0.0/12 \
        --service-account-issuer=https://bench --service-account-key-file=sa.pub --service-account-signing-key-file=sa.key \
        --disable-admission-plugins=ServiceAccount --audit-policy-file=audit.yaml --audit-log-path=audit.log \
        --audit-log-mode=blocking --max-requests-inflight=800 --max-mutating-requests-inflight=400 > apiserver.log 2>&1 &
    wait_until 60 "the API server" "$kc" kubectl --kubeconfig=admin.kubeconfig get --raw /readyz
    "$kc" kube-controller-manager --kubeconfig=admin.kubeconfig --leader-elect=false --kube-api-qps=500 --kube-api-burst=1000 \
        --controllers=garbage-collector-controller,namespace-controller,"$controllers" > controllers.log 2>&1 &
    if [ "$controllers" != ttl-controller ]; then
        "$kc" kube-scheduler --kubeconfig=admin.kubeconfig --leader-elect=false --secure-port=0 > scheduler.log 2>&1 &
    fi
    "$kc" kubectl --kubeconfig=admin.kubeconfig create namespace ashlar-system > /dev/null
    "$kc" helm template ashlar "$REPO/charts/ashlar" --namespace ashlar-system --show-only templates/operator-rbac.yaml > rbac.yaml
    # Two operators, each under a name of its own, so that the audit log tells them apart.
    python3 - rbac.yaml > allowed.yaml << 'PY'
import sys
for part in open(sys.argv[1]).read().split("\n---\n"):
    if "Binding\n" in part:
        head, _, _ = part.partition("subjects:")
        part = head + "subjects:\n  - {kind: Group, name: operators, apiGroup: rbac.authorization.k8s.io}\n"
        if "kind: RoleBinding" in part or "kind: Role\n" in part:
            part = part.replace("metadata:\n", "metadata:\n  namespace: ashlar-system\n", 1)
    elif "kind: Role\n" in part:
        part = part.replace("metadata:\n", "metadata:\n  namespace: ashlar-system\n", 1)
    print(part + "\n---")
PY
    "$kc" kubectl --kubeconfig=admin.kubeconfig apply -f allowed.yaml > /dev/null
    "$bench" "$@"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
    exit
fi

components=$("$CLUSTER_DIR/build.sh" components)
cd "$REPO"
cargo build --release --quiet -p ashlar-operator -p ashlar-e2e --bin ashlar-operator --bin operator_bench
binaries=${CARGO_TARGET_DIR:-$REPO/target}/release
dir=$(mktemp -d "${TMPDIR:-/tmp}/ashlar-operator-bench.XXXXXX")
trap 'rm -rf "$dir"' EXIT
cc -O2 -shared -fPIC -o "$dir/skew.so" "$REPO/e2e/bench/skew.c"
openssl genrsa -out "$dir/sa.key" 2048 2> /dev/null
openssl rsa -in "$dir/sa.key" -pubout -out "$dir/sa.pub" 2> /dev/null
cat > "$dir/audit.yaml" << 'YAML'
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - {level: None, verbs: [get, list, watch]}
  - {level: None, resources: [{group: coordination.k8s.io, resources: [leases]}]}
  - {level: Metadata, userGroups: [operators]}
  - {level: None}
YAML
for user in admin operator-a operator-b; do
    group=operators
    [ "$user" != admin ] || group=system:masters
    echo "$user,$user,$user,\"$group\"" >> "$dir/tokens.csv"
    cat > "$dir/$user.kubeconfig" << YAML
apiVersion: v1
kind: Config
clusters: [{name: bench, cluster: {server: "https://127.0.0.1:6443", insecure-skip-tls-verify: true}}]
users: [{name: $user, user: {token: $user}}]
contexts: [{name: bench, context: {cluster: bench, user: $user}}]
current-context: bench
YAML
    chmod 0600 "$dir/$user.kubeconfig"
done
status=0
unshare --net --pid --mount-proc --fork --kill-child "$0" --inside "$dir" "$components/kc" "$binaries/operator_bench" \
    --state "$dir" --operator "$binaries/ashlar-operator" "$@" || status=$?
if [ "$status" != 0 ]; then
    kept=${TMPDIR:-/tmp}/ashlar-operator-bench.failed
    rm -rf "$kept" && mkdir "$kept" && cp "$dir"/*.log "$kept"/
    say "The logs are in $kept"
fi
exit "$status"
