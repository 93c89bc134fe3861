"""Small heads over the noise level, trained beside a network."""

from __future__ import annotations

from torch import Tensor, nn

from cmbench.networks.layers import Init, Linear, make_embedding


class LogVarianceHead(nn.Module):
    """One learned number per noise level: EDM2's log-variance u, or sCM's adaptive weight w.

    EDM2 (arXiv:2312.02696, App. B) minimises ``loss / exp(u) + u``; sCM (arXiv:2410.11081,
    Sec. 4.2) ``exp(w) loss - w``: the same head with ``w = -u``. Starts at zero.
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
