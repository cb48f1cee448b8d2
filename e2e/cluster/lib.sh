# Shared by the scripts in this folder; sourced, never run.
#
# Everything that takes time to make lands in a cache outside the repository, in a folder named after the hash of what it
# was made from, and appears there by one rename: an entry is whole or absent, and a changed input makes a new entry.
# shellcheck shell=bash

# A failure inside $(...) ends the script, as one outside does.
shopt -s inherit_errexit

CLUSTER_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
REPO=$(cd "$CLUSTER_DIR/../.." && pwd)
CACHE=${ASHLAR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ashlar}
export CLUSTER_DIR REPO CACHE

# Progress goes to stderr, so that stdout carries results only.
say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "run this as root: it makes network namespaces and mounts"; }

# hash_of ITEM...: one hash over the contents of files and the text of anything that is not a file.
hash_of() {
    local item
    for item in "$@"; do
        if [ -f "$item" ]; then sha256sum < "$item"; else printf '%s\n' "$item"; fi
    done | sha256sum | cut -c1-16
}

# cached NAME KEY MAKER [ARG...]: prints the folder $CACHE/NAME-KEY; when absent, runs `MAKER TMP ARG...` to fill it first.
# Two callers at once make an entry once: the second waits for the first. Of each NAME the two newest entries are kept.
# Call it as `entry=$(cached ...)` only: in `if`, `||` or an argument, bash would ignore a failure inside MAKER.
cached() {
    local name=$1 key=$2 maker=$3 entry tmp
    shift 3
    entry=$CACHE/$name-$key
    tmp=$CACHE/.making-$name
    if [ ! -d "$entry" ]; then
        mkdir -p "$CACHE"
        (
            flock 9
            [ ! -d "$entry" ] || exit 0
            rm -rf "$tmp"
            mkdir "$tmp"
            "$maker" "$tmp" "$@" >&2 9>&-
            mv -T "$tmp" "$entry"
        ) 9> "$CACHE/.lock-$name"
    fi
    touch "$entry"
    prune_cache "$name"
    printf '%s\n' "$entry"
}

# prune_cache NAME: drops all but the two newest entries of NAME.
prune_cache() {
    local old
    # shellcheck disable=SC2012  # names are ours: a word and a hash
    ls -1dt "$CACHE/$1"-???????????????? 2>/dev/null | tail -n +3 | while read -r old; do rm -rf "$old"; done
}

# bound_target_dir: the build folder of a shared cache grows with every checkout that uses it; above 15 GB it starts anew.
bound_target_dir() {
    local folder=${CARGO_TARGET_DIR:-} size_kb
    case $folder in "$CACHE"/target-*) ;; *) return 0 ;; esac
    mkdir -p "$folder"
    touch "$folder"
    prune_cache target
    size_kb=$(du -sk "$folder" | cut -f1)
    if [ "$size_kb" -gt $((15 * 1024 * 1024)) ]; then
        say "Emptying $folder, which has grown to $((size_kb / 1024 / 1024)) GB"
        rm -rf "$folder"
    fi
}

# cluster_vars NAME: sets NAME, STATE (its folder) and NETNS (its network namespace).
cluster_vars() {
    NAME=$1
    [[ $NAME =~ ^[a-z][a-z0-9-]{0,20}$ ]] || die "'$NAME' is no name for a cluster: lower-case letters, digits and '-', at most 21"
    STATE=${TMPDIR:-/tmp}/ashlar-$NAME
    NETNS=ashlar-$NAME
    # The node hides these places from itself, and a unix socket's path has at most 107 characters.
    case $STATE in /run/* | /var/run/* | /var/lib/* | /var/log/*) die "TMPDIR must not lie under /run, /var/lib or /var/log" ;; esac
    [ ${#STATE} -le 70 ] || die "TMPDIR is too long for unix sockets: ${#STATE} characters in $STATE"
}

# import_image ARCHIVE: gives an image to the cluster that cluster_vars named.
import_image() {
    local snapshotter
    snapshotter=$(sed -n 's/.*snapshotter = "\(.*\)"/\1/p' "$STATE/containerd.toml")
    "$STATE/tools/ctr" images import --snapshotter "$snapshotter" "$1" > "$STATE/log/import.log" 2>&1 || { cat "$STATE/log/import.log" >&2; return 1; }
}

# wait_until SECONDS WHAT COMMAND...: runs COMMAND until it succeeds; after SECONDS fails, naming WHAT.
wait_until() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            say "Gave up waiting for $what; the last answer was:"
            "$@" >&2 || true
            return 1
        fi
        sleep 0.1
    done
}
