#!/usr/bin/env bash
# Tests of the chart. Needs helm (PATH or HELM); UPDATE=1 writes the snapshots anew, for review in the diff.
#   lint      helm lint --strict, with every set of values
#   render    every file of ashlar/tests/values renders to its snapshot
#   crd       the definition in the chart is the generated one, whatever the values
#   refuse    values that the schema must not let in
#   server    where KUBECONFIG leads to a cluster: its API server takes what is rendered, strictly
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chart=ashlar
helm=${HELM:-helm}
kube_version=1.37.0
crd=../crds/yaml/inferenceservices.serving.ashlar.dev.yaml
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

# check NAME COMMAND...: one test; its output is shown only when it fails.
check() {
    local name=$1
    shift
    if "$@" > "$tmp/log" 2>&1; then
        echo "test $name ... ok"
        passed=$((passed + 1))
    else
        echo "test $name ... FAILED"
        sed 's/^/    /' "$tmp/log"
        failed=$((failed + 1))
    fi
}

# render [ARGUMENT...]: the manifests to standard output.
render() { "$helm" template ashlar "$chart" --namespace ashlar-system --kube-version "$kube_version" "$@"; }

# Snapshots leave the definition out: it has its own test, and would drown what a change of the chart does.
matches_snapshot() {
    local name=$1 snapshot=$chart/tests/snapshots/$1.yaml
    render --values "$chart/tests/values/$name.yaml" --set crds.enabled=false > "$tmp/rendered"
    if [ -n "${UPDATE:-}" ]; then cp "$tmp/rendered" "$snapshot"; fi
    diff -u "$snapshot" "$tmp/rendered" || {
        echo "the chart renders otherwise than its snapshot: if that is meant, UPDATE=1 charts/tests/render.sh"
        return 1
    }
}

crd_is_current() {
    cmp "$crd" "$chart/files/${crd##*/}" || {
        echo "the chart's copy of the definition is old: make generate"
        return 1
    }
}

# What the template adds to the definition is metadata, and nothing else changes.
crd_is_rendered_whole() {
    printf '%s\n' "$(render --show-only templates/crd.yaml "$@" | grep -v -e '^---$' -e '^# Source:')" > "$tmp/crd"
    diff "$crd" "$tmp/crd" > "$tmp/difference" && { echo "no labels were added"; return 1; }
    ! grep -q '^<' "$tmp/difference" || { cat "$tmp/difference"; return 1; }
    ! grep '^>' "$tmp/difference" | grep -v -E '^>   (labels|annotations):$|^>     [a-z./-]+: ' || return 1
}
crd_is_kept() { render --show-only templates/crd.yaml | grep -q 'helm.sh/resource-policy: keep'; }
crd_can_go() {
    crd_is_rendered_whole --set crds.keep=false
    ! render --show-only templates/crd.yaml --set crds.keep=false | grep -q resource-policy
}
crd_can_be_left_out() { ! render --set crds.enabled=false | grep -q '^kind: CustomResourceDefinition'; }

# refuses FIELD --set ...: the message names the field.
refuses() {
    local field=$1
    shift
    ! render "$@" > "$tmp/out" 2>&1 || { echo "was let in"; return 1; }
    grep -q "$field" "$tmp/out" || { cat "$tmp/out"; return 1; }
}

# No right on secrets or on other rights, and every container restricted, in whatever is rendered.
grants_nothing_more() {
    render --values "$chart/tests/values/$1.yaml" > "$tmp/rendered"
    ! grep -n -E '\b(secrets|escalate|bind|impersonate)\b' <(grep -v '^ *#' "$tmp/rendered" | grep -E 'resources:|verbs:') || return 1
    local containers restricted
    containers=$(grep -c '^          image: ' "$tmp/rendered")
    restricted=$(grep -c 'readOnlyRootFilesystem: true' "$tmp/rendered")
    [ "$containers" = "$restricted" ] && [ "$containers" -gt 0 ]
}

server_takes() {
    render --set podMonitor.enabled=false --set crds.enabled=false --values "$chart/tests/values/$1.yaml" --set podMonitor.enabled=false \
        | kubectl create --namespace default --dry-run=server --validate=strict --filename - --output name 2>&1 \
        | tee "$tmp/server" | grep -v 'already exists' | grep -i -E 'error|warning|invalid|unknown' && return 1
    grep -q -E 'deployment.apps/ashlar-gateway|already exists' "$tmp/server"
}

for values in "$chart"/tests/values/*.yaml; do
    name=$(basename "$values" .yaml)
    check "lint $name" "$helm" lint --strict "$chart" --values "$values" --kube-version "$kube_version"
    check "render $name" matches_snapshot "$name"
    check "rights $name" grants_nothing_more "$name"
done
check "crd is current" crd_is_current
check "crd is rendered whole" crd_is_rendered_whole
check "crd is kept" crd_is_kept
check "crd can go" crd_can_go
check "crd can be left out" crd_can_be_left_out
check "refuse an unknown value" refuses replica --set gateway.replica=3
check "refuse an unknown section" refuses gatway --set gatway.replicas=3
check "refuse a wrong type" refuses replicas --set-string gateway.replicas=many
check "refuse no replicas" refuses replicas --set gateway.replicas=0
check "refuse no image" refuses image --set operator.image=
check "refuse a pull policy" refuses imagePullPolicy --set operator.imagePullPolicy=Sometimes
check "refuse a long drain delay" refuses drainDelaySeconds --set gateway.drainDelaySeconds=60
check "refuse an argument that is none" refuses extraArgs --set 'gateway.extraArgs={serve}'
if [ -n "${KUBECONFIG:-}" ] && kubectl version > /dev/null 2>&1; then
    for name in default full minimal; do check "server takes $name" server_takes "$name"; done
fi

echo
echo "test result: $([ "$failed" = 0 ] && echo ok || echo FAILED). $passed passed; $failed failed; 0 ignored"
[ "$failed" = 0 ]
