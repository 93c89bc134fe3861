"""Where samples to be scored come from: one interface for many formats.

====================  =============================================================================
folder, ``.zip``      PNG (or see :mod:`cmbench.data.pictures`), recursively; EDM's ``dataset.json``
``.npz``              OpenAI's sample batch (``arr_0``, labels in ``arr_1``), or ``images``
``.npy``              an array ``[N, H, W, C]`` or ``[N, C, H, W]``
``module:function``   a Python generator, see :mod:`cmbench.samples.generators`
folder with
``model_index.json``  a diffusers pipeline, see :mod:`cmbench.samples.pipelines`
====================  =============================================================================
"""

from __future__ import annotations

import re
from pathlib import Path

from cmbench.errors import MissingError, UserError
from cmbench.samples.arrays import ArraySamples
from cmbench.samples.generators import GeneratorSamples
from cmbench.samples.images import ImageSamples
from cmbench.samples.pipelines import INDEX, DiffusersSamples
from cmbench.samples.source import ReadOptions, SampleSource

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def open_samples(path: str, options: ReadOptions | None = None) -> SampleSource:
    """Return the source of samples at ``path``, a file, a folder or ``module:function``.

    Raises:
        MissingError: the path does not exist.
        UserError: no reader fits it.
    """
    options = options or ReadOptions()
    found = Path(path)
    if not found.exists() and _ENTRY_POINT.fullmatch(path):
        return GeneratorSamples.load(path, options)
    if not found.exists():
        raise MissingError(
            f"samples {path}",
            "does not exist",
            allowed="a folder, .zip, .npz, .npy, module:function, a diffusers pipeline, the whole "
            "id or the folder of a run, or import:NAME",
            remedy="check the path or the id",
        )
    if found.is_dir():
        if (found / INDEX).is_file():
            return DiffusersSamples.load(found, options)
        return ImageSamples.open(found, options)
    readers = {".zip": ImageSamples.open, ".npz": ArraySamples.open, ".npy": ArraySamples.open}
    if found.suffix.lower() not in readers:
        raise UserError(
            f"samples {path}",
            f"a {found.suffix or 'nameless'} file",
            allowed="a folder, .zip, .npz or .npy",
            remedy="unpack it and give the folder",
        )
    return readers[found.suffix.lower()](found, options)
