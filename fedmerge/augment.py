"""Augmentation: shifted and mirrored copies of images in place of the images themselves."""

from __future__ import annotations

import torch
from torch import Tensor

SHIFT_SHARE = 1 / 14
"""The longest shift, as a share of the image's side: two pixels of 28."""


def augmented(images: Tensor, augment: str, generator: torch.Generator) -> Tensor:
    """Return the images, each shifted by whole pixels or mirrored left to right by chance.

    What a shift uncovers repeats the image's border. The memory layout stays.

    Args:
        images: (examples, channels, height, width).
        augment: one of `fedmerge.catalogue.AUGMENTATIONS`.
        generator: decides the shifts and the mirrored images.

    Raises:
        ValueError: if they are not images.
    """
    if augment == "none":
        return images
    if images.ndim != 4:
        raise ValueError(f"augment={augment} needs images (examples, channels, height, width), got {images.ndim} axes")
    count, _, height, width = images.shape
    rows, columns = torch.arange(height).repeat(count, 1), torch.arange(width).repeat(count, 1)
    if augment in ("shifts", "both"):
        rows = _shifted(rows, generator)
        columns = _shifted(columns, generator)
    if augment in ("flips", "both"):
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    if images.stride(1) == 1:  # channels last: a pixel moves with all its channels
        which = torch.arange(count, device=images.device)[:, None, None]
        return images.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    vertically = images.gather(2, rows[:, None, :, None].expand_as(images))
    return vertically.gather(3, columns[:, None, None, :].expand_as(images))


def mixtures(images: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return images λ x + (1 − λ) x′ of pairs of the images, λ uniform in [0, 1].

    Zhang, Cissé, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018, arXiv 1710.09412.

    Args:
        images: (examples, …).
        count: of the mixtures.
        generator: decides the pairs and λ.
    """
    first, second = torch.randint(len(images), (2, count), generator=generator).to(images.device)
    share = torch.rand(count, *[1] * (images.ndim - 1), generator=generator).to(images)
    return torch.lerp(images[first], images[second], share)


def _shifted(places: Tensor, generator: torch.Generator) -> Tensor:
    count, size = places.shape
    most = max(1, round(size * SHIFT_SHARE))
    by = torch.randint(-most, most + 1, (count, 1), generator=generator)
    return (places + by).clamp(0, size - 1)
