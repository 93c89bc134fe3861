"""Small heads over the noise level, trained beside a network."""

from __future__ import annotations

from torch import Tensor, nn

from cmbench.networks.layers import Init, Linear, make_embedding
from cmbench.networks.magnitude import MPConv, MPFourier


class LogVarianceHead(nn.Module):
    """sCM's adaptive weight w per noise level (arXiv:2410.11081, Sec. 4.2): ``exp(w) loss - w``.

    The negative of a log-variance such as EDM2's. Starts at zero.
    """

    def __init__(
        self, channels: int = 128, *, embedding: str = "positional", fourier_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.embed = make_embedding(embedding, channels, fourier_scale)
        self.linear = Linear(channels, 1, init=Init(gain=0.0))

    def forward(self, c_noise: Tensor) -> Tensor:
        """Map ``c_noise`` ``[N]`` to ``[N]``."""
        y: Tensor = self.linear(self.embed(c_noise))
        return y[:, 0]


class MPLogVariance(nn.Module):
    """EDM2's log-variance u per noise level (arXiv:2312.02696, App. B.6): ``loss / exp(u) + u``.

    One magnitude-preserving layer on Fourier features of its own; starts at random.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fourier = MPFourier(channels)
        self.linear = MPConv(channels, 1, 0)

    def forward(self, c_noise: Tensor) -> Tensor:
        """Map ``c_noise`` ``[N]`` to ``[N]``."""
        y: Tensor = self.linear(self.fourier(c_noise))
        return y.sum(1)  # of one column: not a view, which FSDP's hooks would warn of

    def normalize_weights(self) -> None:
        """Force the weights to unit mean square, in place, after every optimizer step."""
        self.linear.normalize()
