"""MeanFlow: a network of average velocities between two times (arXiv:2505.13447).

``x_t = (1 - t) x0 + t noise``; ``u(x_t, t, t - r)`` leads to ``x_r = x_t - (t - r) u``. Its loss
compares ``u`` with ``v - (t - r) du/dt``, the derivative along ``(v, 1, 0)`` in ``(x, t, r)``.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from cmbench.diffusion.frames import append_dims
from cmbench.plugin.config import Fraction, MethodConfig, NonNegative, Positive
from cmbench.plugin.method import Batch, Draws, FlowMap, Kit, Method, Nets, Progress


class MeanFlowConfig(MethodConfig):
    same_time: Fraction = Field(0.25, description="share of images with r = t")
    adaptive_power: NonNegative = Field(0.75, description="p of the weight (error + c)^-p")
    adaptive_floor: Positive = Field(1e-3, description="c of the weight (error + c)^-p")


class MeanFlow(Method):
    Config = MeanFlowConfig
    config: MeanFlowConfig

    def build(self, kit: Kit) -> dict[str, nn.Module]:
        return {"model": kit.network(conditions=("duration",))}

    def loss(self, nets: Nets, batch: Batch, draws: Draws, progress: Progress) -> Tensor:
        c, x0, v = self.config, batch.images, draws.normal("noise", batch.images) - batch.images
        t = torch.sigmoid(1.6 * draws.normal("t", x0[:, 0, 0, 0]) - 0.6)
        r = torch.minimum(t, torch.sigmoid(1.6 * draws.normal("r", t) - 4.0))
        duration = torch.where(draws.uniform("same", t) < c.same_time, torch.zeros_like(t), t - r)
        ones = torch.ones_like(t)
        u, du_dt = nets["model"].forward_with_tangent(
            x0 + append_dims(t, x0) * v,
            t,
            v,
            ones,
            batch.labels,
            conditions={"duration": duration},
            condition_tangents={"duration": ones},
        )
        error = (u - (v - append_dims(duration, x0) * du_dt)).square().flatten(1).sum(1)
        return error / (error.detach() + c.adaptive_floor) ** c.adaptive_power

    def flow_map(self, nets: Nets) -> FlowMap:
        """In EDM's frame: ``x = (1 + sigma) x_t`` at ``t = sigma / (1 + sigma)``."""

        def jump(x: Tensor, sigma: Tensor, end: Tensor, labels: Tensor | None) -> Tensor:
            t, r, x_t = sigma / (1 + sigma), end / (1 + end), x / append_dims(1 + sigma, x)
            u = nets["model"](x_t, t, labels, conditions={"duration": t - r})
            return append_dims(1 + end, x) * (x_t - append_dims(t - r, x) * u)

        return jump

    def sampling_levels(self, nfe: int) -> list[float]:
        return [80.0 * (nfe - i) / (nfe + 80.0 * i) for i in range(nfe)]
