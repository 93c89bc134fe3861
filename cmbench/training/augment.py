"""EDM's augmentations, and the labels that keep them from leaking into samples.

Karras et al. 2022 (arXiv:2206.00364), App. F.2 and Table 6: flips, isotropic scaling, rotation,
anisotropic scaling and translation, each with a probability of its own; the network is told what
was done in nine numbers, and told zeros when it generates. Resampling follows Karras et al. 2020
(arXiv:2006.06676), App. B: twofold supersampling with the orthogonal wavelet filter sym6.

Order of the operations, standard deviations, angles, the share of turned axes, the mirroring in x
of half of the images at any probability, and order and units of the label's nine numbers were
compared line by line with the official ``training/augment.py`` and the settings that ``train.py``
of NVlabs/edm gives it (commit 0a2ff34): they agree. Beyond the border pixels are reflected without
repeating the last one, as there. Rotations and scalings have their fixed point 0.049 pixels from
the image's centre along both axes, as there: sym6 is not symmetric, and the official code takes its
sixth tap for its centre.

Unlike there, an image to which nothing but flips was done keeps its exact values, reflection goes
on beyond one image size (there: zeros), and nothing asks the device for a number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cmbench.data.base import Dataset
from cmbench.plugin.config import MethodConfig
from cmbench.plugin.method import Batch, Draws
from cmbench.training.randomness import StepDraws
from cmbench.training.resident import resident

#: Numbers of a label: x-flip, y-flip, log-scale, cos - 1 and sin of the rotation, anisotropy along
#: and across its axis, translation in x and y.
LABEL_DIM = 9
#: Standard deviations of log2 of both scalings, and of translation in image sizes.
SCALE_LOG2_STD, TRANSLATE_STD = 0.2, 0.125
#: Share of anisotropic scalings whose axis is turned; the others are along x.
AXIS_TURNED = 0.5
#: Low-pass filter of the wavelet sym6 (least asymmetric Daubechies, 6 vanishing moments).
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
#: Pixels added around an image, and how far beyond its border they give whole filter sums.
_MARGIN, _REACH = 6, 3.0
#: The tap taken for the filter's centre, as in the official code, and how far its centre of mass
#: (5.098 taps) lies from there, in pixels: rotations and scalings are about that point.
_CENTRE = 5
OFF_CENTRE = (sum(i * h for i, h in enumerate(SYM6)) / sum(SYM6) - _CENTRE) / 2


def augment(images: Tensor, draws: Draws, probability: float) -> tuple[Tensor, Tensor]:
    """Return augmented images and their labels float32 ``[N, 9]``.

    Args:
        images: ``[N, C, H, W]`` float32.
        draws: the step's randomness; names used begin with ``augment-``.
        probability: of each augmentation by itself, in [0, 1]. Mirroring in x is special: it is
            drawn for every image (half of them are mirrored) unless ``probability`` is 0.
    """
    n = len(images)
    if probability == 0:
        return images, images.new_zeros(n, LABEL_DIM, dtype=torch.float32)
    like = images.new_empty(n, 5, dtype=torch.float32)
    done = (draws.uniform("augment-whether", like) < probability).float()
    y_done, scale_done, rotate_done, aniso_done, move_done = done.unbind(1)
    uniform = draws.uniform("augment-uniform", like)
    normal = draws.normal("augment-normal", like[:, :4])

    x_flip = (uniform[:, 0] < 0.5).float()
    y_flip = (uniform[:, 1] < 0.5).float() * y_done
    scale = normal[:, 0] * scale_done
    angle = math.pi * (2 * uniform[:, 2] - 1) * rotate_done
    axis = math.pi * (2 * uniform[:, 3] - 1) * (uniform[:, 4] < AXIS_TURNED).float()
    stretch = normal[:, 1] * aniso_done
    move = normal[:, 2:] * move_done[:, None]

    flipped = flip(flip(images, x_flip, 3), y_flip, 2)
    sides = torch.stack([torch.full_like(angle, side) for side in images.shape[:1:-1]], 1)
    inverse = inverse_matrix(SCALE_LOG2_STD * scale, angle, SCALE_LOG2_STD * stretch, axis)
    warped = warp(flipped, inverse, TRANSLATE_STD * sides * move)
    warps = done[:, 1:].amax(1)[:, None, None, None] > 0
    labels = [
        x_flip,
        y_flip,
        scale,
        torch.cos(angle) - 1,
        torch.sin(angle),
        stretch * torch.cos(axis),
        stretch * torch.sin(axis),
        *move.unbind(1),
    ]
    return torch.where(warps, warped, flipped), torch.stack(labels, 1)


def flip(images: Tensor, which: Tensor, dim: int) -> Tensor:
    """Return ``images`` ``[N, C, H, W]``, mirrored along ``dim`` where ``which`` ``[N]`` is 1."""
    return torch.where(which[:, None, None, None] > 0, images.flip(dim), images)


def inverse_matrix(scale_log2: Tensor, angle: Tensor, stretch_log2: Tensor, axis: Tensor) -> Tensor:
    """Return ``(A R S)^-1`` ``[N, 2, 2]`` on (x, y), each argument ``[N]``.

    S scales by ``2^scale_log2``, R turns by ``-angle``, A scales by ``2^stretch_log2`` along
    the x axis turned by ``-axis``, as R turns, and by its inverse across it (Table 6).
    """
    shrink = torch.exp2(-scale_log2)[:, None, None]
    wide, high = torch.exp2(-stretch_log2), torch.exp2(stretch_log2)
    diagonal = torch.diag_embed(torch.stack([wide, high], 1))
    turned = rotation(-axis) @ diagonal @ rotation(axis)
    return shrink * (rotation(angle) @ turned)


def rotation(angle: Tensor) -> Tensor:
    """Return the matrices ``[N, 2, 2]`` that turn (x, y) by ``angle`` ``[N]`` radians."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)


def warp(images: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """Return images whose value at ``p`` is the input's at ``inverse (p - shift)``.

    Args:
        images: ``[N, C, H, W]`` float32.
        inverse: ``[N, 2, 2]``, on (x, y) in pixels from :data:`OFF_CENTRE` before the centre.
        shift: ``[N, 2]`` pixels.
    """
    n, _, height, width = images.shape
    padded = images.index_select(2, resident(_mirrored, height, like=images))
    padded = padded.index_select(3, resident(_mirrored, width, like=images))
    fine = _resample(padded, up=True)
    ys = _pixel_positions(height, images.device)
    xs = _pixel_positions(width, images.device)
    target = (
        torch.stack([xs[None, :].expand(len(ys), -1), ys[:, None].expand(-1, len(xs))], 2).reshape(
            1, -1, 2
        )
        - shift[:, None, :]
    )
    source = (target @ inverse.transpose(1, 2)).view(n, len(ys), len(xs), 2)
    grid = torch.stack(
        [
            _grid_coordinate(source[..., 0], width, fine.shape[3]),
            _grid_coordinate(source[..., 1], height, fine.shape[2]),
        ],
        3,
    )
    sampled = F.grid_sample(fine, grid, mode="bilinear", align_corners=True)
    return _resample(sampled, up=False)


def _pixel_positions(side: int, device: torch.device) -> Tensor:
    """Return where the fine samples count as lying that make ``side`` pixels, in pixels from the
    centre.
    """
    count = 2 * (side - 1) + len(SYM6)
    index = torch.arange(count, dtype=torch.float32, device=device)
    return (index - _CENTRE) / 2 - (side - 1) / 2


def _grid_coordinate(position: Tensor, side: int, count: int) -> Tensor:
    """Reflect pixels from the centre at the border; return ``grid_sample`` coordinates."""
    last = side - 1
    from_first = torch.remainder(position - OFF_CENTRE + last / 2, max(2 * last, 1))
    reflected = last / 2 - (from_first - last).abs() + OFF_CENTRE
    # Just beyond the border the padding is as good, and leaves what is not moved as it was.
    near = torch.where(position.abs() <= side / 2 + _REACH, position, reflected)
    return (2 * (near + (side - 1) / 2 + _MARGIN) + _CENTRE) * (2 / (count - 1)) - 1


def _mirrored(side: int) -> Tensor:
    """Return the indices of ``side`` pixels and of their reflections about the first and last."""
    turned = torch.arange(-_MARGIN, side + _MARGIN) % max(2 * side - 2, 1)
    return torch.minimum(turned, 2 * side - 2 - turned).clamp_min(0)


def _resample(images: Tensor, *, up: bool) -> Tensor:
    """Double the resolution, or undo it: the filter is orthogonal, so one inverts the other."""
    n, channels = images.shape[:2]
    flat = images.reshape(n * channels, 1, *images.shape[2:])
    gain = math.sqrt(2) if up else math.sqrt(0.5)
    taps = gain * resident(_taps, like=images, dtype=images.dtype)
    convolve = F.conv_transpose2d if up else F.conv2d
    flat = convolve(flat, taps.view(1, 1, -1, 1), stride=(2, 1))
    flat = convolve(flat, taps.view(1, 1, 1, -1), stride=(1, 2))
    return flat.view(n, channels, *flat.shape[2:])


def _taps() -> Tensor:
    return torch.tensor(SYM6, dtype=torch.float64)


@dataclass(frozen=True)
class DatasetFeed:
    """Adapts a dataset's stream to the training loop (see :class:`cmbench.training.loop.Feed`)."""

    dataset: Dataset
    config: MethodConfig

    def batch(self, start: int, count: int, seed: int) -> Batch:
        """Return images ``start … start + count - 1`` of the stream that ``seed`` names.

        Augmentations belong to the shard that starts at ``start``, as all draws of a step do.
        """
        drawn = self.dataset.batch(start, count, seed, xflip=self.config.xflip)
        batch = drawn if self.config.conditional else replace(drawn, labels=None)
        if self.config.augment == 0:
            return batch
        images, labels = augment(drawn.images, StepDraws(seed, start), self.config.augment)
        return replace(batch, images=images, augment_labels=labels)
