r"""The hidden Markov model: sequences from a chain of states that nobody sees.

.. math:: p(x_{1:T} \mid c) = \sum_{z_{1:T}} \pi_{z_1}(c) \, p(x_1 \mid z_1, c)
    \prod_{t=2}^T A_{z_{t-1} z_t}(c) \, p(x_t \mid z_t, c)

The forward algorithm sums over all paths exactly, inside the one observed site, so that ``log_prob`` is exact and ``fit``
climbs the likelihood itself by gradients (there is no Baum-Welch). States start at k-means clusters of frames, transitions at
how often the clusters follow each other. By default 600 steps of Adam, 64 sequences each, from a rate of 0.05 by a cosine to
zero (0.01 with a context).

With a context c, one vector a sequence, probabilities of first states and of transitions and what states emit are functions of
it by one network, added to arrays that start where they would without: an input-output hidden Markov model whose input stands
still.

Rabiner (1989), A tutorial on hidden Markov models and selected applications in speech recognition, Proc. IEEE 77:257; Bengio
and Frasconi (1995), An input output HMM architecture, NIPS 7:427 (an input at each position, one network for each state).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..base import GenerativeModel
from ..contracts import Batch, NotAvailable, Seed, as_sizes, check_choice, check_event_shape, check_positive
from ..data.arrays import as_batch, check_finite
from ..data.transforms import Transform
from ..distributions.columns import Kind, plain_columns
from ..distributions.components import (
    Arrays,
    BernoulliComponents,
    CategoricalComponents,
    Columns,
    OfComponents,
    Values,
    gradient_alone,
    vector_components,
)
from ..distributions.events import with_event_shape
from ..distributions.markov import HiddenMarkovChain, emissions, filtered, most_probable, moved, smoothed
from ..programs import check_support
from ..training.fit import Training
from ..training.optim import Adam
from .mixture import START_ROWS, memberships
from .sequence import OF_PADDING, checked_lengths, length_advice

__all__ = ["HiddenMarkov"]


class HiddenMarkov(GenerativeModel):
    r"""Hidden Markov model with categorical, Gaussian or binary emissions.

    Shapes: x ``(N, T, *frame)``; ``lengths`` ``(N,)`` where they are unequal: ``{"x": x, "lengths": n}``, see
    ``pgen.data.pad``; context ``(N, context_dim)``. The numbers of a frame are independent given the state, unless Gaussians
    have a full covariance.

    Args:
        event_shape: ``(T,)``, or ``(T, *frame)``.
        num_states: K.
        likelihood: Of every number of a frame: ``"categorical"`` (the default), ``"gaussian"`` or ``"bernoulli"``.
        num_classes: Values of categories.
        columns: What each number of a frame holds, where they differ: ``"continuous"`` (Gaussian), ``"binary"``,
            ``("categorical", K)``, or ``("ordinal", K)``, whose order is not made use of.
        covariance: Of Gaussian frames: ``"full"``, ``"diagonal"``, ``"spherical"`` or ``"tied"``, as in ``GaussianMixture``.
        smoothing: Counts that the fit adds to each transition, each first state and each value of bits and categories.
        floor: Of Gaussians, see ``GaussianMixture``.
        restarts: Runs of k-means, of which the start with the highest likelihood is taken.
        context_dim: Size of the vector that first states, transitions and emissions of a sequence depend on; 0 for none.
        hidden: Hidden layers of that network.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> chain = HiddenMarkov((2,), 2, num_classes=2)
        >>> chain.place([1.0, 0.0], [[0.5, 0.5], [0.0, 1.0]])
        >>> chain.arrays.logits.data.copy_(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).shape  # each state says its number
        torch.Size([2, 1, 2])
        >>> chain.log_prob(torch.tensor([[0.0, 1.0]])).value.exp().round(decimals=3)  # first 0, then a half
        tensor([0.5000], dtype=torch.float64)
    """

    family = "hidden_markov"
    also = ("lengths",)
    sequential = True
    nan_advice = OF_PADDING
    default_batch_size = 64
    default_steps = 600

    def __init__(
        self,
        event_shape: Sequence[int],
        num_states: int = 8,
        likelihood: str | None = None,
        *,
        num_classes: int | None = None,
        columns: Sequence[Kind] | None = None,
        covariance: str = "diagonal",
        smoothing: float = 0.1,
        floor: float = 1e-4,
        restarts: int = 2,
        context_dim: int = 0,
        hidden: int | Sequence[int] = (64, 64),
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("num_states", num_states)
        check_positive("restarts", restarts)
        check_choice("covariance", covariance, ("full", "diagonal", "spherical", "tied"))
        self.num_states, self.covariance, self.smoothing, self.floor = num_states, covariance, smoothing, floor
        self.likelihood = likelihood or ("categorical" if columns is None else None)
        self.num_classes, self.columns, self.restarts = num_classes, plain_columns(columns), restarts
        self.hidden = as_sizes("hidden", hidden)
        self.components = vector_components(
            num_states, math.prod(self.event_shape[1:]), self.likelihood, num_classes=num_classes, columns=columns,
            covariance=covariance, floor=floor, smoothing=smoothing,
        )  # fmt: skip
        self.num_data: Tensor
        self.register_buffer("num_data", torch.ones(()))
        shapes = {"initial": (num_states,), "transition": (num_states, num_states), **self.components.shapes}
        with self.initial_weights(seed):
            self.arrays = Arrays(shapes, context_dim, self.hidden)
            for name, shape in shapes.items():
                getattr(self.arrays, name).data.copy_(0.3 * torch.randn(shape))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = (
            "num_states", "likelihood", "num_classes", "columns", "covariance", "smoothing", "floor", "restarts", "context_dim",
        )  # fmt: skip
        own = {name: getattr(self, name) for name in names}
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **own}

    # -- the program --------------------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, context: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """p(x | c); of sequences with lengths, p(x_1, ..., x_n | n, c)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(lengths, context), obs=x)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """The states are summed out."""

    def distribution(self, lengths: Tensor | None = None, context: Tensor | None = None) -> HiddenMarkovChain:
        """The distribution of sequences, one chain for each row of the context where there is one."""
        initial, transition, arrays = self._parts(context)
        return HiddenMarkovChain(initial, transition, self.components, arrays, self.event_shape, lengths)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Values]:
        """Probabilities of first states and of transitions, and the arrays of what states emit."""
        arrays = self.arrays(context)
        return *self._chain(arrays.pop("initial"), arrays.pop("transition")), arrays

    def _chain(self, initial: Tensor, transition: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities from logits, their gradient with the added counts in it."""
        initial, transition = initial.log_softmax(-1), transition.log_softmax(-1)
        counts = self.smoothing / self.num_data * (initial.sum(-1) + transition.sum((-2, -1)))
        return (initial + gradient_alone(counts)[..., None]).exp(), transition.exp()

    def initial(self, context: Any = None) -> Tensor:
        r"""Probabilities :math:`\pi` of the first state, ``(K,)``; with a context ``(N, K)``."""
        with torch.no_grad():
            return self._parts(self._where(context))[0]

    def transition(self, context: Any = None) -> Tensor:
        """Probabilities A of the next state (columns) given this one (rows), ``(K, K)``; with a context ``(N, K, K)``."""
        with torch.no_grad():
            return self._parts(self._where(context))[1]

    def place(self, initial: Any, transition: Any) -> None:
        """Set the probabilities of first states ``(K,)`` and of transitions ``(K, K)``; the least is 1e-30.

        Of a model with a context these are what its network changes.
        """
        chain = {"initial": initial, "transition": transition}
        self.arrays.set({n: torch.as_tensor(p, dtype=torch.float64).clamp(min=1e-30).log() for n, p in chain.items()})
        self.primed = True

    # -- data ---------------------------------------------------------------------------------------------------------

    def _checked(self, argument: str, x: Any, context: Any, numbers: Tensor | None = None) -> dict[str, Tensor]:
        """As elsewhere; whatever stands behind the end of a sequence becomes zero."""
        if isinstance(x, dict) and x.get("lengths") is not None and "x" in x:
            values, lengths = (torch.as_tensor(as_batch(x[name])) for name in ("x", "lengths"))
            if values.dim() >= 2 and lengths.shape == values.shape[:1]:
                inside = torch.arange(values.shape[1], device=values.device) < lengths.to(values.device)[:, None]
                x = {**x, "x": torch.where(_beside(inside, values), values, torch.zeros_like(values))}
        return super()._checked(argument, x, context, numbers)

    def _shape_advice(self, argument: str, x: Tensor) -> str:
        return length_advice(argument, x, self.event_shape)

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        found = super()._further(x, given)
        if "lengths" in found:
            found["lengths"] = checked_lengths(found["lengths"], self.event_shape[0])
        return found

    def _event_size(self, batch: dict[str, Tensor]) -> float:
        if "lengths" not in batch:
            return super()._event_size(batch)
        return float(batch["lengths"].double().mean()) * math.prod(self.event_shape[1:])

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = "cosine" if settings.schedule is None and settings.stop != "converged" else settings.schedule
        return Adam(0.01 if self.context_dim else 0.05, betas=(0.9, 0.99)), replace(settings, schedule=schedule)

    # -- the start ----------------------------------------------------------------------------------------------------

    def prime(self, data: Batch) -> None:
        """Start at the best of ``restarts`` clusterings of frames."""
        batch = cast(dict[str, Tensor], self._prepared(data)[0])
        total = self.num_rows or len(batch["x"])
        self.num_data.fill_(total)
        rows = torch.randperm(len(batch["x"]), device=batch["x"].device)[: max(1, START_ROWS // self.event_shape[0])]
        x = batch["x"][rows]
        inside = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if "lengths" in batch:
            inside = torch.arange(x.shape[1], device=x.device) < batch["lengths"][rows][:, None]
        seeds = torch.randint(2**31 - 1, (self.restarts,)).tolist()
        with torch.no_grad():
            seen = self._features(x, inside)
            tried = [memberships(seen, self.num_states, seed) for seed in seeds]
            fits = [self._start(x, inside, each) for each in tried]
            self._start(x, inside, tried[max(range(len(fits)), key=fits.__getitem__)])
            frames = batch["lengths"].sum() if "lengths" in batch else batch["x"].shape[:2].numel()
            self.components.share_smoothing(int(frames) * total // len(batch["x"]))

    def _features(self, x: Tensor, inside: Tensor) -> Tensor:
        """What frames are clustered by: themselves, or categories with their neighbours, ``(frames, features)``."""
        if not isinstance(self.components, CategoricalComponents):
            return self.components.features((x.flatten(2) if x.dim() > 2 else x[..., None])[inside].double())
        hot = (x.flatten(2)[..., None] if x.dim() > 2 else x[..., None, None]) == torch.arange(self.components.num_classes).to(
            x
        )
        hot = (hot & inside[..., None, None]).flatten(2).to(x.dtype)
        nothing = torch.zeros_like(hot[:, :1])
        return torch.cat([hot, torch.cat([nothing, hot[:, :-1]], 1), torch.cat([hot[:, 1:], nothing], 1)], -1)[inside]

    def _start(self, x: Tensor, inside: Tensor, weight: Tensor) -> float:
        """Start where each frame belongs to states as ``weight`` (frames, K) says; returns the mean log-density there."""
        frames = (x.flatten(2) if x.dim() > 2 else x[..., None])[inside].double()
        values = self.components.start(frames, weight)
        spread = weight.new_zeros(*inside.shape, self.num_states)
        spread[inside] = weight
        initial = spread[:, 0].sum(0) + 1
        moves = torch.einsum("ntj,ntk->jk", spread[:, :-1], spread[:, 1:]) + 1
        chain = {"initial": initial / initial.sum(), "transition": moves / moves.sum(-1, keepdim=True)}
        self.arrays.set({name: p.log() for name, p in chain.items()} | values)
        return float(self.distribution(inside.sum(1)).log_prob(x).double().mean())

    # -- questions ----------------------------------------------------------------------------------------------------

    def states(self, x: Any, lengths: Any = None, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        r"""Posterior probabilities of states, :math:`p(z_t \mid x_{1:n})`, ``(N, T, K)``; zero behind the end of a sequence."""

        def posterior(batch: Batch) -> Tensor:
            given = cast(dict[str, Tensor], batch)
            found = smoothed(*self._read(given))
            return torch.where(_inside(given)[..., None], found, torch.zeros_like(found))

        return self._rows(posterior, "states", self._sequences(x, lengths, context), seed, progress, compile="eager")

    def viterbi(self, x: Any, lengths: Any = None, context: Any = None, *, seed: Seed = 0, progress: bool = True) -> Tensor:
        """The most probable path of states as a whole, ``(N, T)``; behind the end of a sequence -1."""

        def path(batch: Batch) -> Tensor:
            given = cast(dict[str, Tensor], batch)
            inside = _inside(given)
            found, _ = most_probable(*self._read(given), inside)
            return torch.where(inside, found, torch.full_like(found, -1))

        return self._rows(path, "viterbi", self._sequences(x, lengths, context), seed, progress, compile="eager")

    def next(self, prefix: Any, context: Any = None) -> Any:
        """The distribution of the next frame after each prefix.

        Args:
            prefix: ``(N, t, *frame)``, t from 0.
            context: One for each, or one for all.

        Returns:
            A distribution over one frame, batch shape ``(N,)``: ``.log_prob``, ``.sample``; of single categories ``.probs``.
        """
        given = as_batch(prefix, name="prefix")
        if not isinstance(given, Tensor):
            raise TypeError(f"`prefix` should be one tensor or array, got {type(given).__name__}")
        check_event_shape("prefix", given, (*given.shape[1:2], *self.event_shape[1:]))
        check_finite(given, "prefix")
        given = self._like(given)
        with torch.no_grad():
            if self.preprocess is None:
                check_support("`prefix`", self.distribution(), given)
            initial, transition, arrays = self._parts(self._where(context, len(given)))
            weights = initial.double().expand(len(given), -1)
            if given.shape[1]:
                given = given if self.preprocess is None else self.preprocess(given)
                reached, _ = filtered(initial, transition, emissions(self.components, arrays, given, None))
                weights = moved(reached[:, -1], transition.double())
            return self._frame(weights.to(initial), {name: values.detach() for name, values in arrays.items()})

    def _frame(self, weights: Tensor, arrays: Values) -> Any:
        """Frames of a state drawn with these probabilities ``(N, K)``."""
        if len(self.event_shape) == 1 and isinstance(self.components, CategoricalComponents):
            return dist.Categorical(moved(weights, arrays["logits"][..., 0, :].softmax(-1)))
        if len(self.event_shape) == 1 and isinstance(self.components, BernoulliComponents):
            return dist.Bernoulli(moved(weights, arrays["logits"].sigmoid())[:, 0])
        if isinstance(self.components, Columns):
            return with_event_shape(OfComponents(weights, self.components, arrays), self.event_shape[1:])
        each = self.components.distribution(arrays)
        mixed = dist.MixtureSameFamily(dist.Categorical(weights), each.expand((*weights.shape,)))
        return with_event_shape(mixed, self.event_shape[1:])

    def _read(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the recursions take: first states, transitions, and the log-density of each position in each state."""
        initial, transition, arrays = self._parts(batch.get("context"))
        return initial, transition, emissions(self.components, arrays, batch["x"], batch.get("lengths"))

    def _sequences(self, x: Any, lengths: Any, context: Any) -> dict[str, Tensor]:
        if lengths is not None:
            x = {"x": x, "lengths": lengths}
        batch = self._batch("x", x, context)
        self._check_support(batch)
        return batch

    def _without_latents(self, question: str) -> NotAvailable:
        return NotAvailable(
            f"{type(self).__name__} has no latent variables left for {question}: its states are summed out; ask for "
            f"states(x), viterbi(x) or log_prob(x)"
        )


def _beside(mask: Tensor, x: Tensor) -> Tensor:
    """A mask ``(N, T)`` with as many axes as x."""
    return mask.reshape(*mask.shape, *(1,) * (x.dim() - 2))


def _inside(batch: dict[str, Tensor]) -> Tensor:
    """Which positions belong to their sequence, ``(N, T)``."""
    x = batch["x"]
    if "lengths" not in batch:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return torch.arange(x.shape[1], device=x.device) < batch["lengths"][:, None]
