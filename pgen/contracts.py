r"""The contracts of pgen: what a score, a run, a program and a data source are.

Everything else in the package is written against these; nothing here imports another part of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "KIND_WORDS",
    "Batch",
    "DataSource",
    "Draws",
    "Kind",
    "Measure",
    "NotAvailable",
    "Program",
    "Run",
    "Score",
    "Seed",
    "as_seed",
    "as_sizes",
    "check_choice",
    "check_event_shape",
    "check_positive",
    "difference_kind",
    "nearest",
    "plus_minus",
]

Batch: TypeAlias = Tensor | tuple[Any, ...] | dict[str, Any]
"""One tensor, a tuple (positional arguments) or a dict (by name) of tensors with equal length along axis 0."""

Seed: TypeAlias = int | torch.Generator
"""What every public call takes as ``seed``: an integer, or a generator that an integer is drawn from."""

Kind: TypeAlias = Literal["exact", "lower_bound", "upper_bound", "estimate", "unnormalised"]

Measure: TypeAlias = Literal["density", "mass", "ratio", ""]
"""What a score is the logarithm of: a density (per unit of volume), a probability, the ratio of two; empty if not known."""

KIND_WORDS: dict[str, str] = {
    "exact": "exact",
    "lower_bound": "lower bound",
    "upper_bound": "upper bound",
    "estimate": "estimate",
    "unnormalised": "unnormalised",
}
"""Kinds of scores, as they are printed."""

LIKELIHOODS = ("log-likelihood", "bound", "estimate", "unnormalised log-density")
"""Words for what a fit maximises that are nats a datum, and minus the loss."""


def spoken(word: str, *, training: bool = False) -> tuple[str, int, str]:
    """How a figure of a fit is told: its name, the sign that it is shown with, and its unit.

    Args:
        word: What the objective's ``rows`` are called, which are maximised.
        training: Whether it is minus the loss, and not ``rows`` on held-out data.

    Example:
        >>> spoken("bound"), spoken("loss"), spoken("critic accuracy"), spoken("critic accuracy", training=True)
        (('bound', 1, ' nats a datum'), ('loss', -1, ''), ('critic accuracy', 1, ''), ('loss', -1, ''))
    """
    if word in LIKELIHOODS:
        return word, 1, " nats a datum"
    if word.endswith(("loss", "error")):
        return word, -1, ""
    return ("loss", -1, "") if training else (word, 1, "")


class NotAvailable(NotImplementedError):
    """A question that this family cannot answer. The message says why, and which families can."""


class Program(Protocol):
    """A Pyro program: any callable that makes ``pyro.sample`` statements."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program."""


@runtime_checkable
class DataSource(Protocol):
    """Indexed data: its length, and any rows of it as one batch.

    Two attributes are optional: ``stamp``, a text that changes with the data, and ``epoch_rows(seed, epoch, start, stop)``, the
    rows at those positions of an epoch's order, for data that cannot be reached in any order at the same price.
    """

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> Batch:
        """The rows at ``indices``, in that order."""


@dataclass(frozen=True, repr=False)
class Score:
    r"""Log-densities (or log-masses) of data, one number a datum, in nats and in the units of the data as given.

    Shapes: ``value`` ``(N,)``; ``mc_error`` ``(N,)`` or None.

    Args:
        value: The log-density of each datum, in nats.
        kind: What each number is: ``exact``, ``lower_bound`` (in expectation), ``upper_bound``, ``estimate`` or
            ``unnormalised``.
        event_size: Number of scalar dimensions of one datum, for ``bits_per_dim``; the mean of data of unequal size.
        mc_error: Monte Carlo standard error of each number, in nats; None where no sampling is involved.
        num_samples: Samples a datum behind the numbers, if any.
        measure: ``density``, ``mass`` or ``ratio``; empty where it is not known. Only like is compared with like.
        note: Of which other law the numbers are, where it is not the model's own: compared with scores of that law alone.

    ``a - b`` is the log-ratio of two scores of the same data. It knows what the kinds leave it: of a lower bound less an exact
    value a lower bound, of two lower bounds an estimate.

    Example:
        >>> import torch
        >>> score = Score(torch.tensor([-2.0, -4.0]), kind="exact", event_size=3)
        >>> score.mean, round(score.std_error, 4)
        (-3.0, 1.0)
        >>> bound = Score(torch.tensor([-1.0, -3.5]), kind="lower_bound", event_size=3)
        >>> (bound - score).kind, (score - bound).kind, (bound - score).mean
        ('lower_bound', 'upper_bound', 0.75)
    """

    value: Tensor
    kind: Kind
    event_size: float = 1
    mc_error: Tensor | None = None
    num_samples: int | None = None
    measure: Measure = ""
    note: str = ""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(KIND_WORDS))
        check_choice("measure", self.measure, get_args(Measure))
        if self.value.dim() != 1:
            raise ValueError(f"`value` should have one number a datum, shape (N,), got {tuple(self.value.shape)}")

    def __len__(self) -> int:
        return len(self.value)

    def __sub__(self, other: Score) -> Score:
        """The log-ratio of two scores of the same data, datum by datum."""
        if not isinstance(other, Score):
            return NotImplemented
        self.check_comparable(other)
        errors = [score.mc_error for score in (self, other) if score.mc_error is not None]
        error = torch.stack([e.to(self.value.device).double() for e in errors]).square().sum(0).sqrt() if errors else None
        value = self.value.double() - other.value.double().to(self.value.device)
        return Score(value, difference_kind(self.kind, other.kind), self.event_size, error, None, "ratio")

    def check_comparable(self, other: Score, these: str = "one score", those: str = "the other") -> None:
        """Raise ValueError unless both are of as many data, of one event size, both densities or both masses, of one law."""
        if len(self) != len(other):
            raise ValueError(f"{these} has {len(self)} data, {those} {len(other)}; score the same data with both")
        if self.event_size != other.event_size:
            raise ValueError(
                f"a datum of {these} has {self.event_size} numbers, one of {those} {other.event_size}; score the same data"
            )
        if self.measure and other.measure and self.measure != other.measure:
            raise ValueError(
                f"{these} is a log-{self.measure}, {those} a log-{other.measure}: the units differ; fit the density with "
                "preprocess=pgen.data.Dequantize(levels), which bounds the mass, or compare like with like"
            )

        if self.note != other.note:
            first, second = (score.note or "of the model itself" for score in (self, other))
            raise ValueError(f"{these} is {first}, {those} {second}: neither is the better by that; compare like with like")

    @property
    def mean(self) -> float:
        """Mean over the data, in nats."""
        return float(self.value.double().mean())

    @property
    def total(self) -> float:
        """Sum over the data, in nats."""
        return float(self.value.double().sum())

    @property
    def std_error(self) -> float:
        """Standard error of ``mean`` over the data (sample standard deviation / sqrt(N)), in nats."""
        return float(self.value.double().std() / math.sqrt(len(self))) if len(self) > 1 else math.nan

    @property
    def bits_per_dim(self) -> float:
        """Minus ``mean``, in bits for each scalar dimension of a datum."""
        return -self.mean / (self.event_size * math.log(2.0))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        samples = f", {self.num_samples} sample{'s' * (self.num_samples > 1)}" if self.num_samples else ""
        what = f"({KIND_WORDS[self.kind]}{self.note and ' ' + self.note}{samples})"
        if self.kind != "unnormalised":  # an unknown constant has no bits
            what += f", {self.bits_per_dim:.3f} bits/dim"
        if len(self) == 1:
            error = None if self.mc_error is None else float(self.mc_error)
            return f"{plus_minus(self.mean, error)} nats {what}{self._outside()}"
        mean = plus_minus(self.mean, self.std_error)
        return f"{mean} nats a datum {what}, {len(self)} data{self._outside()}"

    def _outside(self) -> str:
        """What to say of data that have no density at all."""
        impossible = torch.isneginf(self.value)
        if not (count := int(impossible.sum())):
            return ""
        rest = "" if count == len(self) else f" (the others: {float(self.value[~impossible].double().mean()):.2f})"
        return f"; {count} of {len(self)} lie{'s' * (len(self) == 1)} where the density is zero{rest}"


def plus_minus(value: float, error: float | None, digits: int = 2, sign: str = "") -> str:
    """A number with its standard error, where it has one: that of one datum, or of what is infinite, is unknown.

    Example:
        >>> plus_minus(-1.234, 0.05), plus_minus(0.5, 0.05, 3, "+"), plus_minus(-math.inf, math.nan)
        ('-1.23 ± 0.05', '+0.500 ± 0.050', '-inf')
    """
    shown = f"{value:{sign}.{digits}f}"
    return shown if error is None or not math.isfinite(error) else f"{shown} ± {error:.{digits}f}"


_SIDE = {"exact": 0, "lower_bound": -1, "upper_bound": 1}


def difference_kind(first: Kind, second: Kind) -> Kind:
    """What a difference is, from what its terms are.

    Example:
        >>> difference_kind("lower_bound", "upper_bound"), difference_kind("lower_bound", "lower_bound")
        ('lower_bound', 'estimate')
    """
    if "unnormalised" in (first, second):
        return "unnormalised"
    if "estimate" in (first, second):
        return "estimate"
    sides = {_SIDE[first], -_SIDE[second]} - {0}
    kinds: dict[int, Kind] = {-1: "lower_bound", 1: "upper_bound"}
    return "estimate" if len(sides) > 1 else kinds[sides.pop()] if sides else "exact"


@dataclass(repr=False)
class Run:
    """What a fit did: its history, why it stopped, how it was executed.

    Attributes:
        history: Columns of equal length, one entry a logged step: ``step``, ``epoch``, ``loss`` (minus the bound or
            log-likelihood, nats a datum of the whole data set), ``grad_norm``, ``lr``, ``seconds``.
        validation: Columns ``step``, ``bound``, ``std_error`` (nats a datum), empty without validation data.
        stopped: Why the fit ended, in words.
        tier: Execution tier of the last step: ``eager``, ``graph`` or ``compiled``.
        tier_reason: Why not a faster one; empty where the fastest ran.
        steps: Optimizer steps taken.
        epochs: Passes over the data, as a number of data seen / N.
        skipped: Steps whose loss or gradient was not finite; they changed no parameter.
        seconds: Wall time.
        num_data: Data in the training set.
        held_out: Data that ``fit`` held out of those that it was given.
        seed: The seed that keyed order and noise.
        word: What was maximised: ``log-likelihood`` where it is exact, ``bound``, or the objective's own word.
        resumed: The step of the checkpoint that it went on from; 0 for a fit from the start.
        restored: The validation figure of the parameters that were restored after training; None if the last ones stand.
        warnings: What the objective says is wrong with the training as a whole, a line each.
    """

    history: dict[str, np.ndarray] = field(default_factory=dict)
    validation: dict[str, np.ndarray] = field(default_factory=dict)
    stopped: str = ""
    tier: str = "eager"
    tier_reason: str = ""
    steps: int = 0
    epochs: float = 0.0
    skipped: int = 0
    seconds: float = 0.0
    num_data: int = 0
    held_out: int = 0
    seed: int = 0
    word: str = "bound"
    resumed: int = 0
    restored: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """The last figure: of the validation data where there are any, else the mean over the last tenth of training.

        It is the higher the better; ``word`` says what it is.
        """
        if self.restored is not None:
            return self.restored
        if len(self.validation.get("bound", ())):
            return float(self.validation["bound"][-1])
        loss = self.history.get("loss", np.zeros(0))
        return -float(np.mean(loss[-max(1, len(loss) // 10) :])) if len(loss) else math.nan

    @property
    def bound_std_error(self) -> float:
        """Standard error of a validation ``bound`` over the data; NaN without validation data."""
        bounds = self.validation.get("bound", np.zeros(0))
        if not len(bounds):
            return math.nan
        row = -1 if self.restored is None else int(np.argmin(np.abs(bounds - self.restored)))
        return float(self.validation["std_error"][row])

    def __repr__(self) -> str:
        return str(self)

    @property
    def figure(self) -> str:
        """The last figure in words, such as ``validation log-likelihood -1.419 ± 0.012 nats a datum``."""
        validated = len(self.validation.get("bound", ())) > 0
        name, sign, unit = spoken(self.word, training=not validated)
        error = f" ± {self.bound_std_error:.3f}" if validated else ""
        return f"{'validation' if validated else 'training'} {name} {sign * self.bound:.3f}{error}{unit}"

    def __str__(self) -> str:
        rate = self.steps / self.seconds if self.seconds > 0 else math.nan
        tier = f"{self.tier} tier" + (f" ({self.tier_reason})" if self.tier_reason else "")
        skipped = f"; {self.skipped} non-finite steps skipped" if self.skipped else ""
        summed = self.word in LIKELIHOODS and not len(self.validation.get("bound", ()))
        total = f", in all {self.bound * self.num_data:.2f}" if summed else ""
        held = f", {self.held_out} held out" if self.held_out else ""
        figure = f"{self.figure} (N = {self.num_data}{held}{total})"
        if not self.steps:
            return f"{figure}\nno steps: {self.stopped}, {self.seconds:.2f} s"
        warned = "".join(f"\nwarning: {line}" for line in self.warnings)
        return (
            f"{figure}\n"
            f"{self.steps} steps, {self.epochs:.1f} epochs in {self.seconds:.1f} s ({rate:.0f} steps/s), {tier}{skipped}\n"
            f"stopped: {self.stopped}{warned}"
        )


@dataclass(frozen=True)
class Draws:
    r"""S draws from a guide, with the log-densities that weigh them: :math:`\log w = \log p(x, z) - \log q(z \mid x)`.

    Log-densities are float64, unscaled (no plate or user scale), with masks applied, in nats.

    Attributes:
        values: Each latent site, shape ``(S, *shape)``, in the model's own (constrained) units.
        dims: For each latent, the names of the axes after the draw axis (``"data"`` for the data plate, other plates by
            name, ``"<site>_dim_<i>"`` for event axes).
        log_p: Joint :math:`\log p(x, z)`, shape ``(S,)``.
        log_q: Joint :math:`\log q(z \mid x)`, shape ``(S,)``.
        log_p_rows: The part of ``log_p`` inside the data plate, ``(S, N)``; None without a data plate.
        log_q_rows: The part of ``log_q`` inside the data plate, ``(S, N)``; None without a data plate.
        log_likelihood: Each observed site, summed over event axes, ``(S, *plates)``.
        likelihood_dims: For each observed site, the names of its plate axes after the draw axis.
        observed: Each observed site's value.
        has_global: Whether any latent lies outside the data plate.
        has_local: Whether any latent lies inside the data plate.
        subsampled: Whether a plate was subsampled, so that joint weights are not importance ratios.
        no_density: Guide sites without a density (a point mass), by name.
    """

    values: dict[str, Tensor]
    dims: dict[str, tuple[str, ...]]
    log_p: Tensor
    log_q: Tensor
    log_p_rows: Tensor | None
    log_q_rows: Tensor | None
    log_likelihood: dict[str, Tensor]
    likelihood_dims: dict[str, tuple[str, ...]]
    observed: dict[str, Tensor]
    has_global: bool
    has_local: bool
    subsampled: bool = False
    no_density: tuple[str, ...] = ()

    @classmethod
    def of_data(cls, observed: dict[str, Tensor]) -> Draws:
        """No latents, no density: the observed sites alone, of a model that can do no more than sample."""
        none = torch.zeros(1, dtype=torch.float64)
        return cls({}, {}, none, none, None, None, {}, {name: () for name in observed}, observed, False, False)

    @property
    def num_samples(self) -> int:
        """The number of draws S."""
        return len(self.log_p)

    @property
    def log_weight(self) -> Tensor:
        """Joint log importance weights, ``(S,)``."""
        return self.log_p - self.log_q

    @property
    def log_weight_rows(self) -> Tensor | None:
        """Log importance weights of each datum's own latents, ``(S, N)``; None where a latent is shared between data."""
        if self.has_global or self.log_p_rows is None or self.log_q_rows is None:
            return None
        return self.log_p_rows - self.log_q_rows


def nearest(name: str, names: Sequence[str] | Mapping[str, Any]) -> str:
    """A suffix for an error message: the nearest known name, and all of them."""
    import difflib

    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(names)})"


def as_seed(seed: Seed) -> int:
    """The integer that keys all noise of a call.

    A ``torch.Generator`` gives the next integer of its stream, so that calls which share it differ.

    Example:
        >>> as_seed(3), as_seed(torch.Generator().manual_seed(0)) == as_seed(torch.Generator().manual_seed(0))
        (3, True)
    """
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**62, (), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise ValueError(f"`seed` should be an integer or a torch.Generator, got {seed!r}")
    return int(seed)


def check_choice(argument: str, value: str, choices: Sequence[str], known_as: Mapping[str, str] | None = None) -> None:
    """Raise ValueError, naming the nearest choice, unless ``value`` is one of ``choices``.

    Args:
        argument: Its name.
        value: What it is.
        choices: What it may be.
        known_as: Other names of choices, in the literature or in other packages, in lower case.
    """
    if value not in choices:
        if isinstance(value, str) and (meant := (known_as or {}).get(value.lower())):
            raise ValueError(f"`{argument}` is {value!r}, which is called {meant!r} here (known: {', '.join(choices)})")
        raise ValueError(f"`{argument}` is {value!r}, which is unknown{nearest(str(value), choices)}")


def kind_of(given: Any) -> str:
    """What an error calls something that is no model: its type, or the class that was meant to be called."""
    return (
        f"the class {given.__name__}; did you mean {given.__name__}(...)?" if isinstance(given, type) else type(given).__name__
    )


def check_positive(argument: str, value: float | None, *, allow_none: bool = False, integer: bool = True) -> None:
    """Raise ValueError unless ``value`` is a positive number (an integer unless said)."""
    if value is None and allow_none:
        return
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not is_number or value <= 0 or not math.isfinite(value) or (integer and value != int(value)):  # type: ignore[operator,arg-type]
        raise ValueError(f"`{argument}` should be a positive {'integer' if integer else 'number'}, got {value!r}")


def as_sizes(argument: str, value: int | Sequence[int], *, least: int = 0) -> tuple[int, ...]:
    """Sizes of layers, ``least`` or more; one number is one layer.

    Example:
        >>> as_sizes("hidden", 8), as_sizes("hidden", [16, 8])
        ((8,), (16, 8))
    """
    numbers = [value] if isinstance(value, (int, np.integer)) else value
    if isinstance(numbers, Tensor):
        numbers = numbers.tolist()
    whole = isinstance(numbers, Sequence) and all(isinstance(n, (int, np.integer)) and n >= 1 for n in numbers)
    if not whole or isinstance(numbers, str) or len(numbers) < least or any(isinstance(n, bool) for n in numbers):
        count = "one or more positive sizes" if least else "positive sizes"
        raise ValueError(f"`{argument}` should be {count}, such as 128 or (128, 128), got {value!r:.60}")
    return tuple(int(n) for n in numbers)


def check_event_shape(argument: str, x: Tensor, event_shape: tuple[int, ...], advice: str = "") -> None:
    """Raise ValueError unless ``x`` has shape ``(N, *event_shape)``; ``advice`` goes before guesses at the cause."""
    if tuple(x.shape[1:]) == tuple(event_shape) and x.dim() >= 1:
        return
    shape, want = tuple(x.shape), tuple(event_shape)
    hint = advice
    if shape == want:
        hint = "; one datum? use x[None]"
    elif not advice and x.dim() == 2 and len(want) == 1 and shape[0] == want[0]:
        hint = "; did you mean x.T?"
    elif not advice and math.prod(shape[1:]) == math.prod(want):
        hint = f"; did you mean x.reshape(-1, {', '.join(map(str, want))})?"
    raise ValueError(f"`{argument}` should have shape (N, {', '.join(map(str, want))}), got {shape}{hint}")
