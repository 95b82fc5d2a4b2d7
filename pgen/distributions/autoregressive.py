r"""Autoregressive distributions over causal networks: one pass for the density, one cheap step for each symbol of a sample.

.. math:: p(x \mid c) = \prod_{t=1}^{T} p(x_t \mid x_1, \ldots, x_{t-1}, c)

A causal network gives the parameters of every factor at once, ``network(x, context)``, which is all that training and
``log_prob`` need. For sampling it is a state machine: ``start`` makes a state of tensors of fixed shape, ``step`` takes one
position further. A step costs the same at every position, however far back the network looks, and since it is a function of
tensors of fixed shape it can be captured once and repeated: see ``pgen.evaluation.steps``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from .observation import Observation

__all__ = ["Autoregressive", "CausalNetwork", "StepFunction", "run_eagerly", "stepping"]


class CausalNetwork(Protocol):
    """What ``Autoregressive`` asks of a network; positions are t = 0, ..., T - 1 in the order of generation.

    A network with a local condition takes it, ``(B, rows, local_dim)``, after the context.
    """

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Outputs of all positions, ``(B, T, outputs)``, from x, ``(B, T, *element)``; those at t see x before t alone."""

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """The state before the first position: tensors of fixed shape that are this call's own, parameters left out."""

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Outputs at t, ``(B, outputs)``, and the state, which may be changed in place.

        ``t`` is an int64 tensor of shape (); ``previous`` is x at t - 1, ``(B, *element)``, zeros at t = 0 (as floats).
        """


StepFunction = Callable[..., Tensor]
"""``(state, t, given, observed) -> x_t``: draws the numbers at t, or takes those given, and changes the state in place."""

Runner = Callable[[Any, StepFunction, list[Tensor], Tensor, Tensor], Tensor]
"""``(owner, step, state, given (T, B, *element), observed (T, B)) -> (T, B, *element)``; ``owner`` tells steps apart."""


def run_eagerly(owner: Any, step: StepFunction, state: list[Tensor], given: Tensor, observed: Tensor) -> Tensor:
    """All steps one after another, as written."""
    positions = torch.arange(len(given), device=given.device)
    return torch.stack([step(state, t, given[i], observed[i]) for i, t in enumerate(positions)])


_RUNNERS: list[Runner] = [run_eagerly]


@contextmanager
def stepping(runner: Runner) -> Iterator[None]:
    """Let ``runner`` repeat the steps of every autoregressive distribution that is sampled inside."""
    _RUNNERS.append(runner)
    try:
        yield
    finally:
        _RUNNERS.pop()


class Autoregressive(TorchDistribution):
    r"""The distribution of x, drawn number by number: a causal network and an observation model of what is at one position.

    Shapes: x ``(*batch, *event_shape)``, cut into T positions that hold a tensor of shape ``observation.event_shape`` each.

    Args:
        network: Gives the outputs of each position from those before; see ``CausalNetwork``.
        observation: From outputs to the distribution of what is at one position.
        event_shape: Shape of x; ``(T, *observation.event_shape)``, or any other with ``order``.
        context: ``(*batch, context_dim)``, or None.
        local: What positions are conditioned on, ``(*batch, rows, local_dim)``, or None; which row is read at which position
            is the network's to say.
        lengths: How many positions of each datum count, ``(*batch,)``: those behind have no density, and are 0 in samples.
        order: Which numbers of x, in row-major order, are at each position, ``(T, numbers of an element)``.

    Example:
        >>> class Coin:  # a fair coin, then the same again with probability 3/4
        ...     def __call__(self, x, context):
        ...         before = torch.cat([torch.zeros_like(x[:, :1]), 2 * x[:, :-1] - 1], 1)
        ...         return before.unsqueeze(-1) * torch.tensor(3.0).log()
        >>> from pgen.distributions import Bernoulli
        >>> Autoregressive(Coin(), Bernoulli(()), (2,)).log_prob(torch.tensor([[1.0, 1.0]])).exp()
        tensor([0.3750])
    """

    has_rsample = False
    arg_constraints: dict[str, Any] = {}

    def __init__(
        self,
        network: CausalNetwork,
        observation: Observation,
        event_shape: Sequence[int],
        *,
        context: Tensor | None = None,
        local: Tensor | None = None,
        lengths: Tensor | None = None,
        order: Tensor | None = None,
        batch_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.network, self.observation, self.order = network, observation, order
        self.context, self.local, self.lengths = context, local, lengths
        self.element = tuple(observation.event_shape)
        if batch_shape is None:
            given = ((context, 1), (local, 2), (lengths, 0))
            batch_shape = torch.broadcast_shapes(*(t.shape[: t.dim() - axes] for t, axes in given if t is not None))
        self.positions = math.prod(event_shape) // math.prod(self.element)
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """That of each number of x."""
        element: Any = self.observation.support
        return constraints.independent(element, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Autoregressive:
        """The same distribution for more data."""
        shape = torch.Size(batch_shape)
        context = None if self.context is None else self.context.expand(*shape, -1)
        local = None if self.local is None else self.local.expand(*shape, -1, -1)
        lengths = None if self.lengths is None else self.lengths.expand(shape)
        return Autoregressive(
            self.network, self.observation, self.event_shape,
            context=context, local=local, lengths=lengths, order=self.order, batch_shape=shape, validate_args=False,
        )  # fmt: skip

    # -- between x and its positions -----------------------------------------------------------------------------------

    def _sequence(self, x: Tensor) -> Tensor:
        """x by positions, ``(*batch, T, *element)``."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        if self.order is not None:
            x = x.reshape(*batch, -1)[..., self.order.reshape(-1)]
        return x.reshape(*batch, self.positions, *self.element)

    def _event(self, sequence: Tensor) -> Tensor:
        """The way back."""
        batch = sequence.shape[: sequence.dim() - len(self.element) - 1]
        flat = sequence.reshape(*batch, -1)
        if self.order is not None:
            flat = flat[..., self.order.reshape(-1).argsort()]
        return flat.reshape(*batch, *self.event_shape)

    def _told(self, shape: torch.Size) -> list[Tensor | None]:
        """What the network is told of each of the data, in rows: the context, and the local condition where there is one."""
        context, local = self.context, self.local
        context = None if context is None else context.expand(*shape, -1).reshape(-1, context.shape[-1])
        return [context] if local is None else [context, local.expand(*shape, -1, -1).reshape(-1, *local.shape[-2:])]

    # -- density -------------------------------------------------------------------------------------------------------

    def _factors(self, sequence: Tensor, shape: torch.Size) -> TorchDistribution:
        """p(x_t | x_<t) of all positions of rows ``(B, t, *element)``, batch shape ``(B, t)``."""
        outputs = self.network(sequence, *self._told(shape))
        return self.observation.at(outputs, torch.arange(sequence.shape[1], device=sequence.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of x, in nats, ``(*batch,)``: one pass of the network."""
        return self.log_probs(value).sum(-1)

    def log_probs(self, value: Tensor) -> Tensor:
        """Log-density of each position given those before, in nats, ``(*batch, T)``; 0 behind the length of a datum."""
        if self._validate_args:
            self._validate_sample(value)
        batch = value.shape[: value.dim() - len(self.event_shape)]
        shape = torch.broadcast_shapes(batch, self.batch_shape)
        value = value.expand(*shape, *self.event_shape)
        rows = self._sequence(value).reshape(-1, self.positions, *self.element)
        found = self._factors(self._floating(rows), shape).log_prob(rows).reshape(*shape, self.positions)
        if self.lengths is None:
            return found
        return torch.where(self._counted(found.device), found, torch.zeros_like(found))

    def _reference(self) -> Tensor:
        """A number of the network's own precision and device."""
        parameters = getattr(self.network, "parameters", lambda: iter(()))
        return next(parameters(), torch.zeros(())).detach()

    def _floating(self, rows: Tensor) -> Tensor:
        """As the network takes it: classes as floats of its own precision."""
        return rows if rows.is_floating_point() else rows.to(self._reference().dtype)

    def _counted(self, device: torch.device) -> Tensor:
        """Which positions count, ``(*batch, T)``."""
        assert self.lengths is not None
        return torch.arange(self.positions, device=device) < self.lengths.unsqueeze(-1)

    def next(self, prefix: Tensor) -> TorchDistribution:
        """The distribution of the next position after ``prefix``, ``(B, t, *element)`` with t < T: one pass of the network."""
        padded = torch.cat([prefix, torch.zeros_like(prefix[:, :1]) if prefix.shape[1] else _nothing(prefix)], 1)
        outputs = self.network(self._floating(padded), *self._told(torch.Size([len(prefix)])))
        t = torch.tensor(prefix.shape[1], device=prefix.device)
        return self.observation.at(outputs[:, -1], t)

    # -- sampling ------------------------------------------------------------------------------------------------------

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw x, ``(*sample_shape, *batch, *event_shape)``, by T steps."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self._drawn(shape, None, None)

    def complete(self, x: Tensor, observed: Tensor) -> Tensor:
        """Draw what is not ``observed`` of x, each position given those before it in the order of generation.

        Where the observed positions come first this is the conditional distribution given them.

        Args:
            x: ``(*batch, *event_shape)``.
            observed: Of the same shape; a position counts as observed where all its numbers are.
        """
        shape = x.shape[: x.dim() - len(self.event_shape)]
        rows = self._sequence(x).reshape(-1, self.positions, *self.element)
        kept = self._sequence(observed).reshape(len(rows), self.positions, -1).all(-1)
        return self._drawn(shape, rows, kept)

    def infill(self, x: Tensor, observed: Tensor, num_particles: int) -> Tensor:
        """Draw what is not ``observed`` of x, approximately from its conditional distribution given all that is.

        A particle filter: positions are drawn one after another, the observed ones weigh the particles of a datum by their
        probability, and particles are resampled where the weights have become uneven. Exact as particles grow many.

        Args:
            x: ``(N, *event_shape)``.
            observed: Of the same shape; a position counts as observed where all its numbers are.
            num_particles: For each datum.
        """
        count, size = len(x), num_particles
        rows = self._sequence(x).reshape(count, self.positions, *self.element).repeat_interleave(size, 0)
        kept = self._sequence(observed).reshape(count, self.positions, -1).all(-1).repeat_interleave(size, 0)
        told = [None if t is None else t.repeat_interleave(size, 0) for t in self._told(torch.Size([count]))]
        state = self.network.start(count * size, *told)
        found, weight = rows.clone(), rows.new_zeros(count, size)
        previous = torch.zeros_like(rows[:, 0])
        for i, t in enumerate(torch.arange(self.positions, device=x.device)):
            outputs, after = self.network.step(state, t, previous)
            seen = kept[:, i]
            drawn = self.observation.draw(outputs, t).to(rows.dtype)
            found[:, i] = torch.where(seen.reshape(-1, *[1] * len(self.element)), rows[:, i], drawn)
            said = self.observation.at(outputs, t).log_prob(rows[:, i])
            weight = weight + torch.where(seen, said, torch.zeros_like(said)).reshape(count, size)
            parents, weight = _resampled(weight)
            found, previous = found[parents], found[parents, i]
            state = [tensor[parents] for tensor in after]
        last = torch.distributions.Categorical(logits=weight).sample()
        return self._event(found[torch.arange(count, device=x.device) * size + last])

    def _drawn(self, shape: torch.Size, given: Tensor | None, observed: Tensor | None) -> Tensor:
        rows, T = math.prod(shape), self.positions
        with torch.no_grad():
            state = self.network.start(rows, *self._told(shape))
            reference = self._reference()
            state = [reference.new_zeros((rows, *self.element)), *state]
            if given is None or observed is None:
                given = reference.new_zeros(()).expand(rows, T, *self.element)
                observed = torch.zeros((), dtype=torch.bool, device=reference.device).expand(rows, T)
            given = given.to(reference)
            owner = (self.network, self.observation)
            drawn = _RUNNERS[-1](owner, self._step, state, given.transpose(0, 1), observed.transpose(0, 1))
            found = drawn.transpose(0, 1).reshape(*shape, T, *self.element)
            if self.lengths is not None:
                counted = self._counted(found.device).reshape(*self.lengths.shape, T, *[1] * len(self.element))
                found = torch.where(counted, found, torch.zeros_like(found))
            return self._event(found)

    def _step(self, state: Sequence[Tensor], t: Tensor, given: Tensor, observed: Tensor) -> Tensor:
        previous, *own = state
        outputs, after = self.network.step(own, t, previous)
        drawn = self.observation.draw(outputs, t)
        x = torch.where(observed.reshape(-1, *[1] * len(self.element)), given.to(drawn.dtype), drawn)
        for tensor, value in zip(state, (x, *after), strict=True):
            if value is not tensor:
                tensor.copy_(value)
        return x


def _nothing(prefix: Tensor) -> Tensor:
    return prefix.new_zeros((len(prefix), 1, *prefix.shape[2:]))


def _resampled(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Parents of particles ``(N * P,)`` and their log-weights ``(N, P)``: the same where weights are even, else drawn anew."""
    count, size = weight.shape
    share = weight.softmax(1)
    uneven = share.square().sum(1, keepdim=True) * size > 2  # an effective size below one half
    # Systematic: one uniform number places P evenly spaced points among the cumulated shares.
    points = (torch.arange(size, device=weight.device) + torch.rand(count, 1, device=weight.device).to(weight)) / size
    drawn = torch.searchsorted(share.cumsum(1), points.to(share)).clamp(max=size - 1)
    own = torch.arange(size, device=weight.device).expand(count, -1)
    first = size * torch.arange(count, device=weight.device).unsqueeze(1)
    return (first + torch.where(uneven, drawn, own)).reshape(-1), torch.where(uneven, torch.zeros_like(weight), weight)
