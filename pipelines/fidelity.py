"""How close two videos are: PSNR and SSIM, over whole frames or over boxes."""

import numpy as np
import torch
from torch import Tensor

Box = tuple[int, int, int, int]
MOST_PSNR = 100.0  # of equal videos, whose PSNR has no value


def psnr(reference: np.ndarray, video: np.ndarray, boxes: list[Box] | None = None) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 videos [frames, height, width, 3], at most 100.

    Args:
        reference, video: of one shape.
        boxes: per frame (top, bottom, left, right); the error is that of all the boxes' pixels together.

    Raises:
        ValueError: the shapes differ.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pairs = _pairs(reference, video, boxes)
    one, two = (torch.cat([pair[side].flatten() for pair in pairs]) for side in range(2))
    return min(float(peak_signal_noise_ratio(two, one, data_range=1.0)), MOST_PSNR)


def ssim(reference: np.ndarray, video: np.ndarray, boxes: list[Box] | None = None) -> float:
    """Structural similarity of two uint8 videos, the mean over frames, of whole frames or of a box in each.

    Raises:
        ValueError: the shapes differ.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pairs = _pairs(reference, video, boxes)
    if boxes is None:
        pairs = [(torch.cat([one for one, _ in pairs]), torch.cat([two for _, two in pairs]))]
    values = [structural_similarity_index_measure(two, one, data_range=1.0) for one, two in pairs]
    return float(np.mean([float(value) for value in values if isinstance(value, Tensor)]))


def object_boxes(video: np.ndarray, threshold: int = 24, margin: int = 4) -> list[Box]:
    """Per frame, the box around everything that is not background, no smaller than 16 pixels a side.

    Args:
        video: uint8 [frames, height, width, 3].
        threshold: how far from the median colour a pixel has to be.
        margin: pixels around it.
    """
    background = np.median(video.reshape(-1, 3), axis=0)
    found = np.abs(video.astype(np.int16) - background).max(-1) > threshold
    boxes = []
    for mask in found:
        spans = []
        for axis, size in ((1, mask.shape[0]), (0, mask.shape[1])):
            hit = np.flatnonzero(mask.any(axis))
            low, high = (hit[0] - margin, hit[-1] + 1 + margin) if len(hit) else (0, size)
            short = max(16 - (high - low), 0)
            low = max(min(low - short // 2, size - 16), 0)
            spans += [int(low), int(min(max(high, low + 16), size))]
        boxes.append((spans[0], spans[1], spans[2], spans[3]))
    return boxes


def _pairs(reference: np.ndarray, video: np.ndarray, boxes: list[Box] | None) -> list[tuple[Tensor, Tensor]]:
    if reference.shape != video.shape:
        raise ValueError(f"videos must have one shape, got {reference.shape} and {video.shape}")
    one, two = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (reference, video))
    if boxes is None:
        return [(a[None], b[None]) for a, b in zip(one, two, strict=True)]
    return [
        (one[None, i, :, top:bottom, left:right], two[None, i, :, top:bottom, left:right])
        for i, (top, bottom, left, right) in enumerate(boxes)
    ]
