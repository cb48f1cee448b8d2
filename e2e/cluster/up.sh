#!/usr/bin/env bash
# Starts the one-node cluster NAME in its own network namespace, after removing what an earlier one of that name left, and
# prints the path of its administrator's kubeconfig. The API server answers inside the namespace only: enter.sh goes there.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root
cluster_vars "${1:?name of the cluster}"
NODE_ADDRESS=10.200.0.1

network() {
    ip netns add "$NETNS"
    ip -n "$NETNS" link set lo up
    ip -n "$NETNS" link add node0 type bridge
    ip -n "$NETNS" addr add "$NODE_ADDRESS/24" dev node0
    ip -n "$NETNS" link set node0 up
    ip -n "$NETNS" route add default via "$NODE_ADDRESS" dev node0
}

# certificate NAME SUBJECT [ALTERNATIVE NAMES]
certificate() {
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2> /dev/null
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 365 -out "$1.crt" \
        -extfile <(printf 'subjectAltName=%s' "${3:-DNS:$1}") 2> /dev/null
}

certificates() (
    mkdir "$STATE/pki"
    cd "$STATE/pki"
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.crt -days 365 -subj /CN=ashlar-ca 2> /dev/null
    certificate apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$NODE_ADDRESS,IP:10.96.0.1"
    certificate kubelet /O=system:nodes/CN=system:node:node0 "DNS:node0,IP:$NODE_ADDRESS"
    certificate aggregator /CN=aggregator
    certificate admin /O=system:masters/CN=admin
    certificate cm /CN=system:kube-controller-manager
    certificate scheduler /CN=system:kube-scheduler
    certificate proxy /CN=system:kube-proxy
    openssl ecparam -name prime256v1 -genkey -noout -out sa.key
    openssl ec -in sa.key -pubout -out sa.pub 2> /dev/null
    rm ./*.csr
)

kubeconfigs() {
    local user
    for user in admin kubelet cm scheduler proxy; do
        cat > "$STATE/$user.kubeconfig" << YAML
apiVersion: v1
kind: Config
clusters: [{name: ashlar, cluster: {server: "https://127.0.0.1:6443", certificate-authority-data: $(base64 -w0 "$STATE/pki/ca.crt")}}]
users: [{name: $user, user: {client-certificate-data: $(base64 -w0 "$STATE/pki/$user.crt"), client-key-data: $(base64 -w0 "$STATE/pki/$user.key")}}]
contexts: [{name: ashlar, context: {cluster: ashlar, user: $user}}]
current-context: ashlar
YAML
        chmod 0600 "$STATE/$user.kubeconfig"
    done
}

# A container's root file system is an overlay where the machine allows one on this folder, else plain copies.
snapshotter() {
    mkdir -p "$STATE/probe"/{lower,upper,work,merged}
    if unshare --mount mount -t overlay overlay -o "lowerdir=$STATE/probe/lower,upperdir=$STATE/probe/upper,workdir=$STATE/probe/work" \
        "$STATE/probe/merged" 2> /dev/null; then echo overlayfs; else echo native; fi
    rm -rf "$STATE/probe"
}

configure_containerd() {
    # A link for each pod, not a bridge: whatever a pod sends is routed, and so meets the network policies.
    cat > "$STATE/cni/10-pods.conflist" << JSON
{"cniVersion": "1.0.0", "name": "pods", "plugins": [
  {"type": "ptp",
   "ipam": {"type": "host-local", "dataDir": "$STATE/cni/addresses", "ranges": [[{"subnet": "10.244.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
    # restrict_oom_score_adj: without CAP_SYS_RESOURCE, as in many containers, runc dies of kubelet's scores.
    cat > "$STATE/containerd.toml" << TOML
version = 3
root = "$STATE/containerd/root"
state = "$STATE/containerd/state"
[grpc]
  address = "$STATE/containerd.sock"
[plugins.'io.containerd.cri.v1.images']
  snapshotter = "$(snapshotter)"
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "ashlar.local/pause:1"
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "$STATE/cni"
TOML
}

configure_kubelet() {
    cat > "$STATE/kubelet.yaml" << YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $STATE/pki/ca.crt}}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://$STATE/containerd.sock
tlsCertFile: $STATE/pki/kubelet.crt
tlsPrivateKeyFile: $STATE/pki/kubelet.key
evictionHard: {memory.available: "0%", nodefs.available: "0%", imagefs.available: "0%", nodefs.inodesFree: "0%"}
imageGCHighThresholdPercent: 100
localStorageCapacityIsolation: false
resolvConf: ""
clusterDomain: cluster.local
clusterDNS: [10.96.0.10]
YAML
}

# What people and tests use from outside: kubectl and helm that reach the API server, and names as a pod resolves them.
tools() {
    printf 'nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n' > "$STATE/resolv.conf"
    local tool
    for tool in kubectl helm; do
        printf '#!/bin/sh\nexec nsenter --net=/var/run/netns/%s -- env KUBECONFIG=%s %s %s "$@"\n' \
            "$NETNS" "$STATE/admin.kubeconfig" "$components/kc" "$tool" > "$STATE/tools/$tool"
        chmod +x "$STATE/tools/$tool"
    done
    printf '#!/bin/sh\nexec %s -a %s -n k8s.io "$@"\n' "$containerd/ctr" "$STATE/containerd.sock" > "$STATE/tools/ctr"
    chmod +x "$STATE/tools/ctr"
}

node_ready() { kubectl wait --for=condition=Ready node/node0 --timeout=0; }
# The controller's chain is in every packet's way once it has looked at all pods and policies.
policies_enforced() { nsenter --net="/var/run/netns/$NETNS" -- iptables -S KUBE-ROUTER-FORWARD; }
dns_ready() { "$CLUSTER_DIR/enter.sh" "$NAME" getent hosts kubernetes.default.svc; }

"$CLUSTER_DIR/deps.sh"
components=$("$CLUSTER_DIR/build.sh" components)
containerd=$("$CLUSTER_DIR/build.sh" containerd)
images=$("$CLUSTER_DIR/images.sh" pause coredns)
"$CLUSTER_DIR/down.sh" "$NAME"

say "Starting cluster $NAME"
started=$SECONDS
umask 022
mkdir -p "$STATE"/{log,etcd,cni,containerd,kubelet,tools}
PATH=$STATE/tools:$PATH
tools
network
certificates
kubeconfigs
configure_containerd
configure_kubelet
ASHLAR_NODE=$STATE COMPONENTS=$components CONTAINERD=$containerd setsid nsenter --net="/var/run/netns/$NETNS" -- \
    unshare --mount --pid --fork --propagation private "$CLUSTER_DIR/node.sh" >> "$STATE/log/node.log" 2>&1 < /dev/null &

wait_until 60 containerd ctr version
while read -r _ archive; do import_image "$archive"; done <<< "$images"
wait_until 120 "the API server" kubectl get --raw /readyz
wait_until 60 "the default ServiceAccount" kubectl -n default get serviceaccount default
kubectl apply -f "$CLUSTER_DIR/coredns/coredns.yaml" > /dev/null
wait_until 60 "the node" node_ready
wait_until 60 "cluster DNS" dns_ready
wait_until 60 "enforced network policies" policies_enforced
say "Cluster $NAME is ready after $((SECONDS - started)) s; $STATE/tools holds its kubectl and helm"
echo "$STATE/admin.kubeconfig"
