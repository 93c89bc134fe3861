"""Probe batches: a few fixed images that show whether two implementations are one function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cmbench.errors import UserError
from cmbench.metrics.extractor import Extractor
from cmbench.seeds import derive_seed

#: Largest relative difference of features at which an implementation counts as the library's.
TOLERANCE = 1e-5
#: Largest relative difference from float64 that float32 explains (measured 4e-6; TF32 8e-3).
ROUNDING = 1e-4


def probe_images(count: int, size: int = 40) -> Tensor:
    """Return fixed uint8 images ``[count, 3, size, size]``: noise, smooth colour, hard edges."""
    generator = torch.Generator().manual_seed(derive_seed("probe"))
    noise = torch.rand(count, 3, size, size, generator=generator)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    edges = (smooth > 0.5).float()
    kind = torch.arange(count)[:, None, None, None] % 3
    images = torch.where(kind == 0, noise, torch.where(kind == 1, smooth, edges))
    return (images * 255).round().to(torch.uint8)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest |ours - theirs| / |theirs| over rows, as norms."""
    difference = (ours.double() - theirs.double()).norm(dim=1)
    return float((difference / theirs.double().norm(dim=1).clamp_min(1e-30)).max())


def check_probe(who: str, error: float, *, remedy: str, tolerance: float = TOLERANCE) -> None:
    """Refuse an implementation whose probe features are not the library's."""
    if not error <= tolerance:
        raise UserError(
            who,
            f"probe features differ from the library's by {error:.2g} relative",
            allowed=f"at most {tolerance:.0e}",
            remedy=remedy,
        )


def check_rounding(who: str, error: float, than: str = "float64") -> None:
    """Refuse features that are further from float64's (or the CPU's) than float32 explains."""
    if not error <= ROUNDING:
        raise UserError(
            who,
            f"features differ from {than}'s by {error:.2g} relative",
            allowed=f"at most {ROUNDING:.0e}, float32's own rounding",
            remedy="switch off TF32 and reduced precision (NVIDIA_TF32_OVERRIDE=0)",
        )


def placed(
    extractor: Extractor, device: torch.device | str, shape: Sequence[int] = ()
) -> Extractor:
    """Return ``extractor`` on ``device``, its features compared with the CPU's in float32.

    Whatever lowers the precision there (TF32 forced on, a library's own choice) shows. Extractors
    that are approximate by choice (``approximate``) are not compared.

    Args:
        extractor: on the CPU.
        device: where it will run; on the CPU nothing is compared.
        shape: channels, height and width of the data, where the extractor names no ``image_shape``.

    Raises:
        UserError: features that differ by more than float32 explains.
    """
    device = torch.device(device)
    if device.type == "cpu" or getattr(extractor, "approximate", False):
        return extractor.to(device)
    channels, height, width = tuple(getattr(extractor, "image_shape", shape)) or (3, 40, 40)
    images = probe_images(3, max(height, width, 4))[:, :, :height, :width]
    images = images[:, [channel % 3 for channel in range(channels)]]
    expected = extractor(images).pool.cpu()
    moved = extractor.to(device)
    error = relative_error(moved(images).pool.cpu(), expected)
    check_rounding(f"extractor {extractor.name!r} on {device}", error, "the CPU")
    return moved
