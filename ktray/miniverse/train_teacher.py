"""Train the small teacher that ships with ktray.

``python -m ktray.miniverse.train_teacher`` writes ``model.safetensors`` and ``train_log.csv`` into
``ktray/miniverse/teacher/``. The expected zero-shot top-1 accuracy on the test images of `letters` is about 0.9, after
40 minutes on two cores. If a run is stopped, the next start resumes it from its last checkpoint.

The objective is symmetric InfoNCE between images and captions (Radford et al. 2021, section 2.3) with soft targets:
within a batch, the target of an image is distributed equally over all captions that are true for it, because in such a
small world many captions are.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ktray.miniverse.captions import DETAIL_SHARES, TERSE_SHARES, Facts, caption, prompt_templates
from ktray.miniverse.vocabulary import BACKGROUNDS, COLOURS, SUBJECTS
from ktray.miniverse.world import sample
from ktray.miniverse.zero_shot import text_classifier, zero_shot_accuracy

MODEL_NAME = "miniverse"
TEACHER_DIR = Path(__file__).parent / "teacher"
LOG_FIELDS = ("step", "images", "seconds", "lr", "loss", "zero_shot_val", "zero_shot_test")

log = logging.getLogger(__name__)

_NAMES = [subject.name for kind in SUBJECTS.values() for subject in kind]
_COLOURS = list(COLOURS)
_BACKGROUNDS = list(BACKGROUNDS)
_DETAILS = list(DETAIL_SHARES)


@dataclass(frozen=True)
class PretrainSettings:
    """Settings of a training run; the defaults are those of the included model.

    From step `terse_from` on, most captions contain only the name (`captions.TERSE_SHARES`).
    """

    steps: int = 5000
    terse_from: int = 3250
    batch: int = 256
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 300
    ema: float = 0.998
    pool: int = 300_000
    seed: int = 0
    every: int = 250


def _render(span: tuple[int, int]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and codes (name, colour, background; -1 where there is none) of a span of the stream `pretrain`."""
    start, stop = span
    images = np.empty((stop - start, 32, 32, 3), dtype=np.uint8)
    codes = np.empty((stop - start, 3), dtype=np.int64)
    for row, index in enumerate(range(start, stop)):
        drawn = sample("pretrain", index)
        images[row] = drawn.image
        facts = drawn.facts
        codes[row] = (
            _NAMES.index(facts.name),
            _COLOURS.index(facts.colour) if facts.colour else -1,
            _BACKGROUNDS.index(facts.background) if facts.background else -1,
        )
    return images, codes


def render_pool(count: int, processes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The first `count` images of the stream `pretrain`: uint8 [n, 32, 32, 3] and int64 codes [n, 3]."""
    spans = [(start, min(start + 5000, count)) for start in range(0, count, 5000)]
    if processes < 2:
        parts = [_render(span) for span in spans]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as workers:
            parts = list(workers.map(_render, spans))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def true_captions(mentioned: Tensor, pictures: Tensor) -> Tensor:
    """Which captions are true for which images.

    Args:
        mentioned: int64 [captions, 3], codes of the captions, with -1 for facts that a caption does not mention.
        pictures: int64 [images, 3], codes of the content of the images.

    Returns:
        bool [images, captions].
    """
    agrees = (mentioned[None] == pictures[:, None]) | (mentioned[None] == -1)
    return agrees.all(-1)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Symmetric cross-entropy with targets that are distributed evenly over all true pairs.

    Args:
        image: unit embeddings [n, dim].
        text: unit embeddings [m, dim].
        scale: inverse temperature, scalar.
        true: bool [n, m]; every row and every column must have a true entry.
    """
    logits = scale * image @ text.T
    weights = true.float()
    by_image = F.cross_entropy(logits, weights / weights.sum(1, keepdim=True))
    by_text = F.cross_entropy(logits.T, weights.T / weights.T.sum(1, keepdim=True))
    return (by_image + by_text) / 2


def batches(codes: Tensor, settings: PretrainSettings, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices [batch] into the pool and codes of their captions [batch, 3], from step `first` on.

    The random numbers of a step depend only on the seed and the step, so a restart continues the same sequence.
    """
    per_epoch = len(codes) // settings.batch
    for step in range(first, settings.steps):
        epoch, place = divmod(step, per_epoch)
        shuffle = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(codes), generator=shuffle)
        rows = order[place * settings.batch : (place + 1) * settings.batch]
        words = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000 + step)
        plan = DETAIL_SHARES if step < settings.terse_from else TERSE_SHARES
        shares = torch.tensor([plan[detail] for detail in _DETAILS])
        detail = torch.multinomial(shares, settings.batch, replacement=True, generator=words)
        mentioned = codes[rows].clone()
        mentioned[(detail == _DETAILS.index("name")) | (detail == _DETAILS.index("background")), 1] = -1
        mentioned[(detail == _DETAILS.index("name")) | (detail == _DETAILS.index("colour")), 2] = -1
        yield rows, mentioned


def _words(mentioned: list[int]) -> str:
    name, colour, background = mentioned
    return caption(
        Facts(
            _NAMES[name],
            _COLOURS[colour] if colour >= 0 else None,
            _BACKGROUNDS[background] if background >= 0 else None,
        )
    )


def normalise(images: NDArray[np.uint8]) -> Tensor:
    """Images uint8 [n, 32, 32, 3] to the input of the model: float32 [n, 3, 32, 32], with open_clip's mean and std."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor(OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(OPENAI_DATASET_STD).view(1, 3, 1, 1)
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def _labelled(stream: str, count: int) -> tuple[Tensor, Tensor]:
    names = [subject.name for subject in SUBJECTS["capital"]]
    drawn = [sample(stream, index) for index in range(count)]
    labels = torch.tensor([names.index(example.subject.name) for example in drawn])
    return normalise(np.stack([example.image for example in drawn])), labels


def _learning_rate(step: int, settings: PretrainSettings) -> float:
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_model() -> torch.nn.Module:
    """The untrained model of ``teacher/miniverse.json``, in float32 and channels-last."""
    open_clip.add_model_config(TEACHER_DIR / f"{MODEL_NAME}.json")
    model = open_clip.create_model(MODEL_NAME)
    return model.to(memory_format=torch.channels_last)


def _save(model: torch.nn.Module, path: Path) -> None:
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"format": "pt"})
    partial.replace(path)


def _write_log(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG_FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class TeacherTraining:
    """The state of a training run: weights, their running average, the optimizer and the log; and its checkpoint."""

    def __init__(self, out: Path, settings: PretrainSettings) -> None:
        torch.manual_seed(settings.seed)
        self.out, self.settings = out, settings
        self.model = build_model()
        self.average = deepcopy(self.model).eval().requires_grad_(False)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        plain = [p for p in self.model.parameters() if p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain}]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.checkpoint = out / "checkpoint.pt"
        seconds = self._resume() if self.checkpoint.exists() else 0.0
        self.began = time.monotonic() - seconds

    def _resume(self) -> float:
        saved = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.rows = saved["step"], json.loads(saved["rows"])
        return float(saved["seconds"])

    def save(self) -> None:
        """Write weights, log and checkpoint; each file is replaced atomically."""
        _save(self.average, self.out / "model.safetensors")
        _write_log(self.out / "train_log.csv", self.rows)
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": time.monotonic() - self.began,
            "rows": json.dumps(self.rows),
        }
        torch.save(state, self.checkpoint.with_suffix(".partial"))
        self.checkpoint.with_suffix(".partial").replace(self.checkpoint)

    def update(self, images: Tensor, pictures: Tensor, mentioned: Tensor, text: Tensor) -> float:
        """One step on preprocessed `images` with codes `pictures` and caption codes `mentioned`; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(self.step, self.settings)
        image_out, text_out, scale = self.model(images, text)
        loss = contrastive_loss(image_out, text_out, scale, true_captions(mentioned, pictures))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(100))  # type: ignore[operator]
            # A small momentum at first, so that early averages do not contain the random initial weights.
            weight = 1 - min(self.settings.ema, (1 + self.step) / (20 + self.step))
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, weight)
        return loss.item()


def train(out: Path, settings: PretrainSettings, processes: int) -> dict[str, float]:
    """Train, and write ``model.safetensors`` (float16) and ``train_log.csv`` into the folder `out`.

    Returns:
        ``zero_shot_val`` and ``zero_shot_test`` of the saved (averaged) weights, 0..1.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = TeacherTraining(out, settings)
    tokenizer = open_clip.get_tokenizer(MODEL_NAME)
    log.info("drawing %d images", settings.pool)
    images, codes_array = render_pool(settings.pool, processes)
    codes = torch.from_numpy(codes_array)
    names = [subject.name for subject in SUBJECTS["capital"]]
    val = _labelled("letters-val", 520)
    tokens: dict[tuple[int, ...], Tensor] = {}
    losses: list[float] = []
    for rows, mentioned in batches(codes, settings, run.step):
        unique = torch.unique(mentioned, dim=0)
        keys = [tuple(key) for key in unique.tolist()]
        for key in keys:
            if key not in tokens:
                tokens[key] = tokenizer([_words(list(key))])[0]
        text = torch.stack([tokens[key] for key in keys])
        losses.append(run.update(normalise(images[rows.numpy()]), codes[rows], unique, text))
        last = run.step == settings.steps
        if run.step % settings.every == 0 or last:
            classifier = text_classifier(run.average, tokenizer, names, prompt_templates())
            row: dict[str, Any] = {
                "step": run.step,
                "images": run.step * settings.batch,
                "seconds": round(time.monotonic() - run.began, 1),
                "lr": f"{_learning_rate(run.step - 1, settings):.3g}",
                "loss": round(sum(losses) / len(losses), 4),
                "zero_shot_val": round(zero_shot_accuracy(run.average, *val, classifier), 4),
            }
            losses.clear()
            if last:
                test = _labelled("letters-test", 2600)
                row["zero_shot_test"] = round(zero_shot_accuracy(run.average, *test, classifier), 4)
            run.rows.append(row)
            log.info("%s", row)
            run.save()
    run.checkpoint.unlink(missing_ok=True)
    return {key: float(run.rows[-1][key]) for key in ("zero_shot_val", "zero_shot_test")}


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m ktray.miniverse.train_teacher", description=__doc__)
    parser.add_argument("--out", type=Path, default=TEACHER_DIR, help="folder for the weights and the log")
    parser.add_argument("--processes", type=int, default=2, help="number of processes that draw the images")
    parser.add_argument("--threads", type=int, default=0, help="number of torch threads; 0: torch's default")
    for name, value in vars(PretrainSettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out, processes, threads = (options.pop(key) for key in ("out", "processes", "threads"))
    if threads:
        torch.set_num_threads(threads)
    train(out, PretrainSettings(**options), processes)


if __name__ == "__main__":
    main()
