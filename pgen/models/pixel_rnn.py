r"""PixelRNN: recurrences over an image, down its rows (Row LSTM) or along its diagonals (Diagonal BiLSTM).

A masked convolution sees the pixels before each pixel in a window. On it stand layers of long short-term memory, each added to
what is below it. With the sums at the gates, s, split into four,

.. math::

    [o, f, i, g] = s, \qquad
    c = \sigma(f) \, c_{prev} + \sigma(i) \tanh(g), \qquad h = \sigma(o) \tanh(c)

The Row LSTM takes in a row at a time. Its gates come from a causal convolution of the layer below, which sees the pixels to the
left, and from a convolution of its own state one row up:

.. math:: s_{i} = K_{is} * x_{i} + K_{ss} * h_{i-1} + V c

so that the state of a pixel knows a triangle of all rows above it, and the convolutions the row to its left.

The Diagonal BiLSTM takes in a diagonal at a time, from either upper corner. Skewed so that each row begins one column after the
row above, a diagonal is a column, and the pixels to the left of and above those on it are the column before:

.. math:: s_{ij} = K_{is} x_{ij} + K_{ss} [h_{i-1,j}; h_{i,j-1}] + V c, \qquad c_{prev} = c_{i,j-1}

The stream from the right is the mirror image. It is shifted down by one row before both are added, so that a pixel sees nothing
of its own row from there. Together they know all that comes before a pixel.

van den Oord, Kalchbrenner, Kavukcuoglu (2016), Pixel recurrent neural networks, arXiv:1601.06759, sections 3.1 and 3.2 and
equation 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, linear, pad

from ..contracts import Seed, check_choice
from .image import ImageModel, PixelNetwork, put

__all__ = ["PixelRNN"]


class PixelRNN(ImageModel):
    r"""PixelRNN with Row LSTM or Diagonal BiLSTM layers.

    Shapes: x ``(N, H, W)`` or ``(N, C, H, W)``, context ``(N, context_dim)``. Training goes through the rows one after another,
    H steps a layer, or through the diagonals, H + W - 1 steps a layer. A sample takes a step for each number, at a cost that is
    the same at every pixel: of the Row LSTM it depends on neither H nor W; of the Diagonal BiLSTM it grows with W, since each
    step goes through the row above, W small products one after another, all layers at once.

    Args:
        event_shape: ``(H, W)`` or ``(C, H, W)``.
        channels: Size of each layer's state at each pixel.
        layers: How many.
        lstm: ``"row"``: a pixel sees a triangle of the rows above it; ``"diagonal"``: all that comes before it.
        kernel: Width of the convolutions of a Row LSTM layer, odd (default 3): of the row above, and its left half, of the
            layer below. Those of a Diagonal BiLSTM are 1 x 1 and 2 x 1.
        first_kernel: Width of the masked convolution of the pixels, odd, at least 3.
        head: Size of the hidden layer that reads the features of a pixel.
        likelihood: ``"bernoulli"``, ``"categorical"`` (0, ..., num_classes - 1), ``"discretized_logistic_mixture"`` (levels 0,
            ..., num_classes - 1), ``"gaussian"`` or ``"gaussian_mixture"``.
        num_classes: Classes or levels.
        num_components: Of a mixture (default 10).
        dropout: Probability with which a number that a layer hands on is left out of a training step.
        context_dim: Size of the vector that every layer is conditioned on; 0 for none.
        seed: Keys the initial weights.

    Raises:
        ValueError: If ``kernel`` is given to a Diagonal BiLSTM, or the first convolution sees no pixel.

    Example:
        >>> pixel_rnn = PixelRNN((8, 8), channels=4, layers=2, lstm="diagonal")
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
        lstm: str = "row",
        kernel: int | None = None,
        first_kernel: int = 7,
        head: int = 64,
        likelihood: str = "bernoulli",
        num_classes: int | None = None,
        num_components: int | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        seed: Seed = 0,
    ) -> None:
        check_choice("lstm", lstm, ("row", "diagonal"))
        if lstm == "diagonal" and kernel is not None:
            raise ValueError(f"`kernel` goes with lstm='row', not {lstm!r}, whose kernels are 1 x 1 and 2 x 1; leave it out")
        kernel = 3 if lstm == "row" and kernel is None else kernel
        super().__init__(
            event_shape, channels, layers, kernel=kernel, first_kernel=first_kernel, head=head, likelihood=likelihood,
            num_classes=num_classes, num_components=num_components, dropout=dropout, context_dim=context_dim,
        )  # fmt: skip
        if first_kernel < 3:
            raise ValueError(f"`first_kernel` should be at least 3, got {first_kernel}, which sees none of the pixels before")
        self.lstm = lstm
        with self.initial_weights(seed):
            first = _MaskedConvolution(self.channels * self.observation.width, channels, first_kernel)
            trunk = (
                _Diagonals(first, layers, self.size[1], dropout, context_dim)
                if kernel is None
                else _Rows(first, layers, kernel, self.size[1], dropout, context_dim)
            )
            self.network = PixelNetwork(trunk, channels, self.observation, self.size, head)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        return {**super().settings(), "lstm": self.lstm}


class _MaskedConvolution(nn.Conv2d):
    """Of the pixels before each pixel, as far as it reaches to either side and up."""

    sees: Tensor

    def __init__(self, inputs: int, channels: int, kernel: int) -> None:
        super().__init__(inputs, channels, (kernel // 2 + 1, kernel))
        self.reach = kernel // 2
        sees = torch.ones(self.reach + 1, kernel)
        sees[-1, self.reach :] = 0  # the pixel itself, and those to its right
        self.register_buffer("sees", sees)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features of all pixels, ``(B, channels, H, W)``."""
        r = self.reach
        return conv2d(pad(pixels, (r, r, r, 0)), self.weight * self.sees, self.bias)

    def memory(self, batch: int, width: int) -> Tensor:
        """As many rows of pixels as it sees."""
        return self.weight.new_zeros(batch, self.in_channels, self.reach + 1, width + 2 * self.reach)

    def step(self, rows: Tensor, before: Tensor, n: Tensor, width: int) -> Tensor:
        """Features of pixel n, ``(B, channels)``."""
        row, column = n // width, n % width
        put(rows, before, (n - 1) // width % rows.shape[2], (n - 1) % width + self.reach)
        there = (row + torch.arange(-self.reach, 1, device=rows.device)) % rows.shape[2] * rows.shape[3]
        aside = column + torch.arange(2 * self.reach + 1, device=rows.device)
        window = rows.flatten(2).index_select(2, (there[:, None] + aside).reshape(-1))
        return linear(window.flatten(1), (self.weight * self.sees).flatten(1), self.bias)


class _Rows(nn.Module):
    """A masked convolution and Row LSTM layers, each added to what is below, as a trunk."""

    layers: Any  # of _RowLSTM

    def __init__(
        self, first: _MaskedConvolution, layers: int, kernel: int, width: int, dropout: float, context_dim: int
    ) -> None:
        super().__init__()
        self.width, self.first = width, first
        self.layers = nn.ModuleList(_RowLSTM(first.out_channels, kernel // 2, context_dim) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, context: Tensor | None) -> Tensor:
        """Features of all pixels, ``(B, channels, H, W)``."""
        h = self.first(pixels)
        for layer in self.layers:
            h = h + self.dropout(layer(h, context))
        return h

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Nothing seen yet: rows of pixels, and the memory of each layer."""
        own = [tensor for layer in self.layers for tensor in layer.memory(batch, self.width)]
        state = [self.first.memory(batch, self.width), *own]
        return state if context is None else [*state, context]

    def step(self, state: Sequence[Tensor], n: Tensor, before: Tensor) -> Tensor:
        """Features of pixel n."""
        rows, *rest = state
        context = rest[-1] if len(rest) % 3 else None
        row, column = n // self.width, n % self.width
        h = self.first.step(rows, before, n, self.width)
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


class _Diagonals(nn.Module):
    """A masked convolution and Diagonal BiLSTM layers, each added to what is below, as a trunk.

    The stream from the right begins at the last pixel of a row, of which the masked convolution there knows nothing. So in the
    first layer that stream takes in the pixel itself as well, ``itself``, which lies before all that it is used for, one row
    below. With weights of 0 there the layers are those of the paper, whose pixels see the last one of the row above through the
    masked convolution alone, if it reaches so far.

    Steps keep two rows of what each layer takes in and of the states of both streams. The stream from the right over the row
    above begins at that row's end, so all of it is due when a row begins: W cells one after another. Since one graph serves
    every step, each computes them anew, for all layers at once.
    """

    layers: Any  # of _DiagonalLSTM

    def __init__(self, first: _MaskedConvolution, layers: int, width: int, dropout: float, context_dim: int) -> None:
        super().__init__()
        self.width, self.first = width, first
        self.itself = nn.Conv2d(first.in_channels, first.out_channels, 1, bias=False)
        self.layers = nn.ModuleList(_DiagonalLSTM(first.out_channels, context_dim) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor, context: Tensor | None) -> Tensor:
        """Features of all pixels, ``(B, channels, H, W)``."""
        h = self.first(pixels)
        known = h + self.itself(pixels)
        for layer in self.layers:
            h = known = h + self.dropout(layer(h, known, context))
        return h

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Nothing seen yet: rows of pixels; of all layers rows of x, h and c from the left, h from the right."""
        new, width = self.first.weight.new_zeros, self.width
        sizes = [(2, width), (2, 1 + width), (1, 1 + width), (2, width)]
        planes = [new(batch, len(self.layers) * self.first.out_channels, *size) for size in sizes]
        state = [self.first.memory(batch, width), *planes]
        return state if context is None else [*state, context]

    def step(self, state: Sequence[Tensor], n: Tensor, before: Tensor) -> Tensor:
        """Features of pixel n."""
        rows, inputs, left, cells, right, *rest = state
        context = rest[0] if rest else None
        row, column = n // self.width, n % self.width
        h = self.first.step(rows, before, n, self.width)
        from_right = self._from_right(rows, inputs, right, row, context).index_select(2, column.reshape(1)).squeeze(2)
        near = torch.stack([(row + 1) % 2 * left.shape[3] + column + 1, row % 2 * left.shape[3] + column])  # above, left
        seen, c = left.flatten(2).index_select(2, near), cells.flatten(2).index_select(2, column.reshape(1)).squeeze(2)
        found = []
        parts = (plane.chunk(len(self.layers), 1) for plane in (seen, c, from_right))
        for layer, near, cell, right_state in zip(self.layers, *parts):
            left_state, cell = layer.step(h, near, cell, context)
            found.append((h, left_state, cell))
            h = h + left_state + right_state
        x, new, cell = (torch.cat(tensors, 1) for tensors in zip(*found))
        put(inputs, x, row % 2, column)
        put(left, new, row % 2, column + 1)
        put(cells, cell, 0 * row, column + 1)
        return h

    def _from_right(self, rows: Tensor, inputs: Tensor, right: Tensor, row: Tensor, context: Tensor | None) -> Tensor:
        """The states of the stream from the right over the row above, ``(B, layers * channels, W)``, noted in ``right``."""
        above, older = ((row + 1) % 2).reshape(1), (row % 2).reshape(1)
        pixels = rows.index_select(2, ((row - 1) % rows.shape[2]).reshape(1))[..., self.first.reach :][..., : self.width]
        first, *others = inputs.index_select(2, above).chunk(len(self.layers), 1)  # (B, channels, 1, W) each
        x = [first + self.itself(pixels), *others]
        up = right.index_select(2, older).squeeze(2).chunk(len(self.layers), 1)
        gates = torch.stack([layer.gates_from_right(*own, context) for layer, *own in zip(self.layers, x, up)])
        weight = torch.stack([layer.along_row() for layer in self.layers])
        h = c = gates.new_zeros(*gates.shape[:2], self.first.out_channels)  # (layers, B, channels)
        states = []
        for column in reversed(gates.unbind(3)):
            h, c = _cell(torch.baddbmm(column, h, weight), c, 2)
            states.append(h)
        found = torch.stack(states[::-1], 3).transpose(0, 1).flatten(1, 2) * (row > 0)
        right.index_copy_(2, above, found.unsqueeze(2))
        return found


class _DiagonalLSTM(nn.Module):
    """One Diagonal BiLSTM layer; what belongs to the stream from the left comes before what belongs to that from the right."""

    def __init__(self, channels: int, context_dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.left, self.right = (nn.Conv2d(channels, 4 * channels, 1) for _ in range(2))  # input to state
        self.state_to_state = nn.Conv1d(2 * channels, 8 * channels, 2, groups=2, bias=False)
        self.condition = nn.Linear(context_dim, 8 * channels, bias=False) if context_dim else None

    def forward(self, x: Tensor, known: Tensor, context: Tensor | None) -> Tensor:
        """The states of all pixels, ``(B, channels, H, W)``, from x and from what the stream from the right may know."""
        gates = torch.cat([self.left(x), self.right(known).flip(3)], 1)
        if self.condition is not None:
            gates = gates + self.condition(context)[:, :, None, None]
        h = c = x.new_zeros(len(x), 2, self.channels, x.shape[2])
        states = []
        for diagonal in _skewed(gates).unbind(3):  # gates of 0 keep h and c at 0: nothing enters from outside the image
            sums = diagonal + self.state_to_state(pad(h.flatten(1, 2), (1, 0)))
            h, c = _cell(sums.unflatten(1, (2, -1)), c, 2)
            states.append(h)
        left, right = _unskewed(torch.stack(states, 4)).unbind(1)
        return left + pad(right.flip(3), (0, 0, 1, 0))[:, :, :-1]

    # One pixel at a time.

    def step(self, x: Tensor, seen: Tensor, c: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """h and c of the stream from the left at one pixel, ``(B, channels)``, from h above and to the left, and c there."""
        weight = self.state_to_state.weight[: 4 * self.channels]
        gates = linear(x, self.left.weight.flatten(1), self.left.bias) + linear(seen.flatten(1), weight.flatten(1))
        if self.condition is not None:
            gates = gates + self.condition(context)[:, : 4 * self.channels]
        return _cell(gates, c)

    def gates_from_right(self, x: Tensor, up: Tensor, context: Tensor | None) -> Tensor:
        """What the gates of a row take from its x and from h one row up, ``(B, 4 channels, W)``."""
        gates = self.right(x).squeeze(2) + conv1d(up, self.state_to_state.weight[4 * self.channels :, :, :1])
        return gates if self.condition is None else gates + self.condition(context)[:, 4 * self.channels :, None]

    def along_row(self) -> Tensor:
        """What the gates of the stream from the right take from h in the same row, ``(channels, 4 channels)``."""
        return self.state_to_state.weight[4 * self.channels :, :, 1].T


def _skewed(x: Tensor) -> Tensor:
    """Each row one place behind the row above, and zeros elsewhere: ``(..., H, W)`` to ``(..., H, H + W - 1)``."""
    height, width = x.shape[-2:]
    return pad(x, (0, height)).flatten(-2)[..., :-height].unflatten(-1, (height, height + width - 1))


def _unskewed(x: Tensor) -> Tensor:
    """The way back."""
    height, length = x.shape[-2:]
    return pad(x.flatten(-2), (0, height)).unflatten(-1, (height, length + 1))[..., : length + 1 - height]


def _cell(gates: Tensor, c: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """h and c from the sums at the gates, four times as many along ``dim``, and the c before."""
    out, forget, take, new = gates.chunk(4, dim)
    c = torch.sigmoid(forget) * c + torch.sigmoid(take) * torch.tanh(new)
    return torch.sigmoid(out) * torch.tanh(c), c
