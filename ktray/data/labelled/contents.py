"""Digests of the contents of labelled images, by which results are reused: a copy of the data with other modification
times is the same data."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ktray.data import filesystem
from ktray.data.labelled.memory import keep_contents, recall_contents
from ktray.data.labelled.rows import LabelledRow
from ktray.data.sources.uris import ImageRef

# Size of the data, and number of images, up to which all files are read; above, sizes and modification times decide.
MOST_BYTES = 4 << 30
MOST_ROWS = 200_000
_OWN = re.compile(r"\d+:\d+")  # the size and modification time of the image itself, not of a list that names it
_BLOCK = 1 << 20


def content_versions(rows: Sequence[LabelledRow]) -> dict[str, str]:
    """By uri of an image (or its mask), the digest of its local file: 32 hex digits.

    Files that the store remembers with their size and modification time are not read again. Remote and missing files
    have no entry. Beyond `MOST_BYTES` of local files or `MOST_ROWS`, the result is empty.
    """
    if len(rows) > MOST_ROWS:
        return {}
    versions: dict[str, str] = {}
    for row in rows:
        listed = row.version.split("|")
        for uri, version in zip((row.uri, row.mask), [*listed, ""], strict=False):
            path = ImageRef.parse(uri).path
            if uri and path not in versions and not filesystem.is_remote(path):
                versions[path] = version if _OWN.fullmatch(version) else _version(path)
    versions = {path: version for path, version in versions.items() if version}
    if sum(int(version.partition(":")[0]) for version in versions.values()) > MOST_BYTES:
        return {}
    files = sorted(versions.items())
    known = {path: entry for path, entry in recall_contents(files).items() if versions.get(path) == entry[0]}
    todo = [path for path, _ in files if path not in known]
    with ThreadPoolExecutor(8) as pool:  # hashing and reading release the interpreter's lock
        digests = dict(zip(todo, pool.map(_digest, todo), strict=True))
    if digests:
        known |= {path: (versions[path], digest) for path, digest in digests.items() if digest}
        keep_contents(files, known)
    uris = {uri: ImageRef.parse(uri).path for row in rows for uri in (row.uri, row.mask) if uri}
    return {uri: known[path][1] for uri, path in uris.items() if path in known}


def _version(path: str) -> str:
    status = filesystem.stat(path)
    return f"{status.size}:{status.mtime_ns}" if status else ""


def _digest(path: str) -> str:
    """The digest of a file; "" if it cannot be read, which the stage that decodes it reports."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with filesystem.open_stream(path) as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()
