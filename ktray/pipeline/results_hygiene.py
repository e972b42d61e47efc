"""What HYGIENE found, for result.json and for the report."""

from __future__ import annotations

from typing import Any, cast

from ktray.data.filesystem import printable
from ktray.data.labelled.hygiene import COPIES, DOUBTFUL_LABEL, TWO_LABELS, Finding
from ktray.data.sources.fetch import fetch_images
from ktray.reporting.hygiene import Exhibit, HygieneReport
from ktray.stages import hygiene
from ktray.stages.base import StageResult
from ktray.stages.manifests import HygieneManifest

# Number of problems of each kind that the report shows.
SHOWN = 24
_TITLES = (
    ("Copies in two splits", COPIES),
    ("Identical images with two labels", (TWO_LABELS,)),
    ("Labels that the teacher contradicts", (DOUBTFUL_LABEL,)),
)


def numbers(done: StageResult) -> dict[str, Any]:
    """The entry ``hygiene`` of result.json."""
    facts = cast(HygieneManifest, done.manifest)
    return {"checked": facts["checked"], **facts["counts"], "path": done.stage.file(hygiene.LIST)}


def report(done: StageResult, max_pixels: int) -> HygieneReport:
    """The most certain problems with their images. An image that cannot be read any more is left out."""
    found = hygiene.findings(done)
    groups = []
    for title, kinds in _TITLES:
        listed = [f for f in found if f.kind in kinds]
        if listed:
            more = f" ({SHOWN} of {len(listed)})" if len(listed) > SHOWN else f" ({len(listed)})"
            groups.append((title + more, [_exhibit(f, max_pixels) for f in listed[:SHOWN]]))
    torn = [f"{group}: {', '.join(splits)}" for group, splits in cast(HygieneManifest, done.manifest)["torn"].items()]
    return HygieneReport(groups, torn)


def _exhibit(finding: Finding, max_pixels: int) -> Exhibit:
    uris = [uri for uri in (finding.uri, finding.other_uri) if uri]
    images = [image for _, image, _ in fetch_images(uris, max_pixels=max_pixels) if image is not None]
    return Exhibit(images, [printable(uri) for uri in uris], _text(finding))


def _text(f: Finding) -> str:
    if f.kind == DOUBTFUL_LABEL:
        return f"label {f.label}, the teacher predicts {f.other_label} (margin {f.value:.2f})"
    one, other = ((f"{split}, {label}" if label else split) for split, label in _sides(f))
    same = {"same_file": "the same file", "same_pixels": "the same pixels"}.get(f.kind, f"agreement {f.value:.0%}")
    return f"{one} and {other}" + ("" if f.kind == TWO_LABELS else f": {same}")


def _sides(f: Finding) -> tuple[tuple[str, str], tuple[str, str]]:
    return (f.split, f.label), (f.other_split, f.other_label)
