r"""Held-out log-likelihoods of any models side by side, paired datum by datum, with bounds treated as bounds.

.. math:: \Delta_n = \log p_A(x_n) - \log p_B(x_n), \qquad
    \bar\Delta \pm z \, \operatorname{sd}(\Delta) / \sqrt N

The same data are easy or hard for all models, so the error of a difference is that of the paired :math:`\Delta_n`, and mostly
much smaller than the error of either mean. A lower bound above another's exact value wins; a lower bound below it is
*undecided*, as the density itself may lie above; an estimate proves nothing. A density without its normaliser is off by a
constant that may be of any size: it comes last, whatever its mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from ..contracts import KIND_WORDS, NotAvailable, Score, Seed, as_seed, plus_minus
from ..training.progress import Progress
from .units import QUIET_SECONDS

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "Difference", "compare"]

_COLUMNS = ("rank", "model", "log-likelihood [nats]", "kind", "bits/dim", "difference to the first", "verdict")


@dataclass(frozen=True)
class Difference:
    """Of two models on the same data, ``first`` less ``second``, in nats a datum.

    Attributes:
        first: A name.
        second: A name.
        score: The differences datum by datum, with what they are: exact, a bound, an estimate.
        width: Standard errors on each side of the mean within which nothing is decided.
        impossible: Whether both give no density at all to some of the data, so that neither is better.
    """

    first: str
    second: str
    score: Score
    width: float
    impossible: bool = False

    @property
    def mean(self) -> float:
        """Mean difference."""
        return self.score.mean

    @property
    def std_error(self) -> float:
        """Paired standard error of the mean over the data; Monte Carlo noise of bounds is in it."""
        return self.score.std_error

    @property
    def interval(self) -> tuple[float, float]:
        """The confidence interval of the mean, jointly with all other pairs."""
        if math.isinf(self.mean):
            return self.mean, self.mean
        half = self.width * self.std_error
        return self.mean - half, self.mean + half

    @property
    def winner(self) -> str | None:
        """The model whose density is higher on such data, where that can be said."""
        low, high = self.interval
        if low > 0 and self.score.kind in ("exact", "lower_bound"):
            return self.first
        if high < 0 and self.score.kind in ("exact", "upper_bound"):
            return self.second
        return None

    @property
    def verdict(self) -> str:
        """What is decided, or why not."""
        if self.winner is not None:
            return f"{self.winner} is better"
        low, high = self.interval
        if self.impossible:
            return "undecided: zero density on both sides"
        if math.isnan(self.mean) or math.isnan(low):
            return "undecided: not finite, or too few data"
        if self.score.kind == "unnormalised":
            return "undecided: not normalised"
        if self.score.kind == "estimate" and (low > 0 or high < 0):
            return "undecided: bounds or estimates on both sides"
        if low > 0 or high < 0:
            return "undecided: a bound that may be loose"
        return "undecided: within the noise"


@dataclass(frozen=True, repr=False)
class Comparison:
    """What ``compare`` found, ranked by the mean. Print it, or write it with ``to_markdown`` or ``to_dict``.

    Attributes:
        scores: By name, the highest mean first, those that are not normalised last.
        level: Confidence of all verdicts together.
        notes: What else a reader should know.
    """

    scores: dict[str, Score]
    level: float = 0.95
    notes: tuple[str, ...] = field(default=())

    @property
    def names(self) -> list[str]:
        """Names, the highest mean first, those that are not normalised last."""
        return list(self.scores)

    def difference(self, first: str, second: str) -> Difference:
        """``first`` less ``second``, datum by datum."""
        for name in (first, second):
            if name not in self.scores:
                raise ValueError(f"{name!r} is not in this comparison (it has {', '.join(self.scores)})")
        a, b = self.scores[first], self.scores[second]
        impossible = all(bool(torch.isneginf(score.value).any()) for score in (a, b))
        return Difference(first, second, a - b, self._width(), impossible)

    def _width(self) -> float:
        """Standard errors that hold for all pairs at once (Bonferroni)."""
        pairs = len(self.scores) * (len(self.scores) - 1) / 2
        return NormalDist().inv_cdf(1 - (1 - self.level) / (2 * max(pairs, 1)))

    def _pairs(self) -> list[tuple[str, str]]:
        return [(a, b) for i, a in enumerate(self.names) for b in self.names[i + 1 :]]

    @property
    def best(self) -> list[str]:
        """The models that no other is shown to be better than; none that is not normalised, unless all are."""
        found = [self.difference(a, b) for a, b in self._pairs()]
        beaten = {pair.second if pair.winner == pair.first else pair.first for pair in found if pair.winner}
        ranked = [name for name in self.names if self.scores[name].kind != "unnormalised"] or self.names
        return [name for name in ranked if name not in beaten]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, one entry a model, and the verdict of every pair; nats a datum."""
        return {
            "level": self.level,
            "num_data": len(next(iter(self.scores.values()))),
            "best": self.best,
            "models": [self._row(rank, name) for rank, name in enumerate(self.names, 1)],
            "pairs": [self._pair(a, b) for a, b in self._pairs()],
            "notes": list(self.notes),
        }

    def _row(self, rank: int, name: str) -> dict[str, Any]:
        score, first = self.scores[name], self.names[0]
        against = self.difference(name, first) if rank > 1 else None
        return {
            "rank": rank,
            "model": name,
            "kind": score.kind,
            "measure": score.measure,
            "mean": score.mean,
            "std_error": score.std_error,
            "bits_per_dim": None if score.kind == "unnormalised" else score.bits_per_dim,
            "difference": 0.0 if against is None else against.mean,
            "difference_std_error": 0.0 if against is None else against.std_error,
            "verdict": "" if against is None else against.verdict,
        }

    def _pair(self, first: str, second: str) -> dict[str, Any]:
        found = self.difference(first, second)
        low, high = found.interval
        return {
            "first": first, "second": second, "difference": found.mean, "std_error": found.std_error, "low": low, "high": high,
            "kind": found.score.kind, "winner": found.winner, "verdict": found.verdict,
        }  # fmt: skip

    def to_frame(self) -> pd.DataFrame:
        """One row a model, by rank."""
        import pandas as pd

        return pd.DataFrame(self.to_dict()["models"]).set_index("rank")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                str(row["rank"]),
                row["model"],
                plus_minus(row["mean"], row["std_error"], 3),
                KIND_WORDS[row["kind"]],
                "-" if row["bits_per_dim"] is None else f"{row['bits_per_dim']:.3f}",
                self._difference(row),
                row["verdict"],
            )
            for row in self.to_dict()["models"]
        ]

    @staticmethod
    def _difference(row: dict[str, Any]) -> str:
        if row["rank"] == 1 or math.isnan(row["difference"]):
            return ""
        if row["kind"] == "unnormalised":
            return "-"
        return plus_minus(row["difference"], row["difference_std_error"], 3, "+")

    def _foot(self) -> str:
        first = next(iter(self.scores.values()))
        unit = f"log-{first.measure}" if first.measure else "log-likelihood"
        return (
            f"{len(first)} data, mean {unit} a datum ± standard error; differences are paired, verdicts hold together at "
            f"{100 * self.level:g} %. Not shown to be worse than another: {', '.join(self.best)}."
        )

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown, also written to ``path`` if given."""
        lines = [f"| {' | '.join(_COLUMNS)} |", "|---:|---|---:|---|---:|---:|---|"]
        lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in self._cells()]
        text = "\n".join([*lines, "", self._foot(), *self.notes, ""])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [_COLUMNS, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, self._foot(), *self.notes])


def compare(
    models: Mapping[str, Any],
    data: Any = None,
    *,
    context: Any = None,
    num_samples: int = 100,
    level: float = 0.95,
    seed: Seed = 0,
    progress: bool = True,
) -> Comparison:
    r"""Held-out log-likelihoods side by side, ranked, with the paired error of each difference and what it proves.

    Args:
        models: By name, a ``Score`` each (what ``log_prob`` returned), or fitted models, which are asked about ``data``.
        data: Held-out data for the models; left out where all are scores.
        context: Context of the data.
        num_samples: Draws a datum, for models whose ``log_prob`` is a bound.
        level: Confidence of all verdicts together: each pair is judged at 1 - (1 - level) / pairs.
        seed: Keys the draws.
        progress: Whether to show a bar on what takes more than two seconds.

    Returns:
        A Comparison; print it.

    Raises:
        ValueError: If the scores are of different numbers of data or of numbers a datum, or some are densities and others
            masses.
        NotAvailable: If a model has no ``log_prob``.

    Example:
        >>> a = Score(torch.tensor([-1.0, -2.0, -3.0, -2.0]), "exact")
        >>> b = Score(torch.tensor([-1.5, -2.4, -3.6, -2.5]), "exact")
        >>> found = compare({"b": b, "a": a})
        >>> found.names, found.best, round(found.difference("a", "b").mean, 3)
        (['a', 'b'], ['a'], 0.5)
    """
    if not isinstance(models, Mapping) or not models:
        what = "an empty one" if isinstance(models, Mapping) else f"a {type(models).__name__}"
        raise TypeError(f"`models` should be a dict of scores or models by name, such as {{'vae': score}}, got {what}")
    if not 0 < level < 1:
        raise ValueError(f"`level` should lie between 0 and 1, such as 0.95, got {level!r}")
    options = {"context": context, "num_samples": num_samples, "seed": as_seed(seed)}
    scores: dict[str, Score] = {}
    with Progress(len(models), progress, QUIET_SECONDS) as bar:
        for done, (name, model) in enumerate(models.items()):
            bar.at(done, name)
            scores[name] = _score(name, model, data, progress, options)
    _check(scores)
    return Comparison(
        {name: scores[name] for name in sorted(scores, key=lambda name: _place(scores[name]))}, level, _notes(scores)
    )


def _place(score: Score) -> tuple[bool, float]:
    """What scores are sorted by: the highest mean first, NaN after it, what is not normalised after all others."""
    return score.kind == "unnormalised", math.inf if math.isnan(score.mean) else -score.mean


def _score(name: str, model: Any, data: Any, progress: bool, options: dict[str, Any]) -> Score:
    if isinstance(model, Score):
        return model
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"`models[{name!r}]` should be a Score or a fitted model with log_prob, got {type(model).__name__}")
    if data is None:
        raise ValueError(f"`data` is missing: {name!r} is a model, not a score; give held-out data to score")
    given = {key: value for key, value in options.items() if value is not None}
    try:
        found = model.log_prob(data, progress=progress, **given)
    except (ValueError, NotAvailable) as error:
        raise type(error)(f"{name}: {error}") from error
    if not isinstance(found, Score):
        raise TypeError(f"log_prob of {name!r} should return a Score, got {type(found).__name__}")
    return found


def _check(scores: dict[str, Score]) -> None:
    names = list(scores)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            scores[first].check_comparable(scores[second], repr(first), repr(second))


def _notes(scores: dict[str, Score]) -> tuple[str, ...]:
    notes = []
    for name, score in scores.items():
        impossible = int(torch.isneginf(score.value).sum())
        if impossible:
            notes.append(f"{name} gives no density at all to {impossible} of {len(score)} data.")
        if bool(torch.isnan(score.value).any() | torch.isposinf(score.value).any()):
            notes.append(f"{name} has NaN or infinite log-densities; nothing is decided about it.")
        if score.kind == "unnormalised":
            notes.append(
                f"{name} is not normalised: its mean says nothing beside others'; log_normalizer() estimates what it lacks."
            )
    if common := {score.note for score in scores.values()} - {""}:
        notes.append(f"All scores are {common.pop()}.")  # comparable scores share it
    known = {score.measure for score in scores.values()} - {""}
    unknown = [name for name, score in scores.items() if not score.measure]
    if known and unknown:
        notes.append(f"Whether {', '.join(unknown)} is a density or a mass is not known: see that the units agree.")
    return tuple(notes)
