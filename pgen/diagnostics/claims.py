r"""The claims that a report judges, each by a rule that can also say *undecided* or *not measured*.

A claim is ``supported`` when the whole 95 % interval of its statistic lies on the good side, ``contradicted`` when it lies on
the bad side (with Holm's adjustment where one claim makes several comparisons), ``undecided`` otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from pgen.contracts import Draws, NotAvailable, Run, check_choice, check_positive, spoken

from .convergence import Plateau, plateau
from .importance import MEASURABLE, psis, summarise_with
from .predictive import ppc

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = [
    "CLAIMS", "STATUSES", "Claim", "Evidence", "Limits", "Status", "judge", "overall", "parameter_table", "predictive_verdict",
]  # fmt: skip

Status: TypeAlias = Literal["supported", "contradicted", "undecided", "not_measured"]
STATUSES: tuple[Status, ...] = ("supported", "contradicted", "undecided", "not_measured")

EXPECTED_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, MemoryError)
"""What a model or a measurement may raise without ending the report (NotAvailable is a RuntimeError)."""

_Z = 1.959964
_MINUS = re.compile(r"(?<![\w-])-(?=\d)")
_TABLE = {"mean_q": "q_mean", "sd_q": "q_sd", "mean": "psis_mean", "sd": "psis_sd", "mcse": "psis_mcse", "khat": "khat"}
_FEWEST = 10  # data of which a distribution is compared with another
_MANY_DATA = 20  # past this many data, local latents are judged by their root mean square over the data


@dataclass(frozen=True)
class Kind:
    """What a claim is about, from which level on it is measured, and what it cannot see."""

    name: str
    short: str
    level: str
    cannot_see: str


CLAIMS: dict[int, Kind] = {
    1: Kind("optimisation finished", "optimisation", "quick", "other optima, or a learning rate too small to move"),
    2: Kind("importance weights can repair q", "importance weights", "quick", "modes that q never visits"),
    3: Kind(
        "raw q means and sds are within tolerance",
        "raw q summaries",
        "quick",
        "modes that q never visits; correlations and tails between these summaries",
    ),
    4: Kind("the bound is tight", "tightness of the bound", "standard", "modes that q never visits"),
    5: Kind("there is a single optimum", "single optimum (unvisited modes)", "thorough", "modes that every start misses"),
    6: Kind("calibrated over the prior predictive", "calibration over the prior", "standard", "errors at these data only"),
    7: Kind("calibrated at these data", "calibration at these data", "thorough", "errors that a classifier cannot learn"),
    8: Kind(
        "the model reproduces the data",
        "posterior predictive",
        "quick",
        "features other than those compared; the same data were fitted and checked",
    ),
    9: Kind("the latents are used", "use of the latents", "standard", "whether what they hold is useful"),
    10: Kind("the encoder generalises", "generalisation of the encoder", "standard", "data unlike the held-out data"),
    11: Kind(
        "held-out data fit as well as training data",
        "generalisation of the density",
        "quick",
        "data unlike the held-out data; whether both fit badly",
    ),
    12: Kind(
        "the data are as probable as the model's own samples",
        "probability of the data",
        "quick",
        "departures that leave the distribution of log p(x) as it is",
    ),
}
DENSITY = (11, 12)
"""Claims about families without latents, in place of those about a guide."""
OF_LATENTS = (2, 3, 4, 6, 7, 9, 10)
"""Claims about latents and their guide, which say nothing where there are none."""


@dataclass(frozen=True)
class Limits:
    """Where each claim turns; see ``report``'s argument ``tolerances``."""

    improvement: float | None = None
    ess: float = 100.0
    good_fraction: float = 0.9
    shift: float = 0.1
    sd_ratio: float = 0.1
    ppp: float = 0.05
    gap: float = 0.05
    probability: float = 0.15

    @classmethod
    def of(cls, tolerances: Mapping[str, float] | None) -> Limits:
        """The defaults, replaced where ``tolerances`` says so."""
        for name, value in (tolerances or {}).items():
            check_choice("tolerances", name, tuple(cls.__dataclass_fields__))
            check_positive(f"tolerances[{name!r}]", value, integer=False)
            if name in ("good_fraction", "sd_ratio", "ppp", "probability") and not value < 1:
                raise ValueError(f"`tolerances[{name!r}]` should be below 1, got {value!r}")
        return cls(**(tolerances or {}))


@dataclass(frozen=True)
class Claim:
    """One row of a report."""

    number: int
    status: Status
    statistic: str = ""
    estimate: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    threshold: str = ""
    n: int = 0
    explanation: str = ""
    cost_s: float = 0.0

    @property
    def claim(self) -> str:
        """The claim in words."""
        return CLAIMS[self.number].name

    @property
    def cannot_see(self) -> str:
        """What its verdict leaves open."""
        return CLAIMS[self.number].cannot_see


@dataclass
class Evidence:
    """What the claims are judged on.

    Attributes:
        run: What the fit left behind, if anything.
        draws: Guide draws, or None where ``problems["draw"]`` says why not.
        tree: The same as a DataTree, with replicates unless ``problems["predict"]`` says why not.
        fitted: PSIS of the weights, or None where ``problems["weights"]`` says why not.
        limits: Tolerances.
        level: How much was asked for.
        var_names: Sites to look at; all if None.
        problems: Why something is missing, by step.
        seconds: What each step took.
        status: Verdicts so far, by claim number.
        check: What ``ppc`` found, where claim 8 was measured.
        log_p: Of a family without latents: log p of the data and of the model's own samples, and the numbers of a datum.
    """

    run: Run | None
    draws: Draws | None
    tree: Any
    fitted: Any
    limits: Limits
    level: str
    var_names: list[str] | None = None
    problems: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    status: dict[int, Status] = field(default_factory=dict)
    components: Any = None
    check: Any = None
    log_p: tuple[np.ndarray, np.ndarray, int] | None = None

    @property
    def claims(self) -> list[int]:
        """The numbers of the claims that there are to judge."""
        dense = self.log_p is not None or "density" in self.problems
        return [number for number in CLAIMS if number not in (OF_LATENTS if dense else DENSITY)]

    @property
    def per_datum(self) -> bool:
        """Whether every latent belongs to one datum, so that each datum has weights of its own."""
        return self.fitted is not None and "data" in self.fitted.khat.dims


class NotMeasured(ValueError):
    """Why a claim cannot be judged."""


def judge(number: int, evidence: Evidence) -> Claim:
    """Judge one claim; whatever goes wrong inside becomes *not measured*, with the reason."""
    rules = {1: _optimised, 2: _repairable, 3: _raw_summaries, 8: _reproduces, 11: _generalises, 12: _as_probable}
    if number not in rules:
        return Claim(number, "not_measured", explanation=_not_built(number, evidence.level))
    try:
        claim = rules[number](evidence)
        return replace(claim, explanation=_MINUS.sub("\N{MINUS SIGN}", claim.explanation))
    except EXPECTED_ERRORS as problem:
        return Claim(number, "not_measured", explanation=describe(problem))


def describe(problem: BaseException) -> str:
    """An exception as a reason; its type is named unless the message alone was written for a reader."""
    spoken = isinstance(problem, (ValueError, NotAvailable)) and str(problem)
    return str(problem) if spoken else f"{type(problem).__name__}: {problem}"


def _not_built(number: int, level: str) -> str:
    if level == "quick":
        return f"needs level {CLAIMS[number].level!r}, which a later version will offer"
    return "offered from a later version"


def overall(claims: list[Claim]) -> str:
    """The verdict in one line."""
    named = {status: [f"{c.number} {CLAIMS[c.number].short}" for c in claims if c.status == status] for status in STATUSES}
    unchecked = f"; not checked: {', '.join(named['not_measured'])}" if named["not_measured"] else ""
    doubtful = f"; undecided: {', '.join(named['undecided'])}" if named["undecided"] else ""
    if named["contradicted"]:
        return f"problem found: {', '.join(named['contradicted'])}{doubtful}{unchecked}"
    if named["undecided"] or not named["supported"]:
        return f"undecided: {', '.join(named['undecided']) or 'nothing could be measured'}{unchecked}"
    return f"no problem found by: {', '.join(named['supported'])}{unchecked}"


# ------------------------------------------------------------------------------------------- 1: the optimisation


def _optimised(evidence: Evidence) -> Claim:
    run = evidence.run
    if run is None:
        raise NotMeasured("the model carries no record of a fit (`last_run` is None)")
    if not run.steps and len(run.history.get("loss", ())) == 1:
        return Claim(1, "supported", explanation=f"No steps were needed: {run.stopped}.")
    if not len(run.history.get("loss", ())):
        raise NotMeasured(f"the record of the fit has no losses ({run.stopped or 'no reason given'})")
    if run.restored is not None and not run.skipped:
        return _validated(run, run.restored)
    name, _, unit = spoken(run.word, training=True)
    if name != run.word:  # the loss is no figure that training brings to its best
        raise NotMeasured(
            f"the loss need not fall as training gets better, and the {run.word} has no best: judge the samples, by "
            "pgen.evaluation.samples.evaluate or `pgen evaluate`"
        )
    found = plateau(run)
    limit, why = _improvement_limit(evidence)
    why = why if unit else why.replace(" nats a datum", "")
    status, explanation = _plateau_verdict(found, limit, name)
    skipped = f" {run.skipped} steps of {run.steps} were not finite and were skipped." if run.skipped else ""
    return Claim(
        1,
        status,
        statistic=f"improvement of the {name}{unit and ', nats a datum'} for 1000 steps",
        estimate=found.rate,
        ci_low=found.ci_low,
        ci_high=found.ci_high,
        threshold=f"< {limit:.3g}",
        n=found.entries,
        explanation=f"{explanation}{skipped} Window: from step {found.first_step} on{_lr_words(found)}; {why}.",
    )


PAST_THE_PEAK = 5
"""Validations without a better held-out figure after which it counts as past its best."""


def _validated(run: Run, restored: float) -> Claim:
    """Where the best validated parameters were restored, the held-out figure says whether training could still help."""
    bounds = np.asarray(run.validation["bound"], dtype=np.float64)
    since = len(bounds) - 1 - int(np.nanargmax(bounds))
    (name, sign, unit), fitted = spoken(run.word), spoken(run.word, training=True)[0]
    past = since >= PAST_THE_PEAK
    explanation = (
        f"The held-out {name} is past its best, and the parameters are those of the best. That the training {fitted} went on "
        "improving is overfitting, not unfinished work."
        if past
        else "The best validated parameters lie close to the end of the fit: train longer, or let early stopping decide."
    )
    return Claim(
        1,
        "supported" if past else "undecided",
        statistic=f"validations since the best held-out {name}",
        estimate=float(since),
        threshold=f">= {PAST_THE_PEAK}",
        n=len(bounds),
        explanation=f"{explanation} Held-out {name} {sign * restored:.3f}{unit} at its best, {sign * bounds[-1]:.3f} last.",
    )


def _lr_words(found: Plateau) -> str:
    low, high = found.lr
    return (
        ""
        if found.lr_constant
        else f", where the learning rate went from {high:.2g} to {low:.2g}; steps count as at {high:.2g}"
    )


def _improvement_limit(evidence: Evidence) -> tuple[float, str]:
    """The tolerated improvement, nats a datum for 1000 steps: a posterior shared by N data feels the total of N such parts."""
    if evidence.limits.improvement is not None:
        return evidence.limits.improvement, "tolerance as given"
    num_data = max(evidence.run.num_data if evidence.run else 0, 1)
    if evidence.draws is not None and evidence.draws.has_global:
        return 0.5 / num_data, "tolerance 0.5 nats for the whole data set, as latents are shared"
    return 0.01, "tolerance 0.01 nats a datum"


def _plateau_verdict(found: Plateau, limit: float, name: str) -> tuple[Status, str]:
    if found.non_finite:
        return "contradicted", f"{found.non_finite} of {found.entries} logged losses in the window are not finite."
    if found.ci_high < -limit:
        return "contradicted", f"The {name} got worse towards the end: lower the learning rate."
    if found.ci_high < limit:
        return "supported", f"Whatever the {name} still gains is below the tolerance."
    if found.ci_low > limit and found.lr_constant:
        return "contradicted", f"The {name} was still improving when the fit ended: train longer."
    if found.ci_low > limit:
        return (
            "undecided",
            f"The {name} got better while the learning rate fell, which may be less noise or more learning: train longer.",
        )
    return "undecided", "Noise hides an improvement of the size of the tolerance: train longer, or average more draws a step."


# ----------------------------------------------------------------------------------- 11 and 12: exact densities


def _generalises(evidence: Evidence) -> Claim:
    """The log-likelihood of the training data less that of held-out data, in nats for each number of a datum."""
    run = evidence.run
    if evidence.log_p is None:
        raise NotMeasured(evidence.problems["density"])
    if run is None or not len(run.history.get("loss", ())) or not len(run.validation.get("bound", ())):
        raise NotMeasured("the fit had no validation data; fit(x, validation=0.1) holds some out")
    size, limit = evidence.log_p[2], evidence.limits.gap
    training = -float(_losses_at_the_figure(run).mean())
    gap, error = (training - run.bound) / size, _Z * run.bound_std_error / size
    status: Status = "supported" if gap + error < limit else "contradicted" if gap - error > limit else "undecided"
    explanation = {
        "supported": "Training and held-out data are about equally probable.",
        "contradicted": "The model knows its training data better than others: fit a smaller one, or stop earlier.",
        "undecided": "The interval holds the limit: more held-out data would decide.",
    }[status]
    return Claim(
        11, status, "training less held-out log-density, nats for each number of a datum", gap, gap - error, gap + error,
        f"< {limit:.3g}", run.num_data, f"{explanation} Training {training:.3f}, held out {run.bound:.3f} nats a datum.",
    )  # fmt: skip


def _losses_at_the_figure(run: Run) -> np.ndarray:
    """Training losses of the parameters that ``run.bound`` is about: of a tenth of the fit, around the best or at the end."""
    loss = np.asarray(run.history["loss"], dtype=np.float64)
    reach = max(1, len(loss) // 10)
    if run.restored is None or "step" not in run.history or "step" not in run.validation:
        return loss[-reach:]
    best = run.validation["step"][np.argmin(np.abs(run.validation["bound"] - run.restored))]
    entry = min(int(np.searchsorted(run.history["step"], best)), len(loss) - 1)
    return loss[max(entry - reach // 2, 0) : entry + reach // 2 + 1]


def _as_probable(evidence: Evidence) -> Claim:
    """The largest distance between the distributions of log p(x) over the data and over the model's samples."""
    if evidence.log_p is None:
        raise NotMeasured(evidence.problems["density"])
    data, own, _ = evidence.log_p
    if len(data) < _FEWEST:
        raise NotMeasured(f"{len(data)} data are too few to compare two distributions: give {_FEWEST} or more")
    at = np.sort(np.concatenate([data, own]))
    below = [np.searchsorted(np.sort(part), at, side="right") / len(part) for part in (data, own)]
    signed = below[0] - below[1]
    distance = float(np.abs(signed).max())
    band = 1.358 * math.sqrt(1 / len(data) + 1 / len(own))  # Smirnov's 95 % point
    limit = evidence.limits.probability
    low, high = max(distance - band, 0.0), min(distance + band, 1.0)
    status: Status = "supported" if high < limit else "contradicted" if low > limit else "undecided"
    less = signed[int(np.abs(signed).argmax())] > 0
    where = (
        "less probable than its samples: it misses some of them" if less else "more probable than its samples: it is too wide"
    )
    needed = _round_up(len(data) * (band / max(abs(distance - limit), 1e-3)) ** 2)
    explanation = {
        "supported": "log p(x) is distributed over the data as over the model's samples.",
        "contradicted": f"Under the model the data are {where}.",
        "undecided": f"The interval holds the limit: needs about {needed:,} data.",
    }[status]
    return Claim(
        12, status, "distance of the distributions of log p(x)", distance, low, high, f"< {limit:.3g}", len(data), explanation
    )


# ------------------------------------------------------------------------------------ 2: the importance weights


def _fitted(evidence: Evidence) -> xr.Dataset:
    if evidence.fitted is None:
        raise NotMeasured(evidence.problems.get("draw") or evidence.problems.get("weights", "no weights"))
    return evidence.fitted


def _repairable(evidence: Evidence) -> Claim:
    fitted = _fitted(evidence)
    return _repairable_rows(fitted, evidence.limits) if evidence.per_datum else _repairable_joint(fitted, evidence.limits)


def _repairable_joint(fitted: xr.Dataset, limits: Limits) -> Claim:
    khat, error, good, ess = (float(fitted[name]) for name in ("khat", "khat_se", "good_k", "ess"))
    draws, state = fitted.attrs["num_draws"], fitted.status.item()
    if state == "non_finite":
        raise NotMeasured("log-weights are NaN or infinite: the model or the guide gives no finite density to some draws")
    if state == "too_few":
        raise NotMeasured(f"{draws} draws leave no tail to fit: 21 at least, with distinct weights")
    low, high = khat - _Z * error, khat + _Z * error
    status: Status = "undecided"
    explanation = _more_draws(khat, error, good, draws)
    if low >= good:
        status, explanation = "contradicted", "Weights concentrate on few draws: q misses posterior mass, or is too narrow."
    elif high < good and ess < limits.ess:
        explanation = f"The tail is fine, but only {ess:.0f} effective draws are left of {draws}; {limits.ess:.0f} are wanted."
    elif high < good:
        status, explanation = "supported", f"{ess:.0f} effective draws of {draws}."
        explanation += " All weights are equal up to rounding." if state == "constant" else ""
    return Claim(2, status, "Pareto k-hat of the joint weights", khat, low, high, f"< {good:.2f}", draws, explanation)


def _more_draws(khat: float, error: float, good: float, draws: int) -> str:
    """About how many draws settle on which side of ``good`` the shape lies: its error falls with the fourth root of S."""
    factor = (_Z * error / max(abs(khat - good), 1e-3)) ** 4
    count = f"about {_round_up(factor * draws):,}" if factor * draws < 1e7 else "more than ten million"
    return f"The interval holds the limit: needs {count} draws."


def _round_up(x: float) -> int:
    unit = 10 ** max(int(math.log10(max(x, 1))), 0)
    return math.ceil(x / unit) * unit


def _repairable_rows(fitted: xr.Dataset, limits: Limits) -> Claim:
    good, total = int(fitted.status.isin(MEASURABLE).sum()), fitted.sizes["data"]
    low, high = _binomial_interval(good, total)
    status: Status = "undecided"
    if low > limits.good_fraction:
        status = "supported"
    elif high < limits.good_fraction:
        status = "contradicted"
    broken = int((fitted.status == "non_finite").sum())
    worst = f"{float(fitted.khat.max()):.2f}" if broken < total else "undefined"
    explanation = f"Largest k-hat {worst}, median {float(fitted.khat.median()):.2f}; smallest effective draws "
    explanation += f"{float(fitted.ess.min()):.0f} of {fitted.attrs['num_draws']}."
    explanation += f" {broken} data have weights that are not finite." if broken else ""
    explanation += " Look at more data, or draw more for each." if status == "undecided" else ""
    return Claim(
        2,
        status,
        statistic=f"fraction of data with k-hat < {float(fitted.good_k):.2f}",
        estimate=good / total,
        ci_low=low,
        ci_high=high,
        threshold=f"> {limits.good_fraction:g}",
        n=total,
        explanation=explanation,
    )


def _binomial_interval(count: int, total: int) -> tuple[float, float]:
    """Clopper and Pearson's 95 % interval of a fraction."""
    from scipy.special import betaincinv

    low = float(betaincinv(count, total - count + 1, 0.025)) if count else 0.0
    high = float(betaincinv(count + 1, total - count, 0.975)) if count < total else 1.0
    return low, high


# ------------------------------------------------------------------------------------- 3: the raw summaries of q


def _raw_summaries(evidence: Evidence) -> Claim:
    import pandas as pd

    fitted = _fitted(evidence)
    if evidence.status.get(2) == "contradicted":
        raise NotMeasured("claim 2 is contradicted: these weights cannot measure the posterior")
    if not bool(fitted.status.isin(MEASURABLE).any()):
        raise NotMeasured(f"k-hat {float(fitted.khat.min()):.2f} is not below {float(fitted.good_k):.2f}: draw more")
    evidence.components = table = _components(evidence)
    if table.empty:
        raise NotMeasured("no latent has a finite spread")
    limits = evidence.limits
    ratio = (math.log(1 - limits.sd_ratio), math.log(1 + limits.sd_ratio))
    bounds = {"shift": (-limits.shift, limits.shift), "log_sd_ratio": ratio}
    low, high = (table["kind"].map({kind: pair[side] for kind, pair in bounds.items()}) for side in (0, 1))
    inside = (table["ci_low"] > low) & (table["ci_high"] < high)
    half = _normal_quantile(1 - 0.025 / len(table)) * table["se"]  # the first step of Holm's procedure
    outside = (table["estimate"] - half > high) | (table["estimate"] + half < low)
    table["status"] = np.select([outside, inside], ["contradicted", "supported"], "undecided")
    status: Status = "contradicted" if outside.any() else "supported" if inside.all() else "undecided"
    excess = pd.concat([table["estimate"] / high, table["estimate"] / low], axis=1).max(axis=1)
    worst = table.loc[excess[table["status"] == _decisive(status, table)].idxmax()]
    return _summary_claim(status, worst, table, limits, evidence)


def _decisive(status: Status, table: pd.DataFrame) -> str:
    return status if (table["status"] == status).any() else "undecided"


def _summary_claim(status: Status, worst: Any, table: pd.DataFrame, limits: Limits, evidence: Evidence) -> Claim:
    is_shift, rms = worst["kind"] == "shift", table.attrs["rms"]
    change = float if is_shift else math.exp
    what, allowed = _summary_words(is_shift, rms, limits)
    outside, open_ = (int((table["status"] == s).sum()) for s in ("contradicted", "undecided"))
    explanation = f"Largest of {len(table)} comparisons (means and sds); {outside} outside, {open_} open."
    if rms:
        average = f"{worst['mean']:+.2f}" if is_shift else f"{math.exp(worst['mean']):.2f}"
        explanation += f" The plain average over the data, with its sign, is {average}."
    if status == "contradicted":
        explanation += " Use psis_expectation for the summaries, or a richer guide."
    return Claim(
        3,
        status,
        statistic=f"{worst['name']}: {what}",
        estimate=change(worst["estimate"]),
        ci_low=change(worst["ci_low"]),
        ci_high=change(worst["ci_high"]),
        threshold=allowed,
        n=evidence.fitted.attrs["num_draws"],
        explanation=explanation,
    )


def _summary_words(is_shift: bool, rms: bool, limits: Limits) -> tuple[str, str]:
    """What is measured, and the threshold."""
    if is_shift:
        what = "shift of the mean, posterior sds"
        return (f"root mean square {what}", f"< {limits.shift:g}") if rms else (what, f"within ±{limits.shift:g}")
    if rms:
        return "root mean square factor between sd of q and posterior sd", f"< {1 + limits.sd_ratio:g}"
    return "sd of q / posterior sd", f"{1 - limits.sd_ratio:g} to {1 + limits.sd_ratio:g}"


def _components(evidence: Evidence) -> pd.DataFrame:
    """One row a comparison: name, kind, estimate, se and 95 % interval."""
    import pandas as pd

    fitted = evidence.fitted
    rms = evidence.per_datum and fitted.sizes["data"] > _MANY_DATA
    rows: list[dict[str, Any]] = []
    for name, error in _errors(evidence).data_vars.items():
        values = error.transpose("statistic", "data", ...) if rms else error
        shift, shift_se, ratio, ratio_se = (values.sel(statistic=s).to_numpy() for s in values.statistic.to_numpy())
        with np.errstate(divide="ignore", invalid="ignore"):
            measured = {"shift": (shift, shift_se), "log_sd_ratio": (np.log(ratio), ratio_se / ratio)}
        for kind, (estimate, se) in measured.items():
            if rms:
                signed = _column_means(estimate)
                rows += _rows(str(name), kind, *_root_mean_square(estimate, se), signed)
            else:
                rows += _rows(str(name), kind, estimate, se, estimate)
    table = pd.DataFrame(rows, columns=["name", "kind", "estimate", "se", "ci_low", "ci_high", "mean"])
    table.attrs["rms"] = rms
    if rms:
        table["ci_low"] = table["ci_low"].clip(lower=0.0)
    return table


def _errors(evidence: Evidence) -> xr.Dataset:
    posterior = evidence.tree["posterior"].to_dataset()
    names = ("shift", "shift_se", "sd_ratio", "sd_ratio_se")
    return summarise_with(posterior, evidence.fitted, evidence.var_names, names, masked=True)


def _root_mean_square(estimate: np.ndarray, se: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root mean square over the first axis, freed of what sampling noise adds, and its standard error."""
    square = estimate**2 - se**2
    with np.errstate(invalid="ignore", divide="ignore"):
        count = np.isfinite(square).sum(axis=0)
        mean = np.nansum(square, axis=0) / count
        spread = np.sqrt(np.nansum((square - mean) ** 2, axis=0) / (count - 1) / count)
        root = np.sqrt(np.maximum(mean, 0.0))
        high = np.sqrt(np.maximum(mean + _Z * spread, 0.0))
    return root, (high - root) / _Z


def _column_means(x: np.ndarray) -> np.ndarray:
    finite = np.isfinite(x)
    with np.errstate(invalid="ignore"):
        return np.where(finite, x, 0.0).sum(axis=0) / finite.sum(axis=0)


def _rows(name: str, kind: str, estimate: np.ndarray, se: np.ndarray, mean: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for index in np.ndindex(estimate.shape):
        value, error = float(estimate[index]), float(se[index])
        if math.isfinite(value) and math.isfinite(error):
            numbers = {"estimate": value, "se": error, "ci_low": value - _Z * error, "ci_high": value + _Z * error}
            rows.append({"name": _component(name, index), "kind": kind, **numbers, "mean": mean[index]})
    return rows


def _component(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def parameter_table(evidence: Evidence) -> pd.DataFrame:
    """Every scalar latent: mean and sd under raw q, and under PSIS with the Monte Carlo error of that mean.

    Where each datum has latents of its own there are too many to list: an empty table then.
    """
    import pandas as pd

    many = evidence.per_datum and evidence.fitted.sizes["data"] > _MANY_DATA
    if evidence.tree is None or "posterior" not in evidence.tree or many:
        return pd.DataFrame()
    posterior = evidence.tree["posterior"].to_dataset()
    names = evidence.var_names or [str(name) for name in posterior.data_vars]
    fitted, columns = evidence.fitted, tuple(_TABLE)
    if fitted is None:
        fitted, columns = psis(0.0 * evidence.tree["sample_stats"]["lp"]), ("mean_q", "sd_q")
    summary = summarise_with(posterior, fitted, names, columns, masked=True)
    return pd.DataFrame([row for name in names for row in _site_rows(name, summary[name])])


def _site_rows(name: str, summary: xr.DataArray) -> list[dict[str, Any]]:
    values = dict(zip(summary.statistic.to_numpy(), summary.to_numpy()))
    return [
        {"name": _component(name, index), **{_TABLE[key]: float(values[key][index]) for key in values}}
        for index in np.ndindex(summary.shape[1:])
    ]


# ---------------------------------------------------------------------------------------- 8: posterior predictive


def _reproduces(evidence: Evidence) -> Claim:
    if evidence.tree is None or "posterior_predictive" not in evidence.tree:
        raise NotMeasured(evidence.problems.get("predict") or evidence.problems.get("draw", "no posterior predictive draws"))
    evidence.check = check = ppc(evidence.tree)
    ppp, draws = check.ppp.to_numpy().reshape(-1), check.sizes["draw"]
    names = [f"{statistic} of {site}" for site in check.site.values for statistic in check.statistic.values]
    limit = evidence.limits.ppp
    status, intervals = predictive_verdict(ppp, draws, limit)
    worst = int(np.argmin(np.minimum(ppp, 1 - ppp)))
    edge = limit / (2 * len(ppp))
    return Claim(
        8,
        status,
        statistic=f"posterior predictive p-value, {names[worst]}",
        estimate=float(ppp[worst]),
        ci_low=float(intervals[worst, 0]),
        ci_high=float(intervals[worst, 1]),
        threshold=f"{edge:.3g} to {1 - edge:.4g}",
        n=draws,
        explanation=_ppc_words(status, len(ppp), check, evidence.draws),
    )


def predictive_verdict(ppp: np.ndarray, draws: int, limit: float) -> tuple[Status, np.ndarray]:
    """Whether p-values from ``draws`` replicates decide claim 8, and their 95 % Monte Carlo intervals ``(comparisons, 2)``."""
    intervals = np.array([_binomial_interval(round(p * draws), draws) for p in ppp])
    # the largest and smallest two-sided p-values within Monte Carlo error, times the comparisons (Holm's first step)
    reach = 2 * np.minimum(intervals[:, 1], 1 - intervals[:, 0]) * len(ppp)
    near = 2 * np.minimum(intervals[:, 0], 1 - intervals[:, 1]) * len(ppp)
    status: Status = "undecided"
    if (reach < limit).any():
        status = "contradicted"
    elif (near > limit).all():
        status = "supported"
    return status, intervals


def _ppc_words(status: Status, comparisons: int, check: xr.Dataset, draws: Draws | None) -> str:
    far = {
        "contradicted": "The data lie outside what the model generates",
        "supported": "The data lie within what the model generates",
        "undecided": "Too few replicates to tell",
    }[status]
    reused = " from the latents that q gives each datum" if draws is not None and draws.has_local else ""
    features = ", ".join(check.statistic.values)
    return (
        f"{far}{reused}, by {features} ({comparisons} comparisons). Such a p-value gathers near one half when the model holds; "
        "it is not the probability that the model is right."
    )
