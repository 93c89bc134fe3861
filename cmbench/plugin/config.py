"""Hyper-parameters that every method shares, as validated models.

A recipe is a table of a TOML file validated by the method's own subclass of :class:`MethodConfig`:
unknown keys are forbidden and every field has a description with its unit.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from cmbench.plugin.specs import MAX_BATCH

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
#: Larger numbers are mistakes, and what is computed from them overflows.
LARGEST_NUMBER = 1e12


def _takes_bool(annotation: Any) -> bool:
    """Say whether a bool is a value of its own under this type, alone or in a union."""
    return annotation in (bool, Any) or any(map(_takes_bool, get_args(annotation)))


class Options(BaseModel):
    """Base of all configuration: frozen, keyword-only, no unknown keys, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_odd_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse huge numbers, and ``true`` and ``false``, which pydantic reads as 1 and 0."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        given = value if isinstance(value, list | tuple) else (value,)
        if any(isinstance(v, bool) for v in given) and not _takes_bool(annotation):
            raise ValueError("true and false are not numbers")
        if any(isinstance(v, int | float) and LARGEST_NUMBER < abs(v) < math.inf for v in given):
            raise ValueError(f"numbers go up to {LARGEST_NUMBER:g}")
        return value


class OptimizerConfig(Options):
    """An optimizer with its learning-rate schedule."""

    name: Literal["adam", "adamw", "radam"] = Field("adam", description="algorithm")
    lr: Positive = Field(1e-3, description="peak learning rate")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="moment decay rates per step"
    )
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.0, description="decoupled for adamw, L2 otherwise")
    warmup_kimg: NonNegative = Field(0.0, description="linear ramp-up, thousands of images")
    decay: Literal["constant", "linear", "cosine", "inverse-sqrt"] = Field(
        "constant", description="after the ramp-up; linear and cosine end at zero with the phase"
    )
    decay_ref_steps: Positive = Field(
        35_000.0, description="steps after which inverse-sqrt decay starts (EDM2's t_ref)"
    )
    grad_clip: Positive | None = Field(None, description="maximal L2 norm of the whole gradient")


class EMAConfig(Options):
    """An exponential moving average of the weights: give exactly one of the three widths."""

    halflife_kimg: Positive | None = Field(None, description="half-life, thousands of images")
    decay: Fraction | None = Field(None, description="decay per step, as many papers state it")
    sigma_rel: Annotated[float, Field(gt=0, lt=0.28)] | None = Field(
        None, description="relative width of a power-function average (EDM2 eq. 4)"
    )
    rampup_ratio: Positive | None = Field(
        None, description="cap of the half-life as a share of the images seen (EDM: 0.05)"
    )

    @model_validator(mode="after")
    def _one_width(self) -> EMAConfig:
        given = [w for w in (self.halflife_kimg, self.decay, self.sigma_rel) if w is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of halflife_kimg, decay, sigma_rel")
        return self

    @property
    def label(self) -> str:
        """Name of this average in checkpoints and records."""
        if self.halflife_kimg is not None:
            return f"halflife-{self.halflife_kimg:g}kimg"
        if self.decay is not None:
            return f"decay-{self.decay:g}"
        return f"power-{self.sigma_rel:g}"


class MethodConfig(Options):
    """What every method's configuration has; a method adds its own fields."""

    network: dict[str, Any] = Field(
        description="architecture: its `name` and the options of that network's own config"
    )
    teacher: str | None = Field(
        None,
        description="diffusion model to start from or distil: `METHOD:RECIPE` (found or trained "
        "first), `run:PATH` (a finished run), `import:NAME` (see `cmbench import`), or `analytic` "
        "(the exact model of a dataset that has one)",
    )
    conditional: bool = Field(False, description="train and sample with class labels")
    sigma_data: Positive | None = Field(
        None, description="standard deviation of the data; the dataset's if not given"
    )
    batch_size: int = Field(
        128, gt=0, le=MAX_BATCH, description="images per training step, over all processes"
    )
    microbatch_size: int | None = Field(
        None, gt=0, description="images per forward pass of one process; gradients accumulate"
    )
    duration_kimg: NonNegative = Field(
        description="training length, thousands of images (a phase's, for staged methods)"
    )
    optimizer: OptimizerConfig = Field(
        default_factory=lambda: OptimizerConfig(), description="optimizer of the generator"
    )
    ema: tuple[EMAConfig, ...] = Field(
        (EMAConfig(halflife_kimg=500.0, rampup_ratio=0.05),),
        description="averages of the weights; the first is the one that is sampled",
    )
    augment: Fraction = Field(0.0, description="probability of EDM's augmentations")
    xflip: bool = Field(False, description="mirror training images at random")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type of network passes in training; weights stay fp32"
    )
    checkpoint_kimg: Positive | None = Field(
        None, description="images between checkpoints, thousands; a tenth of a phase if not given"
    )
