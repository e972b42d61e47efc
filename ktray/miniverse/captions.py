"""What a caption says about a picture, and when it is true of another one."""

from __future__ import annotations

from dataclasses import dataclass

from ktray.miniverse.vocabulary import BACKGROUNDS, COLOURS

# How much a caption tells, and how often: people name the thing, fewer its colour, fewer what is behind it.
DETAIL_SHARES = {"name": 0.2, "colour": 0.3, "background": 0.1, "all": 0.4}
# The same for the second part of the teacher's training: an embedding that gives most of its room to what a
# thing is, rather than to colours, finds like things when pictures are compared with pictures.
TERSE_SHARES = {"name": 0.7, "colour": 0.15, "background": 0.05, "all": 0.1}


@dataclass(frozen=True)
class Facts:
    """What is in a picture, in the words captions use. ``None``: not told (in a caption), or not there."""

    name: str
    colour: str | None = None
    background: str | None = None

    def told(self, detail: str) -> Facts:
        """The part of these facts that a caption of the given detail (a key of `DETAIL_SHARES`) tells."""
        return Facts(
            self.name,
            self.colour if detail in ("colour", "all") else None,
            self.background if detail in ("background", "all") else None,
        )


def caption(facts: Facts) -> str:
    """One English phrase, for example ``the capital letter K in red on a striped background``."""
    words = f"the {facts.name}"
    if facts.colour:
        words += f" in {facts.colour}"
    if facts.background:
        words += f" on a {facts.background} background"
    return words


def prompt_templates() -> list[str]:
    """Templates with one ``{}`` for a subject's name, which together cover what captions can tell."""
    return [
        "the {}",
        *(f"the {{}} in {colour}" for colour in COLOURS),
        *(f"the {{}} on a {background} background" for background in BACKGROUNDS),
    ]
