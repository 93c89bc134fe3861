"""What every network of this package is: a raw network F with a carried directional derivative."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from cmbench.errors import UserError
from cmbench.networks import ops
from cmbench.networks.attention import AttentionBase
from cmbench.networks.config import NetworkConfig
from cmbench.networks.dual import Dual, Value, make_dual
from cmbench.networks.temporal import repeat_for_states, split_states


class Network(nn.Module):
    """A raw network ``F(x, c_noise, labels, augment_labels)``, built as ``Cls(config, shape, n)``.

    It also receives the further scalars that ``config.conditions`` names, each ``[N]``. With
    ``config.states`` S above 1 it gives S states of a trajectory at once: ``c_noise`` and
    conditions are ``[N, S]``, the output is ``[N, S, C, H, W]``.

    ``data_shape`` is ``(C, H, W)`` of an image, ``num_classes`` the number of classes (0:
    unconditional). A subclass writes :meth:`body` once, with the layers and operations of this
    package, over plain tensors and :class:`~cmbench.networks.dual.Dual` alike.
    """

    Config: ClassVar[type[NetworkConfig]]
    #: Methods beside ``forward`` that compute with weights (those on ``forward`` need no mention).
    weight_methods: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: NetworkConfig, data_shape: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.config = config
        self.data_shape = data_shape
        self.num_classes = num_classes
        #: Recompute the blocks' activations in the backward pass instead of keeping them.
        self.gradient_checkpointing = False

    @abstractmethod
    def body(
        self,
        x: Value,
        c_noise: Value,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: Mapping[str, Value],
    ) -> Value:
        """Compute the output ``[N, C, H, W]``, in any memory layout."""

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        tangents: tuple[Tensor, Tensor] | None = None,
        condition_tangents: Mapping[str, Tensor] | None = None,
        tangent_dtype: torch.dtype | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return F ``[N, C, H, W]`` for ``x`` ``[N, C, H, W]`` and ``c_noise`` ``[N]``.

        F has the dtype of ``x`` under autocast too. ``labels`` are int64 class indices ``[N]``
        (None or a negative index: no class), ``augment_labels`` float ``[N, augment_dim]``,
        ``conditions`` float ``[N]`` by name (one that is left out adds nothing). Of S states,
        ``c_noise``, its tangent and conditions are ``[N, S]`` and F is ``[N, S, C, H, W]``. With
        ``tangents = (dx, dc_noise)`` it returns ``(F, dF)``; this is
        :meth:`forward_with_tangent` in the form that survives wrappers which only know
        ``forward`` (DDP, ``torch.compile``).

        Raises:
            UserError: a condition that the network does not have, or another shape of it or of
                ``c_noise``.
        """
        self._check_states(x, c_noise)
        further = self._checked_conditions(c_noise, conditions)
        if tangents is None:
            y = self._states_body(x, c_noise, labels, augment_labels, further)
            assert isinstance(y, Tensor)
            return y.to(x.dtype).contiguous()
        dx, dc_noise = tangents
        moving, precise = condition_tangents or {}, _at_least_float32(tangent_dtype)
        self._checked_conditions(c_noise, moving)
        dual = self._states_body(
            make_dual(x, dx, tangent_dtype),
            make_dual(c_noise, dc_noise, precise),
            labels,
            augment_labels,
            {
                name: make_dual(value, moving[name], precise) if name in moving else value
                for name, value in further.items()
            },
        )
        assert isinstance(dual, Dual)
        y, dy = (v.to(x.dtype).contiguous() for v in (dual.primal, dual.tangent))
        return y, dy

    def forward_with_tangent(
        self,
        x: Tensor,
        c_noise: Tensor,
        dx: Tensor,
        dc_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        conditions: Mapping[str, Tensor] | None = None,
        condition_tangents: Mapping[str, Tensor] | None = None,
        tangent_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``(F, dF)`` ``[N, C, H, W]``: the output, its derivative along ``(dx, dc_noise)``.

        ``condition_tangents`` ``[N]`` by name move ``conditions`` along too; one without a tangent
        stays where it is.

        F is bit-equal to :meth:`forward`'s (dropout mask included) and carries the autograd graph;
        dF is computed under no_grad, at about the cost of one further forward.
        ``tangent_dtype`` propagates the tangent in that precision under autocast; None lets it
        follow the activations' dtype (normalisations and softmax use float32 inside either way).
        """
        y, dy = self(
            x,
            c_noise,
            labels,
            augment_labels,
            conditions=conditions,
            tangents=(dx, dc_noise),
            condition_tangents=condition_tangents,
            tangent_dtype=tangent_dtype,
        )
        return y, dy

    def _states_body(
        self,
        x: Value,
        c_noise: Value,
        labels: Tensor | None,
        augment_labels: Tensor | None,
        conditions: Mapping[str, Value],
    ) -> Value:
        """:meth:`body`, of the states of all images in a row."""
        states = self.config.states
        if states == 1:
            return self.body(x, c_noise, labels, augment_labels, conditions)
        labels, augment_labels = (
            None if v is None else v.repeat_interleave(states, 0) for v in (labels, augment_labels)
        )
        rows = {name: ops.linear_map(torch.flatten, v) for name, v in conditions.items()}
        y = self.body(
            repeat_for_states(x, states),
            ops.linear_map(torch.flatten, c_noise),
            labels,
            augment_labels,
            rows,
        )
        return ops.linear_map(partial(split_states, states=states), y)

    def _check_states(self, x: Tensor, c_noise: Tensor) -> None:
        states = self.config.states
        allowed = (len(x),) if states == 1 else (len(x), states)
        if c_noise.shape != allowed:
            raise UserError(
                "network",
                f"c_noise of shape {tuple(c_noise.shape)} for {len(x)} images of {states} states",
                allowed=f"{allowed}",
                remedy="give one noise label per image and state, or set the recipe's "
                "network.states to the states that the method asks for",
            )

    def _checked_conditions(
        self, c_noise: Tensor, given: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        found = dict(given or {})
        for name, value in found.items():
            if name not in self.config.conditions or value.shape != c_noise.shape:
                known = ", ".join(self.config.conditions) or "none"
                raise UserError(
                    "network",
                    f"condition {name!r} of shape {tuple(value.shape)}",
                    allowed=f"{known}; each of shape {tuple(c_noise.shape)}",
                    remedy="name it in the recipe's network.conditions, or build the network with "
                    f"kit.network(conditions=({name!r},))",
                )
        return found

    def units(self) -> list[nn.Module]:
        """Return modules that compute one after another and hold most of the weights.

        A network that is split over processes has the whole weights of one at a time.
        """
        return []

    def set_explicit_attention(self, explicit: bool) -> None:
        """Compute attention by explicit products instead of PyTorch's fused kernel, or back."""
        for module in self.modules():
            if isinstance(module, AttentionBase):
                module.explicit = explicit

    def normalize_weights(self) -> None:
        """Project the weights onto their constraint; nothing to do unless a network has one.

        Call after every optimizer step (EDM2's forced weight normalisation).
        """


def _at_least_float32(dtype: torch.dtype | None) -> torch.dtype | None:
    return None if dtype is None else torch.promote_types(dtype, torch.float32)


def is_addition(key: str) -> bool:
    """Return whether a key of a network's state dict is of what a network may have beside its body.

    Further conditions, which start at zero, and the mixing of states, which starts near zero.
    """
    return "conditions." in key or "temporal." in key


def num_parameters(module: nn.Module) -> int:
    """Return the number of trainable and frozen parameters (buffers not counted)."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_resolution(who: str, data_shape: tuple[int, int, int], multiple: int) -> int:
    """Return the resolution of square images that a U-Net can halve, or say what would do."""
    _, height, width = data_shape
    if height != width or height % multiple:
        raise UserError(
            who,
            f"images of {height}x{width} pixels",
            allowed=f"square images whose side is a multiple of {multiple}",
            remedy="choose fewer resolutions (channel_mult) or the network 'mlp'",
        )
    return height
