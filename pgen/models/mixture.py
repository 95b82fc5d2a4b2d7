r"""Mixtures: a discrete latent that is summed out.

.. math:: p(x) = \sum_{k=1}^K \pi_k \, p_k(x), \qquad r_k(x) = p(z = k \mid x) = \pi_k \, p_k(x) / p(x)

The guide is empty: the engine sums the component z out of the model, so that ``log_prob`` is exact and ``fit`` climbs the
likelihood itself, from the best of several k-means starts. There is no EM: by Fisher's identity a gradient step follows what
the M-step would balance, :math:`\nabla \log p(x) = \sum_k r_k(x) \nabla \log \pi_k p_k(x)`. By default 600 steps of Adam, in
batches of 1000, from a rate of 0.05 (0.01 with a context) by a cosine to zero, in coordinates in which the start is standard.

McLachlan and Peel (2000), Finite Mixture Models; Bishop (1994), Mixture density networks, NCRG/94/004 (weights and parameters
from a network of the context); Jacobs et al. (1991), Adaptive mixtures of local experts.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint

from ..base import FAMILIES, GenerativeModel
from ..contracts import Batch, NotAvailable, Seed, as_sizes, check_positive, kind_of, nearest
from ..data.batches import key
from ..data.transforms import Transform
from ..distributions.columns import Kind, plain_columns
from ..distributions.components import (
    Arrays,
    Columns,
    ColumnSupports,
    Components,
    GaussianComponents,
    InComponent,
    Table,
    standardised,
    vector_components,
)
from ..programs import PlateSize, aside, innermost, isolated, keyed_rng, run_model, run_program
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["GaussianMixture", "Mixture", "MixtureOf"]

START_ROWS = 20_000
"""Most data that k-means looks at."""


class _Mixture(GenerativeModel):
    """What mixtures have in common: the program, the start, and the questions about components."""

    default_batch_size = 1000
    default_steps = 600
    num_components: int
    restarts: int

    def parts(self, context: Tensor | None, observed: Tensor | None = None) -> tuple[Tensor, Table]:
        """Logits of the weights ``(*rows, K)``, and the densities of the components, of what is observed of x."""
        raise NotImplementedError

    def model(self, x: Tensor | None = None, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        """p(x, z | c); entries that are not observed have no likelihood."""
        logits, table = self.parts(context, observed)
        with self.plate(x, context):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            return pyro.sample("x", InComponent(table, z, self.event_shape), obs=x)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, observed: Tensor | None = None) -> None:
        """The component is summed out."""

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = "cosine" if settings.schedule is None and settings.stop != "converged" else settings.schedule
        return Adam(0.01 if self.context_dim else 0.05, betas=(0.9, 0.99)), replace(settings, schedule=schedule)

    # -- questions ----------------------------------------------------------------------------------------------------

    def responsibilities(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """Posterior probability of each component, p(z = k | x), ``(N, K)``."""

        def posterior(batch: Batch) -> Tensor:
            given = cast(dict[str, Any], batch)
            logits, table = self.parts(given.get("context"), given.get("observed"))
            return (logits.log_softmax(-1) + table.log_prob(given["x"])).softmax(-1)

        batch = self._batch("x", x, context)
        self._check_support(batch)
        return self._rows(posterior, "responsibilities", batch, seed, progress)

    def labels(self, x: Any, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """The most probable component of each datum, ``(N,)``, in 0, ..., K - 1: a clustering."""
        return self.responsibilities(x, context, seed=seed, progress=progress).argmax(-1)

    def weights(self, context: Any = None) -> Tensor:
        r"""Weights :math:`\pi`, ``(K,)``; with a context ``(N, K)``."""
        with torch.no_grad():
            return self.parts(self._where(context))[0].softmax(-1)

    def _without_latents(self, question: str) -> NotAvailable:
        return NotAvailable(
            f"{type(self).__name__} has no latent variables left for {question}: its component is summed out; ask for "
            f"responsibilities(x), labels(x) or log_prob(x)"
        )

    # -- the start ----------------------------------------------------------------------------------------------------

    def prime(self, data: Batch) -> None:
        """Start at the best of ``restarts`` runs of k-means."""
        batch = cast(dict[str, Tensor], self._prepared(data)[0])
        x, observed = batch["x"], batch.get("observed")
        if len(x) < self.num_components:
            raise ValueError(
                f"`data` has {len(x)} rows for {self.num_components} components; give more, or take fewer components"
            )
        if len(x) > START_ROWS:
            rows = torch.randperm(len(x), device=x.device)[:START_ROWS]
            x, observed = x[rows], None if observed is None else observed[rows]
        observed = None if observed is None else observed.flatten(1)
        _check_seen(observed)
        seeds = torch.randint(2**31 - 1, (self.restarts,)).tolist()
        with torch.no_grad():
            features = self._features(x.flatten(1).double(), observed)
            tried = [memberships(features, self.num_components, seed) for seed in seeds]
            fits = [self._start(x, each, observed) for each in tried]
            best = max(range(len(fits)), key=fits.__getitem__)
            self._start(x, tried[best], observed)
        _warn_of_repeats(features, self.num_components)

    def _features(self, x: Tensor, observed: Tensor | None) -> Tensor:
        """What k-means clusters data ``(N, D)`` by."""
        return standardised(x)

    def _start(self, x: Tensor, weight: Tensor, observed: Tensor | None) -> float:
        """Start where each datum belongs to components as ``weight`` (N, K) says; returns the mean log-density there."""
        raise NotImplementedError


def _check_seen(observed: Tensor | None) -> None:
    """Refuse a number that is never observed."""
    if observed is not None and bool((never := ~observed.any(0)).any()):
        raise ValueError(f"number {int(never.nonzero()[0])} of each datum is missing in all {len(observed)} data; drop it")


def _warn_of_repeats(features: Tensor, count: int) -> None:
    """Say that some components cannot have data of their own."""
    if (distinct := len(torch.unique(features, dim=0))) < count:
        warnings.warn(
            f"`data` has {distinct} distinct rows for num_components={count}: some components have none of their own, and "
            f"Gaussians collapse; take {distinct} or fewer, or spread rounded numbers with "
            "preprocess=pgen.data.Dequantize(levels)",
            stacklevel=2,
        )


def memberships(features: Tensor, count: int, seed: int) -> Tensor:
    """Which cluster each datum belongs to by k-means++ and k-means: one-hot ``(N, count)``, float64.

    Where there are fewer distinct data than clusters, data are shared out between several at random.
    """
    state = random.getstate()
    from sklearn.cluster import KMeans  # draws from Python's random numbers as it is imported

    random.setstate(state)
    clusters = min(count, len(torch.unique(features, dim=0)))
    labels = KMeans(clusters, n_init=1, random_state=seed).fit(features.cpu().numpy()).labels_
    weight = nn.functional.one_hot(torch.as_tensor(labels).long(), clusters).double().to(features.device)
    if clusters == count:
        return weight
    copies = weight[:, torch.arange(count, device=features.device) % clusters]
    shares = copies * (0.5 + torch.rand(copies.shape, dtype=torch.float64, device=features.device))
    return shares / shares.sum(1, keepdim=True)


def smoothed_log_share(weight: Tensor) -> Tensor:
    """Logarithm of the share of the data in each component, one datum added to each."""
    counts = weight.sum(0) + 1
    return (counts / counts.sum()).log()


@dataclass(frozen=True)
class _Vectors:
    """Components over the numbers of x, as a table over x itself."""

    components: Components
    arrays: dict[str, Tensor]
    event_shape: tuple[int, ...]
    observed: Tensor | None = None

    @property
    def support(self) -> Constraint:
        """Of each number."""
        kinds = self.components.support
        return _Flat(kinds, len(self.event_shape)) if isinstance(self.components, Columns) else kinds

    def log_prob(self, x: Tensor) -> Tensor:
        """``(*rows, K)``."""
        flat = x.flatten(-len(self.event_shape))
        return self.components.log_prob(flat, self.arrays, None if self.observed is None else self.observed.flatten(1))

    def sample(self, z: Tensor) -> Tensor:
        """``(*z.shape, *event_shape)``."""
        return self.components.sample(self.arrays, z).unflatten(-1, self.event_shape)


class _Flat(Constraint):
    """A constraint on the numbers of an array in row-major order."""

    def __init__(self, kinds: Constraint, event_dims: int) -> None:
        self.kinds, self.event_dims = kinds, event_dims

    def check(self, value: Tensor) -> Tensor:
        """For each number, whether it may be."""
        return self.kinds.check(value.flatten(-self.event_dims)).view(value.shape)

    def of_column(self, column: int) -> Constraint:
        """The constraint of one number."""
        return self.kinds.of_column(column) if isinstance(self.kinds, ColumnSupports) else self.kinds

    def __repr__(self) -> str:
        return repr(self.kinds)


class _VectorMixture(_Mixture):
    """A mixture of components over the numbers of x."""

    components: Components

    def _make(self, components: Components, hidden: int | Sequence[int], seed: Seed) -> None:
        self.components, self.hidden = components, as_sizes("hidden", hidden)
        with self.initial_weights(seed):
            shapes = {"weights": (self.num_components,), **components.shapes}
            self.arrays = Arrays(shapes, self.context_dim, self.hidden)
            for name, shape in shapes.items():  # components that start alike would stay alike
                getattr(self.arrays, name).data.copy_(0.1 * torch.randn(shape))

    def parts(self, context: Tensor | None, observed: Tensor | None = None) -> tuple[Tensor, Table]:
        """Weights and components, from the context where there is one."""
        arrays = self.arrays(context)
        return arrays["weights"], _Vectors(self.components, arrays, self.event_shape, observed)

    def prime(self, data: Batch) -> None:
        """Start at the best of ``restarts`` runs of k-means."""
        super().prime(data)
        self.components.share_smoothing(self.num_rows or len(cast(dict[str, Tensor], data)["x"]))

    def _features(self, x: Tensor, observed: Tensor | None) -> Tensor:
        return self.components.features(x, observed)

    def _start(self, x: Tensor, weight: Tensor, observed: Tensor | None) -> float:
        flat = x.flatten(1)
        values = self.components.start(flat.double(), weight, observed)
        self.arrays.set({"weights": smoothed_log_share(weight), **values})
        arrays = {name: getattr(self.arrays, name) for name in self.arrays.shapes}
        log_joint = arrays["weights"].log_softmax(-1) + self.components.log_prob(flat, arrays, observed)
        return float(torch.logsumexp(log_joint, -1).double().mean())


class GaussianMixture(_VectorMixture):
    r"""Mixture of Gaussians.

    .. math:: p(x) = \sum_k \pi_k \, \mathcal{N}(x; \mu_k, \Sigma_k)

    Shapes: x ``(N, *event_shape)``; covariances are those of the D numbers of x in row-major order.

    Args:
        event_shape: Shape of one datum.
        num_components: K.
        covariance: ``"full"``, ``"diagonal"``, ``"spherical"``, ``"tied"`` (one full matrix for all) or ``"low_rank"`` (a
            mixture of factor analysers).
        rank: Factors of ``"low_rank"``.
        floor: Variance that the fit adds to each component's, as a share of the variance of the data, number by number: where
            training stands still, :math:`\Sigma_k = S_k + \text{floor} \cdot \operatorname{diag}(s^2)` with the weighted
            scatter :math:`S_k`, as EM with scikit-learn's ``reg_covar`` on standardised data. It acts on gradients;
            ``log_prob`` is the density.
        restarts: Runs of k-means, of which the start with the highest likelihood is taken.
        context_dim: Size of the vector that weights, means and covariances depend on (a mixture density network); 0 for none.
        hidden: Hidden layers of that network.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Raises:
        ValueError: From ``fit``, if a number of x is constant.

    References:
        Bishop (2006), Pattern Recognition and Machine Learning, section 9.2; Ghahramani and Hinton (1996), The EM algorithm for
        mixtures of factor analyzers, CRG-TR-96-1; Bishop (1994), NCRG/94/004.

    Example:
        >>> mixture = GaussianMixture((1,), 2)
        >>> mixture.place([0.5, 0.5], [[-1.0], [1.0]], [[[1.0]], [[1.0]]])
        >>> mixture.log_prob(torch.zeros(1, 1)).value  # log N(0; 1, 1) = - (1 + log 2 pi) / 2
        tensor([-1.4189], dtype=torch.float64)
    """

    family = "gaussian_mixture"
    nan_advice = ", or take models.Mixture, which knows missing entries"

    def __init__(
        self,
        event_shape: Sequence[int],
        num_components: int = 10,
        covariance: str = "full",
        *,
        rank: int | None = None,
        floor: float = 1e-6,
        restarts: int = 4,
        context_dim: int = 0,
        hidden: int | Sequence[int] = (64, 64),
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("num_components", num_components)
        check_positive("restarts", restarts)
        self.num_components, self.restarts = num_components, restarts
        components = GaussianComponents(num_components, math.prod(self.event_shape), covariance, rank, floor)
        self._make(components, hidden, seed)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        gaussians = cast(GaussianComponents, self.components)
        plain = {name: getattr(gaussians, name) for name in ("covariance", "rank", "floor")}
        own = {name: getattr(self, name) for name in ("num_components", "restarts", "context_dim")}
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **own, **plain}

    def place(self, weights: Any, means: Any, covariances: Any) -> None:
        """Set the parameters.

        Args:
            weights: ``(K,)``.
            means: ``(K, D)``.
            covariances: As scikit-learn has them: full ``(K, D, D)``, tied ``(D, D)``, diagonal ``(K, D)``, spherical ``(K,)``;
                of a low rank the diagonals, ``(K, D)``.
        """
        gaussians, like = cast(GaussianComponents, self.components), self.arrays.weights
        weights, means, covariances = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, covariances))
        shapes = {"full": (-1, gaussians.size, gaussians.size), "tied": (1, gaussians.size, gaussians.size)}
        columns = 1 if gaussians.covariance == "spherical" else gaussians.size
        covariances = covariances.reshape(shapes.get(gaussians.covariance, (-1, columns)))
        with keyed_rng(key(0, "place"), gaussians.centre.device):  # a low rank starts at random factors
            values = gaussians.place(means.to(like.device), covariances.to(like.device))
        self.arrays.set({"weights": weights.log(), **values})
        self.primed = True

    def means(self, context: Any = None) -> Tensor:
        r"""Means :math:`\mu`, ``(K, *event_shape)``, of preprocessed data; with a context ``(N, K, *event_shape)``."""
        with torch.no_grad():
            arrays = self.arrays(self._where(context))
            return cast(GaussianComponents, self.components).means(arrays).unflatten(-1, self.event_shape)

    def covariances(self, context: Any = None) -> Tensor:
        r"""Covariances of the D numbers, ``(K, D, D)``, of preprocessed data; with a context ``(N, K, D, D)``."""
        with torch.no_grad():
            return cast(GaussianComponents, self.components).covariances(self.arrays(self._where(context)))


class Mixture(_VectorMixture):
    r"""Mixture of independent bits, categories, Gaussians, or a kind for each number (a latent class model).

    .. math:: p(x) = \sum_k \pi_k \prod_d p_{kd}(x_d)

    Shapes: x ``(N, *event_shape)``. NaN in x is a missing entry, whose factors are left out: densities are exactly those of the
    entries observed, and ``fit`` maximises them (entries missing at random).

    Args:
        event_shape: Shape of one datum.
        num_components: K.
        likelihood: Of every number of x: ``"bernoulli"`` (the default), ``"categorical"`` or ``"gaussian"`` (diagonal).
        num_classes: Values of categories.
        columns: What each number of x holds, where they differ: ``"continuous"`` (Gaussian), ``"binary"``,
            ``("categorical", K)``, or ``("ordinal", K)``, whose order is not made use of.
        smoothing: Counts that the fit adds to each value of bits and categories in each component (Laplace); it acts on
            gradients.
        floor: Of Gaussians, see ``GaussianMixture``.
        restarts: Runs of k-means, of which the start with the highest likelihood is taken.
        context_dim: Size of the vector that weights and parameters depend on; 0 for none.
        hidden: Hidden layers of that network.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Raises:
        ValueError: From ``fit``, if a continuous number is constant, or a number is never observed.

    References:
        Lazarsfeld and Henry (1968), Latent structure analysis; Bishop (2006), section 9.3.3.

    Example:
        >>> mixture = Mixture((3,), 2)
        >>> x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).repeat(50, 1)
        >>> run = mixture.fit(x, steps=100, progress=False)
        >>> mixture.labels(x[:2]).unique().numel(), round(float(mixture.weights()[0]), 2)
        (2, 0.5)
    """

    family = "mixture"
    also = ("observed",)

    def __init__(
        self,
        event_shape: Sequence[int],
        num_components: int = 10,
        likelihood: str | None = None,
        *,
        num_classes: int | None = None,
        columns: Sequence[Kind] | None = None,
        smoothing: float = 1.0,
        floor: float = 1e-6,
        restarts: int = 4,
        context_dim: int = 0,
        hidden: int | Sequence[int] = (64, 64),
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("num_components", num_components)
        check_positive("restarts", restarts)
        if not smoothing >= 0:
            raise ValueError(f"`smoothing` should be a number from 0 up, got {smoothing!r}")
        self.num_components, self.restarts, self.smoothing, self.floor = num_components, restarts, smoothing, floor
        self.likelihood = likelihood or ("bernoulli" if columns is None else None)
        self.num_classes, self.columns = num_classes, plain_columns(columns)
        components = vector_components(
            num_components, math.prod(self.event_shape), self.likelihood, num_classes=num_classes, columns=columns,
            floor=floor, smoothing=smoothing,
        )  # fmt: skip
        self._make(components, hidden, seed)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("num_components", "likelihood", "num_classes", "columns", "smoothing", "floor", "restarts", "context_dim")
        own = {name: getattr(self, name) for name in names}
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **own}

    def _checked(self, argument: str, x: Any, context: Any, numbers: Tensor | None = None) -> dict[str, Tensor]:
        """As elsewhere; where all entries are there, nothing is said of them. Rows of a source are all alike."""
        batch = super()._checked(argument, x, context, numbers)
        if numbers is None and bool(batch["observed"].all()):
            del batch["observed"]
        return batch

    def impute(
        self, x: Any, num_samples: int | None = None, *, context: Any = None, seed: Seed = 0, progress: bool = True
    ) -> Tensor:
        """x with its missing entries (NaN) filled in; what is observed stays as it is.

        Args:
            x: Data, ``(N, *event_shape)``.
            num_samples: Fill in that many joint draws of the missing entries given the others; None for means of continuous
                numbers, and the most probable value of each bit and category.
            context: Context of each datum.
            seed: Keys the draws.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            ``(N, *event_shape)``, or ``(num_samples, N, *event_shape)``.

        Example:
            >>> mixture = Mixture((2,), 2, columns=["binary", "continuous"])
            >>> x = torch.tensor([[0.0, 1.0], [1.0, 5.0], [0.0, 1.2], [1.0, 5.2]]).repeat(25, 1)
            >>> run = mixture.fit(x, steps=100, progress=False)
            >>> mixture.impute(torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]])).round()
            tensor([[1., 5.],
                    [0., 1.]])
        """
        check_positive("num_samples", num_samples, allow_none=True)
        batch = self._batch("x", x, context)
        self._check_support(batch)

        def filled(rows: Batch) -> Tensor:
            given = cast(dict[str, Any], rows)
            logits, table = self.parts(given.get("context"), given.get("observed"))
            posterior = (logits.log_softmax(-1) + table.log_prob(given["x"])).softmax(-1)
            vectors = cast(_Vectors, table)
            if num_samples is None:
                return self.components.centre_of(vectors.arrays, posterior).unflatten(-1, self.event_shape)
            z = dist.Categorical(posterior).sample(torch.Size([int(num_samples)]))
            return vectors.sample(z).movedim(0, 1).to(given["x"])

        found = self._rows(filled, "impute", batch, seed, progress, compile="eager")
        if self.preprocess is not None:
            found = self.preprocess.inverse(found.reshape(-1, *self.event_shape)).reshape(found.shape)
        found = found if num_samples is None else found.movedim(1, 0)
        return torch.where(batch.get("observed", torch.ones_like(batch["x"], dtype=torch.bool)), batch["x"], found)


class MixtureOf(_Mixture):
    r"""Mixture of any models of this package whose density is exact; they may differ from each other.

    With a context the weights come from a network of it and the components take it if they were made for one: a mixture of
    experts.

    Args:
        components: The models, all with the same ``event_shape``, and with the mixture's ``context_dim`` or none. Each is
            trained with the mixture, from one cluster of k-means; give them different seeds.
        context_dim: Size of the vector that the weights depend on; 0 for none.
        hidden: Hidden layers of that network.
        preprocess: Invertible preprocessing of x, in place of that of the components.
        seed: Keys the initial weights.

    References:
        Jacobs et al. (1991), Adaptive mixtures of local experts, Neural Computation 3:79.

    Example:
        >>> from pgen.models import Gaussian
        >>> mixture = MixtureOf([Gaussian((1,)), Gaussian((1,))])
        >>> mixture.log_prob(torch.zeros(1, 1)).value  # both are N(0, 1): - log(2 pi) / 2
        tensor([-0.9189], dtype=torch.float64)
    """

    family = "mixture_of"

    def __init__(
        self,
        components: Sequence[GenerativeModel | dict[str, Any]],
        *,
        context_dim: int = 0,
        hidden: int | Sequence[int] = (64,),
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        if isinstance(components, nn.Module):
            own = type(components).__name__
            raise TypeError(f"`components` should be a list of models, got {own}; did you mean [{own}(...), ...]?")
        models = [_component(number, each) for number, each in enumerate(components)]
        if not models:
            raise ValueError("`components` is empty; give models, such as [Gaussian((2,)), Gaussian((2,))]")
        super().__init__(models[0].event_shape, preprocess=preprocess, context_dim=context_dim)
        for number, model in enumerate(models):
            _check_component(number, model, self.event_shape, context_dim)
        self.num_components, self.restarts, self.hidden = len(models), 1, as_sizes("hidden", hidden)
        self.components = nn.ModuleList(models)
        with self.initial_weights(seed):
            self.arrays = Arrays({"weights": (len(models),)}, context_dim, self.hidden)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values; components as family and settings."""
        made = [{"family": model.family, "settings": model.settings()} for model in self._models()]
        return {"components": made, "hidden": list(self.hidden), "context_dim": self.context_dim}

    def _models(self) -> list[GenerativeModel]:
        return cast(list[GenerativeModel], list(self.components))

    def parts(self, context: Tensor | None, observed: Tensor | None = None) -> tuple[Tensor, Table]:
        """Weights, from the context where there is one, and the components as they are."""
        return self.arrays(context)["weights"], _Models(self._models(), context)

    def _start(self, x: Tensor, weight: Tensor, observed: Tensor | None) -> float:
        self.arrays.set({"weights": smoothed_log_share(weight)})
        for number, (model, share) in enumerate(zip(self._models(), weight.T)):
            mine, least = x[share > 0], max(2, getattr(model, "num_components", None) or 2)
            model.num_rows = len(mine) * self.num_rows // len(x)
            mine = mine if len(mine) >= least else x
            try:
                model.prime({"x": mine})
            except ValueError as error:
                raise ValueError(f"component {number}, which starts at {len(mine)} of the data: {error}") from error
        return 0.0  # there is but one start


def _component(number: int, given: Any) -> GenerativeModel:
    """A model, or one made from its family's name and settings."""
    if isinstance(given, GenerativeModel):
        return given
    if not isinstance(given, dict):
        raise TypeError(f"component {number} should be a model of pgen, got {kind_of(given)}")
    if given["family"] not in FAMILIES:
        raise ValueError(f"component {number} is of an unknown family {given['family']!r}{nearest(given['family'], FAMILIES)}")
    return FAMILIES[given["family"]](**given["settings"])


def _check_component(number: int, model: GenerativeModel, event_shape: tuple[int, ...], context_dim: int) -> None:
    name = f"component {number} ({type(model).__name__})"
    if model.event_shape != event_shape:
        raise ValueError(
            f"{name} is about data of shape {model.event_shape}, component 0 of shape {event_shape}; make them alike"
        )
    if type(model).guide not in (GenerativeModel.guide, _Mixture.guide):
        raise ValueError(
            f"{name} has latents that only a guide knows, so the mixture's density would not be exact; leave it out"
        )
    if model.preprocess is not None:
        raise ValueError(f"{name} preprocesses x by itself; give `preprocess` to the mixture instead")
    if model.context_dim not in (0, context_dim):
        raise ValueError(f"{name} takes a context of size {model.context_dim}, the mixture of {context_dim}; make them alike")
    if beside := [argument for argument in model.also if argument != "observed"]:
        raise ValueError(f"{name} takes {beside[0]!r} beside x, which a mixture cannot pass on; leave it out")


@dataclass(frozen=True)
class _Models:
    """Models as a table: each is run as a program of its own, in the midst of the mixture's."""

    models: list[GenerativeModel]
    context: Tensor | None

    @property
    def support(self) -> Constraint:
        """Values that some component takes."""
        rows = 1 if self.context is None else len(self.context)
        with isolated(), aside(), keyed_rng(0, next(self.models[0].parameters()).device), PlateSize(rows), torch.no_grad():
            fns = [innermost(run_program(model.model, self._batch(model, None))["x"].fn) for model in self.models]
        return _Union([fn.support for fn in fns])

    def log_prob(self, x: Tensor) -> Tensor:
        """``(N, K)``."""
        with aside():
            return torch.stack([self._rows(model, x) for model in self.models], -1)

    def sample(self, z: Tensor) -> Tensor:
        """A draw of the component numbered z of each row; all components draw."""
        with aside(), PlateSize(len(z)):
            drawn = [run_program(model.model, self._batch(model, None))["x"].value for model in self.models]
        every = torch.stack(torch.broadcast_tensors(*drawn))
        return every[z, torch.arange(len(z), device=z.device)]

    def _rows(self, model: GenerativeModel, x: Tensor) -> Tensor:
        terms = list(run_model(model.model, self._batch(model, x), {}).values())
        return sum((term.rows for term in terms[1:]), terms[0].rows)

    def _batch(self, model: GenerativeModel, x: Tensor | None) -> dict[str, Any]:
        return {"x": x, "context": self.context if model.context_dim else None}


class _Union(Constraint):
    """What at least one of several constraints allows."""

    def __init__(self, kinds: Sequence[Constraint]) -> None:
        self.kinds = kinds

    def check(self, value: Tensor) -> Tensor:
        """For each number, or each datum."""
        inside = [kind.check(value) for kind in self.kinds]
        least = min(each.dim() for each in inside)
        flat = [each.flatten(least).all(-1) if each.dim() > least else each for each in inside]
        return torch.stack(flat).any(0)

    def __repr__(self) -> str:
        return " or ".join(sorted({repr(kind) for kind in self.kinds}))
