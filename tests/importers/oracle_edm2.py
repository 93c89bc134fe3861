"""EDM2's network written once more (see ``oracle_parts``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from oracle_parts import Part, attended, modules, randomness, resampled
from torch import Tensor, nn


def unit(x: Tensor, dims: Sequence[int], eps: float = 1e-4) -> Tensor:
    """Scale to unit mean square along ``dims``."""
    size = math.prod(x.shape[d] for d in dims)
    return x / (eps + x.square().sum(tuple(dims), keepdim=True).sqrt() / math.sqrt(size))


def blended(a: Tensor, b: Tensor, t: float) -> Tensor:
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


class EDM2Network:
    """EDM2's ``Precond`` with ``UNet``, in any setting."""

    def __init__(self, seed: int, **c: Any) -> None:
        self.draw = randomness(seed)
        self.c = c = {
            "img_resolution": 8,
            "img_channels": 3,
            "label_dim": 0,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "channel_mult_noise": None,
            "channel_mult_emb": None,
            "num_blocks": 1,
            "attn_resolutions": [4],
            "channels_per_head": 16,
            "label_balance": 0.5,
            "concat_balance": 0.5,
            "res_balance": 0.3,
            "attn_balance": 0.3,
            "clip_act": 256,
            "resample_filter": [1, 1],
            "sigma_data": 0.5,
            "logvar_channels": 8,
            **c,
        }
        members: dict[str, Any] = {}
        if c["logvar_channels"]:
            members["logvar_fourier"] = self._fourier(c["logvar_channels"])
            members["logvar_linear"] = self._conv(c["logvar_channels"], 1)
        self.root = Part(
            "Precond",
            {k: v for k, v in c.items() if k != "more_in_blocks"},
            img_resolution=c["img_resolution"],
            img_channels=c["img_channels"],
            label_dim=c["label_dim"],
            use_fp16=True,
            sigma_data=c["sigma_data"],
            unet=self._unet(),
            **members,
        )

    def _fourier(self, count: int) -> Part:
        freqs, phases = self.draw(count, size=2.0), self.draw(count, size=2.0)
        return Part("MPFourier", {}, buffer_freqs=freqs, buffer_phases=phases)

    def _conv(self, inputs: int, outputs: int, *kernel: int) -> Part:
        weight = self.draw(outputs, inputs, *kernel, size=1.0)
        return Part("MPConv", {}, out_channels=outputs, weight=weight)

    def _block(
        self,
        inputs: int,
        outputs: int,
        emb: int,
        flavor: str,
        mode: str = "keep",
        attn: bool = False,
    ) -> Part:
        c = self.c
        heads = outputs // c["channels_per_head"] if attn else 0
        kept = ("res_balance", "attn_balance", "clip_act", "resample_filter")
        return Part(
            "Block",
            {"flavor": flavor, "resample_mode": mode, "attention": attn, **{k: c[k] for k in kept}},
            out_channels=outputs,
            flavor=flavor,
            resample_mode=mode,
            num_heads=heads,
            dropout=0,
            **{k: c[k] for k in kept},
            emb_gain=self.draw(1, size=0.5)[0],
            conv_res0=self._conv(outputs if flavor == "enc" else inputs, outputs, 3, 3),
            emb_linear=self._conv(emb, outputs),
            conv_res1=self._conv(outputs, outputs, 3, 3),
            conv_skip=self._conv(inputs, outputs, 1, 1) if inputs != outputs else None,
            attn_qkv=self._conv(outputs, 3 * outputs, 1, 1) if heads else None,
            attn_proj=self._conv(outputs, outputs, 1, 1) if heads else None,
            **c.get("more_in_blocks", {}),
        )

    def _unet(self) -> Part:
        c, side = self.c, self.c["img_resolution"]
        widths = [c["model_channels"] * m for m in c["channel_mult"]]
        many = c["channel_mult_noise"]
        noise = widths[0] if many is None else c["model_channels"] * many
        many = c["channel_mult_emb"]
        emb = max(widths) if many is None else c["model_channels"] * many
        enc: dict[str, nn.Module] = {}
        width, skips = widths[0], [widths[0]]
        for level, target in enumerate(widths):
            res = side >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = self._conv(c["img_channels"] + 1, width, 3, 3)
            else:
                enc[f"{res}x{res}_down"] = self._block(width, width, emb, "enc", "down")
                skips.append(width)
            for i in range(c["num_blocks"]):
                attn = res in c["attn_resolutions"]
                enc[f"{res}x{res}_block{i}"] = self._block(width, target, emb, "enc", attn=attn)
                width = target
                skips.append(width)
        dec: dict[str, nn.Module] = {}
        for level in reversed(range(len(widths))):
            res, target = side >> level, widths[level]
            if level == len(widths) - 1:
                dec[f"{res}x{res}_in0"] = self._block(width, width, emb, "dec", attn=True)
                dec[f"{res}x{res}_in1"] = self._block(width, width, emb, "dec")
            else:
                dec[f"{res}x{res}_up"] = self._block(width, width, emb, "dec", "up")
            for i in range(c["num_blocks"] + 1):
                attn = res in c["attn_resolutions"]
                inputs = width + skips.pop()
                dec[f"{res}x{res}_block{i}"] = self._block(inputs, target, emb, "dec", attn=attn)
                width = target
        return Part(
            "UNet",
            {k: c[k] for k in ("label_balance", "concat_balance", "clip_act")},
            label_balance=c["label_balance"],
            concat_balance=c["concat_balance"],
            out_gain=self.draw(1, size=0.7)[0],
            emb_fourier=self._fourier(noise),
            emb_noise=self._conv(noise, emb),
            emb_label=self._conv(c["label_dim"], emb) if c["label_dim"] else None,
            enc=modules(enc),
            dec=modules(dec),
            out_conv=self._conv(width, c["img_channels"], 3, 3),
        )

    # Computing.

    @staticmethod
    def _apply(part: Any, x: Tensor, gain: Any = 1.0) -> Tensor:
        weight = part.weight
        weight = unit(weight, range(1, weight.ndim)) / math.sqrt(weight[0].numel()) * gain
        return (
            x @ weight.T if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        )

    @staticmethod
    def _features(part: Any, c_noise: Tensor) -> Tensor:
        return math.sqrt(2) * (c_noise[:, None] * part.freqs + part.phases).cos()

    def denoised(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        data, s = self.c["sigma_data"], sigma[:, None, None, None]
        raw = self.raw(x / (s**2 + data**2).sqrt(), sigma.log() / 4, labels)
        return data**2 / (s**2 + data**2) * x + s * data / (s**2 + data**2).sqrt() * raw

    def raw(self, x: Tensor, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        c, net = self.c, self.root.unet
        silu = lambda v: F.silu(v) / 0.596  # noqa: E731
        emb = self._apply(net.emb_noise, self._features(net.emb_fourier, c_noise))
        if labels is not None:
            vector = self._apply(net.emb_label, labels * math.sqrt(labels.shape[1]))
            emb = blended(emb, vector, c["label_balance"])
        emb = silu(emb)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        skips = []
        for name, part in net.enc.items():
            x = self._apply(part, x) if name.endswith("_conv") else self._through(part, x, emb)
            skips.append(x)
        for name, part in net.dec.items():
            if "block" in name:
                skip, t = skips.pop(), c["concat_balance"]
                a, b = x.shape[1], skip.shape[1]
                size = math.sqrt((a + b) / ((1 - t) ** 2 + t**2))
                x = torch.cat([x * size * (1 - t) / a**0.5, skip * size * t / b**0.5], 1)
            x = self._through(part, x, emb)
        return self._apply(net.out_conv, x, net.out_gain)

    def _through(self, part: Any, x: Tensor, emb: Tensor) -> Tensor:
        c = self.c
        silu = lambda v: F.silu(v) / 0.596  # noqa: E731
        x = resampled(x, c["resample_filter"], part.resample_mode)
        if part.flavor == "enc":
            x = x if part.conv_skip is None else self._apply(part.conv_skip, x)
            x = unit(x, [1])
        y = self._apply(part.conv_res0, silu(x))
        y = silu(y * (1 + self._apply(part.emb_linear, emb, part.emb_gain))[:, :, None, None])
        y = self._apply(part.conv_res1, y)
        if part.flavor == "dec" and part.conv_skip is not None:
            x = self._apply(part.conv_skip, x)
        x = blended(x, y, c["res_balance"])
        if part.num_heads:
            n, width, h, w = x.shape
            rows = self._apply(part.attn_qkv, x)
            rows = rows.reshape(n, part.num_heads, width // part.num_heads, 3, h * w)
            a = attended(*unit(rows, [2]).unbind(3)).reshape(x.shape)
            x = blended(x, self._apply(part.attn_proj, a), c["attn_balance"])
        return x if c["clip_act"] is None else x.clamp(-c["clip_act"], c["clip_act"])
