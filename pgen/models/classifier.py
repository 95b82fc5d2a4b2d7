r"""A classifier by Bayes' rule: the density of each class, and how frequent it is.

.. math:: p(y \mid x) = \frac{p(y)\, p(x \mid y)^{1/T}}{\sum_k p(k)\, p(x \mid k)^{1/T}}, \qquad
    p(x, y) = p(x \mid y)\, p(y), \qquad p(x) = \sum_k p(x, k)

Any family serves: a model for each class, or one whose context is the class. The temperature T is 1 until ``calibrate`` sets it
on held-out data: densities of many dimensions are far too sure of themselves, which changes no prediction under equal priors
and all probabilities.

Ng and Jordan (2001), On discriminative vs. generative classifiers, NIPS 14; tempering after Guo et al. (2017),
arXiv:1706.04599, here of the likelihood alone, so that an infinite T gives back the prior.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import files
from ..base import COMPOSITES, GenerativeModel, built, description
from ..contracts import Kind, Measure, Run, Score, Seed, as_seed, check_positive
from ..data.arrays import as_batch
from ..evaluation.calibration import Calibration, assess, check_labels
from ..training.progress import Progress

__all__ = ["GenerativeClassifier"]


class GenerativeClassifier(nn.Module):
    r"""p(y | x) from p(x | y) and p(y), over any family.

    Shapes: x ``(N, *event_shape)``, y ``(N,)`` with classes 0, ..., K - 1; probabilities ``(N, K)``.

    Where ``log_prob`` of the models is exact, so are p(x, y), p(x) and p(y | x); where it is a lower bound (a VAE), the first
    two are lower bounds and p(y | x) is an *estimate*: ``kind`` says which.

    Args:
        models: A function of the class's number that makes its model, a list of one model a class, or one model whose
            ``context_dim`` is K: it is conditioned on the class as a one-hot vector.
        num_classes: K; needed with a function alone.
        prior: p(y), ``(K,)``; by default the classes' shares of the data given to ``fit``.

    Example:
        >>> from pgen.models import Gaussian
        >>> x = torch.tensor([[-2.0], [0.0], [1.0], [3.0]])
        >>> classifier = GenerativeClassifier(lambda k: Gaussian((1,)), num_classes=2)
        >>> runs = classifier.fit(x, torch.tensor([0, 0, 1, 1]))
        >>> classifier.predict_proba(torch.tensor([[0.5]]))  # half way between N(-1, 1) and N(2, 1)
        tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """

    log_prior: Tensor
    temperature: Tensor

    def __init__(
        self,
        models: Callable[[int], GenerativeModel] | Sequence[GenerativeModel] | GenerativeModel,
        num_classes: int | None = None,
        *,
        prior: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.conditional = isinstance(models, GenerativeModel)
        members, self.num_classes = _members(models, num_classes)
        self.models = nn.ModuleList(members)
        self.event_shape = members[0].event_shape
        self.given = prior is not None
        equal = [1 / self.num_classes] * self.num_classes
        start = _checked_prior(equal if prior is None else prior, self.num_classes)
        self.register_buffer("log_prior", start.double().log())
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    # -- fitting ------------------------------------------------------------------------------------------------------

    def fit(
        self,
        x: Any,
        y: Any,
        *,
        validation: tuple[Any, Any] | None = None,
        seed: Seed = 0,
        progress: bool = True,
        **options: Any,
    ) -> list[Run]:
        """Fit each class's model to the data of its class, or the one model to all of them with the class as context.

        Args:
            x: Data.
            y: Their classes.
            validation: Held-out x and y, which stop the fits early.
            seed: Keys the fits.
            progress: Whether to show progress.
            **options: Of the models' own ``fit``: epochs, optimizer, batch_size...

        Returns:
            A Run for each model.

        Raises:
            ValueError: If labels are out of range or a class has no data.
        """
        data, labels = self._checked("y", x, y)
        held = None if validation is None else self._checked("validation", *validation)
        counts = torch.bincount(labels, minlength=self.num_classes)
        for name, found in (("y", labels), ("validation", None if held is None else held[1])):
            empty = (
                [] if found is None else (torch.bincount(found, minlength=self.num_classes) == 0).nonzero().flatten().tolist()
            )
            if empty and not (self.conditional and name == "validation"):
                raise ValueError(f"`{name}` has no data of class {empty[0]} (classes are 0 to {self.num_classes - 1})")
        common = {"seed": as_seed(seed), "progress": progress, **options}
        runs = (self._fit_conditional if self.conditional else self._fit_each)(data, labels, held, common)
        if not self.given:
            self.log_prior.copy_((counts.double() / counts.sum()).log())
        self.temperature.fill_(1.0)
        return runs

    def _fit_each(self, x: Tensor, y: Tensor, held: tuple[Tensor, Tensor] | None, common: dict[str, Any]) -> list[Run]:
        runs = []
        with Progress(self.num_classes, bool(common["progress"])) as bar:
            for k, model in enumerate(self._members()):
                bar.at(k, f"class {k}")
                some = None if held is None else held[0][held[1] == k]
                try:
                    runs.append(model.fit(x[y == k], validation=some, **common))
                except ValueError as error:
                    raise ValueError(f"class {k}: {error}") from error
        return runs

    def _fit_conditional(self, x: Tensor, y: Tensor, held: tuple[Tensor, Tensor] | None, common: dict[str, Any]) -> list[Run]:
        if held is not None:
            common = {"validation": held[0], "validation_context": self._one_hot(held[1]), **common}
        return [self._members()[0].fit(x, context=self._one_hot(y), **common)]

    def calibrate(self, x: Any, y: Any, *, num_samples: int = 100, seed: Seed = 0, progress: bool = True) -> float:
        """Set the temperature to the one with the least log loss on held-out data, and return it.

        Args:
            x: Data that the models were not fitted to.
            y: Their classes.
            num_samples: Draws a datum, where ``log_prob`` is a bound.
            seed: Keys them.
            progress: Whether to show a bar on what takes more than two seconds.
        """
        from scipy.optimize import minimize_scalar

        data, labels = self._checked("y", x, y)
        likelihood = self._scores(data, num_samples, seed, progress)[0]

        def loss(log_temperature: float) -> float:
            logits = self.log_prior.to(likelihood) + likelihood * math.exp(-log_temperature)
            return float(nn.functional.cross_entropy(logits, labels.to(likelihood.device)))

        best = minimize_scalar(loss, bounds=(math.log(1e-3), math.log(1e4)), method="bounded", options={"xatol": 1e-4})
        self.temperature.fill_(math.exp(best.x))
        return float(self.temperature)

    # -- questions ----------------------------------------------------------------------------------------------------

    def log_prob(self, x: Any, y: Any = None, *, num_samples: int = 100, seed: Seed = 0, progress: bool = True) -> Score:
        """log p(x, y) of data with their classes, or log p(x) summed over the classes; the temperature has no part in it.

        Args:
            x: Data.
            y: Their classes; None for the marginal.
            num_samples: Draws a datum, where ``log_prob`` of the models is a bound.
            seed: Keys them.
            progress: Whether to show a bar on what takes more than two seconds.
        """
        data = self._data(x)
        labels = None if y is None else check_labels("y", y, len(data), self.num_classes)
        likelihood, error, kind, measure = self._scores(data, num_samples, seed, progress)
        joint = self.log_prior.to(likelihood) + likelihood
        samples = None if error is None else num_samples
        size = math.prod(self.event_shape)
        if labels is not None:
            at = labels.to(joint.device)[:, None]
            own = None if error is None else error.gather(1, at)[:, 0]
            return Score(joint.gather(1, at)[:, 0], kind, size, own, samples, measure)
        shares = joint.softmax(1)
        noise = None if error is None else (shares * error).square().sum(1).sqrt()
        return Score(joint.logsumexp(1), kind, size, noise, samples, measure)

    def predict_proba(self, x: Any, *, num_samples: int = 100, seed: Seed = 0, progress: bool = True) -> Tensor:
        """p(y | x) at the temperature, ``(N, K)``; an estimate where ``log_prob`` of the models is a bound."""
        return self._log_posterior(x, num_samples, seed, progress).exp()

    def _log_posterior(self, x: Any, num_samples: int = 100, seed: Seed = 0, progress: bool = True) -> Tensor:
        likelihood = self._scores(self._data(x), num_samples, seed, progress)[0]
        return (self.log_prior.to(likelihood) + likelihood / self.temperature.to(likelihood)).log_softmax(1)

    def predict(self, x: Any, **options: Any) -> Tensor:
        """The most probable class of each datum, ``(N,)``."""
        return self.predict_proba(x, **options).argmax(1)

    def evaluate(self, x: Any, y: Any, *, bins: int = 15, **options: Any) -> Calibration:
        """Accuracy, log loss and calibration on data with known classes."""
        data, labels = self._checked("y", x, y)
        kind: Kind = "exact" if self.kind(data) == "exact" else "estimate"
        log_probs = self._log_posterior(data, **options)
        return assess(log_probs.exp(), labels, bins=bins, kind=kind, log_probs=log_probs)

    def kind(self, x: Any) -> Kind:
        """What ``log_prob`` is for data like x; p(y | x) is ``exact`` or, where this is a bound, an estimate."""
        return self._scores(self._data(x)[:1], 2, 0, False)[2]

    def sample(self, n: int, y: int, *, seed: Seed = 0) -> Tensor:
        """Draw x of class y, ``(n, *event_shape)``."""
        label = check_labels("y", torch.tensor([y]), 1, self.num_classes)
        if self.conditional:
            return self._members()[0].sample(n, self._one_hot(label), seed=seed)
        return self._members()[int(label)].sample(n, seed=seed)

    # -- parts --------------------------------------------------------------------------------------------------------

    def _members(self) -> list[GenerativeModel]:
        return cast(list[GenerativeModel], list(self.models))

    def _one_hot(self, y: Tensor) -> Tensor:
        return nn.functional.one_hot(y, self.num_classes).float()

    def _data(self, x: Any, argument: str = "x") -> Tensor:
        data = as_batch(x, name=argument)
        if not isinstance(data, Tensor):
            raise TypeError(f"`{argument}` should be one tensor or array, got {type(data).__name__}")
        return data

    def _checked(self, argument: str, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        data = self._data(x, "x" if argument == "y" else argument)
        return data, check_labels(argument, y, len(data), self.num_classes)

    def _scores(self, x: Tensor, num_samples: int, seed: Seed, progress: bool) -> tuple[Tensor, Tensor | None, Kind, Measure]:
        """log p(x | k) of every datum and class, ``(N, K)``, its Monte Carlo error, and what they are."""
        options: dict[str, Any] = {"num_samples": num_samples, "seed": as_seed(seed), "progress": progress}
        members = self._members()
        if self.conditional:
            classes = self._one_hot(torch.arange(self.num_classes))
            scores = [members[0].log_prob(x, context=classes[k : k + 1], **options) for k in range(self.num_classes)]
        else:
            scores = [model.log_prob(x, **options) for model in members]
        kinds = {score.kind for score in scores} - {"exact"}
        kind: Kind = "exact" if not kinds else kinds.pop() if len(kinds) == 1 else "estimate"
        zero = torch.zeros_like(scores[0].value)
        noisy = any(score.mc_error is not None for score in scores)
        errors = [zero if score.mc_error is None else score.mc_error for score in scores]
        measures = {score.measure for score in scores}
        measure: Measure = measures.pop() if len(measures) == 1 else ""
        value = torch.stack([s.value for s in scores], 1)
        self._check_fitted(value)
        return value, torch.stack(errors, 1) if noisy else None, kind, measure

    def _check_fitted(self, scores: Tensor) -> None:
        """Refuse models that saw no data and are all alike; warn of those that differ, as they may be set by hand."""
        unfitted = [k for k, model in enumerate(self._members()) if not model.primed]
        if not unfitted:
            return
        which = "its model has" if self.conditional else f"the models of classes {', '.join(map(str, unfitted))} have"
        text = f"this classifier is not fitted yet, as {which} seen no data; call fit(x, y) first"
        if bool((scores == scores[:, :1]).all()):
            raise ValueError(text)
        warnings.warn(f"{text}, or set model.primed = True where you set a model's parameters yourself", stacklevel=2)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write all models, prior and temperature to one file that executes nothing when read; ``pgen.load`` reads it."""
        members = [description(model) for model in self._members()]
        settings = {"num_classes": self.num_classes, "conditional": self.conditional, "given": self.given, "members": members}
        files.write(path, self.state_dict(), {"family": "classifier", "settings": settings})


def _load(metadata: dict[str, Any], tensors: dict[str, Tensor], path: Any) -> GenerativeClassifier:
    settings = metadata["settings"]
    members = []
    for number, about in enumerate(settings["members"]):
        prefix = f"models.{number}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        members.append(built(about, own, path))
    classifier = GenerativeClassifier(members[0] if settings["conditional"] else members, settings["num_classes"])
    for name in ("log_prior", "temperature"):
        if name not in tensors or tensors[name].shape != getattr(classifier, name).shape:
            raise ValueError(f"{path} has no {name!r} of shape {tuple(getattr(classifier, name).shape)}")
        getattr(classifier, name).copy_(tensors[name])
    classifier.given = bool(settings["given"])
    return classifier


COMPOSITES["classifier"] = _load


def _members(models: Any, num_classes: int | None) -> tuple[list[GenerativeModel], int]:
    """The models and the number of classes, checked."""
    check_positive("num_classes", num_classes, allow_none=True)
    if num_classes == 1:
        raise ValueError("`num_classes` should be two or more, got 1")
    if isinstance(models, GenerativeModel):
        if models.context_dim < 2 or num_classes not in (None, models.context_dim):
            raise ValueError(
                f"one model for all needs context_dim={num_classes or 'the number of classes'}, got {models.context_dim}"
            )
        return [models], models.context_dim
    if callable(models):
        if num_classes is None:
            raise ValueError("`num_classes` is missing: a function that makes models needs the number of classes")
        models = [models(k) for k in range(num_classes)]
    members = list(models)
    if len(members) < 2 or num_classes not in (None, len(members)):
        raise ValueError(f"`models` should be one model a class, {num_classes or 'two or more'}, got {len(members)}")
    for k, model in enumerate(members):
        if not isinstance(model, GenerativeModel) or not model.has_density:
            raise TypeError(f"the model of class {k} should be a family with a density, got {type(model).__name__}")
        if model.event_shape != members[0].event_shape:
            shapes = f"{model.event_shape}, that of class 0 {members[0].event_shape}"
            raise ValueError(f"the model of class {k} has event shape {shapes}")
    if len({id(model) for model in members}) < len(members):
        raise ValueError("two classes share one model: make a new one at each call of the function")
    return members, len(members)


def _checked_prior(prior: Sequence[float] | Tensor, classes: int) -> Tensor:
    p = torch.as_tensor(prior).double()
    if p.shape != (classes,) or bool((p <= 0).any()) or abs(float(p.sum()) - 1) > 1e-6:
        raise ValueError(f"`prior` should be {classes} positive probabilities that add up to one, got {p.tolist()}")
    return p
