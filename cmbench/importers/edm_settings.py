"""What a pickled network says of itself beside its tensors, mapped or compared with ours.

Pickles of EDM's kind keep the attributes of every layer and the arguments it was made with. Each
name is in one of these tables: it becomes an option of ours, it must have the value that our
network assumes, or it changes nothing that is computed. Any other name is refused, unless the user
says that it may be ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cmbench.errors import UserError
from cmbench.importers.inert import InertObject, plain_facts, walk
from cmbench.networks.layers import filter_kernel
from cmbench.networks.recognize import Recognized, filter_taps, unsupported

#: Sizes and parts, which names and shapes of tensors tell; what buffers and num_groups tell;
#: initial values and what acts in training; the wrapper's constants, which are read with it.
_PLAIN = """
img_resolution img_channels in_channels out_channels emb_channels in_features out_features
num_channels label_dim augment_dim model_channels channel_mult channel_mult_emb channel_mult_noise
num_blocks attn_resolutions attn_type channels_per_head logvar_channels
bias kernel attention model_type embedding_type encoder_type decoder_type resample_proj
scale bandwidth min_channels_per_group
init init_zero init_attn init_mode init_weight init_bias
training dropout label_dropout dropout_res dout_resolutions force_wn use_fp16
sigma_data sigma_min sigma_max
"""
_WITHOUT_EFFECT = frozenset(_PLAIN.split())
#: Names that become options of EDM2, one value throughout.
_EDM2_OPTIONS = {
    "label_balance": "label_balance",
    "concat_balance": "concat_balance",
    "res_balance": "residual_balance",
    "attn_balance": "attention_balance",
    "clip_act": "clip_activations",
    "resample_filter": "filter_taps",
}
_HEADS = "num_heads"


class Setting(NamedTuple):
    """A plain value that a file states: its name, the value, and the part that states it."""

    name: str
    value: Any
    place: str
    part: InertObject

    def refused(self, allowed: object) -> UserError:
        """Return the error for a value that has no counterpart here."""
        kind = self.part.class_name.rpartition(".")[2]
        where = f"{self.place.rstrip('.') or 'the network'} ({kind})"
        shown = str(plain_facts(self.value))[:60]
        return unsupported(f"{self.name} is {shown} in {where}"[:200], str(allowed))


def settings(module: InertObject) -> Iterator[Setting]:
    """Yield the public attributes and named arguments of a described network's parts."""
    for place, part in walk(module):
        arguments = part.state.get("_init_kwargs")
        stated = {k: v for k, v in part.state.items() if not str(k).startswith("_")}
        if isinstance(arguments, dict):
            stated = {**arguments, **stated}
        for name, value in stated.items():
            if value is not None or name == "clip_act":
                yield Setting(str(name), value, place, part)


def with_settings(
    found: Recognized, module: InertObject, ignored: Collection[str] = ()
) -> Recognized:
    """Return the network with what the pickle states of it, which is no longer assumed.

    Raises UserError, naming the setting, for one that our network does not have, that is not the
    same throughout, or whose name is unknown and not in ``ignored``.
    """
    edm2 = found.family == "edm2"
    told: dict[str, Setting] = {}
    heads: list[Setting] = []
    for setting in settings(module):
        name = setting.name
        if name in ignored or name in _WITHOUT_EFFECT:
            continue
        if name == _HEADS and found.network in ("adm", "edm2"):
            heads.append(setting)
        elif edm2 and name in _EDM2_OPTIONS:
            first = told.setdefault(name, setting)
            if not _same(first.value, setting.value):
                raise setting.refused(f"one value throughout, {plain_facts(first.value)}")
        else:
            _compare(setting, found)
    options = {**found.options, **{_EDM2_OPTIONS[n]: _option(s) for n, s in told.items()}}
    stated = {_EDM2_OPTIONS[name] for name in told}
    if heads:
        stated.add("channels_per_head")
        options["channels_per_head"] = _channels_per_head(heads)
    assumed = {k: v for k, v in found.assumed.items() if k not in stated}
    return found._replace(options=options, assumed=assumed)


def _option(setting: Setting) -> Any:
    """Return the value of an option of EDM2; raise ``UserError`` for one out of its range."""
    value = setting.value
    if setting.name == "resample_filter":
        return _taps(setting)
    if setting.name == "clip_act":
        if value is None or (_is_number(value) and 0 < value < math.inf):
            return None if value is None else float(value)
        raise setting.refused("a positive number or none")
    if not (_is_number(value) and 0 <= value <= 1):
        raise setting.refused("a number from 0 to 1")
    return float(value)


def _taps(setting: Setting) -> tuple[float, ...]:
    """Return the taps of a filter that is stated as a list, as a buffer's are returned."""
    value = setting.value
    if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)) or not sum(value):
        raise setting.refused("a list of numbers whose sum is not zero")
    return filter_taps(filter_kernel([float(v) for v in value]), f"{setting.place}resample_filter")


def _channels_per_head(heads: list[Setting]) -> int:
    """Return a head width that gives every block with attention its number of heads."""
    low, high = 1, 2**31
    for setting in heads:
        width, count = setting.part.state.get("out_channels"), setting.value
        if type(width) is not int or type(count) is not int or count < 0 or width < 1:
            raise setting.refused("a whole number of heads")
        if not count:
            continue
        if width % count:
            raise setting.refused(f"a number that divides {width} channels")
        low = max(low, width // (count + 1) + 1)
        high = high if count == 1 else min(high, width // count)
        if low > high:
            raise setting.refused("heads of one width throughout")
    return 64 if low <= 64 <= high else low if high == 2**31 else high


# ---- values that our networks have too -----------------------------------------------------------


def _compare(setting: Setting, found: Recognized) -> None:
    """Raise ``UserError`` unless our network has the value, or for an unknown name."""
    expected = _EXPECTED.get(setting.name)
    if expected is None:
        kind = setting.part.class_name.rpartition(".")[2]
        raise UserError(
            "checkpoint",
            f"{setting.name!r} of {kind} ({str(plain_facts(setting.value))[:60]}) is a setting "
            "that is not known here",
            allowed="settings of EDM's, EDM2's, ECT's and TCM's networks",
            remedy=f"if it changes nothing that is computed, add --ignore {setting.name}",
        )
    value = expected(setting, found)
    if not _same(setting.value, value):
        raise setting.refused(plain_facts(value))


def _in_song(song: Any, other: Any) -> Callable[[Setting, Recognized], Any]:
    return lambda setting, found: other if found.network == "adm" else song


def _groups(setting: Setting, found: Recognized) -> Any:
    weight = setting.part.state["_parameters"].get("weight")
    return min(32, weight.shape[0] // 4) if isinstance(weight, Tensor) else None


def _resamples(kind: str) -> Callable[[Setting, Recognized], bool]:
    """Whether a layer resamples: two of a block's convolutions do, and the pyramid's."""

    def expected(setting: Setting, found: Recognized) -> bool:
        block, _, layer = setting.place.rstrip(".").rpartition(".")
        if setting.place.endswith(f"_{kind}."):  # an argument of the block itself
            return True
        if setting.place.endswith("_aux_residual."):
            return kind == "down"
        return block.endswith(f"_{kind}") and layer in ("conv0", "skip")

    return expected


def _mode(setting: Setting, found: Recognized) -> str:
    for kind in ("up", "down"):
        if setting.place.endswith(f"_{kind}."):
            return kind
    return "keep"


_EXPECTED: Mapping[str, Callable[[Setting, Recognized], Any]] = {
    "skip_scale": _in_song(math.sqrt(0.5), 1),
    "eps": _in_song(1e-6, 1e-5),
    "num_groups": _groups,
    "num_heads": lambda s, found: 1 if s.value else 0,
    "adaptive_scale": lambda s, found: (
        found.options.get("conditioning", "scale-shift") == "scale-shift"
    ),
    "up": _resamples("up"),
    "down": _resamples("down"),
    "fused_resample": lambda s, found: s.place.endswith("_aux_residual."),
    "max_positions": lambda s, found: 10000,
    "endpoint": _in_song(True, False),
    "flavor": lambda s, found: "enc" if ".enc." in s.place else "dec",
    "resample_mode": _mode,
    # EDM's taps are compared where they are buffers: as arguments they may stand in layers that do
    # not resample.
    "resample_filter": lambda s, found: s.value,
    # TCM's, in its own variants of these networks.
    "emb_norm": lambda s, found: False,
    "learnable": lambda s, found: False,
    "learnable_scale": lambda s, found: False,
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _same(one: Any, other: Any) -> bool:
    """Return whether two plain values are equal, numbers to rounding in float32."""
    if _is_number(one) and _is_number(other):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)
