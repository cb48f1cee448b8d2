#!/usr/bin/env bash
# Runs the project's tests on a cluster of their own and counts them:
#   test.sh all   formatting, lints, GPU kernels compiled, generated files, licences, the book rendered, unit and API-server tests, chart tests, e2e tests
#   test.sh docs  the docs only: their commands and manifests
#   test.sh e2e   the e2e tests only, or only the file TEST of them; on the cluster of KUBECONFIG when that is set
#                 (src/lib.rs says what it must offer)
# Every stage runs, whatever happened before it. The last line is `N passed, N failed, N skipped`; the status is 0 only when
# nothing failed. A stage without counts of its own counts as one test.
set -euo pipefail
. "$(dirname "$0")/cluster/lib.sh"
what=${1:?all, docs or e2e}
cluster=${CLUSTER:-test}
logs=${TMPDIR:-/tmp}/ashlar-test-logs-$cluster
passed=0 failed=0 skipped=0
summary=()
previous=

cd "$REPO"
bound_target_dir
rm -rf "$logs"
mkdir -p "$logs"
cleanup() { [ "${started:-no}" = no ] || "$CLUSTER_DIR/down.sh" "$cluster" || true; }
trap cleanup EXIT

# count LOG: adds up the `test result:` lines of cargo's test runner into p, f and s.
count() {
    read -r p f s < <(awk '/^test result: / { p += $4; f += $6; s += $8 } END { print p + 0, f + 0, s + 0 }' "$1")
}

# stage TITLE COMMAND...: runs it, shows and keeps its output, and counts. `set -e` does not hold inside COMMAND.
stage() {
    local title=$1 log status=0 began=$SECONDS p f s
    shift
    log=$logs/${title// /-}.log
    say "$title"
    ("$@") 2>&1 | tee "$log" || status=$?
    count "$log"
    if [ $((p + f + s)) = 0 ]; then
        if [ "$status" = 0 ]; then p=1; else f=1; fi
    elif [ "$status" != 0 ] && [ "$f" = 0 ]; then
        f=1 # for example: a test binary that died, or one that did not compile
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    summary+=("$(printf '%-28s %4d passed %4d failed %4d skipped %5d s' "$title" "$p" "$f" "$s" $((SECONDS - began)))")
    [ "$s" = 0 ] || grep -E '^test .* \.\.\. ignored' "$log" | sed 's/^/    skipped: /' >> "$logs/skipped" || true
    [ "$f" = 0 ]
}

# not_run TITLE WHY: a stage that cannot run is one skipped test, and says why.
not_run() {
    say "$1: not run: $2"
    skipped=$((skipped + 1))
    summary+=("$(printf '%-28s %4d passed %4d failed %4d skipped' "$1" 0 0 1)")
    echo "    skipped: $1: $2" >> "$logs/skipped"
}

generated_files_are_fresh() {
    make --no-print-directory generate && git diff --exit-code -- crds charts
}

# Images and cluster; afterwards `inside` reaches it.
start_cluster() {
    local tools=${kubeconfig%/*}/tools
    "$CLUSTER_DIR/up.sh" "$cluster" \
        && "$CLUSTER_DIR/load.sh" "$cluster" operator runtime client model awq-model ${previous:+previous-operator} > "$logs/images" \
        && cat "$logs/images" || return 1
    # The last release's default image has another name than this one's: what is in it does not matter, its name restarts pods.
    "$tools/ctr" images tag "$(sed -n 2p "$logs/images")" ashlar.local/ashlar:previous
}

# The last release, to upgrade from; told by the name of the file that needs it.
previous_release() {
    case ${TEST:-upgrade} in *upgrade*) ;; *) return 0 ;; esac
    [ "$what" != docs ] || return 0
    previous=$("$CLUSTER_DIR/previous.sh") \
        || not_run "upgrade from the last release" "this clone has not its commit; upgraded is this chart with other pods"
}

inside() { "$CLUSTER_DIR/enter.sh" "$cluster" "$@"; }

# Everything but the e2e tests, in the cluster's network: the tests that need an API server find one. Always the whole
# workspace and its one set of features: with another selection cargo would compile half of the dependencies again.
# What they leave on the API server goes: the stories install the chart, and with it the resource, on a clean cluster.
workspace_tests() {
    local status=0
    inside env ASHLAR_TEST_KUBECONFIG="$kubeconfig" cargo test --release --offline --no-fail-fast --workspace || status=$?
    inside kubectl delete crd --all --timeout=60s || status=1
    return $status
}

e2e_tests() {
    local enter=(inside)
    [ "$foreign" = no ] || enter=()
    ASHLAR_E2E_DUMP=$logs/dump "${enter[@]}" \
        cargo test --release --offline --no-fail-fast "${stories[@]}" -- --test-threads "${E2E_THREADS:-2}"
}

# What the book and the README tell readers to do, with the binaries that the images were made of.
docs_are_followed() {
    local ashlar
    ashlar=$("$CLUSTER_DIR/binaries.sh" ashlar) && "$CLUSTER_DIR/binaries.sh" ashlar-operator > /dev/null || return 1
    inside env PATH="${ashlar%/*}:${kubeconfig%/*}/tools:$PATH" MODEL="$ASHLAR_TEST_MODEL" e2e/docs/run.py
}

# The end of a cluster is a promise too: no process, mount, network namespace, control group or folder stays.
ends_without_trace() {
    local containers left=0 container
    containers=$(ls "${kubeconfig%/*}/containerd/state/io.containerd.runtime.v2.task/k8s.io")
    "$CLUSTER_DIR/down.sh" "$cluster" || return 1
    for container in $containers; do
        if compgen -G "/sys/fs/cgroup/*/k8s.io/$container" || compgen -G "/sys/fs/cgroup/k8s.io/$container"; then left=1; fi
    done
    if grep -lzs "^ASHLAR_NODE=${kubeconfig%/*}\$" /proc/[0-9]*/environ; then left=1; fi
    if grep -F "${kubeconfig%/*}" /proc/mounts; then left=1; fi
    if ip netns list | grep -w "ashlar-$cluster"; then left=1; fi
    if ls -d "${kubeconfig%/*}" 2> /dev/null; then left=1; fi
    return $left
}

if [ "$what" = all ]; then
    stage "formatting" cargo fmt --all --check || true
    stage "licences and sources" e2e/deny.sh || true
    stage "workflows" e2e/actionlint.sh || true
    stage "book" e2e/docs/book.sh || true
    stage "lints" cargo clippy --release --workspace --all-targets --features ashlar-e2e/cluster -- -D warnings || true
    stage "GPU kernels" make --no-print-directory gpu-check || true
    stage "generated files" generated_files_are_fresh || true
fi

ASHLAR_TEST_MODEL=$("$CLUSTER_DIR/model.sh")
export ASHLAR_TEST_MODEL
ASHLAR_TEST_AWQ_MODEL=$("$CLUSTER_DIR/awq.sh")
export ASHLAR_TEST_AWQ_MODEL
ASHLAR_E2E_PROMETHEUS=$("$CLUSTER_DIR/prometheus.sh")
export ASHLAR_E2E_PROMETHEUS
monitoring=$("$CLUSTER_DIR/monitoring.sh")

# Built before anything runs in the cluster's network, which has no way out to a registry.
stories=(--workspace --features ashlar-e2e/cluster)
built=("${stories[@]}")
for file in "$REPO"/e2e/tests/${TEST:-*}.rs; do stories+=(--test "$(basename "$file" .rs)"); done
[ "$what" = all ] || built=("${stories[@]}")
[ "$what" = docs ] || stage "build" cargo test --release "${built[@]}" --no-run --quiet || true

foreign=no kubeconfig=${TMPDIR:-/tmp}/ashlar-$cluster/admin.kubeconfig
if [ "$what" = e2e ] && [ -n "${KUBECONFIG:-}" ]; then
    foreign=yes
    ready=yes
else
    started=yes
    previous_release
    if stage "cluster" start_cluster; then ready=yes; else ready=no; fi
fi

if [ "$what" = all ]; then
    stage "official clients" env ASHLAR_BIN="${CARGO_TARGET_DIR:-target}/release/ashlar" e2e/clients/tour.sh || true
    stage "requests made up" env EXAMPLES=10 ASHLAR_BIN="${CARGO_TARGET_DIR:-target}/release/ashlar" \
        e2e/clients/schemathesis.sh || true
    if [ "$ready" = yes ]; then
        stage "unit and API-server tests" workspace_tests || true
        stage "chart" inside env PROMTOOL="$ASHLAR_E2E_PROMETHEUS/promtool" MONITORING="$monitoring" charts/tests/render.sh || true
    else
        stage "unit tests" cargo test --release --no-fail-fast --workspace || true
        not_run "API-server tests" "there is no cluster"
        not_run "chart" "there is no cluster to take helm from"
    fi
fi
if [ "$ready" = yes ]; then
    if [ "$foreign" = no ]; then
        ASHLAR_E2E_OPERATOR_IMAGE=$(sed -n 1p "$logs/images")
        ASHLAR_E2E_RUNTIME_IMAGE=$(sed -n 2p "$logs/images")
        export ASHLAR_E2E_OPERATOR_IMAGE ASHLAR_E2E_RUNTIME_IMAGE
        if [ -n "$previous" ]; then
            ASHLAR_E2E_PREVIOUS_OPERATOR_IMAGE=$(sed -n 6p "$logs/images")
            export ASHLAR_E2E_PREVIOUS_OPERATOR_IMAGE ASHLAR_E2E_PREVIOUS_CHART=$previous/charts/ashlar
        fi
    fi
    [ "$what" = docs ] || stage "e2e tests" e2e_tests || true
    [ "$what" = e2e ] || stage "docs" docs_are_followed || true
else
    not_run "e2e tests" "there is no cluster"
fi
if [ "$ready" = yes ] && [ "$foreign" = no ]; then stage "the cluster's end" ends_without_trace || true; fi

printf '\n' >&2
printf '%s\n' "${summary[@]}" >&2
[ ! -s "$logs/skipped" ] || cat "$logs/skipped" >&2
printf 'logs: %s\n' "$logs" >&2
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
