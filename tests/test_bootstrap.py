"""The installer, against a stand-in for the environment's Python that notes what it is asked to do."""

import ast
import hashlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ktray import bootstrap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(bootstrap.__file__).resolve().parent.parent
FAKE_PYTHON = """#!/bin/sh
root=$(dirname "$0")/../..
case "$*" in
  *platform.machine*) cat "$root/probe" ;;
  "-c "*) exit "$(cat "$root/check-code" 2>/dev/null || echo 0)" ;;
  "-m pip"*)
    echo "$@" >> "$root/calls"
    sleep 0.1
    [ -f "$root/pip-fails" ] && { cat "$root/pip-fails"; exit 1; }
    exit 0 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "requirements").mkdir()
    (tmp_path / bootstrap.LOCK).write_text("a==1 --hash=sha256:00\n")
    (tmp_path / bootstrap.LOCK_DEV).write_text("b==1 --hash=sha256:00\n")
    (tmp_path / "probe").write_text("3 11 linux x86_64 cpython\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").write_text("version = 3.11.7\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    return tmp_path


def calls(checkout: Path) -> list[str]:
    path = checkout / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_installs_the_lock_with_hashes_and_then_ktray_without_the_index(checkout: Path) -> None:
    assert bootstrap.bootstrap(checkout)
    packages, itself = calls(checkout)
    assert "--require-hashes" in packages
    assert "-r requirements/constraints.txt" in packages
    assert "constraints-dev" not in packages
    assert {"--no-deps", "--no-build-isolation", "--no-index", "-e"} <= set(itself.split())


def test_a_second_call_does_nothing_until_something_changes(checkout: Path) -> None:
    assert bootstrap.bootstrap(checkout)
    assert not bootstrap.bootstrap(checkout)
    assert len(calls(checkout)) == 2
    (checkout / bootstrap.LOCK).write_text("a==2 --hash=sha256:00\n")
    assert bootstrap.bootstrap(checkout)
    assert len(calls(checkout)) == 4


def test_dev_contains_run_but_not_the_other_way_round(checkout: Path) -> None:
    assert bootstrap.bootstrap(checkout)
    assert bootstrap.bootstrap(checkout, dev=True)
    assert "-r requirements/constraints.txt -r requirements/constraints-dev.txt" in calls(checkout)[2]
    assert not bootstrap.bootstrap(checkout)
    assert not bootstrap.bootstrap(checkout, dev=True)


def test_a_developers_environment_stays_one_when_the_lock_moves(checkout: Path) -> None:
    bootstrap.bootstrap(checkout, dev=True)
    (checkout / bootstrap.LOCK).write_text("a==2 --hash=sha256:00\n")
    bootstrap.bootstrap(checkout)
    assert "constraints-dev.txt" in calls(checkout)[2]


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk space"),
        ("NewConnectionError: refused\nERROR: No matching distribution found for a==1", "PIP_INDEX_URL"),
        ("ERROR: No matching distribution found for a==1", "mirror"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE", "find-links"),
        ("SSLError(CERTIFICATE_VERIFY_FAILED)", "PIP_CERT"),
        ("something never seen", "read the log"),
    ],
)
def test_a_failed_pip_says_why_and_the_next_call_goes_on(
    checkout: Path, capsys: pytest.CaptureFixture[str], said: str, remedy: str
) -> None:
    (checkout / "pip-fails").write_text(said + "\n")
    with pytest.raises(bootstrap.BootstrapError, match=re.escape(remedy)) as error:
        bootstrap.bootstrap(checkout)
    assert "\n" not in str(error.value)
    assert said.splitlines()[-1] in capsys.readouterr().out
    assert said.splitlines()[-1] in (checkout / ".venv" / "bootstrap.log").read_text()
    (checkout / "pip-fails").unlink()
    assert bootstrap.bootstrap(checkout)
    assert not bootstrap.bootstrap(checkout)


def test_what_a_killed_pip_left_half_installed_is_installed_again(checkout: Path) -> None:
    site = checkout / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, files in {
        "half-1.dist-info": ["METADATA"],
        "whole-1.dist-info": ["METADATA", "RECORD"],
        "~orch": [],
    }.items():
        (site / name).mkdir(parents=True)
        for file in files:
            (site / name / file).write_text("")
    bootstrap.bootstrap(checkout)
    assert [p.name for p in site.iterdir()] == ["whole-1.dist-info"]


def test_two_calls_at_once_install_once(checkout: Path) -> None:
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(bootstrap.bootstrap(checkout))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, True]
    assert len(calls(checkout)) == 2


def test_an_environment_that_fails_its_check_is_not_taken_for_done(checkout: Path) -> None:
    (checkout / "check-code").write_text("1")
    with pytest.raises(bootstrap.BootstrapError, match=r"Remove \.venv"):
        bootstrap.bootstrap(checkout)
    (checkout / "check-code").unlink()
    assert bootstrap.bootstrap(checkout)


def test_outside_the_lock_the_ranges_are_taken_and_said(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "probe").write_text("3 11 darwin x86_64 cpython\n")
    bootstrap.bootstrap(checkout, dev=True)
    (only,) = calls(checkout)
    assert only.endswith("-e .[dev]")
    assert "outside the verified set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "system", "machine", "implementation", "covered"),
    [
        ((3, 10), "linux", "x86_64", "cpython", True),
        ((3, 14), "darwin", "arm64", "cpython", True),
        ((3, 15), "linux", "x86_64", "cpython", False),
        ((3, 12), "win32", "AMD64", "cpython", False),
        ((3, 11), "linux", "x86_64", "pypy", False),
    ],
)
def test_what_the_lock_covers(
    version: tuple[int, int], system: str, machine: str, implementation: str, covered: bool
) -> None:
    assert bootstrap.locked(version, system, machine, implementation) is covered


def test_no_checkout_and_no_permission_are_told(
    tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(bootstrap.BootstrapError, match=r"no pyproject\.toml"):
        bootstrap.bootstrap(tmp_path / "nowhere")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(bootstrap.BootstrapError, match="not writable"):
        bootstrap.bootstrap(checkout)


def test_a_python_without_ensurepip_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'The virtual environment was not created: ensurepip is not available'; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(bootstrap.BootstrapError, match="apt install python3-venv"):
        bootstrap.create_venv(tmp_path)


def test_an_old_python_gets_one_clear_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    assert bootstrap.main([]) == 2
    assert capsys.readouterr().err == "ktray needs Python 3.10 or newer; this is 3.9\n"
    for module in (bootstrap.__file__, ROOT / "ktray" / "__init__.py"):
        ast.parse(Path(module).read_text(), feature_version=(3, 6))


def test_it_runs_on_the_standard_library_alone() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ktray.bootstrap"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


def test_a_torch_of_another_build_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bootstrap.check_torchvision() is None
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    problem = bootstrap.check_torchvision()
    assert problem is not None
    assert "operator torchvision::nms does not exist" in problem
    assert "remove .venv" in problem


# ---------------------------------------------------------------------------------------- the lock itself


def lock(name: str) -> dict[str, list[str]]:
    """Requirement line (without hashes) to its hashes."""
    joined = (ROOT / name).read_text().replace("\\\n", " ")
    rows = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return {re.split(r"\s+--hash=", row)[0].strip(): re.findall(r"--hash=sha256:([0-9a-f]{64})", row) for row in rows}


@pytest.mark.parametrize(
    ("name", "least"), [(bootstrap.LOCK, 40), (bootstrap.LOCK_DEV, 40), ("requirements/constraints-gcp.txt", 1)]
)
def test_the_lock_pins_every_line_by_hash_and_names_no_registry(name: str, least: int) -> None:
    rows = lock(name)
    assert len(rows) > least
    assert all(hashes and "==" in row for row, hashes in rows.items())
    assert not re.search(r"https?:|file:|index-url|find-links|@", (ROOT / name).read_text())


def test_both_locks_agree_and_cover_pyproject() -> None:
    run, dev = lock(bootstrap.LOCK), lock(bootstrap.LOCK_DEV)
    pins = [Requirement(row) for row in [*run, *dev]]
    here = {p.name: str(p.specifier) for p in pins if p.marker is None or p.marker.evaluate()}
    assert all(here[p.name] == str(p.specifier) for p in pins if p.marker is None or p.marker.evaluate())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    wanted += project["build-system"]["requires"]
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate():
            pinned = here[re.sub(r"[-_.]+", "-", requirement.name).lower()]
            assert requirement.specifier.contains(pinned.removeprefix("==")), requirement


def test_the_stamp_tells_checkouts_apart(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other") / "copy"
    subprocess.run(["cp", "-r", str(checkout), str(other)], check=True)
    assert bootstrap.stamp_of(checkout, False) != bootstrap.stamp_of(other, False)
    assert len(bootstrap.stamp_of(checkout, True)) == hashlib.sha256().digest_size * 2


# ---------------------------------------------------------------------------------------------- .ci/run


@pytest.mark.parametrize(("command", "code"), [("echo 1 passed in 1s", 0), ("echo 1 failed in 1s; false", 1)])
def test_ci_runs_the_readmes_second_block_and_then_all_other_checks(tmp_path: Path, command: str, code: int) -> None:
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for tool in ("ruff", "mypy"):
        (tmp_path / ".venv" / "bin" / tool).write_text(f'#!/bin/sh\necho "{tool} $*"\n')
        (tmp_path / ".venv" / "bin" / tool).chmod(0o755)
    (tmp_path / "README.md").write_text(f"# a\n```bash\nexit 7\n```\ntext\n```bash\n{command}\n```\n")
    done = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    lines = done.stdout.splitlines()
    assert command.removeprefix("echo ").split(";")[0] in lines
    assert {"ruff check .", "ruff format --check .", "mypy "} <= set(lines)
    (tmp_path / "README.md").unlink()
    assert subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True).returncode == 1
