r"""Normalizing flows over vectors and small arrays: autoregressive, coupling, continuous.

.. math:: \log p(x \mid c) = \log p_Z(f(x; c)) + \log \left| \det \frac{\partial f(x; c)}{\partial x} \right|, \qquad
    f = f_T \circ \dots \circ f_1 \circ \mathrm{actnorm}

The first map centres and scales each number: it starts at the mean and standard deviation of the training data or, before
splines, where all but a thousandth of the data fill their interval. The base p_Z is a standard normal, or a mixture of
Gaussians that starts at the clusters of the data, for data in islands.

Papamakarios et al. (2021), Normalizing flows for probabilistic modeling and inference, arXiv:1912.02762.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel, _evaluating
from ..contracts import Batch, Seed, as_sizes, check_choice, check_positive
from ..data.transforms import Transform
from ..distributions.events import with_event_shape
from ..distributions.flows import PERMUTATIONS, TRANSFORMS, ActNorm, Chain, FlowDistribution, bijection
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["Flow"]

KNOWN_AS = {
    "maf": "affine_autoregressive", "iaf": "affine_autoregressive", "realnvp": "affine_coupling", "real_nvp": "affine_coupling",
    "nice": "affine_coupling", "nsf": "spline_autoregressive", "spline": "spline_autoregressive",
    "naf": "neural_autoregressive", "cnf": "continuous", "ffjord": "continuous",
}  # fmt: skip
"""What papers and other packages call transforms."""
LOOKED = 10_000
"""Most data that the start of a fit looks at."""
ATOM = 0.1
"""Share of the data with one value from which a column is refused: it has no density there."""
FILLED, OUTSIDE = 0.85, 0.001
"""Share of a spline's interval that the data fill at the start, and the share of the data that may lie further out."""
MOST_DRAWN_IN = 0.5
"""Smallest scale, next to a standard deviation of 1, at which data with long tails start."""
TOLERANCE = 1e-3
"""Standard deviations of the data (about, before splines) by which an inverse may be off before it is worth a warning."""


class Flow(GenerativeModel):
    r"""Normalizing flow.

    ===========================  =========================================================================  ==============
    transform                    what it is                                                                 a draw takes
    ===========================  =========================================================================  ==============
    ``spline_autoregressive``    rational-quadratic splines, masked networks: NSF (AR), arXiv:1906.04032    D passes a map
    ``affine_autoregressive``    MAF, arXiv:1705.07057                                                      D passes a map
    ``neural_autoregressive``    monotone networks (deep sigmoids): NAF, arXiv:1804.00779                   D passes, search
    ``spline_coupling``          NSF (C), arXiv:1906.04032                                                  2 passes a map
    ``affine_coupling``          RealNVP, arXiv:1605.08803                                                  2 passes a map
    ``neural_coupling``          deep sigmoids in couplings                                                 2 passes, search
    ``continuous``               an ordinary differential equation: CNF, FFJORD, arXiv:1810.01367           1 integration
    ===========================  =========================================================================  ==============

    The density takes one pass in all of them. A spline acts within an interval that is laid out by the data and is the identity
    beyond: data further out keep a finite density, with the tails of the base.

    Shapes: x ``(N, *event_shape)``, D numbers in row-major order; context ``(N, context_dim)``.

    Args:
        event_shape: Shape of one datum.
        transform: Kind of the maps, see above.
        transforms: How many maps. Default: 3; 1 if continuous.
        hidden: Sizes of the hidden layers of each map's network.
        bins: Bins of a spline.
        tail_bound: Half the length of a spline's interval, in standard deviations of the base. Training starts where all but a
            thousandth of each number's deviations in the data lie within 0.85 of it: Gaussian data keep their scale, short
            tails are stretched and long ones drawn in.
        base_components: 1 for a standard normal base; more for a mixture of so many diagonal Gaussians.
        permutation: Order of the numbers from map to map: ``"reverse"``, ``"random"``, or ``"lu"`` (random, and a trained
            linear map before each). Default: ``"reverse"`` for autoregressive maps, ``"lu"`` for couplings.
        dropout: Share of hidden units left out at random while training; for small data sets.
        context_dim: Size of the vector that the flow is conditioned on; 0 for none.
        preprocess: Invertible preprocessing of x, such as ``Dequantize(levels)`` for whole numbers.
        seed: Keys the initial weights.

    Raises:
        ValueError: From ``fit``, if a column holds one value in a tenth of the data or more: it has no density.

    Example:
        >>> from pgen.data.toy import two_moons
        >>> flow = Flow((2,), hidden=(16,))
        >>> run = flow.fit(two_moons().sample(500), steps=20, progress=False)
        >>> x = flow.sample(3, seed=1)
        >>> x.shape, bool(flow.inverse_error(x).max() < 1e-3)
        (torch.Size([3, 2]), True)
    """

    family = "flow"
    default_batch_size = 256
    default_epochs = 200
    holds_out = 0.1

    def __init__(
        self,
        event_shape: Sequence[int],
        transform: str = "spline_autoregressive",
        *,
        transforms: int | None = None,
        hidden: int | Sequence[int] = (128, 128),
        bins: int = 8,
        tail_bound: float = 4.0,
        base_components: int = 1,
        permutation: str | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_choice("transform", transform, TRANSFORMS, KNOWN_AS)
        permutation = permutation or ("lu" if transform.endswith("coupling") else "reverse")
        check_choice("permutation", permutation, PERMUTATIONS)
        transforms = transforms or (1 if transform == "continuous" else 3)
        for name, number in (("transforms", transforms), ("bins", bins), ("base_components", base_components)):
            check_positive(name, number)
        check_positive("tail_bound", tail_bound, integer=False)
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` is a share of hidden units in [0, 1), got {dropout}")
        self.transform, self.transforms, self.hidden, self.bins = transform, transforms, as_sizes("hidden", hidden), bins
        self.tail_bound, self.permutation, self.dropout = tail_bound, permutation, dropout
        self.base_components = base_components
        size = math.prod(self.event_shape)
        self.actnorm = ActNorm((size,))
        with self.initial_weights(seed):
            self.chain = bijection(
                transform, size, transforms, self.hidden, context=context_dim, bins=bins, tail_bound=tail_bound,
                permutation=permutation, dropout=dropout,
            )  # fmt: skip
            if base_components > 1:
                self.base_loc = nn.Parameter(torch.randn(base_components, size))
                self.base_log_scale = nn.Parameter(torch.zeros(base_components, size))
                self.base_logits = nn.Parameter(torch.zeros(base_components))
        if context_dim:
            self.context_norm = ActNorm((context_dim,))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("transform", "transforms", "bins", "tail_bound", "base_components", "permutation", "dropout", "context_dim")
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **{n: getattr(self, n) for n in names}}

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = settings.schedule or (None if settings.stop == "converged" else "warmup_cosine")
        return Adam(1e-3), replace(settings, schedule=schedule, clip_norm=settings.clip_norm or 5.0)

    def prime(self, data: Batch) -> None:
        """Start at the mean, scale and clusters of the data, and refuse columns that have no density."""
        batch = self._prepared(data)[0]
        x = batch["x"].flatten(1)[:LOOKED]
        check_atoms(x)
        with torch.no_grad():
            standard = self.actnorm.start(x)
            if self.transform.startswith("spline"):
                self.actnorm.log_scale.sub_(_scale_to_fill(standard, FILLED * self.tail_bound).log())
                standard = self.actnorm(x)[0]
            if self.base_components > 1:
                _start_mixture(standard, self.base_loc, self.base_log_scale, self.base_logits)
            if self.context_dim:
                self.context_norm.start(batch["context"][:LOOKED])

    def base(self) -> dist.TorchDistribution:
        """The distribution of the noise, ``(D,)``."""
        if self.base_components == 1:
            return dist.Normal(torch.zeros_like(self.actnorm.loc), 1.0).to_event(1)
        parts = dist.Normal(self.base_loc, self.base_log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.base_logits), parts)

    def distribution(self, context: Tensor | None = None) -> dist.TorchDistribution:
        """p(x | c) of preprocessed x, batch shape that of the context, ``()`` without one."""
        if context is not None:
            context = self.context_norm(context)[0]
        whole = Chain([self.actnorm, self.chain])
        return with_event_shape(FlowDistribution(whole, self.base(), context, validate_args=False), self.event_shape)

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(context), obs=x)

    def inverse_error(self, x: Any, context: Any = None) -> Tensor:
        """How far data come back from a round trip through the flow, in standard deviations of the data.

        Args:
            x: Data, ``(N, *event_shape)``.
            context: Context of each datum.

        Returns:
            The largest error of each datum's numbers, ``(N,)``. A RuntimeWarning says if one is above 0.001: samples are then
            not draws from the density; train or evaluate in float64, or with fewer or smoother maps.
        """
        batch = cast(dict[str, Tensor], self.prepare(self._batch("x", x, context)))
        with torch.no_grad(), _evaluating(self):
            where = None if self.context_dim == 0 else self.context_norm(batch["context"])[0]
            standard = self.actnorm(batch["x"].flatten(1))[0]
            back = self.chain.inverse(self.chain(standard, where)[0], where)
        error = (back - standard).abs().amax(1)
        if bad := int((~(error <= TOLERANCE)).sum()):
            warnings.warn(
                f"the flow does not find {bad} of {len(error)} data again (largest error {float(error.max()):.2g} standard "
                "deviations): its samples are off there; use precision='float64', or fewer or smoother maps",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
        return error


def check_atoms(x: Tensor) -> None:
    """Refuse columns with a value that many data share."""
    if len(x) < 2:
        raise ValueError(f"a flow needs two data or more to know their scale, got {len(x)}")
    run = max(1, math.ceil(ATOM * len(x)), 1 if len(x) < 20 else 10)
    ordered = x.sort(0).values
    equal = ordered[run:] == ordered[:-run]
    columns = equal.any(0).nonzero().flatten().tolist()
    if columns and (len(x) >= 20 or bool((ordered[0] == ordered[-1])[columns[0]])):
        column = columns[0]
        value = float(ordered[run:][equal[:, column], column][0])
        what = "is constant" if ordered[0, column] == ordered[-1, column] else "is discrete"
        raise ValueError(
            f"number {column} of each datum {what} ({value:g} in {float((x[:, column] == value).float().mean()):.0%} of the "
            f"data), and a density has no bound there: drop it, or use preprocess=Dequantize(levels) "
            f"({len(columns)} of {x.shape[1]} columns are such)"
        )


def _scale_to_fill(x: Tensor, end: float) -> Tensor:
    """By what to multiply standardised data, ``(D,)``, for all but a few to lie within ``end``."""
    reach = x.abs().kthvalue(math.ceil((1 - OUTSIDE) * len(x)), 0).values
    return (end / reach).clamp(min=MOST_DRAWN_IN)


def _start_mixture(x: Tensor, loc: Tensor, log_scale: Tensor, logits: Tensor) -> None:
    """k-means, started at points far from each other, and the clusters' sizes and standard deviations."""
    count = len(loc)
    centres = x[torch.randint(len(x), (1,), device=x.device)]
    while len(centres) < count:  # greedy k-means++ (Arthur and Vassilvitskii 2007): the best of eight tries
        far = torch.cdist(x, centres).amin(1).square()
        tries = x[torch.multinomial(far + 1e-12, 8, replacement=True)]
        left = torch.minimum(far, torch.cdist(tries, x).square()).sum(1)
        centres = torch.cat([centres, tries[left.argmin()][None]])
    for _ in range(20):
        member = nn.functional.one_hot(torch.cdist(x, centres).argmin(1), count).to(x)  # (N, K)
        size = member.sum(0)[:, None]
        centres = torch.where(size > 0, member.T @ x / size.clamp(min=1), centres)
    spread = (member.T @ x.square() / size.clamp(min=1) - centres.square()).clamp(min=1e-4).sqrt()
    loc.copy_(centres)
    log_scale.copy_(torch.where(size > 1, spread, torch.ones_like(spread)).log())
    logits.copy_((size[:, 0] + 1).log())
