#!/usr/bin/env bash
# Makes container images without a container engine, a registry or a daemon. For each NAME prints `REFERENCE ARCHIVE`:
#   pause coredns client model   what the cluster needs beside Ashlar: pod sandbox, DNS, curl in a pod, the default model
#   awq-model                    the default model as an AWQ checkpoint
#   operator runtime             Ashlar's own, from operator/Dockerfile and runtime/Dockerfile
#   previous-operator            that of the last release
#   runtime-cuda                 the runtime for GPUs, from runtime/Dockerfile.cuda
# The references of Ashlar's own images end in the hash of their content: a changed binary is a changed image.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
need_root

# shellcheck source=/dev/null
suite=$(. /etc/os-release && echo "$VERSION_CODENAME") # the build's own: its libc is what the binaries ask for
BASE_PACKAGES="base-files,libc6,libgcc-s1"
CLIENT_PACKAGES=$BASE_PACKAGES,curl

export BUILDAH_ISOLATION=chroot
# buildah TMP ARG...: with a store of its own that goes away with TMP, so that no build depends on an earlier one.
buildah() {
    local store=$1
    shift
    mkdir -p "$store"
    echo '{"default": [{"type": "insecureAcceptAnything"}]}' > "$store/policy.json"
    local policy=()
    case $1 in bud | commit | pull | push) policy=(--signature-policy "$store/policy.json") ;; esac
    command buildah --storage-driver vfs --root "$store/root" --runroot "$store/run" "$1" "${policy[@]}" "${@:2}" > "$store/log" 2>&1 \
        || { cat "$store/log" >&2; return 1; }
}

# make_rootfs TMP PACKAGES: a Debian root without package manager, shell or documentation, with an unprivileged user.
make_rootfs() {
    local root_hook download_certificates
    # The package of certificates would bring perl; its files alone are enough.
    download_certificates='cd "$1" && APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq download ca-certificates
        dpkg-deb -x ca-certificates_*.deb . && rm ca-certificates_*.deb
        mkdir -p etc/ssl/certs && cat usr/share/ca-certificates/mozilla/*.crt > etc/ssl/certs/ca-certificates.crt'
    root_hook='cd "$1" && rm -rf usr/share/doc usr/share/man usr/share/locale usr/share/info usr/share/lintian usr/share/bug var/cache var/lib/apt
        echo "root:x:0:0::/root:/sbin/nologin" > etc/passwd && echo "root:x:0:" > etc/group
        echo "ashlar:x:65532:65532::/home/ashlar:/sbin/nologin" >> etc/passwd && echo "ashlar:x:65532:" >> etc/group
        mkdir -p home/ashlar && chown 65532:65532 home/ashlar'
    mmdebstrap --quiet --variant=extract --include="$2" --customize-hook="$download_certificates" --customize-hook="$root_hook" \
        "$suite" "$1/root.tar"
}

make_base() {
    say "Making the base image (Debian $suite)"
    make_rootfs "$1" "$BASE_PACKAGES"
}

# save TMP REFERENCE CONTEXT [ARG...]: builds CONTEXT's Dockerfile and writes TMP/image.tar.
save() {
    local tmp=$1 reference=$2 context=$3
    shift 3
    buildah "$tmp/store" bud --layers=false --timestamp 0 "$@" --tag "$reference" "$context"
    buildah "$tmp/store" push "$reference" "docker-archive:$tmp/image.tar:$reference"
    rm -rf "$tmp/store" "$context"
}

make_client() {
    say "Making the client image"
    mkdir "$2"
    make_rootfs "$2" "$CLIENT_PACKAGES"
    printf 'FROM scratch\nADD root.tar /\nUSER 65532:65532\nENTRYPOINT ["/usr/bin/curl"]\n' > "$2/Dockerfile"
    save "$1" "$3" "$2"
}

# make_binary TMP CONTEXT REFERENCE BINARY: an image of one static binary.
make_binary() {
    mkdir "$2"
    cp "$4" "$2/binary"
    printf 'FROM scratch\nCOPY binary /binary\nENTRYPOINT ["/binary"]\n' > "$2/Dockerfile"
    save "$1" "$3" "$2"
}

make_model() {
    say "Making the model's image"
    mkdir "$2"
    ln "$4" "$2/" 2> /dev/null || cp "$4" "$2/"
    printf 'FROM scratch\nCOPY *.gguf /\n' > "$2/Dockerfile"
    save "$1" "$3" "$2"
}

# make_folder_model TMP CONTEXT REFERENCE FOLDER: an image of a checkpoint's files.
make_folder_model() {
    say "Making the AWQ model's image"
    mkdir "$2"
    install -m 0644 "$4"/* "$2/"
    printf 'FROM scratch\nCOPY *.json *.safetensors /\n' > "$2/Dockerfile"
    save "$1" "$3" "$2"
}

# make_own TMP CONTEXT REFERENCE DOCKERFILE BINARY BASE SBOM: one of Ashlar's images, on our own base.
make_own() {
    say "Making the image of ${4#"$REPO"/}"
    mkdir "$2"
    cp "$4" "$2/Dockerfile"
    cp "$5" "$2/"
    cp "$7" "$2/sbom.cdx.json"
    command -v strip > /dev/null && strip "$2/$(basename "$5")"
    case $4 in *.cuda) "$REPO/e2e/release/cublas.sh" "$2" ;; esac
    buildah "$1/store" from --name base scratch
    buildah "$1/store" add base "$6/root.tar" /
    buildah "$1/store" commit --rm base localhost/base:1
    save "$1" "$3" "$2" --build-arg BASE=localhost/base:1 --pull-never
}

# image NAME MAKER REFERENCE INPUT...: prints `REFERENCE ARCHIVE`; a REFERENCE that ends in `:` gets the inputs' hash as its tag.
image() {
    local name=$1 maker=$2 reference=$3 key entry
    shift 3
    key=$(hash_of "$CLUSTER_DIR/images.sh" "$reference" "$@")
    case $reference in *:) reference=$reference${key:0:12} ;; esac
    entry=$(cached "image-$name" "$key" "$maker" "$CACHE/.making-image-$name/context" "$reference" "${MAKER_ARGS[@]}")
    echo "$reference $entry/image.tar"
}

# own NAME DOCKERFILE BINARY REFERENCE
own() {
    local name=$1 dockerfile=$REPO/$2 binary=$3 reference=$4 base sbom
    sbom=$CACHE/sbom-$name.cdx.json
    (cd "$REPO" && "$CLUSTER_DIR/sbom.py" "$(basename "$binary")") > "$sbom"
    base=$(cached image-base "$(hash_of "$suite" "$BASE_PACKAGES" "$(declare -f make_rootfs)")" make_base)
    MAKER_ARGS=("$dockerfile" "$binary" "$base" "$sbom")
    image "$name" make_own "$reference" "$binary" "$dockerfile" "$base" "$sbom"
}

for name in "$@"; do
    MAKER_ARGS=()
    case $name in
        pause)
            folder=$("$CLUSTER_DIR/build.sh" pause)
            MAKER_ARGS=("$folder/pause")
            image pause make_binary ashlar.local/pause:1 "$folder/pause"
            ;;
        coredns)
            folder=$("$CLUSTER_DIR/build.sh" coredns)
            MAKER_ARGS=("$folder/coredns")
            image coredns make_binary ashlar.local/coredns:1 "$folder/coredns"
            ;;
        client) image client make_client ashlar.local/client:1 "$suite" ;;
        model)
            file=$("$CLUSTER_DIR/model.sh")
            MAKER_ARGS=("$file")
            image model make_model ashlar.local/models/smollm2-135m-instruct:q4_1 "$file"
            ;;
        awq-model)
            folder=$("$CLUSTER_DIR/awq.sh")
            MAKER_ARGS=("$folder")
            image awq-model make_folder_model ashlar.local/models/smollm2-135m-instruct:awq "$folder"/*
            ;;
        operator)
            file=$("$CLUSTER_DIR/binaries.sh" ashlar-operator)
            own operator operator/Dockerfile "$file" ashlar.local/ashlar-operator:
            ;;
        previous-operator)
            folder=$("$CLUSTER_DIR/previous.sh")
            REPO=$folder own previous-operator operator/Dockerfile "$folder/ashlar-operator" ashlar.local/ashlar-operator-previous:
            ;;
        runtime)
            file=$("$CLUSTER_DIR/binaries.sh" ashlar)
            own runtime runtime/Dockerfile "$file" ashlar.local/ashlar:
            ;;
        runtime-cuda)
            # shellcheck source=/dev/null
            . "$REPO/e2e/cuda.sh"
            file=$("$CLUSTER_DIR/binaries.sh" ashlar --features ashlar/cuda)
            own runtime-cuda runtime/Dockerfile.cuda "$file" ashlar.local/ashlar-cuda:
            ;;
        *) die "no image is called $name" ;;
    esac
done
