#!/usr/bin/env bash
# Runs COMMAND... where the cluster NAME can be reached: in its network namespace, with KUBECONFIG set, kubectl and helm on
# PATH, and names of Services resolved as in a pod.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root
cluster_vars "${1:?name of the cluster}"
shift
[ -e "/var/run/netns/$NETNS" ] || die "there is no cluster $NAME; start it with e2e/cluster/up.sh $NAME"

# The namespace has no way out, so a proxy of the outside is no help in it.
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
export KUBECONFIG=$STATE/admin.kubeconfig PATH=$STATE/tools:$PATH RESOLV=$STATE/resolv.conf
# A mount namespace for this one command: nobody else sees the cluster's resolv.conf.
exec nsenter --net="/var/run/netns/$NETNS" -- unshare --mount --propagation private \
    bash -c 'mount --bind "$RESOLV" "$(realpath /etc/resolv.conf)" && unset RESOLV && exec "$@"' enter "$@"
