#!/usr/bin/env bash
# Prints the folder of Debian's `prometheus` and `promtool`. Taken out of the package, not installed: the package would start
# a service.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

fetch_prometheus() {
    say "Fetching Prometheus from Debian"
    mkdir "$1/package"
    cd "$1/package"
    apt-get -qq -o APT::Sandbox::User=root download prometheus
    dpkg-deb -x prometheus_*.deb .
    mv usr/bin/prometheus usr/bin/promtool "$1"
    cd "$1"
    rm -rf package
}

# Lists of packages are missing on a fresh machine.
[ -n "$(apt-cache madison prometheus 2> /dev/null)" ] || apt-get update -qq >&2
version=$(apt-cache show --no-all-versions prometheus | sed -n 's/^Version: //p')
[ -n "$version" ] || die "Debian's package prometheus is not to be had: run apt-get update"
cached prometheus "$(hash_of "$version" "$(dpkg --print-architecture)")" fetch_prometheus
