"""Whether published weights can be had: from the local cache of the Hugging Face hub, or from the hub itself.

The hub is asked for the headers of one file, with a time limit of a few seconds, so that a machine without a network
does not wait. Answers are kept for the process, so that all runs of a job decide alike.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import huggingface_hub
import huggingface_hub.constants
from huggingface_hub.errors import EntryNotFoundError

# Name lookups may take much longer than the time limit of the request.
SECONDS = 4.0
_lock = threading.Lock()


def available(repository: str, files: tuple[str, ...]) -> str:
    """How one of the files of a repository can be had, in words; empty if none of them can be had.

    With ``HF_HUB_OFFLINE=1``, the hub is not asked.

    Args:
        repository: ``owner/name``, optionally followed by ``@revision``.
        files: names of files with the same content; one of them is enough.
    """
    name, _, revision = repository.strip("/").partition("@")
    if any(_cached(name, file, revision or None) for file in files):
        return "its files are in the local cache of its hub"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return ""
    with _lock:
        return "its hub answers" if _answers(name, files, revision or None) else ""


def _cached(name: str, file: str, revision: str | None) -> bool:
    return isinstance(huggingface_hub.try_to_load_from_cache(name, file, revision=revision), str)


@lru_cache(maxsize=64)
def _answers(name: str, files: tuple[str, ...], revision: str | None) -> bool:
    found: list[bool] = []

    def ask() -> None:
        for file in files:
            try:
                url = huggingface_hub.hf_hub_url(name, file, revision=revision)
                facts = huggingface_hub.get_hf_file_metadata(url, timeout=SECONDS)
            except EntryNotFoundError:
                continue
            except Exception:  # no network, a model behind a licence, another server at this address
                return
            if facts.commit_hash is not None:  # which a login page of a network does not send
                found.append(True)
                return

    # A daemon, because a name lookup cannot be interrupted and must not delay the end of the process.
    thread = threading.Thread(target=ask, name="ktray-hub", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(found)
