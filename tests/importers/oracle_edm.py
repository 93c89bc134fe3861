"""EDM's DDPM++, NCSN++ and ADM written once more, and JAX's NCSN++ (see ``oracle_parts``)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from oracle_parts import (
    Part,
    attended,
    cosines,
    group_norm,
    halve,
    modules,
    randomness,
    resampled,
    swapped,
)
from torch import Tensor, nn

#: What no argument of the wrapper's says.
_OF_NO_ARGUMENT = {"sigma_data", "sigma_min", "adaptive_scale", "skip_scale", "eps", "num_heads"}
_OF_NO_ARGUMENT |= {"max_positions", "more"}


class EDMNetwork:
    """EDM's ``SongUNet`` or ``DhariwalUNet`` in any setting, wrapped as ``precond`` says."""

    def __init__(self, seed: int, kind: str, *, precond: str = "EDMPrecond", **c: Any) -> None:
        self.draw, self.kind, self.song = randomness(seed), kind, kind == "SongUNet"
        c = {
            "img_resolution": 8,
            "img_channels": 3,
            "label_dim": 0,
            "augment_dim": 0,
            "model_channels": 16,
            "channel_mult": [1, 2],
            "channel_mult_emb": 2,
            "channel_mult_noise": 1,
            "num_blocks": 1,
            "attn_resolutions": [4],
            "embedding_type": "positional",
            "encoder_type": "standard",
            "resample_filter": [1, 1],
            "sigma_data": 0.5,
            "sigma_min": 0,
            **c,
        }
        self.c = c
        self.taps = c["resample_filter"] if self.song else [1, 1]
        self.root = Part(
            precond,
            {k: v for k, v in c.items() if k not in _OF_NO_ARGUMENT},
            img_resolution=c["img_resolution"],
            img_channels=c["img_channels"],
            label_dim=c["label_dim"],
            use_fp16=False,
            sigma_min=c["sigma_min"],
            sigma_max=math.inf,
            sigma_data=c["sigma_data"],
            model=self._model(),
        )

    # Building: names, shapes and attributes of the files.

    def _linear(self, inputs: int, outputs: int, bias: bool = True) -> Part:
        facts = {"in_features": inputs, "out_features": outputs}
        return Part(
            "Linear",
            {**facts, "init_mode": "xavier_uniform"},
            **facts,
            weight=self.draw(outputs, inputs),
            bias=self.draw(outputs, size=0.3) if bias else None,
        )

    def _conv(
        self, inputs: int, outputs: int, kernel: int, mode: str = "keep", fused: bool = False
    ) -> Part:
        facts = {"in_channels": inputs, "out_channels": outputs}
        facts |= {"up": mode == "up", "down": mode == "down", "fused_resample": fused}
        taps = torch.tensor(self.taps, dtype=torch.float32)
        return Part(
            "Conv2d",
            {**facts, "kernel": kernel, "resample_filter": self.taps, "init_weight": 1e-5},
            **facts,
            weight=self.draw(outputs, inputs, kernel, kernel) if kernel else None,
            bias=self.draw(outputs, size=0.3) if kernel else None,
            buffer_resample_filter=None
            if mode == "keep"
            else taps.outer(taps)[None, None] / taps.sum() ** 2,
        )

    def _norm(self, channels: int) -> Part:
        eps = self.c.get("eps", 1e-6 if self.song else 1e-5)
        return Part(
            "GroupNorm",
            {"num_channels": channels, "eps": eps},
            num_groups=min(32, channels // 4),
            eps=eps,
            weight=1 + self.draw(channels, size=0.3),
            bias=self.draw(channels, size=0.3),
        )

    def _block(
        self, inputs: int, outputs: int, mode: str = "keep", attention: bool = False
    ) -> Part:
        emb = self.c["model_channels"] * self.c["channel_mult_emb"]
        adaptive = self.c.get("adaptive_scale", not self.song)
        heads = self.c.get("num_heads", 1) if self.song else outputs // 64
        heads = heads if attention else 0
        facts = {
            "in_channels": inputs,
            "out_channels": outputs,
            "emb_channels": emb,
            "skip_scale": self.c.get("skip_scale", math.sqrt(0.5) if self.song else 1),
            "adaptive_scale": adaptive,
        }
        resamples = mode != "keep"
        members: dict[str, Any] = {
            **facts,
            "num_heads": heads,
            "dropout": 0.13,
            "norm0": self._norm(inputs),
            "conv0": self._conv(inputs, outputs, 3, mode),
            "affine": self._linear(emb, outputs * (2 if adaptive else 1)),
            "norm1": self._norm(outputs),
            "conv1": self._conv(outputs, outputs, 3),
            "skip": None,
        }
        if inputs != outputs or resamples:
            kernel = 1 if inputs != outputs or self.song else 0
            members["skip"] = self._conv(inputs, outputs, kernel, mode)
        if heads:
            members |= {
                "norm2": self._norm(outputs),
                "qkv": self._conv(outputs, 3 * outputs, 1),
                "proj": self._conv(outputs, outputs, 1),
            }
        arguments = {**facts, "dropout": 0.13, "resample_filter": self.taps, "init": {}}
        return Part("UNetBlock", arguments, **members)

    def _model(self) -> Part:
        c, side, base = self.c, self.c["img_resolution"], self.c["model_channels"]
        widths = [base * m for m in c["channel_mult"]]
        attention = c["attn_resolutions"]
        stem = base if self.song else widths[0]
        enc: dict[str, nn.Module] = {}
        skips, width, aux = [stem], stem, c["img_channels"]
        for level, target in enumerate(widths):
            res = side >> level
            if level == 0:
                enc[f"{res}x{res}_conv"] = self._conv(aux, stem, 3)
            else:
                enc[f"{res}x{res}_down"] = self._block(width, width, "down")
                skips.append(width)
                if c["encoder_type"] == "residual":
                    name = f"{res}x{res}_aux_residual"
                    enc[name] = self._conv(aux, width, 3, "down", fused=True)
                    aux = width
            for i in range(c["num_blocks"]):
                enc[f"{res}x{res}_block{i}"] = self._block(
                    width, target, attention=res in attention
                )
                width = target
                skips.append(width)
        dec: dict[str, nn.Module] = {}
        for level in reversed(range(len(widths))):
            res = side >> level
            if level == len(widths) - 1:
                dec[f"{res}x{res}_in0"] = self._block(width, width, attention=True)
                dec[f"{res}x{res}_in1"] = self._block(width, width)
            else:
                dec[f"{res}x{res}_up"] = self._block(width, width, "up")
            for i in range(c["num_blocks"] + 1):
                last = i == c["num_blocks"] or not self.song
                dec[f"{res}x{res}_block{i}"] = self._block(
                    width + skips.pop(), widths[level], attention=last and res in attention
                )
                width = widths[level]
        members = self._mapping()
        last = {"norm": self._norm(width), "conv": self._conv(width, c["img_channels"], 3)}
        if self.song:
            dec |= {f"{side}x{side}_aux_{k}": v for k, v in last.items()}
        else:
            members |= {f"out_{k}": v for k, v in last.items()}
        members |= c.get("more", {})
        return Part(self.kind, {}, **members, enc=modules(enc), dec=modules(dec))

    def _mapping(self) -> dict[str, Any]:
        c, base = self.c, self.c["model_channels"]
        noise = base * (c["channel_mult_noise"] if self.song else 1)
        emb = base * c["channel_mult_emb"]
        where = noise if self.song else emb
        fourier = c["embedding_type"] == "fourier"
        facts = {"num_channels": noise, "endpoint": self.song}
        positions = c.get("max_positions", 10000)
        return {
            "label_dropout": 0,
            "map_noise": Part(
                "FourierEmbedding",
                {"num_channels": noise},
                buffer_freqs=self.draw(noise // 2, size=4),
            )
            if fourier
            else Part("PositionalEmbedding", facts, **facts, max_positions=positions),
            "map_label": self._linear(c["label_dim"], where, bias=self.song)
            if c["label_dim"]
            else None,
            "map_augment": self._linear(c["augment_dim"], noise, bias=False)
            if c["augment_dim"]
            else None,
            "map_layer0": self._linear(noise, emb),
            "map_layer1": self._linear(emb, emb),
        }

    # Computing.

    def denoised(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, augment: Tensor | None = None
    ) -> Tensor:
        """EDM's denoiser; for ``ECMPrecond`` the consistency function at ``sigma_min``."""
        data, s = self.c["sigma_data"], sigma[:, None, None, None]
        low = self.c["sigma_min"] if self.root.kind == "ECMPrecond" else 0.0
        skip = data**2 / ((s - low) ** 2 + data**2)
        out = (s - low) * data / (s**2 + data**2).sqrt()
        raw = self.raw(x / (s**2 + data**2).sqrt(), sigma.log() / 4, labels, augment)
        return skip * x + out * raw

    def raw(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        m: Any = self.root.model
        emb = self._embedded(m, c_noise, labels, augment)
        skips: list[Tensor] = []
        aux = x
        for name, part in m.enc.items():
            if "aux_residual" in name:
                pad = (len(self.taps) - 1) // 2
                wide = F.conv2d(F.pad(aux, [pad] * 4), part.weight, padding=1)
                y = halve(wide, self.taps, 0) + part.bias[:, None, None]
                x = skips[-1] = aux = (x + y) / math.sqrt(2)
                continue
            x = self._convolved(part, x) if name.endswith("_conv") else self._through(part, x, emb)
            skips.append(x)
        for name, part in m.dec.items():
            if "aux" in name:
                continue
            if "block" in name:
                x = torch.cat([x, skips.pop()], 1)
            x = self._through(part, x, emb)
        side = self.c["img_resolution"]
        last = [m.dec[f"{side}x{side}_aux_{k}"] for k in ("norm", "conv")] if self.song else None
        norm, conv = last or (m.out_norm, m.out_conv)
        return self._convolved(conv, F.silu(self._normed(norm, x)))

    def _embedded(
        self, m: Any, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None
    ) -> Tensor:
        def linear(part: Any, e: Tensor) -> Tensor:
            y: Tensor = e @ part.weight.T
            return y if part.bias is None else y + part.bias

        if self.c["embedding_type"] == "fourier":
            angle = 2 * math.pi * c_noise[:, None] * m.map_noise.freqs
            emb = torch.cat([angle.cos(), angle.sin()], 1)
        else:
            emb = cosines(c_noise, m.map_noise.num_channels, endpoint=self.song)
        emb = swapped(emb) if self.song else emb
        if self.song and labels is not None:
            emb = emb + linear(m.map_label, labels * math.sqrt(labels.shape[1]))
        if augment is not None:
            emb = emb + linear(m.map_augment, augment)
        emb = linear(m.map_layer1, F.silu(linear(m.map_layer0, emb)))
        if not self.song and labels is not None:
            emb = emb + linear(m.map_label, labels)
        return F.silu(emb)

    def _normed(self, part: Any, x: Tensor) -> Tensor:
        return group_norm(x, part, part.num_groups, part.eps)

    def _convolved(self, part: Any, x: Tensor) -> Tensor:
        x = resampled(x, self.taps, "up" if part.up else "down" if part.down else "keep")
        if part.weight is None:
            return x
        return F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)

    def _through(self, part: Any, x: Tensor, emb: Tensor) -> Tensor:
        y = self._convolved(part.conv0, F.silu(self._normed(part.norm0, x)))
        p = (emb @ part.affine.weight.T + part.affine.bias)[:, :, None, None]
        if part.adaptive_scale:
            scale, shift = p.chunk(2, 1)
            y = self._normed(part.norm1, y) * (1 + scale) + shift
        else:
            y = self._normed(part.norm1, y + p)
        y = self._convolved(part.conv1, F.silu(y))
        skip = x if part.skip is None else self._convolved(part.skip, x)
        y = (y + skip) * part.skip_scale
        if part.num_heads:
            n, c, h, w = y.shape
            rows = self._convolved(part.qkv, self._normed(part.norm2, y))
            q, k, v = rows.reshape(n, part.num_heads, c // part.num_heads, 3, h * w).unbind(3)
            a = self._convolved(part.proj, attended(q, k, v).reshape(y.shape))
            y = (y + a) * part.skip_scale
        return y


# ---- JAX's NCSN++ --------------------------------------------------------------------------------


class FlaxTree:
    """An NCSN++'s parameters under flax's names, numbered in the order of their making."""

    def __init__(self, network: EDMNetwork) -> None:
        model: Any = network.root.model
        self.tree: dict[str, Any] = {}
        self.new("GaussianFourierProjection")["W"] = array(model.map_noise.freqs)
        for part in (model.map_layer0, model.map_layer1):
            self.new("Dense").update(dense(part))
        for name, part in model.enc.items():
            if name.endswith("_conv"):
                self.new("Conv").update(conv(part))
            elif name.endswith("_aux_residual"):
                self.new("Downsample")["Conv2d_0"] = conv(part, "weight")
            else:
                self.add(part)
        for name, part in model.dec.items():
            if "aux" not in name:
                self.add(part)
        side = network.c["img_resolution"]
        self.new("GroupNorm").update(norm(model.dec[f"{side}x{side}_aux_norm"]))
        self.new("Conv").update(conv(model.dec[f"{side}x{side}_aux_conv"]))

    def new(self, kind: str) -> dict[str, Any]:
        index = sum(name.rpartition("_")[0] == kind for name in self.tree)
        return self.tree.setdefault(f"{kind}_{index}", {})  # type: ignore[no-any-return]

    def add(self, part: Any) -> None:
        node = self.new("ResnetBlockBigGANpp")
        node |= {"GroupNorm_0": norm(part.norm0), "Conv_0": conv(part.conv0)}
        node |= {"Dense_0": dense(part.affine)}
        node |= {"GroupNorm_1": norm(part.norm1), "Conv_1": conv(part.conv1)}
        if part.skip is not None:
            node["Conv_2"] = conv(part.skip)
        if not part.num_heads:
            return
        node = self.new("AttnBlockpp")
        node["GroupNorm_0"] = norm(part.norm2)
        width, out = part.proj.weight.shape[0], part.proj
        rows = part.qkv.weight.reshape(width, 3, width).unbind(1)
        biases = part.qkv.bias.reshape(width, 3).unbind(1)
        for i in range(3):
            node[f"NIN_{i}"] = {"W": array(rows[i].T), "b": array(biases[i])}
        node["NIN_3"] = {"W": array(out.weight[:, :, 0, 0].T), "b": array(out.bias)}


def array(t: Tensor) -> Any:
    return t.detach().float().contiguous().numpy()


def conv(part: Any, kernel: str = "kernel") -> dict[str, Any]:
    return {kernel: array(part.weight.permute(2, 3, 1, 0)), "bias": array(part.bias)}


def dense(part: Any) -> dict[str, Any]:
    return {"kernel": array(part.weight.T), "bias": array(part.bias)}


def norm(part: Any) -> dict[str, Any]:
    return {"scale": array(part.weight), "bias": array(part.bias)}
