r"""Posterior predictive checks: does the model reproduce features of the data it was fitted to?

A posterior predictive p-value is not the probability that the model is right, and it is not uniform when the model holds: the
data are used twice, so values gather around one half. Only values near 0 or 1 say something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pgen.contracts import check_choice

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["p_values", "ppc"]

Statistic = Callable[..., Any]

_STATISTICS: dict[str, Statistic] = {"mean": np.mean, "sd": np.std, "min": np.min, "max": np.max}


def ppc(idata: Any, statistics: Sequence[str] | Mapping[str, Statistic] = ("mean", "sd", "min", "max")) -> xr.Dataset:
    r"""Compare statistics of each observed site with their posterior predictive distribution.

    .. math:: \text{ppp} = P(T(x^{rep}) > T(x)) + \tfrac12 P(T(x^{rep}) = T(x))

    Args:
        idata: DataTree with ``observed_data`` and ``posterior_predictive``.
        statistics: Names among ``mean``, ``sd``, ``min``, ``max``; or your own by name, functions of ``(array, axis=...)`` as
            NumPy's are, which reduce a whole data set to a number.

    Returns:
        Dataset with dims ``("site", "statistic")``: ``observed``, ``ppp``, ``ppp_se`` (Monte Carlo), and ``replicated`` with
        the dim ``draw`` besides, in the units of each statistic.

    Raises:
        ValueError: If no observed site has replicates, or one has NaN.

    References:
        Gelman, Meng, Stern (1996), Statistica Sinica 6; Meng (1994), Annals of Statistics 22(3).
    """
    import xarray as xr

    functions = statistics if isinstance(statistics, Mapping) else {name: _builtin(name) for name in statistics}
    if "posterior_predictive" not in idata or "observed_data" not in idata:
        raise ValueError(
            "`idata` should have the groups posterior_predictive and observed_data; pass predictive= to to_datatree"
        )
    sites = [str(name) for name in idata["observed_data"].data_vars if name in idata["posterior_predictive"].data_vars]
    if not sites:
        raise ValueError("`idata` has no observed site with posterior predictive draws")
    pairs = [_pair(idata["observed_data"][s].to_numpy(), idata["posterior_predictive"][s].to_numpy(), s) for s in sites]
    observed, replicated, ppp = _compare(pairs, list(functions.values()))
    dims = ("site", "statistic")
    return xr.Dataset(
        {
            "observed": (dims, observed),
            "ppp": (dims, ppp),
            "ppp_se": (dims, np.sqrt(ppp * (1 - ppp) / replicated.shape[-1])),
            "replicated": ((*dims, "draw"), replicated),
        },
        coords={"site": sites, "statistic": list(functions)},
    )


def _builtin(name: str) -> Statistic:
    check_choice("statistics", name, tuple(_STATISTICS))
    return _STATISTICS[name]


def _compare(pairs: list[tuple[np.ndarray, np.ndarray]], functions: list[Statistic]) -> tuple[np.ndarray, ...]:
    """Observed statistics ``(sites, statistics)``, replicated ones ``(sites, statistics, draws)``, and p-values."""
    observed = np.array([[f(x, axis=0) for f in functions] for x, _ in pairs], dtype=np.float64)
    replicated = np.array([[f(draws, axis=1) for f in functions] for _, draws in pairs], dtype=np.float64)
    ppp = (replicated > observed[..., None]).mean(axis=-1) + 0.5 * (replicated == observed[..., None]).mean(axis=-1)
    return observed, replicated, ppp


def p_values(observed: Mapping[str, Any], replicates: Mapping[str, Any]) -> np.ndarray:
    """The p-values of :func:`ppc` with its default statistics, flat, from tensors by site."""
    pairs = [
        _pair(observed[name].cpu().numpy(), replicates[name].cpu().numpy(), name) for name in observed if name in replicates
    ]
    return _compare(pairs, list(_STATISTICS.values()))[2].reshape(-1)


def _pair(observed: np.ndarray, draws: np.ndarray, site: str) -> tuple[np.ndarray, np.ndarray]:
    """The observed values, flat, and their replicates, one flat data set a row; float64."""
    if missing := int(np.isnan(observed).sum()):
        raise ValueError(f"observed {site!r} has {missing} NaN, with which nothing compares: leave them out, or mask the site")
    return observed.reshape(-1).astype(np.float64), draws.reshape(-1, observed.size).astype(np.float64)
