r"""Dense networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..contracts import check_choice

__all__ = ["ACTIVATIONS", "MLP", "MaskedMLP", "flatten", "waves"]


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


class MaskedMLP(nn.Module):
    r"""Multi-layer perceptron over D places, whose outputs at a place see the inputs of places of lower rank alone.

    Each hidden unit has a degree m and sees inputs of rank below m; a unit of the next layer sees those of no higher degree,
    and the outputs at rank r see hidden units of degree at most r. Degrees are dealt out evenly, and ranks are an argument,
    so one set of weights serves every order of the places.

    Shapes: x ``(B, D, inputs)``, ranks ``(D,)``, context ``(B, context_dim)`` -> ``(B, D, outputs)``.

    Args:
        places: D.
        inputs: Numbers at each place of the input.
        hidden: Sizes of the hidden layers.
        outputs: Numbers at each place of the output.
        activation: Makes the activation module.
        residual: Make each hidden layer but the first a residual block, h + masked linear(activation(masked linear(
            activation(h)))); hidden layers are then of one size.
        dropout: Probability with which a hidden unit is left out of a training step.
        direct: Connect inputs to outputs linearly too.
        context_dim: Size of the context, which every hidden unit sees.

    References:
        Germain, Gregor, Murray, Larochelle (2015), MADE, arXiv:1502.03509, equations 8 to 12; residual blocks as in Nash and
        Durkan (2019), arXiv:1904.05626.

    Example:
        >>> network = MaskedMLP(3, 1, (8,), 2)
        >>> network(torch.zeros(5, 3, 1), torch.arange(3)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        places: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        activation: Callable[[], nn.Module] = nn.ReLU,
        *,
        residual: bool = False,
        dropout: float = 0.0,
        direct: bool = True,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.places, self.inputs, self.outputs, self.residual = places, inputs, outputs, residual
        self.hidden = tuple(hidden)
        self.lowest = 0 if context_dim or places == 1 else 1  # without context, a unit that sees no input is a constant
        self.activation, self.dropout = activation(), nn.Dropout(dropout)
        self.first = nn.Linear(places * inputs, self.hidden[0])
        repeats = 2 if residual else 1
        self.middle = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(self.hidden) for _ in range(repeats))
        self.last = nn.Linear(self.hidden[-1], places * outputs)
        self.direct = nn.Linear(places * inputs, places * outputs, bias=False) if direct else None
        self.condition = nn.Linear(context_dim, self.hidden[0], bias=False) if context_dim else None

    def degrees(self, size: int) -> Tensor:
        """The degree of each unit of a hidden layer, ``(size,)``, between the lowest and D - 1."""
        return self.lowest + torch.arange(size, device=self.first.weight.device) * (self.places - self.lowest) // size

    def forward(self, x: Tensor, ranks: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs at every place in one pass."""
        flat = x.flatten(1)
        sees = (self.degrees(self.hidden[0])[:, None] > ranks).repeat_interleave(self.inputs, 1)
        h = linear(flat, self.first.weight * sees, self.first.bias)
        h = self.features(h if self.condition is None else h + self.condition(context))
        seen = (ranks[:, None] >= self.degrees(self.hidden[-1])).repeat_interleave(self.outputs, 0)
        out = linear(h, self.last.weight * seen, self.last.bias)
        if self.direct is not None:
            lower = (ranks[:, None] > ranks).repeat_interleave(self.outputs, 0).repeat_interleave(self.inputs, 1)
            out = out + linear(flat, self.direct.weight * lower)
        return out.unflatten(1, (self.places, self.outputs))

    def features(self, h: Tensor) -> Tensor:
        """The last hidden layer from the first one's sums, ``(B, hidden[0])`` -> ``(B, hidden[-1])``."""
        if self.residual:
            for inner, outer in zip(self.middle[::2], self.middle[1::2], strict=True):
                h = h + self._masked(outer, self._active(self._masked(inner, self.activation(h))))
            return self._active(h)
        for layer in self.middle:
            h = self._masked(layer, self._active(h))
        return self._active(h)

    def _active(self, h: Tensor) -> Tensor:
        return self.dropout(self.activation(h))

    def _masked(self, layer: nn.Module, h: Tensor) -> Tensor:
        assert isinstance(layer, nn.Linear)
        sees = self.degrees(layer.out_features)[:, None] >= self.degrees(layer.in_features)
        return linear(h, layer.weight * sees, layer.bias)

    # One place at a time, in the order of the ranks, each datum in an order of its own.

    def start(self, batch: int, context: Tensor | None = None) -> list[Tensor]:
        """Sums of the first hidden layer, ``(B, hidden[0])``, and inputs so far, ``(B, D, inputs)``, before any is known."""
        sums = self.first.bias.expand(batch, -1)
        sums = sums.clone() if self.condition is None else sums + self.condition(context)
        return [sums, sums.new_zeros(batch, self.places, self.inputs)]

    def take(self, state: Sequence[Tensor], x: Tensor, place: Tensor, rank: Tensor) -> None:
        """Add the inputs x ``(B, inputs)`` at places ``(B,)`` of one rank ``()`` to the state."""
        sums, known = state
        weight = self.first.weight.unflatten(1, (self.places, self.inputs)).movedim(1, 0)[place]  # (B, hidden, inputs)
        sees = self.degrees(self.hidden[0]) > rank
        sums += sees * (weight @ x.unsqueeze(-1)).squeeze(-1)
        known.scatter_(1, place[:, None, None].expand(-1, 1, self.inputs), x.unsqueeze(1))

    def give(self, state: Sequence[Tensor], place: Tensor, rank: Tensor) -> Tensor:
        """Outputs ``(B, outputs)`` at places ``(B,)`` of one rank ``()`` from a state that holds the lower ranks alone."""
        sums, known = state
        h = self.features(sums) * (self.degrees(self.hidden[-1]) <= rank)
        out = (self.last.weight.unflatten(0, (self.places, -1))[place] @ h.unsqueeze(-1)).squeeze(-1)
        out = out + self.last.bias.unflatten(0, (self.places, -1))[place]
        if self.direct is not None:
            weight = self.direct.weight.unflatten(0, (self.places, -1))[place]  # (B, outputs, D * inputs)
            out = out + (weight @ known.flatten(1).unsqueeze(-1)).squeeze(-1)
        return out


def flatten(x: Tensor, event_dims: int) -> Tensor:
    """Join the last ``event_dims`` axes into one, as the default dtype if they were not floating."""
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    return x.flatten(-event_dims) if event_dims > 1 else x


def waves(z: Tensor, octaves: int) -> Tensor:
    r"""z, and :math:`\sin(2^k z), \cos(2^k z)` for k below ``octaves``: a network sees fine structure in few numbers by them.

    Shapes: ``(*batch, D)`` -> ``(*batch, D (1 + 2 octaves))``, for z of about unit variance.

    References:
        Tancik et al. (2020), Fourier features let networks learn high frequency functions, arXiv:2006.10739.

    Example:
        >>> waves(torch.zeros(3, 2), 2)[0]
        tensor([0., 0., 0., 0., 0., 0., 1., 1., 1., 1.])
    """
    if not octaves:
        return z
    fast = (z.unsqueeze(-1) * 2.0 ** torch.arange(octaves, device=z.device)).flatten(-2)
    return torch.cat([z, fast.sin(), fast.cos()], -1)


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
