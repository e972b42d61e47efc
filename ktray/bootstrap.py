"""Install what ktray needs into ``.venv`` beside ``pyproject.toml``: ``python3 -m ktray.bootstrap [--dev]``.

It needs nothing but Python 3.10 or newer and a package registry, so it imports the standard library only.
What it installs is pinned by version and hash in ``constraints.txt`` (``--dev`` adds ``constraints-dev.txt``);
outside the platforms of that lock it takes the ranges of ``pyproject.toml`` and says so. A second call that
finds nothing to do returns at once. An interrupted call is completed by the next one, and two calls at once
take turns.
"""

# No `from __future__ import annotations`: a Python too old for it would fail before it could say why, so the few
# annotations that old Pythons cannot evaluate are quoted.
import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LOCKED_PYTHONS = ((3, 10), (3, 14))
LOCKED_MACHINES = {("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")}
LOCK = "constraints.txt"
LOCK_DEV = "constraints-dev.txt"
# Linux wheels bring CUDA along: about 7 GB unpacked, and pip keeps a download and its unpacked copy at once.
NEEDED_BYTES = {"linux": 10_000_000_000, "darwin": 3_000_000_000}
LOG_TAIL_LINES = 15

CAUSES = (
    (("No space left on device", "Disk quota exceeded"), "free some disk space and run the same command again"),
    (
        ("CERTIFICATE_VERIFY_FAILED", "SSLError"),
        "the registry's certificate is not trusted: set PIP_CERT to your organisation's CA file",
    ),
    (
        ("THESE PACKAGES DO NOT MATCH THE HASHES",),
        "a mirror serves a file other than the verified one: check `pip config list` (index-url, find-links)",
    ),
    (
        ("Read timed out", "NewConnectionError", "Temporary failure in name resolution", "ConnectTimeout"),
        "the package registry was not reached: check the network or proxy (HTTPS_PROXY), "
        "or name your mirror (PIP_INDEX_URL), and run the same command again",
    ),
    (
        ("No matching distribution found",),
        "the registry that pip is set up for (`pip config list`) lacks this version for your Python: "
        "use the public registry or a complete mirror, and a Python from 3.10 to 3.14",
    ),
    (("Permission denied",), "make the checkout writable for this user"),
)


class BootstrapError(Exception):
    """What went wrong and what to do, in one line."""


# ---------------------------------------------------------------------------------------------- decisions


def locked(version: "Sequence[int]", system: str, machine: str, implementation: str) -> bool:
    """Whether ``constraints.txt`` covers an interpreter (`sys.platform`, ``uname -m``, `sys.implementation`)."""
    low, high = LOCKED_PYTHONS
    covered = implementation == "cpython" and (system, machine) in LOCKED_MACHINES
    return covered and low <= tuple(version[:2]) <= high


def stamp_of(root: Path, dev: bool) -> str:
    """Fingerprint of what decides what is installed: the lock, the environment's Python, the checkout's place."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", LOCK, *((LOCK_DEV,) if dev else ()), ".venv/pyvenv.cfg"):
        path = root / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
    digest.update(str(root).encode())
    return digest.hexdigest()


def install_steps(root: Path, dev: bool, use_lock: bool) -> "list[tuple[str, list[str]]]":
    """The pip calls to make, as (what a person reads, arguments after ``pip install``)."""
    if not use_lock:
        target = ".[dev]" if dev else "."
        return [("packages within the ranges of pyproject.toml", ["-e", target])]
    files = ["-r", LOCK] + (["-r", LOCK_DEV] if dev else [])
    return [
        ("the verified packages (some GB on Linux; minutes)", ["--require-hashes", "--only-binary", ":all:", *files]),
        # No build isolation: the isolated build would fetch whatever setuptools is newest, unpinned.
        ("ktray itself", ["--no-deps", "--no-build-isolation", "--no-index", "-e", "."]),
    ]


def remedy_for(log_text: str) -> str:
    """The line of advice that fits what pip printed."""
    for needles, advice in CAUSES:
        if any(needle in log_text for needle in needles):
            return advice
    return "read the log, mend what it names, and run the same command again"


# ------------------------------------------------------------------------------------------------ effects


def venv_python(root: Path) -> Path:
    """The interpreter inside ``.venv``."""
    return root / ".venv" / "bin" / "python"


def say(message: str) -> None:
    """One progress line."""
    sys.stdout.write(f"ktray: {message}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def only_one(root: Path) -> "Iterator[None]":
    """Let one installation at a time into a checkout; the system frees the lock however the process ends.

    The lock lies on ``pyproject.toml`` (never written to), since whatever is in ``.venv`` may be replaced.
    """
    import fcntl

    with (root / "pyproject.toml").open("r+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another installation into this checkout is under way; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def probe(root: Path) -> "tuple[tuple[int, int], str, str, str] | None":
    """(version, platform, machine, implementation) of ``.venv``'s Python, or None if it or its pip is unusable."""
    code = (
        "import pip, platform, sys; "
        "print(sys.version_info[0], sys.version_info[1], sys.platform, platform.machine(), sys.implementation.name)"
    )
    try:
        done = subprocess.run([str(venv_python(root)), "-c", code], capture_output=True, text=True)
    except OSError:
        return None
    words = done.stdout.split()
    if done.returncode != 0 or len(words) != 5 or (int(words[0]), int(words[1])) < (3, 10):
        return None
    return (int(words[0]), int(words[1])), words[2], words[3], words[4]


def create_venv(root: Path) -> None:
    """Make ``.venv`` unless a usable one is there; one that is unusable is replaced.

    Raises:
        BootstrapError: this Python cannot make one.
    """
    folder = root / ".venv"
    if probe(root) is not None:
        return
    say("creating .venv" if not folder.exists() else ".venv is unfinished or its Python is gone: creating it anew")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if made.returncode == 0:
        return
    said = (made.stdout + made.stderr).strip()
    if "ensurepip" in said or "No module named venv" in said:
        raise BootstrapError(
            "this Python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv; "
            "elsewhere use a Python with its standard modules venv and ensurepip"
        )
    last = said.splitlines()[-1] if said else "no message"
    raise BootstrapError(f"`python3 -m venv .venv` failed ({last}): {remedy_for(said)}")


def mend(root: Path) -> None:
    """Make pip see packages that a killed pip left half-installed as missing.

    pip writes a package's RECORD last, yet takes any ``.dist-info`` folder for an installed package.
    """
    for site in (root / ".venv" / "lib").glob("python*/site-packages"):
        halves = [info for info in site.glob("*.dist-info") if not (info / "RECORD").exists()]
        for folder in [*halves, *site.glob("~*")]:
            shutil.rmtree(folder, ignore_errors=True)


def pip_install(root: Path, what: str, arguments: "Sequence[str]", log: Path) -> None:
    """One pip call; its output goes to ``log`` alone.

    Raises:
        BootstrapError: pip failed; the message ends with the remedy, the log's tail is printed before.
    """
    say(f"installing {what}")
    began = time.monotonic()
    command = [str(venv_python(root)), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    # Settings that would move the installation elsewhere or hide it; index, certificate and proxy settings stay.
    for name in ("PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    with log.open("a", encoding="utf-8") as sink:
        sink.write(f"$ {' '.join(command)}\n")
        sink.flush()
        start = sink.tell()
        code = subprocess.run(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code != 0:
        with log.open(encoding="utf-8", errors="replace") as handle:
            handle.seek(start)
            said = handle.read()
        for line in said.splitlines()[-LOG_TAIL_LINES:]:
            say(f"| {line}")
        raise BootstrapError(f"pip could not install {what} (log: {log}): {remedy_for(said)}")
    say(f"installed {what} in {time.monotonic() - began:.0f} s")


def check_torchvision() -> "str | None":
    """What is wrong with the torch/torchvision pair of *this* interpreter, with its remedy; None if nothing is.

    torchvision's compiled operators are built for one build of torch; beside another (typically a CPU-only torch
    wheel) importing it fails with ``operator torchvision::nms does not exist``.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        return f"torch or torchvision cannot be imported ({error}). Run: python3 -m ktray.bootstrap"
    except (RuntimeError, OSError, AttributeError) as error:
        return _pair_problem(str(error))
    return None


def _pair_problem(error: str) -> str:
    first = error.strip().splitlines()[0] if error.strip() else "unknown error"
    return (
        f"torch and torchvision are not of one build ({first}): a CPU-only torch beside the registry's torchvision "
        "does this. Use the pair of the lock: remove .venv and run `python3 -m ktray.bootstrap`, with no torch of "
        "your own in pip's find-links or extra index (`pip config list`)"
    )


def check(root: Path) -> None:
    """Import what only a matching pair of wheels can import, in the environment just made.

    Raises:
        BootstrapError: with the remedy.
    """
    code = (
        "import sys; from ktray.bootstrap import check_torchvision; "
        "problem = check_torchvision(); print(problem or ''); sys.exit(3 if problem else 0)"
    )
    done = subprocess.run([str(venv_python(root)), "-c", code], cwd=root, capture_output=True, text=True)
    if done.returncode == 3:
        raise BootstrapError(done.stdout.strip().splitlines()[-1])
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BootstrapError(
            f"the new environment does not work (exit code {done.returncode}: {last}). "
            "Remove .venv and run `python3 -m ktray.bootstrap` again"
        )


def current(root: Path, dev: bool) -> bool:
    """Whether ``.venv`` holds what these files ask for. The runtime packages alone do not satisfy ``dev``."""
    wanted = {stamp_of(root, True)} if dev else {stamp_of(root, True), stamp_of(root, False)}
    try:
        stamp = (root / ".venv" / "ktray-stamp").read_text().split()
    except OSError:
        return False
    return stamp[:1] != [] and stamp[0] in wanted and venv_python(root).exists()


def bootstrap(root: Path, dev: bool = False) -> bool:
    """Bring ``root/.venv`` to what ``root`` asks for.

    Args:
        root: the checkout, the folder of ``pyproject.toml``.
        dev: also what the tests, the linter and the type checker need.

    Returns:
        True if something was installed, False if nothing was to do.

    Raises:
        BootstrapError: with cause and remedy in one line.
    """
    if current(root, dev):
        return False
    if not (root / "pyproject.toml").exists():
        raise BootstrapError(f"there is no pyproject.toml in {root}: run this from a checkout of ktray")
    if not os.access(root, os.W_OK):
        raise BootstrapError(f"{root} is not writable for this user: clone ktray into a folder of your own")
    with only_one(root):
        if current(root, dev):  # the call that we waited for did it
            return False
        create_venv(root)
        python = probe(root)
        if python is None:
            raise BootstrapError("the new .venv has no working pip: remove .venv and use a complete Python")
        use_lock = locked(*python)
        if not use_lock:
            (major, minor), system, machine, implementation = python
            say(
                f"{implementation} {major}.{minor} on {system}/{machine} is outside the verified set (CPython 3.10 to "
                "3.14; Linux x86-64 and aarch64, macOS arm64): taking the version ranges of pyproject.toml"
            )
        stamp, log = root / ".venv" / "ktray-stamp", root / ".venv" / "bootstrap.log"
        had_dev = stamp.exists() and stamp.read_text().endswith("dev\n")
        free, needed = shutil.disk_usage(root).free, NEEDED_BYTES.get(sys.platform, NEEDED_BYTES["darwin"])
        if not stamp.exists() and free < needed:
            say(f"note: {free / 1e9:.0f} GB free on this disk; a first installation may need {needed / 1e9:.0f} GB")
        stamp.unlink(missing_ok=True)  # until all is done, this environment counts as unfinished
        mend(root)
        dev = dev or had_dev  # an environment of a developer stays one when the lock moves
        for what, arguments in install_steps(root, dev, use_lock):
            pip_install(root, what, arguments, log)
        say("checking torch and torchvision")
        check(root)
        stamp.write_text(f"{stamp_of(root, dev)}\n{'dev' if dev else 'run'}\n")
    return True


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Command line; returns the exit code."""
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python may well run this file)
        sys.stderr.write("ktray needs Python 3.10 or newer; this is {}.{}\n".format(*sys.version_info[:2]))
        return 2
    parser = argparse.ArgumentParser(prog="python3 -m ktray.bootstrap", description=__doc__.split("\n\n")[1])
    parser.add_argument("--dev", action="store_true", help="also install what the tests and linters need")
    dev = parser.parse_args(arguments).dev
    root = Path(__file__).resolve().parent.parent
    try:
        if bootstrap(root, dev):
            say(f"ready: {venv_python(root)}")
    except BootstrapError as error:
        sys.stderr.write(f"ktray: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ktray: interrupted; the same command goes on from here\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
