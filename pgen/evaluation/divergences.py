r"""How far two distributions are apart, with error bars: between densities (KL, Jensen-Shannon) and between samples (MMD,
Wasserstein).

Densities are anything that samples and scores: fitted models, toy targets, torch distributions. Samples need nothing but
themselves, so they compare a model without a density with data; the permutation p-value says whether they could be of one
distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import KIND_WORDS, Kind, NotAvailable, Score, Seed, as_seed, check_positive
from ..data.arrays import as_batch, check_finite
from ..data.batches import key
from ..programs import keyed_rng
from ..training.progress import Progress
from .units import QUIET_SECONDS

__all__ = ["Divergence", "jensen_shannon", "kl", "mmd", "sliced_wasserstein", "wasserstein"]

_MOST_POINTS = 5000
"""Points of a sample up to which all pairs are looked at."""


@dataclass(frozen=True, repr=False)
class Divergence:
    """A divergence with its error.

    Attributes:
        name: Which.
        value: The estimate; one that is unbiased can be negative where the truth is near zero.
        std_error: Its Monte Carlo standard error.
        unit: Of both.
        kind: ``exact`` but for the Monte Carlo error, a bound in expectation, or an estimate.
        p_value: Of the hypothesis that both samples are of one distribution; None where nothing was permuted.
        num_samples: Of each side; 0 of one that was not sampled.
    """

    name: str
    value: float
    std_error: float
    unit: str
    kind: Kind = "exact"
    p_value: float | None = None
    num_samples: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        kind = "" if self.kind == "exact" else f", {KIND_WORDS[self.kind]}"
        p_value = "" if self.p_value is None else f", p = {self.p_value:.3g}"
        samples = " and ".join(str(count) for count in self.num_samples if count)
        return f"{self.name} {self.value:.4f} ± {self.std_error:.4f} {self.unit}{kind}{p_value} ({samples} samples)"


# --- between densities -----------------------------------------------------------------------------------------------------


def kl(p: Any, q: Any, n: int = 10_000, *, seed: Seed = 0, progress: bool = True, **options: Any) -> Divergence:
    r"""The Kullback-Leibler divergence by Monte Carlo: unbiased, with its standard error.

    .. math:: \mathrm{KL}(p \,\|\, q) = \mathbb{E}_{x \sim p}[\log p(x) - \log q(x)]

    With a bound in place of a log-density it is a bound or an estimate, and its ``kind`` says which. Infinite where p has mass
    on which q has none.

    Args:
        p: A fitted model, a toy target, or a torch distribution: it samples and scores.
        q: The same; it scores.
        n: Draws from p.
        seed: Keys them.
        progress: Whether to show a bar on what takes more than two seconds.
        **options: Of ``log_prob`` of models, such as ``num_samples``.

    Raises:
        ValueError: If one is a density and the other a mass, or their events differ.

    Example:
        >>> unit, wide = (torch.distributions.Normal(0.0, sd) for sd in (1.0, 2.0))
        >>> found = kl(unit, wide)  # log 2 + 1/8 - 1/2 = 0.3181
        >>> abs(found.value - 0.3181) < 4 * found.std_error < 0.03
        True
    """
    check_positive("n", n)
    ratio = _ratio(p, q, _sample(p, n, key(as_seed(seed), "kl")), {**options, "seed": seed, "progress": progress})
    return Divergence("KL", ratio.mean, _error(ratio.value), "nats", ratio.kind, None, (len(ratio), 0))


def jensen_shannon(p: Any, q: Any, n: int = 10_000, *, seed: Seed = 0, progress: bool = True, **options: Any) -> Divergence:
    r"""The Jensen-Shannon divergence by Monte Carlo, between 0 and log 2 = 0.693 nats.

    .. math:: \mathrm{JS}(p, q) = \tfrac12 \mathbb{E}_p\!\left[\log \frac{p}{m}\right]
        + \tfrac12 \mathbb{E}_q\!\left[\log \frac{q}{m}\right], \qquad m = \tfrac12 (p + q)

    Finite even where the supports differ. Both must sample and score; with bounds it is an estimate.

    Args:
        p: A fitted model, a toy target, or a torch distribution.
        q: The same.
        n: Draws from each.
        seed: Keys them.
        progress: Whether to show a bar on what takes more than two seconds.
        **options: Of ``log_prob`` of models.

    References:
        Lin (1991), Divergence measures based on the Shannon entropy, doi:10.1109/18.61115, eq. 4.1.

    Example:
        >>> near, far = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(100.0, 1.0)
        >>> round(jensen_shannon(near, far, 100).value, 4)
        0.6931
    """
    check_positive("n", n)
    seed, given = as_seed(seed), {**options, "seed": seed, "progress": progress}
    above = _ratio(p, q, _sample(p, n, key(seed, "js", 0)), given)
    below = _ratio(q, p, _sample(q, n, key(seed, "js", 1)), given, names=("q", "p"))
    # log p/m = log 2 - log(1 + q/p)
    terms = [math.log(2) - torch.nn.functional.softplus(-ratio.value) for ratio in (above, below)]
    error = 0.5 * math.hypot(*(_error(term) for term in terms))
    kind: Kind = "exact" if above.kind == "exact" else "unnormalised" if above.kind == "unnormalised" else "estimate"
    value = 0.5 * sum(float(term.mean()) for term in terms)
    return Divergence("Jensen-Shannon", value, error, "nats", kind, None, (n, n))


def _ratio(p: Any, q: Any, x: Tensor, options: dict[str, Any], names: tuple[str, str] = ("p", "q")) -> Score:
    """log p - log q at draws of p, which the caller may call otherwise."""
    first, second = names
    ratio = _log_prob(first, p, x, options) - _log_prob(second, q, x, options)
    if lost := int(torch.isnan(ratio.value).sum()):
        raise ValueError(f"log {first} - log {second} is not a number at {lost} of {len(x)} draws of {first}")
    return ratio


def _error(value: Tensor) -> float:
    return float(value.std() / math.sqrt(len(value))) if len(value) > 1 else math.nan


def _sample(p: Any, n: int, seed: int) -> Tensor:
    if not callable(getattr(p, "sample", None)):
        raise NotAvailable(f"{type(p).__name__} does not sample, which this divergence needs; use mmd of two samples")
    with keyed_rng(seed):
        return p.sample((n,)) if isinstance(p, torch.distributions.Distribution) else p.sample(n, seed=seed)


def _log_prob(name: str, p: Any, x: Tensor, options: dict[str, Any]) -> Score:
    if not callable(getattr(p, "log_prob", None)):
        raise TypeError(f"`{name}` should be a fitted model, a toy or a torch distribution, got {type(p).__name__}")
    try:
        score = p.log_prob(x, **options) if hasattr(p, "fit") else p.log_prob(x)
    except ValueError as error:  # torch's message goes on with every draw
        reason = str(error).partition(", but found invalid values")[0]
        raise ValueError(f"`{name}` cannot score the draws, of event shape {tuple(x.shape[1:])}: {reason}") from error
    if isinstance(score, Score):
        return score
    if score.dim() != 1:
        raise ValueError(f"`{name}` gives log-densities of shape {tuple(score.shape)} to {len(x)} draws; use Independent")
    return Score(score.double(), "exact", math.prod(x.shape[1:]))


# --- between samples -------------------------------------------------------------------------------------------------------


def mmd(
    x: Any,
    y: Any,
    *,
    bandwidth: float | None = None,
    permutations: int = 1000,
    seed: Seed = 0,
    progress: bool = True,
) -> Divergence:
    r"""The squared maximum mean discrepancy of two samples under a Gaussian kernel, with a permutation test.

    .. math:: \widehat{\mathrm{MMD}}{}^2 = \frac{1}{n(n-1)} \sum_{i \ne j} k(x_i, x_j)
        + \frac{1}{m(m-1)} \sum_{i \ne j} k(y_i, y_j) - \frac{2}{nm} \sum_{i, j} k(x_i, y_j)

    with :math:`k(x, y) = \exp(-|x - y|^2 / 2 h^2)`. Unbiased, so it can be negative. The standard error is that of the first
    order, which vanishes where the distributions agree: there the p-value decides, (1 + #{permuted >= found}) / (1 + B),
    which holds for any sample size.

    Shapes: x ``(n, *event)``, y ``(m, *event)``, at most 5000 each (all pairs are in memory).

    Args:
        x: A sample.
        y: Another.
        bandwidth: h, in the units of the data; the median distance between pooled points if None.
        permutations: B; 0 for no p-value.
        seed: Keys them.
        progress: Whether to show a bar on what takes more than two seconds.

    References:
        Gretton et al. (2012), A kernel two-sample test, JMLR 13, eq. 3 and section 3.4 (the median heuristic).

    Example:
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> found = mmd(x, x + 3.0)
        >>> found.value > 0.5, round(found.p_value, 4)
        (True, 0.001)
    """
    both, n = _pooled(x, y)
    check_positive("bandwidth", bandwidth, allow_none=True, integer=False)
    distance = torch.cdist(both, both)
    scale = bandwidth or float(torch.nn.functional.pdist(both).median())
    if scale <= 0:
        raise ValueError("more than half of all distances are zero, so the median is no bandwidth; give `bandwidth`")
    kernel = (-0.5 * (distance / scale).square()).exp().fill_diagonal_(0.0)
    groups = _groups(n, len(both), permutations, seed)
    found = torch.cat([_mmd_of(kernel, part) for part in _shown(groups, 250, "mmd", progress)])
    cross = kernel[:n, n:]
    h_x = kernel[:n, :n].sum(1) / max(n - 1, 1) - cross.mean(1)
    h_y = kernel[n:, n:].sum(1) / max(len(both) - n - 1, 1) - cross.mean(0)
    error = 2 * math.hypot(_error(h_x), _error(h_y))
    return Divergence("MMD²", float(found[0]), error, f"(h = {scale:.4g})", "exact", _p_value(found), (n, len(both) - n))


def _mmd_of(kernel: Tensor, groups: Tensor) -> Tensor:
    """The statistic for each column of ``groups`` ``(N, B)``: one for x, zero for y. The kernel's diagonal is zero."""
    n = groups[:, 0].sum()
    m = len(groups) - n
    inside = (groups * (kernel @ groups)).sum(0)
    with_all = groups.T @ kernel.sum(1)
    across = with_all - inside
    outside = kernel.sum() - with_all - across
    return inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)


def sliced_wasserstein(
    x: Any,
    y: Any,
    *,
    num_projections: int = 100,
    permutations: int = 200,
    resamples: int = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> Divergence:
    r"""The mean 1-Wasserstein distance of two samples over random directions, with a permutation test.

    .. math:: \mathrm{SW}_1 = \mathbb{E}_{\theta}\!\int |F_{\theta^\top x}(t) - F_{\theta^\top y}(t)| \,\mathrm{d}t,
        \qquad |\theta| = 1

    In one dimension it is the 1-Wasserstein distance itself. Two samples of one distribution have a positive distance, of the
    order :math:`1/\sqrt n`: the p-value, not the distance, says whether they differ. The standard error is a bootstrap's over
    the data, at fixed directions.

    Shapes: x ``(n, *event)``, y ``(m, *event)``.

    Args:
        x: A sample.
        y: Another.
        num_projections: Directions.
        permutations: For the p-value; 0 for none.
        resamples: Bootstrap samples for the standard error.
        seed: Keys directions, permutations and resamples.
        progress: Whether to show a bar on what takes more than two seconds.

    References:
        Bonneel et al. (2015), Sliced and Radon Wasserstein barycenters of measures, doi:10.1007/s10851-014-0506-3.

    Example:
        >>> x = torch.linspace(0, 1, 50)[:, None]
        >>> round(sliced_wasserstein(x, x + 3.0).value, 4)
        3.0
    """
    both, n = _pooled(x, y, most=None)
    check_positive("num_projections", num_projections)
    seed = as_seed(seed)
    generator = torch.Generator().manual_seed(key(seed, "directions"))
    theta = torch.randn(both.shape[1], num_projections if both.shape[1] > 1 else 1, generator=generator, dtype=both.dtype)
    values, order = (both @ (theta / theta.norm(dim=0)).to(both.device)).sort(0)
    gaps = values.diff(dim=0)

    def distances(weights: Tensor) -> Tensor:
        """Of signed weights ``(N, B)`` that add up to zero."""
        return torch.stack([(w[order].cumsum(0)[:-1].abs() * gaps).sum(0).mean() for w in weights.T])

    return _tested("sliced W1", distances, both, n, permutations, resamples, seed, progress)


def wasserstein(
    x: Any, y: Any, *, permutations: int = 100, resamples: int = 50, seed: Seed = 0, progress: bool = True
) -> Divergence:
    r"""The 1-Wasserstein distance between two samples, exactly: the least mean distance that turns one into the other.

    .. math:: W_1 = \min_{\pi \in \Pi} \sum_{ij} \pi_{ij} |x_i - y_j|

    In one dimension by the quantile functions; in more by an assignment, which needs samples of one size and takes
    :math:`n^3`: keep n below about 500. The distance between two samples of one distribution falls only like
    :math:`n^{-1/D}`; use ``sliced_wasserstein`` or ``mmd`` in many dimensions.

    Shapes: x ``(n, *event)``, y ``(m, *event)``.

    Args:
        x: A sample.
        y: Another.
        permutations: For the p-value; 0 for none.
        resamples: Bootstrap samples for the standard error.
        seed: Keys permutations and resamples.
        progress: Whether to show a bar on what takes more than two seconds.

    Raises:
        ValueError: In more than one dimension, if the samples' sizes differ.

    References:
        Villani (2009), Optimal Transport: Old and New, definition 6.1.

    Example:
        >>> round(wasserstein(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 2.0]])).value, 4)
        2.0
    """
    both, n = _pooled(x, y, most=None)
    if both.shape[1] == 1:
        found = sliced_wasserstein(
            both[:n], both[n:], permutations=permutations, resamples=resamples, seed=seed, progress=progress
        )
        return Divergence("W1", found.value, found.std_error, found.unit, "exact", found.p_value, found.num_samples)
    if len(both) != 2 * n:
        raise ValueError(
            f"in {both.shape[1]} dimensions `x` and `y` should have one size for an exact assignment, got {n} and "
            f"{len(both) - n}; leave some out, or use sliced_wasserstein"
        )
    cost = torch.cdist(both, both).cpu().numpy()

    def distances(weights: Tensor) -> Tensor:
        from scipy.optimize import linear_sum_assignment

        found = []
        for w in (weights * n).round().long().T:
            rows = torch.arange(len(w)).repeat_interleave(w.clamp(min=0)).numpy()
            columns = torch.arange(len(w)).repeat_interleave((-w).clamp(min=0)).numpy()
            part = cost[rows[:, None], columns[None]]
            found.append(part[linear_sum_assignment(part)].mean())
        return torch.tensor(found)

    return _tested("W1", distances, both, n, permutations, resamples, as_seed(seed), progress)


def _tested(
    name: str,
    distances: Callable[[Tensor], Tensor],
    both: Tensor,
    n: int,
    permutations: int,
    resamples: int,
    seed: int,
    progress: bool,
) -> Divergence:
    """A distance that is a function of signed weights, with a permutation p-value and a bootstrap standard error."""
    check_positive("resamples", resamples)
    m = len(both) - n
    groups = _groups(n, len(both), permutations, seed)
    signed = groups / n - (1 - groups) / m
    generator = torch.Generator().manual_seed(key(seed, "bootstrap"))
    counts = [_resampled(size, resamples, generator) / size for size in (n, m)]
    weights = torch.cat([signed, torch.cat([counts[0], -counts[1]]).to(signed)], 1)
    found = torch.cat([distances(part.to(both.device)).cpu() for part in _shown(weights, 10, name, progress)])
    split = signed.shape[1]
    error = float(found[split:].std()) if resamples > 1 else math.nan
    return Divergence(name, float(found[0]), error, "units of the data", "exact", _p_value(found[:split]), (n, m))


def _resampled(size: int, resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of ``size`` data is drawn, ``(size, resamples)``."""
    rows = torch.randint(size, (size, resamples), generator=generator)
    return torch.zeros(size, resamples, dtype=torch.float64).scatter_add_(0, rows, torch.ones(rows.shape, dtype=torch.float64))


def _pooled(x: Any, y: Any, most: int | None = _MOST_POINTS) -> tuple[Tensor, int]:
    """Both samples as rows of one float64 matrix, less the mean of all, and how many are the first's."""
    samples = []
    for name, value in (("x", x), ("y", y)):
        array = as_batch(value, name=name)
        if not isinstance(array, Tensor) or array.dim() < 1 or len(array) < 2:
            raise ValueError(f"`{name}` should be a sample of two points or more, shape (n, *event), got {_kind(array)}")
        check_finite(array, name)
        if most is not None and len(array) > most:
            raise ValueError(f"`{name}` has {len(array)} points; all pairs are looked at, of at most {most}: give some of them")
        samples.append(array)
    if samples[0].shape[1:] != samples[1].shape[1:]:
        shapes = " and ".join(str(tuple(s.shape[1:])) for s in samples)
        raise ValueError(f"`x` and `y` should be of one event shape, got {shapes}")
    rows = [s.double().reshape(len(s), -1) for s in samples]
    both = torch.cat([rows[0], rows[1].to(rows[0].device)])
    return both - both.mean(0), len(rows[0])


def _kind(array: Any) -> str:
    return f"shape {tuple(array.shape)}" if isinstance(array, Tensor) else f"a {type(array).__name__}"


def _groups(n: int, total: int, permutations: int, seed: Seed) -> Tensor:
    """Which points are of the first sample, ``(total, 1 + permutations)``: as they are, and permuted."""
    if permutations < 0:
        raise ValueError(f"`permutations` should be 0 (no p-value) or more, got {permutations}")
    generator = torch.Generator().manual_seed(key(as_seed(seed), "permutations"))
    first = torch.arange(total) < n
    columns = [first, *(first[torch.randperm(total, generator=generator)] for _ in range(permutations))]
    return torch.stack(columns, 1).double()


def _shown(columns: Tensor, size: int, words: str, progress: bool) -> Any:
    """Some columns at a time, under a bar."""
    parts = columns.split(size, 1)
    with Progress(len(parts), progress, QUIET_SECONDS) as bar:
        for done, part in enumerate(parts):
            bar.at(done, words)
            yield part


def _p_value(found: Tensor) -> float | None:
    """Of the first among all, ties against it."""
    if len(found) == 1:
        return None
    slack = 1e-12 * float(found.abs().max())
    return float((found >= found[0] - slack).double().mean())
