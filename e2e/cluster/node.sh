#!/usr/bin/env bash
# The node's first process: starts every component of the cluster and starts again one that ends. up.sh runs it as
# process 1 of a process namespace, in a mount namespace of its own and in the cluster's network namespace. So the end of
# this one process is the end of every component, container and mount of the cluster, whatever happened before.
# Environment: ASHLAR_NODE (state folder), COMPONENTS and CONTAINERD (folders of binaries).
set -euo pipefail
STATE=$ASHLAR_NODE
cd "$STATE"

# A private view of the places that node software writes to outside its own folders.
mount --make-rprivate /
mount -t proc proc /proc
mkdir -p bin
mount --bind "$COMPONENTS" bin
mkdir -p containerd/bin
mount --bind "$CONTAINERD" containerd/bin
for place in /run /var/lib /var/log; do mount -t tmpfs -o mode=0755 tmpfs "$place"; done
mkdir -p /var/lib/kubelet /var/lib/cni /var/log/pods /run/lock
# No registry can be reached from here; without a name server a pull fails at once, not after a minute.
: > no-name-server
mount --bind no-name-server "$(realpath /etc/resolv.conf)"
# kubelet sets these for the whole machine; here it sets these copies.
for knob in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes; do
    [ -e "/proc/sys/$knob" ] || continue
    mkdir -p "sysctl/$(dirname "$knob")"
    cat "/proc/sys/$knob" > "sysctl/$knob"
    mount --bind "sysctl/$knob" "/proc/sys/$knob"
done
# Volumes that one container mounts must show up in another.
mount --make-rshared /

# supervise NAME COMMAND...: runs it for ever, its output in log/NAME.log. The pause keeps a broken component from spinning.
supervise() {
    local name=$1
    shift
    (
        while :; do
            status=0
            "$@" >> "log/$name.log" 2>&1 || status=$?
            echo "$(date -u +%FT%TZ) $name ended with status $status" >> log/node.log
            sleep 0.5
        done
    ) < /dev/null &
}

# answers COMMAND...: waits until it succeeds; up.sh gives up on the whole node after its own deadline.
answers() { until "$@" > /dev/null 2>&1; do sleep 0.1; done; }

export PATH=$STATE/containerd/bin:$PATH
kc=$STATE/bin/kc
pki=$STATE/pki

supervise containerd containerd --config containerd.toml
supervise etcd "$kc" etcd --name node0 --data-dir etcd --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 --initial-cluster node0=http://127.0.0.1:2380
supervise kube-apiserver "$kc" kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.96.0.0/16 \
    --authorization-mode=Node,RBAC --allow-privileged=true --advertise-address=10.200.0.1 \
    --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" --kubelet-certificate-authority="$pki/ca.crt" \
    --kubelet-preferred-address-types=InternalIP \
    --requestheader-client-ca-file="$pki/ca.crt" --requestheader-allowed-names=aggregator \
    --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group \
    --requestheader-extra-headers-prefix=X-Remote-Extra- \
    --proxy-client-cert-file="$pki/aggregator.crt" --proxy-client-key-file="$pki/aggregator.key"
answers "$kc" kubectl --kubeconfig=admin.kubeconfig get --raw /readyz

supervise kube-controller-manager "$kc" kube-controller-manager --kubeconfig=cm.kubeconfig --leader-elect=false \
    --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" --use-service-account-credentials \
    --allocate-node-cidrs=true --cluster-cidr=10.244.0.0/16
supervise kube-scheduler "$kc" kube-scheduler --kubeconfig=scheduler.kubeconfig --leader-elect=false
# By nftables: the controller of policies writes the whole filter table of iptables, and would undo what kube-proxy just did to it.
supervise kube-proxy "$kc" kube-proxy --kubeconfig=proxy.kubeconfig --proxy-mode=nftables --cluster-cidr=10.244.0.0/16 --hostname-override=node0
answers ctr -a "$STATE/containerd.sock" version
supervise kubelet "$kc" kubelet --config=kubelet.yaml --kubeconfig=kubelet.kubeconfig --root-dir="$STATE/kubelet" \
    --hostname-override=node0 --node-ip=10.200.0.1
answers "$kc" kubectl --kubeconfig=admin.kubeconfig get node node0
supervise policies "$kc" policies --kubeconfig=admin.kubeconfig --hostname-override=node0 --service-cluster-ip-range=10.96.0.0/16

# Reaps what containers and shims leave; the supervisors never end.
while :; do wait || true; done
