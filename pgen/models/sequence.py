r"""What families of sequences have in common: one distribution over all positions, lengths, prefixes and completions.

A local condition h is a second sequence, read position by position: van den Oord et al. (2016), WaveNet, arXiv:1609.03499,
section 2.5. The outputs at t see h up to t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..base import GenerativeModel, _evaluating
from ..contracts import Batch, Seed, check_choice, check_positive
from ..data.arrays import as_batch, check_finite, check_varies
from ..distributions.autoregressive import Autoregressive, CausalNetwork
from ..distributions.observation import OBSERVATIONS, Categorical, Observation, observation
from ..programs import isolated
from ..training.fit import Training
from ..training.optim import Adam

__all__ = [
    "OF_PADDING",
    "Embedding",
    "SequenceModel",
    "Standardised",
    "along",
    "checked_lengths",
    "conditions",
    "length_advice",
    "row_at",
]

PRIMING_ROWS = 100_000
"""Symbols at most from which the marginal of one symbol is taken."""

OF_PADDING = "; if it is padding, put zeros there and tell the lengths, as pgen.data.pad does"
"""What to say where a sequence holds NaN."""


class SequenceModel(GenerativeModel):
    r"""A family of sequences, :math:`p(x \mid c, h) = \prod_t p(x_t \mid x_{<t}, c, h_{\le t})`.

    Shapes: x ``(N, T)`` or ``(N, T, F)`` with F numbers at each position, independent given the past.
    Sequences of unequal length are given as ``{"x": x, "lengths": n}``; see ``pgen.data.pad``. The local condition goes with
    data as ``{"x": x, "local": h}``, ``(N, rows, local_dim)``, and with other questions as ``local=h``.
    """

    also = ("lengths", "local")
    sequential = True
    nan_advice = OF_PADDING
    stepwise = True
    default_batch_size = 32
    network: CausalNetwork
    longest: ClassVar[bool] = False
    """Whether the network takes at most T positions; completions that are longer look back at the last ones."""
    adam: ClassVar[Adam] = Adam()
    """What trains the network, unless told otherwise."""
    local_hop = 1
    """Positions that one row of the local condition covers: row t // local_hop is read at position t."""

    def __init__(
        self,
        event_shape: Sequence[int],
        likelihood: str,
        num_classes: int | None,
        num_components: int | None,
        context_dim: int,
        local_dim: int,
        dropout: float,
    ) -> None:
        super().__init__(event_shape, context_dim=context_dim)
        if len(self.event_shape) > 2:
            raise ValueError(f"`event_shape` should be (T,) or (T, F), got {self.event_shape}")
        check_choice("likelihood", likelihood, tuple(OBSERVATIONS))
        if local_dim < 0:
            raise ValueError(f"`local_dim` should be 0 (no local condition) or the size of one of its rows, got {local_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` should lie in [0, 1), got {dropout}")
        self.likelihood, self.num_classes, self.num_components = likelihood, num_classes, num_components
        self.local_dim, self.dropout = local_dim, float(dropout)
        made = observation(likelihood, self.event_shape[1:], num_classes, num_components)
        self.observation: Observation = Standardised(made) if made.support is constraints.real else made
        self.outputs = made.outputs * math.prod(self.event_shape[1:])

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("likelihood", "num_classes", "num_components", "context_dim", "local_dim", "dropout")
        return {"event_shape": list(self.event_shape), **{name: getattr(self, name) for name in names}}

    def output_bias(self) -> nn.Parameter:
        """What is added to the outputs."""
        raise NotImplementedError

    def prime(self, data: Batch) -> None:
        """Standardise real numbers, and start at the frequencies of single symbols."""
        symbols = _symbols(self._prepared(data)[0])
        with torch.no_grad():
            if isinstance(self.observation, Standardised):
                self.observation.fit(symbols)
            self.output_bias().copy_(self.observation.start(symbols[:PRIMING_ROWS]))

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        """Gradients clipped at norm 1, and the rate lowered to 0 along a cosine, unless told otherwise."""
        schedule = settings.schedule if settings.schedule is not None or settings.stop == "converged" else "cosine"
        return self.adam, replace(settings, clip_norm=settings.clip_norm or 1.0, schedule=schedule)

    # -- the program ---------------------------------------------------------------------------------------------------

    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        local: Tensor | None = None,
    ) -> Tensor:
        """p(x | c, h); of sequences with lengths, p(x_1, ..., x_n | n, c, h)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(context, lengths, local=local), obs=x)

    def guide(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        local: Tensor | None = None,
    ) -> None:
        """Nothing is latent."""

    def distribution(
        self,
        context: Tensor | None = None,
        lengths: Tensor | None = None,
        length: int | None = None,
        local: Tensor | None = None,
    ) -> Autoregressive:
        """The distribution of x, or of sequences of another length."""
        shape = (length or self.event_shape[0], *self.event_shape[1:])
        return Autoregressive(self.network, self.observation, shape, context=context, local=local, lengths=lengths)

    def _shape_advice(self, argument: str, x: Tensor) -> str:
        return length_advice(argument, x, self.event_shape)

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        found = super()._further(x, given)
        if "lengths" in found:
            found["lengths"] = checked_lengths(found["lengths"], self.event_shape[0])
        if "local" in found or self.local_dim:
            local = self._checked_local(found.get("local"), len(x), self.event_shape[0])
            found["local"] = local.to(next(self.parameters()).dtype)
        return found

    def _checked_local(self, local: Any, rows: int, positions: int) -> Tensor:
        """The local condition of so many positions, one for each of the data."""
        if not self.local_dim:
            raise ValueError("this model was made without a local condition; make it with local_dim=... to give `local`")
        wanted = (-(-positions // self.local_hop), self.local_dim)
        shape = f"(N, {wanted[0]}, {wanted[1]})"
        if local is None:
            raise ValueError(
                f"this model was made with local_dim={self.local_dim}; give `local`, shape {shape}: with data as "
                "{'x': x, 'local': h}, else as local=h"
            )
        found = torch.as_tensor(as_batch(local, name="local"))
        if found.dim() != 3 or tuple(found.shape[1:]) != wanted:
            covered = f", one row for each {self.local_hop}" if self.local_hop > 1 else ""
            raise ValueError(
                f"`local` should have shape {shape} for {positions} positions{covered}, got {tuple(found.shape)}"
                + ("; did you mean local[None]?" if tuple(found.shape) == wanted else "")
                + ("; did you mean local[..., None]?" if wanted == (*found.shape[1:], 1) else "")
            )
        if len(found) not in (1, rows):
            raise ValueError(f"`local` has {len(found)} entries for {rows} data; give one a datum, or one for all")
        check_finite(found, "local")
        return found.expand(rows, -1, -1)

    def _event_size(self, batch: dict[str, Tensor]) -> float:
        lengths = batch.get("lengths")
        if lengths is None:
            return super()._event_size(batch)
        return float(lengths.double().mean()) * super()._event_size(batch) / self.event_shape[0]

    # -- samples -------------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        context: Any = None,
        *,
        local: Any = None,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Draw sequences of T positions.

        Args:
            n: How many.
            context: One context for all, shape ``(1, context_dim)``, or one for each.
            local: One local condition for all, shape ``(1, rows, local_dim)``, or one for each.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.
        """
        check_positive("n", n)
        return self._sampled(int(n), self._told(context, local, int(n), self.event_shape[0]), seed, compile, progress)

    def next(self, prefix: Any, context: Any = None, *, local: Any = None) -> Any:
        """The distribution of the next symbol after each prefix, in the units of the data.

        Args:
            prefix: ``(N, t)`` or ``(N, t, F)``, t from 0; of a network with at most T positions the last T - 1 count.
            context: One for each, or one for all.
            local: The local condition of t + 1 positions, for each or for all.

        Returns:
            A distribution over what is at one position, batch shape ``(N,)``: ``.probs``, ``.log_prob``, ``.sample``.
        """
        given = self._prefix(prefix)
        where = self._told(context, local, len(given), given.shape[1] + 1)
        if self.longest:
            start = max(0, given.shape[1] - self.event_shape[0] + 1)
            given, where = given[:, start:], _window(where, start, self.event_shape[0])
        with torch.no_grad(), isolated(self.home), _evaluating(self):
            return self.distribution(**where, length=given.shape[1] + 1).next(given)

    def complete(
        self,
        prefix: Any,
        length: int | None = None,
        context: Any = None,
        *,
        local: Any = None,
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
            local: The local condition of ``length`` positions, for each or for all.
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
        where = self._told(context, local, len(x), total)
        while x.shape[1] < total:
            kept = 0 if not self.longest or total <= window else max(0, x.shape[1] - window // 2)
            size = min(total - kept, window) if self.longest else total
            told = _window(where, kept, size) if self.longest else where
            part = self._completed(x[:, kept:], size, told, (seed, x.shape[1]), compile, progress)
            x = torch.cat([x[:, :kept].to(part.dtype), part], 1)
        return x

    def _completed(
        self, prefix: Tensor, size: int, where: dict[str, Tensor], keys: tuple[Seed, int], compile: str, progress: bool
    ) -> Tensor:
        known = prefix.shape[1]
        x = torch.cat([prefix, prefix.new_zeros((len(prefix), size - known, *prefix.shape[2:]))], 1)

        def drawn(batch: Batch) -> Tensor:
            rows = dict(cast(dict[str, Tensor], batch))
            part = rows.pop("x")
            observed = (torch.arange(size, device=x.device) < known).reshape(-1, *[1] * (x.dim() - 2)).expand_as(part)
            return self.distribution(**rows, length=size).complete(part, observed)

        with self._stepping(compile, progress):
            return self._rows(drawn, f"complete {keys[1]}", {"x": x, **where}, keys[0], progress, compile="eager")

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

    def _told(self, context: Any, local: Any, rows: int, positions: int) -> dict[str, Tensor]:
        """What so many data of so many positions are conditioned on, by name."""
        found, told = {}, self._where(context, rows)
        if told is not None:
            found["context"] = told
        if local is not None or self.local_dim:
            found["local"] = self._like(self._checked_local(local, rows, positions))
        return found


def _window(where: dict[str, Tensor], start: int, size: int) -> dict[str, Tensor]:
    """The same of ``size`` positions from ``start`` on, where each position has a row of its own."""
    return {name: t[:, start : start + size] if name == "local" else t for name, t in where.items()}


def conditions(context: Tensor | None, local: Tensor | None) -> Tensor | None:
    """Context and local condition beside each other, ``(B, rows, context_dim + local_dim)``: one row if it holds everywhere."""
    if local is None:
        return None if context is None else context.unsqueeze(1)
    return local if context is None else torch.cat([context.unsqueeze(1).expand(-1, local.shape[1], -1), local], -1)


def along(rows: Tensor, hop: int, length: int) -> Tensor:
    """From ``(B, rows, size)`` to ``(B, length, size)``, each row for ``hop`` positions; one row stands for all."""
    if hop == 1 or rows.shape[1] == 1:
        return rows
    return rows.repeat_interleave(hop, 1)[:, :length]


def row_at(rows: Tensor, hop: int, t: Tensor) -> Tensor:
    """The row of position t, ``(B, size)``, from ``(rows, B, size)``."""
    return rows[0] if len(rows) == 1 else rows.index_select(0, (t // hop).reshape(1)).squeeze(0)


def _symbols(batch: Any) -> Tensor:
    """The symbols that count, ``(n, *element)``."""
    x, lengths = batch["x"], batch.get("lengths")
    if lengths is None:
        return cast(Tensor, x.flatten(0, 1))
    return cast(Tensor, x[torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)])


def length_advice(argument: str, x: Tensor, event_shape: tuple[int, ...]) -> str:
    """What to do about sequences of another length than the model's; nothing where their shape is wrong otherwise."""
    if x.dim() != 1 + len(event_shape) or tuple(x.shape[2:]) != event_shape[1:] or x.shape[1] == event_shape[0]:
        return ""
    longest = event_shape[0]
    if x.shape[1] < longest:
        return f"; shorter sequences are padded, and their lengths told: {argument}=pgen.data.pad(sequences, {longest})"
    longer = (x.shape[1], *event_shape[1:])
    return f"; cut longer sequences by pgen.data.windows(sequence, {longest}), or make the model with event_shape={longer}"


def checked_lengths(lengths: Tensor, longest: int) -> Tensor:
    """Lengths of sequences, whole numbers from 1 to ``longest``."""
    if lengths.dim() != 1:
        raise ValueError(f"`lengths` should be one number a datum, shape (N,), got {tuple(lengths.shape)}")
    bad = (lengths < 1) | (lengths > longest) | (lengths != lengths.floor() if lengths.is_floating_point() else lengths < 1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"`lengths` should be whole numbers from 1 to {longest}, got {float(lengths[row]):g} at row {row}")
    return lengths.long()


class Standardised(nn.Module, Observation):
    r"""An observation model of real numbers, learned in standard units and asked in the units of the data.

    .. math:: p(x) = \prod_d p_0\Big(\frac{x_d - m_d}{s_d}\Big) \Big/ s_d

    with mean m and standard deviation s of the training data, one for each number of a position. What a network sees are
    standard units, and so are its outputs and the least standard deviation, 0.001.
    """

    support = constraints.real
    shift: Tensor
    scale: Tensor

    def __init__(self, base: Observation) -> None:
        nn.Module.__init__(self)
        Observation.__init__(self, base.event_shape)
        self.base, self.outputs = base, base.outputs
        self.register_buffer("shift", torch.zeros(base.event_shape))
        self.register_buffer("scale", torch.ones(base.event_shape))

    def fit(self, x: Tensor) -> None:
        """Take m and s from data ``(n, *event_shape)``."""
        what, fix = ("number {} of each position", "drop it") if self.event_shape else ("`data`", "give data that vary")
        check_varies(x.reshape(len(x), -1), what=what, many="positions", fix=f"{fix}, or take another likelihood")
        self.shift.copy_(x.mean(0))
        self.scale.copy_(x.std(0, correction=0))

    def distribution(self, outputs: Tensor) -> dist.TorchDistribution:
        """That of ``base``, moved and stretched."""
        units = dist.transforms.AffineTransform(self.shift, self.scale, event_dim=len(self.event_shape))
        return _InUnits(self.base.distribution(outputs), units)

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """One draw."""
        return self.shift + self.scale * self.base.draw(outputs, t)

    def features(self, x: Tensor) -> Tensor:
        """x in standard units."""
        return (x - self.shift) / self.scale

    def start(self, x: Tensor) -> Tensor:
        """Outputs that fit the data."""
        return self.base.start(self.features(x))


class _InUnits(dist.TransformedDistribution):
    """An affine image of a distribution, with its moments."""

    @property
    def mean(self) -> Tensor:
        """In the units of the data."""
        return self.transforms[0](self.base_dist.mean)

    @property
    def variance(self) -> Tensor:
        """In their squares."""
        return self.transforms[0].scale.square() * self.base_dist.variance


class Embedding(nn.Module):
    r"""What a network sees at each position: the symbol before, as a vector; at the first a vector of its own.

    Classes are looked up, F of them added; anything else is a linear map of its features.

    Shapes: x ``(B, T, *element)`` -> ``(B, T, width)``.
    """

    def __init__(self, observation: Observation, width: int) -> None:
        super().__init__()
        self.features, self.element = observation.features, observation.event_shape
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
            return self.linear(self.features(x))
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
