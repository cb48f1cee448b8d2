#!/usr/bin/env bash
# From nothing to an answer: packages, binaries, images, a cluster, the chart, a service, a question to it. Every stage tells
# its wall time. Succeeds only when the answer is right. `make demo-down` removes all of it.
set -euo pipefail
. "$(dirname "$0")/../cluster/lib.sh"
need_root
cluster_vars demo
DEMO=$CLUSTER_DIR/../demo
QUESTION=${QUESTION:-What is the capital of France?}
EXPECTED=${EXPECTED:-Paris}
GATEWAY_METRICS_PORT=8081
times=()
total=$SECONDS
bound_target_dir

# stage TITLE FUNCTION: runs it and notes how long it took.
stage() {
    local began
    began=$(date +%s%N)
    say "$1"
    "$2"
    times+=("$(printf '%8.1f s  %s' "$(awk -v t=$(($(date +%s%N) - began)) 'BEGIN { print t / 1e9 }')" "$1")")
}

packages() { "$CLUSTER_DIR/deps.sh"; }
cluster_binaries() {
    local part
    for part in components containerd coredns pause; do "$CLUSTER_DIR/build.sh" "$part" > /dev/null; done
}
own_binaries() {
    local binary
    for binary in ashlar-operator ashlar; do "$CLUSTER_DIR/binaries.sh" "$binary" > /dev/null; done
}
all_images() { "$CLUSTER_DIR/images.sh" pause coredns operator runtime client model > /dev/null; }
start_cluster() {
    "$CLUSTER_DIR/up.sh" "$NAME" > /dev/null
    images=$("$CLUSTER_DIR/load.sh" "$NAME" operator runtime client model)
}

install_chart() {
    # shellcheck disable=SC2086  # one reference a line
    set -- $images
    helm upgrade --install ashlar "$REPO/charts/ashlar" --namespace ashlar-system --create-namespace \
        --set "operator.image=$1" --set "runtime.image=$2" --wait --timeout 180s
}

# Prints each condition when it changes, until Ready is True.
serve() {
    local line conditions deadline=$((SECONDS + 300))
    declare -A seen=()
    kubectl create namespace demo --dry-run=client -o yaml | kubectl apply -f - > /dev/null
    kubectl label --overwrite namespace demo pod-security.kubernetes.io/enforce=restricted > /dev/null
    kubectl apply -f "$DEMO/service.yaml"
    until [[ ${seen[Ready]:-} == True* ]]; do
        [ "$SECONDS" -lt "$deadline" ] || { diagnose; die "smollm2 is not Ready after 300 s"; }
        conditions=$(kubectl -n demo get inferenceservice smollm2 \
            -o 'jsonpath={range .status.conditions[*]}{.type}={.status} {.reason}: {.message}{"\n"}{end}')
        while IFS= read -r line; do
            if [ -n "$line" ] && [ "${seen[${line%%=*}]:-}" != "${line#*=}" ]; then
                seen[${line%%=*}]=${line#*=}
                printf '    %5.1f s  %s\n' "$(awk -v t=$(($(date +%s%N) - serve_began)) 'BEGIN { print t / 1e9 }')" "$line"
            fi
        done <<< "$conditions"
        sleep 0.2
    done
    kubectl -n demo get inferenceservice smollm2
}

diagnose() {
    kubectl -n demo get pods,events -o wide || true
    kubectl -n demo logs -l serving.ashlar.dev/service=smollm2 --tail 50 || true
    kubectl -n ashlar-system get pods || true
    kubectl -n ashlar-system logs -l app.kubernetes.io/component=operator --tail 50 || true
}

# metrics FILE: one page of each kind: the model's pods and the gateways.
metrics() {
    local address
    {
        for address in $(kubectl -n demo get pods -l serving.ashlar.dev/service=smollm2 -o 'jsonpath={.items[*].status.podIP}'); do
            "$CLUSTER_DIR/enter.sh" demo curl -sS --max-time 5 "http://$address:8000/metrics"
        done
        for address in $(kubectl -n ashlar-system get pods -l app.kubernetes.io/component=gateway -o 'jsonpath={.items[*].status.podIP}'); do
            "$CLUSTER_DIR/enter.sh" demo curl -sS --max-time 5 "http://$address:$GATEWAY_METRICS_PORT/metrics"
        done
    } > "$1"
}

# The client is an ordinary pod: it resolves status.url by the cluster's DNS and reaches the gateway by its Service.
ask() {
    local body
    body=$(python3 -c 'import json, sys
print(json.dumps({"model": "smollm2", "stream": True, "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": sys.argv[1]}]}))' "$QUESTION")
    python3 - "$url" "$body" > "$STATE/client.json" << 'PY'
import json, sys
url, body = sys.argv[1:]
print(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "client", "namespace": "demo"}, "spec": {
    "restartPolicy": "Never", "automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0,
    "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [{"name": "curl", "image": "ashlar.local/client:1", "imagePullPolicy": "Never",
        "args": ["--silent", "--show-error", "--no-buffer", "--max-time", "120", url + "/chat/completions",
                 "-H", "content-type: application/json", "--data", body,
                 "--write-out", '{"seconds": %{time_total}}\\n'],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}]}}))
PY
    kubectl -n demo delete pod client --ignore-not-found > /dev/null
    kubectl apply -f "$STATE/client.json" > /dev/null
    wait_until 30 "the client pod" client_started
    printf '\n    %s\n    ' "$QUESTION"
    kubectl -n demo logs --follow client | python3 "$DEMO/show.py" stream | tee "$STATE/answer"
}
client_started() { [[ $(kubectl -n demo get pod client -o 'jsonpath={.status.phase}') =~ ^(Running|Succeeded|Failed)$ ]]; }

stage "Packages" packages
stage "The cluster's binaries (Go)" cluster_binaries
stage "Ashlar's binaries (Rust)" own_binaries
stage "Images" all_images
stage "A one-node cluster" start_cluster
export PATH=$STATE/tools:$PATH
stage "helm install ashlar" install_chart
serve_began=$(date +%s%N)
stage "kubectl apply until Ready" serve
url=$(kubectl -n demo get inferenceservice smollm2 -o 'jsonpath={.status.url}')
say "status.url is $url"
metrics "$STATE/metrics.before"
stage "A question through status.url, from a pod" ask
metrics "$STATE/metrics.after"

printf '\nMetrics that moved:\n'
python3 "$DEMO/show.py" moved "$STATE/metrics.before" "$STATE/metrics.after"
printf '\nWall time:\n'
printf '%s\n' "${times[@]}"
printf '%8d s  in all\n' $((SECONDS - total))
cat << TEXT

Talk to it (enter.sh runs a command where the cluster's names and addresses answer):
  e2e/cluster/enter.sh demo curl -N $url/chat/completions -H 'content-type: application/json' \\
    -d '{"model": "smollm2", "stream": true, "messages": [{"role": "user", "content": "Tell me a joke."}]}'
  e2e/cluster/enter.sh demo kubectl get inferenceservices --all-namespaces
  e2e/cluster/enter.sh demo kubectl -n demo scale inferenceservice smollm2 --replicas 2
End it: make demo-down
TEXT
grep -q "$EXPECTED" "$STATE/answer" || die "the answer does not contain \"$EXPECTED\""
