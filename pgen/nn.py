r"""Networks without probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from .contracts import check_choice

__all__ = ["ACTIVATIONS", "MLP", "flatten"]


class MLP(nn.Sequential):
    r"""Multi-layer perceptron: linear layers with one activation between them, none after the last.

    Shapes: ``(*batch, in_features)`` -> ``(*batch, out_features)``.

    Args:
        in_features: Size of the input's last axis.
        hidden: Sizes of the hidden layers.
        out_features: Size of the output's last axis.
        activation: Makes the activation module.

    Example:
        >>> MLP(3, (8, 8), 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, in_features: int, hidden: Sequence[int], out_features: int, activation: Callable[[], nn.Module] = nn.SiLU
    ) -> None:
        sizes = (in_features, *hidden, out_features)
        layers: list[nn.Module] = []
        for i, (n, m) in enumerate(pairwise(sizes)):
            layers += [nn.Linear(n, m)] + ([activation()] if i < len(hidden) else [])
        super().__init__(*layers)
        self.in_features, self.out_features = in_features, out_features

    def glorot(self) -> MLP:
        """Draw weights uniformly by Glorot's rule and set biases to zero; returns the network itself."""
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        return self


def flatten(x: Tensor, event_dims: int) -> Tensor:
    """Join the last ``event_dims`` axes into one, as the default dtype if they were not floating."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return x.flatten(-event_dims) if event_dims > 1 else x


class _Activations(dict[str, Callable[[], nn.Module]]):
    """Activations by name: the closed list that a saved file may name."""

    def name(self, activation: str | type[nn.Module]) -> str:
        """The name of an activation given by name or class."""
        if isinstance(activation, str):
            check_choice("activation", activation, tuple(self))
            return activation
        for name, made in self.items():
            if made is activation:
                return name
        raise ValueError(f"`activation` {activation!r} is not one of those that can be saved (known: {', '.join(self)})")


ACTIVATIONS = _Activations(
    silu=nn.SiLU, tanh=nn.Tanh, relu=nn.ReLU, gelu=nn.GELU, elu=nn.ELU, softplus=nn.Softplus, leaky_relu=nn.LeakyReLU
)
"""Activations by name."""
