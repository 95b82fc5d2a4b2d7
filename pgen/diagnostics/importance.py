r"""Pareto-smoothed importance sampling (PSIS) of a guide's draws.

The log-weights :math:`\log w_s = \log p(x, z_s) - \log q(z_s \mid x)` say two different things, and both are reported:
whether importance sampling can repair q (the tail shape :math:`\hat k`), and how far raw q then turns out to be from the
posterior (:func:`posterior_error`). A guide may be far off and easily repaired: q = N(1, 1) for p = N(0, 1) is wrong by a
whole posterior sd and has :math:`\hat k \approx 0.2`.

References:
    Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72), arXiv:1507.02646.
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work?, arXiv:1802.02538.
    Zhang, Stephens (2009), A new and efficient estimation method for the generalized Pareto distribution,
    Technometrics 51(3).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgen.contracts import Seed, as_seed, check_choice, check_positive

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "good_khat",
    "importance_ess",
    "importance_resample",
    "pareto_khat",
    "posterior_error",
    "psis",
    "psis_expectation",
]

MEASURABLE = ("ok", "bounded", "constant")
"""The values of ``status`` under which importance weights measure the posterior."""

_MIN_TAIL = 5
_CHUNK = 4_000_000  # elements of the largest temporary array in a tail fit
_ERROR_STATISTICS = ("shift", "shift_se", "sd_ratio", "sd_ratio_se", "khat")
_EXPECTATION_STATISTICS = ("mean", "sd", "mcse", "khat", "q05", "median", "q95")


def good_khat(num_draws: int) -> float:
    r"""The largest tail shape that ``num_draws`` draws can work with: :math:`\min(1 - 1/\log_{10} S, 0.7)`.

    Source: Vehtari et al. (2024), arXiv:1507.02646, section 3.

    Example:
        >>> round(good_khat(1000), 3), good_khat(100_000)
        (0.667, 0.7)
    """
    return min(1.0 - 1.0 / math.log10(max(num_draws, 2)), 0.7)


def psis(log_weight: Any, *, dim: Sequence[str] = ("chain", "draw"), resolution: float | None = None) -> xr.Dataset:
    r"""Smooth the largest importance weights by a generalised Pareto fit, and judge their tail.

    The :math:`n = \lceil \min(S/5, 3\sqrt S) \rceil` largest ratios are fitted by the method of Zhang and Stephens, with
    the shape drawn towards one half, :math:`\hat k \leftarrow (n \hat k + 5) / (n + 10)`.

    Shapes: ``log_weight`` with dims ``(*dim, ...)``, in nats; everything but ``log_weight_smoothed`` has the dims left over.

    Args:
        log_weight: DataArray of log-weights; or an array ``(S, ...)`` with the draws first. Minus infinity is weight zero.
        dim: The dims of the draws.
        resolution: Range of log-weights, in nats, below which they count as equal (rounding). By default the attribute
            ``resolution`` of ``log_weight``, else 64 machine epsilons times their size.

    Returns:
        Dataset with ``log_weight_smoothed`` (nats, normalised to sum to one), ``khat``, ``khat_se``
        (:math:`(1 + k)/\sqrt n`), ``good_k``, ``min_ss`` (draws needed for this shape), ``ess`` and ``status``:

        * ``constant``: equal weights up to rounding, :math:`\hat k = -\infty`, ``ess`` = S;
        * ``bounded``: :math:`\hat k < 0`; an over-wide q looks like this too, so read ``ess``;
        * ``ok``: below ``good_k``;
        * ``heavy``: not below ``good_k``;
        * ``too_few``: no tail to fit (fewer than 21 draws, or fewer than 5 distinct ones in it);
        * ``non_finite``: a weight is NaN or infinite, or all are zero.

    References:
        Vehtari et al. (2024), arXiv:1507.02646; Zhang and Stephens (2009), Technometrics 51(3).

    Example:
        >>> psis(np.zeros(64)).status.item(), round(psis(np.zeros(64)).ess.item(), 6)
        ('constant', 64.0)
    """
    import xarray as xr

    log_weight = _as_dataarray(log_weight)
    rest = [name for name in log_weight.dims if name not in dim]
    ordered = log_weight.transpose(*rest, *dim)
    sample_shape = tuple(ordered.sizes[name] for name in dim)
    shape = tuple(ordered.sizes[name] for name in rest)
    rows = ordered.to_numpy().astype(np.float64).reshape(-1, math.prod(sample_shape))
    fitted = _psis_rows(rows, _resolution(log_weight, resolution))
    smoothed = xr.DataArray(fitted.pop("log_weight").reshape(shape + sample_shape), dims=ordered.dims)
    columns = {name: (rest, value.reshape(shape)) for name, value in fitted.items()}
    good_k = good_khat(rows.shape[1])
    dataset = xr.Dataset({"log_weight_smoothed": smoothed.transpose(*log_weight.dims), **columns, "good_k": good_k})
    coords = {name: coord for name, coord in log_weight.coords.items()}
    return dataset.assign_coords(coords).assign_attrs(num_draws=rows.shape[1], num_tail=_tail_length(rows.shape[1]))


def pareto_khat(log_weight: Any, *, dim: Sequence[str] = ("chain", "draw")) -> xr.Dataset:
    """The tail shape alone: ``khat``, ``khat_se``, its 95 % interval ``ci_low`` to ``ci_high``, ``good_k``, ``status``.

    Example:
        >>> pareto_khat(np.zeros(100)).khat.item()
        -inf
    """
    fitted = psis(log_weight, dim=dim)
    half = 1.96 * fitted.khat_se
    interval = fitted.assign(ci_low=fitted.khat - half, ci_high=fitted.khat + half)
    return interval[["khat", "khat_se", "ci_low", "ci_high", "good_k", "status"]]


def importance_ess(log_weight: Any, *, dim: Sequence[str] = ("chain", "draw")) -> xr.Dataset:
    r"""Effective number of draws, :math:`1 / \sum_s \tilde w_s^2` after smoothing: ``ess`` and ``ess_fraction`` = ess / S.

    Optimistic when the heavy tail has not been seen yet, hence ``khat`` beside it. Source: Kong (1992); Vehtari et al.
    (2024), arXiv:1507.02646.
    """
    fitted = psis(log_weight, dim=dim)
    return fitted.assign(ess_fraction=fitted.ess / fitted.attrs["num_draws"])[["ess", "ess_fraction", "khat", "status"]]


def psis_expectation(idata: Any, var_names: Sequence[str] | str | None = None) -> xr.Dataset:
    r"""Posterior summaries from guide draws weighted by PSIS.

    Latents of each datum are weighted by that datum's own ratios where no latent is shared between data, otherwise by the
    joint ones. Values are given whatever ``khat`` says: believe them where it is below ``psis_khat_limit``.

    Args:
        idata: DataTree from :func:`pgen.diagnostics.to_datatree` or ``report.idata``.
        var_names: Sites to summarise; all by default.

    Returns:
        Dataset of the sites, dims ``("statistic", *dims)``; ``statistic`` is ``mean``, ``sd``, ``mcse`` (Monte Carlo
        standard error of the mean), ``khat`` (largest tail shape of the weights and of either tail of the weighted
        deviation from the mean), ``q05``, ``median``, ``q95``, in the units of the site.

    References:
        Vehtari et al. (2024), arXiv:1507.02646, section 4 (error of the mean, quantity-specific tail shape).
    """
    return _summarise(idata, var_names, _EXPECTATION_STATISTICS, masked=False)


def posterior_error(idata: Any, var_names: Sequence[str] | str | None = None) -> xr.Dataset:
    r"""How far raw guide summaries are from the posterior, as PSIS measures it.

    .. math:: \text{shift} = (E_q z - \hat\mu) / \widehat{sd}, \qquad \text{sd\_ratio} = sd_q / \widehat{sd}

    Standard errors come from influence functions (the delta method), the same draws serving both sides.

    Returns:
        Dataset of the sites, dims ``("statistic", *dims)``; ``statistic`` is ``shift`` and ``shift_se`` (posterior sds),
        ``sd_ratio`` and ``sd_ratio_se``, ``khat``. NaN where the coordinate ``psis_status`` is not one of ``ok``,
        ``bounded``, ``constant``: there the weights cannot measure it.
    """
    return _summarise(idata, var_names, _ERROR_STATISTICS, masked=True)


def importance_resample(idata: Any, num_samples: int, *, replace: bool = False, seed: Seed = 0) -> xr.DataTree:
    """Draws resampled in proportion to the smoothed weights: plain draws that stand for the posterior.

    Without replacement no draw appears twice, which is slightly biased towards q: keep ``num_samples`` well below the
    effective number of draws. Groups ``posterior`` and ``log_likelihood`` are resampled, others that belong to the
    unweighted draws are dropped. Attributes of the result: ``resampled="psis"``, ``psis_khat`` (the largest).

    Raises:
        ValueError: If weights are missing or cannot be fitted, or fewer draws are there than asked for.
    """
    import xarray as xr

    check_positive("num_samples", num_samples)
    fitted = _weights(idata)
    status = np.unique(fitted.status.to_numpy())
    if "non_finite" in status or "too_few" in status:
        raise ValueError(f"importance weights cannot be fitted (status {', '.join(status)}): draw more, or mend the model")
    if "heavy" in status:
        limit = float(fitted.good_k)
        warnings.warn(f"k-hat {float(fitted.khat.max()):.2f} is not below {limit:.2f}: resampling is unreliable", stacklevel=2)
    index = _resample_index(fitted.log_weight_smoothed, num_samples, replace, np.random.default_rng(as_seed(seed)))
    groups = {name: _take_draws(idata[name].to_dataset(), index) for name in ("posterior", "log_likelihood") if name in idata}
    kept = {name: idata[name].to_dataset() for name in ("observed_data", "svi_history") if name in idata}
    tree = xr.DataTree.from_dict({**groups, **kept})
    tree.attrs = {**idata.attrs, "resampled": "psis", "psis_khat": float(fitted.khat.max())}
    return tree


# ---------------------------------------------------------------------------------------------------- the tail


def _tail_length(num_draws: int) -> int:
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def _as_dataarray(log_weight: Any) -> xr.DataArray:
    import xarray as xr

    if isinstance(log_weight, xr.DataArray):
        return log_weight
    array = np.asarray(log_weight, dtype=np.float64)
    if array.ndim == 0:
        raise ValueError("`log_weight` should have its draws along the first axis, got a number")
    return xr.DataArray(array[None], dims=("chain", "draw", *(f"dim_{i}" for i in range(array.ndim - 1))))


def _resolution(log_weight: xr.DataArray, resolution: float | None) -> float:
    if resolution is None and "resolution" in log_weight.attrs:
        return float(log_weight.attrs["resolution"])
    if resolution is not None:
        return resolution
    values = np.abs(log_weight.to_numpy())
    return 64 * np.finfo(np.float64).eps * max(1.0, values[np.isfinite(values)].max(initial=1.0))


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(width, 1))
    return (slice(start, start + step) for start in range(0, rows, step))


def _psis_rows(log_weight: np.ndarray, resolution: float) -> dict[str, np.ndarray]:
    """PSIS of every row of ``(M, S)``."""
    rows, draws = log_weight.shape
    smoothed, khat, status = np.empty_like(log_weight), np.full(rows, np.nan), np.empty(rows, dtype="<U10")
    for part in _chunks(rows, max(draws, _tail_length(draws) * _grid_length(_tail_length(draws)))):
        smoothed[part], khat[part], status[part] = _smooth(log_weight[part], resolution)
    with np.errstate(divide="ignore", over="ignore"):
        min_ss = np.where(khat < 1, 10.0 ** (1 / (1 - np.clip(khat, 0, 1))), np.where(np.isnan(khat), np.nan, np.inf))
    # The asymptotic error holds for k > -1/2; below, it is kept from vanishing.
    khat_se = np.where(np.isneginf(khat), 0.0, np.maximum(1 + khat, 0.5) / math.sqrt(_tail_length(draws)))
    ess = np.exp(-_logsumexp(2 * smoothed))
    return {"log_weight": smoothed, "khat": khat, "khat_se": khat_se, "min_ss": min_ss, "ess": ess, "status": status}


def _smooth(log_weight: np.ndarray, resolution: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normalised smoothed log-weights, shapes and states of a chunk of rows."""
    draws, n = log_weight.shape[1], _tail_length(log_weight.shape[1])
    top = log_weight.max(axis=1, initial=-np.inf)
    finite = np.isfinite(top) & ~np.isnan(log_weight).any(axis=1)
    lw = np.where(finite[:, None], log_weight, 0.0) - np.where(finite, top, 0.0)[:, None]
    constant = finite & (lw.min(axis=1) >= -resolution)
    lw[constant] = 0.0
    khat = np.where(constant, -np.inf, np.nan)
    fit = np.flatnonzero(finite & ~constant & (n >= _MIN_TAIL))
    if len(fit):
        lw[fit], khat[fit] = _smooth_tail(lw[fit], n, resolution)
    status = np.select(
        [~finite, constant, np.isnan(khat), khat < 0, khat < good_khat(draws)],
        ["non_finite", "constant", "too_few", "bounded", "ok"],
        default="heavy",
    )
    lw = lw - _logsumexp(lw)[:, None]
    lw[~finite] = np.nan
    return lw, khat, status


def _smooth_tail(lw: np.ndarray, n: int, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Replace the n largest of each row (largest = 0) by expected order statistics of the fitted Pareto tail."""
    order = np.argpartition(lw, lw.shape[1] - n - 1, axis=1)[:, -n - 1 :]
    order = np.take_along_axis(order, np.argsort(np.take_along_axis(lw, order, 1), axis=1), 1)
    tail, cutoff = np.take_along_axis(lw, order[:, 1:], 1), np.take_along_axis(lw, order[:, :1], 1)
    with np.errstate(invalid="ignore"):
        above = tail > cutoff + resolution
        # exp(tail) - exp(cutoff) without cancellation; the floor keeps ratios that underflow in order of size
        exceedance = np.where(above, np.maximum(-np.exp(tail) * np.expm1(cutoff - tail), 1e-300), 0.0)
    khat, sigma = _fit_tail(exceedance)
    quantile = (np.arange(1, n + 1) - 0.5) / n
    with np.errstate(all="ignore"):
        k = np.where(np.abs(khat) < 1e-12, 1e-12, khat)[:, None]
        smooth = np.log(np.exp(cutoff) + sigma[:, None] * np.expm1(-k * np.log1p(-quantile)) / k)
    usable = (np.isfinite(khat) & (sigma > 0))[:, None] & ~np.isnan(smooth)
    smoothed = lw.copy()
    np.put_along_axis(smoothed, order[:, 1:], np.where(usable, np.minimum(smooth, 0.0), tail), 1)
    return smoothed, khat


def _fit_tail(exceedance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shape and scale for each row of ascending exceedances ``(M, n)``: -inf where none is positive, NaN where under 5 are."""
    positive = (exceedance > 0).sum(axis=1)
    khat, sigma = np.where(positive == 0, -np.inf, np.nan), np.full(len(exceedance), np.nan)
    fit = positive >= _MIN_TAIL
    if fit.any():
        khat[fit], sigma[fit] = _fit_pareto(exceedance[fit])
    return khat, sigma


def _grid_length(n: int) -> int:
    return 30 + int(math.sqrt(n))


def _fit_pareto(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Generalised Pareto shape k and scale of each row of ascending ``x`` (M, n), by Zhang and Stephens (2009).

    The profile likelihood is averaged over a grid of b = -k / sigma; then k is drawn towards 1/2 with weight 10.
    """
    n, grid = x.shape[1], _grid_length(x.shape[1])
    scale = x[:, -1:]
    x = x / scale
    smallest = np.where(x > 0, x, 1.0).min(axis=1)
    quartile = np.maximum(x[:, int(n / 4 + 0.5) - 1], smallest)[:, None]
    b = 1 + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile)  # (M, grid)
    b[b == 0] = np.finfo(np.float64).eps
    k = np.log1p(-b[:, :, None] * x[:, None, :]).mean(axis=2)
    log_profile = n * (np.log(-b / k) - k - 1)
    weight = np.exp(log_profile - _logsumexp(log_profile)[:, None])
    b = (b * weight).sum(axis=1)
    k = np.log1p(-b[:, None] * x).mean(axis=1)
    return (n * k + 5) / (n + 10), -k / b * scale[:, 0]


def _logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(x - top).sum(axis=1))


# ------------------------------------------------------------------------------------------------- the summaries


def _weights(idata: Any) -> xr.Dataset:
    """PSIS of the weights that a tree carries: each datum's own where defined, else the joint ones."""
    stats = idata["sample_stats"].to_dataset() if "sample_stats" in idata else {}
    for name in ("log_weight_rows", "log_weight"):
        if name in stats:
            return psis(stats[name])
    reason = getattr(stats, "attrs", {}).get("no_weights", "it has no sample_stats/log_weight")
    raise ValueError(f"`idata` has no importance weights: {reason}")


def _names(posterior: xr.Dataset, var_names: Sequence[str] | str | None) -> list[str]:
    names = [str(name) for name in posterior.data_vars]
    if var_names is None:
        return names
    wanted = [var_names] if isinstance(var_names, str) else list(var_names)
    for name in wanted:
        check_choice("var_names", name, names)
    return wanted


def _summarise(idata: Any, var_names: Any, statistics: Sequence[str], *, masked: bool) -> xr.Dataset:
    posterior = idata["posterior"].to_dataset()
    return summarise_with(posterior, _weights(idata), var_names, statistics, masked=masked)


def summarise_with(
    posterior: xr.Dataset, fitted: xr.Dataset, var_names: Any = None, statistics: Sequence[str] = (), *, masked: bool = False
) -> xr.Dataset:
    """The chosen statistics of every site under weights already smoothed; with ``masked``, NaN where not measurable."""
    import xarray as xr

    weight = np.exp(fitted.log_weight_smoothed)
    good = fitted.status.isin(MEASURABLE) if masked else fitted.status != "non_finite"
    unmasked = xr.DataArray(np.isin(statistics, ("khat", "mean_q", "sd_q")), dims="statistic")  # these need no weights
    columns = {}
    for name in _names(posterior, var_names):
        site = posterior[name].transpose("chain", "draw", *weight.dims[2:], ...)
        rest = site.dims[2:]
        values = site.to_numpy().astype(np.float64).reshape(-1, *site.shape[2:])
        w = weight.to_numpy().reshape(len(values), *weight.shape[2:], *(1,) * (values.ndim - weight.ndim + 1))
        found = _column_statistics(values, w, statistics)
        if "khat" in statistics:
            khat = np.reshape(fitted.khat.to_numpy(), w.shape[1:])
            found["khat"] = np.fmax(khat, found["khat"])
        stacked = xr.DataArray(np.stack([found[key] for key in statistics]), dims=("statistic", *rest))
        columns[name] = stacked.where(good | unmasked)
        columns[name] = columns[name].transpose("statistic", *rest)
    coords = {name: coord for name, coord in posterior.coords.items() if name not in ("chain", "draw")}
    dataset = xr.Dataset(columns, coords={**coords, "statistic": list(statistics)})
    return dataset.assign_coords(psis_status=fitted.status).assign_attrs(psis_khat_limit=float(fitted.good_k))


def _column_statistics(values: np.ndarray, weight: np.ndarray, statistics: Sequence[str]) -> dict[str, np.ndarray]:
    """Every statistic that a summary may want, for values ``(S, ...)`` under weights ``(S, ...)`` that broadcast."""
    found = weighted_moments(values, weight)
    if "khat" in statistics:
        found["khat"] = _deviation_khat(values, weight, found["mean"])
    for name, probability in {"q05": 0.05, "median": 0.5, "q95": 0.95}.items():
        if name in statistics:
            found[name] = _weighted_quantile(values, weight, probability)
    return found


def weighted_moments(h: np.ndarray, w: np.ndarray) -> dict[str, np.ndarray]:
    r"""Moments of q and of the posterior from draws ``h`` (S, ...) and normalised weights, and what separates them.

    Standard errors are root sums of squares of influence values: :math:`w_s (h_s - \mu)` for a weighted mean,
    :math:`w_s ((h_s - \mu)^2 / \sigma^2 - 1) / 2` for a weighted log sd, and the same with 1/S for q.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        equal = 1.0 / len(h)
        mean_q = h.mean(axis=0)
        deviation_q = h - mean_q
        var_q = (deviation_q**2).sum(axis=0) / max(len(h) - 1, 1)
        offset = (w * deviation_q).sum(axis=0)
        deviation = deviation_q - offset
        # 1 - sum w^2 undoes the shrinkage of a weighted variance about its own mean
        var = (w * deviation**2).sum(axis=0) / (1 - (w**2).sum(axis=0))
        sd, sd_q = np.sqrt(var), np.sqrt(var_q)
        log_sd_influence = w * (deviation**2 / var - 1) / 2
        ratio_influence = equal * (deviation_q**2 / var_q - 1) / 2 - log_sd_influence
        shift = -offset / sd
        shift_influence = (equal * deviation_q - w * deviation) / sd - shift * log_sd_influence
        ratio = sd_q / sd
    return {
        "mean": mean_q + offset,
        "sd": sd,
        "mcse": _root_sum_square(w * deviation),
        "mean_q": mean_q,
        "sd_q": sd_q,
        "shift": shift,
        "shift_se": _root_sum_square(shift_influence),
        "sd_ratio": ratio,
        "sd_ratio_se": ratio * _root_sum_square(ratio_influence),
    }


def _root_sum_square(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum(axis=0))


def _weighted_quantile(h: np.ndarray, w: np.ndarray, probability: float) -> np.ndarray:
    order = np.argsort(h, axis=0)
    cumulative = np.cumsum(np.take_along_axis(np.broadcast_to(w, h.shape), order, 0), axis=0)
    first = (cumulative < probability).sum(axis=0).clip(max=len(h) - 1)
    return np.take_along_axis(np.take_along_axis(h, order, 0), first[None], 0)[0]


def _deviation_khat(h: np.ndarray, w: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Larger tail shape of either tail of the weighted deviation from the mean; NaN where there is no tail to fit."""
    influence = (w * (h - mean)).reshape(len(h), -1).T  # (P, S)
    draws, n = len(h), _tail_length(len(h))
    khat = np.full(len(influence), np.nan)
    if n < _MIN_TAIL:
        return khat.reshape(mean.shape)
    for part in _chunks(len(influence), max(draws, n * _grid_length(n))):
        for sign in (1.0, -1.0):
            largest = np.sort(np.partition(sign * influence[part], draws - n - 1, axis=1)[:, -n - 1 :], axis=1)
            khat[part] = np.fmax(khat[part], _fit_tail(largest[:, 1:] - largest[:, :1])[0])
    return khat.reshape(mean.shape)


# ------------------------------------------------------------------------------------------------- resampling


def _resample_index(log_weight: xr.DataArray, num: int, replace: bool, rng: np.random.Generator) -> xr.DataArray:
    """Indices of draws, dims ``("draw", *rest)``."""
    import xarray as xr

    rest = log_weight.dims[2:]
    lw = log_weight.to_numpy().reshape(-1, *log_weight.shape[2:])
    if not replace and num > np.isfinite(lw).sum(axis=0).min():
        raise ValueError(f"`num_samples` is {num}, more than the draws at hand; draw more, or pass replace=True")
    if not replace:  # the largest perturbed log-weights are a draw without replacement (Gumbel top-k)
        index = np.argsort(-(lw + rng.gumbel(size=lw.shape)), axis=0)[:num]
    else:
        cumulative = np.cumsum(np.exp(lw), axis=0)
        points = rng.random((num, *lw.shape[1:])) * cumulative[-1]
        columns = zip(cumulative.reshape(len(lw), -1).T, points.reshape(num, -1).T)
        index = np.stack([np.searchsorted(c, p) for c, p in columns], axis=1).reshape(points.shape)
    return xr.DataArray(index, dims=("draw", *rest))


def _take_draws(dataset: xr.Dataset, index: xr.DataArray) -> xr.Dataset:
    taken = {}
    for name, site in dataset.data_vars.items():
        flat = site.stack(_sample=("chain", "draw")).drop_vars(["_sample", "chain", "draw"])
        taken[name] = flat.isel(_sample=index).expand_dims(chain=[0]).transpose("chain", "draw", *site.dims[2:])
    return (
        dataset.drop_vars([*dataset.data_vars, "chain", "draw"])
        .assign(taken)
        .assign_coords(draw=np.arange(index.sizes["draw"]))
    )
