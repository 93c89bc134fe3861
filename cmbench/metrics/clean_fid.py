"""clean-fid's three modes, with its own networks and resizers, or faster ones that agree.

=================== ============================== ==========================================
mode                resize                         network
=================== ============================== ==========================================
clean               PIL bicubic, float32           NVIDIA's TorchScript file
legacy-tensorflow   TF1 bilinear, in the network   NVIDIA's TorchScript file (EDM's detector)
legacy-pytorch      half-pixel bilinear            pytorch-fid's state dict (torch-fidelity's)
=================== ============================== ==========================================

All three are the 2015 Inception network; their distances differ by several percent, so each has its
own name: ``fid-clean``, ``fid-legacy-tensorflow``, ``fid-legacy-pytorch``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from cmbench.errors import MissingError, UserError, unknown_name
from cmbench.files import sha256_file
from cmbench.metrics._files import written_anew
from cmbench.metrics.extractor import Features, extract_rgb
from cmbench.metrics.inception import load_library_network, read_inception
from cmbench.metrics.inception_fast import FastInception
from cmbench.metrics.precision import exact_float32
from cmbench.metrics.probe import check_probe, probe_images, relative_error
from cmbench.metrics.quantize import to_float255
from cmbench.metrics.resizers import half_pixel_bilinear, pil_bicubic, tf1_bilinear
from cmbench.metrics.weight_files import WEIGHTS, find_weights

Implementation = Literal["auto", "fast", "library"]


@dataclass(frozen=True)
class Mode:
    """One of clean-fid's modes: its name there, its weights, its resize, its scaling."""

    library_name: str
    weights: str
    resize: Callable[[Tensor], Tensor]
    #: (pixels - centre) / centre brings [0, 255] to the network's range.
    centre: float


MODES = {
    "clean": Mode("clean", "clean-fid", pil_bicubic, 128.0),
    "legacy-tensorflow": Mode("legacy_tensorflow", "clean-fid", tf1_bilinear, 128.0),
    "legacy-pytorch": Mode("legacy_pytorch", "inception", half_pixel_bilinear, 127.5),
}


class CleanFidExtractor:
    """Pooled features ``[N, 2048]`` as clean-fid computes them.

    Args:
        mode: "clean", "legacy-tensorflow" or "legacy-pytorch".
        location: the mode's weights file; None looks in the usual places.
        implementation: "library" runs clean-fid's own network and resizer; "fast" the network of
            :mod:`cmbench.metrics.inception_fast` with torch-fidelity's weights and a batched
            resizer, compared with the library on a probe batch; "auto" is fast if those weights
            are there.
        fast_location: torch-fidelity's weights for the fast path; None looks in the usual places.
        trust: run a TorchScript file whose hash is not the pinned one. TorchScript is a program.

    Raises:
        MissingError: no weights; the message says how to get them.
        UserError: an unknown mode, a file that must not be run, a probe batch that disagrees.
    """

    feature_dim = 2048

    def __init__(
        self,
        mode: str = "clean",
        location: Path | str | None = None,
        *,
        implementation: Implementation = "auto",
        fast_location: Path | str | None = None,
        trust: bool = False,
    ) -> None:
        if mode not in MODES:
            raise unknown_name("clean-fid extractor", "mode", mode, MODES)
        self.mode = MODES[mode]
        path = find_weights(self.mode.weights, location)
        self.weights_sha256 = sha256_file(path)
        verified = WEIGHTS[self.mode.weights].verifies(self.weights_sha256)
        self.name = f"inception-{mode}"
        self.short_name = f"fid-{mode}" if verified else f"{self.name}-unverified"
        self.preprocessing = mode
        self.device = torch.device("cpu")
        if self.mode.weights == "clean-fid":
            self.library = load_torchscript(path, self.mode, trusted=verified or trust)
            fast_path = _fast_weights(implementation, fast_location)
        else:
            self.library = load_pytorch_fid(path)
            fast_path = None if implementation == "library" else path
        self.fast: FastInception | None = None
        if fast_path is not None:
            self.fast = FastInception(load_library_network(fast_path, ("2048",)))
        self.implementation = "library" if self.fast is None else "fast"
        self.deviation = 0.0
        self.to("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device`` and probe there."""
        self.device = torch.device(device)
        self.library.to(self.device)
        if self.fast is not None:
            layout = torch.channels_last if self.device.type == "cpu" else torch.contiguous_format
            self.fast.to(self.device).to(memory_format=layout)
            images = probe_images(2).to(self.device)
            with torch.inference_mode(), exact_float32():
                self.deviation = relative_error(
                    self._fast(to_float255(images)), self._library(to_float255(images))
                )
            check_probe(
                "clean-fid extractor", self.deviation, remedy="use implementation='library'"
            )
        return self

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of RGB images ``[N, 3, H, W]``: uint8, or float in [-1, 1]."""
        features = self._library if self.fast is None else self._fast

        def extract(block: Tensor) -> Features:
            return Features(features(to_float255(block)))

        return extract_rgb("clean-fid extractor", images, self.device, extract)

    def _fast(self, pixels: Tensor) -> Tensor:
        assert self.fast is not None
        centre = self.mode.centre
        x = self.fast.in_layout((self.mode.resize(pixels) - centre) / centre)
        return self.fast.layers(x, "2048")["2048"]

    def _library(self, pixels: Tensor) -> Tensor:
        from cleanfid.resize import build_resizer

        with warnings.catch_warnings():  # clean-fid switches all warnings off for the process
            resize = build_resizer(self.mode.library_name)
            if self.mode.library_name != "legacy_tensorflow":
                rows = [resize(x.permute(1, 2, 0).cpu().numpy()) for x in pixels]
                pixels = torch.stack([torch.from_numpy(row).permute(2, 0, 1) for row in rows])
        pixels = pixels.to(self.device)
        if self.mode.library_name == "legacy_pytorch":
            features: Tensor = self.library(pixels / 255)[0].flatten(1)
            return features
        features = self.library(pixels)
        return features


def _fast_weights(implementation: Implementation, location: Path | str | None) -> Path | None:
    if implementation == "library":
        return None
    try:
        return find_weights("inception", location)
    except MissingError:
        if implementation == "fast":
            raise
        return None


def load_torchscript(path: Path, mode: Mode, *, trusted: bool) -> nn.Module:
    """Return clean-fid's wrapper around NVIDIA's TorchScript network.

    A TorchScript file is a program, so one whose hash is not pinned runs only if ``trusted``.
    """
    from cleanfid.inception_torchscript import InceptionV3W

    who, remedy = f"weights {path}", "run `cmbench prepare clean-fid`"
    if not trusted:
        raise UserError(
            who,
            "is not the pinned file, and a TorchScript file is a program",
            allowed=f"sha256 {WEIGHTS['clean-fid'].sha256}",
            remedy=remedy,
        )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript at every load
        # The wrapper insists on its own file name.
        (Path(folder) / "inception-2015-12-05.pt").symlink_to(path.resolve())
        try:
            network: nn.Module = InceptionV3W(
                folder, download=False, resize_inside=mode.library_name == "legacy_tensorflow"
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                who,
                f"cannot be read: {reason}",
                allowed="NVIDIA's TorchScript Inception",
                remedy=remedy,
            ) from error
    return network.eval().requires_grad_(False)


def load_pytorch_fid(path: Path) -> nn.Module:
    """Return clean-fid's pytorch-fid network with the weights of ``path``.

    clean-fid takes no path: it reads torch.hub's cache, which is pointed at a folder that holds
    just this file while it does, written from what was read safely.
    """
    import cleanfid.inception_pytorch as module

    load_library_network(path, ("2048",))  # which says what is wrong with it
    before: Any = torch.hub.get_dir()
    with written_anew(read_inception(path)) as safe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (safe.parent / "checkpoints").mkdir()
        safe.rename(safe.parent / "checkpoints" / "pt_inception-2015-12-05-6726825d.pth")
        torch.hub.set_dir(safe.parent)
        try:
            network: nn.Module = module.InceptionV3(output_blocks=[3], resize_input=False)
        finally:
            torch.hub.set_dir(before)
    return network.eval().requires_grad_(False)


#: Factories of the extractors, by clean-fid's names of the modes; the second is EDM's detector.
clean = partial(CleanFidExtractor, "clean")
legacy_tensorflow = partial(CleanFidExtractor, "legacy-tensorflow")
legacy_pytorch = partial(CleanFidExtractor, "legacy-pytorch")
