r"""WaveNet: dilated causal convolutions, gated, with residual and skip connections.

.. math::

    z = \tanh(W_f * h + V_f c) \odot \sigma(W_g * h + V_g c), \qquad h \leftarrow h + W_r z, \qquad
    s \leftarrow s + W_s z, \qquad \text{outputs} = W_2 \operatorname{relu}(W_1 \operatorname{relu}(s))

van den Oord et al. (2016), WaveNet: a generative model for raw audio, arXiv:1609.03499, equations 2 and 3 and figure 4.
Steps keep the past of every layer in a ring: Le Paine et al. (2016), Fast WaveNet generation algorithm, arXiv:1611.09482.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Seed, check_positive
from ..training.fit import Training
from ..training.optim import Adam
from .sequence import Embedding, SequenceModel, recipe, share

__all__ = ["WaveNet"]


class WaveNet(SequenceModel):
    r"""Autoregressive sequences by dilated causal convolutions.

    Shapes: x ``(N, T)`` or ``(N, T, F)``, context ``(N, context_dim)``; ``lengths`` ``(N,)`` where they are unequal.
    The outputs at t see the ``receptive_field`` symbols before t, and cost the same at every t, in samples too.

    Args:
        event_shape: ``(T,)``, or ``(T, F)`` with F numbers at each position.
        likelihood: Of one symbol: ``"categorical"`` (audio: ``pgen.data.mu_law``), ``"discretized_logistic_mixture"``,
            ``"bernoulli"``, ``"gaussian"`` or ``"gaussian_mixture"`` (real numbers of order one: standardise them).
        num_classes: Values of a symbol, where they are finitely many.
        num_components: Of a mixture.
        channels: Of the residual stream and of the gates.
        skip_channels: Of the skip connections; by default twice ``channels``.
        dilations: One layer each; by default 1, 2, 4, ... until T is seen, at most 512.
        kernel_size: Taps of each convolution.
        dropout: Share of the gates' outputs that training drops.
        context_dim: Size of the vector that every layer is conditioned on; 0 for none.
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
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, likelihood, num_classes, num_components, context_dim)
        for name, value in (("channels", channels), ("kernel_size", kernel_size)):
            check_positive(name, value)
        check_positive("skip_channels", skip_channels, allow_none=True)
        if kernel_size < 2:
            raise ValueError(f"`kernel_size` should be 2 or more taps, got {kernel_size}")
        self.channels, self.skip_channels, self.kernel_size = channels, skip_channels or 2 * channels, kernel_size
        self.dilations = _doubling(self.event_shape[0]) if dilations is None else tuple(int(d) for d in dilations)
        if not self.dilations or any(d < 1 for d in self.dilations):
            raise ValueError(f"`dilations` should be positive numbers such as (1, 2, 4), got {self.dilations}")
        self.dropout = share("dropout", dropout)
        with self.initial_weights(seed):
            embedding = Embedding(self.observation, channels)
            layers = [_Layer(channels, self.skip_channels, d, kernel_size, context_dim, dropout) for d in self.dilations]
            self.network = _Network(embedding, layers, self.outputs)

    @property
    def receptive_field(self) -> int:
        """How many symbols before t the outputs at t see: 1 + (kernel_size - 1) times the sum of the dilations."""
        return 1 + (self.kernel_size - 1) * sum(self.dilations)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("channels", "skip_channels", "kernel_size", "dropout")
        return {**super().settings(), **{n: getattr(self, n) for n in names}, "dilations": list(self.dilations)}

    def output_bias(self) -> nn.Parameter:
        """The bias of the last layer."""
        return self.network.last.bias

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        return Adam(3e-3), recipe(settings)


class _Network(nn.Module):
    layers: Any  # of _Layer

    def __init__(self, embedding: Embedding, layers: Sequence[_Layer], outputs: int) -> None:
        super().__init__()
        self.embedding, self.layers = embedding, nn.ModuleList(layers)
        width = layers[0].skip
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Outputs of all positions."""
        h = self.embedding(x)  # (B, T, channels)
        skips = h.new_zeros(())
        for layer in self.layers:
            h, skip = layer(h, layer.before(h), None if context is None else context.unsqueeze(1))
            skips = skips + skip
        return self.outputs(skips)

    def outputs(self, skips: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(torch.relu(skips))))

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Empty rings, and the context."""
        weight = self.last.weight
        rings = [weight.new_zeros(layer.reach, batch, layer.channels) for layer in self.layers]
        return rings if context is None else [*rings, context.clone()]

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Outputs at t."""
        context = state[-1] if len(state) > len(self.layers) else None
        h = self.embedding.step(t, previous)  # (B, channels)
        skips = h.new_zeros(())
        for layer, ring in zip(self.layers, state):
            past = layer.remember(ring, t, h)
            h, skip = layer(h, past, context)
            skips = skips + skip
        return self.outputs(skips), state


class _Layer(nn.Module):
    """One gated convolution; the taps are products with one matrix each, side by side."""

    def __init__(self, channels: int, skip: int, dilation: int, kernel: int, context_dim: int, dropout: float) -> None:
        super().__init__()
        self.channels, self.skip, self.dilation, self.taps = channels, skip, dilation, kernel - 1
        self.reach = self.taps * dilation
        self.gates = nn.Linear(kernel * channels, 2 * channels)
        self.condition = nn.Linear(context_dim, 2 * channels, bias=False) if context_dim else None
        self.out = nn.Linear(channels, channels + skip)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, past: list[Tensor], context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream and the skip connection, from the stream at t and at t - dilation, ..., ``(*batch, channels)`` each."""
        a = self.gates(torch.cat([h, *past], -1))
        if self.condition is not None:
            a = a + self.condition(context)
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
