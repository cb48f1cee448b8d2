#!/usr/bin/env python3
"""Follows the docs: run.py runs every command of the book and the README, page after page, as a reader would.

In a page, the info string of a fenced block says what happens to it:

    sh              run: all of a page's blocks in one shell, in order
    sh elsewhere    needs what a test cluster lacks: programs, commands and flags must exist
    yaml            an object: the API server must take it, strictly
    yaml values     values of the chart: it must render with them
    yaml fragment   a part of an InferenceService: the API server must take a service with it

Besides, every link inside the repository must lead somewhere, and the pages of reasons and of alerts must have exactly those that
the operator and the chart know.

Two things differ from a reader's machine: the chart is told the images under test, and the model of the hub is replaced by the
same one in an image, as the test cluster has no way out.

Environment: KUBECONFIG, kubectl, helm, ashlar and ashlar-operator on PATH, MODEL (a model's file), ASHLAR_E2E_OPERATOR_IMAGE,
ASHLAR_E2E_RUNTIME_IMAGE. Arguments pick pages by a part of their path.
"""

import os
import pathlib
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time

REPO = pathlib.Path(__file__).resolve().parents[2]
BOOK = REPO / "charts/docs/src"
HUB_MODEL = "hf://HuggingFaceTB/SmolLM2-135M-Instruct"
IMAGE_MODEL = os.environ.get("ASHLAR_E2E_MODEL_URI", "oci://ashlar.local/models/smollm2-135m-instruct:q4_1")
# Namespaces of the book, and one for manifests that are only shown to the API server.
NAMESPACES = ("demo", "keys-demo", "demo-manifests")
LIMIT_SECONDS = 600
FENCE = re.compile(r"^( *)```(\S*) ?(.*)$")
BASE_SERVICE = """
apiVersion: serving.ashlar.dev/v1alpha1
kind: InferenceService
metadata: {name: fragment, namespace: demo-manifests}
spec: {model: {uri: "hf://a/b"}, endpoint: {auth: None}}
"""
# Programs that the commands of `sh elsewhere` may use and that the test machine lacks.
FOREIGN = {"skopeo", "buildah", "cosign", "printf", "docker", "grep"}


def pages():
    """The book in its order, then the README, whose manifests need the definition that the book installs."""
    summary = (BOOK / "SUMMARY.md").read_text()
    return [*(BOOK / path for path in re.findall(r"\]\(([^)]+\.md)\)", summary)), REPO / "README.md"]


def blocks(page):
    """(line, language, attributes, text) of each fenced block."""
    found, inside = [], None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside = (number, fence[2], fence[3].split(), [])
        elif inside is not None and fence and not fence[2]:
            found.append((*inside[:3], "\n".join(inside[3]) + "\n"))
            inside = None
        elif inside is not None:
            inside[3].append(line)
    assert inside is None, f"{page}: the block of line {inside[0]} does not end"
    return found


def prose(page):
    """A page without its fenced blocks, in which a comment looks like a heading."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What `page.md#...` may name: its headings, as mdBook and GitHub write them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            yield f"{target}: there is no such file"
        elif anchor and anchor not in anchors(file):
            yield f"{target}: {file.name} has no such heading"


def check_same(what, known, told):
    yield from (f"{what} {name} has no part in the book" for name in sorted(set(known) - set(told)))
    yield from (f"the book tells of {what} {name}, which does not exist" for name in sorted(set(told) - set(known)))


def check_reasons():
    conditions = (REPO / "crds/src/conditions.rs").read_text().partition("pub mod reason")[2]
    decisions = (REPO / "operator/src/autoscaler/decision.rs").read_text().partition("pub fn as_str")[2].partition("\n    }\n")[0]
    page = (BOOK / "troubleshooting.md").read_text()
    known = re.findall(r'&str = "(\w+)"', conditions) + re.findall(r'=> "(\w+)"', decisions)
    yield from check_same("reason", known, re.findall(r"^### (\w+)$", page, re.MULTILINE))


def check_alerts():
    rules = "".join(file.read_text() for file in sorted((REPO / "charts/ashlar/alerts").glob("*.yaml")))
    told = [page.stem for page in (BOOK / "runbooks").glob("Ashlar*.md")]
    yield from check_same("alert", re.findall(r"alert: (\w+)", rules), told)


def run(command, cwd, text=None, env=None):
    """Output and success of a command."""
    try:
        done = subprocess.run(command, cwd=cwd, input=text, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired as late:
        return f"{late.stdout or ''}\nno end within {LIMIT_SECONDS} s", False
    return done.stdout, done.returncode == 0


def environment(folder):
    """A reader's shell: in a clone, with a helm that knows the images under test."""
    tools = folder / "bin"
    tools.mkdir()
    for name in ("charts", "crds", "e2e"):
        (folder / name).symlink_to(REPO / name)
    images = [f"operator.image={os.environ['ASHLAR_E2E_OPERATOR_IMAGE']}", f"runtime.image={os.environ['ASHLAR_E2E_RUNTIME_IMAGE']}"]
    sets = " ".join(f"--set {shlex.quote(one)}" for one in images)
    helm = tools / "helm"
    helm.write_text(f'#!/bin/sh\ncase "$*" in *upgrade*charts/ashlar*) set -- "$@" {sets} ;; esac\nexec {shutil.which("helm")} "$@"\n')
    helm.chmod(helm.stat().st_mode | stat.S_IXUSR)
    # What the runbooks ask to be set.
    return {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "NAMESPACE": "demo", "NAME": "smollm2"}


def run_page(page, shell, folder, env):
    """Runs the commands of a page in one shell."""
    script = "set -euo pipefail\n"
    for line, text in shell:
        script += f"echo '--- line {line}'\n{text.replace(HUB_MODEL, IMAGE_MODEL)}"
    return run(["bash", "-c", script], folder, env=env)


def help_of(program, words, cache={}):
    """The help of the longest command that `words` begin with."""
    for length in range(len(words), -1, -1):
        key = (program, *words[:length])
        if key not in cache:
            cache[key] = run([*key, "--help"], "/")
        said, good = cache[key]
        # helm and kubectl answer the help of the whole to a command that they do not know.
        if good and (length == 0 or f"{words[length - 1]}" in said):
            return said, length
    return "", 0


def check_elsewhere(text):
    """What is wrong with commands that are not run."""
    said, good = run(["bash", "-n", "-c", text], "/")
    if not good:
        yield said
    for command in re.split(r"\n|\|\|?|&&", text.replace("\\\n", " ")):
        words = shlex.split(command, comments=True)
        if not words or words[0] in FOREIGN:
            continue
        program, *rest = words
        if program == "make":
            for target in rest:
                if "=" not in target and not run(["make", "--dry-run", target], REPO)[1]:
                    yield f"no target {target}"
            continue
        if program not in ("ashlar", "ashlar-operator", "helm", "kubectl"):
            yield f"{program} is not a program that the docs may use"
            continue
        plain = [word for word in rest if re.fullmatch(r"[a-z]+", word)]
        known, used = help_of(program, plain[:2])
        if not used:
            yield f"{program} has no command {plain[:1]}"
        if program == "kubectl":
            known += run(["kubectl", "options"], "/")[0]
        for flag in (word.split("=")[0] for word in rest if word.startswith("--") and word != "--"):
            if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", known):
                yield f"{program} {' '.join(plain[:used])} has no {flag}"


def check_yaml(attributes, text, folder, env):
    """What is wrong with a manifest or values."""
    if "values" in attributes:
        said, good = run(["helm", "template", "ashlar", "charts/ashlar", "--values", "-"], folder, text, env)
    elif "fragment" in attributes:
        (folder / "base.yaml").write_text(BASE_SERVICE)
        patched, good = run(["kubectl", "patch", "--local", "-f", "base.yaml", "--type", "merge", "-o", "yaml", "-p", text], folder, None, env)
        said, good = run(["kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-"], folder, patched, env) if good else (patched, good)
    else:
        said, good = run(["kubectl", "apply", "--dry-run=server", "--validate=strict", "-f", "-"], folder, text, env)
    if not good:
        yield said


def main():
    chosen = [page for page in pages() if not sys.argv[1:] or any(part in str(page) for part in sys.argv[1:])]
    passed = failed = 0

    def report(name, began, problems):
        nonlocal passed, failed
        print(f"test {name} ... {'FAILED' if problems else 'ok'} ({time.monotonic() - began:.1f} s)", flush=True)
        passed, failed = passed + (not problems), failed + bool(problems)
        for problem in problems:
            print("    " + problem.strip().replace("\n", "\n    "), flush=True)

    for page in chosen:
        report(f"{page.relative_to(REPO)} (links)", time.monotonic(), list(check_links(page)))
    report("reasons", time.monotonic(), list(check_reasons()))
    report("alerts", time.monotonic(), list(check_alerts()))
    with tempfile.TemporaryDirectory(prefix="ashlar-docs-") as temporary:
        folder = pathlib.Path(temporary)
        env = environment(folder)
        # What an earlier run left would not be what a reader finds.
        run(["kubectl", "delete", "namespace", *NAMESPACES, "--ignore-not-found"], folder, env=env)
        run(["kubectl", "create", "namespace", "demo-manifests"], folder, env=env)
        for page in chosen:
            name = str(page.relative_to(REPO))
            shell, manifests = [], []
            for line, language, attributes, text in blocks(page):
                began = time.monotonic()
                if language == "sh" and "elsewhere" in attributes:
                    report(f"{name}:{line} (checked)", began, list(check_elsewhere(text)))
                elif language == "sh":
                    shell.append((line, text))
                elif language == "yaml":
                    manifests.append((line, attributes, text))
            began = time.monotonic()
            if shell:
                said, good = run_page(page, shell, folder, env)
                report(f"{name} (run)", began, [] if good else [said])
            for line, attributes, text in manifests:
                # Namespaces of the docs need not exist for a manifest to be taken.
                began, text = time.monotonic(), text.replace("namespace: demo", "namespace: demo-manifests")
                report(f"{name}:{line} (manifest)", began, list(check_yaml(attributes, text, folder, env)))
        run(["kubectl", "delete", "namespace", *NAMESPACES, "--ignore-not-found"], folder, env=env)
    print(f"\ntest result: {'FAILED' if failed else 'ok'}. {passed} passed; {failed} failed; 0 ignored")
    sys.exit(bool(failed) or not passed)


if __name__ == "__main__":
    main()
