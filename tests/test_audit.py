"""``.ci/audit.py`` tells "nothing found" from "nobody looked"; its tools are stood in for by scripts that answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).parents[1] / ".ci" / "audit.py"
BAD = {"name": "urllib3", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
GOOD = {"name": "numpy", "version": "2", "vulns": []}
SKIPPED = {"name": "numpy", "skip_reason": "Dependency not found on PyPI"}


def tool(folder, name, canary, other):
    (folder / "bin").mkdir(exist_ok=True)
    answers = json.dumps({"canary": canary, "other": other})
    text = (
        f"#!{sys.executable}\nimport sys\nanswer = {answers}['canary' if 'canary' in ' '.join(sys.argv) else 'other']\n"
    )
    (folder / "bin" / name).write_text(f"{text}print(answer)\nsys.exit(0 if answer else 1)\n")
    (folder / "bin" / name).chmod(0o755)


@pytest.mark.parametrize(
    ("canary", "other", "secrets", "code", "told"),
    [
        ([BAD], [GOOD], {}, 0, "clean"),
        ([BAD], [GOOD, BAD], {}, 1, "FOUND       requirements/constraints.txt: urllib3 1: CVE-1 (fixed in 2)"),
        ([BAD], [GOOD], {"a.py": [{"line_number": 3, "type": "AWS Access Key"}]}, 1, "secret? a.py:3: AWS Access Key"),
        ([SKIPPED], [GOOD], {}, 2, "NOT CHECKED dependencies: no advisories"),
        (None, None, {}, 2, "NOT CHECKED dependencies: no advisories"),
        ([BAD], [SKIPPED], {}, 2, "NOT CHECKED requirements/constraints.txt: pypi does not know numpy"),
        ([BAD], None, {}, 2, "NOT CHECKED requirements/constraints.txt: pip-audit gave no result"),
    ],
)
def test_clean_found_and_not_checked_are_three_ends(canary, other, secrets, code, told, tmp_path):
    answers = [json.dumps({"dependencies": found}) if found else "" for found in (canary, other)]
    tool(tmp_path, "pip-audit", *answers)
    tool(tmp_path, "detect-secrets", *[json.dumps({"results": secrets})] * 2)
    done = subprocess.run([sys.executable, str(AUDIT), "--tools", str(tmp_path)], capture_output=True, text=True)
    assert told in done.stdout
    assert done.returncode == code, done.stderr
