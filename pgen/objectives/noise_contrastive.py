r"""Noise-contrastive estimation: a density is learnt, with its normaliser, by telling data from noise of a known law."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..contracts import Batch, Kind, check_positive
from ..programs import PlateSize, run_laws, run_program, run_values
from .density import check_without_latents, conditionals, is_discrete, law, log_density, parts
from .elbo import ELBO, Scalars

__all__ = ["NoiseContrastive"]

Program = Callable[..., Any]


class Contrast(nn.Module):
    """The noise, held constant, and the model's log-normaliser, which is trained.

    Args:
        noise: A fitted family.
        like: Says device and dtype.
    """

    def __init__(self, noise: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.noise = copy.deepcopy(noise).to(like.device, like.dtype).requires_grad_(False)
        self.log_normalizer = nn.Parameter(like.new_zeros(()))


@dataclass(frozen=True)
class NoiseContrastive:
    r"""Noise-contrastive estimation: logistic regression between data and :math:`\nu` times as many draws of noise q.

    .. math:: G(x) = \log f(x) - c - \log q(x) - \log \nu, \qquad \mathrm{loss} =
        \mathbb{E}_{data} \log(1 + e^{-G(x)}) + \nu \, \mathbb{E}_{q} \log(1 + e^{G(x)})

    c is learnt beside the model and tends to :math:`\log Z` (metric ``log_normalizer``; an energy with a constant of its own
    shares it out between the two). Consistent; efficient where the noise is like the data.

    Args:
        noise: A family whose ``log_prob`` is exact, such as ``pgen.models.Gaussian(shape)``; one that has not been fitted is
            fitted to the data first. It sees preprocessed data, and no context.
        ratio: :math:`\nu`, draws of noise a datum.

    References:
        Gutmann and Hyvarinen (2010), Noise-contrastive estimation, AISTATS, PMLR 9:297; (2012), JMLR 13:307, eq. 8.
    """

    noise: Any
    ratio: int = 1
    contrast: Contrast | None = field(default=None, kw_only=True, repr=False, compare=False)

    kind: ClassVar[Kind] = "unnormalised"
    word: ClassVar[str] = "noise-contrastive loss"
    takes_sites: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("ratio", self.ratio)
        if not isinstance(self.noise, nn.Module) or not hasattr(self.noise, "model"):
            raise TypeError(f"`noise` should be a model such as pgen.models.Gaussian(shape), got {type(self.noise).__name__}")

    @property
    def state(self) -> nn.Module | None:
        """The noise and the normaliser."""
        return self.contrast

    def begin(self, model: Program, guide: Program, batch: Batch) -> NoiseContrastive:
        """The same with noise that is fitted to these data."""
        check_without_latents(self, model, batch)
        x, *_ = parts(batch)
        noise = copy.deepcopy(self.noise)
        if tuple(noise.event_shape) != tuple(x.shape[1:]):
            raise ValueError(f"`noise` has event shape {tuple(noise.event_shape)}, the data {tuple(x.shape[1:])}")
        if noise.preprocess is not None:
            raise ValueError("`noise` should have no preprocessing of its own: it sees the data as the model does")
        if not getattr(noise, "has_density", True):
            raise ValueError(
                f"`noise` should have an exact density, and {type(noise).__name__} has none; use pgen.models.Gaussian"
            )
        if hasattr(noise, "take_normalizer"):
            raise ValueError(f"`noise` should have an exact density, and {type(noise).__name__} lacks its normaliser")
        if not noise.primed:
            noise.fit(x, progress=False)
        observing = [fn for fn, value in run_laws(model, batch).values() if value is x]
        if observing:  # factors alone do not say what x is
            self._check_kinds(observing[0], law(noise.model, {"x": x[:1]}), noise)
        drawn = run_program(noise.guide, {"x": x[:1]})
        if drawn:
            raise ValueError(f"`noise` should have an exact density, and this one draws latents ({next(iter(drawn))!r})")
        return replace(self, contrast=Contrast(noise, x))

    def _check_kinds(self, of_model: Any, of_noise: Any, noise: Any) -> None:
        """A mass and a density have no ratio."""
        kinds = ["a mass" if is_discrete(fn) else "a density" for fn in (of_model, of_noise)]
        if kinds[0] != kinds[1]:
            bits = "noise over the same values, such as MADE(shape, likelihood='bernoulli')"
            fix = bits if kinds[0] == "a mass" else "Gaussian(shape)"
            raise ValueError(f"the model gives x {kinds[0]}, and `noise` {type(noise).__name__} {kinds[1]}: use {fix}")

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss a datum, and the metrics ``log_normalizer`` and ``accuracy`` (of telling data from noise)."""
        data, noise = self._gains(model, batch)
        loss = softplus(-data).mean() + self.ratio * softplus(noise).mean()
        shift = math.log(self.ratio)
        right = 0.5 * ((data + shift > 0).to(loss.dtype).mean() + (noise + shift < 0).to(loss.dtype).mean())
        rest = conditionals(model, batch)
        loss = loss - (rest.mean() if isinstance(rest, Tensor) else rest)
        assert self.contrast is not None
        return loss, {"log_normalizer": self.contrast.log_normalizer.detach().clone(), "accuracy": right}

    def rows(self, model: Program, guide: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus each datum's loss, with as many draws of noise."""
        data, noise = self._gains(model, batch)
        return -softplus(-data) - softplus(noise).unflatten(0, (self.ratio, -1)).sum(0), data.new_zeros(())

    def end(self, model: Program, guide: Program) -> None:
        """Let the model know its normaliser, if it asks for one."""
        take = getattr(getattr(model, "__self__", None), "take_normalizer", None)
        if take is not None and self.contrast is not None:
            take(self.contrast.log_normalizer)

    def _gains(self, model: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """G of the data ``(B,)`` and of the noise ``(ratio * B,)``."""
        x, given, closed = parts(batch)
        assert self.contrast is not None
        family: Any = self.contrast.noise
        with torch.no_grad():
            with PlateSize(self.ratio * len(x)):
                drawn = run_values(family.model, {"context": None})["x"]
            log_q, _ = ELBO().rows(family.model, family.guide, {"x": torch.cat([x, drawn])})  # exact: nothing is drawn
        both = closed(torch.cat([x, drawn]), [torch.cat([t] * (1 + self.ratio)) for t in given])
        gains = log_density(model, both) - self.contrast.log_normalizer - log_q.to(x.dtype) - math.log(self.ratio)
        return gains[: len(x)], gains[len(x) :]
