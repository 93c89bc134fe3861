"""State dicts that ``torch.save`` wrote (OpenAI's ``.pt``), by torch's own restricted loader."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmbench.data.pickles import BROKEN, RefusedName, refused_error
from cmbench.errors import UserError
from cmbench.files import corrupt
from cmbench.importers.imported import MOST_TIMES

_REFUSED = re.compile(
    r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class|operand)[^\n]*?([\w.]+\.\w+)"
)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a ``torch.save`` file; nothing of the file is executed.

    Raises ``UserError`` if it is truncated, or holds anything but tensors and plain data.
    """
    who = f"checkpoint {path}"
    _require_stored(path, who)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old protocols: they change nothing
            data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (*BROKEN, RuntimeError) as error:
        text = str(error)
        refused = _REFUSED.search(text)
        if refused and "corrupt" not in text:
            raise refused_error(who, RefusedName(refused[1] or refused[2])) from None
        raise corrupt(who, "pickle", error) from None
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(v, Tensor) for v in data.values()):
        names = list(map(str, data))[:5] if isinstance(data, dict) else [type(data).__name__]
        what = ", ".join(names)
        raise UserError(
            who,
            f"holds no state dict (it holds {what})",
            allowed="tensors by name",
            remedy="save the network's state_dict() alone",
        )
    return data


def _require_stored(path: Path, who: str) -> None:
    """Raise ``UserError`` for a zip that unpacks to far more than it holds.

    torch writes its zips unpacked, but would read a packed one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except (OSError, *BROKEN, zipfile.BadZipFile):
        return  # the older format, or damaged: torch's reader says so
    size = path.stat().st_size
    if unpacked > MOST_TIMES * size:
        raise UserError(
            who,
            f"takes {unpacked:,} bytes unpacked, {size:,} packed",
            allowed=f"up to {MOST_TIMES} times its size",
            remedy="torch does not write such files: get it from its original source",
        )
