"""Names that training's wrappers add to those of tensors, and state dicts without them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cmbench.errors import UserError

#: What training wraps modules in, by the name that it adds to those of their tensors.
WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}


def unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict without the names of wrappers, and which of them there were.

    ``module`` is one only in front of every name; the others are no names of layers anywhere.

    Raises UserError where two names become one.
    """
    parts = {name: name.split(".") for name in state}
    found: list[str] = []
    while parts and all(p[0] in WRAPPERS and len(p) > 1 for p in parts.values()):
        found += {p[0] for p in parts.values()} - set(found)
        parts = {name: p[1:] for name, p in parts.items()}
    inner = WRAPPERS.keys() - {"module"}
    found += sorted({n for p in parts.values() for n in p if n in inner} - set(found))
    names = {name: ".".join(n for n in p if n not in inner) for name, p in parts.items()}
    if len(set(names.values())) < len(names):
        raise UserError(
            "checkpoint",
            f"holds tensors twice, with and without {', '.join(found)}",
            allowed="one state dict",
            remedy="save the network's state_dict() alone",
        )
    return {names[name]: tensor for name, tensor in state.items()}, found
