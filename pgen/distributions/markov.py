r"""Sequences from a hidden Markov chain, and the exact recursions over its states.

.. math:: p(x_{1:T}) = \sum_{z_{1:T}} \pi_{z_1} p(x_1 \mid z_1) \prod_{t=2}^T A_{z_{t-1} z_t} \, p(x_t \mid z_t)

The sum over :math:`K^T` paths is T products of a row of numbers with the matrix A (the forward algorithm), here of normalised
probabilities in float64, so that nothing under- or overflows: one matrix product, one product and one division a position for
all sequences at once. What lies behind the end of a sequence emits one, which changes nothing. Where arrays have a row for each
sequence, each has a chain of its own.

Rabiner (1989), A tutorial on hidden Markov models, Proceedings of the IEEE 77:257, section III.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from .components import Components, Values, pick

__all__ = ["HiddenMarkovChain", "emissions", "filtered", "most_probable", "moved", "smoothed"]

TINY = 1e-300
"""Added to predicted probabilities, so that data which the chain cannot have made are merely very improbable."""


def emissions(components: Components, arrays: Values, x: Tensor, lengths: Tensor | None) -> Tensor:
    """Log-density of each position in each state, ``(N, T, K)``, float64; zero behind the end."""
    arrays = _at_positions(components, arrays)
    log_prob = components.log_prob(x.flatten(2) if x.dim() > 2 else x[..., None], arrays).double()
    if lengths is None:
        return log_prob
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    return torch.where(inside[..., None], log_prob, torch.zeros_like(log_prob))


def _at_positions(components: Components, arrays: Values) -> Values:
    """Arrays with an axis of one for positions, ``(N, 1, *shape)``, where each sequence has its own."""
    return {name: array.unsqueeze(1) if array.dim() > len(components.shapes[name]) else array for name, array in arrays.items()}


def moved(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows ``(N, K)`` times one matrix ``(K, L)``, or times the matrix of each row, ``(N, K, L)``."""
    return rows @ matrix if matrix.dim() == 2 else (rows[..., None] * matrix).sum(-2)


def filtered(initial: Tensor, transition: Tensor, emission: Tensor) -> tuple[Tensor, Tensor]:
    r"""The forward algorithm.

    Args:
        initial: :math:`\pi`, ``(K,)``, or ``(N, K)``.
        transition: A, ``(K, K)`` or ``(N, K, K)``; rows sum to one.
        emission: Log-densities ``(N, T, K)``.

    Returns:
        :math:`p(z_t \mid x_{1:t})`, ``(N, T, K)``, and :math:`\log p(x_{1:T})`, ``(N,)``.
    """
    most = emission.amax(-1, keepdim=True)
    likelihood = (emission - most).exp()
    ahead = initial.double().expand(len(emission), -1)
    states, totals = [], []
    for t in range(emission.shape[1]):
        joint = (ahead + TINY) * likelihood[:, t]
        totals.append(joint.sum(-1, keepdim=True))
        states.append(joint / totals[-1])
        ahead = moved(states[-1], transition.double())
    return torch.stack(states, 1), torch.cat(totals, -1).log().sum(-1) + most.sum((-2, -1))


def smoothed(initial: Tensor, transition: Tensor, emission: Tensor) -> Tensor:
    r"""The forward-backward algorithm: :math:`p(z_t \mid x_{1:T})`, ``(N, T, K)``; arguments as ``filtered``."""
    states, _ = filtered(initial, transition, emission)
    likelihood = (emission - emission.amax(-1, keepdim=True)).exp()
    after = torch.ones_like(states[:, 0])
    found = [states[:, -1]]
    for t in range(emission.shape[1] - 2, -1, -1):
        after = moved(likelihood[:, t + 1] * after, transition.double().mT)
        after = after / after.sum(-1, keepdim=True)
        joint = states[:, t] * after
        found.append(joint / joint.sum(-1, keepdim=True))
    return torch.stack(found[::-1], 1)


def most_probable(initial: Tensor, transition: Tensor, emission: Tensor, inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""The Viterbi algorithm.

    Args:
        initial: As in ``filtered``.
        transition: The same.
        emission: The same.
        inside: Which positions belong to their sequence, ``(N, T)``; all by default. Behind the end of a sequence the state
            stays, so that the rest adds nothing.

    Returns:
        The most probable path ``(N, T)`` and :math:`\max_z \log p(x, z)`, ``(N,)``.
    """
    log_transition = transition.double().log()
    ended = torch.zeros_like(emission[..., 0], dtype=torch.bool) if inside is None else ~inside
    score, came = initial.double().log() + emission[:, 0], []
    stay = torch.arange(score.shape[-1], device=score.device)
    for t in range(1, emission.shape[1]):
        best, where = (score[..., None] + log_transition).max(-2)
        score = torch.where(ended[:, t, None], score, best + emission[:, t])
        came.append(torch.where(ended[:, t, None], stay, where))
    value, state = score.max(-1)
    path = [state]
    for where in came[::-1]:
        path.append(where.gather(-1, path[-1][:, None])[:, 0])
    return torch.stack(path[::-1], 1), value


class HiddenMarkovChain(dist.TorchDistribution):
    r"""Sequences whose positions are emitted by the states of a Markov chain.

    Args:
        initial: Probabilities of the first state, ``(K,)``; ``(N, K)`` where each of N sequences has a chain of its own.
        transition: Of the next state given this one, ``(K, K)`` or ``(N, K, K)``.
        components: What states emit.
        arrays: The components' arrays, with N rows where each sequence has its own.
        event_shape: ``(T, *frame)``.
        lengths: Of each sequence, ``(N,)``; None where all have T positions.
    """

    arg_constraints: ClassVar[dict[str, Constraint]] = {}

    def __init__(
        self,
        initial: Tensor,
        transition: Tensor,
        components: Components,
        arrays: Values,
        event_shape: Sequence[int],
        lengths: Tensor | None = None,
        batch_shape: Sequence[int] | None = None,
    ) -> None:
        self.initial, self.transition, self.components, self.arrays = initial, transition, components, arrays
        self.lengths = lengths
        batch_shape = initial.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> HiddenMarkovChain:
        """The same with more axes."""
        fields = self.initial, self.transition, self.components, self.arrays
        return HiddenMarkovChain(*fields, self.event_shape, self.lengths, batch_shape)

    @property
    def support(self) -> Constraint:
        """Of each number."""
        return self.components.support

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x_1, ..., x_n), ``(N,)``, in nats."""
        emission = emissions(self.components, self.arrays, x, self.lengths)
        return filtered(self.initial, self.transition, emission)[1].to(x.dtype if x.is_floating_point() else None)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Sequences of T positions."""
        shape = (*sample_shape, *self.batch_shape)
        if self.initial.dim() == 1:
            states = [dist.Categorical(self.initial).sample(shape)]
        else:
            states = [dist.Categorical(self.initial.expand(*self.batch_shape, -1)).sample(torch.Size(sample_shape))]
        while len(states) < self.event_shape[0]:
            states.append(dist.Categorical(pick(self.transition, states[-1], self.transition.dim() - 2)).sample())
        x = self.components.sample(_at_positions(self.components, self.arrays), torch.stack(states, -1))  # (*shape, T, D)
        return x.reshape(*shape, *self.event_shape) if math.prod(self.event_shape) else x
