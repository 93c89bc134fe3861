"""ImageNet-512 as EDM2 stores it: Stable Diffusion latents, means and standard deviations.

A stored item is float32 ``[8, 64, 64]``: mean and standard deviation of the encoder's posterior
(``sd-vae-ft-mse``). A training image is a sample of it, standardised channel by channel to standard
deviation 0.5 (Karras et al. 2024, arXiv:2312.02696, Appendix B.2), so ``[4, 64, 64]``, unbounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cmbench.data.locations import DataLocations
from cmbench.data.prepared import PreparedDataset, open_prepared
from cmbench.data.store import Store
from cmbench.data.streaming import Key
from cmbench.errors import MissingError
from cmbench.plugin.method import Batch
from cmbench.plugin.specs import DatasetSpec
from cmbench.seeds import derive_seed

#: Mean and standard deviation of the raw latents' channels over ImageNet-512, and the target's.
RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)
FINAL_STD = 0.5
#: Where the autoencoder lies below the data folder (a diffusers folder).
VAE_FOLDER = "sd-vae-ft-mse"
#: Pictures that the decoder makes in one pass; its activations are large.
_DECODED_AT_ONCE = 8


def standardise(raw: Tensor) -> Tensor:
    """Return raw latents ``[N, 4, H, W]`` with mean 0 and standard deviation 0.5."""
    return (raw - _channels(RAW_MEAN, raw)) * (FINAL_STD / _channels(RAW_STD, raw))


def unstandardise(latents: Tensor) -> Tensor:
    """Return raw latents ``[N, 4, H, W]``: the inverse of :func:`standardise`."""
    return latents * (_channels(RAW_STD, latents) / FINAL_STD) + _channels(RAW_MEAN, latents)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, 1, 1)


class LatentDataset(PreparedDataset):
    """Latents, sampled from their posterior with the seed (seed, "posterior", position)."""

    def __init__(self, spec: DatasetSpec, store: Store, vae: Path) -> None:
        self.vae = vae
        self._decoder: Any = None
        super().__init__(spec, store)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape ``(2 C, H, W)`` of means and standard deviations."""
        channels, height, width = self.spec.data_shape
        return (2 * channels, height, width)

    def to(self, device: torch.device | str, *, resident: bool | None = None) -> Self:
        """Return a copy for ``device``. Latents are always read ahead: noise comes from the CPU."""
        return super().to(device, resident=torch.device(device).type == "cpu")

    def _read(self, key: Key) -> tuple[Tensor, ...]:
        """Gather posteriors and sample them, on the host."""
        part = self._stream.take(key.start, key.count, key.seed)
        mean, std = self.gather(part.indices).chunk(2, dim=1)
        noise = torch.stack(
            [
                torch.randn(
                    mean.shape[1:],
                    generator=torch.Generator().manual_seed(derive_seed(key.seed, "posterior", k)),
                )
                for k in range(key.start, key.start + key.count)
            ]
        )
        tensors = [standardise(mean + std * noise), part.indices]
        if self._labels is not None:
            tensors.append(self._labels.index_select(0, part.indices))
        pinned = self.device.type == "cuda"
        return tuple(t.pin_memory() if pinned else t for t in tensors)

    def batch(self, start: int, count: int, seed: int, *, xflip: bool = False) -> Batch:
        """See :meth:`Dataset.batch`; ``indices`` are positions in the dataset.

        Latents cannot be mirrored (the encoder does not commute with it): encode mirrored images.
        """
        if xflip:
            raise ValueError(f"dataset {self.name!r}: latents cannot be mirrored; set xflip=false")
        key = Key(start, count, seed)
        read = self._read(key) if self._ahead is None else self._ahead.fetch(key)
        return Batch(read[0], read[2] if len(read) > 2 else None, indices=read[1])

    def reference_images(self, batch_size: int = 500) -> Iterator[Tensor]:
        """Raise ``MissingError``: the reference is the original pictures, not decoded latents."""
        raise MissingError(
            f"dataset {self.name!r}",
            "its reference is the statistics of the original 512x512 images, which are not here",
            remedy=f"run `cmbench refs import FILE --name {self.name}` with EDM2's img512.pkl",
        )

    def require_pixels(self) -> None:
        """Raise ``MissingError`` unless diffusers and the autoencoder's folder are here."""
        if self._decoder is None:
            self._decoder = _load_decoder(self.name, self.vae)

    @property
    def decoder_parameters(self) -> int:
        """Parameters of the autoencoder's decoder, and of what prepares latents for it."""
        self.require_pixels()
        parts = (self._decoder.decoder, self._decoder.post_quant_conv)
        return sum(p.numel() for part in parts if part is not None for p in part.parameters())

    def to_pixels(self, images: Tensor) -> Tensor:
        """Decode latents ``[N, 4, 64, 64]`` to pictures ``[N, 3, 512, 512]`` in [-1, 1]."""
        self.require_pixels()
        decoder = self._decoder.to(images.device)
        with torch.no_grad():
            parts = torch.split(unstandardise(images), _DECODED_AT_ONCE)
            # EDM2's pictures are in [0, 1] on both sides of the autoencoder (its training/
            # encoders.py), to which RAW_MEAN and RAW_STD belong; diffusers' own are in [-1, 1].
            pictures = [decoder.decode(part).sample.clamp(0, 1) * 2 - 1 for part in parts]
            return torch.cat(pictures)


def _load_decoder(name: str, folder: Path) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise MissingError(
            f"dataset {name!r}",
            "decoding its latents needs the package diffusers",
            remedy="pip install diffusers",
        ) from None
    if not (folder / "config.json").exists():
        raise MissingError(
            f"dataset {name!r}",
            f"decoding its latents needs the autoencoder, which is not in {folder}",
            remedy="put the diffusers folder of stabilityai/sd-vae-ft-mse there",
        )
    decoder = AutoencoderKL.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    return decoder.eval().requires_grad_(False)


def build(spec: DatasetSpec, locations: DataLocations) -> LatentDataset:
    """Return the prepared latents; raises ``MissingError`` with the command that prepares them."""
    return LatentDataset(spec, open_prepared(spec, locations), locations.data_dir / VAE_FOLDER)
