r"""Games of a generator and a critic: the generator's draws are told from data, and learn from what gives them away.

The program ``model`` draws x = G(z); the program ``guide`` gives the critic's number T(x) for each datum, the variational
function whose best choice turns the critic's loss into a divergence between data and draws (Nowozin, Cseke and Tomioka 2016,
f-GAN, arXiv:1606.00709, eq. 4): a critic is to its generator what a guide is to its model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from ..contracts import Batch, Kind, check_choice, check_positive
from .schedules import Schedule, check_not_negative, check_schedule

__all__ = ["LOSSES", "Adversarial", "Loss"]

WATCHED = 100
"""Steps at the end of training that a concern is judged by, at least; a tenth of all if that is more."""
COLLAPSED = 0.1
"""Spread of the draws, as a share of the data's, below which they have collapsed."""
WON, VANISHED = 0.99, 0.01
"""Accuracy of a critic that has won, and what is left of a generator's gradient that vanishes."""
HEADWAY = 0.02
"""Share by which the distance from draws to data falls, where a generator gets on although the critic is always right."""


@dataclass(frozen=True)
class Loss:
    """A critic's and a generator's loss as functions of the critic's numbers.

    Attributes:
        critic: From numbers of data and of draws, ``(B,)`` each, to its loss for each pair.
        generator: From numbers of draws to its loss for each.
        threshold: Numbers above it say "data"; None for half way between the two means.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    threshold: float | None = 0.0


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return softplus(-real) + softplus(fake)


LOSSES: dict[str, Loss] = {
    "minimax": Loss(_logistic, lambda fake: -softplus(fake)),
    "non_saturating": Loss(_logistic, lambda fake: softplus(-fake)),
    "least_squares": Loss(
        lambda real, fake: 0.5 * ((real - 1).square() + fake.square()), lambda fake: 0.5 * (fake - 1).square(), 0.5
    ),
    "hinge": Loss(lambda real, fake: relu(1 - real) + relu(1 + fake), lambda fake: -fake),
    "wasserstein": Loss(lambda real, fake: fake - real, lambda fake: -fake, None),
}
"""The losses by name; see `Adversarial`."""


@dataclass(frozen=True)
class Adversarial:
    r"""A game of two players, ``critic`` and ``generator``, each a part of the model of that name, which move in turn.

    With T the critic, x data and y = G(z) draws, the critic minimises and the generator minimises

    ==================  ==========================================================  ===============================
    ``minimax``         E softplus(-T(x)) + E softplus(T(y)), at best               -E softplus(T(y))
                        2 log 2 - 2 JS(data, draws)
    ``non_saturating``  the same                                                    E softplus(-T(y))
    ``least_squares``   E (T(x) - 1)^2 / 2 + E T(y)^2 / 2                           E (T(y) - 1)^2 / 2
    ``hinge``           E max(0, 1 - T(x)) + E max(0, 1 + T(y))                     -E T(y)
    ``wasserstein``     E T(y) - E T(x), T with gradients of norm 1                 -E T(y)
    ==================  ==========================================================  ===============================

    and the critic adds its penalties,

    .. math:: \lambda\, \mathbb{E} (\lVert \nabla T(\hat x) \rVert - 1)^2 + \tfrac{\gamma}{2}\, \mathbb{E} \lVert \nabla T(x)
        \rVert^2, \qquad \hat x = u x + (1 - u) y, \quad u \sim U(0, 1).

    Not a bound of any likelihood: the two losses say who is ahead, not how good the draws are. Where the critic wins, the
    minimax generator's gradient vanishes (Goodfellow et al. 2014, section 3); the non-saturating one has the same fixed point.

    Training tells, beside both losses and gradient norms, the critic's accuracy on data and on draws (a half each where it
    knows nothing), ``critic_spread``, the draws' standard deviation as a share of the data's, and ``critic_shift``, how far
    their mean lies from the data's in the same unit. With a context ``critic_spread_given`` is the spread among data of one
    context; NaN where no two data of a batch have one and the same, or where such data are all alike.

    Args:
        loss: One of the names above.
        critic_moves: Moves of the critic for each of the generator's, each on data and noise of its own.
        gradient_penalty: :math:`\lambda`; None for 10 with the Wasserstein loss, else 0.
        r1: :math:`\gamma`, a number or a schedule.

    References:
        Goodfellow et al. (2014), Generative adversarial nets, arXiv:1406.2661, eq. 1 and algorithm 1; Mao et al. (2017), Least
        squares GAN, arXiv:1611.04076, eq. 9; Lim and Ye (2017), Geometric GAN, arXiv:1705.02894 (hinge); Gulrajani et al.
        (2017), Improved training of Wasserstein GANs, arXiv:1704.00028, eq. 3; Mescheder, Geiger, Nowozin (2018), Which
        training methods for GANs do actually converge?, arXiv:1801.04406, eq. 9 (R1).

    Example:
        >>> objective = Adversarial("wasserstein", critic_moves=5)
        >>> list(objective.players), objective.gradient_penalty
        (['critic', 'generator'], 10.0)
    """

    loss: str = "non_saturating"
    critic_moves: int = field(default=1, kw_only=True)
    gradient_penalty: float | None = field(default=None, kw_only=True)
    r1: float | Schedule = field(default=0.0, kw_only=True)
    kind: Kind = field(default="unnormalised", init=False)
    word: str = field(default="critic accuracy", init=False)
    selects: bool = field(default=False, init=False)
    whole_batches: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, tuple(LOSSES))
        check_positive("critic_moves", self.critic_moves)
        if self.gradient_penalty is None:
            object.__setattr__(self, "gradient_penalty", 10.0 if self.loss == "wasserstein" else 0.0)
        check_not_negative("gradient_penalty", self.gradient_penalty)
        check_schedule("r1", self.r1) if callable(self.r1) else check_not_negative("r1", self.r1)

    @property
    def players(self) -> dict[str, Any]:
        """Who trains what, in the order of their moves."""
        return {"critic": CriticsMove(self, self.critic_moves), "generator": GeneratorsMove(self)}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The penalty's weight, where it changes."""
        return {"r1": self.r1} if callable(self.r1) else {}

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """For each datum, the share of right answers about it and about one draw, ``(B,)``: a half if the critic knows nothing.

        Of a critic of packs there is one row a pack, so that their spread gives the error of the mean.
        """
        assert isinstance(batch, dict)
        real, fake = guide(**batch), guide(**{**batch, "x": model(**batch)})
        right = torch.stack(self.right(real, fake)).mean(0)
        return right, right.new_zeros(())

    def right(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the critic is right about each datum and each draw, as ones and zeros (a tie is half right)."""
        threshold = LOSSES[self.loss].threshold
        at = (real.mean() + fake.mean()) / 2 if threshold is None else threshold
        return 0.5 + 0.5 * torch.sign(real - at), 0.5 - 0.5 * torch.sign(fake - at)

    def concerns(self, history: Mapping[str, np.ndarray]) -> dict[str, str]:
        """What is wrong with a training so far, by name, a line each: ``collapse`` (also given a context), ``critic wins``."""
        steps = len(history.get("loss", ()))
        last = max(WATCHED, steps // 10)
        if steps < 2 * last:
            return {}
        found = {}
        for name, column, given, what in (
            ("collapse", "critic_spread", "", "the generator has collapsed"),
            ("collapse given a context", "critic_spread_given", "given a context ", "the generator makes one thing of each"),
        ):
            share = _recent(history, column, last)
            if share < COLLAPSED and "collapse" not in found:
                found[name] = (
                    f"{given}the draws' standard deviation is {share:.1%} of the data's: {what}; "
                    "try pack=4 in the model, Adversarial(r1=...), or the Wasserstein loss"
                )
        if line := self._won(history, last):
            found["critic wins"] = line
        return found

    def _won(self, history: Mapping[str, np.ndarray], last: int) -> str:
        """What to say where the critic has long been right about everything and the generator gets no nearer; else nothing."""
        right = (history["critic_accuracy_real"] + history["critic_accuracy_fake"])[-2 * last :] / 2
        if not (np.nanmedian(right[:last]) > WON and np.nanmedian(right[last:]) > WON):
            return ""
        if _recent(history, "critic_shift", last) < (1 - HEADWAY) * _recent(history, "critic_shift", last, ago=last):
            return ""  # the draws are far from the data and on their way
        if self.loss == "wasserstein" and self._nearer(history, last):
            return ""  # its critic is to be as good as can be
        norm = history["generator_grad_norm"]
        now, first = float(np.nanmedian(norm[-last:])), float(np.nanmedian(norm[:last]))
        vanished = self.loss == "minimax" or now < VANISHED * first
        how = (
            f"the generator's gradient, which vanishes, fell from {first:.2g} to {now:.2g}"
            if vanished
            else f"the draws come no nearer, though the generator's gradient is {now:.2g}"
        )
        cure = "loss='non_saturating', " if self.loss == "minimax" else ""
        return (
            f"the critic wins: it is right {np.nanmean(right[last:]):.1%} of the time and {how}; "
            f"try {cure}r1=..., spectral_norm=True in the model, or a lower learning rate of the critic"
        )

    def _nearer(self, history: Mapping[str, np.ndarray], last: int) -> bool:
        """Whether the distance that a Wasserstein critic measures has fallen from its highest."""
        distance = np.asarray(history.get("critic_penalty", 0.0)) - history["critic_loss"]
        whole = distance[len(distance) % last :].reshape(-1, last)
        means = np.nanmean(whole, 1)
        return bool(means[-1] < (1 - HEADWAY) * means.max())


def _recent(history: Mapping[str, np.ndarray], column: str, count: int, ago: int = 0) -> float:
    """Mean of the last ``count`` numbers of a column, or of those ``ago`` steps before; NaN where there are none."""
    column_ = history.get(column, np.zeros(0))
    numbers = column_[len(column_) - count - ago : len(column_) - ago]
    numbers = numbers[np.isfinite(numbers)]
    return float(numbers.mean()) if len(numbers) else math.nan


@dataclass(frozen=True)
class CriticsMove:
    """The critic's loss on a batch and as many draws, through which no gradient goes."""

    game: Adversarial
    moves: int = 1
    kind: Kind = "unnormalised"

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its penalties, and accuracy, spread and penalty."""
        assert isinstance(batch, dict)
        game, x = self.game, batch["x"]
        with torch.no_grad():
            y = model(**batch)
        if game.r1:
            x = x.detach().requires_grad_()
        real, fake = _judged(guide, batch, x, y)
        if not isinstance(real, Tensor):
            kind = type(real).__name__
            raise TypeError(
                f"Adversarial needs a guide that is a critic, one number a datum, and this gives {kind}: use models.GAN"
            )
        loss = LOSSES[game.loss].critic(real, fake).mean()
        right = game.right(real.detach(), fake.detach())
        metrics = {"accuracy_real": right[0].mean(), "accuracy_fake": right[1].mean(), **_moments(y, x.detach())}
        if "context" in batch:
            metrics["spread_given"] = _spread_given(y, x.detach(), batch["context"])
        penalties = []
        if game.gradient_penalty:
            penalties.append(game.gradient_penalty * gradient_penalty(guide, batch, y, len(real)))
        if game.r1:
            weight = scalars["r1"] if callable(game.r1) else game.r1
            penalties.append(0.5 * weight * _square_norms(real, x, len(real)).mean())
        if penalties:
            loss, metrics["penalty"] = loss + sum(penalties), sum(penalties).detach()  # type: ignore[union-attr]
        return loss, metrics


@dataclass(frozen=True)
class GeneratorsMove:
    """The generator's loss on draws of its own."""

    game: Adversarial
    kind: Kind = "unnormalised"

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss."""
        assert isinstance(batch, dict)
        return LOSSES[self.game.loss].generator(guide(**{**batch, "x": model(**batch)})).mean(), {}


def _judged(guide: Callable[..., Any], batch: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the critic says of data and of draws, in one pass where that is allowed and x needs no gradient."""
    whole = getattr(getattr(guide, "__self__", None), "whole_packs", lambda count: False)
    if x.requires_grad or not whole(len(x)):
        return guide(**{**batch, "x": x}), guide(**{**batch, "x": y})
    twice = {name: torch.cat([t, t]) for name, t in batch.items() if name != "x" and isinstance(t, Tensor)}
    real, fake = guide(**twice, x=torch.cat([x, y])).chunk(2)
    return real, fake


def gradient_penalty(guide: Callable[..., Any], batch: dict[str, Tensor], y: Tensor, packs: int) -> Tensor:
    r"""Mean of :math:`(\lVert \nabla T(\hat x) \rVert - 1)^2` between data and draws, ``()``; a pack counts as one datum."""
    x = batch["x"]
    u = torch.rand(packs, dtype=x.dtype, device=x.device).repeat_interleave(len(x) // packs)
    between = (y + u.reshape(-1, *[1] * (x.dim() - 1)) * (x - y)).detach().requires_grad_()
    square = _square_norms(guide(**{**batch, "x": between}), between, packs)
    return ((square + 1e-12).sqrt() - 1).square().mean()  # the root has no gradient at zero


def _square_norms(numbers: Tensor, x: Tensor, packs: int) -> Tensor:
    """Squared norm of the gradient of each number with respect to its data, ``(packs,)``."""
    (slope,) = torch.autograd.grad(numbers.sum(), x, create_graph=True)
    return slope.reshape(packs, -1).square().sum(1)


def _moments(y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The draws' standard deviation, and how far their mean lies from the data's, in standard deviations of the data.

    Variances, and squares of differences, are summed over coordinates.
    """
    unit = x.var(0).sum()
    shift = (y.mean(0) - x.mean(0)).square().sum()
    return {"spread": (y.var(0).sum() / unit).sqrt(), "shift": (shift / unit).sqrt()}


def _spread_given(y: Tensor, x: Tensor, context: Tensor) -> Tensor:
    r"""Root of :math:`\sum (y_i - y_j)^2 / \sum (x_i - x_j)^2` over pairs of one context; NaN where none differ."""
    c = context.flatten(1).double()
    weights = torch.arange(1, c.shape[1] + 1, dtype=c.dtype, device=c.device).square().sin()  # independent over the rationals
    number = (c * weights).sum(1)  # tells contexts apart
    same = (number[:, None] == number[None]).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        (within_y, _), (within_x, size) = _within(y.to(x.dtype), same), _within(x, same)
    some = (same.sum() > len(same)) & (within_x > 1e-6 * size)  # not the rounding of equal data
    return (within_y / torch.where(some, within_x, torch.nan)).sqrt()


def _within(t: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    r"""Half of the squared differences over the pairs in ``same``: :math:`\sum_i n_i t_i^2 - \sum_{ij} s_{ij} t_i t_j`.

    The first of the two sums is given too.
    """
    t = (t - t.mean(0)).flatten(1)
    size = (same.sum(1) * t.square().sum(1)).sum()
    return (size - ((same @ t) * t).sum()).clamp(min=0), size
