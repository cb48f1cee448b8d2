#!/usr/bin/env bash
# Builds one part of the cluster's software and prints the folder that holds it:
#   build.sh components   one binary `kc`: etcd, the five Kubernetes components, what enforces NetworkPolicies, kubectl and
#                         helm (16 minutes on 2 cores)
#   build.sh containerd   containerd, its runc shim, ctr
#   build.sh coredns      CoreDNS with the four plugins that cluster DNS needs
#   build.sh pause        the process that holds a pod's namespaces
# All come from the Go module proxy, at the versions that the go.mod files and this file pin. A second call takes no time.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

KUBERNETES=v1.37.2
CONTAINERD=v2.4.2
VERSION_PKG=k8s.io/component-base/version
KC_LDFLAGS="-s -w -X $VERSION_PKG.gitVersion=$KUBERNETES -X $VERSION_PKG.gitMajor=1 -X $VERSION_PKG.gitMinor=37"

# progress TITLE COMMAND...: runs a `go … -v` command and tells every 15 s how far it is.
progress() {
    local title=$1 started=$SECONDS
    shift
    "$@" 2>&1 | {
        compiled=0 shown=$SECONDS
        while IFS= read -r line; do
            case $line in
                'go: downloading '*) continue ;;
                *' '*) printf '%s\n' "$line" >&2 ;; # anything but a package's name is a message
                *) compiled=$((compiled + 1)) ;;
            esac
            if [ $((SECONDS - shown)) -ge 15 ]; then
                shown=$SECONDS
                printf '    %s: %d packages compiled, %d s\n' "$title" "$compiled" $((SECONDS - started)) >&2
            fi
        done
    }
    printf '    %s: done in %d s\n' "$title" $((SECONDS - started)) >&2
}

make_components() {
    say "Building etcd, Kubernetes $KUBERNETES, kubectl and helm (about 16 minutes on 2 cores, once)"
    cd "$CLUSTER_DIR/components"
    progress components go build -v -trimpath -ldflags "$KC_LDFLAGS" -o "$1/kc" .
}

make_containerd() {
    say "Building containerd $CONTAINERD"
    local module=github.com/containerd/containerd/v2/cmd
    cd "$1"
    CGO_ENABLED=0 GOBIN=$1 progress containerd \
        go install -v -trimpath -ldflags "-s -w" "$module/containerd@$CONTAINERD" "$module/containerd-shim-runc-v2@$CONTAINERD" "$module/ctr@$CONTAINERD"
}

make_coredns() {
    say "Building CoreDNS"
    cd "$CLUSTER_DIR/coredns"
    CGO_ENABLED=0 progress coredns go build -v -trimpath -ldflags "-s -w" -o "$1/coredns" .
}

make_pause() {
    cd "$CLUSTER_DIR/pause"
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$1/pause" .
}

go_version=$(go env GOVERSION GOARCH)
case ${1:?what to build} in
    components) cached components "$(hash_of "$go_version" "$KC_LDFLAGS" "$CLUSTER_DIR"/components/{main.go,policies.go,go.mod,go.sum})" make_components ;;
    containerd) cached containerd "$(hash_of "$go_version" "$CONTAINERD")" make_containerd ;;
    coredns) cached coredns "$(hash_of "$go_version" "$CLUSTER_DIR"/coredns/{main.go,go.mod,go.sum})" make_coredns ;;
    pause) cached pause "$(hash_of "$go_version" "$CLUSTER_DIR"/pause/{main.go,go.mod})" make_pause ;;
    *) die "nothing is called $1 here: components, containerd, coredns, pause" ;;
esac
