"""OpenAI's ADM written once more (see ``oracle_parts``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from oracle_parts import attended, cosines, group_norm, randomness, resampled
from torch import Tensor


class Lookup:
    """Tensors of a flat state dict under a prefix, as attributes ``weight`` and ``bias``."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.weight, self.bias = state[f"{prefix}.weight"], state.get(f"{prefix}.bias")


class OpenAINetwork:
    """``UNetModel`` of openai/consistency_models with blocks that resample, as a state dict."""

    def __init__(self, seed: int, **c: Any) -> None:
        self.draw = randomness(seed)
        self.c = c = {
            "image_size": 16,
            "model_channels": 32,
            "channel_mult": [1, 2],
            "num_res_blocks": 1,
            "attention_sides": [8],
            "num_head_channels": 16,
            "use_scale_shift_norm": True,
            "num_classes": 0,
            **c,
        }
        self.state: dict[str, Tensor] = {}
        base, emb = c["model_channels"], 4 * c["model_channels"]
        self._linear("time_embed.0", base, emb)
        self._linear("time_embed.2", emb, emb)
        if c["num_classes"]:
            self.state["label_emb.weight"] = self.draw(c["num_classes"], emb, size=0.5)
        widths = [int(base * m) for m in c["channel_mult"]]
        self._conv("input_blocks.0.0", 3, widths[0], 3)
        width, skips, index = widths[0], [widths[0]], 0
        #: what runs in which order: kind of step and its name
        self.down: list[tuple[str, str]] = []
        self.up: list[tuple[str, str]] = []
        for level, target in enumerate(widths):
            side = c["image_size"] >> level
            for _ in range(c["num_res_blocks"]):
                index += 1
                self.down.append(("push", f"input_blocks.{index}"))
                self._block(f"input_blocks.{index}.0", width, target)
                width = target
                if side in c["attention_sides"]:
                    self._attention(f"input_blocks.{index}.1", width)
                skips.append(width)
            if level < len(widths) - 1:
                index += 1
                self.down.append(("down", f"input_blocks.{index}"))
                self._block(f"input_blocks.{index}.0", width, width)
                skips.append(width)
        for i in (0, 2):
            self._block(f"middle_block.{i}", width, width)
        self._attention("middle_block.1", width)
        index = -1
        for level in reversed(range(len(widths))):
            side, target = c["image_size"] >> level, widths[level]
            for i in range(c["num_res_blocks"] + 1):
                index += 1
                name, place = f"output_blocks.{index}", 1
                self.up.append(("pop", name))
                self._block(f"{name}.0", width + skips.pop(), target)
                width = target
                if side in c["attention_sides"]:
                    self._attention(f"{name}.1", width)
                    place = 2
                if level and i == c["num_res_blocks"]:
                    self._block(f"{name}.{place}", width, width)
                    self.up.append(("up", f"{name}.{place}"))
        self._norm("out.0", width)
        self._conv("out.2", width, 3, 3)

    def _linear(self, name: str, inputs: int, outputs: int) -> None:
        self.state[f"{name}.weight"] = self.draw(outputs, inputs)
        self.state[f"{name}.bias"] = self.draw(outputs, size=0.3)

    def _conv(self, name: str, inputs: int, outputs: int, *kernel: int) -> None:
        self.state[f"{name}.weight"] = self.draw(outputs, inputs, *(kernel * 2))
        self.state[f"{name}.bias"] = self.draw(outputs, size=0.3)

    def _norm(self, name: str, channels: int) -> None:
        self.state[f"{name}.weight"] = 1 + self.draw(channels, size=0.3)
        self.state[f"{name}.bias"] = self.draw(channels, size=0.3)

    def _block(self, name: str, inputs: int, outputs: int) -> None:
        emb, wide = 4 * self.c["model_channels"], 1 + self.c["use_scale_shift_norm"]
        self._norm(f"{name}.in_layers.0", inputs)
        self._conv(f"{name}.in_layers.2", inputs, outputs, 3)
        self._linear(f"{name}.emb_layers.1", emb, wide * outputs)
        self._norm(f"{name}.out_layers.0", outputs)
        self._conv(f"{name}.out_layers.3", outputs, outputs, 3)
        if inputs != outputs:
            self._conv(f"{name}.skip_connection", inputs, outputs, 1)

    def _attention(self, name: str, channels: int) -> None:
        self._norm(f"{name}.norm", channels)
        self._linear1d(f"{name}.qkv", channels, 3 * channels)
        self._linear1d(f"{name}.proj_out", channels, channels)

    def _linear1d(self, name: str, inputs: int, outputs: int) -> None:
        self._linear(name, inputs, outputs)
        self.state[f"{name}.weight"] = self.state[f"{name}.weight"][:, :, None, None]

    # Computing.

    def raw(self, x: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
        """F at the embedding's time, which is 1000 ln(sigma) / 4 there; labels are indices."""
        emb = cosines(time, self.c["model_channels"], endpoint=False)
        emb = self._mapped("time_embed.2", F.silu(self._mapped("time_embed.0", emb)))
        if labels is not None:
            emb = emb + self.state["label_emb.weight"][labels]
        emb = F.silu(emb)
        x = self._convolved("input_blocks.0.0", x)
        skips = [x]
        for kind, name in self.down:
            x = self._through(f"{name}.0", x, emb, "down" if kind == "down" else "keep")
            if f"{name}.1.qkv.weight" in self.state:
                x = self._attend(f"{name}.1", x)
            skips.append(x)
        x = self._through("middle_block.0", x, emb)
        x = self._through("middle_block.2", self._attend("middle_block.1", x), emb)
        for kind, name in self.up:
            if kind == "up":
                x = self._through(name, x, emb, "up")
                continue
            x = self._through(f"{name}.0", torch.cat([x, skips.pop()], 1), emb)
            if f"{name}.1.qkv.weight" in self.state:
                x = self._attend(f"{name}.1", x)
        return self._convolved("out.2", F.silu(self._normed("out.0", x)))

    def _mapped(self, name: str, e: Tensor) -> Tensor:
        part = Lookup(self.state, name)
        y = e @ part.weight.T
        return y if part.bias is None else y + part.bias

    def _convolved(self, name: str, x: Tensor) -> Tensor:
        part = Lookup(self.state, name)
        return F.conv2d(x, part.weight, part.bias, padding=part.weight.shape[-1] // 2)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return group_norm(x, Lookup(self.state, name), 32, 1e-5)

    def _through(self, name: str, x: Tensor, emb: Tensor, mode: str = "keep") -> Tensor:
        y = resampled(F.silu(self._normed(f"{name}.in_layers.0", x)), [1, 1], mode)
        y = self._convolved(f"{name}.in_layers.2", y)
        p = self._mapped(f"{name}.emb_layers.1", emb)[:, :, None, None]
        if self.c["use_scale_shift_norm"]:
            scale, shift = p.chunk(2, 1)
            y = self._normed(f"{name}.out_layers.0", y) * (1 + scale) + shift
        else:
            y = self._normed(f"{name}.out_layers.0", y + p)
        y = self._convolved(f"{name}.out_layers.3", F.silu(y))
        x = resampled(x, [1, 1], mode)
        skip = f"{name}.skip_connection"
        return y + (self._convolved(skip, x) if f"{skip}.weight" in self.state else x)

    def _attend(self, name: str, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        heads = c // self.c["num_head_channels"]
        flat = self._normed(f"{name}.norm", x).reshape(n, c, h * w)
        qkv, out = Lookup(self.state, f"{name}.qkv"), Lookup(self.state, f"{name}.proj_out")
        assert qkv.bias is not None
        assert out.bias is not None
        rows = torch.einsum("oc,ncp->nop", qkv.weight[:, :, 0, 0], flat) + qkv.bias[:, None]
        q, k, v = rows.reshape(n, 3, heads, c // heads, h * w).unbind(1)
        a = attended(q, k, v).reshape(n, c, h * w)
        a = torch.einsum("oc,ncp->nop", out.weight[:, :, 0, 0], a) + out.bias[:, None]
        return x + a.reshape(x.shape)
