r"""A mixture of one kernel at each of many points, summed in bounded memory.

.. math:: p(x) = \sum_i w_i \, \frac{1}{|\lambda_i L|} K\bigl((\lambda_i L)^{-1} (x_c - x_{ic})\bigr)
    \prod_{j \in \text{discrete}} K_j(x_j \mid x_{ij})

Sums run over blocks of queries and points with an online log-sum-exp, so memory does not grow with either. A Gaussian kernel
is evaluated through one matrix product a block, :math:`-\tfrac12 |u - v|^2 = u \cdot v - \tfrac12 |v|^2 - \tfrac12 |u|^2`,
whose cancellation costs :math:`\epsilon |u| |v|` nats: each block of queries takes the first of float32, float64 and direct
differences whose bound is below 1e-4 (float32) or 1e-10 nats (float64).

In up to three dimensions many points and queries are put in an order in which blocks are small boxes. A block of queries then
takes blocks of points from the nearest on, and stops at the first that cannot add a part in 1e15 to any of its sums.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..machine import prefers_onednn
from .columns import CONTINUOUS, Column
from .kernels import Gaussian, Kernel, Radial

__all__ = ["KernelMixture", "log_table"]


QUERIES, POINTS = 512, 2048
"""A block on the CPU: its numbers stay in the cache."""
FAR = 20
"""A block on a GPU is this many times larger."""
CROWD, FEW = 8, 3
"""So many blocks of points or more, in so few dimensions or fewer, are ordered by place..."""
SPREAD = {True: 2.0, False: 12.0}
"""... where they are spread over so many bandwidths, for a compact kernel and a Gaussian one: their standard deviation."""
THIN = 8
"""A block of such queries is so much smaller."""
NOTHING = 45.0
"""Nats below a sum at which the bound of a whole block adds nothing to it."""
ALLOWED = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Largest error of a product form that is taken, in nats."""


def log_table(column: Column, smoothing: Tensor) -> Tensor:
    r"""log K(x | y) of a discrete column, ``(K, K)``: x in rows, each column y sums to one.

    *categorical* and *binary*: :math:`1 - \lambda` at x = y, else :math:`\lambda / (K - 1)` (Aitchison and Aitken 1976,
    Biometrika 63:413).
    *ordinal*: :math:`1 - \lambda` at x = y, else :math:`\tfrac12 (1 - \lambda) \lambda^{|x - y|}` (Wang and van Ryzin 1981,
    Biometrika 68:301), over the K values alone and normalised there for each y.

    Args:
        column: Its kind and number of values.
        smoothing: :math:`\lambda` in (0, 1), for categories at most (K - 1) / K.

    Example:
        >>> log_table(("categorical", 3), torch.tensor(0.5)).exp()[:, 0]
        tensor([0.5000, 0.2500, 0.2500])
    """
    kind, values = column
    codes = torch.arange(values, device=smoothing.device)
    apart = (codes[:, None] - codes).abs()
    off = smoothing.log() - math.log(max(values - 1, 1)) if kind != "ordinal" else apart * smoothing.log() - math.log(2)
    table = torch.where(apart == 0, torch.zeros_like(off + apart), off + apart * 0)
    if kind != "ordinal":
        return torch.where(apart == 0, torch.log1p(-smoothing), table)
    return table - torch.logsumexp(table, 0)


class KernelMixture(dist.TorchDistribution):
    r"""The mixture above, over arrays of ``event_shape``.

    Shapes: points ``(N, D)``; batch ``()``, or ``(B,)`` where ``without`` or ``given`` say something of each datum.

    Args:
        points: The centres, ``(N, D)``.
        kernel: K of the continuous columns.
        scale: Standard deviations h ``()`` or ``(C,)``, or a lower-triangular L ``(C, C)``, of the C continuous columns, in
            the units of the points.
        columns: What each column holds; all continuous if empty.
        smoothing: :math:`\lambda` of each discrete column, in order.
        weights: Non-negative weights of the points, ``(N,)``; equal if None.
        local: Factor :math:`\lambda_i` of each point's scale, ``(N,)``; 1 if None.
        without: Number of the point that each datum leaves out, ``(B,)``; -1 for none.
        labels: Label of each point, ``(N,)``, not negative; ``without`` then names the label whose points are all left out.
        given: Values of the *first* columns that each datum is conditioned on, ``(B, m)``.
        event_shape: Shape of one datum; its numbers are the columns that are not given.

    References:
        Silverman (1986), eq. 4.2; Abramson (1982), Annals of Statistics 10:1217, for ``local``.

    Example:
        >>> KernelMixture(torch.tensor([[-1.0], [1.0]]), kernel=Gaussian(), scale=torch.tensor(1.0)).log_prob(torch.zeros(1))
        tensor(-1.4189)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self,
        points: Tensor,
        *,
        kernel: Kernel,
        scale: Tensor,
        columns: Sequence[Column] = (),
        smoothing: Tensor | None = None,
        weights: Tensor | None = None,
        local: Tensor | None = None,
        without: Tensor | None = None,
        labels: Tensor | None = None,
        given: Tensor | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        self.labels = labels
        self.points, self.kernel, self.scale, self.smoothing = points, kernel, scale, smoothing
        self.columns = tuple(columns) or (CONTINUOUS,) * points.shape[1]
        self.weights, self.local, self.without, self.given = weights, local, without, given
        rows = without if without is not None else given
        known = 0 if given is None else given.shape[-1]
        shape = torch.Size(event_shape or (points.shape[1] - known,))
        super().__init__(torch.Size(() if rows is None else rows.shape[:1]), shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All finite values (whole numbers where no column is continuous); a compact kernel is zero on some of them."""
        each = constraints.real if CONTINUOUS in self.columns else constraints.nonnegative_integer
        return constraints.independent(each, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> KernelMixture:
        """The same for each of a batch."""
        new = copy.copy(self)
        new._batch_shape = torch.Size(batch_shape)
        return new

    # -- density ------------------------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(x) in nats, ``(*batch, *event_shape)`` to ``(*batch,)``."""
        batch = value.shape[: value.dim() - len(self.event_shape)]
        x = value.reshape(-1, self.event_shape.numel())
        if self.given is None:
            return self._sum(self.columns, x).reshape(batch)
        given = self.given.expand(len(x), -1)
        joint = self._sum(self.columns, torch.cat([given, x], -1))
        return (joint - self._sum(self.columns[: given.shape[-1]], given)).reshape(batch)

    def _sum(self, columns: Sequence[Column], x: Tensor) -> Tensor:
        """log p of the first columns."""
        sum_ = _Sum(self, columns)
        held = (x, self.points, self.scale, self.smoothing)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in held):
            return sum_.at_once(x.double()).to(x.dtype)
        return sum_.streamed(x).to(x.dtype)

    # -- samples ------------------------------------------------------------------------------------------------------

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw a point by its weight (given the first columns, by its responsibility for them), then an offset."""
        shape = torch.Size(sample_shape) + self._batch_shape
        with torch.no_grad():
            if self.given is None:
                x = self._drawn(self._chosen(shape), None)
            else:
                given = self.given.expand(*shape, -1).reshape(-1, self.given.shape[-1])
                chosen = _Sum(self, self.columns[: given.shape[-1]]).chosen(given)
                x = self._drawn(chosen, given)[..., given.shape[-1] :]
        return x.reshape(*shape, *self.event_shape)

    def _chosen(self, shape: torch.Size) -> Tensor:
        uniform = torch.rand(shape, dtype=torch.float64, device=self.points.device)
        if self.weights is None:
            return (uniform * len(self.points)).long().clamp(max=len(self.points) - 1)
        total = self.weights.double().cumsum(0)
        return torch.searchsorted(total, uniform * total[-1], right=True).clamp(max=len(self.points) - 1)

    def _drawn(self, chosen: Tensor, given: Tensor | None) -> Tensor:
        """Draws around chosen points, of all columns; the given ones are copied."""
        near = self.points[chosen]
        known = 0 if given is None else given.shape[-1]
        real = [i for i, column in enumerate(self.columns) if column == CONTINUOUS]
        lower = _triangular(self.scale, len(real)).to(near)
        factor = 1.0 if self.local is None else self.local[chosen][..., None]
        if given is None or not any(i < known for i in real):
            u = self.kernel.sample(near[..., real])
        else:
            fixed = [i for i in real if i < known]
            offset = (given[..., fixed] - near[..., fixed]) / factor
            ug = torch.linalg.solve_triangular(lower[: len(fixed), : len(fixed)], offset.T, upper=False).T
            u = torch.cat([ug, self.kernel.sample_rest(ug, near[..., real[len(fixed) :]])], -1)
        columns = list(near.unbind(-1))
        for i, value in zip(real, (near[..., real] + factor * (u @ lower.T)).unbind(-1)):
            columns[i] = value
        for number, i in enumerate(i for i, column in enumerate(self.columns) if column != CONTINUOUS):
            columns[i] = self._code(self.columns[i], number, near[..., i])
        return torch.cat([given if given is not None else near[..., :0], torch.stack(columns, -1)[..., known:]], -1)

    def _code(self, column: Column, number: int, centre: Tensor) -> Tensor:
        """Draws of a discrete column."""
        assert self.smoothing is not None
        below = log_table(column, self.smoothing[number].double()).exp().cumsum(0)
        uniform = torch.rand(centre.shape, dtype=torch.float64, device=centre.device)
        return (uniform[..., None] > below.T[centre.long()][..., :-1]).sum(-1).to(centre.dtype)


class _Sum:
    """The sum over points, of some first columns of a mixture."""

    def __init__(self, mixture: KernelMixture, columns: Sequence[Column]) -> None:
        whole = [i for i, column in enumerate(mixture.columns) if column == CONTINUOUS]
        self.mixture, self.all_columns = mixture, columns
        self.boxes: _Boxes | None = None
        self.real = [i for i in whole if i < len(columns)]
        run = bool(self.real) and self.real == list(range(self.real[0], self.real[-1] + 1))
        self.place: slice | list[int] = slice(self.real[0], self.real[-1] + 1) if run else self.real
        self.codes = [(i, c) for i, c in enumerate(columns) if c != CONTINUOUS]
        dim = len(self.real)
        partial = 0 < dim < len(whole)
        self.kernel = mixture.kernel.marginal(len(whole), dim) if partial else mixture.kernel
        lower = _triangular(mixture.scale.double(), len(whole))[:dim, :dim]
        self.log_volume = lower.diagonal().log().sum()
        self.whiten = torch.linalg.solve_triangular(lower, torch.eye(dim).to(lower), upper=False).T
        self.centre = mixture.points[:, self.place].mean(0, dtype=torch.float64)
        smoothing = mixture.smoothing
        self.tables = [log_table(c, smoothing[k].double()) for k, (_, c) in enumerate(self.codes) if smoothing is not None]
        weights, total = mixture.weights, math.log(max(len(mixture.points), 1))
        self.log_total = total if weights is None else weights.double().sum().log()

    # -- parts of a block ---------------------------------------------------------------------------------------------

    def _white(self, x: Tensor) -> Tensor:
        """L^-1 (x - centre), float64."""
        return (x[:, self.place].double() - self.centre) @ self.whiten

    def _height(self, part: slice) -> Tensor:
        """log w_i - log |local_i L|, ``(p,)``."""
        m = self.mixture
        log_weight = -self.log_volume.expand(len(m.points[part])) - self.log_total
        if m.weights is not None:
            log_weight = log_weight + m.weights[part].double().log()
        return log_weight if m.local is None else log_weight - len(self.real) * m.local[part].double().log()

    def _query_codes(self, x: Tensor) -> list[Tensor]:
        """Rows of the tables, ``(q, K)`` each."""
        return [table[x[:, i].long()] for (i, _), table in zip(self.codes, self.tables)]

    def _point_codes(self, part: slice) -> list[Tensor]:
        """Ones at the points' own values, ``(p, K)`` each."""
        values = self.mixture.points[part]
        return [(values[:, i, None] == torch.arange(c[1]).to(values)).double() for i, c in self.codes]

    def _by_product(self, x: Tensor, u: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
        """log of each weighted kernel, ``(q, p)``, Gaussian, less |u|^2 / 2 where all points have one scale."""
        v, local = self._white(self.mixture.points[part]), self.mixture.local
        inverse = v.new_ones(1, 1) if local is None else local[part].double().square().reciprocal()[:, None]
        bias = self._height(part) - 0.5 * (v.square() * inverse).sum(1) - 0.5 * u.shape[1] * math.log(2 * math.pi)
        left, right = [u, *self._query_codes(x)], [v * inverse, *self._point_codes(part)]
        if local is not None:
            left, right = [*left, u.square().sum(1, keepdim=True)], [*right, -0.5 * inverse]
        return _product(torch.cat(left, 1).to(dtype), torch.cat(right, 1).to(dtype), bias.to(dtype))

    def _by_difference(self, x: Tensor, u: Tensor, part: slice) -> Tensor:
        """log of each weighted kernel, ``(q, p)``, from differences of coordinates."""
        v, local = self._white(self.mixture.points[part]), self.mixture.local
        if not u.shape[1]:
            log_kernel = u.new_zeros(len(u), len(v))
        elif isinstance(self.kernel, Radial):
            distance = torch.cdist(u, v, compute_mode="donot_use_mm_for_euclid_dist")
            distance = distance if local is None else distance / local[part].double()
            log_kernel = self.kernel.log_profile(distance.square(), u.shape[1])
        else:
            offset = u[:, None] - v
            log_kernel = self.kernel.log_density(offset if local is None else offset / local[part].double()[:, None])
        log_kernel = log_kernel + self._height(part)
        for left, right in zip(self._query_codes(x), self._point_codes(part)):
            log_kernel = log_kernel + left @ right.T
        return log_kernel

    def _mask(self, block: Tensor, rows: slice, start: int) -> Tensor:
        """-inf where a datum leaves a point out."""
        without, labels = self.mixture.without, self.mixture.labels
        if without is None:
            return block
        part = slice(start, start + block.shape[1])
        numbers = torch.arange(part.start, part.stop, device=block.device) if labels is None else labels[part]
        return block.masked_fill(without[rows, None] == numbers, -math.inf)

    def _left(self, rows: slice) -> Tensor | float:
        """log of the share of the weight that remains where points are left out."""
        m = self.mixture
        if m.without is None:
            return 0.0
        out = m.without[rows]
        weights = m.points.new_ones(len(m.points)).double() if m.weights is None else m.weights.double()
        if m.labels is None:
            left_out = weights[out.clamp(min=0)]
        else:
            left_out = ((out[:, None] == m.labels) * weights).sum(1)
        return torch.log1p(-torch.where(out >= 0, left_out, 0.0) / weights.sum())

    # -- sums ---------------------------------------------------------------------------------------------------------

    def at_once(self, x: Tensor) -> Tensor:
        """With gradients: float64, one block, nothing that depends on the data's values."""
        u, everything = self._white(x), slice(0, len(self.mixture.points))
        if isinstance(self.kernel, Gaussian):
            block = self._by_product(x, u, everything, torch.float64)
            shift = 0.0 if self.mixture.local is not None else -0.5 * u.square().sum(1)
        else:
            block, shift = self._by_difference(x, u, everything), 0.0
        return torch.logsumexp(self._mask(block, slice(0, len(x)), 0), 1) + shift - self._left(slice(0, len(x)))

    def streamed(self, x: Tensor) -> Tensor:
        """In blocks; float64."""
        if len(x) < QUERIES or not self._sparse():
            return self._in_order(x)
        order, out = _by_place(self._white(x), QUERIES // THIN), x.new_zeros(len(x), dtype=torch.float64)
        out[order] = self._placed()._in_order(x[order])
        return out

    def _sparse(self) -> bool:
        """Whether most points are too far from a place to be seen there, and their order is worth making."""
        m, kernel = self.mixture, self.kernel
        if len(m.points) < CROWD * POINTS or not 0 < len(self.real) <= FEW or m.without is not None or m.points.is_cuda:
            return False
        bounded = isinstance(kernel, Gaussian) or (kernel.compact and isinstance(kernel, Radial))
        return bounded and float(self._white(m.points).std(0).amax()) > SPREAD[kernel.compact]

    def _placed(self) -> _Sum:
        """The same sum with the points in an order of place, whose blocks have boxes."""
        m = copy.copy(self.mixture)
        order = _by_place(self._white(m.points), POINTS)
        m.points = m.points[order]
        m.weights, m.local = (None if t is None else t[order] for t in (m.weights, m.local))
        placed = _Sum(m, self.all_columns)
        placed.boxes = _Boxes.of(placed, m.points)
        return placed

    def _in_order(self, x: Tensor) -> Tensor:
        out, reach = [], self._reach()
        queries = self._block(x)[0] // (1 if self.boxes is None else THIN)
        for start in range(0, len(x), queries):
            rows = slice(start, min(start + queries, len(x)))
            part = x[rows]
            u = self._white(part)
            how = self._how(u, reach, x.dtype)
            out.append(self._rows(part, u, rows, how) - self._left(rows))
        return torch.cat(out) if out else x.new_zeros(0, dtype=torch.float64)

    def _rows(self, x: Tensor, u: Tensor, rows: slice, how: torch.dtype | None) -> Tensor:
        """Online log-sum-exp over the points."""
        top = u.new_full((len(x), 1), -math.inf)
        total = torch.zeros_like(top)
        shift = -0.5 * u.square().sum(1) if how is not None and self.mixture.local is None else u.new_zeros(len(u))
        for start, part, most in self._nearest_first(x, u):
            if most == -math.inf or most < float((top[:, 0] + shift).amin()) - NOTHING:
                break
            block = self._by_difference(x, u, part) if how is None else self._by_product(x, u, part, how)
            block = self._mask(block, rows, start)
            new = torch.maximum(top, block.amax(1, keepdim=True).double())
            base = torch.where(new == -math.inf, 0.0, new)
            # Arguments far below are held where the exponential is fast; what they add is nothing.
            terms = block.sub_(base.to(block.dtype)).clamp_(min=-80.0 if block.dtype == torch.float32 else -700.0).exp_()
            total = total * (top - base).exp() + terms.sum(1, keepdim=True)
            top = new
        return torch.where(top == -math.inf, top, top + total.log())[:, 0] + shift

    def chosen(self, x: Tensor) -> Tensor:
        """Draws of a point for each datum, by its responsibility (Gumbel's maximum, over blocks)."""
        out = []
        queries, _ = self._block(x)
        for part in x.split(queries):
            u = self._white(part)
            best = u.new_full((len(part),), -math.inf)
            index = torch.zeros(len(part), dtype=torch.long, device=x.device)
            for start, points in self._parts(part):
                block = self._by_difference(part, u, points)
                high, at = (block - torch.empty_like(block).exponential_().log()).max(1)
                best, index = torch.maximum(best, high), torch.where(high > best, at + start, index)
            if bool((best == -math.inf).any()):
                row = int((best == -math.inf).nonzero()[0, 0])
                raise ValueError(
                    f"`given` row {row} has density zero: no point lies within a bandwidth of it; take a kernel without "
                    "bounds, such as 'gaussian', or a larger bandwidth"
                )
            out.append(index)
        return torch.cat(out)

    def _nearest_first(self, x: Tensor, u: Tensor) -> Iterator[tuple[int, slice, float]]:
        """Blocks of points, and the most that any of them adds to a query's sum: from the most on, where that is known."""
        parts = self._parts(x)
        most = [math.inf] * len(parts) if self.boxes is None else self.boxes.most(u, self.kernel).tolist()
        for k in sorted(range(len(parts)), key=lambda k: -most[k]):
            yield *parts[k], most[k]

    def _parts(self, x: Tensor) -> list[tuple[int, slice]]:
        _, points = self._block(x)
        total = len(self.mixture.points)
        return [(start, slice(start, min(start + points, total))) for start in range(0, total, points)]

    def _block(self, x: Tensor) -> tuple[int, int]:
        """Queries and points of a block."""
        far = FAR if x.device.type != "cpu" else 1
        wide = 1 if isinstance(self.kernel, Radial) or not self.real else len(self.real)
        return max(1, QUERIES * (2 if far > 1 else 1) // min(wide, 16)), max(1, POINTS * far // -(-wide // 16))

    def _reach(self) -> tuple[float, float]:
        """The largest |v| over its local scale, and one over the smallest local scale."""
        local, longest = self.mixture.local, 0.0
        if not isinstance(self.kernel, Gaussian):
            return math.inf, 1.0
        for _, part in self._parts(self.mixture.points):
            length = self._white(self.mixture.points[part]).square().sum(1).sqrt()
            longest = max(longest, float((length if local is None else length / local[part].double()).max()))
        return longest, 1.0 if local is None else float(1 / local.min())

    def _how(self, u: Tensor, reach: tuple[float, float], dtype: torch.dtype) -> torch.dtype | None:
        """The precision of the product form, None for differences."""
        longest = max(float(u.square().sum(1).max().sqrt()) * reach[1], reach[0])
        for candidate in (torch.float32, torch.float64):
            fine = torch.finfo(candidate).eps * longest * reach[0] < ALLOWED[dtype]
            if fine and (candidate == torch.float64 or dtype == torch.float32):
                return candidate
        return None


@dataclass(frozen=True)
class _Boxes:
    """Where the points of each block lie: corners ``(P, C)``, log of their total height ``(P,)`` and largest local scale."""

    low: Tensor
    high: Tensor
    height: Tensor
    widest: Tensor

    @classmethod
    def of(cls, sum_: _Sum, points: Tensor) -> _Boxes:
        """Of a sum's blocks."""
        found = []
        for _, part in sum_._parts(points):
            v, local = sum_._white(points[part]), sum_.mixture.local
            widest = v.new_ones(()) if local is None else local[part].double().amax()
            found.append((v.amin(0), v.amax(0), torch.logsumexp(sum_._height(part), 0), widest))
        return cls(*(torch.stack(column) for column in zip(*found)))

    def most(self, u: Tensor, kernel: Kernel) -> Tensor:
        """Bound on the log of what a block's points add at any of the places u, ``(P,)``."""
        gap = (self.low - u.amax(0)).clamp(min=0) + (u.amin(0) - self.high).clamp(min=0)
        squared = (gap / self.widest[:, None]).square().sum(1)
        return self.height + cast(Radial, kernel).log_profile(squared, u.shape[1])


def _by_place(u: Tensor, size: int) -> Tensor:
    """An order in which runs of ``size`` places lie near each other: cut in halves across the widest axis, again and again."""

    def halves(rows: Tensor) -> list[Tensor]:
        if len(rows) <= size:
            return [rows]
        place = u[rows]
        rows = rows[place[:, (place.amax(0) - place.amin(0)).argmax()].argsort()]
        middle = -(-len(rows) // size) // 2 * size
        return halves(rows[:middle]) + halves(rows[middle:])

    return torch.cat(halves(torch.arange(len(u), device=u.device)))


def _triangular(scale: Tensor, dim: int) -> Tensor:
    """The lower-triangular L of any scale."""
    return scale if scale.dim() == 2 else torch.diag_embed(scale.expand(dim))


def _product(left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    """left @ right.T + bias, by the library that is faster here."""
    if left.dtype == torch.float32 and left.device.type == "cpu" and prefers_onednn() and left.shape[1]:
        return torch.ops.mkldnn._linear_pointwise.default(left, right, bias, "none", [], "")
    return torch.addmm(bias, left, right.T)
