"""Which reader a checkpoint wants, and the whole way from a file to one of our networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cmbench.errors import MissingError, UserError, described
from cmbench.files import regular
from cmbench.importers.diffusers_folder import (
    find_unet,
    load_safetensors,
    read_diffusers_folder,
    unreadable_error,
    weights_file,
)
from cmbench.importers.edm_pickle import read_edm_pickle
from cmbench.importers.flax_file import is_flax, read_flax_file
from cmbench.importers.imported import Found, ImportedNetwork, Parameterization, to_ours
from cmbench.importers.torch_file import load_tensors
from cmbench.importers.wrappers import unwrapped
from cmbench.networks.recognize import Recognized, recognize

_ALLOWED = (
    "EDM/EDM2/ECT/TCM .pkl, OpenAI .pt, a diffusers U-Net folder, OpenAI's JAX checkpoint_N, "
    ".safetensors under official names"
)


#: Suffixes of what torch saved, in its older format a pickle.
_TORCH = (".pt", ".pth", ".bin")


def _is_safetensors(head: bytes, size: int) -> bool:
    """Return whether a file begins with the length of a JSON header that it has room for."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a user says about a checkpoint where the file itself does not.

    Attributes:
        part: which network of a file with several.
        parameterization: how the network's output is read, if the file's own class is not known.
        channels_per_head: width of an attention head, if it is not 64 and shapes do not tell.
        resolution: side of the images, if shapes do not determine it.
        ignored: settings of a pickle that are not known here and change nothing that is computed.
    """

    part: str = "ema"
    parameterization: Parameterization = ""
    channels_per_head: int | None = None
    resolution: int | None = None
    ignored: tuple[str, ...] = ()

    def recognize(self, tensors: Mapping[str, Tensor]) -> Recognized:
        """Recognise a state dict under official names."""
        shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        head = {"channels_per_head": self.channels_per_head} if self.channels_per_head else {}
        return recognize(shapes, resolution=self.resolution, **head)


def read_checkpoint(path: Path, **given: Any) -> ImportedNetwork:
    """Read a checkpoint from elsewhere and recognise its network from the contents.

    Args:
        path: the file, or a diffusers folder.
        given: attributes of :class:`Given`.

    Raises:
        MissingError: there is no such file.
        UserError: it is damaged, hostile, or of an unknown network; nothing of it was executed.
    """
    if not path.exists():
        raise MissingError(
            "cmbench import", f"{path} does not exist", remedy="give the path of the checkpoint"
        )
    options = Given(**given)
    try:
        found = _read(path, options)
        _check_given(found, options)
        assumed = {k: v for k, v in found.assumed.items() if getattr(options, k, None) is None}
        known = found.parameterization or options.parameterization
        return found.model_copy(update={"assumed": assumed, "parameterization": known})
    except MissingError:
        raise
    except UserError as error:
        if str(path) in str(error):
            raise
        what = error.problem if error.who == "checkpoint" else f"{error.who}: {error.problem}"
        raise UserError(
            f"checkpoint {path}", what, allowed=error.allowed, remedy=error.remedy
        ) from None
    except OSError as error:
        raise unreadable_error(f"checkpoint {path}", error) from None
    except Exception as error:  # names, shapes and values of an untrusted file: any may surprise
        raise UserError(
            f"checkpoint {path}",
            f"makes no sense ({described(error, 120)})",
            allowed=_ALLOWED,
            remedy="give the checkpoint as it was published",
        ) from None


def _check_given(found: ImportedNetwork, given: Given) -> None:
    """Raise ``UserError`` for an option that contradicts the file."""
    options = {
        "--channels-per-head": (given.channels_per_head, found.options.get("channels_per_head")),
        "--resolution": (given.resolution, found.data_shape[1]),
    }
    for option, (value, there) in options.items():
        if value not in (None, there):
            content = "has one head" if there is None else f"says {there}"
            raise UserError(
                "checkpoint", f"{option} {value}: the file {content}", remedy="leave it out"
            )


def _read(path: Path, given: Given) -> ImportedNetwork:
    if path.is_dir():
        folder = find_unet(path)
        if folder is None:
            raise UserError(
                "cmbench import",
                f"{path} is a folder without config.json",
                allowed=_ALLOWED,
                remedy="give the checkpoint itself",
            )
        return to_ours(read_diffusers_folder(folder, given.resolution), path, weights_file(folder))
    return to_ours(_read_file(path, given), path, path)


def _read_file(path: Path, given: Given) -> Found:
    with regular(path).open("rb") as file:
        head = file.read(16)
    if not head:
        raise UserError(f"checkpoint {path}", "is empty", remedy="download it again")
    if path.suffix == ".safetensors" or _is_safetensors(head, path.stat().st_size):
        return _state_dict("safetensors", load_safetensors(path), given)
    if head[:2] == b"PK" or (path.suffix in _TORCH and head[:1] == b"\x80"):
        return _state_dict("torch", load_tensors(path), given)
    if head[:1] == b"\x80":
        return read_edm_pickle(path, given.part, given.parameterization, given.ignored)
    if is_flax(head):
        return read_flax_file(path, given.part, given.resolution)
    raise UserError(
        f"checkpoint {path}",
        f"is of no known kind (it begins with {head[:4].hex(' ')})",
        allowed=_ALLOWED,
        remedy="give the checkpoint as it was published",
    )


def _state_dict(kind: str, tensors: Mapping[str, Tensor], given: Given) -> Found:
    """Recognise a state dict, without what training wrapped its network in."""
    state, wrappers = unwrapped(tensors)
    description = {"stripped": wrappers} if wrappers else {}
    return Found(kind, state, given.recognize(state), description=description)
