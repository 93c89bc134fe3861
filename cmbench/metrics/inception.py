"""The 2015 Inception network with torch-fidelity's weights: the extractor behind ``fid``.

Two implementations of one function: torch-fidelity's own module ("library"), and a rearrangement of
it ("fast"), whose features are compared with the library's on a probe batch at every start.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.files import sha256_file
from cmbench.metrics._files import read_state, written_anew
from cmbench.metrics.extractor import Features, extract_rgb
from cmbench.metrics.inception_fast import SPATIAL_CHANNELS, FastInception
from cmbench.metrics.precision import exact_float32
from cmbench.metrics.probe import check_probe, check_rounding, probe_images, relative_error
from cmbench.metrics.quantize import to_float255
from cmbench.metrics.values import APPROXIMATIONS
from cmbench.metrics.weight_files import WEIGHTS, find_weights

LAYERS = ("64", "192", "768", "2048")


class InceptionExtractor:
    """Pooled features, unbiased logits and, on request, spatial features.

    Args:
        location: the weights in torch-fidelity's format; None looks in the usual places. Weights
            other than the published ones work, under a name that is not FID's.
        layer: "2048" (FID's) or an earlier one: "64", "192", "768"; those have no logits.
        implementation: "fast" or "library".
        spatial: also return the 2,023 spatial features of sFID.
        precision: "float32", or "bfloat16" (fast only): quicker, measurably different, and so a
            different metric key.
        channels_last: run the fast network in that memory layout on a GPU, as on the CPU.
        compiled: run the fast network through ``torch.compile``.

    The last three are part of ``preprocessing`` and so of every metric key; ``deviation`` is
    measured on the probe batch at every start.

    Raises:
        MissingError: no weights; the message says how to get them.
        UserError: a file that does not hold these weights, or a probe batch that disagrees.
    """

    def __init__(
        self,
        location: Path | str | None = None,
        *,
        layer: str = "2048",
        implementation: Literal["fast", "library"] = "fast",
        spatial: bool = False,
        precision: Literal["float32", "bfloat16"] = "float32",
        compiled: bool = False,
        channels_last: bool = False,
    ) -> None:
        if layer not in LAYERS:
            raise UserError("inception extractor", f"layer {layer!r}", allowed=", ".join(LAYERS))
        asked = _approximations(implementation, precision != "float32", channels_last, compiled)
        path = find_weights("inception", location)
        self.weights_sha256 = sha256_file(path)
        verified = WEIGHTS["inception"].verifies(self.weights_sha256)
        self.name = "inception" if layer == "2048" else f"inception-{layer}"
        short_name = self.name if verified else f"{self.name}-unverified"
        self.short_name = "fid" if short_name == "inception" else short_name
        self.preprocessing = "+".join(["tf1-bilinear", *asked])
        self.approximate, self._channels_last = bool(asked), channels_last
        self.implementation = "+".join([implementation, *asked])
        self.layer, self.spatial = layer, spatial
        self._layers = ("2048", "logits_unbiased") if layer == "2048" else (layer,)
        self.feature_dim = int(layer)
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.device = torch.device("cpu")
        self.library = load_library_network(path, self._layers)
        self.fast = FastInception(self.library) if implementation == "fast" else None
        self._run: Any = self.fast
        #: Relative difference of the features from the library's (of bfloat16: from float32).
        self.deviation, self._compiled = 0.0, compiled
        self.to("cpu")

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device`` and probe there: another device is another implementation."""
        self.device = torch.device(device)
        self.library.to(self.device)
        if self.fast is not None:
            last = self._channels_last or self.device.type == "cpu"
            layout = torch.channels_last if last else torch.contiguous_format
            self.fast.to(self.device, self.dtype).to(memory_format=layout)
            self._run = torch.compile(self.fast) if self._compiled else self.fast
            self._probe()
        return self

    def rounding(self, count: int = 4) -> float:
        """Return how far the features are from float64's, relative, on ``count`` probe images.

        float32 gives about 4e-6; TF32 that some setting has forced on gives 8e-3.
        """
        images = probe_images(count).to(self.device)
        network = copy.deepcopy(self.fast or FastInception(self.library)).to(self.device).double()
        with torch.inference_mode():
            exact = network(to_float255(images).double(), self._layers[-1])[self.layer]
        return relative_error(self(images).pool, exact)

    def _probe(self) -> None:
        images = probe_images(3).to(self.device)
        with torch.inference_mode(), exact_float32():
            ours, theirs = self._fast(images).pool, self._library(images).pool
        self.deviation = relative_error(ours, theirs)
        if self.dtype == torch.float32:
            check_probe(
                "inception extractor", self.deviation, remedy="use implementation='library'"
            )
            if self.device.type != "cpu":  # where TF32 exists, whatever the flags say
                check_rounding("inception extractor", self.rounding())

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of RGB images ``[N, 3, H, W]``: uint8, or float in [-1, 1]."""
        extract = self._library if self.fast is None else self._fast
        return extract_rgb("inception extractor", images, self.device, extract)

    def _fast(self, images: Tensor) -> Features:
        pixels = to_float255(images).to(self.dtype)
        found = self._run(pixels, self._layers[-1], spatial=self.spatial)
        logits = found.get("logits_unbiased")
        spatial = found.get("spatial")
        return Features(
            pool=found[self.layer].float(),
            logits=None if logits is None else logits.float(),
            spatial=None if spatial is None else spatial.float(),
        )

    def _library(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8:
            raise UserError(
                "inception extractor",
                "float images in the library's path",
                allowed="uint8",
                remedy="quantize the samples, or use implementation='fast'",
            )
        maps: list[Tensor] = []
        block = self.library.get_submodule("Mixed_6d.branch1x1")
        handle = block.register_forward_hook(lambda module, given, out: maps.append(out))
        try:
            found = dict(zip(self._layers, self.library(images), strict=True))
        finally:
            handle.remove()
        spatial = None
        if self.spatial and maps:
            spatial = maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Features(found[self.layer], found.get("logits_unbiased"), spatial)


def _approximations(implementation: str, *chosen: bool) -> list[str]:
    """Return the names of those chosen; raise ``UserError`` for any in the library's path."""
    asked = [name for name, on in zip(APPROXIMATIONS, chosen, strict=True) if on]
    if implementation == "library" and asked:
        raise UserError(
            "inception extractor",
            f"{', '.join(asked)} in the library's path",
            allowed="float32, not compiled",
            remedy="use implementation='fast'",
        )
    return asked


_STATE, _GET = "torch-fidelity's Inception state dict", "run `cmbench prepare inception`"


def read_inception(path: Path) -> dict[str, Tensor]:
    """Return the state dict that torch-fidelity published.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    return read_state(path, f"weights {path}", _STATE, _GET, "fc.weight")


def load_library_network(path: Path, layers: tuple[str, ...]) -> nn.Module:
    """Return torch-fidelity's module with the weights of ``path``.

    torch-fidelity unpickles its file, so it gets one that is written from what was read safely.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        with written_anew(read_inception(path)) as safe:
            network: nn.Module = FeatureExtractorInceptionV3(
                "inception-v3-compat", list(layers), feature_extractor_weights_path=str(safe)
            )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"weights {path}", reason, allowed=_STATE, remedy=_GET) from error
    return network
