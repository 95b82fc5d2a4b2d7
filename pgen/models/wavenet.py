r"""WaveNet: dilated causal convolutions, gated, with residual and skip connections.

.. math::

    z = \tanh(W_f * h + V_f y) \odot \sigma(W_g * h + V_g y), \qquad h \leftarrow h + W_r z, \qquad
    s \leftarrow s + W_s z, \qquad \text{outputs} = W_2 \operatorname{relu}(W_1 \operatorname{relu}(s))

where y holds what x is conditioned on, at each position: a context, the same at all, and the row of a local condition.

van den Oord et al. (2016), WaveNet: a generative model for raw audio, arXiv:1609.03499, equations 2 and 3, figure 4, and
section 2.5 on conditions; one that is slower than x is repeated here, not upsampled by a network.
Steps keep the past of every layer in a ring: Le Paine et al. (2016), Fast WaveNet generation algorithm, arXiv:1611.09482.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Seed, check_positive
from ..training.optim import Adam
from .sequence import Embedding, SequenceModel, along, conditions, row_at

__all__ = ["WaveNet"]


class WaveNet(SequenceModel):
    r"""Autoregressive sequences by dilated causal convolutions.

    Shapes: x ``(N, T)`` or ``(N, T, F)``, context ``(N, context_dim)``; ``lengths`` ``(N,)`` where they are unequal; the local
    condition ``{"x": x, "local": h}``, ``(N, rows, local_dim)`` with one row for each ``local_hop`` positions.
    The outputs at t see the ``receptive_field`` symbols before t, and h at t and before, never after; they cost the same at
    every t, in samples too.

    Args:
        event_shape: ``(T,)``, or ``(T, F)`` with F numbers at each position.
        likelihood: Of one symbol: ``"categorical"`` (audio: ``pgen.data.mu_law``), ``"discretized_logistic_mixture"``,
            ``"bernoulli"``, ``"gaussian"`` or ``"gaussian_mixture"`` (real numbers, which are standardised inside).
        num_classes: Values of a symbol, where they are finitely many.
        num_components: Of a mixture.
        channels: Of the residual stream and of the gates.
        skip_channels: Of the skip connections; by default twice ``channels``.
        dilations: One layer each; by default 1, 2, 4, ... until T is seen, at most 512.
        kernel_size: Taps of each convolution.
        dropout: Share of the gates' outputs that training drops.
        context_dim: Size of the vector that every layer is conditioned on; 0 for none.
        local_dim: Size of one row of the local condition, which every layer reads too; 0 for none.
        local_hop: Positions that one row covers: row t // local_hop is read at position t.
        seed: Keys the initial weights.

    Example:
        >>> wavenet = WaveNet((100,), num_classes=5, dilations=(1, 2, 4, 8))
        >>> wavenet.receptive_field
        16
        >>> wavenet.complete(torch.zeros(2, 3), length=40).shape
        torch.Size([2, 40])
    """

    family = "wavenet"
    default_epochs = 30
    adam = Adam(3e-3)
    network: _Network

    def __init__(
        self,
        event_shape: Sequence[int],
        likelihood: str = "categorical",
        num_classes: int | None = None,
        *,
        num_components: int | None = None,
        channels: int = 32,
        skip_channels: int | None = None,
        dilations: Sequence[int] | None = None,
        kernel_size: int = 2,
        dropout: float = 0.0,
        context_dim: int = 0,
        local_dim: int = 0,
        local_hop: int = 1,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, likelihood, num_classes, num_components, context_dim, local_dim, dropout)
        for name, value in (("channels", channels), ("kernel_size", kernel_size), ("local_hop", local_hop)):
            check_positive(name, value)
        check_positive("skip_channels", skip_channels, allow_none=True)
        if kernel_size < 2:
            raise ValueError(f"`kernel_size` should be 2 or more taps, got {kernel_size}")
        if local_hop > 1 and not local_dim:
            raise ValueError(f"`local_hop` goes with a local condition: give local_dim=... or leave local_hop={local_hop} out")
        self.channels, self.skip_channels, self.kernel_size = channels, skip_channels or 2 * channels, kernel_size
        self.local_hop = local_hop
        self.dilations = _doubling(self.event_shape[0]) if dilations is None else tuple(int(d) for d in dilations)
        if not self.dilations or any(d < 1 for d in self.dilations):
            raise ValueError(f"`dilations` should be positive numbers such as (1, 2, 4), got {self.dilations}")
        told = context_dim + local_dim
        with self.initial_weights(seed):
            embedding = Embedding(self.observation, channels)
            layers = [_Layer(channels, self.skip_channels, d, kernel_size, told, dropout) for d in self.dilations]
            self.network = _Network(embedding, layers, self.outputs, local_hop)

    @property
    def receptive_field(self) -> int:
        """How many symbols before t the outputs at t see: 1 + (kernel_size - 1) times the sum of the dilations."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("channels", "skip_channels", "kernel_size", "local_hop")
        return {**super().settings(), **{n: getattr(self, n) for n in names}, "dilations": list(self.dilations)}

    def output_bias(self) -> nn.Parameter:
        """The bias of the last layer."""
        return self.network.last.bias


class _Network(nn.Module):
    layers: Any  # of _Layer

    def __init__(self, embedding: Embedding, layers: Sequence[_Layer], outputs: int, hop: int) -> None:
        super().__init__()
        self.embedding, self.layers, self.hop = embedding, nn.ModuleList(layers), hop
        width = layers[0].skip
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor, context: Tensor | None, local: Tensor | None = None) -> Tensor:
        """Outputs of all positions."""
        h = self.embedding(x)  # (B, T, channels)
        y = conditions(context, local)  # (B, rows, size)
        skips = h.new_zeros(())
        for layer in self.layers:
            told = None if y is None else along(layer.condition(y), self.hop, x.shape[1])
            h, skip = layer(h, layer.before(h), told)
            skips = skips + skip
        return self.outputs(skips)

    def outputs(self, skips: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.relu(skips))))

    def start(self, batch: int, context: Tensor | None, local: Tensor | None = None) -> list[Tensor]:
        """Empty rings, and what x is conditioned on, ``(rows, B, size)``."""
        weight, y = self.last.weight, conditions(context, local)
        rings = [weight.new_zeros(layer.reach, batch, layer.channels) for layer in self.layers]
        return rings if y is None else [*rings, y.transpose(0, 1).clone(memory_format=torch.contiguous_format)]

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Outputs at t."""
        y = row_at(state[-1], self.hop, t) if len(state) > len(self.layers) else None
        h = self.embedding.step(t, previous)  # (B, channels)
        skips = h.new_zeros(())
        for layer, ring in zip(self.layers, state):
            past = layer.remember(ring, t, h)
            h, skip = layer(h, past, None if y is None else layer.condition(y))
            skips = skips + skip
        return self.outputs(skips), state


class _Layer(nn.Module):
    """One gated convolution; the taps are products with one matrix each, side by side."""

    def __init__(self, channels: int, skip: int, dilation: int, kernel: int, told: int, dropout: float) -> None:
        super().__init__()
        self.channels, self.skip, self.dilation, self.taps = channels, skip, dilation, kernel - 1
        self.reach = self.taps * dilation
        self.gates = nn.Linear(kernel * channels, 2 * channels)
        self.condition = nn.Linear(told, 2 * channels, bias=False) if told else None
        self.out = nn.Linear(channels, channels + skip)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, past: list[Tensor], told: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream and the skip connection, from the stream at t and at t - dilation, ..., ``(*batch, channels)`` each.

        ``told`` is what the condition adds to the gates.
        """
        a = self.gates(torch.cat([h, *past], -1))
        if told is not None:
            a = a + told
        filtered, gate = a.chunk(2, -1)
        z = self.dropout(torch.tanh(filtered) * torch.sigmoid(gate))
        change, skip = self.out(z).split([self.channels, self.skip], -1)
        return h + change, skip

    def before(self, h: Tensor) -> list[Tensor]:
        """The stream at t - dilation, t - 2 dilation, ... of all t; zero before the beginning."""
        shifts = (self.dilation * (tap + 1) for tap in range(self.taps))
        return [nn.functional.pad(h, (0, 0, shift, 0))[:, : h.shape[1]] for shift in shifts]

    def remember(self, ring: Tensor, t: Tensor, h: Tensor) -> list[Tensor]:
        """The same at one t, from a ring of the last ``reach`` positions, which takes in h in place."""
        back = self.dilation * (torch.arange(self.taps, device=t.device) + 1)
        past = list(ring.index_select(0, (t - back) % self.reach).unbind(0))
        ring.index_copy_(0, (t % self.reach).reshape(1), h.unsqueeze(0))
        return past


def _doubling(length: int) -> tuple[int, ...]:
    """1, 2, 4, ... until a sequence of this length is seen, at most 512."""
    found = [1]
    while 1 + sum(found) < length - 1 and found[-1] < 512:
        found.append(2 * found[-1])
    return tuple(found)
