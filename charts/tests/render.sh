#!/usr/bin/env bash
# Tests of the chart. Needs helm (PATH or HELM) and promtool (PATH or PROMTOOL); UPDATE=1 writes the snapshots anew, for review
# in the diff.
#   values     every value has a comment and is in the schema
#   dashboards they are what dashboards/build.py writes, complete, and whole in their ConfigMaps
#   docs       links, pages and reasons
#   alerts     promtool takes the rules, and tests/alerts show each alert fire and stay quiet; each has a runbook
#   lint      helm lint --strict, with every set of values
#   render    every file of ashlar/tests/values renders to its snapshot
#   crd       the definition in the chart is the generated one, whatever the values
#   refuse    values that the schema must not let in
#   server    where KUBECONFIG leads to a cluster: its API server takes what is rendered, strictly; PodMonitor and PrometheusRule
#             too where MONITORING is the folder of their definitions
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
chart=ashlar
helm=${HELM:-helm}
promtool=${PROMTOOL:-promtool}
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

# Snapshots leave the definition and the dashboards out: they have their own tests, and would drown what a change of the chart
# does.
matches_snapshot() {
    local name=$1 snapshot=$chart/tests/snapshots/$1.yaml
    render --values "$chart/tests/values/$name.yaml" --set crds.enabled=false,dashboards.enabled=false > "$tmp/rendered"
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

values_are_explained() { python3 tests/values.py "$chart/values.yaml" "$chart/values.schema.json"; }

dashboards_are_fresh() {
    PYTHONDONTWRITEBYTECODE=1 python3 dashboards/build.py "$tmp/dashboards"
    diff -r "$tmp/dashboards" "$chart/dashboards" || {
        echo "the dashboards are old: make generate"
        return 1
    }
}
dashboards_are_complete() { python3 tests/dashboards.py "$chart/dashboards"; }
# `set -e` does not hold inside a check: each step says what happens when it fails.
dashboards_are_rendered_whole() {
    local file name
    render --show-only templates/dashboards.yaml > "$tmp/maps" || return 1
    for file in "$chart"/dashboards/*.json; do
        name=$(basename "$file")
        awk -v "key=  ashlar-$name: |-" '$0 == key { on = 1; next } on && !/^    / { on = 0 } on { print substr($0, 5) }' "$tmp/maps" > "$tmp/$name"
        cmp "$file" "$tmp/$name" || return 1
    done
    [ "$(grep -c 'grafana_dashboard: "1"' "$tmp/maps")" = "$(find "$chart/dashboards" -name '*.json' | wc -l)" ] || return 1
    ! render --set dashboards.enabled=false | grep -q grafana_dashboard
}

# The rules of the rendered PrometheusRule, as a file of rules.
rendered_rules() {
    render --show-only templates/prometheus-rule.yaml --set alerts.enabled=true "$@" | sed -n '/^  groups:/,$ s/^  //p'
}
count_alerts() { grep -c '^ *- alert: \|^ *alert: ' "$@"; }
alert_names() { sed -n 's/^ *- alert: //p' "$chart"/alerts/*.yaml; }
alerts_are_valid() {
    "$promtool" check rules "$chart"/alerts/*.yaml || return 1
    rendered_rules > "$tmp/rules.yaml" || return 1
    "$promtool" check rules "$tmp/rules.yaml" || return 1
    [ "$(count_alerts "$tmp/rules.yaml")" = "$(alert_names | wc -l)" ]
}
alerts_fire() { "$promtool" test rules tests/alerts/*.yaml; }
alerts_are_tested() {
    local alert
    for alert in $(alert_names); do
        grep -q "^  - name: $alert\$" tests/alerts/*.yaml || { echo "no test of $alert"; return 1; }
        [ -s "docs/src/runbooks/$alert.md" ] || { echo "no runbook docs/src/runbooks/$alert.md"; return 1; }
    done
    [ "$(find docs/src/runbooks -name 'Ashlar*' | wc -l)" = "$(alert_names | wc -l)" ]
}
alerts_lead_to_their_pages() {
    rendered_rules > "$tmp/rules.yaml" || return 1
    python3 tests/runbooks.py .. < "$tmp/rules.yaml"
}
# Whoever publishes the chart publishes its images and its book too.
a_published_chart_names_its_own() {
    ../e2e/release/values.sh Acme stones > "$tmp/values.yaml" || return 1
    render --values "$tmp/values.yaml" --set alerts.enabled=true,crds.enabled=false > "$tmp/rendered" || return 1
    [ "$(grep -cE '(image: |--runtime-image)' "$tmp/rendered")" = 5 ] || return 1
    ! grep -E '(image: |--runtime-image)' "$tmp/rendered" | grep -v ghcr.io/acme/ || return 1
    [ "$(grep -c 'runbook_url: https://acme.github.io/stones/runbooks/' "$tmp/rendered")" = "$(alert_names | wc -l)" ]
}
alerts_can_be_changed() {
    local expected
    cat > "$tmp/values.yaml" << 'YAML'
alerts:
  alertLabels: {team: ml}
  runbookUrl: https://wiki.example.com/ashlar/
  disabled: [AshlarNoLeader]
  objectives: {availability: 0.99, firstTokenSeconds: 0.5}
YAML
    rendered_rules --values "$tmp/values.yaml" > "$tmp/rules.yaml" || return 1
    "$promtool" check rules "$tmp/rules.yaml" || return 1
    [ "$(count_alerts "$tmp/rules.yaml")" = "$(($(alert_names | wc -l) - 1))" ] || return 1
    for expected in 'expr: vector(0.99)' 'expr: vector(0.95)' 'le="0.5"' 'team: ml' 'severity: critical' \
        'runbook_url: https://wiki.example.com/ashlar/AshlarEngineStalled.html'; do
        grep -qF "$expected" "$tmp/rules.yaml" || { echo "no $expected"; return 1; }
    done
    ! grep -e AshlarNoLeader -e 'le="2.5"' "$tmp/rules.yaml"
}
docs_hold_together() { python3 tests/docs.py ..; }
scrape_config_is_valid() {
    # Debian's promtool knows no Kubernetes; what it finds there is the only thing left out.
    grep -v kubernetes_sd_configs "$chart/prometheus/scrape.yaml" > "$tmp/scrape.yaml"
    "$promtool" check config "$tmp/scrape.yaml"
}

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
    containers=$(grep -cE '^ +image: ' "$tmp/rendered")
    restricted=$(grep -c 'readOnlyRootFilesystem: true' "$tmp/rendered")
    [ "$containers" = "$restricted" ] && [ "$containers" -gt 0 ]
}

# With the Prometheus operator's definitions, which MONITORING is the folder of, its objects are judged too.
server_takes() {
    local monitoring=false
    [ -z "${MONITORING:-}" ] || monitoring=true
    render --set crds.enabled=false --values "$chart/tests/values/$1.yaml" --set "podMonitor.enabled=$monitoring,alerts.enabled=$monitoring" \
        | kubectl create --namespace default --dry-run=server --validate=strict --filename - --output name 2>&1 \
        | tee "$tmp/server" | grep -v 'already exists' | grep -i -E 'error|warning|invalid|unknown' && return 1
    [ "$monitoring" = false ] || grep -q '^prometheusrule.monitoring.coreos.com/' "$tmp/server" || { cat "$tmp/server"; return 1; }
    grep -q -E 'deployment.apps/ashlar-gateway|already exists' "$tmp/server"
}

for values in "$chart"/tests/values/*.yaml; do
    name=$(basename "$values" .yaml)
    check "lint $name" "$helm" lint --strict "$chart" --values "$values" --kube-version "$kube_version"
    check "render $name" matches_snapshot "$name"
    check "rights $name" grants_nothing_more "$name"
done
check "values are explained and in the schema" values_are_explained
check "dashboards are fresh" dashboards_are_fresh
check "dashboards are complete" dashboards_are_complete
check "dashboards are rendered whole" dashboards_are_rendered_whole
check "alerts are valid" alerts_are_valid
check "alerts fire and stay quiet" alerts_fire
check "alerts are tested and explained" alerts_are_tested
check "alerts lead to their pages" alerts_lead_to_their_pages
check "alerts can be changed" alerts_can_be_changed
check "a published chart names its own images and book" a_published_chart_names_its_own
check "scrape config is valid" scrape_config_is_valid
check "docs hold together" docs_hold_together
check "crd is current" crd_is_current
check "crd is rendered whole" crd_is_rendered_whole
check "crd is kept" crd_is_kept
check "crd can go" crd_can_go
check "crd can be left out" crd_can_be_left_out
check "refuse an unknown value" refuses replica --set gateway.replica=3
check "refuse an unknown section" refuses gatway --set gatway.replicas=3
check "refuse an unknown bound" refuses limit --set gateway.resources.limit.memory=1Gi
check "refuse an unknown affinity" refuses nodesAffinity --set-json 'operator.affinity={"nodesAffinity": {}}'
check "refuse a wrong type" refuses replicas --set-string gateway.replicas=many
check "refuse no replicas" refuses replicas --set gateway.replicas=0
check "refuse no image" refuses image --set operator.image=
check "refuse a pull policy" refuses imagePullPolicy --set operator.imagePullPolicy=Sometimes
check "refuse a long drain delay" refuses drainDelaySeconds --set gateway.drainDelaySeconds=60
check "refuse an objective of one" refuses availability --set-json alerts.objectives.availability=1
check "refuse a bound that is no bucket" refuses firstTokenSeconds --set-json alerts.objectives.firstTokenSeconds=3
check "refuse a cache outside the root" refuses path --set nodeCache.path=models
check "refuse an argument that is none" refuses extraArgs --set 'gateway.extraArgs={serve}'
if [ -n "${KUBECONFIG:-}" ] && kubectl version > /dev/null 2>&1; then
    if [ -n "${MONITORING:-}" ]; then
        kubectl apply --server-side --filename "$MONITORING" > "$tmp/log"
        kubectl wait --for condition=Established --timeout 60s --filename "$MONITORING" > "$tmp/log"
    fi
    for name in default full minimal; do check "server takes $name" server_takes "$name"; done
    if [ -n "${MONITORING:-}" ]; then kubectl delete --filename "$MONITORING" > "$tmp/log"; fi
fi

echo
echo "test result: $([ "$failed" = 0 ] && echo ok || echo FAILED). $passed passed; $failed failed; 0 ignored"
[ "$failed" = 0 ]
