"""State dicts that ``torch.save`` wrote (OpenAI's ``.pt``)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from cmbench.errors import UserError
from cmbench.importers.tensors import read_torch


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a ``torch.save`` file; nothing of the file is executed.

    Raises ``UserError`` if it is truncated, or holds anything but tensors and plain data.
    """
    who = f"checkpoint {path}"
    data = read_torch(path, who)
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
