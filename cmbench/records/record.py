"""Records: the immutable JSON file that one finished, failed or skipped cell leaves.

A record keeps everything that decides the number. It is written once, to a temporary name that is
then renamed, and it is untrusted when it is read: unknown keys, wrong types, non-finite numbers and
future versions are errors that name the file and the field.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cmbench.errors import UserError
from cmbench.files import FormatError, read_json, reading, write_atomically
from cmbench.records.binomial import binomial_tail
from cmbench.records.cost import SamplingCost, TeacherCost
from cmbench.records.fields import (
    LARGEST,
    Count,
    Finite,
    Name,
    Part,
    PathText,
    RowLabel,
    Seed,
    Sha256,
    Sigma,
)

#: Version 2 calls the noise levels ``sigmas`` (version 1: ``times``) and keeps ``first_samples``.
#: Version 3 keeps what the user changed of the recipe (``overrides``) and rows' names as given.
#: Version 4 keeps what sampling and training cost (``cost``, ``training.teacher_cost``).
SCHEMA_VERSION = 4
#: Text chunk of a sample grid's PNG: the size of one image, ``WIDTHxHEIGHT`` in pixels. Pages cut
#: grids along it, so that one seed of several methods stands in one row.
GRID_TILE = "tile"

Status = Literal["finished", "failed", "skipped"]
Kind = Literal["measured", "imported checkpoint", "scored samples"]


class MetricRecord(Part):
    """One number with everything that decides it."""

    value: Finite | None = Field(description="the number; null if it could not be computed")
    higher_is_better: bool
    key: str = Field(description="records are compared only if their keys are equal")
    standard_error: Finite | None = Field(None, description="of the value, within this cell")
    interval: tuple[Finite, Finite] | None = Field(None, description="95 % interval in this cell")
    unit: str = ""
    detail: dict[str, Any] = Field(default_factory=dict, description="what else was computed")


class PluginRecord(Part):
    """The distribution that the method came from."""

    name: str
    distribution: str
    version: str


class GeneratedRecord(Part):
    """What the generated data of a phase have cost, whichever run has made them."""

    pairs: Count
    network_evaluations: Count
    seconds: Finite
    bytes: Count = Field(description="on disk, without the noise, which is drawn again")


class TrainingRecord(Part):
    """How the generator came to be."""

    run: PathText = Field(description="run id, <dataset>/<method>-<recipe>-s<seed>-<hash>")
    seed: Seed
    recipe: str
    config: dict[str, Any] = Field(description="the resolved recipe, every key")
    config_sha256: str
    teacher: str | None = Field(None, description="run id or name of the teacher, if there is one")
    parameters: Count = Field(description="of the network that is sampled")
    images_seen: Count
    network_evaluations: Count = Field(
        0, description="images through any network in training; a backward pass counts as two"
    )
    seconds_by_phase: dict[str, Finite] = Field(default_factory=dict)
    generated: dict[str, GeneratedRecord] = Field(
        default_factory=dict,
        description="by phase, the data that a model made for it; evaluations and seconds above "
        "include them",
    )
    checkpoint_sha256: str = ""
    ema: str = Field("", description="which average of the weights was sampled")
    snapshots: dict[Name, Sha256] = Field(
        default_factory=dict,
        description="what a reconstructed average was made from: SHA-256 by file of the run's "
        "`snapshots/`; empty where the average was kept",
    )
    overrides: dict[str, Any] | None = Field(
        None, description="by dotted key, what differs from the recipe; null if it is not known"
    )
    teacher_cost: TeacherCost | None = Field(
        None, description="null without a teacher, and if its training is not known"
    )


#: Significance at which samples are called copies. Every row is tested, so it is small.
COPIES_ALPHA = 1e-4


#: By option, what records call the precision of a network's passes.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: By option, what records call the way in which class labels were chosen.
LABELS = {
    "drawn": "class frequencies of the dataset",
    "quota": "exact quota of the class frequencies",
}


class SamplingRecord(Part):
    """How the images were made."""

    nfe: Count = Field(description="network evaluations per image, declared; 0 if unknown")
    adaptive: bool = Field(
        False, description="the sampler chooses its steps: nfe is the most, nfe_measured the mean"
    )
    nfe_measured: Finite | None = Field(None, description="counted by wrapping the network")
    sampler: str = ""
    sigmas: list[Sigma] = Field(
        default_factory=list, description="noise levels, descending; empty for methods without"
    )
    tuned: dict[str, Any] | None = Field(None, description="how they were tuned, if they were")
    seed: Seed
    num_samples: Count
    protocol_samples: Count = Field(description="what the dataset's protocol asks for")
    batch_size: Count
    dtype: str = Field(
        "float32", description="of the network's passes; bfloat16 and float16 by autocast"
    )
    quantize: str = ""
    labels: str = Field("", description="how class labels were drawn")
    seconds: Finite | None = Field(None, description="wall time of sampling, all batches")
    images_per_s: Finite | None = Field(
        None,
        description="of all batches after the first, which compiles and warms up; up to version 3 "
        "of all batches",
    )
    overrides: dict[str, Any] | None = Field(
        None,
        description="`ema`, `sampler` and `sigmas` if the user chose others than the recipe's; "
        "null if it is not known",
    )


class FirstSamples(Part):
    """Checksums of the first samples, which `cmbench verify` makes again.

    On the same hardware and torch the checksum must be equal. Elsewhere no pixel of the sample grid
    may differ by more than ``pixel_tolerance`` levels of 255, and the mean feature by no more than
    ``feature_tolerance`` of its norm.
    """

    count: Count
    pixels_sha256: Sha256 = Field(description="of the quantized pixels [N, C, H, W] in order")
    mean_feature: list[Finite] = Field(description="mean over these samples, six digits")
    pixel_tolerance: Finite
    feature_tolerance: Finite


class DatasetRecord(Part):
    """What the images are compared with."""

    name: Name
    revision: str = ""
    sha256: str = ""
    reference_count: Count | None = None
    reference_sha256: str = ""
    extractor: str = ""
    extractor_sha256: str = ""


class EnvironmentRecord(Part):
    """Where it ran."""

    cmbench: str
    python: str
    packages: dict[str, str] = Field(default_factory=dict)
    git_commit: str | None = None
    git_dirty: bool | None = None
    platform: str = ""
    cpu: str = ""
    threads: Count | None = None
    gpu: str | None = None
    world_size: Count = 1

    @property
    def hardware(self) -> str:
        """The GPU, or the processor and how many threads were used: what times belong to."""
        return self.gpu or f"{self.cpu}, {self.threads or 'unknown'} threads"


class Artifact(Part):
    """A file beside the record (a sample grid, a training curve)."""

    file: PathText = Field(description="path relative to the record's folder")
    sha256: str


class CopyCount(Part):
    """How many samples are copies of real images, against real images that were held out.

    A held-out image is a real one that is compared with all the others.
    """

    samples: Count = Field(description="samples that were compared with the real images")
    copies: Count = Field(description="of these, copies of a real image")
    held_out: Count = Field(description="real images that were compared with the others")
    held_out_copies: Count = Field(description="of these, copies of another real image")

    @property
    def p(self) -> float:
        """Chance of so many copies among the samples if their rate were that of held-out images.

        Given the number of copies in both sets together, those among the samples are binomial
        (the conditional test of two Poisson rates; conservative for shares that are not small).
        """
        if not (self.copies and self.samples and self.held_out):
            return 1.0
        share = self.samples / (self.samples + self.held_out)
        return binomial_tail(self.copies, self.copies + self.held_out_copies, share)

    @property
    def significant(self) -> bool:
        """Whether there are more copies than among held-out images."""
        return self.p <= COPIES_ALPHA


class Record(Part):
    """One cell: a run at one NFE, with one sampler setting and one sampling seed."""

    schema_version: int = SCHEMA_VERSION
    cell: Name
    status: Status
    kind: Kind = "measured"
    reason: str = Field("", description="why the cell failed or was skipped")
    created: str = Field(description="UTC time, ISO 8601")
    command: str = Field("", description="the command that reproduces the record")
    run_file_sha256: str = Field("", description="hash of the run file; empty without one")
    method: Name
    label: RowLabel = Field(
        "", description="the row's name as the user gave it; empty where `method` is the same"
    )
    title: str = ""
    family: str = ""
    reference: str = ""
    year: Count = 0
    conditional: bool = False
    plugin: PluginRecord
    dataset: DatasetRecord
    training: TrainingRecord
    sampling: SamplingRecord
    first_samples: FirstSamples | None = Field(None, description="null if nothing was sampled here")
    cost: SamplingCost | None = Field(None, description="null if it was not measured")
    rank_metric: str = Field("", description="the metric that leaderboards rank by")
    metrics: dict[str, MetricRecord] = Field(default_factory=dict)
    environment: EnvironmentRecord
    artifacts: dict[str, Artifact] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    copies: dict[Literal["pixels", "features"], CopyCount] = Field(
        default_factory=dict, description="empty where real images were not at hand"
    )

    @property
    def sha256(self) -> str:
        """Hash of the record's canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the canonical JSON (sorted keys, no NaN), the bytes that are stored.

        A record that was written under an older version keeps the bytes of that version.
        """
        data = self.model_dump(mode="json")
        if self.schema_version < 4:
            del data["cost"], data["training"]["teacher_cost"]
        if self.schema_version < 3:
            del data["training"]["overrides"], data["sampling"]["overrides"], data["label"]
        if not self.copies:  # records that were written without it keep their bytes
            del data["copies"]
        if not self.run_file_sha256:
            del data["run_file_sha256"]
        if not self.training.generated:
            del data["training"]["generated"]
        if not self.sampling.adaptive:
            del data["sampling"]["adaptive"]
        if self.schema_version == 1:
            data["sampling"]["times"] = data["sampling"].pop("sigmas")
            del data["first_samples"]
            if not self.training.snapshots:
                del data["training"]["snapshots"]
        return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def finite_or_none(value: float | None) -> float | None:
    """Return ``value``, or None where it is NaN, infinite or above `LARGEST`: no record has it."""
    return value if value is not None and abs(value) <= LARGEST else None


def write_record(record: Record, folder: Path) -> Path:
    """Write ``record`` as ``folder/<cell>.json``, atomically; an existing record is never changed.

    A finished record stays as it is. A failed or skipped one may be replaced by a later attempt.
    """
    path = folder / f"{record.cell}.json"
    if path.exists() and read_record(path).status == "finished":
        raise UserError(
            f"record {path}",
            "is already finished and records are immutable",
            remedy="use another workspace, or move the file away to measure the cell again",
        )
    write_atomically(path, record.to_json().encode())
    return path


def read_record(path: Path) -> Record:
    """Read and validate a record; raise ``UserError`` naming file and field otherwise."""
    who = f"record {path}"
    with reading(who, "check the file; restore it or delete it to measure the cell again"):
        data = read_json(path, LARGEST)
        if not isinstance(data, dict):
            raise FormatError("is not a JSON object")
        version = data.get("schema_version")
        if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
            raise UserError(
                who,
                f"has schema version {version!r}",
                allowed=f"1 to {SCHEMA_VERSION}",
                remedy="update cmbench to read it",
            )
        sampling = data.get("sampling")
        if version == 1 and isinstance(sampling, dict) and "times" in sampling:
            sampling["sigmas"] = sampling.pop("times")
        return Record.model_validate(data)
