r"""Diffusion: data become noise little by little, and a network learns the way back.

.. math::

    q(z_t \mid x) = \mathcal{N}(\alpha_t x, \sigma_t^2 I), \qquad
    p(z_s \mid z_t) = q\bigl(z_s \mid z_t, x = \hat{x}(z_t, \lambda_t)\bigr), \qquad p(z_1) = \mathcal{N}(0, I)

The pair: the guide is the forward chain and has nothing to learn (but the ends of a learned schedule); the model is the
reverse chain, and p(x | z_0) at its end. The bound is the sum of what the last step, the chain and the prior cost,

.. math::

    \log p(x) \ge \mathbb{E}\bigl[\log p(x \mid z_0)\bigr] - D\bigl(q(z_1 \mid x) \,\|\, p(z_1)\bigr)
        + \tfrac12 \int_0^1 \tfrac{d e^{\lambda_t}}{dt} \, \mathbb{E} \lVert x - \hat{x}(z_t, \lambda_t) \rVert^2 \, dt

and a step sees the integral (in discrete time the sum over T steps) at one time for each datum.

Ho, Jain, Abbeel (2020), Denoising diffusion probabilistic models, arXiv:2006.11239; Kingma, Salimans, Poole, Ho (2021),
Variational diffusion models, arXiv:2107.00630.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..contracts import Batch, NotAvailable, Score, Seed, check_choice, check_event_shape, check_positive
from ..data.arrays import as_batch
from ..data.transforms import Transform
from ..distributions.noising import Denoising, NoiseSchedule, Noising, alpha_sigma, wide
from ..samplers.diffusion import SOLVERS, Field, infill
from .denoising import DenoisingModel

__all__ = ["Diffusion"]

PREDICTIONS = ("velocity", "noise", "data", "classes")
LIKELIHOODS = ("gaussian", "categorical", "bernoulli")
MOST_CLASSES = 32
"""Levels up to which the network gives a probability of each, unless told otherwise."""


@dataclass(frozen=True)
class _Sampling:
    """How samples are drawn."""

    solver: str = "dpm"
    steps: int | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, tuple(SOLVERS))
        check_positive("steps", self.steps, allow_none=True)


class Diffusion(DenoisingModel):
    r"""Diffusion model in continuous or discrete time.

    Inside, x is centred and scaled: each number by its own standard deviation in a vector, all by one in an array. Levels
    0, ..., K - 1 keep their distances, and the last step is a distribution over them,
    :math:`p(x_d = k \mid z_0) \propto q(z_{0,d} \mid x_d = k)`: the bound is then one of probabilities, in bits per dimension
    comparable with any other.

    Shapes: x ``(N, *event_shape)``, context ``(N, context_dim)``.

    Args:
        event_shape: Shape of one datum.
        network: ``"mlp"``, ``"unet"`` (for images), or a module ``(z, level, context)`` -> ``(B, *event_shape)``: z
            ``(B, *event_shape)``, level ``(B,)`` from 0 (data) to 1 (noise), context ``(B, context_dim + 1)``, whose last
            number says whether the rest is given, left out without context. A model with a module of yours cannot be saved.
        width: Hidden units, or channels.
        blocks: Residual blocks of the dense network; None for three.
        octaves: Doublings of waves of z that the dense network sees beside z; 6 for few numbers of fine structure, such as
            narrow islands in the plane. What a network would not heed is refused.
        prediction: What the network gives: ``"velocity"`` (:math:`\alpha \epsilon - \sigma x`), ``"noise"``, ``"data"``, or
            ``"classes"``: for each number the logits of its levels apart from what z itself says of it (a module gives
            ``(B, *event_shape, K)``). By default classes up to 32 levels, else velocity.
        likelihood: ``"gaussian"`` (real x), ``"categorical"`` (ordered levels 0, ..., num_classes - 1) or ``"bernoulli"``.
        num_classes: Levels.
        schedule: ``"linear_log_snr"``, ``"cosine"``, ``"linear"`` or ``"learned"``; see
            ``pgen.distributions.noising.NoiseSchedule``.
        log_snr: Its ends :math:`(\lambda_\min, \lambda_\max)`; by default -10, and 13.3 or what tells levels apart.
        num_steps: T of a chain in discrete time; None for continuous time.
        dropout: Of hidden units, in training.
        context_dim: Size of the context; 0 for none.
        context_dropout: Share of the data of a step whose context is hidden, for classifier-free guidance.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> model = Diffusion((2,), width=16, blocks=1)
        >>> run = model.fit(torch.randn(200, 2), steps=5, progress=False)
        >>> model.sample(3, solver="heun", steps=4).shape
        torch.Size([3, 2])

    References:
        Salimans and Ho (2022), arXiv:2202.00512 (velocity); Gulrajani and Hashimoto (2023), arXiv:2305.18619, section 3
        (classes that leave what z says to Bayes' rule); Ho and Salimans (2022), arXiv:2207.12598 (guidance).
    """

    family = "diffusion"

    def __init__(
        self,
        event_shape: Sequence[int],
        network: str | nn.Module = "mlp",
        *,
        width: int | None = None,
        blocks: int | None = None,
        octaves: int = 0,
        prediction: str | None = None,
        likelihood: str = "gaussian",
        num_classes: int | None = None,
        schedule: str = "linear_log_snr",
        log_snr: tuple[float, float] | None = None,
        num_steps: int | None = None,
        dropout: float = 0.0,
        context_dim: int = 0,
        context_dropout: float = 0.1,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        self.classes = _classes(likelihood, num_classes)
        prediction = prediction or ("classes" if 0 < self.classes <= MOST_CLASSES else "velocity")
        check_choice("prediction", prediction, PREDICTIONS)
        check_positive("num_steps", num_steps, allow_none=True)
        if log_snr is not None and not (len(log_snr) == 2 and -math.inf < log_snr[0] < log_snr[1] < math.inf):
            raise ValueError(f"`log_snr` should be the lower end and the higher, such as (-10, 13.3), got {tuple(log_snr)}")
        if prediction == "classes" and not self.classes:
            raise ValueError("prediction='classes' goes with likelihood='categorical' or 'bernoulli', got 'gaussian'")
        super().__init__(
            event_shape, network, width=width, blocks=blocks, octaves=octaves,
            outputs=self.classes if prediction == "classes" else 1, dropout=dropout, context_dim=context_dim,
            context_dropout=context_dropout, preprocess=preprocess, seed=seed,
        )  # fmt: skip
        self.prediction, self.likelihood, self.num_classes = prediction, likelihood, num_classes
        self.schedule_name, self.log_snr, self.num_steps = schedule, log_snr, num_steps
        self.schedule = NoiseSchedule(schedule, log_snr or (-10.0, 13.3))
        self._sampling = _Sampling()

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        plain = {name: getattr(self, name) for name in ("prediction", "likelihood", "num_classes", "num_steps")}
        ends = None if self.log_snr is None else list(self.log_snr)
        return {**super().settings(), "schedule": self.schedule_name, "log_snr": ends, **plain}

    def prime(self, data: Batch) -> None:
        """Take the centre and the scale of the data, for levels one scale, and the signal that tells them apart."""
        super().prime(data)
        with torch.no_grad():
            if self.classes:
                self.scale.copy_(self.scale.square().mean().sqrt().expand_as(self.scale))
            if self.classes and self.log_snr is None:  # neighbours are ten standard deviations apart at the end
                self.schedule.ends[1] = 2 * math.log(10 * float(self.scale[0]))

    # -- the pair -------------------------------------------------------------------------------------------------------

    def guide(self, x: Tensor | None = None, context: Tensor | None = None) -> None:
        """q(z | x): the forward chain."""
        assert x is not None
        with self.plate(x, context):
            pyro.sample("z", Noising(self._standard(x), self.schedule.ends[1]))

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x, z | c): the reverse chain, and x at its end."""
        with self.plate(x, context) as rows:
            chain = Denoising(
                lambda z, log_snr: self.denoise(z, log_snr, self._told(context)), self.schedule,
                None if x is None else self._standard(x), lambda count: self._draw(count, context), rows=len(rows),
                event_shape=self.event_shape, num_steps=self.num_steps, weight=self._weight,
                real=not self.classes,
            )  # fmt: skip
            z = pyro.sample("z", chain)
            return pyro.sample("x", self.end(z[..., : self.scale.numel()]), obs=x)

    def denoise(self, z: Tensor, log_snr: Tensor, context: Tensor | None = None) -> Tensor:
        r"""The estimate :math:`\hat{x}` of the standardised data.

        Args:
            z: ``(B, *event_shape)``.
            log_snr: ``(B,)``.
            context: ``(B, context_dim + 1)``, the last number 1 where the rest is given.
        """
        low, high = self.schedule.ends.detach()
        level = (high - log_snr) / (high - low)
        out = self._run(z, level, context)
        alpha, sigma = (wide(part, z) for part in alpha_sigma(log_snr))
        if self.prediction == "velocity":
            return alpha * z - sigma * out
        if self.prediction == "noise":
            return (z - sigma * out) / alpha
        return out if self.prediction == "data" else self._expected(out, z, log_snr, alpha)

    def _expected(self, logits: Tensor, z: Tensor, log_snr: Tensor, alpha: Tensor) -> Tensor:
        """The mean level, by Bayes' rule from the network's probabilities and the number's own noisy value."""
        points = self._points().unflatten(0, self.event_shape)  # (*event_shape, K)
        signal = wide(log_snr.exp(), logits)
        return (((logits - 0.5 * signal * ((z / alpha).unsqueeze(-1) - points).square()).softmax(-1)) * points).sum(-1)

    def _points(self) -> Tensor:
        """Where the levels lie once standardised, ``(D, K)``."""
        levels = torch.arange(self.classes, device=self.scale.device, dtype=self.scale.dtype)
        return (levels - self.shift[:, None]) / self.scale[:, None]

    def _weight(self, log_snr: Tensor) -> Tensor:
        """From the squared error of x to that of what the network gives."""
        if self.prediction == "noise":
            return log_snr.exp()
        return 1 + log_snr.exp() if self.prediction == "velocity" else torch.ones_like(log_snr)

    def end(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_0), in the units of (preprocessed) x; z_0 is ``(B, D)``."""
        alpha, sigma = alpha_sigma(self.schedule.ends[1])
        if not self.classes:
            there = (self.shift + self.scale * z / alpha).unflatten(-1, self.event_shape)
            spread = (self.scale * sigma / alpha).reshape(self.event_shape)
            return dist.Normal(there, spread.expand_as(there)).to_event(len(self.event_shape))
        signal = self.schedule.ends[1].exp()
        logits = (-0.5 * signal * ((z / alpha).unsqueeze(-1) - self._points()).square()).unflatten(-2, self.event_shape)
        if self.likelihood == "bernoulli":
            return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0]).to_event(len(self.event_shape))
        return dist.Categorical(logits=logits).to_event(len(self.event_shape))

    # -- samples --------------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        context: Any = None,
        *,
        solver: str = "dpm",
        steps: int | None = None,
        guidance: float = 1.0,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        r"""Draw x from the model.

        Args:
            n: How many.
            context: One context for all, shape ``(1, context_dim)``, or one for each.
            solver: ``"dpm"``, ``"heun"``, ``"ddim"`` (the probability-flow equation in few steps, which are closer together at
                middle levels of noise), or ``"ancestral"``.
            steps: Of the solver; by default 20, of ``ancestral`` T, or 1000 in continuous time.
            guidance: w of classifier-free guidance, :math:`\hat{x}_\varnothing + w (\hat{x}_c - \hat{x}_\varnothing)`:
                1 is the model's own p(x | c), above 1 presses towards what is typical of c alone.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.
        """
        with self._drawing(_Sampling(solver, steps, self._check_guidance(guidance))):
            return super().sample(n, context, seed=seed, compile=compile, progress=progress)

    def _draw(self, rows: int, context: Tensor | None) -> Tensor:
        """z_0 of ``rows`` data."""
        z = torch.randn(rows, *self.event_shape, device=self.scale.device, dtype=self.scale.dtype)
        estimate = self._guided(self.denoise, context, self._sampling.guidance)
        return SOLVERS[self._sampling.solver](estimate, z, self._levels(self._sampling))

    def _levels(self, sampling: _Sampling) -> Tensor:
        """Rising log-SNRs at which a solver stops: those of the chain, or half as far apart in the middle as on average."""
        low, high = self.schedule.ends
        if sampling.solver != "ancestral":
            u = torch.linspace(-1, 1, (sampling.steps or 20) + 1).to(low)
            return 0.5 * (low + high) + 0.25 * (high - low) * (u + u**3)
        steps = sampling.steps or self.num_steps or 1000
        return self.schedule(torch.linspace(1, 0, steps + 1).to(low))[0]

    def infill(
        self,
        x: Any,
        context: Any = None,
        *,
        steps: int = 100,
        repeats: int = 5,
        guidance: float = 1.0,
        seed: Seed = 0,
        progress: bool = True,
    ) -> Tensor:
        """Draw the missing numbers of data, approximately from p(missing | observed).

        Ancestral steps in which the observed numbers are replaced by noised data, each step taken ``repeats`` times, so that
        what is drawn comes to agree with what is given. More repeats and more steps are better; it is not exact for any number.

        Args:
            x: Data ``(N, *event_shape)``, NaN where a number is missing.
            context: One for each, or one for all.
            steps: Of the chain.
            repeats: Times that a step is taken.
            guidance: As in ``sample``.
            seed: Keys the draws.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            One draw for each datum, ``(N, *event_shape)``; observed numbers are as given.

        References:
            Lugmayr et al. (2022), RePaint, arXiv:2201.09865, algorithm 1.
        """
        for name, number in (("steps", steps), ("repeats", repeats)):
            check_positive(name, number)
        given = torch.as_tensor(as_batch(x, name="x"))
        check_event_shape("x", given, self.event_shape)
        observed = ~torch.isnan(given)
        if self.preprocess is not None and self.preprocess.kind == "lower_bound":
            raise NotAvailable("infill of dequantised data has no levels to keep; use likelihood='categorical'")
        filled = torch.where(observed, given, torch.zeros_like(given))
        batch = self._batch("x", filled, context)
        self._check_support(batch)
        batch["observed"] = observed.to(self.scale.device)
        sampling = _Sampling("ancestral", int(steps), self._check_guidance(guidance))

        def drawn(rows: Any) -> Tensor:
            estimate = self._guided(self.denoise, rows.get("context"), sampling.guidance)
            start = torch.randn_like(rows["x"])
            known = self._standard(rows["x"])
            z = infill(estimate, start, self._levels(sampling), known, rows["observed"], int(repeats))
            return self.end(z.flatten(1)).sample().to(start)

        found = self._rows(drawn, "infill", batch, seed, progress)
        found = found if self.preprocess is None else self.preprocess.inverse(found)
        return torch.where(observed.to(found.device), batch["x"].to(found), found)

    # -- densities ------------------------------------------------------------------------------------------------------

    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        method: str = "bound",
        num_samples: int | None = None,
        seed: Seed = 0,
        batch_size: int | None = None,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        r"""Log-density (or mass) of each datum in nats: the bound of the chain, or that of the probability-flow equation.

        ``"bound"`` is a lower bound of what ``ancestral`` samples are drawn from. ``"ode"`` is what the other solvers draw
        from, in the limit of many steps: the equation is solved from x to noise, and the divergence of its velocity integrated
        along the way. Of real x that is the density itself; of levels
        :math:`\log p(z_0) + \log p(x \mid z_0) - \log q(z_0 \mid x)` with z_0 drawn from q, a lower bound of their mass.

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            method: ``"bound"`` or ``"ode"``.
            num_samples: Of the bound, times for each datum, by default 100; of the equation, draws of z_0 or of Hutchinson's
                vectors, by default 10 where there are any.
            seed: Keys the draws.
            batch_size: Rows that are evaluated at a time; results of the bound do not depend on it.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Of ``"ode"``: ``steps`` of the fourth-order Runge-Kutta rule (default 100), ``divergence="exact"`` or
                ``"hutchinson"`` (default exact up to 16 numbers).

        Returns:
            A Score of kind ``lower_bound``; for real x by the equation ``exact``, or ``estimate`` with Hutchinson's vectors.

        References:
            Song et al. (2021), arXiv:2011.13456, equation 39.
        """
        check_positive("num_samples", num_samples, allow_none=True)
        if method == "ode":
            return self._ode_score(
                x, context, self._entered, self._flow, self._backwards, drawn=bool(self.classes), num_samples=num_samples,
                batch_size=batch_size, seed=seed, compile=compile, progress=progress, options=options,
            )  # fmt: skip
        check_choice("method", "importance" if method == "bound" else method, ("importance", "ais", "ode"))
        return super().log_prob(
            x, context, method="importance" if method == "bound" else method, num_samples=num_samples or 100, seed=seed,
            batch_size=batch_size, compile=compile, progress=progress, **options,
        )  # fmt: skip

    def _entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z_0 of x, and what the step from x to there adds to the log-density."""
        alpha, sigma = alpha_sigma(self.schedule.ends[1])
        clean = alpha * self._standard(x)
        if not self.classes:
            return clean, (alpha / self.scale).log().sum().expand(len(x))
        noise = torch.randn_like(clean)
        z = clean + sigma * noise
        drawn = dist.Normal(torch.zeros_like(noise), 1.0).log_prob(noise) - sigma.log()
        return z, self.end(z.flatten(1)).log_prob(x) - drawn.flatten(1).sum(-1)

    def _flow(self, context: Tensor | None) -> Field:
        """The velocity of the probability-flow equation in the log-SNR."""
        estimate = self._guided(self.denoise, context, 1.0)

        def field(z: Tensor, log_snr: Tensor) -> Tensor:
            alpha, _ = alpha_sigma(log_snr)
            return 0.5 * alpha * (estimate(z, log_snr) - alpha * z)

        return field

    def _backwards(self, steps: int) -> Tensor:
        low, high = self.schedule.ends
        return high + (low - high) * torch.linspace(0, 1, steps + 1).to(low)


def _classes(likelihood: str, num_classes: int | None) -> int:
    """Levels of x; 0 where it is real."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    check_positive("num_classes", num_classes, allow_none=True)
    if (likelihood == "categorical") != (num_classes is not None):
        raise ValueError(f"`num_classes` goes with likelihood='categorical', and is needed there; got {num_classes}")
    return 2 if likelihood == "bernoulli" else cast(int, num_classes or 0)
