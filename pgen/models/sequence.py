r"""What families of sequences have in common: one distribution over all positions, lengths, prefixes and completions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import pyro
import torch
from torch import Tensor, nn

from ..base import GenerativeModel, _evaluating
from ..contracts import Batch, Seed, check_choice, check_positive
from ..data.arrays import as_batch, check_finite
from ..distributions.autoregressive import Autoregressive, CausalNetwork
from ..distributions.observation import OBSERVATIONS, Categorical, Observation, observation
from ..programs import isolated
from ..training.fit import Training

__all__ = ["Embedding", "SequenceModel", "checked_lengths", "recipe", "share"]

PRIMING_ROWS = 100_000
"""Symbols at most from which the marginal of one symbol is taken."""


class SequenceModel(GenerativeModel):
    r"""A family of sequences, :math:`p(x \mid c) = \prod_t p(x_t \mid x_{<t}, c)`.

    Shapes: x ``(N, T)`` or ``(N, T, F)`` with F numbers at each position, independent given the past.
    Sequences of unequal length are given as ``{"x": x, "lengths": n}``; see ``pgen.data.pad``.
    """

    also = ("lengths",)
    stepwise = True
    default_batch_size = 32
    network: CausalNetwork
    longest: ClassVar[bool] = False
    """Whether the network takes at most T positions; completions that are longer look back at the last ones."""

    def __init__(
        self, event_shape: Sequence[int], likelihood: str, num_classes: int | None, num_components: int | None, context_dim: int
    ) -> None:
        super().__init__(event_shape, context_dim=context_dim)
        if len(self.event_shape) > 2:
            raise ValueError(f"`event_shape` should be (T,) or (T, F), got {self.event_shape}")
        check_choice("likelihood", likelihood, tuple(OBSERVATIONS))
        self.likelihood, self.num_classes, self.num_components = likelihood, num_classes, num_components
        self.observation: Observation = observation(likelihood, self.event_shape[1:], num_classes, num_components)
        self.outputs = self.observation.outputs * math.prod(self.event_shape[1:])

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("likelihood", "num_classes", "num_components", "context_dim")
        return {"event_shape": list(self.event_shape), **{name: getattr(self, name) for name in names}}

    def output_bias(self) -> nn.Parameter:
        """What is added to the outputs."""
        raise NotImplementedError

    def prime(self, data: Batch) -> None:
        """Start at the frequencies of single symbols."""
        batch = self._prepared(data)[0]
        with torch.no_grad():
            self.output_bias().copy_(self.observation.start(_symbols(batch)[:PRIMING_ROWS]))

    # -- the program ---------------------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, context: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """p(x | c); of sequences with lengths, p(x_1, ..., x_n | n, c)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(context, lengths), obs=x)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Nothing is latent."""

    def distribution(
        self, context: Tensor | None = None, lengths: Tensor | None = None, length: int | None = None
    ) -> Autoregressive:
        """The distribution of x, or of sequences of another length."""
        shape = (length or self.event_shape[0], *self.event_shape[1:])
        return Autoregressive(self.network, self.observation, shape, context=context, lengths=lengths)

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        found = super()._further(x, given)
        if "lengths" in found:
            found["lengths"] = checked_lengths(found["lengths"], self.event_shape[0])
        return found

    def _event_size(self, batch: dict[str, Tensor]) -> float:
        lengths = batch.get("lengths")
        if lengths is None:
            return super()._event_size(batch)
        return float(lengths.double().mean()) * super()._event_size(batch) / self.event_shape[0]

    # -- prefixes ------------------------------------------------------------------------------------------------------

    def next(self, prefix: Any, context: Any = None) -> Any:
        """The distribution of the next symbol after each prefix.

        Args:
            prefix: ``(N, t)`` or ``(N, t, F)``, t from 0; of a network with at most T positions the last T - 1 count.
            context: One for each, or one for all.

        Returns:
            A distribution over what is at one position, batch shape ``(N,)``: ``.probs``, ``.log_prob``, ``.sample``.
        """
        given = self._prefix(prefix)
        if self.longest:
            given = given[:, max(0, given.shape[1] - self.event_shape[0] + 1) :]
        where = self._where(context, len(given))
        with torch.no_grad(), isolated(self.home), _evaluating(self):
            return self.distribution(where, length=given.shape[1] + 1).next(given)

    def complete(
        self,
        prefix: Any,
        length: int | None = None,
        context: Any = None,
        *,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Draw the rest of sequences that begin with ``prefix``.

        Args:
            prefix: ``(N, t)`` or ``(N, t, F)``.
            length: Of the completed sequences; by default T. A network with at most T positions goes on from the last half
                of its window whenever that is full.
            context: One for each, or one for all.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            ``(N, length, ...)``, the prefix included.
        """
        check_positive("length", length, allow_none=True)
        x, total, window = self._prefix(prefix), int(length or self.event_shape[0]), self.event_shape[0]
        if x.shape[1] > total:
            raise ValueError(f"`prefix` has {x.shape[1]} positions, more than length={total}; give a larger length")
        where = self._where(context, len(x))
        while x.shape[1] < total:
            kept = 0 if not self.longest or total <= window else max(0, x.shape[1] - window // 2)
            size = min(total - kept, window) if self.longest else total
            part = self._completed(x[:, kept:], size, where, (seed, x.shape[1]), compile, progress)
            x = torch.cat([x[:, :kept].to(part.dtype), part], 1)
        return x

    def _completed(
        self, prefix: Tensor, size: int, context: Tensor | None, keys: tuple[Seed, int], compile: str, progress: bool
    ) -> Tensor:
        known = prefix.shape[1]
        x = torch.cat([prefix, prefix.new_zeros((len(prefix), size - known, *prefix.shape[2:]))], 1)
        batch = {"x": x, **({} if context is None else {"context": context})}

        def drawn(batch: Batch) -> Tensor:
            rows = cast(dict[str, Tensor], batch)
            observed = (torch.arange(size, device=x.device) < known).reshape(-1, *[1] * (x.dim() - 2)).expand_as(rows["x"])
            return self.distribution(rows.get("context"), length=size).complete(rows["x"], observed)

        with self._stepping(compile, progress):
            return self._rows(drawn, f"complete {keys[1]}", batch, keys[0], progress, compile="eager")

    def _prefix(self, prefix: Any) -> Tensor:
        given = torch.as_tensor(as_batch(prefix) if not isinstance(prefix, Tensor) else prefix)
        element = self.event_shape[1:]
        if given.dim() != 2 + len(element) or tuple(given.shape[2:]) != element:
            wanted = f"(N, t{''.join(f', {n}' for n in element)})"
            raise ValueError(
                f"`prefix` should have shape {wanted}, got {tuple(given.shape)}"
                + ("; did you mean prefix[None]?" if given.dim() == 1 + len(element) else "")
            )
        check_finite(given, "prefix")
        given = self._like(given)
        bad = ~self.observation.support.check(given)
        if bool(bad.any()):
            raise ValueError(
                f"`prefix` holds {float(given[bad][0]):g}, outside the support {self.observation.support} of "
                f"likelihood={self.likelihood!r}"
            )
        return given


def share(name: str, value: float) -> float:
    """A share in [0, 1), checked."""
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` should lie in [0, 1), got {value}")
    return float(value)


def recipe(settings: Training) -> Training:
    """How sequence models are trained by default: gradients clipped at norm 1, the rate lowered to 0 along a cosine."""
    schedule = settings.schedule if settings.schedule is not None or settings.stop == "converged" else "cosine"
    return replace(settings, clip_norm=settings.clip_norm or 1.0, schedule=schedule)


def _symbols(batch: Any) -> Tensor:
    """The symbols that count, ``(n, *element)``."""
    x, lengths = batch["x"], batch.get("lengths")
    if lengths is None:
        return cast(Tensor, x.flatten(0, 1))
    return cast(Tensor, x[torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)])


def checked_lengths(lengths: Tensor, longest: int) -> Tensor:
    """Lengths of sequences, whole numbers from 1 to ``longest``."""
    if lengths.dim() != 1:
        raise ValueError(f"`lengths` should be one number a datum, shape (N,), got {tuple(lengths.shape)}")
    bad = (lengths < 1) | (lengths > longest) | (lengths != lengths.floor() if lengths.is_floating_point() else lengths < 1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"`lengths` should be whole numbers from 1 to {longest}, got {float(lengths[row]):g} at row {row}")
    return lengths.long()


class Embedding(nn.Module):
    r"""What a network sees at each position: the symbol before, as a vector; at the first a vector of its own.

    Classes are looked up, F of them added; anything else is a linear map of its features.

    Shapes: x ``(B, T, *element)`` -> ``(B, T, width)``.
    """

    def __init__(self, observation: Observation, width: int) -> None:
        super().__init__()
        self.observation = observation
        self.element = observation.event_shape
        self.count = self.element[0] if self.element else 1
        self.classes = observation.outputs if isinstance(observation, Categorical) else 0
        if self.classes:
            self.table = nn.Embedding(self.classes * self.count, width)
        else:
            self.linear = nn.Linear(self.count, width)
        self.begin = nn.Parameter(0.1 * torch.randn(width))

    def symbols(self, x: Tensor) -> Tensor:
        """Vectors of symbols, ``(*batch, width)`` of ``(*batch, *element)``."""
        if not self.element:
            x = x.unsqueeze(-1)
        if not self.classes:
            return self.linear(self.observation.features(x))
        places = x.long() + self.classes * torch.arange(self.count, device=x.device)
        found = self.table(places)
        return found.squeeze(-2) if self.count == 1 else found.sum(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Of all positions."""
        before = self.symbols(x[:, :-1])
        return torch.cat([self.begin.expand(len(x), 1, -1), before], 1)

    def step(self, t: Tensor, previous: Tensor) -> Tensor:
        """Of position t, ``(B, width)``."""
        return torch.where(t == 0, self.begin, self.symbols(previous))
