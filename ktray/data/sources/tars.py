"""Tar shards (WebDataset): sequential reading, and reading of single members.

Nothing is extracted to disk. The caption of an image is the ``.txt`` member next to it in the archive with the same
name up to the first dot, as in WebDataset.
"""

from __future__ import annotations

import gzip
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, ClassVar
from urllib.parse import quote, unquote

from ktray.data import filesystem
from ktray.data.filesystem import MAX_FILE_BYTES, FileStat, why
from ktray.data.sources.base import Cut, LabelTable, Shard, Source, fingerprint
from ktray.data.sources.records import ImageRecord, is_image
from ktray.data.sources.tar_labels import LABEL_SUFFIXES, Member, label_table
from ktray.data.sources.uris import Held, ImageRef
from ktray.errors import KtrayError
from ktray.recipe.registries import SOURCES

TAR = "tar"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
# Number of images of a tar on S3 that one call reads sequentially.
_A_PART = 8

MAX_CAPTION_BYTES = 1 << 16
# Photos hardly compress, so an archive that unpacks to more than this is probably malicious.
MAX_UNPACKED_RATIO = 100
MAX_UNPACKED_FLOOR = 1 << 30
_BOMB = f"it unpacks to more than {MAX_UNPACKED_RATIO} times its size"
_BLOCK = 512


class TarSource(Source):
    """Tar files, compressed or not; each is one shard."""

    noun, accepts, pattern, order = "tar shards", ".tar/.tar.gz/.tgz shards", "*.tar", 20
    labelled = True

    def fits(self, path: str) -> bool:
        return is_tar(path)

    def shards(self, files: Sequence[FileStat], cut: Cut) -> list[Shard]:
        return [Shard(TAR, (file.path,), fingerprint([file]), None) for file in files]

    def read(self, shard: Shard) -> Iterator[ImageRecord]:
        return read_tar(shard.paths[0])

    def parse(self, uri: str) -> ImageRef | None:
        match = TarMember.PATTERN.fullmatch(uri)
        if match is None:
            return None
        member = unquote(match["member"], errors="surrogateescape")
        return TarMember(match["path"], member=member, offset=int(match["offset"]), size=int(match["size"]))

    def fetch(self, path: str, refs: Sequence[ImageRef]) -> list[Callable[[], Held]]:
        members = [ref for ref in refs if isinstance(ref, TarMember)]
        return [partial(fetch_members, path, part) for part in _parts(path, members)]

    def tables(self, path: str, file: FileStat | None) -> list[LabelTable]:
        try:
            return [label_table(path, _described(path))]
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise KtrayError(
                f"Tar shard '{path}' is broken or truncated: {why(error)}", "Write or fetch it again."
            ) from error


@dataclass(frozen=True, kw_only=True)
class TarMember(ImageRef):
    """``X.tar#member=M&offset=O&size=N``: N bytes from byte O of the (unpacked) archive.

    Attributes:
        member: name of the member.
        offset, size: position and number of its bytes.
    """

    member: str
    offset: int = 0
    size: int = 0
    kind: ClassVar[str] = TAR
    PATTERN: ClassVar[re.Pattern[str]] = re.compile(
        r"(?P<path>.+)#member=(?P<member>[^&#]*)&offset=(?P<offset>\d+)&size=(?P<size>\d+)", re.DOTALL
    )

    @property
    def fragment(self) -> str:
        member = quote(self.member, errors="surrogateescape")
        return f"member={member}&offset={self.offset}&size={self.size}"


def is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)


def read_tar(path: str) -> Iterator[ImageRecord]:
    """All images of a tar shard, in the order of the archive.

    Unusable members are records with an error: links, devices, sparse or too large files, and names that leave the
    folder (absolute paths, ``..``). A broken or truncated archive gives one record with an error.
    """
    try:
        with filesystem.open_stream(path) as raw:
            yield from _samples(path, _unpacked(path, raw))
    except Exception as error:  # tarfile, gzip and zlib raise a dozen types on broken archives
        yield ImageRecord(
            path, None, error=f"the tar shard is broken or truncated, and the rest of it is lost: {why(error)}"
        )


def fetch_members(path: str, refs: Iterable[TarMember]) -> Held:
    """Read members of one archive by offset: (bytes, None) or (None, error) each. The archive is opened once."""
    members = sorted(set(refs), key=lambda ref: ref.offset)
    contents: Held = {}
    try:
        limit = _limit(path)
        with _seekable(path) as stream:
            for ref in members:
                contents[ref] = _member(stream, ref) if ref.offset <= limit else (None, f"{_BOMB}: refused as a bomb")
    except Exception as error:
        for ref in members:
            contents.setdefault(ref, (None, f"the tar shard cannot be read: {why(error)}"))
    return contents


def _parts(path: str, refs: list[TarMember]) -> list[list[TarMember]]:
    """Divide the images of an archive into groups of neighbours. One call, which opens the archive, reads a group."""
    if not filesystem.is_remote(path) or not path.lower().endswith(
        ".tar"
    ):  # a compressed archive is read from its start
        return [refs]
    refs = sorted(refs, key=lambda ref: ref.offset)
    return [refs[first : first + _A_PART] for first in range(0, len(refs), _A_PART)]


def _member(stream: Any, ref: TarMember) -> tuple[bytes | None, str | None]:
    changed = "the tar shard has changed since it was listed"
    if ref.offset < _BLOCK or ref.size > MAX_FILE_BYTES:
        return None, changed
    # The header before the data shows whether the shard has changed since it was listed. Header and data are read
    # together, because each read from S3 is a request.
    stream.seek(ref.offset - _BLOCK)
    header_and_data = bytes(stream.read(_BLOCK + ref.size))
    try:
        header = tarfile.TarInfo.frombuf(header_and_data[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.TarError:
        return None, changed
    if header.size != ref.size:
        return None, changed
    data = header_and_data[_BLOCK:]
    if len(data) < ref.size:
        return None, "the tar shard is truncated"
    return data, None


class _Header(tarfile.TarInfo):
    """Records why the list of members ended, because `tarfile` silently stops at a broken header."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(archive)
        except tarfile.TarError as error:
            archive.ended_by = error  # type: ignore[attr-defined]
            raise


def _samples(path: str, stream: IO[bytes]) -> Iterator[ImageRecord]:
    """Images with the captions of their samples. A sample ends when the key changes."""
    key, caption = "", None
    images: list[ImageRecord] = []
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
        broken = None
        try:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # otherwise all headers stay in memory
                if member.isdir() or _skipped(member.name):
                    continue
                if sample_key(member.name) != key:
                    yield from (_with(record, caption) for record in images)
                    key, images, caption = sample_key(member.name), [], None
                if is_image(member.name):
                    images.append(_image(path, archive, member))
                elif member.name.lower().endswith(".txt") and member.isreg() and member.size <= MAX_CAPTION_BYTES:
                    caption = _content(archive, member).decode("utf-8", "replace").strip() or None
        except Exception as error:  # everything before the error is valid
            broken = error
        yield from (_with(record, caption) for record in images)
        if broken is not None:
            raise broken
        _check_end(archive)


def _described(path: str) -> Iterator[Member]:
    """The images of an archive, without their contents, and the members with labels. Of an archive that is not
    compressed, the images are skipped."""
    opened = filesystem.open_random if path.lower().endswith(".tar") else filesystem.open_stream
    with opened(path) as raw:
        mode = "r:" if path.lower().endswith(".tar") else "r|"
        with tarfile.open(fileobj=_unpacked(path, raw), mode=mode, tarinfo=_Header) as archive:  # type: ignore[call-overload]
            for member in archive:
                if not member.isreg() or _skipped(member.name):
                    continue
                key = sample_key(member.name)
                suffix = member.name[len(key) :].lstrip(".").lower()
                if is_image(member.name):
                    yield Member(key, member.name, suffix, uri=_uri(path, member))
                else:
                    labels = suffix in LABEL_SUFFIXES and member.size <= MAX_CAPTION_BYTES
                    yield Member(key, member.name, suffix, content=_content(archive, member) if labels else b"")
            _check_end(archive)


def _uri(path: str, member: tarfile.TarInfo) -> str:
    return str(TarMember(path, member=member.name, offset=member.offset_data, size=member.size))


def _image(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> ImageRecord:
    uri = _uri(path, member)
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return ImageRecord(uri, None, error="unsafe name in a tar shard (absolute, or with '..')")
    if not member.isreg() or member.issparse():
        return ImageRecord(uri, None, error="not a regular file in the tar shard (link, device or sparse)")
    if member.size > MAX_FILE_BYTES:
        return ImageRecord(uri, None, error=f"the image is larger than {MAX_FILE_BYTES >> 20} MiB")
    return ImageRecord(uri, _content(archive, member))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    data = content.read() if content else b""
    if len(data) < member.size:
        raise EOFError(f"member '{member.name}' is truncated")
    return data


def _check_end(archive: tarfile.TarFile) -> None:
    ended_by = getattr(archive, "ended_by", None)
    if not isinstance(ended_by, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
        raise EOFError(f"no end-of-archive mark ({ended_by or 'end of file'})")
    rest: Any = archive.fileobj
    while block := rest.read(1 << 20):
        if block.strip(b"\0"):
            raise EOFError("data after the end-of-archive mark (a part with zeros, or several archives in one file)")


def sample_key(name: str) -> str:
    """The key of the sample of a member: the name up to the first dot, as in WebDataset."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _skipped(name: str) -> bool:
    return any(filesystem.hidden(part) for part in name.split("/") if part not in (".", ".."))


def _with(record: ImageRecord, caption: str | None) -> ImageRecord:
    return ImageRecord(record.uri, record.data, caption, record.error)


class _Limited:
    """A stream with a limit of unpacked bytes."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise OSError(f"{_BOMB}: refused as a bomb")
        return data


def _unpacked(path: str, raw: Any) -> Any:
    if path.lower().endswith(".tar"):
        return raw
    return _Limited(gzip.GzipFile(fileobj=raw), _limit(path))  # type: ignore[arg-type]


def _limit(path: str) -> int:
    """The maximum number of bytes to which an archive may unpack."""
    status = filesystem.stat(path)
    return max(MAX_UNPACKED_FLOOR, MAX_UNPACKED_RATIO * (status.size if status else 0))


def _seekable(path: str) -> Any:
    raw = filesystem.open_random(path)
    if path.lower().endswith(".tar"):
        return raw
    return gzip.GzipFile(fileobj=raw)


SOURCES.register(TAR)(TarSource())
