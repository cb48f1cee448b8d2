#!/usr/bin/env python3
"""sbom.py PACKAGE: a CycloneDX document of what is linked into a binary of this workspace, from cargo's own metadata.

Normal dependencies of the package for this platform, with version, licence, source and checksum. No clock and no random number:
the same lock file gives the same document.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

TARGET = "x86_64-unknown-linux-gnu"


def linked(metadata: dict, root: str) -> list[str]:
    """Ids of the packages that `root` needs to run, itself first."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    seen, queue = [root], [root]
    while queue:
        for dependency in nodes[queue.pop()]["deps"]:
            kinds = [kind["kind"] for kind in dependency["dep_kinds"]]
            if None in kinds and dependency["pkg"] not in seen:
                seen.append(dependency["pkg"])
                queue.append(dependency["pkg"])
    return seen


def component(package: dict, checksums: dict) -> dict:
    name, version = package["name"], package["version"]
    purl = f"pkg:cargo/{name}@{version}"
    made = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
    if package["license"]:
        made["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum := checksums.get((name, version)):
        made["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    if package["repository"]:
        made["externalReferences"] = [{"type": "vcs", "url": package["repository"]}]
    return made


def main() -> None:
    name = sys.argv[1]
    command = ["cargo", "metadata", "--format-version=1", "--locked", "--offline", f"--filter-platform={TARGET}"]
    metadata = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    lock = tomllib.loads((Path(metadata["workspace_root"]) / "Cargo.lock").read_text())
    checksums = {(p["name"], p["version"]): p.get("checksum") for p in lock["package"]}
    root = next(p["id"] for p in metadata["packages"] if p["name"] == name and p["source"] is None)
    ids = linked(metadata, root)
    components = sorted((component(packages[i], checksums) for i in ids[1:]), key=lambda c: c["purl"])
    refs = {i: component(packages[i], checksums)["bom-ref"] for i in ids}
    graph = []
    for node in metadata["resolve"]["nodes"]:
        if node["id"] in refs:
            needs = sorted(refs[d["pkg"]] for d in node["deps"] if d["pkg"] in refs)
            graph.append({"ref": refs[node["id"]], "dependsOn": needs})
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**component(packages[root], checksums), "type": "application"}},
        "components": components,
        "dependencies": sorted(graph, key=lambda g: g["ref"]),
    }
    json.dump(document, sys.stdout, indent=1)
    sys.stdout.write("\n")


main()
