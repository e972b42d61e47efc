"""Task-oriented transfer, pixel by pixel: what makes an objective on logits one on maps of logits.

For a student's map ``s`` (N, C, h', w') and a teacher's ``t`` (N, C, h, w) of the same view,

    loss = T^2 / (N h w) * sum over images n and positions p of KL(softmax(t_np / T) || softmax(s'_np / T)),

where ``s'`` is ``s`` resized bilinearly (half-pixel centres) to (h, w). The teacher's map stays as it is: it is what is
stored, and its probabilities may have been mixed (mixup). TEACH decides by its resolution how fine the match is.
"""

from __future__ import annotations

import torch


def by_position(student_out: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's logits and its targets as rows to be compared one by one.

    Args:
        student_out: (N, C), which is returned as it is, or (N, C, h', w').
        targets: (N, C) or (N, C, h, w), logits or probabilities.

    Returns:
        Two (N h w, C): the student's map resized to the targets', channels last.
    """
    if student_out.ndim == 2:
        return student_out, targets
    from ktray.models.maps import resize_map  # slow to import, and every recipe loads this file

    resized = resize_map(student_out.float(), (targets.shape[2], targets.shape[3]))
    return _rows(resized), _rows(targets)


def _rows(maps: torch.Tensor) -> torch.Tensor:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)
