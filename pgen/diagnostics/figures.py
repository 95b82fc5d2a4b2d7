"""Pictures of importance weights and of what raw guide summaries miss: matplotlib figures made without pyplot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pgen.contracts import Run, spoken
from pgen.plots import BLUE, FAINT, INK, ORANGE, _figure, _label, _legend, _look

from .claims import Evidence

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["evidence_figures", "plot_log_densities", "plot_posterior_error", "plot_predictive", "plot_weights"]

_MOST_ROWS = 24
_MOST_PANELS = 4


def plot_weights(log_weight: Any, log_weight_smoothed: Any = None) -> Figure:
    r"""Share of each draw in the total weight, largest first, on logarithmic axes: a fat tail towers at the left.

    Shapes: ``(S,)`` or (chain, draw), in nats.

    Args:
        log_weight: Raw log-weights.
        log_weight_smoothed: The same after PSIS, if known.
    """
    figure, (ax,) = _figure(7.0, 4.2)
    shares = _shares(log_weight)
    rank = np.arange(1, len(shares) + 1)
    ax.plot(rank, shares, ".", color=BLUE, markersize=4, label="raw")
    if log_weight_smoothed is not None:
        ax.plot(rank, _shares(log_weight_smoothed), color=ORANGE, linewidth=1.6, label="after Pareto smoothing")
    ax.axhline(1 / len(shares), color=INK, linestyle="--", linewidth=0.9, label=f"equal shares, 1/{len(shares)}")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(bottom=min(1e-2 / len(shares), shares[len(shares) // 2] if shares[len(shares) // 2] > 0 else 1.0), top=1.5)
    ax.set_ylim(bottom=max(ax.get_ylim()[0], 1e-8))
    _label(
        ax,
        "rank of the draw, largest weight first",
        "share of the total weight",
        f"The largest draw holds {shares[0]:.1%} of the weight",
    )
    _legend(ax, loc="lower left")
    return figure


def _shares(log_weight: Any) -> np.ndarray:
    lw = np.asarray(log_weight, dtype=np.float64).reshape(-1)
    weight = np.exp(np.sort(lw)[::-1] - lw.max())
    return weight / weight.sum()


def plot_posterior_error(components: pd.DataFrame, *, shift: float = 0.1, sd_ratio: float = 0.1) -> Figure:
    r"""Shift of each mean and sd ratio of each latent, with 95 % intervals, against the tolerance (band).

    Args:
        components: As ``report.evidence.components``: columns ``name``, ``kind`` (``shift`` or ``log_sd_ratio``), ``estimate``,
            ``ci_low``, ``ci_high``, ``status``. Of many, the rows with the largest error are drawn.
        shift: Tolerance of the shift, posterior sds.
        sd_ratio: Tolerance of the ratio, as distance from one.
    """
    largest = components.assign(size=components["estimate"].abs()).groupby("name", sort=False)["size"].max()
    names = list(largest.nlargest(_MOST_ROWS).index)
    names = [name for name in largest.index if name in names]
    rms = bool(components.attrs.get("rms"))
    figure, (left, right) = _figure(7.4, 1.8 + 0.27 * len(names), panels=2)
    shift_bounds, log_bounds = (-shift, shift), (np.log1p(-sd_ratio), np.log1p(sd_ratio))
    labels = "shift of the mean [posterior sd]", "sd of q / posterior sd"
    if rms:
        shift_bounds, log_bounds = (0.0, shift), (0.0, np.log1p(sd_ratio))
        labels = f"root mean square {labels[0]}", "root mean square factor between the sds"
    for ax, kind, bounds, label in zip((left, right), ("shift", "log_sd_ratio"), (shift_bounds, log_bounds), labels):
        part = components[components["kind"] == kind].set_index("name").reindex(names)
        _forest(ax, part, bounds, exponential=kind == "log_sd_ratio")
        _label(ax, label, "")
    right.set_yticklabels([])
    more = f" (the largest {len(names)} of {len(largest)})" if len(names) < len(largest) else ""
    figure.suptitle(f"Raw q against the posterior that its weights see{more}", color=INK, fontsize=11)
    return figure


def plot_log_densities(data: Any, own: Any) -> Figure:
    r"""Histograms of log p(x) over data and over the model's own samples: of the right model they are the same.

    Shapes: ``(N,)`` and ``(M,)``, in nats.

    Args:
        data: Log-densities of data.
        own: Of the model's samples.
    """
    parts = [np.asarray(values, dtype=np.float64) for values in (data, own)]
    pooled = np.concatenate(parts)
    low, high = np.quantile(pooled[np.isfinite(pooled)], [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    figure, (ax,) = _figure(7.0, 3.4)
    for values, colour, name in zip(parts, (BLUE, ORANGE), ("data", "samples")):
        heights = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)
        ax.stairs(heights, edges, fill=True, color=colour, alpha=0.45, label=f"{len(values)} {name}")
    _label(ax, "log p(x) [nats]; what lies beyond is counted at the ends", "share")
    _legend(ax, loc="best")
    return figure


def plot_predictive(check: xr.Dataset) -> Figure:
    r"""Statistics of data that the model generates (histogram), and of the data that it was given (line).

    Args:
        check: What ``ppc`` returns. Of many comparisons the four with the most extreme p-values are drawn.
    """
    pairs = [(site, statistic) for site in check.site.values for statistic in check.statistic.values]
    found = [check.sel(site=site, statistic=statistic) for site, statistic in pairs]
    extreme = np.argsort([min(float(part.ppp), 1 - float(part.ppp)) for part in found], kind="stable")[:_MOST_PANELS]
    rows = -(-len(extreme) // 2)
    figure, _ = _figure(7.4, 2.3 * rows + 0.2, panels=0)
    for place, number in enumerate(sorted(extreme)):
        ax = _look(figure.add_subplot(rows, min(2, len(extreme)), place + 1))
        part, (site, statistic) = found[number], pairs[number]
        replicated, observed = part.replicated.to_numpy(), float(part.observed)
        ends = _ends(replicated[np.isfinite(replicated)])
        ax.hist(np.clip(replicated, *ends), bins=np.linspace(*ends, 31).tolist(), color=BLUE, alpha=0.45, label="model")
        ax.axvline(observed, color=ORANGE, linewidth=1.6, label="data")
        ax.locator_params(axis="x", nbins=6)
        _label(ax, f"{statistic} of {site}", "replicates" if place % 2 == 0 else "", f"p = {float(part.ppp):.3g}")
    _legend(figure.axes[0], loc="best")
    return figure


def _ends(values: np.ndarray) -> tuple[float, float]:
    """Limits that a few wild values do not stretch: what lies beyond is counted at them."""
    low, high = np.quantile(values, [0.01, 0.99]) if len(values) else (0.0, 1.0)
    room = 0.1 * (high - low) or 0.5
    return float(low - room), float(high + room)


def _forest(ax: Axes, part: pd.DataFrame, bounds: tuple[float, float], *, exponential: bool) -> None:
    change = np.exp if exponential else np.asarray
    place = np.arange(len(part))
    ax.axvspan(*(float(change(bound)) for bound in bounds), color="#e8f2ea", linewidth=0)
    ax.axvline(float(change(0.0)), color=FAINT, linewidth=0.9)
    middle, low, high = (change(part[column].to_numpy(dtype=np.float64)) for column in ("estimate", "ci_low", "ci_high"))
    for status, colour, marker in (("contradicted", ORANGE, "^"), ("supported", BLUE, "o"), ("undecided", INK, "s")):
        chosen = (part["status"] == status).to_numpy()
        bars = np.stack([middle - low, high - middle])[:, chosen]
        ax.errorbar(
            middle[chosen], place[chosen], xerr=bars, fmt=marker, color=colour, markersize=5, elinewidth=1.4, linestyle="none"
        )
    ax.set_yticks(place, list(part.index), color=INK, fontsize=9)
    ax.set_ylim(len(part) - 0.4, -0.6)
    ax.locator_params(axis="x", nbins=5)


def evidence_figures(evidence: Evidence, run: Run | None) -> dict[str, Figure]:
    """The pictures of a report, by title; what cannot be drawn is left out."""
    from pgen import plots

    figures: dict[str, Figure] = {}
    loss = np.asarray(run.history.get("loss", ()), dtype=np.float64) if run is not None else np.zeros(0)
    if run is not None and any(name.endswith("_grad_norm") for name in run.history):
        figures["The players while training"] = plots.plot_game(run)
    elif run is not None and np.isfinite(loss).sum() > 1:  # a closed form has nothing to draw
        name, sign, _ = spoken(run.word, training=True)
        figures[f"{'The' if sign > 0 else 'Minus the'} {name} while training"] = plots.plot_bound(run)
    if evidence.components is not None and len(evidence.components):
        limits = evidence.limits
        figures["Error of raw q (band: tolerance; orange: outside; black: open)"] = plot_posterior_error(
            evidence.components, shift=limits.shift, sd_ratio=limits.sd_ratio
        )
    if evidence.check is not None:
        figures["What the model generates, and the data"] = plot_predictive(evidence.check)
    if evidence.log_p is not None:
        figures["Log-density of the data, and of the model's own samples"] = plot_log_densities(*evidence.log_p[:2])
    fitted = evidence.fitted
    if evidence.per_datum and np.isfinite(fitted.khat).any():
        figures["Pareto k-hat of each datum"] = plots.plot_khat(fitted.khat, fitted.khat_se, threshold=float(fitted.good_k))
    elif fitted is not None and not evidence.per_datum and bool(np.isfinite(fitted.log_weight_smoothed).all()):
        raw = evidence.tree["sample_stats"]["log_weight"]
        figures["Importance weights"] = plot_weights(raw, fitted.log_weight_smoothed)
    return figures
