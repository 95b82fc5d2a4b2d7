r"""Networks that see how noisy their input is: what diffusion models and flow matching train.

All have one signature, ``network(z, level, context)``: z ``(B, *event_shape)`` is data with noise, level ``(B,)`` says how
much, from 0 (data) to 1 (noise), context is ``(B, context_dim)`` or None; out comes ``(B, *event_shape)``, or
``(B, *event_shape, outputs)``. Any module of that signature can take their place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from .dense import waves

__all__ = ["LevelEmbedding", "ResidualMLP", "UNet"]


class LevelEmbedding(nn.Module):
    r"""Sines and cosines of the level of noise at geometric frequencies from 1 to 1000, then two layers; the context is added.

    .. math:: e(t) = \bigl(\sin \omega_i t, \cos \omega_i t\bigr)_i, \qquad \omega_i = 1000^{i / (n - 1)}

    Shapes: level ``(B,)``, context ``(B, context_dim)`` -> ``(B, width)``.

    Args:
        width: Numbers that come out.
        context_dim: Size of the context; 0 for none.
        frequencies: n.

    References:
        Ho, Jain, Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239, appendix B.
    """

    def __init__(self, width: int, context_dim: int = 0, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.first, self.second = nn.Linear(2 * frequencies, width), nn.Linear(width, width)
        self.condition = nn.Linear(context_dim, width) if context_dim else None

    def forward(self, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Features of level and context."""
        powers = torch.arange(self.frequencies, device=level.device, dtype=level.dtype) / (self.frequencies - 1)
        angles = level[:, None] * (math.log(1000.0) * powers).exp()
        h = self.second(silu(self.first(torch.cat([angles.sin(), angles.cos()], -1))))
        return silu(h if self.condition is None else h + self.condition(context))


class ResidualMLP(nn.Module):
    r"""Dense residual network whose blocks are scaled and shifted by the level of noise.

    .. math:: h \leftarrow h + W_2\, \mathrm{silu}\bigl((1 + s(t)) \odot W_1\, \mathrm{norm}(h) + b(t)\bigr)

    Args:
        event_shape: Shape of z.
        width: Size of the hidden layers.
        blocks: Residual blocks.
        octaves: Of the waves of z beside z, as ``pgen.nn.waves`` has them.
        outputs: Numbers for each of z; with 1 there is no axis of outputs.
        context_dim: Size of the context; 0 for none.
        dropout: Probability with which a hidden unit is left out of a training step.

    References:
        Tancik et al. (2020), Fourier features let networks learn high frequency functions, arXiv:2006.10739; Kingma et al.
        (2021), arXiv:2107.00630, appendix C.

    Example:
        >>> network = ResidualMLP((2, 3), width=8, blocks=1)
        >>> network(torch.zeros(5, 2, 3), torch.rand(5)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 512,
        blocks: int = 3,
        *,
        octaves: int = 0,
        outputs: int = 1,
        context_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.octaves = octaves
        self.shape = (*event_shape, outputs) if outputs > 1 else tuple(event_shape)
        size = math.prod(event_shape)
        self.embed = LevelEmbedding(width, context_dim)
        self.first = nn.Linear(size * (1 + 2 * octaves), width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, size * outputs)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs at every number of z."""
        told = self.embed(level, context)  # (B, width)
        h = self.first(waves(z.flatten(1), self.octaves))
        for block in self.blocks:
            h = block(h, told)
        return self.last(silu(self.norm(h))).unflatten(-1, self.shape)


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.inner, self.outer, self.film = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told).chunk(2, -1)
        return h + self.outer(self.dropout(silu(self.inner(self.norm(h)) * (1 + scale) + shift)))


class UNet(nn.Module):
    r"""Small U-Net for images ``(H, W)`` or ``(C, H, W)``: residual convolutions at falling and rising resolution, with
    connections between equals, and attention at the lowest.

    Args:
        event_shape: Shape of an image; sides divisible by two for each factor after the first.
        width: Channels at full resolution.
        factors: Channels at each resolution, as multiples of ``width``; each halves the sides of the one before.
        outputs: Numbers for each of z; with 1 there is no axis of outputs.
        context_dim: Size of the context; 0 for none.
        dropout: Probability with which a channel's value is left out of a training step.

    References:
        Ronneberger, Fischer, Brox (2015), U-Net, arXiv:1505.04597; Ho, Jain, Abbeel (2020), arXiv:2006.11239, appendix B.

    Example:
        >>> network = UNet((4, 4), width=8)
        >>> network(torch.zeros(5, 4, 4), torch.rand(5)).shape
        torch.Size([5, 4, 4])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 32,
        factors: Sequence[int] = (1, 2),
        *,
        outputs: int = 1,
        context_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if len(event_shape) not in (2, 3):
            raise ValueError(f"`event_shape` of a U-Net should be (H, W) or (C, H, W), got {tuple(event_shape)}")
        halvings = 2 ** (len(factors) - 1)
        if any(side % halvings for side in event_shape[-2:]):
            raise ValueError(f"`event_shape` {tuple(event_shape)}: sides should be multiples of {halvings}; use fewer factors")
        self.event_shape, self.outputs = tuple(event_shape), outputs
        channels = 1 if len(event_shape) == 2 else event_shape[0]
        sizes, told = [width * f for f in factors], 4 * width
        self.embed = LevelEmbedding(told, context_dim)
        self.first = nn.Conv2d(channels, sizes[0], 3, padding=1)
        before = [sizes[0], *sizes[:-1]]
        self.down = nn.ModuleList(_Residual(a, b, told, dropout) for a, b in zip(before, sizes))
        self.middle = nn.ModuleList(_Residual(sizes[-1], sizes[-1], told, dropout) for _ in range(2))
        self.attention = _Attention(sizes[-1])
        self.up = nn.ModuleList(_Residual(2 * b, a, told, dropout) for a, b in reversed(list(zip(before, sizes))))
        self.norm = _norm(sizes[0])
        self.last = nn.Conv2d(sizes[0], channels * outputs, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs at every pixel."""
        told, kept = self.embed(level, context), []
        h = self.first(z.reshape(len(z), -1, *self.event_shape[-2:]))  # (B, channels, H, W)
        for i, block in enumerate(self.down):
            h = block(avg_pool2d(h, 2) if i else h, told)
            kept.append(h)
        h = self.middle[1](self.attention(self.middle[0](h, told)), told)
        for i, block in enumerate(self.up):
            h = block(torch.cat([interpolate(h, scale_factor=2.0) if i else h, kept.pop()], 1), told)
        out = self.last(silu(self.norm(h)))
        if self.outputs == 1:
            return out.reshape(z.shape)
        return out.reshape(len(z), self.outputs, *self.event_shape).movedim(1, -1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, told: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.second_norm, self.dropout = _norm(inputs), _norm(outputs), nn.Dropout(dropout)
        self.inner, self.outer = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.film = nn.Linear(told, 2 * outputs)
        self.through = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[..., None, None].chunk(2, 1)
        inner = self.second_norm(self.inner(silu(self.norm(h)))) * (1 + scale) + shift
        return self.through(h) + self.outer(self.dropout(silu(inner)))


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.ask, self.out = _norm(channels), nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        query, key, value = (part.flatten(2).mT for part in self.ask(self.norm(h)).chunk(3, 1))  # (B, places, channels)
        return h + self.out(scaled_dot_product_attention(query, key, value).mT.reshape(h.shape))
