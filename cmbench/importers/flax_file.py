"""OpenAI's JAX checkpoints for CIFAR-10 (``checkpoint_N``): a flax state in msgpack.

Consistency models (Song et al. 2023, arXiv:2303.01469) on an NCSN++ whose layers are EDM's under
other names and in other orders. Needs the package ``msgpack``; neither flax nor JAX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmbench.errors import MissingError, UserError, described
from cmbench.files import corrupt, regular
from cmbench.importers.imported import Found
from cmbench.networks.recognize import recognize

Tree = Mapping[str, Any]

#: Codes of flax's msgpack extension types.
_NDARRAY, _SCALAR = 1, 3
_DTYPES = frozenset({"float16", "float32", "float64", "int32", "int64", "uint32", "uint8", "bool"})
_PARTS = {"ema": "params_ema", "raw": "params", "target": "target_params"}
_SIDE = 32
_BLOCK, _ATTENTION = "ResnetBlockBigGANpp", "AttnBlockpp"


def is_flax(head: bytes) -> bool:
    """Return whether a file begins as a msgpack map that is not empty."""
    return bool(head) and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))


def _msgpack(path: Path) -> Any:
    try:
        return import_module("msgpack")
    except ImportError:
        raise MissingError(
            f"checkpoint {path}",
            "reading a JAX checkpoint needs the package msgpack",
            remedy="pip install msgpack",
        ) from None


def load_tree(path: Path) -> Tree:
    """Read the state; arrays and plain data only."""
    msgpack = _msgpack(path)

    def extension(code: int, data: bytes) -> Any:
        if code not in (_NDARRAY, _SCALAR):
            raise ValueError(f"extension type {code}")
        shape, name, buffer = msgpack.unpackb(data, raw=True)
        kind = bytes(name).decode("ascii")
        if kind not in _DTYPES:
            raise ValueError(f"an array of {kind}")
        return np.frombuffer(buffer, kind).reshape(shape)

    try:
        tree = msgpack.unpackb(
            regular(path).read_bytes(), ext_hook=extension, raw=False, strict_map_key=False
        )
    except (ValueError, TypeError, UnicodeDecodeError, RecursionError, MemoryError) as error:
        raise corrupt(f"checkpoint {path}", "msgpack", error) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"checkpoint {path}", "holds no training state", remedy="give a flax checkpoint_N"
        )
    return tree


def read_flax_file(path: Path, part: str = "ema", resolution: int | None = None) -> Found:
    """Read the NCSN++ under ``part`` (ema, raw, target) of a JAX checkpoint.

    Parameters do not determine the resolution; it is CIFAR-10's unless ``resolution`` is given.
    """
    side = resolution or _SIDE
    tree = load_tree(path)
    present = {name: key for name, key in _PARTS.items() if isinstance(tree.get(key), dict)}
    if part not in present:
        raise UserError(
            f"checkpoint {path}",
            f"holds no parameters {part!r} (it holds {', '.join(map(str, tree))[:120]})",
            allowed=", ".join(present) or "a state with params_ema",
            remedy="choose one of them with --part" if present else "give a flax checkpoint_N",
        )
    try:
        tensors = dict(_edm_names(tree[present[part]], side))
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"checkpoint {path}",
            f"its network is not the published NCSN++ ({described(error)})",
            allowed="BigGAN blocks, FIR resampling, a residual input pyramid, Fourier embedding",
            remedy="give a checkpoint of openai/consistency_models_cifar10",
        ) from None
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    found = recognize(shapes)
    assumed = {"attention_resolutions": found.options["attention_resolutions"]}
    if resolution is None:
        assumed["resolution"] = side
    return Found("flax", tensors, found._replace(assumed=assumed), description={"part": part})


# ---- from flax's names to EDM's ----------------------------------------------------------------


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


def _conv(official: str, node: Tree, kernel: str = "kernel") -> Iterator[tuple[str, Tensor]]:
    """A convolution: height, width, in, out there; out, in, height, width here."""
    yield f"{official}.weight", _tensor(node[kernel]).permute(3, 2, 0, 1)
    yield f"{official}.bias", _tensor(node["bias"])


def _dense(official: str, node: Tree) -> Iterator[tuple[str, Tensor]]:
    yield f"{official}.weight", _tensor(node["kernel"]).T
    yield f"{official}.bias", _tensor(node["bias"])


def _norm(official: str, node: Tree) -> Iterator[tuple[str, Tensor]]:
    yield f"{official}.weight", _tensor(node["scale"])
    yield f"{official}.bias", _tensor(node["bias"])


def _attention(official: str, node: Tree) -> Iterator[tuple[str, Tensor]]:
    """Four matrices ``W [in, out]``; q, k and v become the interleaved rows of one."""
    yield from _norm(f"{official}.norm2", node["GroupNorm_0"])
    weights = [_tensor(node[f"NIN_{i}"]["W"]).T for i in range(4)]
    biases = [_tensor(node[f"NIN_{i}"]["b"]) for i in range(4)]
    yield f"{official}.qkv.weight", torch.stack(weights[:3], 1).flatten(0, 1)[:, :, None, None]
    yield f"{official}.qkv.bias", torch.stack(biases[:3], 1).flatten()
    yield f"{official}.proj.weight", weights[3][:, :, None, None]
    yield f"{official}.proj.bias", biases[3]


def _block(official: str, node: Tree, *, resample: bool) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(f"{official}.norm0", node["GroupNorm_0"])
    yield from _conv(f"{official}.conv0", node["Conv_0"])
    yield from _dense(f"{official}.affine", node["Dense_0"])
    yield from _norm(f"{official}.norm1", node["GroupNorm_1"])
    yield from _conv(f"{official}.conv1", node["Conv_1"])
    if "Conv_2" in node:
        yield from _conv(f"{official}.skip", node["Conv_2"])
    if resample:
        for layer in ("conv0", "skip"):
            yield f"{official}.{layer}.resample_filter", _filter()


def _filter() -> Tensor:
    """EDM's buffer for the taps 1, 3, 3, 1: their outer product with sum one."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps)[None, None] / taps.sum() ** 2


class _Numbered:
    """Hands out ``Name_0``, ``Name_1`` … in the order in which flax made them."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.next = tree, dict[str, int]()

    def __call__(self, name: str) -> Tree:
        index = self.next.get(name, 0)
        self.next[name] = index + 1
        node: Tree = self.tree[f"{name}_{index}"]
        return node

    def left(self) -> list[str]:
        """Return the numbered modules that nobody asked for."""
        return [
            key
            for key in self.tree
            if int(key.rpartition("_")[2]) >= self.next.get(key.rpartition("_")[0], 0)
        ]


def _levels_and_blocks(tree: Tree) -> tuple[int, int]:
    """Return the numbers of resolutions and of blocks per resolution from those of the layers.

    Each resolution except the first has one pyramid step, and the decoder has one block per
    resolution more than the encoder.
    """
    levels = 1 + sum(key.startswith("Downsample_") for key in tree)
    total = sum(key.startswith(f"{_BLOCK}_") for key in tree)
    # blocks * levels + (levels - 1) down, 2 in the middle, (blocks + 1) * levels + (levels - 1) up
    blocks, rest = divmod(total - 2 - levels - 2 * (levels - 1), 2 * levels)
    if rest or blocks < 1 or levels < 2:
        raise ValueError(f"{total} blocks in {levels} resolutions")
    return levels, blocks


def _edm_names(tree: Tree, side: int) -> Iterator[tuple[str, Tensor]]:
    """Walk the network in flax's order of creation and yield EDM's names."""
    take = _Numbered(tree)
    levels, blocks = _levels_and_blocks(tree)
    attention = _attention_levels(tree, levels, blocks)
    model, sides = "model", [side >> level for level in range(levels)]
    yield f"{model}.map_noise.freqs", _tensor(take("GaussianFourierProjection")["W"])
    for layer in ("layer0", "layer1"):
        yield from _dense(f"{model}.map_{layer}", take("Dense"))
    yield from _conv(f"{model}.enc.{side}x{side}_conv", take("Conv"))
    for level, res in enumerate(sides):
        if level:
            down = f"{model}.enc.{res}x{res}_down"
            yield from _block(down, take(_BLOCK), resample=True)
            pyramid = f"{model}.enc.{res}x{res}_aux_residual"
            yield from _conv(pyramid, take("Downsample")["Conv2d_0"], "weight")
            yield f"{pyramid}.resample_filter", _filter()
        for i in range(blocks):
            name = f"{model}.enc.{res}x{res}_block{i}"
            yield from _block(name, take(_BLOCK), resample=False)
            if level in attention:
                yield from _attention(name, take(_ATTENTION))
    yield from _block(f"{model}.dec.{res}x{res}_in0", take(_BLOCK), resample=False)
    yield from _attention(f"{model}.dec.{res}x{res}_in0", take(_ATTENTION))
    yield from _block(f"{model}.dec.{res}x{res}_in1", take(_BLOCK), resample=False)
    for level in reversed(range(levels)):
        res = sides[level]
        if level < levels - 1:
            yield from _block(f"{model}.dec.{res}x{res}_up", take(_BLOCK), resample=True)
        for i in range(blocks + 1):
            name = f"{model}.dec.{res}x{res}_block{i}"
            yield from _block(name, take(_BLOCK), resample=False)
        if level in attention:
            yield from _attention(name, take(_ATTENTION))
    yield from _norm(f"{model}.dec.{side}x{side}_aux_norm", take("GroupNorm"))
    yield from _conv(f"{model}.dec.{side}x{side}_aux_conv", take("Conv"))
    if take.left():
        raise ValueError(f"unexpected {', '.join(take.left()[:3])}")


def _attention_levels(tree: Tree, levels: int, blocks: int) -> set[int]:
    """Return the level that has attention.

    One block of attention follows each encoder block of a level and the level's decoder: blocks + 1
    a level, besides the one in the middle. Widths may be equal, so which level it is cannot be
    told where there is one only: the published models have it at 16x16, the second.
    """
    count = sum(key.startswith(f"{_ATTENTION}_") for key in tree) - 1
    found, rest = divmod(count, blocks + 1)
    if rest or found > 1:
        raise ValueError(f"{count} attention layers in the encoder and decoder")
    return {1} if found else set()
