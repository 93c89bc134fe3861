"""What a generator costs: to sample an image, and to train.

Times belong to the hardware that they were measured on. They are compared between records of equal
``hardware`` only; FLOPs, parameters and counts are compared between all.
"""

from __future__ import annotations

from pydantic import Field

from cmbench.records.fields import Count, Finite, Part


class DecoderCost(Part):
    """What making pictures of one latent costs, apart from the network evaluations."""

    parameters: Count
    flops_per_image: Finite | None = None
    latency_s: Finite = Field(description="of one image: the median of the repetitions")


class SamplingCost(Part):
    """What one image costs, measured after warm-up on this machine."""

    hardware: str = Field(description="times of records with another text are not comparable")
    latency_s: Finite = Field(
        description="of one image (batch 1), not compiled: the median of the repetitions"
    )
    latency_range_s: tuple[Finite, Finite] = Field(description="lowest and highest repetition")
    latency_repetitions: Count
    throughput_images_per_s: Finite = Field(description="at the fastest batch size tried")
    throughput_batch_size: Count
    flops_per_image: Finite | None = Field(
        description="counted by torch's FlopCounterMode in a batch of 1 (a multiply-add counts as "
        "two): matrix products, convolutions, attention; null if it could not be counted"
    )
    peak_memory_bytes: Count | None = Field(
        description="while sampling at the fastest batch size: allocated on the GPU, or the whole "
        "process's resident memory on the CPU; null if it is not known"
    )
    decoder: DecoderCost | None = Field(None, description="null without a latent space")


class TeacherCost(Part):
    """What the training of a run's teacher took."""

    network_evaluations: Count
    device_hours: Finite = Field(description="wall time of all phases x processes")
