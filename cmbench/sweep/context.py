"""Plugins, workspace and device as one object that is passed around: no global state."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from cmbench.data.base import Dataset, load_dataset
from cmbench.data.custom import resolve_dataset
from cmbench.data.locations import DataLocations
from cmbench.errors import MissingError, UserError, blaming
from cmbench.metrics.extractor import Extractor
from cmbench.metrics.reference import Reference
from cmbench.plugin.manager import PluginManager
from cmbench.plugin.specs import DatasetSpec, load_object
from cmbench.records.workspace import Workspace
from cmbench.reporter import Reporter
from cmbench.sweep.threads import choose_threads
from cmbench.training.distributed import World


def choose_device(asked: str = "auto", local_rank: int | None = None) -> torch.device:
    """Return the device asked for, or the GPU if there is one, or the CPU.

    ``local_rank`` is this process's number on the machine where several train together: each takes
    the GPU of that number.

    Raises:
        UserError: the device is unknown, or one GPU is named for several processes.
        MissingError: there are fewer GPUs.
    """
    if local_rank is not None and asked.startswith("cuda:"):
        raise UserError(
            "--device",
            f"{asked!r} for several processes",
            allowed="auto, cpu, cuda",
            remedy="leave the number out: each process uses the GPU of its LOCAL_RANK",
        )
    if local_rank is not None and asked == "auto" and torch.cuda.is_available():
        asked = "cuda"
    if local_rank is not None and asked == "cuda":
        asked = "cuda:0" if _one_gpu_each() else f"cuda:{local_rank}"
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = asked.partition(":")
    if kind not in ("cpu", "cuda") or not (index.isdecimal() or asked == kind):
        raise UserError("--device", f"{asked!r}", allowed="auto, cpu, cuda, cuda:0, cuda:1 …")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        seen = f"{count} CUDA device(s)" if count else "no CUDA device"
        raise MissingError(
            "--device",
            f"{asked!r}: torch sees {seen} here",
            allowed=", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(count))]),
            remedy="install a CUDA build of torch on a machine with an NVIDIA GPU",
        )
    return torch.device(asked)


def _one_gpu_each() -> bool:
    """Return whether each process sees only its own GPU (Slurm's --gpus-per-task)."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named != "" and "," not in named and torch.cuda.device_count() == 1


@dataclass
class Context:
    """What every part of a sweep needs: plugins, workspace, device, reporter."""

    plugins: PluginManager
    workspace: Workspace
    reporter: Reporter = field(default_factory=Reporter)
    device: torch.device = field(default_factory=choose_device)
    locations: DataLocations = field(default_factory=DataLocations)
    threads: int = field(default_factory=choose_threads)
    command: str = ""
    #: hash of the run file that asked for the sweep; empty without one
    run_file_sha256: str = ""
    #: what plans and works here, for messages
    verb: str = "cmbench run"
    compile: bool = False
    #: whether networks are split over the processes (FSDP2); None splits the largest, on GPUs
    split: bool | None = None
    should_stop: Callable[[], str | None] = lambda: None
    debug: bool = False
    #: whether the device was chosen automatically (``--device auto``)
    device_found: bool = False
    #: this process among those that train together; only the leader writes
    world: World = field(default_factory=World)
    #: by dataset, opened once: the protocol's extractor with its reference
    references: dict[str, tuple[Extractor, Reference]] = field(default_factory=dict)
    _datasets: dict[str, Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # float32 means float32: torch lets convolutions fall back to TF32, which costs three digits
        # and makes records of two GPUs differ. Speed comes from precision = "bf16".
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def dataset_spec(self, name: str, who: str = "cmbench") -> DatasetSpec:
        """Return the spec of a registered dataset, of ``folder:PATH``, ``zip:PATH`` or a name that
        was prepared here. Its own name is what runs and records are filed under.
        """
        registered = self.plugins.datasets.specs
        return registered.get(name) or resolve_dataset(name, registered, self.locations, who)

    def dataset(self, name: str) -> Dataset:
        """Return the dataset, loaded once."""
        if name not in self._datasets:
            spec = self.dataset_spec(name)
            ours = spec.name in self.plugins.datasets.specs
            factory = self.plugins.datasets.load(name) if ours else load_object(spec.factory)
            remedy = "run with `cmbench --debug` for the traceback"
            with blaming(f"dataset {name!r}", "cannot be opened:", remedy=remedy):
                self._datasets[name] = load_dataset(spec, factory, self.locations)
        return self._datasets[name]

    def notify(self, hook: str, **arguments: Any) -> None:
        """Call an observer hook, in the leading process only; problems become warnings."""
        if not self.world.leads:
            return
        for problem in self.plugins.notify(hook, **arguments):
            self.reporter.warn(problem)

    @property
    def gpu(self) -> str | None:
        """Name of the GPU in use."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
