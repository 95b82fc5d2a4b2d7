r"""One report on a fitted model: what is claimed, on what evidence, and what was not looked at."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pgen.contracts import Batch, Draws, Run, Seed, as_seed, check_choice, check_positive
from pgen.data.arrays import as_batch
from pgen.evaluation.units import QUIET_SECONDS
from pgen.training.progress import Progress

from .claims import (
    CLAIMS,
    EXPECTED_ERRORS,
    Claim,
    Evidence,
    Limits,
    describe,
    judge,
    overall,
    parameter_table,
    predictive_verdict,
)
from .convert import check_predictive, to_datatree, why_unweighted
from .importance import psis
from .predictive import p_values

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Fitted", "Report", "report"]

_T = TypeVar("_T")

_ROW = (
    *("number", "claim", "status", "statistic", "estimate", "ci_low", "ci_high"),
    *("threshold", "n", "cost_s", "cannot_see", "explanation"),
)

_DRAWS, _DRAWS_PER_DATUM = 4000, 1000
_MAX_DATA = 256  # data looked at when every latent belongs to one datum
_MAX_ELEMENTS = 5e7  # latent numbers drawn in one call
_REPLICATES = 200, 1000  # data sets replicated: first, and in all where those leave claim 8 undecided
_MOST_PROBABLE = 1000  # data whose log p is compared with that of as many samples
_MAX_REPLICATED = 2e7  # observed numbers replicated in one call


class Fitted(Protocol):
    """What a report asks of a fitted model."""

    last_run: Run | None

    def draw(self, data: Batch, num_samples: int, seed: int) -> Draws:
        """Weighted draws from the guide."""
        ...

    def predict(self, data: Batch, num_samples: int, seed: int) -> dict[str, Tensor]:
        """Replicates of the observed sites given latents that q draws for these data, ``(S, *observed shape)``."""
        ...


@dataclass
class Report:
    """What was found. Print it, or write it with ``to_html``, ``to_markdown``, ``to_json``.

    Attributes:
        overall: The verdict in one line: *problem found*, *undecided*, or *no problem found by ...; not checked: ...*.
        rows: The claims, in order.
        idata: Draws, weights, likelihoods and replicates as a DataTree; None where no draws could be had.
        parameters: DataFrame of scalar latents: mean and sd of raw q and under PSIS; empty where each datum has its own.
        level: What was asked for.
        seed: Of all random numbers.
        about: Facts for the reader (draws, data, versions), in words.
        evidence: What the claims were judged on.
    """

    overall: str
    rows: list[Claim]
    idata: Any
    parameters: pd.DataFrame
    level: str
    seed: int
    about: list[str] = field(default_factory=list)
    evidence: Evidence | None = None

    @property
    def claims(self) -> pd.DataFrame:
        """One row a claim, indexed by its number."""
        import pandas as pd

        return pd.DataFrame([_as_row(claim) for claim in self.rows]).set_index("number")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; not-a-number is None, infinities are ``"inf"`` and ``"-inf"``."""
        return {
            "overall": self.overall,
            "level": self.level,
            "seed": self.seed,
            "about": list(self.about),
            "claims": [_plain(_as_row(claim)) for claim in self.rows],
            "parameters": [_plain(row) for row in self.parameters.to_dict("records")],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The same as JSON text, also written to ``path`` if given."""
        return _write(json.dumps(self.to_dict(), indent=1, allow_nan=False), path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The claims and parameters as Markdown tables, also written to ``path`` if given."""
        lines = [f"**{_cell(self.overall)}**", "", "| | claim | status | evidence | cannot see |", "|---|---|---|---|---|"]
        for claim in self.rows:
            found = ". ".join(filter(None, (evidence_words(claim), claim.explanation)))
            cells = (str(claim.number), claim.claim, _word(claim), found, claim.cannot_see)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        if len(self.parameters):
            columns = list(self.parameters.columns)
            lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(_cell(show(value)) for value in row)} |" for row in self.parameters.to_numpy()]
        return _write("\n".join([*lines, "", _cell("; ".join(self.about)), ""]), path)

    def to_html(self, path: str | Path, figures: Mapping[str, Figure] | None = None) -> Path:
        """Write one self-contained page, with pictures; ``figures`` adds your own under their titles.

        Returns:
            The path written.
        """
        from .html import page

        path = Path(path)
        path.write_text(page(self, dict(figures or {})), encoding="utf-8")
        return path

    def __str__(self) -> str:
        lines = textwrap.wrap(self.overall, 98, subsequent_indent="  ")
        for claim in self.rows:
            if CLAIMS[claim.number].level == "quick" or claim.status != "not_measured":
                lines += ["", f"{claim.number:>2}  {_word(claim):<13} {claim.claim}", *_indented(evidence_words(claim))]
                lines += [*_indented(claim.explanation), *_indented(f"cannot see: {claim.cannot_see}")]
        return "\n".join([*lines, "", *textwrap.wrap("; ".join(self.about), 98)])


def report(
    model: Fitted,
    *data: Any,
    level: str = "quick",
    seed: Seed = 0,
    num_samples: int | None = None,
    tolerances: Mapping[str, float] | None = None,
    var_names: Sequence[str] | str | None = None,
    progress: bool = True,
) -> Report:
    r"""Judge a fitted model on its data: ten claims, each supported, contradicted, undecided or not measured.

    Of a family without latents two claims take the place of those about latents and their guide: that held-out data fit as
    well as the training data, and that the data are as probable as the model's own samples.

    A problem inside one claim makes that claim *not measured* and leaves the others alone. Where every latent belongs to one
    datum, at most 256 data, chosen at random, are looked at.

    Args:
        model: A fitted ``Pair`` or family, or anything with ``draw``, ``predict`` and ``last_run``.
        data: What it was fitted to: a tensor, a dict, or several positional arguments.
        level: ``quick``; ``standard`` and ``thorough`` are accepted, but what they would add is not built yet.
        seed: Of every random number used; global random state is left alone.
        num_samples: Guide draws; by default 4000, or 1000 where each datum has latents of its own.
        tolerances: Any of ``improvement`` (nats a datum for 1000 steps; default 0.01, or 0.5/N where latents are shared),
            ``ess`` (effective draws, 100), ``good_fraction`` (of the data, 0.9), ``shift`` (posterior sds, 0.1), ``sd_ratio``
            (distance from one, 0.1), ``ppp`` (two-sided level, 0.05), ``gap`` (nats for each number of a datum, 0.05),
            ``probability`` (distance of two distribution functions, 0.15).
        var_names: Latent sites to look at in claim 3 and the table; all by default.
        progress: Whether to show a bar with the claim at work on what takes more than two seconds.

    Raises:
        TypeError: If ``model`` lacks ``draw`` or ``predict``.
        ValueError: If an argument names something unknown.
    """
    for method in ("draw", "predict"):
        if not callable(getattr(model, method, None)):
            raise TypeError(f"`model` should be a fitted model, got {type(model).__name__} without `{method}`")
    check_choice("level", level, ("quick", "standard", "thorough"))
    check_positive("num_samples", num_samples, allow_none=True)
    limits, seed = Limits.of(tolerances), as_seed(seed)
    with Progress(len(CLAIMS), progress, QUIET_SECONDS) as bar:
        bar.at(0, "claims 2 and 8")
        evidence, about = _gather(model, data[0] if len(data) == 1 else data, seed, num_samples, limits, var_names)
        evidence.level = level
        claims = []
        for done, number in enumerate(evidence.claims):
            bar.at(done, f"claim {number}")
            claims.append(_timed(number, evidence))
    return Report(
        overall=overall(claims),
        rows=claims,
        idata=evidence.tree,
        parameters=parameter_table(evidence),
        level=level,
        seed=seed,
        about=[*filter(None, [getattr(model, "family", "")]), *about, f"level {level}", f"seed {seed}"],
        evidence=evidence,
    )


def _timed(number: int, evidence: Evidence) -> Claim:
    """Judge one claim; its cost includes the draws made for it."""
    start = time.perf_counter()
    claim = judge(number, evidence)
    evidence.status[number] = claim.status
    drawn = sum(evidence.seconds.get(step, 0.0) for step in {2: ("draw", "weights"), 8: ("predict",)}.get(number, ()))
    return replace(claim, cost_s=drawn + time.perf_counter() - start)


# --------------------------------------------------------------------------------------------- gathering evidence


def _gather(
    model: Fitted, data: Any, seed: int, num_samples: int | None, limits: Limits, var_names: Any
) -> tuple[Evidence, list[str]]:
    """Draw, replicate, smooth; note what failed instead of raising."""
    evidence = Evidence(getattr(model, "last_run", None), None, None, None, limits, "quick")
    about: list[str] = []
    probe = _attempt(evidence, "draw", lambda: model.draw(data, num_samples=2, seed=seed))
    if probe is not None:
        evidence.var_names = _check_names(probe, var_names)
        data, total, shown = _choose_data(data, probe, seed)
        wanted = num_samples or _default_draws(probe, shown)
        evidence.draws = _attempt(evidence, "draw", lambda: model.draw(data, num_samples=wanted, seed=seed))
        about += [*([f"{wanted} draws"] if probe.values else []), *_data_words(shown, total)]
    elif not getattr(model, "has_posterior", True):
        given = as_batch(data)
        evidence.draws = Draws.of_data({"x": given["x"] if isinstance(given, dict) else given})
        about += _data_words(*[_num_data(data)] * 2)
    if (
        evidence.draws is not None
        and not evidence.draws.values
        and hasattr(model, "log_prob")
        and hasattr(model, "event_shape")
    ):
        evidence.log_p = _attempt(evidence, "density", lambda: _log_p(model, data, seed))
    replicates = _attempt(evidence, "predict", lambda: _predict(model, data, evidence.draws, seed, limits))
    if evidence.draws is not None:
        draws = evidence.draws
        evidence.tree = tree = _attempt(evidence, "draw", lambda: to_datatree(draws, predictive=replicates, run=evidence.run))
        evidence.fitted = _attempt(evidence, "weights", lambda: _smooth(draws, tree))
    return evidence, about


def _log_p(model: Any, data: Any, seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """log p of the data, at most 1000 of them, and of as many samples of the model, under the same contexts."""
    total = _num_data(data)
    data = _rows(data, torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:_MOST_PROBABLE])
    given = data if isinstance(data, dict) else {"x": data}
    further = sorted(set(given) - {"x", "context"})
    if further:
        raise ValueError(f"the model cannot be sampled under the data's own {further[0]!r}")
    own = model.sample(len(given["x"]), given.get("context"), seed=seed)
    scores = [model.log_prob({**given, "x": x}, seed=seed) for x in (given["x"], own)]
    return (*(score.value.double().cpu().numpy() for score in scores), scores[0].event_size)


def _data_words(shown: int, total: int) -> list[str]:
    if not total:
        return []
    return [f"{shown} of {total} data looked at" if shown < total else f"{total} data"]


def _attempt(evidence: Evidence, step: str, action: Callable[[], _T]) -> _T | None:
    start = time.perf_counter()
    try:
        return action()
    except EXPECTED_ERRORS as problem:
        evidence.problems[step] = describe(problem)
        return None
    finally:
        evidence.seconds[step] = evidence.seconds.get(step, 0.0) + time.perf_counter() - start


def _check_names(draws: Draws, var_names: Sequence[str] | str | None) -> list[str] | None:
    if var_names is None:
        return None
    names = [var_names] if isinstance(var_names, str) else list(var_names)
    known = [name.replace("/", ".") for name in draws.values]
    for name in names:
        check_choice("var_names", name, known)
    return names


def _choose_data(data: Any, probe: Draws, seed: int) -> tuple[Any, int, int]:
    """The data to look at, how many there are, and how many were chosen: a part only where every latent belongs to a datum."""
    total = _num_data(data)
    if probe.log_weight_rows is None or not probe.has_local or not total:
        return data, total, total
    size = sum(value[0].numel() for value in probe.values.values()) / total
    most = int(min(_MAX_DATA, max(16, _MAX_ELEMENTS / (_DRAWS_PER_DATUM * size))))
    if total <= most or total != probe.log_weight_rows.shape[1]:
        return data, total, total
    chosen = np.sort(np.random.default_rng(seed).choice(total, size=most, replace=False))
    return _rows(data, torch.from_numpy(chosen)), total, most


def _num_data(data: Any) -> int:
    """Length of the data's first axis; 0 where its parts differ or have none."""
    if isinstance(data, dict):
        data = tuple(data.values())
    if not isinstance(data, tuple):
        return len(data) if hasattr(data, "__len__") and getattr(data, "shape", None) != () else 0
    lengths = {_num_data(part) for part in data if part is not None}
    return lengths.pop() if len(lengths) == 1 else 0


def _rows(data: Any, index: Tensor) -> Any:
    if isinstance(data, dict):
        return {name: _rows(part, index) for name, part in data.items()}
    if isinstance(data, tuple):
        return tuple(_rows(part, index) for part in data)
    if hasattr(data, "rows"):
        return data.rows(index)
    if isinstance(data, Tensor):
        return data[index.to(data.device)]
    return None if data is None else np.asarray(data)[index.numpy()]


def _default_draws(probe: Draws, shown: int) -> int:
    if probe.log_weight_rows is not None and probe.has_local:
        return _DRAWS_PER_DATUM
    size = sum(value[0].numel() for value in probe.values.values())
    return int(min(_DRAWS, max(200, _MAX_ELEMENTS // max(size, 1))))


def _predict(model: Fitted, data: Any, draws: Draws | None, seed: int, limits: Limits) -> dict[str, Tensor]:
    """Replicates, and more of them where the first do not decide claim 8."""
    size = sum(value.numel() for value in draws.observed.values()) if draws is not None else 0
    most = int(min(_REPLICATES[1], max(50, _MAX_REPLICATED // max(size, 1))))
    first = min(_REPLICATES[0], most)
    replicates = model.predict(data, num_samples=first, seed=seed + 1)
    if draws is None:
        return replicates
    check_predictive(draws, replicates)
    found = p_values(draws.observed, replicates) if set(replicates) & set(draws.observed) else np.ones(0)
    if first == most or predictive_verdict(found, first, limits.ppp)[0] != "undecided":
        return replicates
    more = model.predict(data, num_samples=most - first, seed=seed + 2)
    return {name: torch.cat([value, more[name]]) for name, value in replicates.items()}


def _smooth(draws: Draws, tree: Any) -> Any:
    if reason := why_unweighted(draws):
        raise ValueError(reason)
    stats = tree["sample_stats"].to_dataset()
    return psis(stats["log_weight_rows"] if "log_weight_rows" in stats else stats["log_weight"])


# ------------------------------------------------------------------------------------------------------- in words


def _as_row(claim: Claim) -> dict[str, Any]:
    return {name: getattr(claim, name) for name in _ROW}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _number(value) for name, value in row.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(float(value))


def _word(claim: Claim) -> str:
    return claim.status.replace("_", " ")


def evidence_words(claim: Claim) -> str:
    """Estimate, interval and threshold of a claim in one line; empty where there is none."""
    if not claim.statistic:
        return ""
    interval = f" [{show(claim.ci_low)}, {show(claim.ci_high)}]" if math.isfinite(claim.ci_low) else ""
    return f"{claim.statistic}: {show(claim.estimate)}{interval}, wanted {claim.threshold}"


def show(value: Any) -> str:
    """A number as a reader wants it: three digits, no exponent unless needed; a whole one as it is."""
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(float(value), "–")
    if value == round(value) and abs(value) < 1e6:
        return f"{value:.0f}".replace("-", "−")
    text = f"{value:.3f}" if 0.095 <= abs(value) < 100 else f"{value:.3g}"
    return text.replace("-", "−")


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 98, initial_indent=" " * 18, subsequent_indent=" " * 18)


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _write(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
