"""Carried tangents through torch.compile and DistributedDataParallel."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from network_cases import CASES, Case, build, central_difference, inputs_for, relative
from torch.nn.parallel import DistributedDataParallel

from cmbench.networks.tangent_modes import tangent_of

BY_NAME = {case.name: case for case in CASES}


def compiled_agrees(case: Case, backend: str) -> None:
    torch._dynamo.reset()
    network = build(case).train(False)
    inputs = inputs_for(network)
    x, c, dx, dc, labels, augment = inputs
    expected = central_difference(network, inputs)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    y, dy = tangent_of(compiled, x, c, dx, dc, labels, augment)
    assert relative(y, network(*inputs.point())) < 1e-5
    assert relative(dy, expected) < 1e-4, "a dropped tangent would be zero"
    y.square().sum().backward()
    grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    network(*inputs.point()).square().sum().backward()
    for ours, parameter in zip(grads, network.parameters(), strict=True):
        assert torch.allclose(ours, parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet-tiny", "edm2"])
def test_compiled_without_graph_breaks(name: str) -> None:
    compiled_agrees(BY_NAME[name], "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_with_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A cache of its own: a run that was killed leaves truncated libraries in the shared one.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    smallest = {"width": 16, "blocks": 1, "embedding_dim": 8}
    compiled_agrees(Case("mlp", "mlp", smallest, (2, 1, 1)), "inductor")


@pytest.mark.filterwarnings("ignore")
def test_compiled_with_gradient_checkpointing() -> None:
    torch._dynamo.reset()
    network = build(BY_NAME["unet-tiny"]).train(False)
    network.gradient_checkpointing = True
    inputs = inputs_for(network)
    x, c, dx, dc, labels, augment = inputs
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    y, dy = tangent_of(compiled, x, c, dx, dc, labels, augment)
    assert relative(dy, central_difference(network, inputs)) < 1e-4
    y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


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
