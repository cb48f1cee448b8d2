#!/usr/bin/env bash
# Installs the Debian packages that the cluster, its images and the build need, when one of them is missing.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root

PACKAGES=(
    runc containernetworking-plugins iptables nftables ipset conntrack socat iproute2 # what a Kubernetes node calls
    buildah mmdebstrap ca-certificates                                                # images without a container engine or a registry
    openssl curl                                                                      # certificates; requests from the node
    build-essential protobuf-compiler                                                 # a linker for Rust and cgo; generated code of dependencies
)

missing=()
for package in "${PACKAGES[@]}"; do
    dpkg-query -W -f '${Status}\n' "$package" 2> /dev/null | grep -qx 'install ok installed' || missing+=("$package")
done
python3 -m pip --version > /dev/null 2>&1 || missing+=(python3-pip)
if [ ${#missing[@]} -gt 0 ]; then
    say "Installing ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" > /dev/null
fi
for tool in go cargo; do
    command -v "$tool" > /dev/null || die "$tool is not on PATH; Ashlar builds with Go 1.26 and the Rust that rust-toolchain.toml names"
done
