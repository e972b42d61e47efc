"""Captions: which facts about an image they mention, and their text."""

from __future__ import annotations

from dataclasses import dataclass

from ktray.miniverse.vocabulary import BACKGROUNDS, COLOURS

# Shares of captions by the facts that they mention: most people name the subject, fewer its colour or background.
DETAIL_SHARES = {"name": 0.2, "colour": 0.3, "background": 0.1, "all": 0.4}
# Shares in the second part of the teacher's training. If embeddings represent mainly the subject instead of the
# colours, comparing images with images finds images with the same subject.
TERSE_SHARES = {"name": 0.7, "colour": 0.15, "background": 0.05, "all": 0.1}


@dataclass(frozen=True)
class Facts:
    """Facts about an image, in the words of captions. ``None``: not mentioned (in a caption), or not in the image."""

    name: str
    colour: str | None = None
    background: str | None = None

    def told(self, detail: str) -> Facts:
        """The part of these facts that a caption of this detail (a key of `DETAIL_SHARES`) mentions."""
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
    """Templates with one ``{}`` for a subject's name, which together cover all types of captions."""
    return [
        "the {}",
        *(f"the {{}} in {colour}" for colour in COLOURS),
        *(f"the {{}} on a {background} background" for background in BACKGROUNDS),
    ]
