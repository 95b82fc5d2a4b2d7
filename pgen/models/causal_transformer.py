r"""A causal transformer over symbols: attention to what came before, in pre-norm blocks.

.. math::

    h_t = e(x_{t-1}) + p_t + V y_t, \qquad h \leftarrow h + \operatorname{Attention}(\operatorname{LN} h), \qquad
    h \leftarrow h + W_2 \operatorname{gelu}(W_1 \operatorname{LN} h), \qquad \text{outputs}_t = W \operatorname{LN} h_t

where y holds what x is conditioned on: a context, the same at all positions, and the row of a local condition at t.

Vaswani et al. (2017), Attention is all you need, arXiv:1706.03762; Radford et al. (2019), Language models are unsupervised
multitask learners (pre-norm, learned positions; W is the table e, Press and Wolf 2017, arXiv:1608.05859).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..contracts import Seed, check_positive
from ..training.optim import Adam
from .sequence import Embedding, SequenceModel, conditions, row_at

__all__ = ["CausalTransformer"]


class CausalTransformer(SequenceModel):
    r"""Autoregressive sequences by causal attention.

    Shapes: x ``(N, T)`` or ``(N, T, F)``, context ``(N, context_dim)``; ``lengths`` ``(N,)`` where they are unequal; the local
    condition ``{"x": x, "local": h}``, ``(N, T, local_dim)``. The outputs at t see x before t, and h up to t.
    Samples keep the keys and values of T positions, so that a step costs the same at every t.

    Args:
        event_shape: ``(T,)``, or ``(T, F)`` with F numbers at each position. T is the most that it looks back at.
        likelihood: Of one symbol: ``"categorical"``, ``"bernoulli"``, ``"discretized_logistic_mixture"``, ``"gaussian"`` or
            ``"gaussian_mixture"`` (real numbers, which are standardised inside).
        num_classes: Values of a symbol, where they are finitely many.
        num_components: Of a mixture.
        width: Of the residual stream.
        layers: Number of blocks.
        heads: Of the attention; a divisor of ``width``.
        dropout: Share of each block's additions that training drops.
        context_dim: Size of the vector that every position is conditioned on; 0 for none.
        local_dim: Size of the local condition at each position; 0 for none.
        seed: Keys the initial weights.

    Example:
        >>> transformer = CausalTransformer((16,), num_classes=5, width=8, layers=1, heads=2)
        >>> transformer.next(torch.zeros(3, 4)).probs.shape
        torch.Size([3, 5])
    """

    family = "causal_transformer"
    longest = True
    default_epochs = 20
    adam = Adam(1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    network: _Network

    def __init__(
        self,
        event_shape: Sequence[int],
        likelihood: str = "categorical",
        num_classes: int | None = None,
        *,
        num_components: int | None = None,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
        context_dim: int = 0,
        local_dim: int = 0,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, likelihood, num_classes, num_components, context_dim, local_dim, dropout)
        for name, value in (("width", width), ("layers", layers), ("heads", heads)):
            check_positive(name, value)
        if width % heads:
            raise ValueError(f"`width` should be a multiple of heads={heads}, got {width}")
        self.stream, self.layers, self.heads = width, layers, heads
        with self.initial_weights(seed):
            embedding = Embedding(self.observation, width)
            blocks = [_Block(width, heads, dropout, layers) for _ in range(layers)]
            self.network = _Network(embedding, blocks, self.event_shape[0], self.outputs, context_dim + local_dim)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("layers", "heads")
        return {**super().settings(), "width": self.stream, **{name: getattr(self, name) for name in names}}

    def output_bias(self) -> nn.Parameter:
        """The bias of the last layer."""
        return self.network.bias


class _Network(nn.Module):
    blocks: Any  # of _Block

    def __init__(self, embedding: Embedding, blocks: Sequence[_Block], longest: int, outputs: int, told: int) -> None:
        super().__init__()
        width = embedding.begin.shape[0]
        if embedding.classes:
            nn.init.normal_(embedding.table.weight, std=0.02)
        self.embedding, self.blocks = embedding, nn.ModuleList(blocks)
        self.places = nn.Parameter(0.02 * torch.randn(longest, width))
        self.condition = nn.Linear(told, width) if told else None
        self.norm, self.bias = nn.LayerNorm(width), nn.Parameter(torch.zeros(outputs))
        self.last = None if self.tied else nn.Linear(width, outputs, bias=False)

    @property
    def tied(self) -> bool:
        """Whether the table of the symbols is the matrix of the logits as well."""
        return self.embedding.classes > 0 and not self.embedding.element

    def forward(self, x: Tensor, context: Tensor | None, local: Tensor | None = None) -> Tensor:
        """Outputs of all positions."""
        h = self.embedding(x) + self.places[: x.shape[1]]  # (B, T, width)
        if self.condition is not None:
            h = h + self.condition(conditions(context, local))  # one row where it holds at all positions
        for block in self.blocks:
            h = block(h)
        return self.outputs(h)

    def outputs(self, h: Tensor) -> Tensor:
        weight = self.embedding.table.weight if self.last is None else self.last.weight
        return nn.functional.linear(self.norm(h), weight, self.bias)

    def start(self, batch: int, context: Tensor | None, local: Tensor | None = None) -> list[Tensor]:
        """Empty keys and values of every block, and what the condition adds, ``(rows, B, width)``."""
        caches = [cache for block in self.blocks for cache in block.caches(batch, len(self.places))]
        if self.condition is None:
            return caches
        return [*caches, self.condition(conditions(context, local)).transpose(0, 1).contiguous()]

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Outputs at t."""
        h = self.embedding.step(t, previous) + self.places.index_select(0, t.reshape(1))  # (B, width)
        if self.condition is not None:
            h = h + row_at(state[-1], 1, t)
        for i, block in enumerate(self.blocks):
            h = block.step(h, t, state[2 * i], state[2 * i + 1])
        return self.outputs(h), state


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.attend = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for part in (self.attend, self.project, self.up, self.down):
            last = part in (self.project, self.down)  # the stream adds up 2 layers of them
            nn.init.normal_(part.weight, std=0.02 / (math.sqrt(2 * layers) if last else 1))
            nn.init.zeros_(part.bias)

    def forward(self, h: Tensor) -> Tensor:
        """The stream of all positions, ``(B, T, width)``."""
        q, k, v = (self._split(part) for part in self.attend(self.norm(h)).chunk(3, -1))  # (B, heads, T, width / heads)
        later = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).triu(1)
        return self._add(h, _attention(q, k, v, later).transpose(1, 2).flatten(2))

    def step(self, h: Tensor, t: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The stream at t, ``(B, width)``; keys and values take in their t-th, in place."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).unsqueeze(2) for part in self.attend(self.norm(h)).chunk(3, -1))
        keys.index_copy_(2, t.reshape(1), k)
        values.index_copy_(2, t.reshape(1), v)
        later = torch.arange(keys.shape[2], device=t.device) > t
        return self._add(h, _attention(q, keys, values, later).flatten(1))

    def caches(self, batch: int, longest: int) -> list[Tensor]:
        """Room for keys and values, ``(B, heads, T, width / heads)`` each."""
        width = self.project.in_features
        return [self.project.weight.new_zeros(batch, self.heads, longest, width // self.heads) for _ in range(2)]

    def _split(self, part: Tensor) -> Tensor:
        return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _add(self, h: Tensor, seen: Tensor) -> Tensor:
        h = h + self.dropout(self.project(seen))
        return h + self.dropout(self.down(gelu(self.up(self.norm_2(h)))))


def _attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Softmax attention, ``(B, heads, queries, width / heads)``, blind to what is hidden."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
