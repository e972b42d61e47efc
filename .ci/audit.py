"""Find known vulnerabilities of the pinned dependencies, and secrets in the tracked files.

    python3 .ci/audit.py [--history] [--tools FOLDER]

The script installs its tools (pip-audit, detect-secrets) into a temporary environment; ``--tools`` names an
environment that already has them. ``--history`` checks every version of every file on any branch or tag.

The dependencies checked are those that the lock files name for this Python and platform.

Exit code: 0 if nothing was found, 1 if something was found, 2 if something could not be checked (and nothing was
found).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("pip-audit==2.10.1", "detect-secrets==1.5.0")
LOCKS = tuple(f"requirements/{name}.txt" for name in ("constraints", "constraints-dev", "constraints-gcp"))
SERVICES = ("pypi", "osv")
# A release with published advisories (CVE-2021-33503 among them). With a mirror that has no advisories, pip-audit exits
# with 0 and reports no vulnerability for any package, so a source that knows nothing about this release is not trusted.
CANARY = "urllib3==1.26.4"
# Lock files contain only hashes (a test checks that they name no registry).
_NO_FILES = r"constraints[\w-]*\.txt$"
# The allow-list: fake secrets in tests, and the name of an image.
_NO_SECRETS = (
    r"^(hunter22.*|pass1234word|pass-?(word)?|p%40ss|test|([a-z0-9]+-)?secret(-key|-token)?|S3CR3TVALUE|tok-tok-tok|"
    r"very-private-value|AKIAABCDEFGHIJKLMNOP|\w*projects/.*|.*0123456789abcdef)$"
)


def vulnerabilities(tools: Path) -> tuple[list[str], list[str]]:
    """(findings, reasons why something could not be checked)."""
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch) / "canary.txt"
        canary.write_text(CANARY + "\n")
        service = next((s for s in SERVICES if any(_audit(tools, canary, s).values())), None)
    if service is None:
        return [], [f"dependencies: no advisories are available ({', '.join(SERVICES)}); none of them reports {CANARY}"]
    found, unchecked = [], []
    for lock in LOCKS:
        known = _audit(tools, ROOT / lock, service)
        if not known:
            unchecked.append(f"{lock}: pip-audit gave no result")
        for package, advisories in known.items():
            if advisories is None:
                unchecked.append(f"{lock}: {service} does not know {package}")
            else:
                found += [f"{lock}: {package}: {one}" for one in advisories]
    return found, unchecked


def _audit(tools: Path, lock: Path, service: str) -> dict[str, list[str] | None]:
    """The advisories of each package, None for a skipped one; empty if pip-audit gave no result."""
    command = [tools / "bin" / "pip-audit", "-r", lock, "--no-deps", "--disable-pip", "--progress-spinner=off"]
    done = subprocess.run([*command, f"--vulnerability-service={service}", "--format=json"], capture_output=True)
    try:
        rows = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return {}
    return {
        f"{one['name']} {one.get('version', '')}".strip(): None
        if "skip_reason" in one
        else [f"{v['id']} (fixed in {', '.join(v['fix_versions']) or 'no version'})" for v in one["vulns"]]
        for one in rows
    }


def secrets(tools: Path, history: bool) -> list[str]:
    """Places in tracked files, or in any version of them, that look like a secret."""
    if not history:
        return _scan(tools, ROOT, [])
    with tempfile.TemporaryDirectory() as scratch:
        where = {}
        blobs = _git("rev-list", "--all", "--objects", "--filter=object:type=blob", "--filter-provided-objects")
        for line in blobs.decode().splitlines():
            blob, _, path = line.partition(" ")
            copy = Path(scratch) / blob / Path(path).name  # some rules depend on the name and suffix of the file
            copy.parent.mkdir()
            copy.write_bytes(_git("cat-file", "blob", blob))
            where[blob] = f"{path} of blob {blob[:12]}"
        found = [one.partition("/") for one in _scan(tools, Path(scratch), ["--all-files"])]
        return [f"{where[blob]}:{rest.partition(':')[2]}" for blob, _, rest in found]


def _scan(tools: Path, folder: Path, options: list[str]) -> list[str]:
    command = [tools / "bin" / "detect-secrets", "scan", *options, "--no-verify"]
    command += ["--exclude-files", _NO_FILES, "--exclude-secrets", _NO_SECRETS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    return [f"{name}:{one['line_number']}: {one['type']}" for name, all_ in results.items() for one in all_]


def _git(*words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", action="store_true", help="also check every version of every file")
    parser.add_argument("--tools", type=Path, help="an environment that has pip-audit and detect-secrets")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        tools = asked.tools
        if tools is None:
            tools = Path(scratch) / "tools"
            venv.create(tools, with_pip=True)
            subprocess.run([tools / "bin" / "pip", "install", "--quiet", *TOOLS], check=True)
        tools = tools.resolve()
        found, unchecked = vulnerabilities(tools)
        found += [f"secret? {one}" for one in secrets(tools, asked.history)]
    for one in found:
        print(f"FOUND       {one}")
    for one in unchecked:
        print(f"NOT CHECKED {one}")
    if not found and not unchecked:
        print("clean: no known vulnerability, and nothing looks like a secret")
    return 1 if found else 2 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
