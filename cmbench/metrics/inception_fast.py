"""The 2015 Inception network rearranged for speed; the same function up to rounding.

Built from torch-fidelity's module with its weights:

- BatchNorm folded into the convolutions, the ReLU fused to them, channels-last memory;
- the TF1 resize and the scaling to [-1, 1) as two matrix products;
- 1x1 convolutions that read one input merged into one, the pooling branch's included: an average
  pool and a 1x1 convolution commute, so the convolution goes first and the pool sees less.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

INPUT_SIZE = 299
#: sFID reads the first channels of ``mixed_6/conv`` (guided-diffusion's evaluator).
SPATIAL_CHANNELS = 7
_STEM = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
)
_A, _C = ("Mixed_5b", "Mixed_5c", "Mixed_5d"), ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")


def tf1_resize_matrix(size: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the matrix ``[299, size]`` of TensorFlow 1's bilinear resize along one axis.

    No antialiasing and no half-pixel centres: output i reads position i * size / 299, computed in
    float32 as TensorFlow does.
    """
    position = torch.arange(INPUT_SIZE, dtype=torch.float32) * torch.tensor(
        size / INPUT_SIZE, dtype=torch.float32
    )
    low = position.long()
    high = (low + 1).clamp_max(size - 1)
    weight = (position - low.float()).to(dtype)
    rows = torch.arange(INPUT_SIZE)
    matrix = torch.zeros(INPUT_SIZE, size, dtype=dtype)
    matrix.index_put_((rows, low), 1 - weight, accumulate=True)
    matrix.index_put_((rows, high), weight, accumulate=True)
    return matrix


class FastInception(nn.Module):
    """Features of ``[N, 3, H, W]`` pixels in [0, 255], by layer name as in torch-fidelity."""

    def __init__(self, library: nn.Module) -> None:
        super().__init__()
        network = fold_batch_norm(copy.deepcopy(library))
        self.stem = nn.ModuleList(
            nn.Sequential(*(network.get_submodule(name) for name in names)) for names in _STEM
        )
        self.mixed_a = nn.ModuleList(_MixedA(network.get_submodule(name)) for name in _A)
        self.mixed_6a = network.get_submodule("Mixed_6a")
        self.mixed_c = nn.ModuleList(_MixedC(network.get_submodule(name)) for name in _C)
        self.mixed_7a = network.get_submodule("Mixed_7a")
        self.mixed_7b = _MixedE(network.get_submodule("Mixed_7b"), average=True)
        self.mixed_7c = _MixedE(network.get_submodule("Mixed_7c"), average=False)
        self.classes = nn.Parameter(network.get_parameter("fc.weight"), requires_grad=False)
        self._matrices: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(
        self, pixels: Tensor, last: str = "logits_unbiased", *, spatial: bool = False
    ) -> dict[str, Tensor]:
        """Return layers "64", "192", "768", "2048", "logits_unbiased" up to ``last``.

        With ``spatial`` also "spatial" ``[N, 2023]``: 17 x 17 x 7, channels last, as in TensorFlow.
        """
        return self.layers(self.resize(pixels), last, spatial=spatial)

    def layers(
        self, x: Tensor, last: str = "logits_unbiased", *, spatial: bool = False
    ) -> dict[str, Tensor]:
        """Return the same of images ``[N, 3, 299, 299]`` already resized and scaled to [-1, 1]."""
        found: dict[str, Tensor] = {}
        for name, stage in (("64", self.stem[0]), ("192", self.stem[1])):
            x = stage(x)
            found[name] = x.mean((2, 3))
            if name == last:
                return found
        for block in self.mixed_a:
            x = block(x)
        x = self.mixed_6a(x)
        for name, block in zip(_C, self.mixed_c, strict=True):
            x = block(x)
            if spatial and name == "Mixed_6d":
                # The block's output begins with its branch1x1, which is mixed_6/conv.
                found["spatial"] = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        found["768"] = x.mean((2, 3))
        if last == "768":
            return found
        x = self.mixed_7c(self.mixed_7b(self.mixed_7a(x))).mean((2, 3))
        found["2048"] = x
        if last != "2048":
            found["logits_unbiased"] = x @ self.classes.T
        return found

    def resize(self, pixels: Tensor) -> Tensor:
        """Return (TF1-bilinear 299x299 - 128) / 128, channels-last where the weights are."""
        rows = self._matrix(pixels.shape[2], pixels) / 128
        columns = self._matrix(pixels.shape[3], pixels)
        return self.in_layout(rows @ pixels @ columns.T - 1)

    def in_layout(self, x: Tensor) -> Tensor:
        """Return ``x`` in the memory layout of the weights."""
        first = self.stem[0].get_submodule("0.conv").get_parameter("weight")
        channels_last = first.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return x.contiguous(memory_format=layout)

    def _matrix(self, size: int, like: Tensor) -> Tensor:
        key = (size, like.device, like.dtype)
        if key not in self._matrices:
            self._matrices[key] = tf1_resize_matrix(size, dtype=like.dtype).to(like.device)
        return self._matrices[key]


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """Turn every convolution, ``bn`` and ReLU of one module into a :class:`_ConvRelu`, in place."""
    for module in list(network.modules()):
        for name, block in list(module.named_children()):
            conv, norm = getattr(block, "conv", None), getattr(block, "bn", None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, _ConvRelu(fuse_conv_bn_eval(conv, norm)))
    return network


class _ConvRelu(nn.Module):
    """A convolution and its ReLU, in one pass over memory where oneDNN offers it."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        if conv.kernel_size == (1, 1):
            return pointwise(conv, x).relu_()
        if _FUSED is None or x.device.type != "cpu" or x.dtype != torch.float32:
            return conv(x).relu_()  # type: ignore[no-any-return]
        return _FUSED(  # type: ignore[no-any-return]
            x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, 1, "relu", [], ""
        )


def _fused_convolution() -> Any:
    """Return torch's oneDNN convolution with a ReLU behind it (inductor's), or None without it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


_FUSED = _fused_convolution()


class _Merged1x1(nn.Module):
    """Several 1x1 convolutions of one input as one; returns their outputs before the ReLU."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        convs = [block.get_submodule("conv") for block in blocks]
        assert all(isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1) for conv in convs)
        weight = torch.cat([conv.get_parameter("weight") for conv in convs])
        self.widths = [conv.get_parameter("weight").shape[0] for conv in convs]
        self.conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
        self.conv.weight.data = weight
        self.conv.bias = nn.Parameter(torch.cat([conv.get_parameter("bias") for conv in convs]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = torch.split(pointwise(self.conv, x), self.widths, 1)
        return parts


def pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return a 1x1 convolution; channels-last on the CPU it is one matrix product.

    There torch takes such convolutions of small batches through its slow path, on one thread.
    """
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return conv(x)  # type: ignore[no-any-return]
    return functional.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(
        0, 3, 1, 2
    )


def _average(x: Tensor) -> Tensor:
    """3x3 average that does not count the padding (TensorFlow's)."""
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _MixedA(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        part = block.get_submodule
        self.first = _Merged1x1(
            [part(n) for n in ("branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool")]
        )
        self.five = part("branch5x5_2")
        self.three = nn.Sequential(part("branch3x3dbl_2"), part("branch3x3dbl_3"))

    def forward(self, x: Tensor) -> Tensor:
        one, five, three, pool = self.first(x)
        five, three = self.five(five.relu()), self.three(three.relu())
        return torch.cat([one.relu(), five, three, _average(pool).relu()], 1)


class _MixedC(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        part = block.get_submodule
        self.first = _Merged1x1(
            [part(n) for n in ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")]
        )
        self.seven = nn.Sequential(*(part(f"branch7x7_{i}") for i in (2, 3)))
        self.deep = nn.Sequential(*(part(f"branch7x7dbl_{i}") for i in (2, 3, 4, 5)))

    def forward(self, x: Tensor) -> Tensor:
        one, seven, double, pool = self.first(x)
        seven, double = self.seven(seven.relu()), self.deep(double.relu())
        return torch.cat([one.relu(), seven, double, _average(pool).relu()], 1)


class _MixedE(nn.Module):
    """Mixed_7b averages in its pooling branch; Mixed_7c takes the maximum, a quirk of 2015."""

    def __init__(self, block: nn.Module, *, average: bool) -> None:
        super().__init__()
        part = block.get_submodule
        names = ["branch1x1", "branch3x3_1", "branch3x3dbl_1"]
        self.average = average
        self.first = _Merged1x1([part(n) for n in names + ["branch_pool"] * average])
        self.pool = None if average else part("branch_pool")
        self.three = nn.ModuleList([part("branch3x3_2a"), part("branch3x3_2b")])
        self.deep = part("branch3x3dbl_2")
        self.ends = nn.ModuleList([part("branch3x3dbl_3a"), part("branch3x3dbl_3b")])

    def forward(self, x: Tensor) -> Tensor:
        one, three, double, *rest = self.first(x)
        if self.pool is None:
            pool = _average(rest[0]).relu()
        else:
            pool = self.pool(functional.max_pool2d(x, 3, 1, 1))
        three, double = three.relu(), self.deep(double.relu())
        branches = [conv(three) for conv in self.three] + [conv(double) for conv in self.ends]
        return torch.cat([one.relu(), *branches, pool], 1)
