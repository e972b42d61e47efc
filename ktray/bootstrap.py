"""Install the packages that ktray needs into ``.venv``: ``python3 -m ktray.bootstrap [--dev]``.

The installer needs Python 3.10 or newer and a package registry, and imports only the standard library.
Versions and hashes are pinned in ``requirements/constraints.txt``; ``--dev`` adds
``requirements/constraints-dev.txt``. On platforms that these lock files do not cover, the installer uses the
version ranges of ``pyproject.toml`` and prints a message. If everything is up to date, it returns at once. After an
interruption, run it again to finish the installation. Two calls at the same time wait for each other.
"""

# No `from __future__ import annotations`: an old Python would fail on it before the message about the version. The
# few annotations that old Pythons cannot evaluate are quoted instead.
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
LOCK = "requirements/constraints.txt"
LOCK_DEV = "requirements/constraints-dev.txt"
# Linux wheels include CUDA: about 7 GB unpacked, and pip keeps a download and its unpacked copy at the same time.
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
        "a mirror serves a file that differs from the verified one: check `pip config list` (index-url, find-links)",
    ),
    (
        ("Read timed out", "NewConnectionError", "Temporary failure in name resolution", "ConnectTimeout"),
        "the package registry could not be reached: check the network or proxy (HTTPS_PROXY), "
        "or set your mirror (PIP_INDEX_URL), and run the same command again",
    ),
    (
        ("No matching distribution found",),
        "the registry that pip uses (`pip config list`) does not have this version for your Python: "
        "use the public registry or a complete mirror, and Python 3.10 to 3.14",
    ),
    (("Permission denied",), "make the checkout writable for this user"),
)


class BootstrapError(Exception):
    """The problem and its remedy, in one line."""


# ---------------------------------------------------------------------------------------------- decisions


def lacking(error: ModuleNotFoundError) -> int:
    """Say what to do about a Python that lacks a package which ktray needs, in one line; returns the exit code.

    Raises:
        ModuleNotFoundError: the error itself, if it is of ktray.
    """
    if (error.name or "").partition(".")[0] in ("ktray", ""):
        raise error
    print(
        f"error: {sys.executable} has no package '{error.name}', which ktray needs. Use the Python of ktray's "
        "environment (.venv/bin/python after `python3 -m ktray.bootstrap`); on a cluster, activate the environment "
        "before `ray start`, or write its full path after `--` of `ray job submit`.",
        file=sys.stderr,
    )
    return 2  # a mistake in the command: `ktray.distributed.explain.INPUT`, which cannot be imported here


def locked(version: "Sequence[int]", system: str, machine: str, implementation: str) -> bool:
    """Whether ``LOCK`` covers an interpreter (`sys.platform`, ``uname -m``, `sys.implementation`)."""
    low, high = LOCKED_PYTHONS
    covered = implementation == "cpython" and (system, machine) in LOCKED_MACHINES
    return covered and low <= tuple(version[:2]) <= high


def stamp_of(root: Path, dev: bool) -> str:
    """Hash of everything that decides what is installed: lock files, the environment's Python, the checkout's path."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", LOCK, *((LOCK_DEV,) if dev else ()), ".venv/pyvenv.cfg"):
        path = root / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
    digest.update(str(root).encode())
    return digest.hexdigest()


def install_steps(root: Path, dev: bool, use_lock: bool) -> "list[tuple[str, list[str]]]":
    """The pip calls to make, as (description for the user, arguments after ``pip install``)."""
    if not use_lock:
        target = ".[dev]" if dev else "."
        return [("packages within the version ranges of pyproject.toml", ["-e", target])]
    files = ["-r", LOCK] + (["-r", LOCK_DEV] if dev else [])
    return [
        (
            "the verified packages (several GB on Linux)",
            ["--require-hashes", "--only-binary", ":all:", *files],
        ),
        # No build isolation: the isolated build would fetch whatever setuptools is newest, unpinned.
        ("ktray itself", ["--no-deps", "--no-build-isolation", "--no-index", "-e", "."]),
    ]


def remedy_for(log_text: str) -> str:
    """The advice that matches the output of pip."""
    for needles, advice in CAUSES:
        if any(needle in log_text for needle in needles):
            return advice
    return "read the log, fix the problem that it names, and run the same command again"


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
    """Allow one installation at a time in a checkout; the system frees the lock however the process ends.

    The lock is held on ``pyproject.toml`` (which is never written), since any file in ``.venv`` may be replaced.
    """
    import fcntl

    with (root / "pyproject.toml").open("r+b") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another installation into this checkout is running; waiting for it to finish")
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
    """Create ``.venv`` unless a usable one exists; an unusable one is replaced.

    Raises:
        BootstrapError: this Python cannot create virtual environments.
    """
    folder = root / ".venv"
    if probe(root) is not None:
        return
    say("creating .venv" if not folder.exists() else ".venv is incomplete or its Python is missing: creating it again")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], capture_output=True, text=True)
    if made.returncode == 0:
        return
    said = (made.stdout + made.stderr).strip()
    if "ensurepip" in said or "No module named venv" in said:
        raise BootstrapError(
            "this Python cannot create virtual environments. On Debian or Ubuntu: apt install python3-venv; "
            "on other systems use a Python that has the standard modules venv and ensurepip"
        )
    last = said.splitlines()[-1] if said else "no message"
    raise BootstrapError(f"`python3 -m venv .venv` failed ({last}): {remedy_for(said)}")


def remove_incomplete(root: Path) -> None:
    """Remove packages that a killed pip left incomplete, so that pip installs them again.

    pip writes a package's RECORD last, but counts any ``.dist-info`` folder as an installed package.
    """
    for site in (root / ".venv" / "lib").glob("python*/site-packages"):
        halves = [info for info in site.glob("*.dist-info") if not (info / "RECORD").exists()]
        for folder in [*halves, *site.glob("~*")]:
            shutil.rmtree(folder, ignore_errors=True)


def pip_install(root: Path, what: str, arguments: "Sequence[str]", log: Path) -> None:
    """Run pip once; its output goes to ``log`` only.

    Raises:
        BootstrapError: pip failed. The message ends with the remedy; the last lines of the log are printed first.
    """
    say(f"installing {what}")
    began = time.monotonic()
    command = [str(venv_python(root)), "-m", "pip", "install", "--no-input", "--progress-bar", "off", *arguments]
    environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1")
    # These settings would install into another place. Settings for index, certificate and proxy stay.
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
    """The problem with torch and torchvision in *this* interpreter, with a remedy; None if they work together.

    The compiled operators of torchvision work with one build of torch only. With another (typically a CPU-only
    torch wheel) the import fails with ``operator torchvision::nms does not exist``.
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
        f"torch and torchvision come from different builds ({first}), for example a CPU-only torch with the "
        "registry's torchvision. Install the locked pair: remove .venv and run `python3 -m ktray.bootstrap`, without "
        "a separate torch in pip's find-links or extra index (`pip config list`)"
    )


def check(root: Path) -> None:
    """Import torch and torchvision in the new environment; this works only if the two builds match.

    Raises:
        BootstrapError: the import failed; the message names the remedy.
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
    """Whether ``.venv`` is up to date with the lock files. The runtime packages alone do not satisfy ``dev``."""
    wanted = {stamp_of(root, True)} if dev else {stamp_of(root, True), stamp_of(root, False)}
    try:
        stamp = (root / ".venv" / "ktray-stamp").read_text().split()
    except OSError:
        return False
    return stamp[:1] != [] and stamp[0] in wanted and venv_python(root).exists()


def bootstrap(root: Path, dev: bool = False) -> bool:
    """Install into ``root/.venv`` what the files of ``root`` require.

    Args:
        root: the checkout, the folder of ``pyproject.toml``.
        dev: also install the packages for the tests, the linter and the type checker.

    Returns:
        True if something was installed, False if ``.venv`` was up to date.

    Raises:
        BootstrapError: cause and remedy in one line.
    """
    if current(root, dev):
        return False
    if not (root / "pyproject.toml").exists():
        raise BootstrapError(f"there is no pyproject.toml in {root}: run this command from a checkout of ktray")
    if not os.access(root, os.W_OK):
        raise BootstrapError(f"{root} is not writable for this user: clone ktray into a folder that you can write to")
    with only_one(root):
        if current(root, dev):  # another call has finished the installation meanwhile
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
                "3.14; Linux x86-64 and aarch64, macOS arm64): installing within the version ranges of pyproject.toml"
            )
        stamp, log = root / ".venv" / "ktray-stamp", root / ".venv" / "bootstrap.log"
        had_dev = stamp.exists() and stamp.read_text().endswith("dev\n")
        free, needed = shutil.disk_usage(root).free, NEEDED_BYTES.get(sys.platform, NEEDED_BYTES["darwin"])
        if not stamp.exists() and free < needed:
            say(f"note: {free / 1e9:.0f} GB free on this disk; a first installation may need {needed / 1e9:.0f} GB")
        stamp.unlink(missing_ok=True)  # until the end, this environment counts as incomplete
        remove_incomplete(root)
        dev = dev or had_dev  # a developer's environment keeps the extra packages when the lock changes
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
    parser.add_argument("--dev", action="store_true", help="also install the packages for tests and linters")
    dev = parser.parse_args(arguments).dev
    root = Path(__file__).resolve().parent.parent
    try:
        if bootstrap(root, dev):
            say(f"ready: {venv_python(root)}")
    except BootstrapError as error:
        sys.stderr.write(f"ktray: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("ktray: interrupted; run the same command again to continue\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
