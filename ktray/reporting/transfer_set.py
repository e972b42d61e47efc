"""How much of a transfer set belongs to the task, as HTML: the curve of the similarity, and other sets beside it."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from ktray.reporting.plots import INK, SERIES, style, svg


def on_task_html(on_task: dict[str, Any] | None, identifier: str = "on-task") -> Markup:
    """The curve and the table of the sets, for a page that defines the colours of `ktray.reporting.plots`; empty where
    nothing is known.

    Args:
        on_task, identifier: as for `on_task_svg`.
    """
    if not on_task:
        return Markup("")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    text = resources.files("ktray.reporting").joinpath("transfer_set.html").read_text("utf-8")
    curve = Markup(on_task_svg(on_task, identifier))  # the plot is ktray's own SVG
    return Markup(environment.from_string(text).render(facts=on_task, curve=curve))


def on_task_svg(on_task: dict[str, Any] | None, identifier: str) -> str:
    """The similarity to the query, and the share of images with the predicted class of their query, by rank.

    Args:
        on_task: ``transfer_set.on_task`` of ``result.json``.
        identifier: distinguishes this plot's ids from those of others on the page.

    Returns:
        SVG; "" where there is no curve.
    """
    curve = (on_task or {}).get("curve")
    if not on_task or not curve:
        return ""
    agree = curve["agree"]
    figure = Figure(figsize=(6.8, 2.7 if agree is None else 4.4), layout="constrained")
    panels = figure.subplots(1 if agree is None else 2, 1, sharex=True, squeeze=False)[:, 0]
    upper = panels[0]
    upper.plot(curve["rank"], curve["similarity"], color=SERIES[0], linewidth=1.8)
    upper.set_ylabel("cosine similarity\nto the query")
    # With several kinds of queries there are several floors, and an image has that of its query.
    for floor in on_task["floor"]:
        upper.axhline(floor, color=SERIES[1], linewidth=1.4, linestyle="-" if on_task["applied"] else (0, (5, 4)))
        words = "floor" if on_task["applied"] else "calibrated floor, not applied"
        upper.annotate(
            f"{words} {floor:.3f}",
            (0.99, floor),
            xycoords=upper.get_yaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=INK,
        )
    if agree is not None:
        panels[1].step(curve["rank"], agree, color=SERIES[2], linewidth=1.6, where="pre")
        panels[1].set_ylim(0, 1.02)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[1].set_ylabel("teacher predicts\nthe query's class")
    panels[-1].set_xlabel("rank of the image, the most similar to its query first")
    panels[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    count = curve["rank"][-1]
    for panel in panels:
        panel.set_xlim(0, count)
        # Ranks from here on are left out, or would be.
        if 0 < on_task["below"] < count and len(on_task["floor"]) == 1:
            panel.axvspan(count - on_task["below"], count, color=SERIES[1], alpha=0.1, linewidth=0)
        style(panel)
    return svg(figure, identifier, "Similarity of the images of the transfer set to their queries, by rank")
