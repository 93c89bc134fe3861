"""What an image costs: measured after warm-up, apart from compilation and other work."""

from __future__ import annotations

import pytest
import torch
from test_streams_of_samples import sampler
from torch import Tensor, nn

from cmbench.networks.flops import flop_counter
from cmbench.records.cost import SamplingCost
from cmbench.sampling import Sampler, cost, stream
from cmbench.sampling.cost import Decoder, measure_cost
from cmbench.sampling.memory import peak_memory_bytes, reset_peak_memory


class Device:
    """A clock, and a device whose work is queued: waiting for it takes time, launching does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.queued = 0.0, 0.0
        monkeypatch.setattr(stream, "synchronize", self.synchronize)
        monkeypatch.setattr(cost, "synchronize", self.synchronize)
        for module in (stream, cost):
            monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def synchronize(self, device: object = None) -> None:
        self.now += self.queued
        self.queued = 0.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def slow(sampler: Sampler, device: Device, first_s: float, per_image_s: float) -> Sampler:
    """Let the network take time on the emulated device, the first call more (it compiles)."""
    calls: list[int] = []

    def work(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        device.queued += per_image_s * len(args[0])
        if not calls:
            device.now += first_s
        calls.append(1)

    for net in sampler.nets.values():
        net.module.register_forward_pre_hook(work)
    return sampler


def test_speed_is_that_of_sampling_alone(device: Device) -> None:
    """60 s to compile, and per batch 2.5 s of extractor that still run when the next one starts."""
    made = slow(sampler()[0], device, first_s=60.0, per_image_s=0.01)
    for _ in made.stream(8, 2):
        device.queued += 2.5  # launched, not waited for
    assert made.images_per_s == pytest.approx(100.0)
    assert made.seconds == pytest.approx(60.0 + 8 * 0.01)


def test_one_batch_has_no_speed_of_its_own(device: Device) -> None:
    made = slow(sampler()[0], device, first_s=60.0, per_image_s=0.01)
    list(made.stream(2, 2))
    assert made.images_per_s is None


def test_costs_are_measured_after_warm_up(device: Device) -> None:
    made = slow(sampler()[0], device, first_s=60.0, per_image_s=0.01)
    list(made.stream(64, 16))
    device.queued += 2.5
    found = measure_cost(made, 16, "a device")
    assert found.hardware == "a device"
    assert found.latency_s == pytest.approx(0.01)
    assert found.latency_range_s == (pytest.approx(0.01), pytest.approx(0.01))
    assert 3 <= found.latency_repetitions <= 20
    assert found.throughput_images_per_s == pytest.approx(100.0)
    assert found.decoder is None


def test_the_fastest_batch_size_is_found(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler()[0]

    def work(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        # Launching takes 4 ms; an image 1 ms, and 3 ms in batches above 32 (they leave the cache).
        device.queued += 0.004 + len(args[0]) * (0.003 if len(args[0]) > 32 else 0.001)

    for net in made.nets.values():
        net.module.register_forward_pre_hook(work)
    list(made.stream(1280, 128))
    found = measure_cost(made, 128, "a device")
    assert found.throughput_batch_size == 32
    assert found.throughput_images_per_s == pytest.approx(32 / 0.036)
    assert found.latency_s == pytest.approx(0.005)


def test_images_are_the_same_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler()[0]
    before = torch.get_rng_state()
    first = [b.images for b in made.stream(4, 2)]
    measure_cost(made, 2, "a device", Decoder(lambda x: x, 0))
    assert torch.equal(torch.cat(first), torch.cat([b.images for b in made.stream(4, 2)]))
    assert torch.equal(before, torch.get_rng_state())


def test_the_decoder_is_apart() -> None:
    weight = torch.ones(3, 3, 1, 1)

    def decode(latents: Tensor) -> Tensor:
        pictures = latents.repeat(1, 3, 1, 1)[:, :3]
        return torch.nn.functional.conv2d(pictures, weight)

    made = sampler()[0]
    images = torch.cat([b.images for b in made.stream(2, 2)])
    found = measure_cost(made, 2, "a device", Decoder(decode, 9))
    assert found.decoder is not None
    assert found.decoder.parameters == 9
    assert found.decoder.flops_per_image == 2 * 9 * images[0, 0].numel()
    assert SamplingCost.model_validate(found.model_dump()) == found


def test_flops_of_attention_count_on_the_cpu() -> None:
    query, key = torch.randn(2, 3, 8, 16), torch.randn(2, 3, 12, 16)
    with flop_counter() as counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 8 * 12 * 16)


def test_what_the_counter_cannot_follow_has_no_flops() -> None:
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise NotImplementedError

    assert cost._flops(work) is None
    assert len(calls) == 2, "warmed up all the same"


def test_peak_memory_is_since_the_reset() -> None:
    device = torch.device("cpu")
    if not reset_peak_memory(device):
        pytest.skip("the peak of a process cannot be reset here")
    large = torch.ones(64 * 2**20 // 4)
    with_large = peak_memory_bytes(device)
    del large
    assert reset_peak_memory(device)
    after = peak_memory_bytes(device)
    assert with_large is not None
    assert after is not None
    assert after < with_large - 32 * 2**20
