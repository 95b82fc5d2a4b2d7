r"""Measures of samples, each with an error bar: neighbourhoods, memorisation, modes, Parzen windows.

A sample is an array ``(n, *event)``; distances are Euclidean between its rows as they are given, so give features
(``evaluation.features``) where pixels mean little. Errors are those of half-samples: a number is measured again on random
halves of all samples, which makes no data equal, as a bootstrap would, where neighbours matter.

.. math:: \widehat{\operatorname{sd}} = \operatorname{sd}_b(\theta_b), \qquad
    \widehat{\operatorname{bias}} = \bar\theta_b - \theta

A half has twice the variance of the whole, and shares half of it with the whole; it has twice the bias of order 1/n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import Score, Seed, as_seed, check_positive
from ..data.arrays import as_batch, check_finite
from ..data.batches import key

__all__ = [
    "Finding",
    "frechet",
    "half_samples",
    "memorisation",
    "mode_coverage",
    "neighbourhoods",
    "parzen_estimate",
    "same_sample",
    "some",
]

MOST = 5000
"""Rows of a sample that are looked at, where all pairs are."""
RESAMPLES = 25
"""Half-samples behind an error."""
_ROWS, _PAIRS = 1024, 10_000_000
"""Rows, and distances, that are held at a time."""


@dataclass(frozen=True, repr=False)
class Finding:
    """One number about samples.

    Attributes:
        name: Which.
        value: The number.
        std_error: Its standard error over the samples; NaN where it is not known.
        num_samples: Rows behind it: generated, and real.
        p_value: Of the hypothesis that says nothing is wrong, where there is a test; ``note`` says which.
        chance: Where it lies in 95 of 100 cases if that hypothesis is true; None without a test.
        bias: What the size of the samples adds to it, if that was estimated: ``value`` is not corrected.
        note: What else a reader should know.
    """

    name: str
    value: float
    std_error: float
    num_samples: tuple[int, int]
    p_value: float | None = None
    chance: tuple[float, float] | None = None
    bias: float | None = None
    note: str = ""

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        p_value = "" if self.p_value is None else f", p = {self.p_value:.2g}"
        chance = "" if self.chance is None else f", by chance {number(self.chance[0])} to {number(self.chance[1])}"
        bias = "" if self.bias is None else f", of which {number(self.bias)} by the sample size"
        samples = " and ".join(map(str, self.num_samples))
        return f"{self.name} {with_error(self.value, self.std_error)}{chance}{p_value}{bias} ({samples} samples)"


def with_error(value: float, error: float) -> str:
    """A value to the second digit of its error, which what is infinite has not.

    Example:
        >>> with_error(22.4321, 2.654), with_error(0.00189, 0.000498), with_error(10.0, 0.0), with_error(math.inf, math.nan)
        ('22.4 ± 2.7', '0.00189 ± 0.00050', '10 ± 0', 'inf')
    """
    if math.isinf(value):
        return number(value)
    if not (math.isfinite(value) and math.isfinite(error)) or error <= 0:
        return f"{number(value)} ± {number(error)}"
    digits = min(max(1 - math.floor(math.log10(error)), 0), 9)
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def number(value: float) -> str:
    """Three significant digits, and no fewer before the point.

    Example:
        >>> number(0.9312), number(12345.6), number(float("nan"))
        ('0.931', '12346', 'nan')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}" if 0.0995 <= abs(value) < 10 else f"{value:.3g}"


# --- what comes in ---------------------------------------------------------------------------------------------------------


def same_sample(least: int = 2, **samples: Any) -> list[Tensor]:
    """Samples by name, checked: finite, of one event shape, of ``least`` rows or more; each as a float64 matrix ``(n, D)``.

    Raises:
        ValueError: In one line that names the sample.
    """
    rows: list[Tensor] = []
    first, shape = "", torch.Size()
    for name, value in samples.items():
        array = as_batch(value, name=name)
        if not isinstance(array, Tensor):
            raise ValueError(
                f"`{name}` should be one array (n, *event), got a {type(array).__name__}; measure one site at a time"
            )
        if len(array) < least:
            raise ValueError(f"`{name}` has {len(array)} row{'s' * (len(array) > 1)}, which is too few: give {least} or more")
        if rows and array.shape[1:] != shape:
            raise ValueError(
                f"`{name}` should have the event shape of `{first}`, {tuple(shape)}, got {tuple(array.shape[1:])}; reshape one"
            )
        check_finite(array, name)
        first, shape = first or name, array.shape[1:] if not rows else shape
        rows.append(array.detach().double().reshape(len(array), -1))
    return [part.to(rows[0].device) for part in rows]


def some(x: Tensor, most: int, seed: int) -> Tensor:
    """All rows, or ``most`` of them drawn without replacement."""
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:most].to(x.device)]


# --- errors ----------------------------------------------------------------------------------------------------------------


def half_samples(
    statistic: Callable[..., Tensor], sizes: Sequence[int], *, resamples: int = RESAMPLES, seed: Seed = 0
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Statistics of several samples, their standard errors and biases, from random halves of every sample.

    Args:
        statistic: From the rows of each sample that are kept (int64) to numbers ``(S,)``.
        sizes: Rows of each sample, 4 or more.
        resamples: Halves; the error itself is known to :math:`1/\sqrt{2B}`.
        seed: Keys them.

    Returns:
        Values with all rows, standard errors, and estimated biases of the order 1/n, ``(S,)`` each.

    References:
        Politis and Romano (1994), doi:10.1214/aos/1176325770, with halves as the subsamples, drawn without replacement.

    Example:
        >>> x = torch.arange(40.0)
        >>> value, error, bias = half_samples(lambda rows: x[rows].mean()[None], [40], resamples=400)
        >>> round(float(value), 3), abs(float(error) - 1.85) < 0.25  # sd / sqrt(40)
        (19.5, True)
    """
    generator = torch.Generator().manual_seed(key(as_seed(seed), "halves"))
    value = statistic(*(torch.arange(size) for size in sizes)).double()
    halves = torch.stack(
        [statistic(*(torch.randperm(n, generator=generator)[: n // 2] for n in sizes)).double() for _ in range(resamples)]
    )
    return value, halves.std(0), halves.mean(0) - value


# --- the distance of two Gaussians -----------------------------------------------------------------------------------------


def frechet(generated: Any, real: Any, *, resamples: int = RESAMPLES, seed: Seed = 0) -> Finding:
    r"""The squared Frechet distance of two samples seen as Gaussians, in the space in which they are given.

    .. math:: |\mu_1 - \mu_2|^2 + \operatorname{tr}\bigl(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2}\bigr)

    It sees means and covariances alone. Of two samples of one law it is positive, of the order :math:`D^2 / n`: ``bias``
    estimates how much of the value the sizes add, and distances compare at equal sizes only. Squared units of the features.
    Published figures called FID are in the features of one Inception network: bring that network to compare with them.

    Shapes: generated ``(n, *event)``, real ``(m, *event)``.

    References:
        Dowson and Landau (1982), doi:10.1016/0047-259X(82)90077-X, eq. 16; Heusel et al. (2017), arXiv:1706.08500, eq. 6;
        Chong and Forsyth (2020), arXiv:1911.07023, for the bias.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
        >>> round(frechet(x, 3 * x + 2).value, 4)  # 2^2 + (sd 1.1547 less sd 3.4641)^2 = 4 + 5.3333
        9.3333
    """
    x, y = same_sample(4, generated=generated, real=real)
    value, error, bias = half_samples(lambda i, j: _frechet(x[i], y[j])[None], (len(x), len(y)), resamples=resamples, seed=seed)
    return Finding("Frechet distance", float(value), float(error), (len(x), len(y)), bias=float(bias))


def _frechet(x: Tensor, y: Tensor) -> Tensor:
    """Through the singular values of :math:`Y^T X`: tr sqrt(S1 S2) is their sum, whatever the rank."""
    gap = (x.mean(0) - y.mean(0)).square().sum()
    x, y = ((part - part.mean(0)) / math.sqrt(max(len(part) - 1, 1)) for part in (x, y))
    roots = [_root(part) for part in (x, y)]
    cross = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    return (gap + x.square().sum() + y.square().sum() - 2 * cross).clamp(min=0)


def _root(x: Tensor) -> Tensor:
    """A square root R of x^T x, R R^T, without squaring the condition number."""
    return torch.linalg.qr(x, mode="r").R.T


# --- neighbourhoods --------------------------------------------------------------------------------------------------------


def neighbourhoods(generated: Any, real: Any, *, k: int = 5, resamples: int = RESAMPLES, seed: Seed = 0) -> dict[str, Finding]:
    r"""Precision, recall, density and coverage: how the samples lie in balls that reach each datum's k-th neighbour.

    With :math:`B_i` the ball around the real :math:`x_i` that reaches its k-th nearest real neighbour, :math:`B'_j` the same
    of the generated :math:`y_j`:

    - *precision*: the share of the :math:`y_j` in any :math:`B_i`; *recall*: the share of the :math:`x_i` in any :math:`B'_j`;
    - *density*: :math:`\frac{1}{k m} \sum_j \sum_i 1[y_j \in B_i]`, 1 on average where the laws agree, and not bounded by 1;
    - *coverage*: the share of the :math:`B_i` that hold any :math:`y_j`. Where the laws and sizes agree its mean is
      :math:`1 - \prod_{l=1}^{k} \frac{n - l}{2n - l} \approx 1 - 2^{-k}`.

    One outlier among the real has a large ball, which raises precision; density and coverage suffer less. All four fall in many
    dimensions: hold them against the same measure of held-out real data. More than 5000 rows of a sample are thinned to 5000.

    Shapes: generated ``(m, *event)``, real ``(n, *event)``.

    Args:
        generated: Samples of a model.
        real: Data that it was not fitted to.
        k: Neighbours.
        resamples: Half-samples behind the errors.
        seed: Keys the thinning and the halves.

    References:
        Kynkaanniemi et al. (2019), arXiv:1904.06991, eq. 1 and 2; Naeem et al. (2020), arXiv:2002.09797, eq. 3 to 7.

    Example:
        >>> x = torch.arange(30.0)[:, None]
        >>> found = neighbourhoods(torch.full((30, 1), 2.2), x, k=1)
        >>> {name: round(f.value, 3) for name, f in found.items()}  # in the balls of 2 and 3, of reach 1
        {'precision': 1.0, 'recall': 0.0, 'density': 2.0, 'coverage': 0.067}
    """
    check_positive("k", k)
    y, x = (some(part, MOST, as_seed(seed)) for part in same_sample(2 * k + 4, generated=generated, real=real))
    inner_y, inner_x, across = torch.cdist(y, y), torch.cdist(x, x), torch.cdist(x, y)

    def statistic(i: Tensor, j: Tensor) -> Tensor:
        reach_x, reach_y = _reach(inner_x[i][:, i], k), _reach(inner_y[j][:, j], k)
        between = across[i][:, j]
        inside = between <= reach_x[:, None]
        precision, coverage = inside.any(0).double().mean(), inside.any(1).double().mean()
        recall = (between <= reach_y).any(1).double().mean()
        return torch.stack([precision, recall, inside.double().sum() / (k * len(j)), coverage])

    value, error, _ = half_samples(statistic, (len(x), len(y)), resamples=resamples, seed=seed)
    for place, n in ((0, len(y)), (1, len(x)), (3, len(x))):  # no share is known better than 0 of n, after Agresti and Coull
        error[place] = error[place].clamp(min=math.sqrt(2) / (n + 4))
    names = ("precision", "recall", "density", "coverage")
    return {
        name: Finding(name, float(v), float(e), (len(y), len(x)), note=f"k = {k}") for name, v, e in zip(names, value, error)
    }


def _reach(distance: Tensor, k: int) -> Tensor:
    """The distance from each row to its k-th neighbour, itself left out."""
    return distance.kthvalue(min(k + 1, len(distance)), dim=1).values


# --- memorisation ----------------------------------------------------------------------------------------------------------


def memorisation(
    generated: Any, train: Any, held_out: Any, *, permutations: int = 2000, resamples: int = RESAMPLES, seed: Seed = 0
) -> dict[str, Finding]:
    r"""Whether samples lie nearer to the training data than to data of the same law that the model never saw.

    - *nearest in train*: the share of the samples whose nearest neighbour, among training and held-out data together, is a
      training datum. If the model knows its training data no better than others, training and held-out data can be
      exchanged, and the share is :math:`n / (n + m)` on average: the p-value is that of a permutation of who was in training,
      one-sided, and holds for any sizes.
    - *distance ratio*: the mean distance to the nearest training datum over that to the nearest held-out one, at equal
      numbers of both, so that some training data stand for all. 1 for a model that generalises, near 0 for one that copies.

    Both need held-out data of the law of the training data: where these differ (other people, other years), every model is
    nearer to its training data.

    Args:
        generated: Samples, ``(N, *event)``.
        train: What the model was fitted to, ``(n, *event)``.
        held_out: What it was not, ``(m, *event)``.
        permutations: For the p-value.
        resamples: Half-samples behind the errors.
        seed: Keys the permutations, half-samples, and which training data stand for all in the ratio.

    References:
        Meehan, Chaudhuri, Dasgupta (2020), A non-parametric test to detect data-copying in generative models, arXiv:2004.05675,
        section 2, for the question; the test here permutes train and held-out data instead of comparing their distances.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> train, held_out = torch.randn(2, 200, 3, generator=g)
        >>> found = memorisation(train[:100], train, held_out)
        >>> found["distance ratio"].value, found["nearest in train"].value, found["nearest in train"].p_value < 0.001
        (0.0, 1.0, True)
    """
    check_positive("permutations", permutations)
    y, x, h = same_sample(4, generated=generated, train=train, held_out=held_out)
    seed = as_seed(seed)
    votes, pool = _votes(y, torch.cat([x, h])), len(x) + len(h)
    generator = torch.Generator().manual_seed(key(seed, "memorisation"))
    permuted = torch.stack([votes[torch.randperm(pool, generator=generator)[: len(x)]].sum() for _ in range(permutations)])
    share = float(votes[: len(x)].sum())
    p_value = (1 + int((permuted >= share - 1e-9).sum())) / (1 + permutations)
    low, high = permuted.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    sizes = (len(y), pool)
    nearest = Finding("nearest in train", share, float(permuted.std()), sizes, p_value, (low, high), note="train and held-out")
    return {"nearest in train": nearest, "distance ratio": _ratio(y, x, h, resamples, seed)}


def _votes(y: Tensor, pool: Tensor) -> Tensor:
    """For each of the pool the share of y whose nearest it is; ties are shared."""
    votes = torch.zeros(len(pool), dtype=torch.float64)
    for part in y.split(max(_PAIRS // len(pool), 1)):
        distance = torch.cdist(part, pool)
        least = distance.min(1, keepdim=True).values
        tied = (distance <= least * (1 + 1e-9) + 1e-7 * float(pool.abs().max())).double()
        votes += (tied / tied.sum(1, keepdim=True)).sum(0).cpu() / len(y)
    return votes


def _ratio(y: Tensor, x: Tensor, h: Tensor, resamples: int, seed: int) -> Finding:
    """Of mean distances, at equal numbers."""
    most = min(len(x), len(h), MOST)
    y, x, h = some(y, MOST, key(seed, "ratio", 0)), some(x, most, key(seed, "ratio", 1)), some(h, most, key(seed, "ratio", 2))
    to_x, to_h = torch.cdist(y, x), torch.cdist(y, h)
    nothing = 1e-7 * float(x.abs().max())  # what is left of the distance between equal rows

    def statistic(i: Tensor, j: Tensor, l: Tensor) -> Tensor:
        nearest = (to[i][:, rows].min(1).values for to, rows in ((to_x, j), (to_h, l)))
        near, far = (d.where(d > nothing, 0.0).mean() for d in nearest)
        return torch.where(far > 0, near / far, torch.where(near > 0, math.inf, 1.0))[None]

    value, error, _ = half_samples(statistic, (len(y), len(x), len(h)), resamples=resamples, seed=seed)
    return Finding("distance ratio", float(value), float(error), (len(y), most), note="to train over to held-out")


# --- modes -----------------------------------------------------------------------------------------------------------------


def mode_coverage(
    generated: Any, modes: Any, sd: float | None = None, *, within: float = 3.0, resamples: int = 200, seed: Seed = 0
) -> dict[str, Finding]:
    r"""Which of the known modes samples reach, and how evenly.

    - *modes*: how many have a good sample, one within ``within`` standard deviations of the nearest mode;
    - *good share*: the share of such samples. Under the target itself it is :math:`1 - e^{-w^2/2}` in the plane, 0.989 at
      w = 3: a share of 1 means modes that are too narrow;
    - *reverse KL*: :math:`\sum_k \hat p_k \log(\hat p_k K)` of the modes' shares :math:`\hat p` among good samples against
      equal ones, in nats. With n good samples it is about :math:`(K - 1) / 2n` for a perfect model, which ``bias`` gives.

    Args:
        generated: Samples, ``(n, D)``.
        modes: A target of ``pgen.data.toy`` that is a mixture of Gaussians, or the means, ``(K, D)``.
        sd: Standard deviation of every mode in every direction; the target's own if None.
        within: Standard deviations.
        resamples: Bootstrap samples behind the standard errors.
        seed: Keys them.

    References:
        Lin, Khetan, Fanti, Oh (2018), PacGAN, arXiv:1712.04086, section 4.1, 2500 samples. As in its published programs, the
        histogram is that of the good samples.

    Example:
        >>> grid = __import__("pgen").data.toy.gaussian_grid()
        >>> found = mode_coverage(grid.sample(2500, seed=0), grid)
        >>> found["modes"].value, round(found["good share"].value, 2), round(found["reverse KL"].bias, 4)
        (25.0, 0.99, 0.0049)
    """
    means, sd = _modes(modes, sd)
    (x,) = same_sample(1, generated=generated)
    if x.shape[1] != means.shape[1]:
        raise ValueError(f"`generated` has {x.shape[1]} numbers a row, the modes {means.shape[1]}; give samples of that target")
    check_positive("within", within, integer=False)
    check_positive("resamples", resamples)
    distance, mode = torch.cat([torch.stack(torch.cdist(part, means.to(part)).min(1)) for part in x.split(_ROWS)], 1)
    good = distance <= within * sd
    cell = torch.where(good, mode.long(), len(means)).cpu()
    return _mode_findings(cell, len(means), f"within {within:g} sd of a mode", resamples, as_seed(seed), "good share")


def label_coverage(predicted: Tensor, shares: Tensor, *, resamples: int = 200, seed: Seed = 0) -> dict[str, Finding]:
    """The same of classes that a classifier finds in samples, against the classes' shares ``(K,)`` in the data."""
    return _mode_findings(predicted.cpu(), len(shares), "classes by the classifier", resamples, as_seed(seed), "", shares)


def _modes(modes: Any, sd: float | None) -> tuple[Tensor, float]:
    if hasattr(modes, "means") and hasattr(modes, "noise"):
        modes, sd = modes.means, modes.noise if sd is None else sd
    elif hasattr(modes, "log_prob"):
        raise ValueError("`modes` is a target without separate modes; take gaussian_grid, gaussian_ring or eight_gaussians")
    if sd is None:
        raise ValueError("`sd` is missing: the standard deviation of a mode, which tells good samples from others")
    check_positive("sd", sd, integer=False)
    (means,) = same_sample(1, modes=modes)
    return means, float(sd)


def _mode_findings(
    cell: Tensor, number_of_modes: int, note: str, resamples: int, seed: int, good: str, shares: Tensor | None = None
) -> dict[str, Finding]:
    """From the mode of each sample (K for none) to findings, their errors by a bootstrap of the counts."""
    n = len(cell)
    counts = torch.bincount(cell, minlength=number_of_modes + 1).double()
    generator = torch.Generator().manual_seed(key(seed, "modes"))
    drawn = torch.multinomial(counts, n * resamples, replacement=True, generator=generator).reshape(resamples, n)
    again = torch.stack([torch.bincount(row, minlength=number_of_modes + 1) for row in drawn]).double()
    log_share = (torch.full((number_of_modes,), 1 / number_of_modes) if shares is None else shares).double().log()

    def statistics(c: Tensor) -> Tensor:
        inside = c[..., :-1]
        p = inside / inside.sum(-1, keepdim=True).clamp(min=1)
        divergence = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_share), 0.0).sum(-1)
        divergence = divergence.where(inside.sum(-1) > 0, math.inf)
        return torch.stack([(inside > 0).double().sum(-1), inside.sum(-1) / n, divergence], -1)

    value, spread = statistics(counts).tolist(), statistics(again)
    finite = torch.isfinite(spread[:, 2])  # no good sample, no divergence
    error = [*spread[:, :2].std(0).tolist(), float(spread[finite, 2].std()) if int(finite.sum()) > 1 else math.nan]
    without = resamples - int(finite.sum())
    found = {
        "modes": Finding("modes", value[0], error[0], (n, 0), note=f"of {number_of_modes}, {note}"),
        "good share": Finding(good, value[1], error[1], (n, 0), note=note),
        "reverse KL": Finding(
            "reverse KL",
            value[2],
            error[2],
            (n, 0),
            bias=(number_of_modes - 1) / max(2 * value[1] * n, 1),
            note="nats, of modes"
            + (f"; error without the {without} of {resamples} resamples that reach none" if without else ""),
        ),
    }
    return found if good else {name: f for name, f in found.items() if name != "good share"}


# --- Parzen windows --------------------------------------------------------------------------------------------------------

_BANDWIDTHS = 20


def parzen_estimate(generated: Any, x: Any, *, validation: Any = None, bandwidth: float | None = None) -> Score:
    r"""A Parzen window through a model's samples, scored at x: offered under its own name, and not to be trusted.

    .. math:: \hat p(x) = \frac{1}{n} \sum_i \mathcal{N}(x; y_i, h^2 I)

    It is the density of the *windows*, not of the model, and says little about either likelihood or samples: centres of k-means
    score above real held-out data as "samples" of the same number, since the middle of a cluster is near to more data than a
    datum is. ``examples`` and ``benchmarks/samples.py`` show it. Use it to reproduce published figures, never to rank.

    Shapes: generated ``(n, *event)``, x ``(N, *event)``.

    Args:
        generated: The centres: samples of a model.
        x: What to score.
        validation: Data on which the bandwidth is chosen by their mean log-density; needed without ``bandwidth``.
        bandwidth: h, in the units of the data.

    Returns:
        A Score of kind ``estimate``, in nats.

    References:
        Breuleux, Bengio, Vincent (2011), doi:10.1162/NECO_a_00143; Theis, van den Oord, Bethge (2016), A note on the
        evaluation of generative models, arXiv:1511.01844, section 3.3, for why not.

    Example:
        >>> print(parzen_estimate(torch.zeros(3, 1), torch.zeros(2, 1), bandwidth=1.0))  # -log sqrt(2 pi)
        -0.92 ± 0.00 nats a datum (estimate), 1.326 bits/dim, 2 data
    """
    centres, points = same_sample(1, generated=generated, x=x)
    check_positive("bandwidth", bandwidth, allow_none=True, integer=False)
    if bandwidth is None:
        if validation is None:
            raise ValueError("give `validation`, data to choose the bandwidth by, or a `bandwidth` of your own")
        _, held = same_sample(1, generated=generated, validation=validation)
        bandwidth = _bandwidth(centres, held)
    value = _parzen(centres, points, torch.tensor([bandwidth], dtype=torch.float64))[0]
    return Score(value.cpu(), "estimate", points.shape[1], None, None, "density")


def _bandwidth(centres: Tensor, held: Tensor) -> float:
    """The best of 20 between the smallest useful and the largest scale, in equal ratios; refined twice around the best."""
    scale = float(torch.cat([centres, held]).std(0).square().mean().sqrt())
    if scale <= 0:
        raise ValueError("all of `generated` and `validation` is one point, so no bandwidth is best; give `bandwidth`")
    low, high = math.log(1e-3 * scale), math.log(3 * scale)
    for _ in range(3):
        grid = torch.linspace(low, high, _BANDWIDTHS, dtype=torch.float64)
        best = int(_parzen(centres, held, grid.exp()).mean(1).argmax())
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _BANDWIDTHS - 1)])
    return math.exp((low + high) / 2)


def _parzen(centres: Tensor, x: Tensor, bandwidths: Tensor) -> Tensor:
    """Log-densities at x for each bandwidth, ``(H, N)``."""
    found = []
    for part in x.split(256):
        square = torch.cdist(part, centres).square()
        found.append(torch.stack([torch.logsumexp(-0.5 * square / h**2, 1) for h in bandwidths.to(x.device)]))
    constant = math.log(len(centres)) + centres.shape[1] * (bandwidths.log() + 0.5 * math.log(2 * math.pi))
    return torch.cat(found, 1) - constant[:, None].to(x.device)
