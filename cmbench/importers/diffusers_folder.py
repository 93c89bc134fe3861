"""diffusers' U-Net folders: ``config.json`` beside ``diffusion_pytorch_model.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmbench.data.pickles import BROKEN
from cmbench.errors import MissingError, UserError
from cmbench.files import corrupt, read_json, reading, regular
from cmbench.importers.imported import Found
from cmbench.importers.inert import plain_facts
from cmbench.importers.torch_file import load_tensors
from cmbench.importers.wrappers import unwrapped
from cmbench.networks.diffusers_names import recognize_diffusers, to_openai_names

_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_unet(path: Path) -> Path | None:
    """Return the folder of the U-Net: ``path``, or ``path/unet`` of a pipeline."""
    for folder in (path, path / "unet"):
        if (folder / "config.json").is_file():
            return folder
    return None


def weights_file(folder: Path) -> Path:
    """Return the file with the weights, the safe one first."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"diffusers folder {folder}",
        "has a config.json but no weights",
        allowed=" or ".join(_WEIGHTS),
        remedy="download the whole folder",
    )


def _config(folder: Path) -> dict[str, Any]:
    with reading(f"diffusers folder {folder}, config.json", "download it again"):
        config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "down_block_types" not in config:
        raise UserError(
            f"diffusers folder {folder}",
            "its config.json describes no U-Net",
            allowed="a UNet2DModel's config with down_block_types",
            remedy="give the folder `unet`",
        )
    return config


def load_safetensors(path: Path, who: str = "checkpoint") -> dict[str, Tensor]:
    """Read a safetensors file; ``who`` names its kind in errors.

    Raises:
        MissingError: there is no such file.
        UserError: it cannot be read, or is truncated or corrupt.
    """
    if not path.exists():
        raise MissingError(f"{who} {path}", "does not exist", remedy="give the path of the file")
    try:
        return load_file(regular(path))
    except OSError as error:
        raise unreadable_error(f"{who} {path}", error) from None
    except (SafetensorError, *BROKEN) as error:
        raise corrupt(f"{who} {path}", "safetensors", error) from None


def unreadable_error(who: str, error: OSError) -> UserError:
    """Return the error for a file that the system does not let us read."""
    return UserError(
        who,
        f"cannot be read: {error.strerror or error}",
        remedy="check that it is a file and its permissions",
    )


def read_diffusers_folder(folder: Path, resolution: int | None = None) -> Found:
    """Read a U-Net folder whose network is an ADM.

    ``resolution`` is the side of the images if the config does not contain it.
    """
    config, weights = _config(folder), weights_file(folder)
    raw = load_safetensors(weights) if weights.suffix == ".safetensors" else load_tensors(weights)
    plain, wrappers = unwrapped(raw)
    state = to_openai_names(config, plain)
    description = {"config": plain_facts(config)} | ({"stripped": wrappers} if wrappers else {})
    return Found(
        "diffusers", state, recognize_diffusers(config, state, resolution), description=description
    )
