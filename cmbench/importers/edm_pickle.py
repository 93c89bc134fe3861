"""The ``.pkl`` files of EDM, EDM2, ECT and TCM: a dict with a pickled network under ``ema``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cmbench.errors import UserError
from cmbench.importers.edm_settings import with_settings
from cmbench.importers.imported import Found, Parameterization
from cmbench.importers.inert import (
    InertObject,
    is_module,
    load_network_pickle,
    plain_facts,
    state_dict,
)
from cmbench.networks.recognize import recognize

#: EDM2's class; ECT's consistency models on EDM2's network bear its name, but have no logvar.
_EDM2_CLASS = "Precond"
#: The class of consistency models of ECT and of TCM; TCM's, unlike ECT's, has no boundary but zero.
_ECM_CLASS = "ECMPrecond"
#: The loss that ECT and TCM train with; beside a network it shows that this is a consistency model,
#: whatever wraps it. An attribute that TCM's has alone.
_ECM_LOSS, _TCM_ATTRIBUTE = "ECMLoss", "boundary_prob"
#: The classes that hold the network, and how they read its output.
_PARAMETERIZATIONS: Mapping[str, Parameterization] = {
    "EDMPrecond": "edm",
    _EDM2_CLASS: "edm",
    _ECM_CLASS: "boundary",
    "ECTPrecond": "boundary",
}
#: Classes whose network takes another time than ln(sigma) / 4 or other scalings of its input.
_OTHER = ("VPPrecond", "VEPrecond", "iDDPMPrecond")


def read_edm_pickle(
    path: Path,
    part: str = "ema",
    parameterization: Parameterization = "",
    ignored: Collection[str] = (),
) -> Found:
    """Read the network under ``part`` of a pickle.

    ``parameterization`` says how the network's output is read, if its class is not known here;
    ``ignored`` names settings that are not known here and change nothing that is computed.
    """
    data = load_network_pickle(path)
    module, loss = _choose(data, part, path), _loss(data)
    tensors = state_dict(module)
    known = _parameterization(module, loss, tensors, parameterization, path)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    found = with_settings(recognize(shapes), module, ignored)
    state = module.state
    return Found(
        "edm-pickle",
        tensors,
        found,
        known,
        _number(state.get("sigma_data")),
        _boundary(module, loss) if known == "boundary" else None,
        {
            "class": module.class_name,
            "part": part,
            "arguments": plain_facts(state.get("_init_kwargs", {})),
            **({"ignored": sorted(ignored)} if ignored else {}),
        },
    )


def _choose(data: Any, part: str, path: Path) -> InertObject:
    """Return the network under ``part``, or the pickled network itself."""
    if is_module(data):
        return data  # type: ignore[no-any-return]
    names = [k for k, v in data.items() if is_module(v)] if isinstance(data, dict) else []
    if part in names:
        return data[part]  # type: ignore[no-any-return]
    what = type(data).__name__ if not isinstance(data, dict) else f"{', '.join(map(str, data))}"
    raise UserError(
        f"checkpoint {path}",
        f"holds no network {part!r} (it holds {what})",
        allowed=", ".join(map(str, names)) or "a pickled network",
        remedy="choose one of them with --part" if names else "give a network snapshot",
    )


def _loss(data: Any) -> InertObject | None:
    """Return the loss that a snapshot keeps beside its networks, if it does."""
    loss = data.get("loss_fn") if isinstance(data, dict) else None
    return loss if isinstance(loss, InertObject) else None


def _name(described: InertObject) -> str:
    """Return the name of a described class without its module."""
    return described.class_name.rpartition(".")[2]


def _boundary(module: InertObject, loss: InertObject | None) -> float | None:
    """Return the noise level where a consistency function is the identity, if the file has it.

    EDM's scalings have it at zero: under them a file's ``sigma_min`` is no boundary.
    """
    plain = _name(module) != _ECM_CLASS
    if loss is not None and _name(loss) == _ECM_LOSS and (plain or _TCM_ATTRIBUTE in loss.state):
        return 0.0
    return _number(module.state.get("sigma_min"))


def _parameterization(
    module: InertObject,
    loss: InertObject | None,
    tensors: Mapping[str, Tensor],
    given: Parameterization,
    path: Path,
) -> Parameterization:
    """Return how the output is read: as ``given``, or as the classes of network and loss say."""
    name = _name(module)
    if name in _OTHER:
        raise UserError(
            f"checkpoint {path}",
            f"its network is wrapped as {name!r}, which gives it other inputs than EDM's",
            allowed=", ".join(_PARAMETERIZATIONS),
            remedy="it cannot be imported",
        )
    if given:
        return given
    if name in _PARAMETERIZATIONS and loss is not None and _name(loss) == _ECM_LOSS:
        return "boundary"
    if name == _EDM2_CLASS and not any(tensor.startswith("logvar_") for tensor in tensors):
        raise UserError(
            f"checkpoint {path}",
            f"its network is wrapped as {name!r} without the uncertainty that EDM2's have: it may "
            "be a consistency model of ECT's",
            allowed="edm, boundary",
            remedy="say which with --parameterization; ECT's are boundary, with --sigma-min 0",
        )
    if name in _PARAMETERIZATIONS:
        return _PARAMETERIZATIONS[name]
    raise UserError(
        f"checkpoint {path}",
        f"its network is wrapped as {name!r}, which is unknown",
        allowed=", ".join(_PARAMETERIZATIONS),
        remedy="if it scales like EDM, say so with --parameterization edm or boundary",
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
