r"""A ladder of guides: climb from the simplest to the most flexible until importance weights can repair the draws.

Each rung starts where the one before ended and is trained; then its draws are weighed. A rung suffices when the 95 % interval
of :math:`\hat k` lies below its limit (0.7) and at least 100 effective draws are left; where every latent belongs to one
datum, when nine in ten data pass. Draws are added while the interval still holds the limit.

References:
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, arXiv:1802.02538.
    Vehtari et al. (2024), Pareto smoothed importance sampling, arXiv:1507.02646.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .contracts import Draws, Run

if TYPE_CHECKING:
    from .diagnostics.claims import Claim

__all__ = ["Ladder", "Rung", "climb"]

DRAWS = (10_000, 30_000, 100_000)
"""Draws that a rung is judged on, more of them while the verdict is open."""
MAX_NUMBERS = 5e7
"""Numbers drawn in one call."""

ADVICE = (
    "Try another parameterisation: where the scale of a latent is itself a latent, z ~ Normal(m, s), state a standard normal "
    "and use m + s * it (non-centred), or the reverse where each group has many data. Then heavier tails, or MCMC."
)


@dataclass(frozen=True)
class Rung:
    """One guide, trained and judged.

    Attributes:
        guide: Its name.
        bound: ELBO of the whole data set, nats, over the draws.
        bound_error: Its Monte Carlo standard error.
        khat: Tail shape of the importance weights (where each datum has its own: the largest).
        khat_error: Its standard error.
        ess: Effective draws (where each datum has its own: the fewest).
        draws: Draws that it was judged on.
        status: Of the claim that importance weights can repair it: ``supported``, ``contradicted``, ``undecided`` or
            ``not_measured``.
        explanation: Of the verdict, in words.
        seconds: Training and judging.
        steps: Optimizer steps.
        tier: Execution tier of the last step.
        stopped: Why training ended.
    """

    guide: str
    bound: float
    bound_error: float
    khat: float
    khat_error: float
    ess: float
    draws: int
    status: str
    explanation: str
    seconds: float
    steps: int
    tier: str
    stopped: str


@dataclass
class Ladder:
    """What was climbed. ``print`` it for the table.

    Attributes:
        rungs: In the order in which they were tried.
        skipped: Guides that were not tried, with the reason.
        chosen: The rung whose guide is kept: the first that suffices, else the one with the best bound.
    """

    rungs: list[Rung] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    chosen: str = ""

    @property
    def suffices(self) -> bool:
        """Whether importance weights can repair the chosen guide."""
        return any(rung.guide == self.chosen and rung.status == "supported" for rung in self.rungs)

    @property
    def seconds(self) -> float:
        """Wall time of all rungs."""
        return sum(rung.seconds for rung in self.rungs)

    def __str__(self) -> str:
        head = f"{'guide':<12}{'ELBO':>20}{'k-hat':>15}{'ESS':>8}{'draws':>9}{'seconds':>9}{'steps':>8}  {'tier':<9} verdict"
        rows = [_row(rung) for rung in self.rungs]
        skipped = [f"{name:<12}not tried: {why}" for name, why in self.skipped.items()]
        return "\n".join([head, *rows, *skipped, self.conclusion])

    @property
    def conclusion(self) -> str:
        """The outcome in words."""
        if self.suffices:
            return f"{self.chosen} suffices: use importance weights (psis_expectation) for what its draws say."
        return f"No rung suffices; {self.chosen} has the best bound and is kept. {ADVICE}"


def _row(rung: Rung) -> str:
    bound, khat = f"{rung.bound:.3f} ± {rung.bound_error:.3f}", f"{rung.khat:.2f} ± {rung.khat_error:.2f}"
    cost = f"{rung.seconds:>9.1f}{rung.steps:>8}  {rung.tier:<9}"
    return f"{rung.guide:<12}{bound:>20}{khat:>15}{rung.ess:>8.0f}{rung.draws:>9}{cost} {rung.status.replace('_', ' ')}"


def climb(
    guides: Sequence[str],
    train: Callable[[str], Run],
    draw: Callable[[int], Draws],
    skip: Callable[[str], str] = lambda name: "",
) -> Ladder:
    """Train and judge one guide after another until one suffices.

    Args:
        guides: Names, from the simplest to the most flexible.
        train: Trains the guide of that name, starting from the one before.
        draw: So many weighted draws from the guide trained last.
        skip: Why a guide need not or cannot be tried; empty to try it. Asked before each but the first.
    """
    found = Ladder()
    for name in guides:
        why = skip(name) if found.rungs else ""
        if why:
            found.skipped[name] = why
            continue
        start = time.perf_counter()
        run = train(name)
        found.rungs.append(_judged(name, run, draw, start))
        if found.rungs[-1].status == "supported":
            break
    best = max(found.rungs, key=lambda r: (r.status == "supported", r.bound if math.isfinite(r.bound) else -math.inf))
    found.chosen = best.guide
    return found


def _judged(name: str, run: Run, draw: Callable[[int], Draws], start: float) -> Rung:
    for count in DRAWS:
        draws = draw(count)
        weight = draws.log_weight
        verdict, khat, error, ess = _verdict(run, draws)
        numbers = sum(value[0].numel() for value in draws.values.values())
        more = next((n for n in DRAWS if n > count), None)
        if verdict.status != "undecided" or more is None or more * max(numbers, 1) > MAX_NUMBERS:
            break
    return Rung(
        guide=name,
        bound=float(weight.mean()),
        bound_error=float(weight.std() / math.sqrt(len(weight))),
        khat=khat,
        khat_error=error,
        ess=ess,
        draws=draws.num_samples,
        status=verdict.status,
        explanation=verdict.explanation,
        seconds=time.perf_counter() - start,
        steps=run.steps,
        tier=run.tier,
        stopped=run.stopped,
    )


def _verdict(run: Run, draws: Draws) -> tuple[Claim, float, float, float]:
    """The claim that importance weights can repair q, the worst tail shape with its error, and the fewest effective draws."""
    import xarray as xr

    from .diagnostics.claims import Evidence, Limits, judge
    from .diagnostics.importance import psis

    rows = draws.log_weight_rows
    weight, dims = (draws.log_weight, ()) if rows is None else (rows, ("data",))
    fitted = psis(xr.DataArray(weight.cpu().numpy()[None], dims=("chain", "draw", *dims)))
    worst = int(fitted.khat.fillna(math.inf).to_numpy().argmax())
    khat, error = (float(fitted[name].to_numpy().reshape(-1)[worst]) for name in ("khat", "khat_se"))
    claim = judge(2, Evidence(run, draws, None, fitted, Limits(), "quick"))
    return claim, khat, error, float(fitted.ess.min())
