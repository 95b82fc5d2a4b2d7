r"""Maximum entropy: the most general distribution with given moments.

Of all distributions on a domain with :math:`\mathbb{E}[f_k(x)] = m_k`, that of largest entropy relative to a base measure h is

.. math:: p(x) = h(x) \exp\Bigl( \sum_k \lambda_k f_k(x) - \log Z(\lambda) \Bigr), \qquad
    Z(\lambda) = \int h(x) \exp\Bigl( \sum_k \lambda_k f_k(x) \Bigr) dx

and the multipliers minimise the convex dual :math:`\log Z(\lambda) - \lambda^\top m`, whose gradient is
:math:`\mathbb{E}_p[f] - m` and whose Hessian is the covariance of f: Newton's method. With m the means of f over data, that is
maximum likelihood. Z is a sum over a finite domain, or one over the nodes of a double-exponential quadrature.

Jaynes (1957), Information theory and statistical mechanics, doi:10.1103/PhysRev.106.620;
Takahasi and Mori (1974), Double exponential formulas for numerical integration, doi:10.2977/prims/1195192451.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..base import GenerativeModel
from ..contracts import Batch, check_choice, nearest
from ..training import Adam, Training

__all__ = ["FEATURES", "MaximumEntropy"]

Feature = str | Sequence[Any] | Callable[[Tensor], Tensor]


def _pairs(x: Tensor) -> Tensor:
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1).to(x.device)
    return x[:, first] * x[:, second]


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "x": lambda x: x,
    "x^2": lambda x: x.square(),
    "x^3": lambda x: x**3,
    "x^4": lambda x: x**4,
    "|x|": lambda x: x.abs(),
    "log x": lambda x: x.log(),
    "log(1-x)": lambda x: torch.log1p(-x),
    "log(1+x^2)": lambda x: torch.log1p(x.square()),
    "cos x": lambda x: x.cos(),
    "sin x": lambda x: x.sin(),
    "pairs": _pairs,
}
"""Features by name, of each number of x; ``"pairs"`` are the products of two different ones."""

BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "1/x!": lambda x: -torch.lgamma(x + 1).sum(1),
    "exp(-x^2/2)": lambda x: -0.5 * x.square().sum(1),
}
"""Logarithms of base measures by name."""

DOMAINS = {"real": (-math.inf, math.inf), "positive": (0.0, math.inf), "unit": (0.0, 1.0)}
NODES = (1025, 129, 65)
"""Nodes for each number of x and piece of its interval, where x has one, two or three numbers."""
MOST_STATES = 2**20
FAR = 1e8
"""How far the quadrature of an infinite side reaches, in units of the distribution's width."""


class MaximumEntropy(GenerativeModel):
    r"""The distribution of largest entropy that has the moments of the data, or those given.

    Shapes: x ``(N, *event_shape)``; a finite domain has at most :math:`2^{20}` states, an interval at most three numbers.

    Args:
        event_shape: Shape of one datum.
        features: Each a name of ``FEATURES`` (such as ``"x"`` or ``"pairs"``), ``("indicator", low, high)`` for
            :math:`1[low \le x < high]`, or a function from x ``(N, *event_shape)`` to ``(N,)`` or ``(N, K)``. A model with
            functions of your own cannot be saved.
        domain: The interval of each number of x: ``"real"``, ``"positive"``, ``"unit"``, or (low, high).
        values: Instead of an interval the values that each number takes: ``range(1, 7)``; ``(0, 1)`` for binary x.
        base: Logarithm of h: ``"1/x!"``, ``"exp(-x^2/2)"`` or a function of x; the constant 1 by default.
        edges: Where functions of your own jump or have a kink, so that the quadrature starts anew there.

    Raises:
        ValueError: From ``fit`` and ``match``, if no distribution on the domain has the moments, in one line.

    Example:
        >>> dice = MaximumEntropy((1,), ["x"], values=range(1, 7))
        >>> dice.match({"x": 4.5})  # Jaynes' dice: probabilities grow by a factor of 1.449 from face to face
        >>> dice.log_prob(torch.arange(1.0, 7.0)[:, None]).value.exp().round(decimals=4)
        tensor([0.0544, 0.0788, 0.1142, 0.1654, 0.2398, 0.3475], dtype=torch.float64)
        >>> normal = MaximumEntropy((1,), ["x", "x^2"])
        >>> normal.match([0.0, 1.0])
        >>> round(normal.entropy(), 6)  # 0.5 log(2 pi e)
        1.418939
    """

    family = "maximum_entropy"
    loc: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        features: Sequence[Feature] = ("x", "x^2"),
        domain: str | Sequence[float | None] | None = None,
        *,
        values: Sequence[float] | None = None,
        base: str | Callable[[Tensor], Tensor] | None = None,
        edges: Sequence[float] = (),
    ) -> None:
        super().__init__(event_shape)
        self.features = tuple(_feature(f) for f in features)
        if not self.features:
            raise ValueError('`features` is empty: name at least one, such as ["x", "x^2"]')
        if base is not None and not callable(base):
            check_choice("base", base, tuple(BASES))
        self.base = base
        size = math.prod(self.event_shape)
        self.given_edges = [float(e) for e in edges]
        jumps = {e for f in self.features if isinstance(f, tuple) for e in f[1:]}
        self.domain = _domain(domain, values, sorted({*self.given_edges, *jumps}), size)
        self.names = self._names(size)
        self.natural = nn.Parameter(torch.zeros(len(self.names)))
        for name, value in (("loc", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((size,), value))
        for name, value in (("centre", 0.0), ("spread", 1.0)):
            self.register_buffer(name, torch.full((len(self.names),), value))

    @classmethod
    def suggest(cls, x: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """Whole numbers get the finite domain 0, 1, ... up to the highest; real ones the line."""
        whole = bool((x == x.round()).all()) and 0 <= float(x.min()) and float(x.max()) <= 255
        real = given.get("likelihood") in ("gaussian", "gaussian_mixture") or "domain" in given
        return {"values": list(range(max(int(x.max()), 1) + 1))} if whole and not real else {}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values; functions by their names."""
        plain = [f if isinstance(f, str) else list(f) if isinstance(f, tuple) else _called(f) for f in self.features]
        base = _called(self.base) if callable(self.base) else self.base
        return {"event_shape": list(self.event_shape), "features": plain, "base": base, "edges": self.given_edges,
                **self.domain.settings()}  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the model to one file.

        Raises:
            ValueError: If a feature or the base measure is a function of your own.
        """
        own = [_called(f) for f in (*self.features, self.base) if callable(f)]
        if own:
            raise ValueError(
                f"{own[0]} is a function of your own, which no file can hold; use the features {', '.join(FEATURES)}"
            )
        super().save(path)

    def _names(self, size: int) -> tuple[str, ...]:
        """A name for each number that the features give."""
        names = []
        for feature in self.features:
            with torch.device("cpu"):
                count = _evaluate(feature, torch.full((2, *self.event_shape), 0.5, dtype=torch.float64)).shape[1]
            name = feature if isinstance(feature, str) else _called(feature)
            names += [name] if count == 1 else [f"{name}[{k}]" for k in range(count)]
        if self.domain.states(size) * len(names) > 100 * MOST_STATES:
            raise ValueError(f"{len(names)} features at {self.domain.states(size)} states are too many; take fewer of either")
        return tuple(names)

    # -- the density --------------------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(), obs=x)

    def distribution(self) -> ExponentialFamily:
        """The distribution of x."""
        return ExponentialFamily(self, self._grid())

    def _grid(self) -> _Grid:
        """States and their log-weights."""
        return self.domain.grid(self.loc.double(), self.scale.double())

    def _energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(N, K)`` and log h ``(N,)`` of x ``(N, *event_shape)``, in float64."""
        features, flat = torch.cat([_evaluate(f, x) for f in self.features], 1), x.flatten(1)
        if self.base is None:
            return features, flat.new_zeros(len(x))
        return features, self.base(x) if callable(self.base) else BASES[self.base](flat)

    def _states(self, grid: _Grid, centre: Tensor) -> tuple[Tensor, Tensor]:
        """Features less their centre, and log-weights, of the states; those where a feature is infinite have no weight."""
        features, base = self._energy(grid.points.unflatten(1, self.event_shape))
        fine = features.isfinite().all(1) & base.isfinite()
        features = (features - centre).masked_fill(~fine[:, None], 0.0)
        return features, (grid.log_weight + base).masked_fill(~fine, -math.inf)

    def _exponents(self, features: Tensor) -> Tensor:
        """Multipliers times features less their centre."""
        return (features / self.spread) @ self.natural.double()

    def _log_probs(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the states, and their features in the user's units."""
        with torch.no_grad():
            features, log_weight = self._states(self._grid(), self.centre)
            return torch.log_softmax(self._exponents(features) + log_weight, 0), features + self.centre

    @property
    def multipliers(self) -> dict[str, float]:
        """Lambda of each feature."""
        return dict(zip(self.names, (self.natural.detach() / self.spread).double().tolist()))

    def moments(self) -> dict[str, float]:
        """E[f] of each feature under the model."""
        log_p, features = self._log_probs()
        return dict(zip(self.names, (log_p.exp() @ features).tolist()))

    def entropy(self) -> float:
        r""":math:`-\mathbb{E}[\log p(x)]` in nats."""
        log_p, _ = self._log_probs()
        log_density = log_p - self._grid().log_weight
        return -float((log_p.exp() * log_density.masked_fill(log_p == -math.inf, 0.0)).sum())

    def quadrature_error(self) -> float:
        """How much log Z changes if every second node is left out, in nats; 0 on a finite domain. The error itself is less."""
        with torch.no_grad():
            features, log_weight = self._states(self._grid(), self.centre)
            logits = self._exponents(features) + log_weight
            return abs(float(logits.logsumexp(0) - self.domain.halved(logits, self.loc.numel()).logsumexp(0)))

    # -- fitting ------------------------------------------------------------------------------------------------------

    def match(self, moments: Mapping[str, float] | Sequence[float]) -> None:
        """Set the model to the distribution with these moments, without data.

        Args:
            moments: E[f] of each number that the features give, by name or in order.
        """
        if isinstance(moments, Mapping):
            for name in (*moments, *self.names):
                if name not in self.names or name not in moments:
                    wrong = "missing" if name in self.names else "none of them"
                    raise ValueError(f"`moments` should name {', '.join(self.names)}; {name!r} is {wrong}")
            moments = [moments[name] for name in self.names]
        if len(moments) != len(self.names):
            raise ValueError(f"`moments` has {len(moments)} numbers for {len(self.names)} features ({', '.join(self.names)})")
        for name, moment in zip(self.names, moments):
            if isinstance(moment, str) or not math.isfinite(moment):
                raise ValueError(f"`moments` should be finite numbers, got {moment} for {name}")
        target = torch.tensor([float(m) for m in moments], dtype=torch.float64, device=self.natural.device)
        with torch.no_grad():
            self._match(target, *self._start(target))
        self.primed = True

    def _start(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Where to look for the distribution first: at its mean, and as wide as the moments say."""
        loc, scale = torch.zeros_like(self.loc).double(), torch.ones_like(self.scale).double()
        given = dict(zip(self.names, target))
        for d in range(len(loc)):
            suffix = f"[{d}]" if len(loc) > 1 else ""
            mean, square, size, fourth = (given.get(f"{name}{suffix}") for name in ("x", "x^2", "|x|", "x^4"))
            if mean is not None:
                sd = mean.abs()
                if square is not None:
                    sd = (square - mean.square()).clamp(min=1e-20).sqrt()
                elif size is not None:
                    sd = size.abs()
                elif fourth is not None:
                    sd = fourth.abs().pow(0.25)
                sd = torch.where(sd > 0, sd, torch.ones_like(sd))
                where = self.domain.place(torch.stack([mean - sd, mean, mean + sd])[:, None])
                loc[d], scale[d] = where[0][0], where[1][0]
        return loc, scale

    def solve(self, batch: dict[str, Tensor]) -> str:
        """Match the means of the features over the data."""
        x = batch["x"].double()
        raw = torch.cat([_evaluate(f, x) for f in self.features], 1)
        if not bool(raw.isfinite().all()):
            row, number = (int(i) for i in (~raw.isfinite()).nonzero()[0])
            raise ValueError(
                f"feature {self.names[number]!r} of data row {row} is {float(raw[row, number])}; leave the row out"
            )
        try:
            self._match(raw.mean(0), *self.domain.place(_quartiles(x.flatten(1))))
        except ValueError as error:
            raise ValueError(f"{error}{_constant(x.flatten(1))}") from error
        return "moments matched by Newton's method on the convex dual"

    def prime(self, data: Batch) -> None:
        """Start at the solution."""
        with torch.no_grad():
            self.solve(self._prepared(data)[0])

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        return Adam(0.02), settings

    def _match(self, target: Tensor, loc: Tensor, scale: Tensor) -> None:
        """Newton's method, on a quadrature that is moved until it is where the distribution is."""
        for _ in range(30):
            grid = self.domain.grid(loc, scale)
            features, log_weight = self._states(grid, target)
            self._check_range(target, features, log_weight)
            natural = self._dual(features, log_weight, self.domain.reach(grid), target)
            log_p = torch.log_softmax(features @ natural + log_weight, 0)
            middle, width = self.domain.place(self.domain.quartiles(log_p.exp(), loc, scale))
            settled = ((width / scale).log().abs() <= math.log(2)) & ((middle - loc).abs() <= scale)
            if bool(settled.all()):
                break
            loc, scale = middle, width
        self.domain.check_tails(log_p, self.loc.numel(), self.names)
        sd = (log_p.exp() @ features.square()).sqrt()
        for held, value in ((self.loc, grid.loc), (self.scale, grid.scale), (self.centre, target), (self.spread, sd)):
            held.copy_(value)
        self.natural.copy_(natural * sd)
        self._check_precision(target, sd)

    def _dual(self, features: Tensor, log_weight: Tensor, reach: Tensor, target: Tensor) -> Tensor:
        """The multipliers, on an infinite domain by way of wider and wider finite ones, where none is forbidden."""
        natural, found = features.new_zeros(features.shape[1]), None
        for cut in (math.inf,) if self.domain.bounded else (5.0, 10.0, 30.0, 100.0, 1e3, 1e4, 1e6, math.inf):
            found = _newton(features, log_weight.masked_fill(reach > cut, -math.inf), natural)
            natural = natural if found is None else found
        if found is None:
            raise ValueError(self._infeasible(target))
        return found

    def _check_precision(self, target: Tensor, sd: Tensor) -> None:
        """Refuse a solution that the quadrature or the parameters' dtype cannot hold."""
        if (error := self.quadrature_error()) > 1e-3:
            raise ValueError(
                f"the moments ask for a distribution too narrow for the quadrature (log Z is known to {error:.2g} nats): "
                "correct the moments, or give a `domain` that is less wide"
            )
        log_p, features = self._log_probs()
        away, missed = (features - target) / sd, (log_p.exp() @ (features - target)) / sd
        covariance = (away * log_p.exp()[:, None]).T @ away - missed[:, None] * missed
        off = float((missed @ torch.linalg.pinv(covariance, hermitian=True) @ missed).clamp(min=0).sqrt())
        if not off < 0.01:
            raise ValueError(
                f"the moments are missed by {off:.2g} standard deviations in {self.natural.dtype}: use precision='float64' "
                "(or model.double()), or shift and scale x"
            )

    def _check_range(self, target: Tensor, features: Tensor, log_weight: Tensor) -> None:
        """Refuse a moment that no distribution on the domain has on its own."""
        seen = features[log_weight > -math.inf]
        low, high = seen.amin(0), seen.amax(0)
        bad = ~((low < 0) & (high > 0))
        if bool(bad.any()):
            k = int(bad.nonzero()[0, 0])
            edge = "is one of" if float(low[k]) == 0 or float(high[k]) == 0 else "lies outside"
            raise ValueError(
                f"no distribution that covers the domain has E[{self.names[k]}] = {float(target[k]):g}, which {edge} the ends "
                f"of its range ({float(target[k] + low[k]):g}, {float(target[k] + high[k]):g}); correct it, or drop the feature"
            )

    def _infeasible(self, target: Tensor) -> str:
        wanted = ", ".join(f"E[{name}] = {value:g}" for name, value in zip(self.names, target.tolist()))
        together = " together" if len(self.names) > 1 else ""
        tails = "" if self.domain.bounded else ", or the features do not bound its tails"
        return (
            f"no distribution that covers the domain has {wanted[:200]}{together}{tails}; correct the moments, give more data, "
            "or choose other features"
        )


def _constant(x: Tensor) -> str:
    """What to say where moments cannot be matched because a number never varies; empty where all do."""
    constant = (x.amin(0) == x.amax(0)).nonzero()
    if not len(constant):
        return ""
    number = int(constant[0, 0])
    return f" (number {number} of each datum is constant, {float(x[0, number]):g} in all {len(x)} data: drop it)"


class ExponentialFamily(dist.TorchDistribution):
    """The distribution at the model's parameters."""

    def __init__(self, family: MaximumEntropy, grid: _Grid, batch_shape: Sequence[int] = ()) -> None:
        self._family, self._grid = family, grid
        super().__init__(torch.Size(batch_shape), torch.Size(family.event_shape), validate_args=False)

    def __repr__(self) -> str:
        return f"ExponentialFamily({', '.join(self._family.names)})"

    @property
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        """The domain."""
        return _Inside(self._family.domain, len(self.event_shape))

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> ExponentialFamily:
        """The same for more data."""
        return ExponentialFamily(self._family, self._grid, batch_shape)

    def _logits(self) -> Tensor:
        features, log_weight = self._family._states(self._grid, self._family.centre)
        return self._family._exponents(features) + log_weight

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, or log-mass on a finite domain, in nats."""
        features, base = self._family._energy(value.double().reshape(-1, *self.event_shape))
        found = self._family._exponents(features - self._family.centre) + base - self._logits().logsumexp(0)
        return found.reshape(value.shape[: value.dim() - len(self.event_shape)]).to(self._family.natural.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A state by the inverse of the cumulated masses; between nodes the density is taken as linear in the node's number."""
        shape = self._extended_shape(torch.Size(sample_shape))
        count = math.prod(shape[: len(shape) - len(self.event_shape)])
        cumulated = torch.softmax(self._logits(), 0).cumsum(0)
        uniform = torch.rand(count, dtype=torch.float64, device=cumulated.device) * cumulated[-1]
        states = torch.searchsorted(cumulated, uniform).clamp(max=len(cumulated) - 1)
        return self._family.domain.near(states, self._grid).reshape(shape).to(self._family.natural.dtype)


class _Inside(constraints.Constraint):
    def __init__(self, domain: _Interval | _Values, event_dim: int) -> None:
        self.domain, self.event_dim, self.is_discrete = domain, event_dim, domain.finite

    def check(self, value: Tensor) -> Tensor:
        return self.domain.check(value).flatten(value.dim() - self.event_dim).all(-1)

    def __repr__(self) -> str:
        return str(self.domain)


def _quartiles(x: Tensor) -> Tensor:
    """Quartiles of data ``(N, D)``, ``(3, D)``; those of a Gaussian where a quarter of the data or more have one value."""
    found = x[:100_000].quantile(torch.tensor([0.25, 0.5, 0.75]).to(x), dim=0)
    wide = x.mean(0) + 0.6745 * x.std(0, correction=0) * torch.tensor([[-1.0], [0.0], [1.0]]).to(x)
    return torch.where((found.diff(dim=0) > 0).all(0), found, wide)


# --- features ------------------------------------------------------------------------------------------------------------


def _feature(feature: Any) -> Any:
    """The feature, checked."""
    if callable(feature):
        return feature
    if isinstance(feature, str):
        if feature not in FEATURES:
            raise ValueError(f"`features` names {feature!r}, which is unknown{nearest(feature, [*FEATURES, 'indicator'])}")
        return feature
    if isinstance(feature, Sequence) and len(feature) == 3 and feature[0] == "indicator" and feature[1] < feature[2]:
        return ("indicator", float(feature[1]), float(feature[2]))
    raise ValueError(f"`features` holds {feature!r}; expected a name, a function, or ('indicator', low, high) with low < high")


def _called(feature: Any) -> str:
    if isinstance(feature, tuple):
        return f"{feature[1]:g} <= x < {feature[2]:g}"
    return str(getattr(feature, "__name__", type(feature).__name__))


def _evaluate(feature: Any, x: Tensor) -> Tensor:
    """``(N, K)`` from x ``(N, *event_shape)``."""
    if isinstance(feature, str):
        return FEATURES[feature](x.flatten(1))
    if isinstance(feature, tuple):
        return ((x >= feature[1]) & (x < feature[2])).to(x.dtype).flatten(1)
    found = feature(x)
    if not isinstance(found, Tensor) or found.dim() not in (1, 2) or len(found) != len(x):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"feature {_called(feature)!r} should give shape (N,) or (N, K) for N = {len(x)} data, got {got}")
    return found.to(x.dtype).reshape(len(x), -1)


# --- domains -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grid:
    """States: points ``(M, D)``, log-weights ``(M,)``, and what tells each number's map from its node's number."""

    points: Tensor
    log_weight: Tensor
    loc: Tensor
    scale: Tensor


def _domain(domain: Any, values: Any, edges: list[float], size: int) -> _Interval | _Values:
    if values is not None:
        if domain is not None:
            raise ValueError("`domain` and `values` are both given; choose one")
        found = _Values(tuple(float(v) for v in values))
        if len(set(found.values)) < 2 or len(found.values) ** size > MOST_STATES:
            raise ValueError(
                f"`values` should be 2 or more, and {MOST_STATES} states at most, got {len(found.values)} for each of {size}"
            )
        return found
    if isinstance(domain, str):
        check_choice("domain", domain, tuple(DOMAINS))
    bounds: Any = DOMAINS[domain or "real"] if domain is None or isinstance(domain, str) else tuple(domain)
    if size > len(NODES):
        raise ValueError(
            f"an interval serves x of {len(NODES)} numbers or fewer, got {size}; give `values` for a finite domain"
        )
    low = -math.inf if bounds[0] is None else float(bounds[0])
    high = math.inf if bounds[1] is None else float(bounds[1])
    if len(bounds) != 2 or not low < high:
        raise ValueError(f"`domain` should be (low, high) with low < high, got {domain}; for single values use `values`")
    return _Interval(low, high, tuple(e for e in edges if low < e < high), NODES[size - 1])


@dataclass(frozen=True)
class _Values:
    """Finitely many values for each number of x."""

    values: tuple[float, ...]
    finite = bounded = True

    @property
    def low(self) -> float:
        return min(self.values)

    def __str__(self) -> str:
        shown = ", ".join(f"{v:g}" for v in self.values[:4])
        return f"{{{shown}{', ...' if len(self.values) > 4 else ''}}}"

    def settings(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def states(self, size: int) -> int:
        return len(self.values) ** size

    def check(self, x: Tensor) -> Tensor:
        known = torch.tensor(self.values, dtype=x.dtype, device=x.device)
        return (x[..., None] == known).any(-1)

    def place(self, quartiles: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(quartiles[0]), torch.ones_like(quartiles[0])

    def grid(self, loc: Tensor, scale: Tensor) -> _Grid:
        axis = torch.tensor(self.values, dtype=loc.dtype, device=loc.device)
        points = torch.cartesian_prod(*[axis] * len(loc)).reshape(-1, len(loc))
        return _Grid(points, torch.zeros_like(points[:, 0]), loc, scale)

    def near(self, states: Tensor, grid: _Grid) -> Tensor:
        return grid.points[states]

    def quartiles(self, p: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(loc).expand(3, -1)

    def halved(self, logits: Tensor, size: int) -> Tensor:
        return logits

    def reach(self, grid: _Grid) -> Tensor:
        return torch.zeros_like(grid.log_weight)

    def check_tails(self, log_p: Tensor, size: int, names: Sequence[str]) -> None:
        """A finite domain has none."""


@dataclass(frozen=True)
class _Interval:
    r"""An interval for each number of x, cut at the edges; nodes are equally spaced in t, and x double-exponential.

    .. math:: x = a + \frac{b - a}{1 + e^{-\pi \sinh t}}, \qquad x = a \pm s e^{\frac{\pi}{2} \sinh t}, \qquad
        x = \ell + s \sinh(\tfrac{\pi}{2} \sinh t)
    """

    low: float
    high: float
    edges: tuple[float, ...]
    nodes: int
    finite = False

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __str__(self) -> str:
        return f"the interval from {self.low:g} to {self.high:g}"

    def settings(self) -> dict[str, Any]:
        return {"domain": [bound if math.isfinite(bound) else None for bound in (self.low, self.high)]}

    @property
    def pieces(self) -> list[tuple[float, float]]:
        ends = [self.low, *self.edges, self.high]
        return list(itertools.pairwise(ends))

    def states(self, size: int) -> int:
        return (len(self.pieces) * self.nodes) ** size

    def check(self, x: Tensor) -> Tensor:
        return (x >= self.low) & (x <= self.high)

    def place(self, quartiles: Tensor) -> tuple[Tensor, Tensor]:
        """Where the nodes should lie for these quartiles ``(3, D)``: centre and unit of each number's map."""
        low, middle, high = quartiles
        zero, least = torch.zeros_like(middle), 1e-9 * middle.abs() + 1e-150
        if math.isfinite(self.low) and math.isfinite(self.high):
            return zero, torch.ones_like(middle)
        if math.isinf(self.low) and math.isinf(self.high):
            return middle, torch.maximum((high - low) / 1.349, least)
        return zero, torch.maximum((middle - (self.low if math.isfinite(self.low) else self.high)).abs(), least)

    def span(self, piece: tuple[float, float]) -> tuple[float, float]:
        """The interval of t: as far as floating-point numbers tell x from the piece's ends."""
        low, high = piece
        close, far = math.asinh(36 / math.pi), math.asinh(math.asinh(FAR) / (math.pi / 2))
        if math.isfinite(low) and math.isfinite(high):
            left, right = (math.asinh(550 / math.pi) if end == 0 else close for end in piece)
            return -left, right
        if math.isinf(low) and math.isinf(high):
            return -far, far
        finite = low if math.isfinite(low) else high
        return -math.asinh((550 if finite == 0 else 36) / (math.pi / 2)), far

    def map(self, piece: tuple[float, float], t: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """x at t."""
        low, high = piece
        if math.isfinite(low) and math.isfinite(high):
            up, down = torch.sigmoid(math.pi * t.sinh()), torch.sigmoid(-math.pi * t.sinh())
            return torch.where(t < 0, low + (high - low) * up, high - (high - low) * down)
        if math.isinf(low) and math.isinf(high):
            return loc + scale * (math.pi / 2 * t.sinh()).sinh()
        away = scale * (math.pi / 2 * t.sinh()).exp()
        return low + away if math.isfinite(low) else high - away

    def slope(self, piece: tuple[float, float], t: Tensor, scale: Tensor) -> Tensor:
        """log |dx/dt|."""
        low, high = piece
        if math.isfinite(low) and math.isfinite(high):
            inner = math.pi * t.sinh()
            return (
                math.log(math.pi * (high - low))
                + t.cosh().log()
                + nn.functional.logsigmoid(inner)
                + nn.functional.logsigmoid(-inner)
            )
        inner = math.pi / 2 * t.sinh()
        outer = inner.cosh().log() if math.isinf(low) and math.isinf(high) else inner
        return scale.log() + math.log(math.pi / 2) + t.cosh().log() + outer

    def axis(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes and log-weights of one number of x."""
        points, weights = [], []
        for piece in self.pieces:
            start, stop = self.span(piece)
            t = torch.linspace(start, stop, self.nodes, dtype=loc.dtype, device=loc.device)
            points.append(self.map(piece, t, loc, scale))
            weights.append(self.slope(piece, t, scale) + math.log((stop - start) / (self.nodes - 1)))
        return torch.cat(points), torch.cat(weights)

    def grid(self, loc: Tensor, scale: Tensor) -> _Grid:
        axes = [self.axis(*one) for one in zip(loc, scale)]
        points = torch.cartesian_prod(*[axis for axis, _ in axes]).reshape(-1, len(loc))
        weights = torch.cartesian_prod(*[weight for _, weight in axes]).reshape(-1, len(loc))
        return _Grid(points, weights.sum(1), loc, scale)

    def near(self, states: Tensor, grid: _Grid) -> Tensor:
        """Draws around nodes: in t, hats as wide as two steps, whose mixture is linear between nodes."""
        count, size = len(self.pieces) * self.nodes, len(grid.loc)
        numbers = torch.stack([states // count ** (size - 1 - d) % count for d in range(size)], -1)
        shift = torch.rand_like(grid.loc.expand(len(states), size)) + torch.rand_like(grid.loc.expand(len(states), size)) - 1
        found = torch.zeros_like(shift)
        for number, piece in enumerate(self.pieces):
            start, stop = self.span(piece)
            within = numbers - number * self.nodes
            t = (start + (stop - start) * (within + shift) / (self.nodes - 1)).clamp(start, stop)
            found = torch.where(numbers // self.nodes == number, self.map(piece, t, grid.loc, grid.scale), found)
        return found

    def quartiles(self, p: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """Quartiles of each number of x under probabilities of the nodes, ``(3, D)``."""
        size, found = len(loc), []
        joint = p.reshape([len(self.pieces) * self.nodes] * size)
        for d in range(size):
            points, _ = self.axis(loc[d], scale[d])
            mass = joint.sum([e for e in range(size) if e != d]) if size > 1 else joint
            order = points.argsort()
            levels = torch.tensor([0.25, 0.5, 0.75], dtype=p.dtype, device=p.device)
            at = torch.searchsorted(mass[order].cumsum(0), levels).clamp(max=len(points) - 1)
            found.append(points[order][at])
        return torch.stack(found, 1)

    def halved(self, logits: Tensor, size: int) -> Tensor:
        """The sum over every second node."""
        shape = [n for _ in range(size) for n in (len(self.pieces), self.nodes)]
        kept = logits.reshape(shape)
        for d in range(size):
            kept = kept.narrow(2 * d + 1, 0, self.nodes).index_select(
                2 * d + 1, torch.arange(0, self.nodes, 2, device=logits.device)
            )
        return kept.reshape(-1) + size * math.log(2)

    def reach(self, grid: _Grid) -> Tensor:
        """Largest distance of a point's numbers from where the distribution should be, in units of its width."""
        end = self.low if math.isfinite(self.low) else self.high if math.isfinite(self.high) else 0.0
        return ((grid.points - grid.loc - end) / grid.scale).abs().amax(1)

    def check_tails(self, log_p: Tensor, size: int, names: Sequence[str]) -> None:
        """Refuse a distribution with mass at the far end of an infinite side."""
        joint = log_p.exp().reshape([len(self.pieces) * self.nodes] * size)
        for d in range(size):
            mass = joint.sum([e for e in range(size) if e != d]) if size > 1 else joint
            ends = ([mass[:8]] if math.isinf(self.low) else []) + ([mass[-8:]] if math.isinf(self.high) else [])
            if any(float(end.sum()) > 1e-6 for end in ends):
                raise ValueError(
                    f"the features {', '.join(names)} do not bound the tails: no density on {self} with these moments has the "
                    'largest entropy; add a feature such as "x^2" or "x^4", or bound the domain'
                )


# --- the convex dual -----------------------------------------------------------------------------------------------------


def _newton(features: Tensor, log_weight: Tensor, natural: Tensor) -> Tensor | None:
    """The multipliers at which features less their moments ``(M, K)`` have mean zero, from a start; None if there are none."""
    value = (features @ natural + log_weight).logsumexp(0)
    for _ in range(1000):
        slope, step = _newton_step(features, log_weight, natural)
        if step is None:
            return None
        decrement = float(slope @ step)
        if decrement < 1e-10:  # the dual no longer tells its own changes from rounding, and Newton's steps converge unaided
            for _ in range(4):
                natural = natural - step
                slope, step = _newton_step(features, log_weight, natural)
                if step is None:
                    return None
            return natural
        natural, moved, value = _descend(features, log_weight, natural, step, decrement, value)
        if not moved:
            return None
    return None


def _newton_step(features: Tensor, log_weight: Tensor, natural: Tensor) -> tuple[Tensor, Tensor | None]:
    """The dual's slope, and Newton's step; no step where a feature has no spread left."""
    p = torch.softmax(features @ natural + log_weight, 0)
    slope = p @ features
    spread = (features * p[:, None]).T @ features - slope[:, None] * slope
    sd = spread.diagonal().clamp(min=0).sqrt()
    if bool((sd <= 1e-150).any()) or not bool(spread.isfinite().all()):
        return slope, None
    curvature = spread / sd / sd[:, None] + 1e-13 * torch.eye(len(sd), dtype=sd.dtype, device=sd.device)
    return slope, torch.linalg.solve(curvature, slope / sd) / sd


def _descend(
    features: Tensor, log_weight: Tensor, natural: Tensor, step: Tensor, decrement: float, value: Tensor
) -> tuple[Tensor, bool, Tensor]:
    """A step downhill, halved until the dual falls by a share of what its slope promises."""
    length = 1.0
    while length > 1e-12:
        tried = natural - length * step
        lower = (features @ tried + log_weight).logsumexp(0)
        if float(lower) <= float(value) - 1e-4 * length * decrement:
            return tried, bool((tried != natural).any()), lower
        length /= 2
    return natural, False, value
