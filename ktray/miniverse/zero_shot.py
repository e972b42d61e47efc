"""Zero-shot classification with an open_clip model: the classifier is the mean of prompt embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def text_classifier(
    model: torch.nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """One unit vector per class: the normalised mean over templates of unit text embeddings.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision",
    section 3.1.4 (ensembling over prompts in embedding space).

    Args:
        model: an open_clip model.
        tokenizer: its tokenizer.
        names: noun phrases of the classes, [classes].
        templates: prompts with one ``{}``.

    Returns:
        float32 [classes, embed_dim].
    """
    rows = []
    with torch.inference_mode():
        for name in names:
            tokens = tokenizer([template.format(name) for template in templates])
            embedded = F.normalize(model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
            rows.append(F.normalize(embedded.mean(0), dim=-1))
    return torch.stack(rows)


def zero_shot_accuracy(
    model: torch.nn.Module, images: Tensor, labels: Tensor, classifier: Tensor, batch: int = 256
) -> float:
    """Share of images whose most similar class vector is that of the label, 0..1.

    Args:
        model: an open_clip model, in eval mode.
        images: preprocessed float32 [n, 3, height, width].
        labels: int64 [n].
        classifier: result of `text_classifier`.
        batch: images per forward pass.
    """
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            embedded = F.normalize(model.encode_image(images[start : start + batch]).float(), dim=-1)  # type: ignore[operator]
            correct += int((embedded @ classifier.T).argmax(1).eq(labels[start : start + batch]).sum())
    return correct / len(images)
