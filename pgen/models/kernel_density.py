r"""The kernel density estimate: one kernel at each training datum.

.. math:: p(x) = \sum_i w_i \, K_h(x - x_i)

``fit(x)`` keeps the data and chooses the bandwidth that maximises the leave-one-out likelihood,

.. math:: \sum_n \log \sum_{i \ne n} \frac{w_i}{1 - w_n} K_h(x_n - x_i),

by its gradient, with queries in minibatches and all points in every sum. Data of groups that are alike within, such as several
rows of one person, leave out the whole group. Rules of thumb and given bandwidths take no steps.

Silverman (1986), Density Estimation for Statistics and Data Analysis, sections 3.4 and 4.3; Duin (1976), IEEE Transactions on
Computers 25:1175 (leave one out); Abramson (1982), Annals of Statistics 10:1217; Breiman, Meisel, Purcell (1977), Technometrics
19:135 (nearest neighbours); Li and Racine (2003), Journal of Multivariate Analysis 86:266 (mixed features).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Measure, Run, Score, Seed, as_seed, check_choice, check_positive
from ..data.arrays import as_batch, check_finite, is_source
from ..data.batches import key
from ..data.transforms import Transform
from ..distributions.columns import CONTINUOUS, Column, Kind, as_columns
from ..distributions.kernel_mixture import KernelMixture
from ..distributions.kernels import KERNELS, Gaussian, Kernel, Product, as_kernel
from ..programs import keyed_rng
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["KernelDensity"]

RULES = ("leave_one_out", "silverman", "scott")
COVARIANCES = ("spherical", "diagonal", "full")
PAIRS = 2**21
"""Queries times points of a step, which bounds its memory; at least `FEWEST` queries."""
FEWEST = 8
TOLD_PAIRS = 2**29
"""The same for the likelihood that a fit without steps tells."""
FEW_DUPLICATES = 0.05
"""Share of duplicated points up to which a leave-one-out fit only warns."""


class KernelDensity(GenerativeModel):
    r"""Kernel density estimate.

    Shapes: x ``(N, *event_shape)``. Bandwidths are standard deviations h in the units of the data (after ``preprocess``) for
    the Gaussian, and what u = (x - x_i) / h is measured in for any kernel; rules of thumb give other kernels the h with which
    they have the Gaussian's variance.

    ``fit({"x": x, "weights": w})`` weighs the points; ``log_prob({"x": x, "row": n})`` leaves point n out (-1: none).
    ``fit({"x": x, "group": g})`` with whole numbers g leaves out, for each datum, all points of its group. Where rows of one
    group are more alike than rows of two (persons, days, exact duplicates too) and new data are new groups, leaving out one
    row alone takes too narrow a bandwidth. ``log_prob({"x": x, "group": g})`` leaves out group g (-1: none).

    Args:
        event_shape: Shape of one datum.
        kernel: ``"gaussian"``, ``"epanechnikov"``, ``"exponential"``, ``"tophat"``, ``"student"``: radial, normalised over
            all features together; or a ``pgen.distributions.kernels.Kernel``: ``Product(Epanechnikov())`` or your own.
        bandwidth: ``"leave_one_out"`` (the default, but for compact kernels), ``"silverman"`` (their default), ``"scott"``; a
            number; a vector, one for each continuous feature; or a matrix H, the covariance of each kernel (units squared).
        covariance: ``"spherical"`` (one bandwidth), ``"diagonal"`` (one a feature) or ``"full"`` (H is a multiple of the
            sample covariance, and learned in full by leave-one-out).
        adaptive: ``"abramson"``: each kernel is scaled by :math:`\lambda_i = (\tilde p(x_i) / g)^{-1/2}`, a pilot by
            the rule of thumb over its geometric mean; ``"nearest"``: by the distance to the k-th nearest point.
        neighbors: k of ``"nearest"``; None for the root of N.
        columns: What each number of x holds, in row-major order, then each of the context: ``"continuous"``, ``"binary"``,
            ``("categorical", K)`` or ``("ordinal", K)`` with values 0, ..., K - 1. All continuous if None.
        floor: Smallest bandwidth, in the units of the data.
        preprocess: Invertible preprocessing of continuous x.
        context_dim: Size of a context c: the model is then p(x | c), a ratio of two kernel estimates.
        count: Number of points, set when a file is read.

    Raises:
        ValueError: From ``fit``, in one line: a constant feature; duplicated points under leave-one-out, which drive the
            bandwidth to zero; a category that was not declared; negative weights.

    Example:
        >>> kde = KernelDensity((1,), bandwidth=1.0)
        >>> run = kde.fit(torch.tensor([[-1.0], [1.0]]))
        >>> kde.log_prob(torch.zeros(1, 1)).value  # log N(1; 0, 1)
        tensor([-1.4189], dtype=torch.float64)
    """

    family = "kernel_density"
    also = ("weights", "row", "group")
    columns_of_context = True
    unit_rows = 4096
    default_steps = 150
    points: Tensor
    weights: Tensor
    groups: Tensor
    local: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        kernel: str | Kernel | Mapping[str, Any] = "gaussian",
        bandwidth: str | float | Sequence[Any] | Tensor | None = None,
        *,
        covariance: str | None = None,
        adaptive: str | None = None,
        neighbors: int | None = None,
        columns: Sequence[Kind] | None = None,
        floor: float = 0.0,
        preprocess: Transform | None = None,
        context_dim: int = 0,
        count: int = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        self.kernel = as_kernel(kernel)
        self.columns = _columns(columns, math.prod(self.event_shape), context_dim)
        self.real = [i for i, column in enumerate(self.columns) if column == CONTINUOUS]
        self.rule, given = _rule(bandwidth, self.kernel, len(self.real))
        self.covariance = _covariance(covariance, given)
        _check_options(adaptive, neighbors, floor, preprocess, self.columns)
        self.adaptive, self.neighbors, self.floor, self.given = adaptive, neighbors, float(floor), given
        if self.real:
            size = () if self.covariance == "spherical" else (len(self.real),)
            self.log_bandwidth = nn.Parameter(torch.zeros(size))
        if self.covariance == "full":
            self.lower = nn.Parameter(torch.zeros(len(self.real), len(self.real)))
        if len(self.real) < len(self.columns):
            self.log_odds = nn.Parameter(torch.zeros(len(self.columns) - len(self.real)))
        self.register_buffer("points", torch.zeros(count, len(self.columns)))
        self.register_buffer("weights", torch.ones(count))
        self.register_buffer("groups", torch.arange(count))
        if adaptive:
            self.register_buffer("local", torch.ones(count))
        if given is not None:
            if float((given.diagonal().sqrt() if given.dim() == 2 else given).min()) <= floor:
                raise ValueError(f"`bandwidth` should lie above the `floor` of {floor}, got {given.flatten()[:4].tolist()}")
            self._set_scale(given)

    @classmethod
    def suggest(cls, x: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """As for every family, but whole numbers get kernels of their own: binary where there are two, else ordinal."""
        found = super().suggest(x, given)
        if "columns" in given or found.get("preprocess") is None or found["preprocess"].kind == "exact":
            return found
        levels = max(int(x.max()), 1) + 1
        return {"columns": ["binary" if levels == 2 else ("ordinal", levels)] * math.prod(x.shape[1:])}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        bandwidth = self.rule if self.given is None else self.given.tolist()
        columns = [*self.columns[self.context_dim :], *self.columns[: self.context_dim]]  # as they are given, the context last
        return {
            "event_shape": list(self.event_shape), "kernel": self.kernel.settings(), "bandwidth": bandwidth,
            "covariance": self.covariance, "adaptive": self.adaptive, "neighbors": self.neighbors,
            "columns": [c[0] if c[0] in ("continuous", "binary") else list(c) for c in columns], "floor": self.floor,
            "context_dim": self.context_dim, "count": len(self.points),
        }  # fmt: skip

    # -- the program --------------------------------------------------------------------------------------------------

    def model(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        weights: Tensor | None = None,
        row: Tensor | None = None,
        group: Tensor | None = None,
    ) -> Tensor:
        """p(x), without the point ``row`` or the ``group`` where one is given; a datum's own weight scales its term."""
        scale = 1.0 if weights is None else weights / self.weights.mean()
        with self.plate(x, context), pyro.poutine.scale(scale=scale):
            return pyro.sample("x", self.distribution(context, row, group), obs=x)

    def guide(
        self,
        x: Tensor | None = None,
        context: Tensor | None = None,
        weights: Tensor | None = None,
        row: Tensor | None = None,
        group: Tensor | None = None,
    ) -> None:
        """Nothing is latent."""

    def distribution(
        self, context: Tensor | None = None, row: Tensor | None = None, group: Tensor | None = None
    ) -> KernelMixture:
        """The mixture; given a context for each datum, of x given it."""
        return KernelMixture(
            self.points, kernel=self.kernel, scale=self._scale(), columns=self.columns, smoothing=self.smoothing,
            weights=self.weights, local=self.local if self.adaptive else None, without=row if group is None else group,
            labels=None if group is None else self.groups, given=context, event_shape=self.event_shape,
        )  # fmt: skip

    @property
    def bandwidth(self) -> Tensor:
        """h, ``()`` or ``(C,)``, or the lower-triangular L with H = L L^T, ``(C, C)``, in the units of preprocessed data."""
        return self._scale().detach()

    def _scale(self) -> Tensor:
        if not self.real:
            return self.points.new_zeros(0)
        scale = (self.floor**2 + (2 * self.log_bandwidth).exp()).sqrt()
        if self.covariance != "full":
            return scale
        return scale[:, None] * (self.lower.tril(-1) + torch.eye(len(scale)).to(scale))  # in units of each feature's scale

    @property
    def smoothing(self) -> Tensor | None:
        r""":math:`\lambda` of each discrete feature."""
        if len(self.real) == len(self.columns):
            return None
        return self.log_odds.sigmoid() * self.log_odds.new_tensor(self._most())

    def _most(self) -> list[float]:
        """The largest smoothing of each discrete feature, at which all categories are alike."""
        return [(k - 1) / k if kind != "ordinal" else 1.0 for kind, k in self.columns if kind != CONTINUOUS[0]]

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(self, data: Any, **options: Any) -> Run:
        r"""Keep the data as points, and set the bandwidth.

        A rule of thumb or a given bandwidth takes no steps; leave-one-out, and any bandwidth where ``steps`` or another way
        of training is asked for, climbs the leave-one-out likelihood from there.

        Args:
            data: x ``(N, *event_shape)``, or ``{"x": x, "weights": w, "group": g, "context": c}``. All of it is kept in memory.
            **options: Those of every ``fit``: ``validation``, ``steps`` (default 150), ``batch_size`` (queries a step),
                ``optimizer``, ``seed``, ``precision`` ...
        """
        if is_source(data):
            raise TypeError("`data` is a data source; a kernel density keeps all points in memory: give an array of them")
        given = dict(data) if isinstance(data, dict) else {"x": data}
        if given.get("row") is not None:
            raise ValueError("`data` has 'row', which says what log_prob leaves out; fit leaves out each datum itself")
        if isinstance(options.get("validation"), (int, float)):
            raise ValueError("`validation` is a share of the data, and leave-one-out holds out each in turn; leave it out")
        rows = len(as_batch(given["x"])) if "x" in given else 0
        self.primed = False
        left_out = {} if given.get("group") is not None else {"row": torch.arange(rows)}
        return super().fit({**given, **left_out}, **options)

    def solve(self, batch: dict[str, Tensor]) -> str:
        """The points and a bandwidth that needs no steps."""
        if self.rule == "leave_one_out":
            return ""
        self._keep(batch)
        return f"kernel density: bandwidth {'given' if self.given is not None else 'by the rule of ' + self.rule.capitalize()}"

    def _rows_to_tell(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some of many data, evenly spread: each costs a sum over all."""
        rows = len(batch["x"])
        some = min(max(FEWEST, TOLD_PAIRS // rows), rows)
        index = torch.linspace(0, rows - 1, some, dtype=torch.float64, device=batch["x"].device).long()
        return {name: value[index] for name, value in batch.items()}

    def prime(self, data: Batch) -> None:
        """The points, and a bandwidth to start at."""
        batch = self._prepared(data)[0]
        if self.kernel.compact and self.rule == "leave_one_out":
            raise ValueError(
                "bandwidth='leave_one_out' needs a kernel that is nowhere zero: with a compact one the likelihood is zero as "
                "soon as a point is alone; take kernel 'gaussian', 'student' or 'exponential', or bandwidth='silverman'"
            )
        with torch.no_grad():
            self._keep(batch)
            self._refuse_duplicates()

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        return Adam(0.1), replace(settings, schedule=settings.schedule or "cosine")

    def _default_batch(self, num_data: int) -> int:
        return max(FEWEST, PAIRS // num_data)

    def changing(self) -> list[Tensor]:
        """None: the points stay what they are."""
        return []

    def _keep(self, batch: dict[str, Tensor]) -> None:
        """Points, weights, starting bandwidth and local scales."""
        x = batch["x"].flatten(1)
        if len(x) < 2:
            raise ValueError(f"`data` has {len(x)} datum; a kernel density needs two or more")
        self.points = (torch.cat([batch["context"], x], 1) if self.context_dim else x).detach().clone()
        self.weights = batch["weights"].to(x) if "weights" in batch else x.new_ones(len(x))
        self.groups = batch["group"].detach().clone() if "group" in batch else torch.arange(len(x), device=x.device)
        if int(self.groups.min()) == int(self.groups.max()):
            raise ValueError(f"`data` has one group, {int(self.groups[0])}, and nothing is left without it; give two or more")
        effective = float(self.weights.double().sum().square() / self.weights.double().square().sum())
        if self.real:
            self._set_scale(self._by_rule(effective) if self.given is None else self.given.to(x.device))
        if self.smoothing is not None:
            share = min(0.5, effective ** (-2 / (4 + len(self.real))))
            self.log_odds.fill_(math.log(share / (1 - share)))
        if self.adaptive:
            self.local = torch.ones_like(self.weights)
            self.local = self._local().to(x)

    def _by_rule(self, effective: float) -> Tensor:
        r"""Silverman's or Scott's h, with the data's own scale: ``()``, ``(C,)`` or covariance ``(C, C)``, float64.

        .. math:: h_d = \sigma_d \left(\frac{4}{D + 2}\right)^{1/(D+4)} n^{-1/(D+4)}, \qquad h_d = \sigma_d n^{-1/(D+4)}
        """
        x, size = self.points[:, self.real].double(), len(self.real)
        share = (self.weights.double() / self.weights.double().sum())[:, None]
        centred = x - (share * x).sum(0)
        deviation = (share * centred.square()).sum(0).sqrt()
        _refuse_constant(deviation, x, self.real)
        factor = effective ** (-1 / (size + 4)) / math.sqrt(_variance(self.kernel, size))
        factor *= 1.0 if self.rule == "scott" else (4 / (size + 2)) ** (1 / (size + 4))
        if self.covariance == "full":
            return factor**2 * (share * centred).T @ centred
        return factor * (deviation if self.covariance == "diagonal" else deviation.square().mean().sqrt())

    def _set_scale(self, bandwidth: Tensor) -> None:
        """Parameters from a bandwidth, or a covariance matrix."""
        bandwidth = bandwidth.detach()
        if bandwidth.dim() == 2:
            bandwidth, failed = torch.linalg.cholesky_ex(bandwidth)
            if bool(failed):
                raise ValueError(
                    "the bandwidth matrix is not positive definite: a feature is a sum of others, or there are too few data; "
                    "drop it, or use covariance='diagonal'"
                )
        scale = bandwidth.diagonal() if bandwidth.dim() == 2 else bandwidth
        with torch.no_grad():
            self.log_bandwidth.copy_(0.5 * (scale.square() - self.floor**2).clamp(min=1e-6 * scale.square()).log())
            if bandwidth.dim() == 2:
                self.lower.copy_((bandwidth / scale[:, None]).tril(-1))

    def _local(self) -> Tensor:
        """Factors of the bandwidth, of geometric mean one, ``(N,)`` float64."""
        if self.adaptive == "abramson":
            log_factor = -0.5 * self._joint().log_prob(self.points.double()).double()
        else:
            k = min(self.neighbors or round(math.sqrt(len(self.points))), len(self.points) - 1)
            distance = _nearest(self._joint(), k)
            if not bool((distance > 0).all()):
                raise ValueError(
                    f"`neighbors` is {k}, and a point has that many duplicates, so its bandwidth is zero; take more "
                    "neighbors, or drop the duplicates and give 'weights'"
                )
            log_factor = distance.log()
        share = self.weights.double() / self.weights.double().sum()
        return (log_factor - (share * log_factor).sum()).exp()

    def _joint(self) -> KernelMixture:
        """The mixture over context and x together, float64, for questions about the points."""
        return KernelMixture(
            self.points.double(), kernel=self.kernel, scale=self.bandwidth.double(), columns=self.columns,
            smoothing=None if self.smoothing is None else self.smoothing.detach().double(), weights=self.weights.double(),
        )  # fmt: skip

    def _refuse_duplicates(self) -> None:
        """Say that duplicated points drive a leave-one-out bandwidth to zero."""
        if self.floor or not self.real:
            return
        x = torch.cat([self.points[:, self.real].double(), self.groups[:, None].double()], 1)
        if len(self.groups.unique()) < len(x):
            x = x.unique(dim=0)  # a duplicate within its own group is left out with it
        share = float(_duplicated(x[:, :-1]).double().mean())
        if not share:
            return
        text = (
            f"{share:.0%} of the points have an exact duplicate, which drives a leave-one-out bandwidth to zero: set a "
            "`floor`, spread rounded values (preprocess=Dequantize(...)), or keep one of each with its count in 'weights'"
        )
        if share > FEW_DUPLICATES:
            raise ValueError(text)
        warnings.warn(text, stacklevel=2)

    # -- what is given ------------------------------------------------------------------------------------------------

    def conditional(self, given: Sequence[int], values: Any) -> KernelMixture:
        """The density of the other columns where those in ``given`` have ``values``, ``(B, len(given))``.

        A distribution over vectors of the columns that are not given, in order: ``log_prob`` and ``sample``.
        """
        self._refuse_empty()
        order, known = self._order(given)
        like = self.points
        values = torch.as_tensor(as_batch(values, name="values")).to(like)
        if values.dim() != 2 or values.shape[1] != known:
            raise ValueError(
                f"`values` should have shape (B, {known}), one for each column in `given`, got {tuple(values.shape)}"
            )
        check_finite(values, "values")
        self._check_codes("values", values, order[:known])
        real = [self.real.index(i) for i in order if i in self.real]
        codes = [i for i in range(len(self.columns)) if i not in self.real]
        scale = self.bandwidth
        if scale.dim() == 1:
            scale = scale[real]
        if scale.dim() == 2:
            covariance = scale.double() @ scale.double().T
            scale = torch.linalg.cholesky(covariance[real][:, real]).to(scale)
        smoothing = None if self.smoothing is None else self.smoothing.detach()[[codes.index(i) for i in order if i in codes]]
        return KernelMixture(
            self.points[:, order], kernel=self.kernel, scale=scale, columns=[self.columns[i] for i in order],
            smoothing=smoothing, weights=self.weights, local=self.local if self.adaptive else None, given=values,
        )  # fmt: skip

    def conditional_log_prob(self, x: Any, given: Sequence[int]) -> Score:
        r"""log p(x_rest | x_given) = log p(x) - log p(x_given), exactly.

        Args:
            x: Data ``(N, *event_shape)``.
            given: Numbers of the columns (row-major) that are conditioned on.
        """
        order, known = self._order(given)
        with torch.no_grad():
            flat = self._batch("x", x)["x"].flatten(1)[:, order]
            value = self.conditional(given, flat[:, :known]).log_prob(flat[:, known:]).double()
        return Score(value, "exact", len(order) - known)

    def conditional_sample(self, values: Any, given: Sequence[int], *, seed: Seed = 0) -> Tensor:
        """Draws of whole data, ``(B, *event_shape)``, whose columns in ``given`` have the ``values``, ``(B, len(given))``."""
        order, _ = self._order(given)
        with torch.no_grad(), keyed_rng(key(as_seed(seed), "conditional"), self.points.device):
            rest = self.conditional(given, values)
            x = torch.cat([rest.given, rest.sample()], 1)  # type: ignore[list-item]
        return x[:, torch.argsort(torch.tensor(order))].reshape(-1, *self.event_shape)

    def _order(self, given: Sequence[int]) -> tuple[list[int], int]:
        """Columns, given ones first, and how many those are."""
        total = len(self.columns)
        if self.context_dim or self.preprocess is not None:
            raise ValueError("`given` goes with a model without context and without preprocess; ask for log_prob(x, context)")
        columns = given.tolist() if isinstance(given, Tensor) else list(given) if isinstance(given, Iterable) else []
        if not columns or len(set(columns)) < len(columns) or not set(columns) < set(range(total)):
            raise ValueError(f"`given` should be some, not all, of the columns 0 to {total - 1}, each once, got {given!r}")
        columns = [int(i) for i in columns]
        return columns + [i for i in range(total) if i not in columns], len(columns)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _checked(self, argument: str, x: Any, context: Any, numbers: Tensor | None = None) -> dict[str, Tensor]:
        batch = super()._checked(argument, x, context, numbers)
        whole = torch.cat([batch["context"], batch["x"].flatten(1)], 1) if self.context_dim else batch["x"].flatten(1)
        self._check_codes(argument, whole, range(len(self.columns)))
        return batch

    def _check_codes(self, argument: str, values: Tensor, columns: Sequence[int]) -> None:
        """Refuse values ``(N, len(columns))`` of these columns that their kernels do not know."""
        for i, value in zip(columns, values.unbind(1)):
            kind, size = self.columns[i]
            bad = (value != value.round()) | (value < 0) | (value >= size)
            if kind != CONTINUOUS[0] and bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"`{argument}` row {row} holds {float(value[row]):g} in column {i}, declared as {kind} with values "
                    f"0 to {size - 1}; declare more values, or number the categories 0, 1, ..."
                )

    def _asked(self, seed: Seed, compile: str, progress: bool) -> dict[str, Any]:
        self._refuse_empty()
        return super()._asked(seed, compile, progress)

    def _measure(self, batch: Batch) -> Measure:
        self._refuse_empty()
        asked = cast(dict[str, Tensor], batch)
        self._check_left_out(asked.get("row"))
        self._check_group(asked.get("group"))
        return super()._measure(batch)

    def _check_group(self, group: Tensor | None) -> None:
        bad = torch.zeros(0) if group is None else group[(group >= 0) & ~torch.isin(group, self.groups)]
        if len(bad):
            raise ValueError(
                f"`group` has {int(bad[0])}, which no point has; groups are those of the fit, and -1 leaves none out"
            )

    def _check_left_out(self, row: Tensor | None) -> None:
        bad = torch.zeros(0) if row is None else row[(row < -1) | (row >= len(self.points))]
        if len(bad):
            raise ValueError(f"`row` has {int(bad[0])}; points are 0 to {len(self.points) - 1}, and -1 leaves none out")

    def _check_support(self, batch: Batch, numbers: Tensor | None = None) -> None:
        """Done already: codes are checked with the rest of the input, and other columns take any number."""

    def _refuse_empty(self) -> None:
        if not len(self.points):
            raise ValueError("this KernelDensity has no points yet; call fit(x) first")

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        found = super()._further(x, given)
        if "weights" in found:
            weights = found["weights"]
            if weights.dim() != 1 or not bool(torch.isfinite(weights).all()) or bool((weights <= 0).any()):
                raise ValueError("`weights` should be positive and finite, one a datum; drop data that should not count")
            found["weights"] = weights.double() if not weights.is_floating_point() else weights
        if "row" in found and (found["row"].dim() != 1 or found["row"].is_floating_point()):
            raise ValueError("`row` should be the integer number of the point that each datum leaves out, -1 for none")
        if "group" in found and (found["group"].dim() != 1 or found["group"].is_floating_point()):
            got = f"{found['group'].dtype} of shape {tuple(found['group'].shape)}"
            raise ValueError(f"`group` should be whole numbers, one a datum, shape (N,): the group that it is of; got {got}")
        return found

    def save(self, path: str | Path) -> None:
        """Write settings, points and bandwidths to one file; a kernel of your own cannot be named in it."""
        named = self.kernel.base if isinstance(self.kernel, Product) else self.kernel
        if named.name not in KERNELS:
            raise ValueError(
                f"`kernel` is a {type(named).__name__} of your own, which a file cannot name; save its points instead"
            )
        super().save(path)


def _columns(columns: Sequence[Kind] | None, size: int, context: int) -> tuple[Column, ...]:
    """What each joint column holds, the context's first."""
    if columns is None:
        return (CONTINUOUS,) * (context + size)
    found = as_columns(columns, size + context if len(columns) == size + context else size)
    return tuple([*(found[size:] or [CONTINUOUS] * context), *found[:size]])


def _rule(bandwidth: Any, kernel: Kernel, size: int) -> tuple[str, Tensor | None]:
    """The rule, and what was given."""
    if bandwidth is None:
        return "silverman" if kernel.compact else "leave_one_out", None
    if isinstance(bandwidth, str):
        check_choice("bandwidth", bandwidth, RULES)
        return bandwidth, None
    try:
        given = torch.as_tensor(bandwidth, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError):
        raise ValueError(f"`bandwidth` should be a number, {size} of them or a matrix, got {bandwidth!r:.60}") from None
    if given.shape not in ((), (size,), (size, size)):
        raise ValueError(
            f"`bandwidth` should be a number, {size} of them or a {size} x {size} matrix, got {tuple(given.shape)}"
        )
    positive = given.diagonal() if given.dim() == 2 else given
    if not bool(torch.isfinite(given).all()) or not bool((positive > 0).all()):
        raise ValueError(f"`bandwidth` should be positive and finite, got {given.flatten()[:4].tolist()}")
    return "given", given


def _covariance(covariance: str | None, given: Tensor | None) -> str:
    natural = "diagonal" if given is None else COVARIANCES[given.dim()]
    check_choice("covariance", covariance or natural, COVARIANCES)
    if given is not None and covariance not in (None, natural):
        raise ValueError(f"`covariance` is {covariance!r}, but the bandwidth given is {natural}; leave it out")
    return covariance or natural


def _check_options(
    adaptive: str | None, neighbors: int | None, floor: float, preprocess: Transform | None, columns: Sequence[Column]
) -> None:
    if adaptive is not None:
        check_choice("adaptive", adaptive, ("abramson", "nearest"))
    check_positive("neighbors", neighbors, allow_none=True)
    if neighbors is not None and adaptive != "nearest":
        raise ValueError("`neighbors` goes with adaptive='nearest'; leave it out")
    if not math.isfinite(floor) or floor < 0:
        raise ValueError(f"`floor` should be zero or a smallest bandwidth in the units of the data, got {floor}")
    discrete = any(column != CONTINUOUS for column in columns)
    if discrete and preprocess is not None:
        raise ValueError("`preprocess` goes with continuous features alone; per-feature bandwidths need no standardisation")
    if adaptive and CONTINUOUS not in columns:
        raise ValueError(f"`adaptive` is {adaptive!r}, and there is no continuous feature whose bandwidth could adapt")


def _variance(kernel: Kernel, size: int) -> float:
    return 1.0 if isinstance(kernel, Gaussian) else kernel.variance(size)


def _refuse_constant(deviation: Tensor, x: Tensor, real: list[int]) -> None:
    constant = (deviation <= 1e-10 * x.abs().amax(0)).nonzero()
    if len(constant):
        raise ValueError(
            f"`data` is constant in column {real[int(constant[0, 0])]}, and a bandwidth is taken from the spread of its "
            "column, which is zero: drop it, declare it in `columns` as categorical, or give a `bandwidth`"
        )


def _duplicated(x: Tensor) -> Tensor:
    """Whether each row has an exact duplicate, ``(N,)``."""
    with keyed_rng(key(0, "duplicates"), x.device):
        code = (x * torch.rand(x.shape[1], dtype=x.dtype, device=x.device)).sum(1)
    order = code.argsort()
    same = (x[order][1:] == x[order][:-1]).all(1)
    pad = same.new_zeros(1)
    return torch.cat([pad, same]) | torch.cat([same, pad])


def _nearest(mixture: KernelMixture, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other, in bandwidths, ``(N,)``."""
    white = torch.linalg.solve_triangular(_lower(mixture), mixture.points[:, _real(mixture)].T, upper=False).T
    chunk = max(1, 2**22 // len(white))
    return torch.cat([torch.cdist(part, white).topk(k + 1, largest=False).values[:, -1] for part in white.split(chunk)])


def _real(mixture: KernelMixture) -> list[int]:
    return [i for i, column in enumerate(mixture.columns) if column == CONTINUOUS]


def _lower(mixture: KernelMixture) -> Tensor:
    scale = mixture.scale
    return scale if scale.dim() == 2 else torch.diag_embed(scale.expand(len(_real(mixture))))
