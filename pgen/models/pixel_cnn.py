r"""The gated PixelCNN: convolutions that see the pixels above and to the left.

Each layer has a vertical stack, which sees the rows above, and a horizontal one, which sees the pixels to the left in the row
and takes in the vertical stack, so that together they see all that comes before a pixel, without a blind spot:

.. math::

    v' = \operatorname{gate}(W_v * v + V_v c), \qquad
    h' = h + W_o \operatorname{gate}(W_h * h + W_{vh} (W_v * v) + V_h c), \qquad
    \operatorname{gate}(a, b) = \tanh(a) \, \sigma(b)

van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu (2016), Conditional image generation with PixelCNN decoders,
arXiv:1606.05328, equation 4 and figure 2; the likelihood of levels: Salimans et al. (2017), PixelCNN++, arXiv:1701.05517.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..contracts import Seed
from .image import ImageModel, PixelNetwork, put

__all__ = ["PixelCNN"]


class PixelCNN(ImageModel):
    r"""Gated PixelCNN.

    Shapes: x ``(N, H, W)`` or ``(N, C, H, W)``, context ``(N, context_dim)``: a class as one-hot numbers, or any vector.
    ``log_prob`` is one pass; a sample takes a step for each number, at a cost that depends neither on how far the network sees
    nor on the height of the image.

    Args:
        event_shape: ``(H, W)`` or ``(C, H, W)``.
        channels: Of each stack.
        layers: How many.
        kernel: Width of the convolutions, odd.
        first_kernel: That of the first layer.
        head: Size of the hidden layer that reads the features of a pixel.
        likelihood: ``"bernoulli"``, ``"categorical"`` (0, ..., num_classes - 1), ``"discretized_logistic_mixture"`` (levels 0,
            ..., num_classes - 1), ``"gaussian"`` or ``"gaussian_mixture"``.
        num_classes: Classes or levels.
        num_components: Of a mixture (default 10).
        dropout: Probability with which a channel of a layer's output is left out of a training step.
        context_dim: Size of the vector that every layer is conditioned on; 0 for none.
        seed: Keys the initial weights.

    Raises:
        ValueError: If the layers together look farther sideways than the image is wide.

    Example:
        >>> pixel_cnn = PixelCNN((8, 8), channels=4, layers=2)
        >>> pixel_cnn.next(torch.zeros(3, 10)).probs.shape  # of the eleventh pixel
        torch.Size([3])
    """

    family = "pixel_cnn"

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: int = 32,
        layers: int = 5,
        *,
        kernel: int = 3,
        first_kernel: int = 5,
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
        reach = _reach(kernel, first_kernel, layers, self.size[1])
        with self.initial_weights(seed):
            trunk = _Gated(self.channels * self.observation.width, channels, reach, self.size[1], dropout, context_dim)
            self.network = PixelNetwork(trunk, channels, self.observation, self.size, head)


def _reach(kernel: int, first_kernel: int, layers: int, width: int) -> list[int]:
    """How far each layer looks to either side."""
    reach = [first_kernel // 2, *[kernel // 2] * (layers - 1)]
    if sum(reach) >= width:
        raise ValueError(
            f"`layers`: {layers} layers with kernels {first_kernel}, {kernel}, ... look {sum(reach)} pixels sideways, which "
            f"should be less than the width of the image, {width}; use fewer layers or smaller kernels"
        )
    return reach


class _Gated(nn.Module):
    """The two stacks as a trunk.

    Steps keep, for each layer, the last rows of the vertical stack and this row of the horizontal one. Row i + 1 of the
    vertical stack depends on rows up to i alone; layer l computes it one pixel a step, ``lag[l]`` pixels behind the pixel at
    hand, so that it is done when row i + 1 begins.
    """

    layers: Any  # of _Layer

    def __init__(self, inputs: int, channels: int, reach: Sequence[int], width: int, dropout: float, context_dim: int) -> None:
        super().__init__()
        self.inputs, self.width = inputs, width
        self.lag = [1 + sum(reach[: i + 1]) for i in range(len(reach))]
        self.layers = nn.ModuleList(
            _Layer(channels if i else inputs, channels, r, context_dim, dropout, residual=i > 0, last=i == len(reach) - 1)
            for i, r in enumerate(reach)
        )

    def forward(self, pixels: Tensor, context: Tensor | None) -> Tensor:
        """Features of all pixels, ``(B, channels, H, W)``."""
        v = pad(pixels, (0, 0, 1, 0))[:, :, :-1]  # the row above
        h = pad(pixels, (1, 0))[..., :-1]  # the pixel to the left
        features = 0.0
        for layer in self.layers:
            v, h, skip = layer(v, h, context)
            features = features + skip
        return cast(Tensor, features)

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Nothing seen yet, and row 0 of the vertical stack."""
        v = self.layers[0].vertical.weight.new_zeros(batch, self.inputs, 1, self.width)
        state: list[Tensor] = []
        for layer in self.layers:
            rows, sums, row = layer.memory(batch, self.width)
            rows[:, :, 0, layer.reach : layer.reach + self.width] = v[:, :, 0]
            v = layer.vertical(layer.above(v))
            sums[:, :, 0] = layer.link(v)[:, :, 0]
            v = layer.gate_vertical(v, context)
            state += [rows, sums, row]
        return state if context is None else [*state, context]

    def step(self, state: Sequence[Tensor], n: Tensor, before: Tensor) -> Tensor:
        """Features of pixel n."""
        context = state[-1] if len(state) % 3 else None
        column, past = n % self.width, n - 1
        v, at, h, features = before, past, before, torch.zeros(())
        for i, layer in enumerate(self.layers):
            rows, sums, row = state[3 * i : 3 * i + 3]
            layer.put(rows, v, at // self.width + 1, at % self.width)
            at = n - self.lag[i]
            v = layer.look_up(rows, at // self.width + 1, at % self.width)
            put(sums, linear(v, layer.link.weight.flatten(1)), (at // self.width + 1) % 2, at % self.width)
            v = layer.gate_vertical(v, context)
            put(row, h, 0 * n, layer.reach + (column if i else past % self.width + 1))
            h, skip = layer.look_left(row, sums, n // self.width, column, h, context)
            features = features + skip
        return features


class _Layer(nn.Module):
    """One gated layer of both stacks."""

    def __init__(
        self, inputs: int, channels: int, reach: int, context_dim: int, dropout: float, *, residual: bool, last: bool
    ) -> None:
        super().__init__()
        self.reach, self.residual = reach, residual
        self.vertical = nn.Conv2d(inputs, 2 * channels, (reach + 1, 2 * reach + 1))
        self.horizontal = nn.Conv2d(inputs, 2 * channels, (1, reach + 1))
        self.link = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False)
        self.skip = nn.Conv2d(channels, channels, 1)
        self.out = None if last else nn.Conv2d(channels, channels, 1)
        self.condition = nn.Linear(context_dim, 4 * channels, bias=False) if context_dim else None
        self.dropout = nn.Dropout(dropout)

    def above(self, v: Tensor) -> Tensor:
        return pad(v, (self.reach, self.reach, self.reach, 0))

    def told(self, context: Tensor | None, dims: int) -> tuple[Tensor | float, Tensor | float]:
        """What the context adds to either stack, ``(B, 2 channels, ...)``."""
        if self.condition is None:
            return 0.0, 0.0
        first, second = self.condition(context).chunk(2, 1)
        return first.reshape(*first.shape, *[1] * dims), second.reshape(*second.shape, *[1] * dims)

    def gate_vertical(self, v: Tensor, context: Tensor | None) -> Tensor:
        return _gate(v + self.told(context, v.dim() - 2)[0])

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Both stacks and the layer's part of the features."""
        v = self.vertical(self.above(v))
        inner = _gate(self.horizontal(pad(h, (self.reach, 0))) + self.link(v) + self.told(context, 2)[1])
        inner = self.dropout(inner)
        return self.gate_vertical(v, context), self._out(inner, h), self.skip(inner)

    def _out(self, inner: Tensor, h: Tensor) -> Tensor:
        if self.out is None:
            return h
        out = _pointwise(self.out, inner)
        return out + h if self.residual else out

    # One pixel at a time.

    def memory(self, batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the vertical stack's input, two rows of its link to the horizontal one, and a row of that one's input."""
        new, (size, inputs) = self.vertical.weight.new_zeros, self.vertical.weight.shape[:2]
        rows = new(batch, inputs, self.reach + 2, width + 2 * self.reach)
        return rows, new(batch, size, 2, width), new(batch, inputs, 1, self.reach + width + 1)

    def put(self, rows: Tensor, v: Tensor, row: Tensor, column: Tensor) -> None:
        """Note the input of the vertical stack at one place."""
        put(rows, v, row % rows.shape[2], column + self.reach)

    def look_up(self, rows: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """The vertical convolution at one place, ``(B, 2 channels)``."""
        steps = torch.arange(self.reach + 1, device=rows.device)
        there = (row - self.reach + steps) % rows.shape[2] * rows.shape[3]
        aside = column + torch.arange(2 * self.reach + 1, device=rows.device)
        window = rows.flatten(2).index_select(2, (there[:, None] + aside).reshape(-1))
        return linear(window.flatten(1), self.vertical.weight.flatten(1), self.vertical.bias)

    def look_left(
        self, row: Tensor, sums: Tensor, at: Tensor, column: Tensor, h: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The horizontal stack at one place and the layer's part of the features, ``(B, channels)`` each."""
        window = row.flatten(2).index_select(2, column + torch.arange(self.reach + 1, device=row.device))
        link = sums.flatten(2).index_select(2, (at % 2 * sums.shape[3] + column).reshape(1)).squeeze(2)
        seen = linear(window.flatten(1), self.horizontal.weight.flatten(1), self.horizontal.bias)
        inner = _gate(seen + link + self.told(context, 0)[1])
        return self._out(inner, h), _pointwise(self.skip, inner)


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def _pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of kernel 1, on planes or on a single pixel."""
    return layer(x) if x.dim() == 4 else linear(x, layer.weight.flatten(1), layer.bias)
