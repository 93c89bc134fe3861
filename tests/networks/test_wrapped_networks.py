"""Carried tangents through torch.compile and DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from network_cases import CASES, FEW, Case, build, central_difference, inputs_for, relative
from torch.nn.parallel import DistributedDataParallel

from cmbench.networks.tangent_modes import tangent_of

BY_NAME = {case.name: case for case in CASES}
SMALL = {"channels": 16, "channel_mult": (1,), "blocks": 1, "channels_per_head": 8}
#: Few blocks: compiling takes seconds a block.
COMPILED = (
    Case("unet-tiny", "unet-tiny", {**SMALL, "attention_resolutions": (4,)}, (1, 8, 8), 3),
    Case("edm2", "edm2", {**SMALL, "attention_resolutions": (8,)}, (1, 8, 8)),
    Case("states", "unet-tiny", {**SMALL, "states": 4}, (1, 8, 8), 3),
)


def compiled_agrees(case: Case, backend: str, device: str = "cpu") -> None:
    torch._dynamo.reset()
    network = build(case).train(False)
    inputs = inputs_for(network)
    expected = central_difference(network, inputs)
    network.to(device)
    inputs = inputs.to(device)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    y, dy = tangent_of(compiled, *inputs)
    assert relative(y, network(*inputs.point())) < 1e-5
    assert relative(dy.cpu(), expected) < 1e-4, "a dropped tangent would be zero"
    y.square().sum().backward()
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(*inputs.point()).square().sum().backward()
    for ours, parameter in zip(grads, network.parameters(), strict=True):
        assert relative(ours, parameter.grad) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", COMPILED, ids=lambda case: case.name)
def test_compiled_without_graph_breaks(case: Case) -> None:
    compiled_agrees(case, "aot_eager")


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_gradient_checkpointing() -> None:
    torch._dynamo.reset()
    network = build(COMPILED[0]).train(False)
    network.gradient_checkpointing = True
    inputs = inputs_for(network)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    y, dy = tangent_of(compiled, *inputs)
    assert relative(dy, central_difference(network, inputs)) < 1e-4
    y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_compiled_with_inductor_on_cuda(case: Case, full_float32: None) -> None:
    compiled_agrees(case, "inductor", "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tangents_on_cuda(case: Case, full_float32: None) -> None:
    network = build(case).eval()
    inputs = inputs_for(network)
    expected = central_difference(network, inputs)
    network.to("cuda")
    inputs = inputs.to("cuda")
    x, c, dx, dc, labels, augment = inputs
    y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert torch.equal(y, network(*inputs.point()))
    assert relative(dy.cpu(), expected) < 1e-4
    channels_last = network.to(memory_format=torch.channels_last)
    _, dy = channels_last.forward_with_tangent(x, c, dx, dc, labels, augment)
    assert relative(dy.cpu(), expected) < 1e-4
    for dtype, tolerance in ((torch.bfloat16, 0.08), (torch.float16, 0.01)):
        with torch.autocast("cuda", dtype=dtype):
            y, dy = network.forward_with_tangent(x, c, dx, dc, labels, augment)
            plain = network(*inputs.point())
        assert torch.equal(y, plain)
        assert relative(dy.cpu(), expected) < tolerance
    network.train()
    torch.manual_seed(1)
    plain = network(*inputs.point())
    torch.manual_seed(1)
    assert torch.equal(network.forward_with_tangent(x, c, dx, dc, labels, augment)[0], plain)


@pytest.fixture
def full_float32() -> Iterator[None]:
    """No TF32 in convolutions: its 10-bit products are below the tolerance."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore")
def test_joint_passes_through_ddp_for_several_steps() -> None:
    """Forward-mode AD over DDP raises at the second step; carried tangents do not."""
    network, reference = (build(BY_NAME["unet-tiny"]).train(False) for _ in range(2))
    wrapped = DistributedDataParallel(network)
    x, c, dx, dc, labels, augment = inputs_for(network)
    optimizers = [torch.optim.SGD(n.parameters(), lr=1e-2) for n in (wrapped, reference)]
    for _ in range(3):
        results = []
        for module, optimizer in zip((wrapped, reference), optimizers, strict=True):
            optimizer.zero_grad()
            y, dy = tangent_of(module, x, c, dx, dc, labels, augment)
            (y - dy).square().mean().backward()
            optimizer.step()
            results.append((y, dy))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    assert relative(results[0][0], build(BY_NAME["unet-tiny"]).eval()(x, c, labels)) > 1e-3
