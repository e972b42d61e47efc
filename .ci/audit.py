"""Known vulnerabilities of the pinned dependencies, and secrets in the tracked files.

    python3 .ci/audit.py [--history] [--tools FOLDER]

Its tools (pip-audit, detect-secrets) are installed into a throw-away environment; ``--tools`` names one that has them.
``--history`` looks at every version of every file that any branch or tag has had.

Dependencies are those that the locks name for this Python and platform.

Exit code: 0 nothing found, 1 something found, 2 something could not be checked (and nothing was found).
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
LOCKS = ("constraints.txt", "constraints-dev.txt", "constraints-gcp.txt")
SERVICES = ("pypi", "osv")
# A release with published advisories (CVE-2021-33503 among them). A mirror that has none does not make things clean,
# though pip-audit ends with 0 there and says that it knows of no vulnerability.
CANARY = "urllib3==1.26.4"
# Locks are hashes; a test checks that they name no registry. What the tests show as secrets, and a name of an image:
_NO_FILES = r"constraints[\w-]*\.txt$"
_NO_SECRETS = (
    r"^(hunter22.*|pass1234word|pass-?(word)?|p%40ss|test|([a-z0-9]+-)?secret(-key|-token)?|S3CR3TVALUE|tok-tok-tok|"
    r"very-private-value|AKIAABCDEFGHIJKLMNOP|\w*projects/.*|.*0123456789abcdef)$"
)


def vulnerabilities(tools: Path) -> tuple[list[str], list[str]]:
    """(what was found, what could not be checked)."""
    with tempfile.TemporaryDirectory() as scratch:
        canary = Path(scratch) / "canary.txt"
        canary.write_text(CANARY + "\n")
        service = next((s for s in SERVICES if any(_audit(tools, canary, s).values())), None)
    if service is None:
        return [], [f"dependencies: no advisories can be had ({', '.join(SERVICES)}); {CANARY} is not known for any"]
    found, unchecked = [], []
    for lock in LOCKS:
        known = _audit(tools, ROOT / lock, service)
        if not known:
            unchecked.append(f"{lock}: pip-audit ended without an answer")
        for package, advisories in known.items():
            if advisories is None:
                unchecked.append(f"{lock}: {package} is not known to {service}")
            else:
                found += [f"{lock}: {package}: {one}" for one in advisories]
    return found, unchecked


def _audit(tools: Path, lock: Path, service: str) -> dict[str, list[str] | None]:
    """By package its advisories, None where it was skipped; empty where there was no answer."""
    command = [tools / "bin" / "pip-audit", "-r", lock, "--no-deps", "--disable-pip", "--progress-spinner=off"]
    done = subprocess.run([*command, f"--vulnerability-service={service}", "--format=json"], capture_output=True)
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return {}
    return {
        f"{one['name']} {one.get('version', '')}".strip(): None
        if "skip_reason" in one
        else [f"{v['id']} (mended in {', '.join(v['fix_versions']) or 'no version'})" for v in one["vulns"]]
        for one in told
    }


def secrets(tools: Path, history: bool) -> list[str]:
    """Where a tracked file, or any version of one, holds what looks like a secret."""
    if not history:
        return _scan(tools, ROOT, [])
    with tempfile.TemporaryDirectory() as scratch:
        where = {}
        blobs = _git("rev-list", "--all", "--objects", "--filter=object:type=blob", "--filter-provided-objects")
        for line in blobs.decode().splitlines():
            blob, _, path = line.partition(" ")
            copy = Path(scratch) / blob / Path(path).name  # rules go by a file's name and suffix
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
    parser.add_argument("--history", action="store_true", help="every version of every file, too")
    parser.add_argument("--tools", type=Path, help="environment that has pip-audit and detect-secrets")
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
        print("clean: no known vulnerability, nothing that looks like a secret")
    return 1 if found else 2 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
