r"""MADE: a masked perceptron that gives every conditional of an order in one pass.

.. math:: p(x) = \prod_{r=1}^{D} p(x_{o(r)} \mid x_{o(1)}, \ldots, x_{o(r-1)})

for an order o of the columns. With K orders one set of weights is trained on an order drawn anew at each step, and the model is
the mixture of all K with equal weights,

.. math:: p(x) = \frac{1}{K} \sum_{k=1}^{K} p_k(x),

an exact density too; training maximises the mean of :math:`\log p_k(x)` over k, which lies below :math:`\log p(x)`.

Germain, Gregor, Murray, Larochelle (2015), MADE: masked autoencoder for distribution estimation, arXiv:1502.03509; training on
several orders: Uria, Murray, Larochelle (2014), A deep and tractable density estimator, arXiv:1310.1757.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..base import SAMPLE_ROWS, GenerativeModel, _evaluating
from ..contracts import Batch, Seed, as_sizes, check_choice, check_event_shape, check_positive
from ..data.arrays import as_batch, check_finite, check_varies
from ..data.transforms import Transform
from ..distributions.autoregressive import Autoregressive
from ..distributions.columns import Columns, Kind, as_columns, plain_columns
from ..distributions.observation import OBSERVATIONS, Observation, observation
from ..evaluation.posterior import by_rows
from ..nn import ACTIVATIONS, MaskedMLP
from ..programs import check_support, isolated

__all__ = ["MADE"]

ORDERS = ("natural", "random")
REAL = ("gaussian", "gaussian_mixture")


class MADE(GenerativeModel):
    r"""Masked autoencoder for distribution estimation.

    Shapes: x ``(N, *event_shape)``, whose D numbers in row-major order are the columns; context ``(N, context_dim)``. Real
    columns are standardised inside; ``log_prob`` is in nats, in the units of the data.

    Args:
        event_shape: Shape of one datum.
        hidden: Sizes of the hidden layers, one or more.
        likelihood: Of every column: ``"bernoulli"`` (the default), ``"categorical"`` (0, ..., num_classes - 1),
            ``"gaussian_mixture"``, ``"gaussian"``, ``"discretized_logistic_mixture"`` (levels 0, ..., num_classes - 1). With
            ``columns``, of those that are continuous: ``"gaussian_mixture"`` (the default) or ``"gaussian"``.
        num_classes: Classes or levels.
        num_components: Of a mixture (default 10).
        columns: What each column holds, where they differ: ``"continuous"``, ``"binary"``, ``("categorical", K)`` or
            ``("ordinal", K)`` with values 0, ..., K - 1; ordinal ones get a mixture of discretised logistics.
        order: ``"natural"``, ``"random"``, or a permutation of 0, ..., D - 1: the columns as they are generated.
        num_orders: K; more than one are trained together. The first is ``order``, the others are random.
        residual: Make hidden layers after the first residual blocks.
        dropout: Probability with which a hidden unit is left out of a training step.
        direct: Connect columns linearly too.
        activation: ``"relu"``, ``"silu"``, ``"tanh"``...
        context_dim: Size of the vector that x is conditioned on; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights and the random orders.

    Raises:
        ValueError: From ``fit``, if a continuous column is constant: it has no density.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
        >>> made = MADE((2,), hidden=(16,))
        >>> run = made.fit(x, steps=300, optimizer=0.02, progress=False)
        >>> round(float(made.log_prob(torch.ones(1, 2)).mean), 1)  # one half: log 0.5
        -0.7
    """

    family = "made"
    real_likelihood = "gaussian_mixture"
    stepwise = True
    holds_out = 0.1
    orders: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        hidden: int | Sequence[int] = (512,),
        *,
        likelihood: str | None = None,
        num_classes: int | None = None,
        num_components: int | None = None,
        columns: Sequence[Kind] | None = None,
        order: str | Sequence[int] = "natural",
        num_orders: int = 1,
        residual: bool = False,
        dropout: float = 0.0,
        direct: bool = True,
        activation: str | type[nn.Module] = "relu",
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        size = math.prod(self.event_shape)
        check_positive("num_orders", num_orders)
        likelihood = likelihood or ("bernoulli" if columns is None else "gaussian_mixture")
        check_choice("likelihood", likelihood, tuple(OBSERVATIONS) if columns is None else REAL)
        self.hidden = as_sizes("hidden", hidden, least=1)
        _check_network(self.hidden, residual, dropout)
        self.likelihood, self.num_classes, self.num_components = likelihood, num_classes, num_components
        self.residual, self.dropout, self.direct = residual, float(dropout), direct
        self.activation = ACTIVATIONS.name(activation)
        self.columns = plain_columns(columns)
        self.table = Columns(_models(columns, size, likelihood, num_classes, num_components), num_components)
        self.real = [name in REAL for name, _ in self.table.models]
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        with self.initial_weights(seed):
            self.register_buffer("orders", _orders(order, int(num_orders), size))
            self.network = MaskedMLP(
                size, self.table.width, self.hidden, self.table.outputs, ACTIVATIONS[self.activation],
                residual=residual, dropout=dropout, direct=direct, context_dim=context_dim,
            )  # fmt: skip
        self.places = _Places(self)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values; the orders are saved with the parameters."""
        names = (
            "likelihood", "num_classes", "num_components", "columns", "residual", "dropout", "direct", "activation",
            "context_dim",
        )  # fmt: skip
        plain = {name: getattr(self, name) for name in names}
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), "num_orders": len(self.orders), **plain}

    def prime(self, data: Batch) -> None:
        """Standardise real columns, none of which may be constant, and start the outputs at what fits each column by itself."""
        x = self._prepared(data)[0]["x"].flatten(1)
        real = torch.tensor(self.real, device=x.device)
        check_varies(x, real & (x.amax(0) == x.amin(0)))
        with torch.no_grad():
            self.shift.copy_(torch.where(real, x.mean(0), torch.zeros_like(x[0])))
            self.scale.copy_(torch.where(real, x.std(0, correction=0), torch.ones_like(x[0])))
            self.network.last.bias.copy_(self.table.start((x - self.shift) / self.scale).reshape(-1))
            if any(self.real):  # random scales here make a few data cost thousands of nats
                self.network.last.weight.mul_(0.1)

    def one(self, number: int) -> MADE:
        """The model of one order alone, 0, ..., K - 1, with weights of its own: p_k(x)."""
        self._check_order(number)
        single = copy.deepcopy(self)
        single.orders = self.orders[number : number + 1].clone()
        return single

    def _check_order(self, number: int) -> None:
        if not 0 <= number < len(self.orders):
            raise ValueError(
                f"`number` should be one of the {len(self.orders)} orders, 0 to {len(self.orders) - 1}, got {number}"
            )

    def next(self, prefix: Any, context: Any = None, *, number: int = 0) -> Any:
        """The distribution of the next column of an order, given the columns before it.

        Args:
            prefix: The first t columns of the order, in its order, ``(N, t)``, t less than D.
            context: One for each, or one for all.
            number: Of the order, 0, ..., K - 1.

        Returns:
            A distribution of batch shape ``(N,)`` over column ``made.orders[number, t]``, in the units of the data.

        Raises:
            ValueError: If a value is not finite, or is none that its column may have.
        """
        self._check_order(number)
        order, given = self.orders[number], self._like(torch.as_tensor(as_batch(prefix, name="prefix")))
        if given.dim() != 2 or given.shape[1] >= len(order):
            raise ValueError(f"`prefix` should have shape (N, t) with t below {len(order)}, got {tuple(given.shape)}")
        column, known = int(order[given.shape[1]]), order[: given.shape[1]]
        check_finite(given, "prefix")
        x = given.new_zeros(len(given), len(order)).index_copy(1, known, given)
        check_support("`prefix`", self.distribution(), x.unflatten(1, self.event_shape))  # 0 is in every column's support
        where = self._where(context, len(x))
        with torch.no_grad(), _evaluating(self):
            y, which = (x - self.shift) / self.scale, self.table.which(x.device)
            outputs = self.network(self.table.encode(y, which), order.argsort(), where)
            fn = self.table.distribution(outputs[:, column], which[column])
        if not self.real[column]:
            return fn
        return dist.TransformedDistribution(fn, dist.transforms.AffineTransform(self.shift[column], self.scale[column]))

    def infill(self, x: Any, context: Any = None, *, num_particles: int = 64, seed: Seed = 0, progress: bool = True) -> Tensor:
        """Draw missing columns given the others, each datum under the order that puts most of its known columns first.

        Exact draws from p_k(missing | known) where all known columns come first in some order k; else a particle filter, which
        weighs what was drawn by the probability of the known columns that come later: approximate, and better with more
        particles. Of several orders it is the conditional distribution of that one, not of their mixture.

        Args:
            x: Data ``(N, *event_shape)``, NaN where a number is missing.
            context: One for each, or one for all.
            num_particles: For each datum.
            seed: Keys the draws.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            One draw for each datum, ``(N, *event_shape)``.
        """
        check_positive("num_particles", num_particles)
        x, count = torch.as_tensor(x), int(num_particles)
        check_event_shape("x", x, self.event_shape)
        known = self._like(torch.where(x.isnan(), torch.zeros_like(x), x))
        batch = {"x": known, "observed": ~x.isnan().to(known.device)}
        check_support("`x`", self.distribution(), batch["x"])
        where = self._where(context, len(x))
        batch = batch if where is None else {**batch, "context": where}

        def drawn(rows: Batch) -> Tensor:
            own = dict(cast(dict[str, Tensor], rows))
            return self.distribution(own.pop("context", None)).infill(**own, num_particles=count)

        options = {**self._asked(seed, "eager", progress)}
        with isolated(self.home), _evaluating(self), torch.no_grad():
            return by_rows(drawn, batch, max(1, SAMPLE_ROWS // count), name="infill", **options)

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c); while it is trained, p_k(x | c) of an order k drawn at random."""
        orders = self.orders
        if self.training and len(orders) > 1:
            orders = orders[(torch.rand(1, device=orders.device) * len(orders)).long()]
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(context, orders), obs=x)

    def distribution(self, context: Tensor | None = None, orders: Tensor | None = None) -> _MixtureOfOrders:
        """The mixture over some of the orders ``(K, D)``, all by default."""
        return _MixtureOfOrders(self, self.orders if orders is None else orders, context)


class _MixtureOfOrders(dist.TorchDistribution):
    """1/K sum_k p_k over the rows of ``orders``."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, made: MADE, orders: Tensor, context: Tensor | None, batch_shape: Sequence[int] | None = None) -> None:
        self.made, self.orders, self.context = made, orders, context
        if batch_shape is None:
            batch_shape = () if context is None else context.shape[:-1]
        super().__init__(torch.Size(batch_shape), torch.Size(made.event_shape), validate_args=False)

    @property
    def support(self) -> Any:
        """What each column may be."""
        return constraints.independent(self.made.table.support, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> _MixtureOfOrders:
        """The same for more data."""
        context = None if self.context is None else self.context.expand(*batch_shape, -1)
        return _MixtureOfOrders(self.made, self.orders, context, batch_shape)

    def _rows(self, shape: torch.Size) -> Tensor | None:
        """One context for each of the data, in rows."""
        return None if self.context is None else self.context.expand(*shape, -1).reshape(-1, self.context.shape[-1])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats: one pass an order."""
        made, shape = self.made, torch.broadcast_shapes(value.shape[: value.dim() - len(self.event_shape)], self.batch_shape)
        x = value.expand(*shape, *self.event_shape).reshape(-1, self.orders.shape[1])
        y, which, context = (x - made.shift) / made.scale, made.table.which(x.device), self._rows(shape)
        inputs = made.table.encode(y, which)
        each = []
        for order in self.orders.unbind(0):
            outputs = made.network(inputs, order.argsort(), context)
            each.append(made.table.distribution(outputs, which).log_prob(y).sum(-1))
        found = each[0] if len(each) == 1 else torch.stack(each).logsumexp(0) - math.log(len(each))
        return (found - made.scale.log().sum()).reshape(shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw an order for each datum, then its columns one after another."""
        shape = torch.Size(sample_shape) + self.batch_shape
        chosen = (torch.rand(math.prod(shape), device=self.orders.device) * len(self.orders)).long()
        ranks, fn = self._generation(chosen, self._rows(shape))
        return self._columns(fn.sample(), ranks).reshape(*shape, *self.event_shape)

    def infill(self, x: Tensor, observed: Tensor, num_particles: int) -> Tensor:
        """Draw what is not observed of x, both ``(N, *event_shape)``: see ``MADE.infill``."""
        y, seen = (x.flatten(1) - self.made.shift) / self.made.scale, observed.flatten(1)
        there = seen[:, self.orders]  # (N, K, D), by rank
        gaps = ((~there).cumsum(-1) * there).sum(-1)  # missing columns before known ones
        chosen = gaps.argmin(1)
        ranks, fn = self._generation(chosen, self._rows(x.shape[:1]))
        order = self.orders[chosen]
        found = fn.infill(y.gather(1, order), seen.gather(1, order), num_particles)
        return torch.where(observed, x, self._columns(found, ranks).reshape(x.shape))

    def _generation(self, chosen: Tensor, context: Tensor | None) -> tuple[Tensor, Autoregressive]:
        """Ranks of the columns, and the distribution of the columns by rank, of data in the orders ``chosen``."""
        ranks, places = self.orders.argsort(-1)[chosen], self.made.places
        told = ranks.to(self.made.scale) if context is None else torch.cat([ranks.to(context), context], -1)
        return ranks, Autoregressive(places, places.observation, self.orders.shape[1:], context=told)

    def _columns(self, drawn: Tensor, ranks: Tensor) -> Tensor:
        """From columns by rank, standardised, to columns in their places and units."""
        x = drawn.gather(-1, ranks)
        return x * self.made.scale + self.made.shift if any(self.made.real) else x


class _Places:
    """MADE as a network that takes one step at a time, each datum in an order of its own: its context begins with the ranks."""

    def __init__(self, made: MADE) -> None:
        self.network, self.table, self.parameters = made.network, made.table, made.network.parameters
        self.observation = _AtColumn(made.table)

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """Orders, sums of the first hidden layer, and columns known so far."""
        assert context is not None
        size = self.network.places
        order = context[:, :size].argsort(-1)
        own = context[:, size:] if context.shape[1] > size else None
        return [order, *self.network.start(batch, own)]

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Take in the column before, and give the outputs at the next, followed by the number of its kind."""
        order, *rest = state
        which = self.table.which(order.device)
        before = order.index_select(1, (t - 1).clamp(min=0).reshape(1)).squeeze(1)
        inputs = self.table.encode(previous, which[before]) * (t > 0)
        self.network.take(rest, inputs, before, t - 1)
        place = order.index_select(1, t.reshape(1)).squeeze(1)
        outputs = self.network.give(rest, place, t)
        return torch.cat([outputs, which[place].unsqueeze(-1).to(outputs)], -1), state

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Not needed: densities are asked of the masked network in one pass."""
        raise TypeError("the steps of MADE only draw; `log_prob` gives densities")


class _AtColumn(Observation):
    """What is at a column, the number of whose kind is the last of the outputs."""

    def __init__(self, table: Columns) -> None:
        super().__init__(())
        self.table, self.outputs = table, table.outputs + 1

    support = constraints.real

    def at(self, outputs: Tensor, t: Tensor) -> dist.TorchDistribution:
        """The distribution of the column."""
        return self.table.distribution(outputs[..., :-1], outputs[..., -1].long())

    def draw(self, outputs: Tensor, t: Tensor) -> Tensor:
        """One draw."""
        if len(self.table.parts) == 1:
            return self.table.parts[0].draw(outputs[..., :-1], t)
        return super().draw(outputs, t)


def _models(
    columns: Sequence[Kind] | None, size: int, likelihood: str, num_classes: int | None, num_components: int | None
) -> list[tuple[str, int | None]]:
    """The observation model of each column, and its number of classes."""
    if columns is None:
        observation(likelihood, (), num_classes, num_components)  # checks that they go together
        return [(likelihood, num_classes)] * size
    if num_classes is not None:
        raise ValueError("`num_classes` goes with one likelihood for all; in `columns` write ('categorical', 5)")
    models = {"continuous": likelihood, "binary": "bernoulli", "ordinal": "discretized_logistic_mixture"}
    with_levels = ("categorical", "ordinal")
    return [(models.get(kind, kind), k if kind in with_levels else None) for kind, k in as_columns(columns, size)]


def _orders(order: str | Sequence[int], num_orders: int, size: int) -> Tensor:
    """K orders of the columns, ``(K, D)``, from torch's generator."""
    if isinstance(order, str):
        check_choice("order", order, ORDERS)
        first = torch.arange(size) if order == "natural" else torch.randperm(size)
    else:
        first = torch.as_tensor(list(order))
        if sorted(first.tolist()) != list(range(size)):
            raise ValueError(f"`order` should hold each column 0 to {size - 1} once, got {first.tolist()[:8]}")
    return torch.stack([first, *(torch.randperm(size) for _ in range(num_orders - 1))])


def _check_network(hidden: tuple[int, ...], residual: bool, dropout: float) -> None:
    if residual and len(set(hidden)) > 1:
        raise ValueError(f"`hidden` should be equal sizes where residual=True, got {hidden}")
    if not 0 <= dropout < 1:
        raise ValueError(f"`dropout` should be a probability in [0, 1), got {dropout}")
