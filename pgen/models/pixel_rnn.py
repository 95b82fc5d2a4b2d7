r"""The Row LSTM of PixelRNN: a recurrence down the rows of an image.

A masked convolution sees the pixels before each pixel in a window. On it stand layers that take in a row at a time. Their gates
come from a causal convolution of the layer below, which sees the pixels to the left, and from a convolution of their own state
one row up:

.. math::

    [o, f, i, g] = K_{is} * x_{i} + K_{ss} * h_{i-1} + V c, \qquad
    c_i = \sigma(f) \, c_{i-1} + \sigma(i) \tanh(g), \qquad h_i = \sigma(o) \tanh(c_i)

so that the state of a pixel knows a triangle of all rows above it, and the convolutions the row to its left.

van den Oord, Kalchbrenner, Kavukcuoglu (2016), Pixel recurrent neural networks, arXiv:1601.06759, section 3.1 and equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, linear, pad

from ..contracts import Seed
from .image import ImageModel, PixelNetwork, put

__all__ = ["PixelRNN"]


class PixelRNN(ImageModel):
    r"""PixelRNN with Row LSTM layers.

    Shapes: x ``(N, H, W)`` or ``(N, C, H, W)``, context ``(N, context_dim)``. Training goes through the rows one after another,
    H steps a layer; a sample takes a step for each number, at a cost that does not depend on how far the network sees.

    Args:
        event_shape: ``(H, W)`` or ``(C, H, W)``.
        channels: Size of each layer's state at each pixel.
        layers: How many.
        kernel: Width of the convolutions of a layer, odd: of the row above, and its left half, of the layer below.
        first_kernel: Width of the masked convolution of the pixels, odd.
        head: Size of the hidden layer that reads the features of a pixel.
        likelihood: ``"bernoulli"``, ``"categorical"`` (0, ..., num_classes - 1), ``"discretized_logistic_mixture"`` (levels 0,
            ..., num_classes - 1), ``"gaussian"`` or ``"gaussian_mixture"``.
        num_classes: Classes or levels.
        num_components: Of a mixture (default 10).
        dropout: Probability with which a number that a layer hands on is left out of a training step.
        context_dim: Size of the vector that every layer is conditioned on; 0 for none.
        seed: Keys the initial weights.

    Example:
        >>> pixel_rnn = PixelRNN((8, 8), channels=4, layers=2)
        >>> pixel_rnn.sample(2).shape
        torch.Size([2, 8, 8])
    """

    family = "pixel_rnn"

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: int = 32,
        layers: int = 2,
        *,
        kernel: int = 3,
        first_kernel: int = 7,
        head: int = 64,
        likelihood: str = "bernoulli",
        num_classes: int | None = None,
        num_components: int | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            event_shape, channels, layers, kernel=kernel, first_kernel=first_kernel, head=head, likelihood=likelihood,
            num_classes=num_classes, num_components=num_components, dropout=dropout, context_dim=context_dim,
        )  # fmt: skip
        with self.initial_weights(seed):
            inputs = self.channels * self.observation.width
            trunk = _Rows(inputs, channels, layers, kernel, first_kernel, self.size[1], dropout, context_dim)
            self.network = PixelNetwork(trunk, channels, self.observation, self.size, head)


class _Rows(nn.Module):
    """A masked convolution and Row LSTM layers, each added to what is below, as a trunk."""

    layers: Any  # of _RowLSTM
    sees: Tensor

    def __init__(
        self,
        inputs: int,
        channels: int,
        layers: int,
        kernel: int,
        first_kernel: int,
        width: int,
        dropout: float,
        context_dim: int,
    ) -> None:
        super().__init__()
        self.inputs, self.width, self.reach = inputs, width, first_kernel // 2
        self.first = nn.Conv2d(inputs, channels, (self.reach + 1, first_kernel))
        sees = torch.ones(self.reach + 1, first_kernel)
        sees[-1, self.reach :] = 0  # the pixel itself, and those to its right
        self.register_buffer("sees", sees)
        self.layers = nn.ModuleList(_RowLSTM(channels, kernel // 2, context_dim) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, context: Tensor | None) -> Tensor:
        """Features of all pixels, ``(B, channels, H, W)``."""
        r = self.reach
        h = conv2d(pad(pixels, (r, r, r, 0)), self.first.weight * self.sees, self.first.bias)
        for layer in self.layers:
            h = h + self.dropout(layer(h, context))
        return h

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Nothing seen yet: rows of pixels, and the memory of each layer."""
        rows = self.first.weight.new_zeros(batch, self.inputs, self.reach + 1, self.width + 2 * self.reach)
        state = [rows, *(tensor for layer in self.layers for tensor in layer.memory(batch, self.width))]
        return state if context is None else [*state, context]

    def step(self, state: Sequence[Tensor], n: Tensor, before: Tensor) -> Tensor:
        """Features of pixel n."""
        rows, *rest = state
        context = rest[-1] if len(rest) % 3 else None
        row, column = n // self.width, n % self.width
        put(rows, before, (n - 1) // self.width % rows.shape[2], (n - 1) % self.width + self.reach)
        there = (row + torch.arange(-self.reach, 1, device=rows.device)) % rows.shape[2] * rows.shape[3]
        aside = column + torch.arange(2 * self.reach + 1, device=rows.device)
        window = rows.flatten(2).index_select(2, (there[:, None] + aside).reshape(-1))
        h = linear(window.flatten(1), (self.first.weight * self.sees).flatten(1), self.first.bias)
        for i, layer in enumerate(self.layers):
            h = h + layer.step(rest[3 * i : 3 * i + 3], h, row, column, context)
        return h


class _RowLSTM(nn.Module):
    """One Row LSTM layer, whose convolutions reach so far to either side, and to the left."""

    def __init__(self, channels: int, reach: int, context_dim: int) -> None:
        super().__init__()
        self.channels, self.reach = channels, reach
        self.input_to_state = nn.Conv2d(channels, 4 * channels, (1, reach + 1))
        self.state_to_state = nn.Conv1d(channels, 4 * channels, 2 * reach + 1, bias=False)
        self.condition = nn.Linear(context_dim, 4 * channels, bias=False) if context_dim else None

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The states of all pixels, ``(B, channels, H, W)``."""
        gates = self.input_to_state(pad(x, (self.reach, 0)))
        if self.condition is not None:
            gates = gates + self.condition(context)[:, :, None, None]
        h = c = x.new_zeros(len(x), self.channels, x.shape[3])
        rows = []
        for row in gates.unbind(2):
            h, c = _cell(row + conv1d(h, self.state_to_state.weight, padding=self.reach), c)
            rows.append(h)
        return torch.stack(rows, 2)

    def memory(self, batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """A row of the input, and two rows of h and of c."""
        new = self.state_to_state.weight.new_zeros
        h = new(batch, self.channels, 2, width + 2 * self.reach)
        return new(batch, self.channels, 1, self.reach + width), h, new(batch, self.channels, 2, width)

    def step(self, state: Sequence[Tensor], x: Tensor, row: Tensor, column: Tensor, context: Tensor | None) -> Tensor:
        """The state of one pixel, ``(B, channels)``."""
        inputs, h, c = state
        put(inputs, x, 0 * row, column + self.reach)
        left = inputs.flatten(2).index_select(2, column + torch.arange(self.reach + 1, device=x.device))
        aside = torch.arange(2 * self.reach + 1, device=x.device)
        above = h.flatten(2).index_select(2, (row + 1) % 2 * h.shape[3] + column + aside)
        gates = linear(left.flatten(1), self.input_to_state.weight.flatten(1), self.input_to_state.bias)
        gates = gates + linear(above.flatten(1), self.state_to_state.weight.flatten(1))
        if self.condition is not None:
            gates = gates + self.condition(context)
        old = c.flatten(2).index_select(2, ((row + 1) % 2 * c.shape[3] + column).reshape(1)).squeeze(2)
        new, cell = _cell(gates, old)
        put(h, new, row % 2, column + self.reach)
        put(c, cell, row % 2, column)
        return new


def _cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """h and c from the sums at the gates, ``(B, 4 channels, ...)``, and the c of the row above."""
    out, forget, take, new = gates.chunk(4, 1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(c), c
