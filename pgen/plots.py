r"""Pictures of a fit: its bound, samples, reconstructions, latent space and Pareto k.

Each function takes plain arrays (NumPy, torch or xarray) and returns a ``matplotlib.figure.Figure`` on its own Agg canvas.
pyplot and its global state are never touched: no window opens, no ``rcParams`` change, and figures are freed like any object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pgen.contracts import KIND_WORDS, Run, check_positive, spoken
from pgen.training.callbacks import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pgen.evaluation.calibration import Calibration
    from pgen.evaluation.compare import Comparison
    from pgen.evaluation.ood import OODReport
    from pgen.evaluation.samples import SampleReport

__all__ = [
    "Pictures",
    "comparison",
    "density",
    "latent_space",
    "of_samples",
    "out_of_distribution",
    "plot_bound",
    "plot_game",
    "plot_khat",
    "reconstructions",
    "sample_grid",
    "samples_and_neighbours",
    "save",
    "sequences",
]

INK, FAINT, GRID = "#222222", "#8a8a8a", "#e6e6e6"
MOST_SEQUENCES = 6
GUTTER = 0.62  # between images: neither ink nor paper
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#9aa0a6"  # Okabe and Ito (2008): apart for every kind of colour vision
CATEGORIES = (  # Petroff (2021, arXiv:2107.02270), ten colours chosen with colour-vision deficiency in mind
    *("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6"),
    *("#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")

_AIMS = {"critic accuracy": ": fooled at 0.5", "energy gap": ": nearer to 0 is better", "loss": ""}  # what is no score


def plot_bound(run: Run) -> Figure:
    r"""What a fit maximised (``run.word``): raw (faint) and smoothed, with validation and a band of one standard error.

    The vertical axis is linear where most of training happened and logarithmic in the distance below that, so that a steep
    start does not flatten the rest; the label says where the change is. Where validation measures something else than the
    loss (an objective's own ``word``), it has a panel of its own.

    Args:
        run: What ``fit`` returned. ``history`` needs ``step`` and ``loss``; ``validation`` may be empty. Nats a datum.

    Raises:
        ValueError: If the run has no finite loss.
    """
    step, bound = _series(run.history, "loss", sign=-1.0)
    if not len(bound):
        raise ValueError("`run` should have a history with finite losses to draw, got none; did the fit take a step?")
    validated, (name, sign, unit) = len(run.validation.get("bound", ())) > 0, spoken(run.word, training=True)
    apart = validated and name != run.word
    figure, (ax, *others) = _figure(12.0 if apart else 7.0, 4.2, panels=2 if apart else 1)
    smooth = _smooth(bound)
    ax.plot(step, bound, color=BLUE, alpha=0.22, linewidth=0.8, label="training, raw")
    ax.plot(step, smooth, color=BLUE, linewidth=1.8, label="training, smoothed")
    lines = [smooth]
    for panel in others:
        _draw_validation(panel, run)
        _label(panel, "optimizer step", run.word, f"On held-out data{_AIMS.get(run.word, ': higher is better')}")
    if validated and not apart:
        lines.append(_draw_validation(ax, run))
    note = _scale_bound(ax, lines, bound)
    shown, unit = name if sign > 0 else f"minus {name}", f"{unit}{note}".strip(" ;")
    label = f"{shown} [{unit}]" if unit else shown
    _label(ax, "optimizer step", label, f"{shown[0].upper()}{shown[1:]} while training{_AIMS.get(name, ': higher is better')}")
    ax.set_xlim(step[0] if step[0] > step[-1] / 10 else 0, max(step[-1], 1))
    _legend(ax, loc="best")
    return figure


def plot_game(run: Run) -> Figure:
    r"""A game while training: each player's loss and gradient norm, smoothed, and how often a critic was right.

    No line says how good the samples are: losses that stand still are a draw, a critic that is always right has won, and a
    gradient norm that falls by orders of magnitude leaves its player nothing to learn from.

    Args:
        run: What ``fit`` returned for an objective with players; with a critic's accuracies and with validation data these
            are drawn too.

    Raises:
        ValueError: If the run has no players.
    """
    players = [name.removesuffix("_grad_norm") for name in run.history if name.endswith("_grad_norm")]
    if not players:
        raise ValueError("`run` has no players; draw it with pgen.plots.plot_bound")
    right = [name for name in run.history if "_accuracy_" in name]
    figure, (losses, norms, *rest) = _figure(11.0 if right else 7.6, 3.6, panels=3 if right else 2)
    for player, colour in zip(players, CATEGORIES):
        for ax, column in ((losses, f"{player}_loss"), (norms, f"{player}_grad_norm")):
            step, value = _series(run.history, column)
            ax.plot(step, _smooth(value), color=colour, linewidth=1.6, label=player)
    norms.set_yscale("log")
    _label(losses, "optimizer step", "loss", "Losses of the players")
    _label(norms, "optimizer step", "gradient norm", "Gradient norms")
    for ax in rest:
        for name, colour in zip(right, (BLUE, ORANGE)):
            step, value = _series(run.history, name)
            ax.plot(step, _smooth(value), color=colour, linewidth=1.6, label=name.replace("_", " "))
        step, value = _series(run.validation, "bound")
        ax.plot(
            step, value, color=INK, marker="o", markersize=3, linewidth=1.0, label="on held-out data" if len(value) else None
        )
        ax.set_ylim(-0.02, 1.02)
        _label(ax, "optimizer step", "share of right answers", "The critic: a half knows nothing")
    for ax in (losses, norms, *rest):
        _legend(ax, loc="best")
    return figure


def density(
    model: Any,
    data: Any = None,
    *,
    limits: Sequence[float] | None = None,
    num_points: int = 120,
    names: Sequence[str] | None = None,
) -> Figure:
    r"""A density in the plane: shaded, with the contours that enclose 50, 90 and 99 % of its mass, and data on top.

    Args:
        model: What has ``log_prob(x)`` for x ``(N, 2)``: a family with event shape (2,), or a target of ``pgen.data.toy``.
        data: Points to draw, ``(N, 2)``.
        limits: (left, right, bottom, top); by default those of the data, or of 1000 samples, and a tenth more on each side.
        num_points: Points of the grid along each axis.
        names: Of the two numbers.

    Raises:
        ValueError: If data or samples are not points of the plane, or ``names`` are not two.
    """
    import torch

    check_positive("num_points", num_points)
    if names is not None and len(names) != 2:
        raise ValueError(f"`names` should be two, one for each axis, got {len(names)}")
    points = None if data is None else _array("data", data)
    where = _array("model.sample(1000)", model.sample(1000)) if points is None and limits is None else points
    for name, x in (("data", points), ("model", where)):
        if x is not None and (x.ndim != 2 or x.shape[1] != 2):
            raise ValueError(f"`{name}` should be points of the plane, shape (N, 2), got {x.shape}; choose two of its numbers")
    left, right, bottom, top = limits if limits is not None else _room(where)
    axes = np.linspace(left, right, num_points), np.linspace(bottom, top, num_points)
    grid = np.stack(np.meshgrid(*axes), -1)
    found = model.log_prob(torch.from_numpy(grid.reshape(-1, 2)).to(torch.get_default_dtype()))
    value = np.asarray(_plain(getattr(found, "value", found)), dtype=float).reshape(num_points, num_points)
    figure, (ax,) = _figure(5.4, 4.8)
    p = np.exp(value - value.max())
    shade = ax.pcolormesh(*axes, np.exp(value), cmap="Blues", shading="gouraud", zorder=0)
    figure.colorbar(shade, ax=ax, label="density")
    levels = sorted({_level(p, mass) for mass in (0.99, 0.9, 0.5)})
    ax.contour(*axes, p, levels=levels, colors=INK, linewidths=0.8)
    if points is not None:
        ax.plot(*points[:2000].T, ".", color=ORANGE, markersize=2, alpha=0.5)
    ax.grid(False)  # it would be drawn over the shade
    ax.set(xlim=(left, right), ylim=(bottom, top))
    across, up = ("$x_1$", "$x_2$") if names is None else names
    _label(ax, across, up, "Density; contours hold 50, 90 and 99 % of the mass in view")
    return figure


def _room(x: Any) -> tuple[float, float, float, float]:
    """Limits that leave a tenth on each side."""
    low, high = x.min(0), x.max(0)
    room = 0.1 * (high - low) + 1e-9
    return (low[0] - room[0], high[0] + room[0], low[1] - room[1], high[1] + room[1])


def _level(p: np.ndarray, mass: float) -> float:
    """The height above which lies that share of the sum."""
    ordered = np.sort(p, axis=None)[::-1]
    return float(ordered[np.searchsorted(ordered.cumsum(), mass * ordered.sum())])


def sample_grid(
    x: Any, columns: int | None = None, *, reference: Any = None, names: Sequence[str] | None = None, title: str = "samples"
) -> Figure:
    r"""Samples at a glance: a grid of images, or histograms and pair scatters for vectors.

    Shapes: images ``(N, height, width)``, ``(N, height, width, channels)`` or ``(N, channels, height, width)`` with 1, 3 or 4
    channels; vectors ``(N, features)`` or ``(N,)``. Of vectors the first four features are drawn.

    Args:
        x: The samples. Images are drawn in [0, 1] if they lie there, as bytes if they are 8-bit integers, else from their
            minimum to their maximum.
        columns: Images a row; the squarest grid if None.
        reference: Data of the same event shape to draw beside (images) or underneath (vectors), if any.
        names: A name for each feature of a vector.
        title: What ``x`` is.

    Raises:
        ValueError: If ``x`` is neither images nor vectors, is empty, or ``reference`` has another event shape.
    """
    array = _array("x", x)
    other = None if reference is None else _array("reference", reference)
    if other is not None:
        _check_same_event(other, array.shape[1:])
    if array.ndim <= 2:
        return _pairs(array.reshape(len(array), -1), other, names, title)
    images = _images("x", array)
    panels = [(images, title)] if other is None else [(_images("reference", other)[: len(images)], "data"), (images, title)]
    return _image_panels(panels, columns, low_high=_range(array))


def _check_same_event(reference: np.ndarray, shape: tuple[int, ...]) -> None:
    if reference.shape[1:] != shape:
        raise ValueError(
            f"`reference` should have the event shape of `x`, {shape}, got {reference.shape[1:]}; reshape one of them"
        )


def sequences(x: Any, *, reference: Any = None, names: Sequence[str] | None = None, title: str = "samples") -> Figure:
    r"""Sequences as lines over time, one below the other; those of ``reference`` in a column beside them.

    Args:
        x: ``(N, T)``, or ``(N, T, *frame)``; the first six sequences are drawn, and the first four numbers of a frame. Whole
            numbers are drawn as steps.
        reference: Data of the same event shape to draw beside, if any.
        names: A name for each number of a frame.
        title: What ``x`` is.

    Raises:
        ValueError: If ``x`` is not that, or ``reference`` has another event shape.
    """
    arrays = [(_array("x", x), title)] + ([] if reference is None else [(_array("reference", reference), "data")])
    shape = arrays[0][0].shape
    if len(shape) < 2:
        raise ValueError(f"`x` should be sequences, (N, T) or (N, T, *frame), got shape {shape}")
    _check_same_event(arrays[-1][0], shape[1:])
    columns = [(array.reshape(*array.shape[:2], -1)[:MOST_SEQUENCES], label) for array, label in reversed(arrays)]
    rows, features = max(len(array) for array, _ in columns), columns[-1][0].shape[2]
    names = _names(names, features)[:4]
    steps = all(bool((array == np.round(array)).all()) for array, _ in columns)
    low, high = _limits(np.concatenate([array[..., :4].ravel() for array, _ in columns]))
    figure, _ = _figure(4.6 * len(columns) + 0.4, 0.8 * rows + 1.0, panels=0)
    for place, (array, label) in enumerate(columns):
        for row, lines in enumerate(array[..., :4]):
            ax = _look(figure.add_subplot(rows, len(columns), row * len(columns) + place + 1))
            for name, line, colour in zip(names, lines.T, CATEGORIES):
                ax.plot(line, color=colour, linewidth=0.9, label=name, drawstyle="steps-mid" if steps else "default")
            ax.set_ylim(low, high)
            ax.set_xlim(0, max(len(lines) - 1, 1))
            ax.tick_params(labelbottom=row == len(array) - 1, labelleft=place == 0)
            if row == 0:
                ax.set_title(f"{len(array)} {label}", color=INK, fontsize=11, loc="left")
        ax.set_xlabel("position", color=INK, fontsize=10)
    if features > 1:
        handles = figure.axes[0].get_legend_handles_labels()[0]
        figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False, labelcolor=INK, fontsize=9)
    return figure


def of_samples(model: Any, x: Any, names: Sequence[str] | None = None, **options: Any) -> Figure:
    """``sequences`` of a family whose first axis is time, ``sample_grid`` of others; ``options`` are those of both.

    Names of positions, such as a table has, are left out of sequences.
    """
    if not getattr(model, "sequential", False):
        return sample_grid(x, names=names, **options)
    return sequences(x, names=names if names and len(names) == math.prod(x.shape[2:]) else None, **options)


class Pictures(Callback):
    """Draws samples of the model while it trains: ``folder/step-000500.png`` and so on, and after the last step.

    The samples are keyed, so each picture shows the same latents; nothing of the training depends on their being drawn. Where
    training keeps an average of the parameters, the average is shown.

    Args:
        model: Any family with ``sample``, the one that is being trained.
        folder: Where to write; it is created.
        every: Steps between pictures.
        num: Samples a picture.
        context: Of the samples: one for all, or one for each.
        reference: Data to draw beside them.
        names: Of the features of vectors.
        seed: Keys the samples.
    """

    def __init__(
        self,
        model: Any,
        folder: str | Path,
        *,
        every: int = 1000,
        num: int = 64,
        context: Any = None,
        reference: Any = None,
        names: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_positive("every", every)
        check_positive("num", num)
        self.model, self.folder, self.every, self.num = model, Path(folder), int(every), int(num)
        self.context, self.reference, self.names, self.seed = context, reference, names, seed
        self.folder.mkdir(parents=True, exist_ok=True)

    def on_state(self, step: int) -> None:
        """One picture."""
        x = self.model.sample(self.num, self.context, seed=self.seed, progress=False)
        figure = of_samples(self.model, x, reference=self.reference, title=f"samples after {step} steps", names=self.names)
        save(figure, self.folder / f"step-{step:06d}.png")


def reconstructions(x: Any, xhat: Any, columns: int | None = None, *, names: Sequence[str] | None = None) -> Figure:
    r"""Data and what the model makes of them: images one above the other, vectors feature by feature.

    Shapes: as for ``sample_grid``; ``x`` and ``xhat`` alike.

    Args:
        x: The data.
        xhat: Their reconstructions (for a likelihood model the mean of p(x | z)), in the units of the data.
        columns: Images a row; at most 12 if None.
        names: Of the features of vectors.

    Raises:
        ValueError: If the shapes differ or are neither images nor vectors, or ``names`` are not one a feature.
    """
    array, made = _array("x", x), _array("xhat", xhat)
    if array.shape != made.shape:
        raise ValueError(f"`xhat` should have the shape of `x`, {array.shape}, got {made.shape}; did one lose an axis?")
    if array.ndim <= 2:
        return _scatter_reconstruction(array.reshape(len(array), -1), made.reshape(len(made), -1), names)
    columns = min(len(array), 12) if columns is None else columns
    check_positive("columns", columns)
    x_images, made_images = _images("x", array), _images("xhat", made)
    rows = math.ceil(len(array) / columns)
    figure, _ = _figure(0.62 * columns + 0.6, 1.3 * rows + 0.5, panels=0)
    low, high = _range(array)
    for row in range(rows):
        part = slice(row * columns, (row + 1) * columns)
        blank = np.full((columns - len(x_images[part]), *x_images.shape[1:]), GUTTER * (high - low) + low)
        ax = figure.add_subplot(rows, 1, row + 1)
        _show(ax, _mosaic(np.concatenate([x_images[part], blank, made_images[part]]), columns, low, high))
        bottom = ax.get_ylim()[0]
        ax.set_yticks([bottom / 4, 3 * bottom / 4], ["data", "model"], color=INK, fontsize=9)
        ax.tick_params(length=0)
    figure.suptitle(f"{len(array)} data, and their reconstructions below", color=INK, fontsize=11)
    return figure


def latent_space(z: Any, labels: Any = None) -> Figure:
    r"""Where the data lie in the latent space: directly in one or two dimensions, else their first two principal components.

    Shapes: z ``(N, latent)``; labels ``(N,)``.

    Args:
        z: One point a datum, for example the posterior mean that ``encode`` returns.
        labels: Classes (a colour and a marker each, named at their centre and in a legend; past ten, the nine largest) or real
            numbers (a colour scale).

    Raises:
        ValueError: If ``z`` is not a matrix or ``labels`` has another length.
    """
    points = _array("z", z)
    if points.ndim != 2 or not np.isfinite(points).all():
        raise ValueError(
            f"`z` should be a finite matrix (N, latent), got shape {points.shape}; flatten it and drop non-finite rows"
        )
    names = None if labels is None else np.asarray(_plain(labels))
    if names is not None and names.shape != (len(points),):
        raise ValueError(f"`labels` should have one entry a row of `z`, shape ({len(points)},), got {names.shape}")
    flat, xlabel, ylabel, title = _project(points.astype(float))
    figure, (ax,) = _figure(6.4, 5.2)
    _label(ax, xlabel, ylabel, title)
    if names is None:
        ax.scatter(flat[:, 0], flat[:, 1], s=10, color=BLUE, alpha=0.6, linewidths=0)
    elif names.dtype.kind == "f" and len(np.unique(names)) > len(CATEGORIES):
        bar = figure.colorbar(ax.scatter(flat[:, 0], flat[:, 1], s=10, c=names, cmap="viridis", linewidths=0), ax=ax)
        bar.set_label("label", color=INK)
        bar.ax.tick_params(colors=INK, labelsize=9)
    else:
        _scatter_classes(ax, flat, names)
    return figure


def plot_khat(khat: Any, khat_se: Any = None, threshold: float = 0.7) -> Figure:
    r"""Pareto k of importance weights, sorted, with error bars: above the threshold the weights cannot be trusted.

    Shapes: khat, khat_se ``(N,)``, one a datum (or one for the whole posterior).

    Args:
        khat: Estimated shape of the generalised Pareto tail, without unit.
        khat_se: Standard error of each, if known.
        threshold: Where reliability ends; the usual 0.7 unless the sample size asks for less.

    Raises:
        ValueError: If ``khat`` is not a vector with a finite entry, or ``khat_se`` has another shape.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry (2024), Pareto Smoothed Importance Sampling, JMLR 25(72), sections 2.4 and 3.2.4.
    """
    check_positive("threshold", threshold, integer=False)
    k = np.atleast_1d(np.asarray(_plain(khat), dtype=float))
    if k.ndim != 1 or not np.isfinite(k).any():
        raise ValueError(f"`khat` should be a vector with finite entries, got shape {k.shape}")
    errors = None if khat_se is None else np.atleast_1d(np.asarray(_plain(khat_se), dtype=float))
    if errors is not None and errors.shape != k.shape:
        raise ValueError(f"`khat_se` should have the shape of `khat`, {k.shape}, got {errors.shape}")
    order = np.argsort(k)[: np.isfinite(k).sum()]  # NaN and inf sort last
    figure, (ax,) = _figure(7.0, 4.2)
    rank, k_sorted = np.arange(1, len(order) + 1), k[order]
    for chosen, colour, marker in ((k_sorted <= threshold, BLUE, "o"), (k_sorted > threshold, ORANGE, "^")):
        if chosen.any():
            bars = None if errors is None else errors[order][chosen]
            _errorbar(ax, rank[chosen], k_sorted[chosen], bars, colour, marker)
    for level, text in ((threshold, f"{threshold:.2g}: unreliable above"), (1.0, "1: no finite mean above")):
        ax.axhline(level, color=INK, linewidth=0.9, linestyle="--" if level == threshold else ":")
        ax.annotate(
            text, (0.01, level), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8, color=INK
        )
    bad, lost = int((k > threshold).sum()), int((~np.isfinite(k)).sum())
    missing = f"; {lost} not finite, not drawn" if lost else ""
    _label(ax, "datum, in order of k", "Pareto k [no unit]", f"{bad} of {len(k)} above {threshold:.2g}{missing}")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, max(top, 1.1, threshold + 0.1))
    return figure


_KIND_MARKERS = {"exact": "o", "lower_bound": ">", "upper_bound": "<", "estimate": "d", "unnormalised": "x"}
"""An arrow points to where the density itself may lie."""


def comparison(found: Comparison) -> Figure:
    r"""Models by rank: the difference of each to the first, with the paired interval that the verdicts rest on.

    An arrow marks a bound, and points to where the log-density itself may lie. Blue are models that no other is shown to be
    better than. One that is not normalised has no place on the axis, which is logarithmic away from zero where differences
    span more than a factor of a hundred.

    Args:
        found: What ``pgen.compare`` returned.
    """
    first = found.names[0]
    figure, (ax,) = _figure(7.0, 1.3 + 0.42 * len(found.names))
    placed = {name: score for name, score in found.scores.items() if score.kind != "unnormalised"}
    differences = [found.difference(name, first) for name in found.names]
    shown = [abs(d.mean) for name, d in zip(found.names[1:], differences[1:]) if math.isfinite(d.mean) and name in placed]
    if shown and max(shown) > 100 * max(min(shown), 1e-9):
        ax.set_xscale("symlog", linthresh=max(min(shown), max(shown) / 1e4))
    for rank, (name, difference) in enumerate(zip(found.names, differences)):
        score = found.scores[name]
        colour = BLUE if name in found.best else ORANGE
        if math.isfinite(difference.mean) and name in placed:
            bar = 0.0 if rank == 0 or math.isnan(difference.std_error) else difference.width * difference.std_error
            ax.errorbar(difference.mean, rank, xerr=bar, color=colour, fmt=_KIND_MARKERS[score.kind], markersize=7, capsize=3)
    ax.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
    kinds = {name: KIND_WORDS[score.kind] for name, score in found.scores.items()}
    labels = [f"{name}\n" + (f"{placed[name].mean:.2f}, " if name in placed else "") + kinds[name] for name in found.names]
    ax.set_yticks(range(len(labels)), labels, color=INK, fontsize=9)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    _label(ax, f"difference to {first} [nats a datum]", "", f"{len(found.scores[first])} held-out data: higher is better")
    return figure


def out_of_distribution(found: OODReport, bins: int = 40) -> Figure:
    r"""Histograms of each score for data of the known kind and of another, with the AUROC.

    The dashed line is where p-values reach the report's level: what lies to its right is called strange.

    Args:
        found: What ``pgen.evaluation.ood.report`` returned.
        bins: Of each histogram.
    """
    check_positive("bins", bins)
    figure, axes = _figure(1.0 + 3.1 * len(found.rows), 3.4, panels=len(found.rows))
    for ax, (method, row) in zip(axes, found.rows.items()):
        parts = [_plain(part[method]) for part in (found.inside, found.outside)]
        pooled = np.concatenate(parts)
        low, high = np.quantile(pooled[np.isfinite(pooled)], [0.002, 0.998])
        edges = np.linspace(low, max(high, low + 1e-9), bins + 1)
        for values, colour, label in zip(parts, (BLUE, ORANGE), ("in", "out")):
            heights = np.histogram(np.clip(values, low, high), edges)[0] / len(values)
            ax.stairs(heights, edges, fill=True, color=colour, alpha=0.45, label=label)
        limit = np.quantile(_plain(found.null[method]), 1 - found.level)
        ax.axvline(limit, color=INK, linewidth=0.9, linestyle="--", label=f"p = {found.level:g}")
        _label(
            ax,
            f"{'minus log-likelihood' if method == 'likelihood' else method} [nats]",
            "share of the data",
            f"AUROC {row['auroc']:.3f} ± {row['std_error']:.3f}",
        )
    _legend(axes[0])
    return figure


def samples_and_neighbours(found: SampleReport, names: Sequence[str] | None = None) -> Figure:
    r"""Samples, and below each its nearest datum: copies look alike, and samples beside the data do not.

    Of vectors the first two numbers are drawn, with a line from each sample to its nearest datum.

    Args:
        found: What ``pgen.evaluation.samples.evaluate`` returned.
        names: Of the features of vectors.
    """
    shown, near = _array("shown", found.shown), _array("neighbours", found.neighbours)
    of = found.neighbours_of
    if shown.ndim <= 2:
        return _lines_to_neighbours(shown.reshape(len(shown), -1), near.reshape(len(near), -1), of, names)
    figure, (ax,) = _figure(0.62 * len(shown) + 1.6, 1.8)
    both = np.concatenate([_images("shown", shown), _images("neighbours", near)])
    _show(ax, _mosaic(both, len(shown), *_range(near)))
    bottom = ax.get_ylim()[0]
    ax.set_yticks([bottom / 4, 3 * bottom / 4], ["samples", f"nearest {of}"], color=INK, fontsize=9)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.set_title(f"{len(shown)} samples and their nearest {of}", color=INK, fontsize=11, loc="left")
    return figure


def _lines_to_neighbours(x: np.ndarray, near: np.ndarray, of: str, names: Sequence[str] | None) -> Figure:
    names = _names(names, x.shape[1])
    if x.shape[1] == 1:
        x, near, names = (
            np.column_stack([x, np.arange(len(x))]),
            np.column_stack([near, np.arange(len(x))]),
            [*names, "sample"],
        )
    figure, (ax,) = _figure(5.2, 4.6)
    ax.plot(*np.stack([x[:, :2], near[:, :2]], 1).transpose(2, 1, 0), color=FAINT, linewidth=0.9, zorder=1)
    ax.scatter(near[:, 0], near[:, 1], s=26, color=INK, marker="s", linewidths=0, label=f"nearest {of}", zorder=2)
    ax.scatter(x[:, 0], x[:, 1], s=26, color=BLUE, linewidths=0, label="samples", zorder=3)
    more = f", 2 of {x.shape[1]} features" if x.shape[1] > 2 else ""
    _label(ax, names[0], names[1], f"{len(x)} samples and their nearest {of}{more}")
    _legend(ax, loc="best")
    return figure


def reliability(found: Calibration) -> Figure:
    r"""The reliability diagram: the share classified rightly in each bin of confidence, beside the confidence itself.

    A calibrated classifier lies on the diagonal; below it, it is too sure of itself. The area of a mark is the bin's share of
    the data.

    Args:
        found: What ``pgen.evaluation.calibration`` or a classifier's ``evaluate`` returned.
    """
    figure, (ax,) = _figure(4.6, 4.4)
    filled = _plain(found.counts) > 0
    x, y, counts = (_plain(values)[filled] for values in (found.confidence, found.right, found.counts))
    ax.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    ax.vlines(x, np.minimum(x, y), np.maximum(x, y), color=ORANGE, linewidth=1.2)
    ax.scatter(x, y, s=20 + 300 * counts / counts.sum(), color=BLUE, edgecolor="white", zorder=3)
    _label(ax, "confidence", "share classified rightly", f"accuracy {found.accuracy:.3f}, ECE {found.ece:.3f}")
    ax.set_xlim(0, 1.03)
    ax.set_ylim(0, 1.03)
    return figure


def decision_boundary(
    predict_proba: Callable[[Any], Any], x: Any, y: Any, *, grid: int = 150, names: Sequence[str] = ("x0", "x1")
) -> Figure:
    r"""Classes of data in the plane, and of every point around them, colours mixed where they compete.

    Args:
        predict_proba: From points ``(N, 2)`` to probabilities ``(N, K)``: a classifier's method.
        x: Data, ``(N, 2)``.
        y: Their classes, ``(N,)``.
        grid: Points along each axis.
        names: Of the two coordinates.

    Raises:
        ValueError: If ``x`` does not lie in a plane.
    """
    import torch

    points, labels = _array("x", x), _array("y", y).astype(int)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"`x` should lie in a plane, shape (N, 2), got {points.shape}; project it first")
    check_positive("grid", grid)
    low, high = points.min(0), points.max(0)
    low, high = low - 0.15 * (high - low), high + 0.15 * (high - low)
    axes = [np.linspace(low[i], high[i], grid) for i in range(2)]
    mesh = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    probs = np.asarray(_plain(predict_proba(torch.as_tensor(mesh, dtype=torch.get_default_dtype()))))
    colours = np.array([_rgb(CATEGORIES[k % len(CATEGORIES)]) for k in range(probs.shape[1])])
    figure, (ax,) = _figure(5.2, 4.6)
    shade = 1 - 0.4 * (1 - probs @ colours)  # pale, and mixed where classes compete
    ax.imshow(shade.reshape(grid, grid, 3), origin="lower", extent=(low[0], high[0], low[1], high[1]), aspect="auto")
    for lead in _leads(probs):
        if lead.min() < 0 < lead.max():
            ax.contour(*axes, lead.reshape(grid, grid), [0.0], colors=INK, linewidths=0.8)
    for k in range(probs.shape[1]):
        part = points[labels == k]
        ax.scatter(
            part[:, 0], part[:, 1], s=14, color=colours[k], marker=MARKERS[k % len(MARKERS)], edgecolor="white", linewidth=0.4,
            label=f"class {k}",
        )  # fmt: skip
    ax.grid(False)
    _legend(ax)
    _label(ax, names[0], names[1], f"Predicted classes, and {len(points)} data")
    return figure


def _leads(probs: np.ndarray) -> list[np.ndarray]:
    """By how much each class is more probable than the best of the others; of two classes the second says nothing new."""
    count = probs.shape[1]
    leads = [probs[:, k] - np.delete(probs, k, 1).max(1) for k in range(count)] if count > 1 else []
    return leads[:1] if count == 2 else leads


def _rgb(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    return to_rgb(colour)


def save(fig: Figure, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure to ``path``; the ending chooses the format (png, pdf, svg, ...).

    Returns:
        The path written.

    Raises:
        ValueError: If matplotlib cannot write that ending, or the folder is missing.
    """
    path = Path(path)
    endings = sorted(fig.canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in endings:
        raise ValueError(f"`path` should end in one of .{', .'.join(endings)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"`path` is in {str(path.parent)!r}, which is no folder; create it first")
    fig.savefig(path, dpi=dpi, facecolor="white")
    return path


# --- the common look -------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [_look(figure.add_subplot(1, panels, i + 1)) for i in range(panels)]


def _look(ax: Axes) -> Axes:
    """White ground, a light grid, no box: said on the axes, so that a caller's own style does not mix in."""
    ax.set_facecolor("white")
    ax.grid(True, color=GRID, linewidth=0.7, linestyle="-")
    ax.set_axisbelow(True)
    ax.tick_params(colors=INK, labelsize=9, length=3)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    return ax


def _label(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x, color=INK, fontsize=10)
    ax.set_ylabel(y, color=INK, fontsize=10)
    ax.set_title(title, color=INK, fontsize=11, loc="left")


def _legend(ax: Axes, **where: Any) -> None:
    legend = ax.legend(frameon=True, facecolor="white", edgecolor="none", framealpha=0.85, labelcolor=INK, fontsize=9, **where)
    legend.get_title().set_color(INK)


def _errorbar(ax: Axes, x: np.ndarray, y: np.ndarray, bars: np.ndarray | None, colour: str, marker: str) -> None:
    ax.errorbar(x, y, yerr=bars, color=colour, ecolor=colour, fmt=marker, markersize=4, elinewidth=0.7, linestyle="none")


# --- arrays ----------------------------------------------------------------------------------------------------------------


def _plain(x: Any) -> Any:
    """Something ``np.asarray`` can read: tensors leave their device and graph."""
    return x.detach().cpu().numpy() if hasattr(x, "detach") else x


def _array(argument: str, x: Any) -> np.ndarray:
    array = np.asarray(_plain(x))
    if array.dtype.kind not in "biuf":
        raise ValueError(f"`{argument}` should be numbers, got an array of {array.dtype}")
    if array.ndim == 0 or not array.size:
        raise ValueError(f"`{argument}` should have at least one datum along its first axis, got shape {array.shape}")
    return array


def _images(argument: str, x: np.ndarray) -> np.ndarray:
    """Images as ``(N, height, width, channels)`` with 1, 3 or 4 channels."""
    if x.ndim == 3:
        return x[..., None]
    if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
        return x
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return np.moveaxis(x, 1, -1)
    raise ValueError(
        f"`{argument}` should be images (N, H, W) or (N, H, W, C) with C in 1, 3, 4, or vectors (N, F), got shape {x.shape}"
    )


def _range(x: np.ndarray) -> tuple[float, float]:
    """The values drawn as black and white."""
    if x.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    if 0.0 <= low and high <= 1.0:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _series(columns: dict[str, np.ndarray], name: str, sign: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one logged column, finite entries only."""
    values = sign * np.asarray(columns.get(name, ()), dtype=float)
    steps = np.asarray(columns.get("step", np.arange(1, len(values) + 1)), dtype=float)
    keep = np.isfinite(values)
    return steps[keep], values[keep]


# --- the bound -------------------------------------------------------------------------------------------------------------


def _smooth(y: np.ndarray) -> np.ndarray:
    """Running mean over a fortieth of the series: centred, narrower at the steep start, one-sided at the end."""
    position = np.arange(len(y))
    reach = np.minimum(len(y) // 80, position)
    total = np.concatenate(([0.0], np.cumsum(y)))
    left, right = position - reach, np.minimum(position + reach + 1, len(y))
    return (total[right] - total[left]) / (right - left)


def _draw_validation(ax: Axes, run: Run) -> np.ndarray:
    step, bound = _series(run.validation, "bound")
    if not len(bound):
        return bound
    errors = np.asarray(run.validation.get("std_error", np.zeros(0)), dtype=float)
    if len(errors) == len(run.validation["bound"]):
        errors = errors[np.isfinite(np.asarray(run.validation["bound"], dtype=float))]
        ax.fill_between(step, bound - errors, bound + errors, color=ORANGE, alpha=0.2, linewidth=0, label="± 1 standard error")
    marker = "o" if len(step) <= 40 else None
    ax.plot(
        step,
        bound,
        color=ORANGE,
        linewidth=1.6,
        marker=marker,
        markersize=3.5,
        label=(f"validation, last {bound[-1]:.2f}" if run.restored is None else f"validation, best {run.restored:.2f}").replace(
            "-", "\N{MINUS SIGN}"
        ),
    )
    return bound


def _scale_bound(ax: Axes, lines: list[np.ndarray], raw: np.ndarray) -> str:
    """Compress the steep start, if there is one; return a note for the label."""
    top = max(float(line.max()) for line in lines if len(line))
    low = min(float(line.min()) for line in lines if len(line))
    late = np.concatenate([line[len(line) // 10 :] for line in lines])
    width = max(top - float(np.quantile(late, 0.02)), 1e-9 * max(abs(top), 1.0))
    head = min(float(raw.max()), top + width / 2)
    if top - low < 4.0 * width:
        ax.set_ylim(low - 0.05 * (top - low + width), head + 0.1 * width)
        return ""
    ax.set_yscale(
        "function",
        functions=(lambda y: -np.arcsinh((top - y) / width), lambda v: top - width * np.sinh(np.clip(-v, -50.0, 50.0))),
    )
    ax.set_yticks(_ticks(low, top, width))
    ax.minorticks_off()
    ax.set_ylim(low - 0.1 * (top - low), head + 0.1 * width)
    return f"; log scale below {top - width:.4g}".replace("-", "\N{MINUS SIGN}")


def _ticks(low: float, top: float, width: float) -> list[float]:
    """Even ticks over the linear part, round numbers below it, none crowding another."""
    from matplotlib.ticker import MaxNLocator

    kept = [float(t) for t in MaxNLocator(5).tick_values(top - 1.2 * width, top) if top - 1.5 * width <= t <= top + 0.5 * width]
    powers = range(-3, math.ceil(math.log10(max(abs(low), abs(top), 1e-3))) + 1)
    round_ones = sorted((s * m * 10.0**p for p in powers for m in (1, 1.5, 2, 3, 4, 5, 7) for s in (-1, 1)), reverse=True)
    for tick in round_ones:
        if low <= tick < kept[0] and np.arcsinh((top - tick) / width) - np.arcsinh((top - kept[0]) / width) > 0.35:
            kept.insert(0, tick)
    return kept


# --- images ----------------------------------------------------------------------------------------------------------------


def _mosaic(images: np.ndarray, columns: int, low: float, high: float) -> np.ndarray:
    """Tile ``(N, height, width, channels)`` into one picture in [0, 1], grey between the tiles."""
    rows, (height, width, channels) = math.ceil(len(images) / columns), images.shape[1:]
    gap = max(1, round(0.06 * max(height, width)))
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), GUTTER)
    for i, image in enumerate(np.clip((images.astype(float) - low) / (high - low), 0.0, 1.0)):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _show(ax: Axes, picture: np.ndarray) -> None:
    if picture.shape[-1] == 1:
        ax.imshow(picture[..., 0], cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    else:
        ax.imshow(picture, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _image_panels(panels: list[tuple[np.ndarray, str]], columns: int | None, low_high: tuple[float, float]) -> Figure:
    most = max(len(images) for images, _ in panels)
    columns = math.ceil(math.sqrt(most)) if columns is None else columns
    check_positive("columns", columns)
    rows = math.ceil(most / columns)
    side = min(4.6, max(2.0, 0.6 * columns))
    figure, axes = _figure(side * len(panels) + 0.2, side * rows / columns + 0.5, panels=len(panels))
    figure.set_layout_engine("constrained", wspace=0.06)
    for ax, (images, name) in zip(axes, panels):
        _show(ax, _mosaic(images, columns, *low_high))
        ax.set_title(f"{len(images)} {name}", color=INK, fontsize=11, loc="left")
    return figure


# --- vectors ---------------------------------------------------------------------------------------------------------------


def _names(names: Sequence[str] | None, features: int) -> list[str]:
    if names is None:
        return [f"feature {i}" for i in range(features)]
    if len(names) != features:
        raise ValueError(f"`names` should have one entry a feature, {features}, got {len(names)}")
    return [str(name) for name in names]


def _pairs(x: np.ndarray, reference: np.ndarray | None, names: Sequence[str] | None, title: str) -> Figure:
    features = x.shape[1]
    names, shown = _names(names, features), min(features, 4)
    layers = [(x, BLUE, f"{len(x)} {title}")]
    if reference is not None:
        reference = reference.reshape(len(reference), -1)
        layers.insert(0, (reference, INK, f"{len(reference)} data"))
    figure, _ = _figure(max(2.2 * shown + 1.2, 5.4), max(2.0 * shown + 1.0, 3.8), panels=0)
    limits = [_limits(np.concatenate([layer[:, i] for layer, _, _ in layers])) for i in range(shown)]
    for row in range(shown):
        for column in range(row + 1):
            ax = _look(figure.add_subplot(shown, shown, row * shown + column + 1))
            for layer, colour, label in layers:
                _draw_pair(ax, layer[:, column], None if row == column else layer[:, row], colour, label, limits[column])
            ax.set_xlim(*limits[column])
            if row != column:
                ax.set_ylim(*limits[row])
            density = "density" if column == 0 or row == column else ""
            _label(
                ax, names[column] if row == shown - 1 else "", density if row == column else names[row] if column == 0 else ""
            )
    more = f" (first {shown} of {features} features)" if features > shown else ""
    figure.suptitle(" over ".join(label for _, _, label in reversed(layers)) + more, color=INK, fontsize=11)
    if shown > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="upper right", bbox_to_anchor=(0.98, 0.9), frameon=False, labelcolor=INK, fontsize=10
        )
    elif len(layers) > 1:
        _legend(figure.axes[0], loc="best")
    return figure


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The middle 99.8 % of the values, with a margin: one wild sample must not hide the rest."""
    low, high = np.quantile(values[np.isfinite(values)], [0.001, 0.999]) if np.isfinite(values).any() else (0.0, 1.0)
    margin = 0.08 * (high - low) or 0.5
    return float(low - margin), float(high + margin)


def _draw_pair(ax: Axes, x: np.ndarray, y: np.ndarray | None, colour: str, label: str, limits: tuple[float, float]) -> None:
    if y is None:
        bins = np.linspace(
            *limits, 32
        ).tolist()  # an odd number: the middle of whole numbers is no edge, where rounding decides
        style: dict[str, Any] = {"histtype": "step", "linewidth": 1.5}
        if colour == INK:
            style = {"histtype": "stepfilled", "alpha": 0.3}
        ax.hist(x[np.isfinite(x)], bins=bins, density=True, color=colour, label=label, **style)
        return
    size = float(np.clip(3000.0 / len(x), 2.0, 12.0))
    ax.scatter(x, y, s=size, color=colour, alpha=0.5, linewidths=0, label=label)


def _scatter_reconstruction(x: np.ndarray, made: np.ndarray, names: Sequence[str] | None) -> Figure:
    names = [f"feature {i}" for i in range(x.shape[1])] if names is None else names
    if len(names) != x.shape[1]:
        raise ValueError(f"`names` should be one a feature, {x.shape[1]}, got {len(names)}")
    shown = min(x.shape[1], 4)
    figure, axes = _figure(3.0 * shown + 0.4, 3.3, panels=shown)
    for i, ax in enumerate(axes):
        low, high = _limits(np.concatenate([x[:, i], made[:, i]]))
        ax.plot([low, high], [low, high], color=INK, linewidth=0.9, linestyle="--")
        ax.scatter(x[:, i], made[:, i], s=8, color=BLUE, alpha=0.5, linewidths=0)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        _label(ax, f"{names[i]}, data", "reconstruction" if i == 0 else "")
    more = f" (first {shown} of {x.shape[1]} features)" if x.shape[1] > shown else ""
    figure.suptitle(f"Reconstructions against data{more}", color=INK, fontsize=11)
    return figure


# --- the latent space ------------------------------------------------------------------------------------------------------


def _project(z: np.ndarray) -> tuple[np.ndarray, str, str, str]:
    """Points in the plane, with the labels that say how they came there."""
    latent = z.shape[1]
    if latent == 2:
        return z, "latent 0", "latent 1", f"Latent space of {len(z)} data"
    if latent == 1:
        return (
            np.column_stack([z[:, 0], np.arange(len(z))]),
            "latent 0",
            "datum",
            f"Latent space of {len(z)} data, one dimension",
        )
    centred = z - z.mean(0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    share = singular**2 / max(float((singular**2).sum()), np.finfo(float).tiny)
    flat = np.zeros((len(z), 2))
    flat[:, : min(2, len(axes))] = centred @ axes[:2].T
    share = np.append(share, 0.0)
    words = [f"principal component {i + 1} ({100 * share[i]:.0f}% of the variance)" for i in (0, 1)]
    return flat, words[0], words[1], f"Latent space of {len(z)} data: 2 principal components of {latent} dimensions"


def _scatter_classes(ax: Axes, flat: np.ndarray, labels: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    names, counts = np.unique(labels, return_counts=True)
    rest = len(names) > len(CATEGORIES)
    chosen = sorted(names[np.argsort(-counts, kind="stable")[: len(CATEGORIES) - 1]].tolist()) if rest else names.tolist()
    if rest:
        others = flat[~np.isin(labels, chosen)]
        ax.scatter(
            others[:, 0], others[:, 1], s=8, color=GREY, alpha=0.4, linewidths=0, label=f"{len(names) - len(chosen)} others"
        )
    for name, colour, marker in zip(chosen, CATEGORIES, MARKERS):
        points = flat[labels == name]
        ax.scatter(points[:, 0], points[:, 1], s=14, color=colour, marker=marker, alpha=0.75, linewidths=0, label=str(name))
        halo = [withStroke(linewidth=3, foreground="white")]
        ax.annotate(str(name), np.median(points, axis=0), ha="center", va="center", color=INK, weight="bold", path_effects=halo)
    _legend(ax, title="label", loc="center left", bbox_to_anchor=(1.0, 0.5))
