#!/usr/bin/env bash
# Ends the cluster NAME, or what a killed run left of it, and removes its processes, mounts, network namespace, control
# groups and folder. Does nothing, successfully, when there is none.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root
cluster_vars "${1:?name of the cluster}"

# The node's processes carry their cluster's folder in their environment; containers do not, but end with process 1.
node_processes() {
    local environ
    for environ in /proc/[0-9]*/environ; do
        if grep -qzxF "ASHLAR_NODE=$STATE" "$environ" 2> /dev/null; then
            environ=${environ%/environ}
            echo "${environ#/proc/}"
        fi
    done
}

# Groups are named by container; their names must be known before the folder goes.
containers=$(ls "$STATE/containerd/state/io.containerd.runtime.v2.task/k8s.io" 2> /dev/null || true)
deadline=$((SECONDS + 30))
while pids=$(node_processes) && [ -n "$pids" ]; do
    # shellcheck disable=SC2086  # a list of numbers
    kill -9 $pids 2> /dev/null || true
    [ "$SECONDS" -lt "$deadline" ] || die "processes $pids of cluster $NAME do not end"
    sleep 0.05
done

for container in $containers; do
    for group in /sys/fs/cgroup/*/k8s.io/"$container" /sys/fs/cgroup/k8s.io/"$container"; do
        if [ -d "$group" ]; then find "$group" -depth -type d -exec rmdir {} +; fi
    done
done
# The common parent goes when it is empty, that is when no other cluster runs.
rmdir /sys/fs/cgroup/*/k8s.io /sys/fs/cgroup/k8s.io 2> /dev/null || true
if [ -e "/var/run/netns/$NETNS" ]; then ip netns del "$NETNS"; fi
rm -rf --one-file-system "$STATE"
