r"""Energy-based models: any network as minus the logarithm of a density, up to its normaliser.

.. math:: p(x) = \frac{1}{Z} \exp(-E(x)), \qquad E(x) = e_\theta(x) + \frac12 \Bigl\| \frac{x - m}{s} \Bigr\|^2

The second term, with the data's own means m and standard deviations s, makes every network whose output grows at most linearly
a density. With classes, the network gives one logit each and :math:`e(x) = -\log \sum_y \exp f_y(x)`, so that
:math:`p(y \mid x)` is their softmax: a classifier that is a density too.

Energies add up: ``a + b`` is the product of two densities, ``a - 0.5 * b`` turns one away from another. One with a context has
a density for each of them, ``a.at(context=c)``, and one with classes a density for each class, ``a.at(label=y)``.

LeCun et al. (2006), A tutorial on energy-based learning; Du and Mordatch (2019), arXiv:1903.08689; Grathwohl et al. (2020),
Your classifier is secretly an energy based model, arXiv:1912.03263; Hinton (2002), doi:10.1162/089976602760128018 (products of
experts); Du, Li, Mordatch (2020), Compositional visual generation with energy based models, arXiv:2004.06030.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import _evaluating
from ..contracts import Batch, NotAvailable, Score, Seed, as_seed, as_sizes, check_choice, check_positive
from ..data.batches import key
from ..data.transforms import Transform
from ..distributions.energy import Unnormalised
from ..evaluation.annealing import AIS
from ..evaluation.calibration import check_labels
from ..evaluation.normalizer import LogNormalizer, annealed_normalizer, settled
from ..evaluation.tempering import Tempering, move_on, tempered
from ..nn import ACTIVATIONS, MLP, waves
from ..objectives import PersistentContrastiveDivergence
from ..programs import Sites, isolated, keyed_rng, lists_sites
from ..training import Adam, Training
from .unnormalised import UnnormalisedModel

__all__ = ["EnergyBased", "EnergySum"]

MOST_OCTAVES = 16


class EnergyBased(UnnormalisedModel):
    r"""A density given by its energy.

    Shapes: x ``(N, *event_shape)`` real, context ``(N, context_dim)``, labels ``(N,)`` with classes 0, ..., K - 1.

    ``fit`` carries Langevin chains at eight temperatures from step to step (``PersistentContrastiveDivergence``);
    ``SlicedScoreMatching()``, ``DenoisingScoreMatching(sd)`` and ``NoiseContrastive(noise)`` need no chains. With
    ``num_labels``, ``fit({"x": x, "labels": y})`` trains p(x) and p(y | x) together. ``log_prob`` is ``unnormalised`` until
    ``log_normalizer()`` has been asked for.

    Args:
        event_shape: Shape of one datum.
        energy: e: ``"dense"``, ``"conv"`` (images ``(H, W)`` or ``(C, H, W)``), or a module from x ``(N, *event_shape)`` (and
            context) to ``(N,)``, or ``(N, K)`` logits, with parameters. A model with a module of your own cannot be saved.
        hidden: Sizes of the hidden layers of ``"dense"``; channels of the layers of ``"conv"``, each of which halves the
            image but the first.
        activation: By name; smooth ones, as chains follow the gradient.
        octaves: Of waves of x, in the data's standard deviations, that the dense network sees beside x: for fine structure in
            few numbers, such as narrow islands (6).
        confine: Whether the Gaussian term is there.
        num_labels: K, of the joint energy classifier; 0 for none.
        tempering: How ``sample`` draws unless told otherwise: temperatures from noise to the model, transitions at the end,
            steps of each.
        context_dim: Size of the vector that the energy depends on beside x; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> model = EnergyBased((1,))
        >>> run = model.fit(torch.randn(200, 1), steps=5, progress=False)
        >>> model.log_prob(torch.zeros(3, 1)).kind
        'unnormalised'
    """

    family = "energy"
    also = ("labels",)
    default_batch_size = 200
    default_epochs = 100

    def __init__(
        self,
        event_shape: Sequence[int],
        energy: str | nn.Module = "dense",
        hidden: int | Sequence[int] = (128, 128),
        activation: str = "silu",
        *,
        octaves: int = 0,
        confine: bool = True,
        num_labels: int = 0,
        tempering: tuple[int, int, int] = (100, 50, 3),
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        self.tempering = _tempering(*tempering)
        if num_labels == 1 or num_labels < 0:
            raise ValueError(f"`num_labels` should be 0 (no classes) or 2 and more, got {num_labels}")
        self.hidden = as_sizes("hidden", hidden, least=1 if energy == "conv" else 0)
        self.activation = ACTIVATIONS.name(activation)
        if not 0 <= octaves <= MOST_OCTAVES or (octaves and energy != "dense"):
            raise ValueError(f"`octaves` should be a number up to {MOST_OCTAVES}, with energy='dense', got {octaves}")
        self.octaves, self.confine, self.num_labels = int(octaves), bool(confine), int(num_labels)
        self.register_buffer("data_loc", torch.zeros(self.event_shape))
        self.register_buffer("data_scale", torch.ones(self.event_shape))
        self.network_name = energy if isinstance(energy, str) else ""
        with self.initial_weights(seed):
            self.network = self._network(energy) if isinstance(energy, str) else _own_module(energy)
        self.own = not self.network_name

    data_loc: Tensor
    data_scale: Tensor

    def _network(self, energy: str) -> nn.Module:
        check_choice("energy", energy, ("dense", "conv"))
        outputs, activation = self.num_labels or 1, ACTIVATIONS[self.activation]
        if energy == "dense":
            seen = math.prod(self.event_shape) * (1 + 2 * self.octaves)
            return _Dense(seen + self.context_dim, self.hidden, outputs, activation)
        if self.context_dim:
            raise ValueError("energy='conv' takes no context; use 'dense', or a module of your own")
        return _Convolutional(self.event_shape, self.hidden, outputs, activation)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("activation", "octaves", "confine", "num_labels", "context_dim")
        own = {"event_shape": list(self.event_shape), "energy": self.network_name, "hidden": list(self.hidden)}
        return {**own, **{name: getattr(self, name) for name in names}, "tempering": list(astuple(self.tempering))}

    def _check_savable(self) -> None:
        if not self.network_name:
            raise ValueError(
                f"the energy {type(self.network).__name__} is a module of your own, which no file can hold; use 'dense' or "
                "'conv', or save its state_dict yourself"
            )

    def prime(self, data: Batch) -> None:
        """Take the means and standard deviations of the data, raw and preprocessed.

        Raises:
            ValueError: If the model has classes and the data no labels, or labels of one class alone.
        """
        batch = cast(dict[str, Tensor], data)
        if self.num_labels and "labels" not in batch:
            raise ValueError(
                f"this model has num_labels={self.num_labels} and was given no labels, so that its classes would mean nothing; "
                'use fit({"x": x, "labels": y}), or leave num_labels out'
            )
        if self.num_labels:
            self._check_classes(batch["labels"])
        with torch.no_grad():
            prepared = self._prepared(batch)[0]["x"]
            if not (self.own or self.octaves):  # waves are of standardised x
                self._warn_of_scale(prepared)
            places = ((self.loc, self.scale, prepared), (self.data_loc, self.data_scale, batch["x"]))
            for loc, scale, x in places:
                sd = x.std(0, correction=0)
                loc.copy_(x.mean(0))
                scale.copy_(sd.clamp(min=0.1 * float(sd.mean())) if float(sd.mean()) > 0 else torch.ones_like(sd))

    def _check_classes(self, labels: Tensor) -> None:
        """Refuse labels of a single class, and warn of classes of which there are none; rows of a stream are not all here."""
        if len(labels) < max(self.num_rows, 2):
            return
        counts = torch.bincount(labels, minlength=self.num_labels)
        never = (counts == 0).nonzero().flatten().tolist()
        if len(never) == self.num_labels - 1:
            raise ValueError(
                f"every datum has label {int(labels[0])}, from which no class is learnt: give data of two classes or more, or "
                "leave num_labels out"
            )
        if never:
            which = ", ".join(map(str, never[:5])) + (", ..." if len(never) > 5 else "")
            warnings.warn(
                f"no datum has label {which} of num_labels={self.num_labels}: p(y | x) and draws of such classes mean nothing",
                stacklevel=2,
            )

    def default_objective(self) -> PersistentContrastiveDivergence:
        """Persistent chains of Langevin steps with Metropolis' correction at eight temperatures."""
        return PersistentContrastiveDivergence(2, "langevin", num_chains=1000, num_temps=8)

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        falling = settings.schedule is None and settings.stop == "steps"
        return Adam(5e-3), replace(
            settings, schedule="cosine" if falling else settings.schedule, clip_norm=settings.clip_norm or 10.0
        )

    def _further(self, x: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        found = super()._further(x, given)
        if "labels" in found:
            if not self.num_labels:
                raise ValueError("this model was made without classes; make it with num_labels=... to give labels")
            found["labels"] = check_labels("labels", found["labels"], len(x), self.num_labels)
        return found

    def _begun(self, objective: Any, data: Batch, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
        if self.own:
            self._check_network(cast(dict[str, Tensor], data), seed)
        return super()._begun(objective, data, seed, device, dtype)

    def _check_network(self, data: dict[str, Tensor], seed: int) -> None:
        """A network of the user's own takes the shape of the data."""
        first = {name: value[:2] for name, value in data.items()}
        with isolated(self.home), keyed_rng(key(seed, "network"), self.loc.device), _evaluating(self), torch.no_grad():
            try:
                self._outputs(self._prepared(first)[0]["x"], first.get("context"))
            except (RuntimeError, TypeError) as error:
                shapes = [f"({', '.join(map(str, ('N', *self.event_shape)))})", f"(N, {self.context_dim})"]
                seen = f"x of shape {shapes[0]}" + (f" and a context of shape {shapes[1]}" if self.context_dim else "")
                text = " ".join(str(error).split())[:300]
                raise ValueError(f"`energy` {type(self.network).__name__} was given {seen}: {text}") from error

    def _advice(self, error: Exception, batch: Batch) -> str:
        """What an energy that is no finite number may come from."""
        found = super()._advice(error, batch)
        if found or "has a log-density of" not in str(error):
            return found
        if bad := self._lost():
            return f": parameter {bad!r} is not finite"
        x = cast(dict[str, Tensor], batch)["x"]
        return (
            f": the energy of x in [{float(x.min()):.3g}, {float(x.max()):.3g}] is not a finite number; look for a logarithm, "
            f"a root or an overflow in {type(self.network).__name__}"
        )

    # -- the energy ---------------------------------------------------------------------------------------------------

    @lists_sites
    def sites(self, x: Any, context: Tensor | None = None, labels: Tensor | None = None) -> Sites:
        """p(x | c) up to its normaliser, and p(y | x)."""
        yield "x", Unnormalised(lambda at: self._energy(at, context), self.event_shape), x
        if labels is not None:
            yield "labels", dist.Categorical(logits=self._outputs(x, context)), labels

    def _outputs(self, x: Tensor, context: Tensor | None) -> Tensor:
        """What the network gives: ``(N, 1)`` energies or ``(N, K)`` logits."""
        seen = waves(((x - self.loc) / self.scale).flatten(1), self.octaves) if self.octaves else x
        arguments = [seen] if context is None else [seen, context]
        out = self.network(*arguments)
        wanted = (len(x), self.num_labels) if self.num_labels else (len(x),)
        if tuple(out.shape) != wanted and (self.num_labels or tuple(out.shape) != (len(x), 1)):
            raise ValueError(f"`energy` should give shape {wanted} for {len(x)} data, got {tuple(out.shape)}")
        return out

    def _energy(self, x: Tensor, context: Tensor | None = None, label: int | None = None) -> Tensor:
        """E(x) of preprocessed x, ``(N,)``; with a class y, minus log p(x, y) up to the same constant."""
        out = self._outputs(x, context)
        energy = out.reshape(-1) if not self.num_labels else -out.logsumexp(1) if label is None else -out[:, label]
        return energy + 0.5 * ((x - self.loc) / self.scale).square().flatten(1).sum(1) if self.confine else energy

    def log_density(self, x: Tensor, context: Tensor | None = None, label: int | None = None) -> Tensor:
        """log p(x) without its normaliser in the units of the data, as a tensor with a gradient, ``(N,)``.

        With ``label`` y it is log p(x, y), less the same constant.
        """
        if self.preprocess is None:
            return -self._energy(x, context, label)
        u, log_det = self.preprocess.forward_with_log_det(x)
        return log_det - self._energy(u, context, label)

    def predict_proba(self, x: Any, context: Any = None) -> Tensor:
        """p(y | x), the softmax of the logits, ``(N, num_labels)``.

        Raises:
            NotAvailable: Without classes.
        """
        if not self.num_labels:
            raise NotAvailable("this energy has no classes; make it with num_labels=..., or use GenerativeClassifier")
        batch = self._batch("x", x, context)
        with torch.no_grad(), _evaluating(self), keyed_rng(key(0, "prepare"), self.loc.device):
            return self._outputs(self._prepared(batch)[0]["x"], batch.get("context")).softmax(1)

    # -- normaliser and samples ---------------------------------------------------------------------------------------

    def log_normalizer(  # type: ignore[override]
        self,
        context: Any = None,
        *,
        num_temps: int | None = None,
        num_chains: int = 100,
        leapfrog: int = 10,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> LogNormalizer:
        """log Z by annealing from a Gaussian with the data's means and standard deviations, and bounds from both sides.

        Args:
            context: One context, whose Z it is; nothing is then kept for ``log_prob``.
            num_temps: Temperatures; None for as few of 60, 250 and 1000 as bring the standard error to 0.02 nats and the
                bounds within 0.25 of each other.
            num_chains: Chains each way. Backward ones begin at ``sample``, so the upper bound is as good as that is.
            leapfrog: Steps of each transition.
            seed: Keys all noise.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            The estimate, in the units of preprocessed data; ``log_prob`` goes on with it.

        Raises:
            FloatingPointError: If the energy is not a number; what was known of log Z before is then kept.
        """
        _check_annealing(num_temps, num_chains, leapfrog)
        given = self._given(context, num_chains)
        draws = self.sample(num_chains, context, seed=seed, compile=compile, progress=progress)
        options = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(options["seed"], "prepare"), self.loc.device):  # it may draw noise
                ends = self._prepared({"x": self._like(draws)})[0]["x"]
            law = (lambda x, *context: -self._energy(x, *context), self.loc, self.scale, ends, given)
            found = settled(
                lambda count: annealed_normalizer(*law, settings=AIS(count, num_chains, leapfrog), **options), num_temps
            )
        if not self.context_dim:
            self.log_z.copy_(torch.tensor([found.value, max(found.error, 1e-12)]))
        return found

    def sample(
        self,
        n: int = 1,
        context: Any = None,
        *,
        label: int | None = None,
        start: str = "noise",
        num_temps: int | None = None,
        num_steps: int | None = None,
        leapfrog: int | None = None,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Draw x by chains: approximate, the better the more temperatures and steps.

        Args:
            n: How many.
            context: One context for all, shape ``(1, context_dim)``, or one for each.
            label: y, one class for all: draws are then of p(x | y).
            start: ``"noise"``: a population that is led from a Gaussian to the model, weighed and resampled on the way;
                ``"chains"``: those that the last fit kept (256, repeated where more are asked for), moved on by ``num_steps``.
                In many dimensions these have the modes' shares better than a population from noise.
            num_temps: Temperatures from the Gaussian to the model, instead of the model's own number of them.
            num_steps: Transitions of Hamiltonian Monte Carlo at the end.
            leapfrog: Steps of each.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.

        Raises:
            FloatingPointError: If a parameter, or the energy where chains begin, is not a number.
        """
        check_positive("n", n)
        check_choice("start", start, ("noise", "chains"))
        self.check_parameters()
        asked = zip((num_temps, num_steps, leapfrog), astuple(self.tempering))
        settings, given = _tempering(*(own if wanted is None else wanted for wanted, own in asked)), self._given(context, n)
        options: dict[str, Any] = {"settings": settings, **self._asked(seed, compile, progress)}

        y = self._class(label)

        def log_density(x: Tensor, context: Tensor | None = None) -> Tensor:
            return -self._energy(x, context, y)

        with isolated(self.home), _evaluating(self), torch.no_grad():
            if start == "noise":
                x = tempered(log_density, self.loc, self.scale, int(n), given, **options)
            else:
                x = move_on(log_density, self.loc, self.scale, self._kept(int(n), given, y), given, **options)
            return x if self.preprocess is None else self.preprocess.inverse(x)

    def _given(self, context: Any, n: int) -> list[Tensor]:
        return [] if context is None and not self.context_dim else [self._like(self._context(context, n))]

    def _class(self, label: Any) -> int | None:
        """One class, checked."""
        if label is None:
            return None
        if not self.num_labels:
            raise ValueError("this energy was made without classes; make it with num_labels=... to ask for a `label`")
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if number not in range(self.num_labels):
            raise ValueError(f"`label` should be one class, 0 to {self.num_labels - 1}, got {label!r:.60}")
        return int(number)

    def _kept(self, n: int, given: Sequence[Tensor], label: int | None) -> Tensor:
        kept = self.kept_chains()
        if kept is None or given or label is not None:
            what = "context" if given else "class"
            why = "the last fit kept no chains" if kept is None else f"chains are kept for no single {what}"
            raise ValueError(f"start='chains' is not possible: {why}; use start='noise'")
        return kept[0][torch.arange(n, device=self.loc.device) % len(kept[0])]

    # -- composition --------------------------------------------------------------------------------------------------

    def at(self, *, context: Any = None, label: int | None = None) -> EnergySum:
        """The density of x at one context, or within one class, to draw from and to be added to others.

        Args:
            context: c, shape ``(context_dim,)`` or ``(1, context_dim)``: the density is p(x | c).
            label: y, a class: the density is p(x | y).

        Returns:
            A sum of one energy, which has ``sample``, ``log_prob`` and ``log_normalizer`` of its own.

        Example:
            >>> model = EnergyBased((2,), num_labels=3)
            >>> both = model.at(label=0) + model.at(label=2)  # what is likely in both classes
            >>> both.log_prob(torch.zeros(4, 2)).kind
            'unnormalised'
        """
        if context is not None:
            context = torch.as_tensor(context)
            context = context[None] if context.dim() == 1 else context
        given = self._given(context, 1)
        return EnergySum([(1.0, _Expert(self, given[0] if given else None, self._class(label)))])

    def __add__(self, other: Any) -> EnergySum:
        """The product of two densities."""
        return EnergySum([(1.0, self)]) + other

    def __sub__(self, other: Any) -> EnergySum:
        """One density over another."""
        return EnergySum([(1.0, self)]) - other

    def __mul__(self, weight: float) -> EnergySum:
        """The density to a power."""
        return EnergySum([(1.0, self)]) * weight

    __rmul__ = __mul__

    def __neg__(self) -> EnergySum:
        """The density turned upside down, to be added to others."""
        return EnergySum([(-1.0, self)])


@dataclass(frozen=True, eq=False)
class _Expert:
    """A model's density of x alone: at one context ``(1, context_dim)`` and within one class, where it has them."""

    model: EnergyBased
    context: Tensor | None = None
    label: int | None = None

    def log_density(self, x: Tensor) -> Tensor:
        context = None if self.context is None else self.context.to(x).expand(len(x), -1)
        return self.model.log_density(x, context, self.label)


class EnergySum:
    r"""A weighted sum of energies: the product of densities to powers, :math:`p(x) \propto \prod_k p_k(x)^{w_k}`.

    Made by ``a + b``, ``2 * a``, ``a - 0.5 * b`` of ``EnergyBased`` models over one kind of x, or by ``a.at(context=...)`` and
    ``a.at(label=...)``; each keeps its preprocessing. It is not trained, and not saved: its parts are.

    Args:
        terms: Weights and models, or models at a context or class.

    References:
        Hinton (2002), doi:10.1162/089976602760128018; Du, Li, Mordatch (2020), arXiv:2004.06030, section 3 (conjunction and
        negation).
    """

    def __init__(self, terms: Sequence[tuple[float, EnergyBased | _Expert]]) -> None:
        self.terms: tuple[tuple[float, _Expert], ...] = tuple(
            (float(weight), _Expert(own) if isinstance(own, EnergyBased) else own) for weight, own in terms
        )
        first = self.terms[0][1].model
        for weight, expert in self.terms:
            model = expert.model
            if model.event_shape != first.event_shape:
                raise ValueError(f"energies of data of shapes {first.event_shape} and {model.event_shape} cannot be added")
            if model.context_dim and expert.context is None:
                raise ValueError("an energy with a context has a law for each of them: add model.at(context=...)")
            if model.preprocess is not None and model.preprocess.kind != "exact":
                raise ValueError(
                    "an energy of dequantised data cannot be added, nor taken at a context or class: its preprocessing draws "
                    "noise; draw with model.sample(n, context, label=...)"
                )
            if not math.isfinite(weight):
                raise ValueError(f"the weight of an energy should be a finite number, got {weight}")
        self.event_shape = first.event_shape

    def __add__(self, other: Any) -> EnergySum:
        """The product of densities."""
        if isinstance(other, EnergyBased):
            other = EnergySum([(1.0, other)])
        return EnergySum([*self.terms, *other.terms]) if isinstance(other, EnergySum) else NotImplemented

    def __sub__(self, other: Any) -> EnergySum:
        """One density over another."""
        return self + -1.0 * other if isinstance(other, (EnergyBased, EnergySum)) else NotImplemented

    def __mul__(self, weight: float) -> EnergySum:
        """The density to a power."""
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        return EnergySum([(weight * own, model) for own, model in self.terms])

    __rmul__ = __mul__

    def __neg__(self) -> EnergySum:
        """The density turned upside down."""
        return -1.0 * self

    def log_density(self, x: Tensor) -> Tensor:
        """The weighted sum of log-densities without normaliser, as a tensor with a gradient, ``(N,)`` nats."""
        parts = [weight * expert.log_density(x) for weight, expert in self.terms]
        return sum(parts[1:], parts[0])

    def log_prob(self, x: Any) -> Score:
        """Log-density of each datum, ``unnormalised``."""
        first = self.terms[0][1]
        batch = first.model._batch("x", x, first.context)
        with torch.no_grad(), _Evaluating(self._models):
            value = self.log_density(batch["x"]).double()
        return Score(value, "unnormalised", math.prod(self.event_shape), measure="density")

    def energy(self, x: Any) -> Tensor:
        """Minus that, ``(N,)`` nats."""
        return -self.log_prob(x).value

    def sample(
        self, n: int = 1, *, num_temps: int = 100, num_steps: int = 50, leapfrog: int = 3, seed: Seed = 0,
        compile: str = "auto", progress: bool = True,
    ) -> Tensor:  # fmt: skip
        """Draw x as ``EnergyBased.sample`` does, from noise.

        Raises:
            ValueError: If the weights leave no Gaussian term that keeps x from running away.
            FloatingPointError: If a parameter, or the energy where chains begin, is not a number.
        """
        check_positive("n", n)
        self._check_confined()
        for model in self._models:
            model.check_parameters()
        settings = _tempering(num_temps, num_steps, leapfrog)
        options: dict[str, Any] = {"settings": settings, "seed": as_seed(seed), "compile": compile, "progress": progress}
        with _Evaluating(self._models), torch.no_grad():
            return tempered(self.log_density, *self._reference(), int(n), held=self._held(), **options)

    def log_normalizer(
        self, *, num_temps: int | None = None, num_chains: int = 100, leapfrog: int = 10, seed: Seed = 0, compile: str = "auto",
        progress: bool = True,
    ) -> LogNormalizer:  # fmt: skip
        """log Z of the sum, as ``EnergyBased.log_normalizer`` finds it, in the units of the data."""
        _check_annealing(num_temps, num_chains, leapfrog)
        draws = self.sample(num_chains, seed=seed, compile=compile, progress=progress)
        options: dict[str, Any] = {"seed": as_seed(seed), "compile": compile, "progress": progress, "held": self._held()}
        with isolated(), _Evaluating(self._models), torch.no_grad():
            law = (self.log_density, *self._reference(), draws)
            return settled(
                lambda count: annealed_normalizer(*law, settings=AIS(count, num_chains, leapfrog), **options), num_temps
            )

    @property
    def _models(self) -> list[EnergyBased]:
        return list({id(expert.model): expert.model for _, expert in self.terms}.values())

    def _held(self) -> list[Tensor]:
        own = [t for model in self._models for t in (*model.parameters(), *model.buffers())]
        contexts = [expert.context for _, expert in self.terms if expert.context is not None]
        return list({id(t): t for t in (*own, *contexts)}.values())

    def _reference(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a Gaussian that covers the data of all parts of positive weight."""
        own = [expert.model for weight, expert in self.terms if weight > 0]
        low = torch.stack([m.data_loc - m.data_scale for m in own]).amin(0)
        high = torch.stack([m.data_loc + m.data_scale for m in own]).amax(0)
        return (low + high) / 2, (high - low) / 2

    def _check_confined(self) -> None:
        """Refuse a sum whose density grows without end."""
        confined = [(weight, expert.model) for weight, expert in self.terms if expert.model.confine]
        total = sum(weight * (1 / model.data_scale.square()) for weight, model in confined)
        if not isinstance(total, Tensor) or not bool((total > 0).all()):
            weights = ", ".join(f"{weight:g}" for weight, _ in self.terms)
            raise ValueError(
                f"the weights ({weights}) leave nothing that keeps x from running away: what is taken off outweighs the "
                "Gaussian terms of what is added; make negative weights smaller"
            )


class _Evaluating:
    """Several models with dropout off, for a while."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        self._each = [_evaluating(model) for model in models]

    def __enter__(self) -> None:
        for one in self._each:
            one.__enter__()

    def __exit__(self, *args: object) -> None:
        for one in reversed(self._each):
            one.__exit__(*args)


def _check_annealing(num_temps: int | None, num_chains: int, leapfrog: int) -> None:
    check_positive("num_temps", num_temps, allow_none=True)
    check_positive("num_chains", num_chains)
    check_positive("leapfrog", leapfrog)


def _tempering(num_temps: int, num_steps: int, leapfrog: int) -> Tempering:
    for name, value in (("num_temps", num_temps), ("num_steps", num_steps), ("leapfrog", leapfrog)):
        check_positive(name, value)
    return Tempering(int(num_temps), int(num_steps), int(leapfrog))


def _own_module(energy: Any) -> nn.Module:
    """An energy of the user's own, checked."""
    if not isinstance(energy, nn.Module):
        got = f"the class {energy.__name__}; give an instance" if isinstance(energy, type) else type(energy).__name__
        raise TypeError(f"`energy` should be 'dense', 'conv' or a torch.nn.Module from x to (N,), got {got}")
    if next(energy.parameters(), None) is None:
        raise ValueError(
            f"`energy` {type(energy).__name__} has no parameters, so that there is nothing to fit; give it one, such as a "
            "factor torch.nn.Parameter(torch.ones(()))"
        )
    return energy


class _Dense(nn.Module):
    """A perceptron over all numbers of x and the context."""

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = MLP(inputs, hidden, outputs, activation)
        if outputs == 1:  # the normaliser takes care of a constant
            cast(nn.Linear, self.layers[-1]).bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs ``(N, outputs)``."""
        flat = x.flatten(1)
        return self.layers(flat if context is None else torch.cat([flat, context], 1))


class _Convolutional(nn.Module):
    """Convolutions of which all but the first halve the image, and a linear layer over what is left."""

    def __init__(
        self, event_shape: Sequence[int], channels: Sequence[int], outputs: int, activation: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        if len(event_shape) not in (2, 3):
            raise ValueError(f"energy='conv' needs images (H, W) or (C, H, W), got event shape {tuple(event_shape)}")
        size = (1, *event_shape) if len(event_shape) == 2 else tuple(event_shape)
        self.size = size
        layers: list[nn.Module] = []
        for number, (before, after) in enumerate(zip((size[0], *channels), channels)):
            stride = 2 if number else 1
            layers += [nn.Conv2d(before, after, 3 + (stride == 2), stride, padding=1), activation()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        height, width = (n >> (len(channels) - 1) for n in size[1:])
        if not height or not width:
            raise ValueError(f"`hidden` has {len(channels)} layers, which halve {tuple(event_shape)} to nothing; give fewer")
        self.last = nn.Linear(channels[-1] * height * width, outputs, bias=outputs > 1)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(N, outputs)``."""
        return self.last(self.layers(x.reshape(-1, *self.size)))
