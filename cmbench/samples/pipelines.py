"""Samples of a diffusers pipeline, whose code and classes all come from diffusers itself.

``model_index.json`` names the class of the pipeline and of each component. Some versions of
diffusers run Python files of the folder that it names. Here the index is checked before anything is
loaded.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from cmbench.errors import MissingError, UserError, described
from cmbench.files import read_json, readable, reading
from cmbench.samples.generators import Generate, GeneratorSamples
from cmbench.samples.source import PIPELINE, ReadOptions
from cmbench.seeds import derive_seed

INDEX = "model_index.json"
_PIPELINE_CLASS = "_class_name"
_ALLOWED = "a pipeline and components of the library diffusers"
_AGAIN = "nothing of it was run; get the folder from its original source"


def named_classes(folder: Path) -> dict[str, str]:
    """Return the class of each component, and of the pipeline under ``_class_name``.

    Raises:
        UserError: the index cannot be read, or names code that is not of diffusers.
    """
    who = f"samples {folder}"
    with reading(f"{who}, {INDEX}", "get the folder from its original source"):
        index = read_json(folder / INDEX)
    if not isinstance(index, dict) or _PIPELINE_CLASS not in index:
        problem = f"{INDEX} has no {_PIPELINE_CLASS}"
        raise UserError(who, problem, allowed=_ALLOWED, remedy=_AGAIN)
    classes = {}
    for name, value in index.items():
        if name == _PIPELINE_CLASS:
            value = ["diffusers", value]
        elif name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue  # settings, and components that are left out
        library, chosen = value if len(value) == 2 else (value, "")
        if library != "diffusers" or not isinstance(chosen, str) or not name.isidentifier():
            problem = f"{INDEX} names code that is not of diffusers: {name} = {value!r}"
            raise UserError(who, problem, allowed=_ALLOWED, remedy=_AGAIN)
        classes[name] = chosen
    return classes


def _require_known(diffusers: Any, classes: dict[str, str], who: str) -> None:
    for name, chosen in classes.items():
        bases = ["ModelMixin", "SchedulerMixin"]
        if name == _PIPELINE_CLASS:
            bases = ["DiffusionPipeline"]
        found = getattr(diffusers, chosen, None)
        fits = tuple(getattr(diffusers, base) for base in bases)
        if not isinstance(found, type) or not issubclass(found, fits):
            problem = f"{INDEX} names {name} = {chosen!r}, which diffusers {diffusers.__version__}"
            problem += f" does not have as a {' or '.join(bases)}"
            raise UserError(who, problem, allowed=_ALLOWED, remedy=_AGAIN)


class DiffusersSamples(GeneratorSamples):
    """A diffusers pipeline from a folder: nothing is downloaded, safetensors only.

    Running it takes ``ReadOptions.run_pipeline``; custom code is refused even so.
    """

    kind = PIPELINE
    _interface = "a pipeline that is called without a prompt or a class"

    @classmethod
    def load(cls, entry: str | Path, options: ReadOptions) -> Self:
        """Open the pipeline; image i starts from a generator seeded with (seed, "noise", i)."""
        who, classes = f"samples {entry}", named_classes(Path(entry))
        if not options.run_pipeline:
            raise UserError(
                who,
                f"is a {PIPELINE} ({classes[_PIPELINE_CLASS]}), whose program would be run",
                allowed="pipelines that you trust, with --run-pipeline",
                remedy=f"look at its {INDEX} and repeat with --run-pipeline; nothing of it was run",
            )
        try:
            import diffusers
        except ImportError as error:
            raise MissingError(
                who,
                "is a diffusers pipeline, and diffusers is not installed",
                remedy="pip install 'cmbench[diffusers]'",
            ) from error
        _require_known(diffusers, classes, who)
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(entry), local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # configs and tensors of an untrusted folder: any may surprise
            raise UserError(
                who,
                f"cannot be opened: {described(error)}",
                allowed="a diffusers pipeline folder with safetensors weights",
                remedy="get the folder from its original source",
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        if options.device != "cpu":
            pipeline.to(options.device)
        return cls(readable(str(entry)), cls._caller(pipeline, options), options)

    @staticmethod
    def _caller(pipeline: Any, options: ReadOptions) -> Generate:
        parameters = inspect.signature(pipeline.__call__).parameters
        extra: dict[str, Any] = {}
        if options.steps is not None and "num_inference_steps" in parameters:
            extra["num_inference_steps"] = options.steps

        def generate(indices: Tensor, seed: int) -> Any:
            generators = [
                torch.Generator().manual_seed(derive_seed(seed, "noise", int(index)))
                for index in indices
            ]
            found = pipeline(
                batch_size=len(indices), generator=generators, output_type="np", **extra
            )
            # Pipelines return [N, H, W, C] in [0, 1] for "np".
            images = torch.from_numpy(found.images).permute(0, 3, 1, 2)
            return images * 2 - 1

        return generate
