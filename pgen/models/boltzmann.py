r"""The restricted Boltzmann machine.

.. math:: p(v, h) = \frac{1}{Z} \exp\bigl( b^\top v + c^\top h + v^\top W h \bigr), \qquad
    F(v) = -b^\top v - \sum_j \log\bigl( 1 + \exp(c_j + v^\top W_j) \bigr), \qquad p(v) = e^{-F(v)} / Z

with binary hidden units h, which are independent given v, and visible units v that are binary, or real with
:math:`p(v \mid h) = \mathcal{N}(b + W h, I)`: the term :math:`b^\top v` is then :math:`-|v - b|^2 / 2`. Training follows the
likelihood's gradient by chains of block Gibbs sampling. Where the smaller side has few units, Z is a sum that is carried out.

Smolensky (1986); Hinton (2002), doi:10.1162/089976602760128018; Tieleman (2008), doi:10.1145/1390156.1390290;
Salakhutdinov and Murray (2008), On the quantitative analysis of deep belief networks, doi:10.1145/1390156.1390266.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from ..base import place
from ..contracts import Batch, Seed, as_seed, check_choice, check_positive
from ..data.batches import key
from ..data.transforms import Transform
from ..distributions.energy import Unnormalised
from ..evaluation.annealing import schedule
from ..evaluation.normalizer import LogNormalizer
from ..evaluation.units import QUIET_SECONDS
from ..objectives import PersistentContrastiveDivergence
from ..programs import Sites, keyed_rng, lists_sites
from ..training import Adam, Training
from ..training.progress import Progress
from .unnormalised import UnnormalisedModel

__all__ = ["RBM"]

MOST_UNITS = 22
"""Units of the smaller side up to which all its states are summed."""
FEW_STATES = 2**24
"""States times units of the other side that a validation sums each time."""
STEEPNESS = 2.0
"""Of the temperatures' schedule: the weights of trained machines spread least there."""
STATES = 2**16
"""States summed at a time."""


class RBM(UnnormalisedModel):
    r"""Restricted Boltzmann machine.

    Shapes: x ``(N, *event_shape)``, bits (0 or 1), or reals of about unit variance for ``visible="gaussian"``.

    ``fit`` carries chains from step to step (``PersistentContrastiveDivergence``, block Gibbs); pass
    ``objective=ContrastiveDivergence(k, sampler="gibbs")`` for CD-k. With at most 22 units on the smaller side (for real x, of
    hidden units) ``log_prob`` is exact and ``sample`` draws independently; else ask ``log_normalizer()`` first, and samples
    come from long chains.

    Args:
        event_shape: Shape of one datum.
        num_hidden: Hidden units.
        visible: ``"bernoulli"`` or ``"gaussian"``.
        preprocess: Invertible preprocessing of x, such as ``Standardize()`` before ``"gaussian"``.
        seed: Keys the initial weights.

    Example:
        >>> machine = RBM((2,), 1)
        >>> with torch.no_grad():  # p(v) is proportional to 1 + exp(v1 + v2)
        ...     _ = machine.weight.fill_(1.0)
        >>> machine.log_normalizer().value  # log of 5 + 2 e + e^2
        2.8806...
        >>> machine.log_prob(torch.ones(1, 2)).value.exp()  # (1 + e^2) over that
        tensor([0.4706], dtype=torch.float64)
    """

    family = "rbm"
    default_batch_size = 100
    default_epochs = 300

    def __init__(
        self,
        event_shape: Sequence[int],
        num_hidden: int = 20,
        *,
        visible: str = "bernoulli",
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess)
        check_positive("num_hidden", num_hidden)
        check_choice("visible", visible, ("bernoulli", "gaussian"))
        self.num_visible, self.num_hidden, self.visible = math.prod(self.event_shape), int(num_hidden), visible
        with self.initial_weights(seed):
            self.weight = nn.Parameter(0.01 * torch.randn(self.num_visible, self.num_hidden))
        self.visible_bias = nn.Parameter(torch.zeros(self.num_visible))
        self.hidden_bias = nn.Parameter(torch.zeros(self.num_hidden))

    @classmethod
    def suggest(cls, x: Tensor, given: Any) -> dict[str, Any]:
        """Bits are Bernoulli, all else is standardised (whole numbers dequantised first) and Gaussian."""
        bits = bool(((x == 0) | (x == 1)).all()) and given.get("likelihood", "bernoulli") == "bernoulli"
        visible = given.get("visible", "bernoulli" if bits else "gaussian")
        return {"visible": visible, **(super().suggest(x, given) if visible == "gaussian" else {})}

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        return {"event_shape": list(self.event_shape), "num_hidden": self.num_hidden, "visible": self.visible}

    def prime(self, data: Batch) -> None:
        """Start at independent visible units with the data's own means."""
        x = self._prepared(data)[0]["x"]
        if self.visible == "gaussian":
            self._warn_of_scale(x)
        with torch.no_grad():
            self.loc.copy_(x.mean(0))
            mean = x.flatten(1).mean(0)
            self.visible_bias.copy_(self._bias(mean, len(x)))

    def _bias(self, mean: Tensor, count: int) -> Tensor:
        """The biases with which independent units have a mean, bits that never vary kept off the edge."""
        if self.visible == "gaussian":
            return mean
        low = 1 / (count + 2)
        return torch.logit(mean.clamp(low, 1 - low))

    def _advice(self, error: Exception, batch: Batch) -> str:
        """The ways out for x that are no bits."""
        if "outside the support" not in str(error):
            return ""
        top = float(torch.as_tensor(batch["x"]).max()) if isinstance(batch, dict) else 1.0
        return f": for grey levels visible='gaussian', preprocess=Standardize(), or make bits: x = (x > {top / 2:.3g}).float()"

    def default_objective(self) -> PersistentContrastiveDivergence:
        """Persistent chains, five sweeps a step."""
        return PersistentContrastiveDivergence(5, "gibbs", num_chains=500)

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        falling = settings.schedule is None and settings.stop == "steps"
        return Adam(3e-3), replace(settings, schedule="cosine" if falling else settings.schedule)

    # -- the law ------------------------------------------------------------------------------------------------------

    @lists_sites
    def sites(self, x: Any, context: Tensor | None = None) -> Sites:
        """p(v), up to its normaliser."""
        yield "x", self.distribution(), x

    def distribution(self) -> BoltzmannLaw:
        """The law of x."""
        return BoltzmannLaw(self.event_shape, self.weight, self.visible_bias, self.hidden_bias, real=self.visible == "gaussian")

    def free_energy(self, x: Any) -> Tensor:
        """F(v) of each datum, ``(N,)`` nats."""
        return self.energy(x)

    def hidden(self, x: Any) -> Tensor:
        """p(h = 1 | v) of each hidden unit, ``(N, num_hidden)``."""
        batch = self._batch("x", x)
        with torch.no_grad(), keyed_rng(key(0, "prepare"), self.weight.device):
            return self.distribution().hidden(self._prepared(batch)[0]["x"].flatten(1)).sigmoid()

    # -- the normaliser -----------------------------------------------------------------------------------------------

    @property
    def enumerable(self) -> bool:
        """Whether Z is a sum that can be carried out."""
        return self.distribution().units <= MOST_UNITS

    def _normalizer(self, seed: Seed, progress: bool) -> tuple[float, float] | None:
        if not self.enumerable:
            return super()._normalizer(seed, progress)
        with torch.no_grad():
            return float(self.distribution().double().log_normalizer()), 0.0

    def log_normalizer(  # type: ignore[override]
        self,
        method: str = "auto",
        *,
        num_temps: int = 1000,
        num_chains: int = 100,
        num_sweeps: int = 3,
        seed: Seed = 0,
        progress: bool = True,
    ) -> LogNormalizer:
        """log Z: by summing over all states of the smaller side, or by annealing from independent units.

        Args:
            method: ``"enumerate"``, ``"ais"``, or ``"auto"``: the first where the smaller side has at most 22 units.
            num_temps: Temperatures of the annealing.
            num_chains: Chains each way. Backward ones begin at draws of ``sample``, which are exact where Z can be summed.
            num_sweeps: Sweeps at each temperature.
            seed: Keys the chains.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            The value, with which ``log_prob`` goes on.

        Raises:
            ValueError: If ``method="enumerate"`` asks for more than 2^22 states.
            FloatingPointError: If a parameter, or what comes out, is not finite.
        """
        check_choice("method", method, ("auto", "enumerate", "ais"))
        check_positive("num_temps", num_temps)
        check_positive("num_chains", num_chains)
        check_positive("num_sweeps", num_sweeps)
        self.check_parameters()
        if method == "enumerate" and not self.enumerable:
            raise ValueError(
                f"method='enumerate' would sum 2^{self.distribution().units} states (at most 2^{MOST_UNITS}); use 'ais'"
            )
        if method != "ais" and self.enumerable:
            value, _ = self._normalizer(seed, progress)  # type: ignore[misc]
            return LogNormalizer(value, 0.0, value, value)
        found = self._annealed(num_temps, num_chains, int(num_sweeps), as_seed(seed), progress)
        found.check()
        if not self.enumerable:
            self.log_z.copy_(torch.tensor([found.value, max(found.error, 1e-12)]))
        return found

    def _annealed(self, num_temps: int, num_chains: int, num_sweeps: int, seed: int, progress: bool) -> LogNormalizer:
        law, device = self.distribution().double(), self.weight.device
        base = self._bias(self.loc.flatten(), 998).double()
        betas = schedule(num_temps, STEEPNESS).tolist()
        start = self.sample(num_chains, seed=key(seed, "backward"), progress=progress)
        with torch.no_grad(), Progress(2 * num_temps, progress, QUIET_SECONDS) as bar:
            with keyed_rng(key(seed, "prepare"), device):  # it may draw noise
                ends = self._prepared({"x": place(start, device, self.weight.dtype)})[0]["x"].flatten(1).double()
            with keyed_rng(key(seed, "forward"), device):
                known = base.expand(num_chains, -1)
                position = torch.bernoulli(known.sigmoid()) if self.visible == "bernoulli" else known + torch.randn_like(known)
                forward = law.anneal(base, position, betas, num_sweeps, lambda t: bar.at(t, "annealing"))
            with keyed_rng(key(seed, "backwards"), device):
                backward = -law.anneal(base, ends, betas[::-1], num_sweeps, lambda t: bar.at(num_temps + t, "annealing back"))
        offset = float(law.base_normalizer(base))
        return LogNormalizer.of(forward + offset, backward + offset, num_temps)

    # -- samples ------------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        context: Any = None,
        *,
        num_steps: int = 1000,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Draw x: independently where the states can be summed, else by chains from those that the last fit kept.

        Args:
            n: How many.
            context: None; there is none here.
            num_steps: Sweeps of the chains, where they are needed.
            seed: Keys the draws.
            compile: Has no part in it: products alone, run as written.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.
        """
        check_positive("n", n)
        check_positive("num_steps", num_steps)
        self.check_parameters()
        if context is not None:
            self._context(context, n)
        self._asked(seed, compile, progress)
        law = self.distribution()
        with torch.no_grad(), keyed_rng(key(as_seed(seed), "sample"), self.weight.device):
            x = law.draw(int(n)) if self.enumerable else self._chained(law, int(n), int(num_steps), progress)
            x = x.reshape(-1, *self.event_shape)
            return x if self.preprocess is None else self.preprocess.inverse(x)

    def _chained(self, law: BoltzmannLaw, n: int, num_steps: int, progress: bool) -> Tensor:
        kept = self.kept_chains()
        if kept is None:
            start = self.loc.expand(n, *self.event_shape)
            start = torch.bernoulli(start) if self.visible == "bernoulli" else start + torch.randn_like(start)
        else:
            start = kept[0][torch.randint(len(kept[0]), (n,), device=self.weight.device)]
        with Progress(num_steps, progress, QUIET_SECONDS) as bar:
            for step in range(num_steps):
                start = law.gibbs(start)
                bar.at(step + 1, "sampling")
        return start


class BoltzmannLaw(Unnormalised):
    """The marginal law of the visible units.

    Args:
        event_shape: Shape of one datum.
        weight: ``(D, H)``.
        visible_bias: ``(D,)``.
        hidden_bias: ``(H,)``.
        real: Whether visible units are real.
        batch_shape: Shape of the batch.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        weight: Tensor,
        visible_bias: Tensor,
        hidden_bias: Tensor,
        *,
        real: bool,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.weight, self.visible_bias, self.hidden_bias, self.real = weight, visible_bias, hidden_bias, real
        support = constraints.real if real else constraints.boolean
        super().__init__(lambda x: self.free_energy(x.flatten(1)), event_shape, support, batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BoltzmannLaw:
        """The same for more data."""
        tensors = (self.weight, self.visible_bias, self.hidden_bias)
        return BoltzmannLaw(self.event_shape, *tensors, real=self.real, batch_shape=batch_shape)

    def double(self) -> BoltzmannLaw:
        """The same in float64."""
        tensors = (t.double() for t in (self.weight, self.visible_bias, self.hidden_bias))
        return BoltzmannLaw(self.event_shape, *tensors, real=self.real)

    def hidden(self, v: Tensor) -> Tensor:
        """Log-odds of the hidden units, ``(B, H)``."""
        return self.hidden_bias + v @ self.weight

    def _field(self, v: Tensor, bias: Tensor) -> Tensor:
        """The visible units' own part of the log-density."""
        return -0.5 * (v - bias).square().sum(-1) if self.real else v @ bias

    def free_energy(self, v: Tensor) -> Tensor:
        """F(v), ``(B,)``."""
        return -self._field(v, self.visible_bias) - softplus(self.hidden(v)).sum(-1)

    def gibbs(self, value: Tensor) -> Tensor:
        """One sweep: all hidden units given the visible ones, then all visible ones."""
        return self._sweep(value.flatten(1), self.visible_bias, 1.0).reshape(value.shape)

    def _sweep(self, v: Tensor, bias: Tensor, beta: float) -> Tensor:
        """A sweep at a temperature, the visible biases given."""
        odds = self.hidden(v) if beta == 1 else beta * self.hidden(v)
        h = (torch.rand_like(odds) < odds.sigmoid()).to(v.dtype)
        drive = h @ self.weight.T
        mean = bias + (drive if beta == 1 else beta * drive)
        return mean + torch.randn_like(mean) if self.real else (torch.rand_like(mean) < mean.sigmoid()).to(v.dtype)

    # -- sums over all states -----------------------------------------------------------------------------------------

    @property
    def units(self) -> int:
        """Units of the side that is summed over: the hidden one where visible units are real, else the smaller."""
        return self.weight.shape[1] if self.real else min(self.weight.shape)

    @property
    def few_states(self) -> bool:
        """Whether the sum is cheap enough to be carried out while training."""
        return self.units <= MOST_UNITS and 2**self.units * max(self.weight.shape) <= FEW_STATES

    def _states(self, units: int) -> Iterator[Tensor]:
        """All states of some units, a part at a time."""
        device = self.weight.device
        places = torch.arange(units, device=device)
        for first in range(0, 2**units, STATES):
            numbers = torch.arange(first, min(first + STATES, 2**units), device=device)
            yield (numbers[:, None] >> places & 1).to(self.weight.dtype)

    def _hidden_states(self, h: Tensor) -> Tensor:
        """log of the sum (or integral) over v of exp(-E(v, h)), for states h ``(S, H)``."""
        drive = h @ self.weight.T
        if self.real:
            over = drive @ self.visible_bias + 0.5 * drive.square().sum(-1) + 0.5 * len(self.weight) * math.log(2 * math.pi)
        else:
            over = softplus(self.visible_bias + drive).sum(-1)
        return h @ self.hidden_bias + over

    def log_normalizer(self) -> Tensor:
        """log Z, ``()``."""
        if self.real or self.weight.shape[1] <= self.weight.shape[0]:
            sums = [self._hidden_states(h).logsumexp(0) for h in self._states(self.weight.shape[1])]
        else:
            sums = [(-self.free_energy(v)).logsumexp(0) for v in self._states(self.weight.shape[0])]
        return torch.stack(sums).logsumexp(0)

    def draw(self, n: int) -> Tensor:
        """Independent draws of v, ``(n, D)``."""
        if self.real or self.weight.shape[1] <= self.weight.shape[0]:
            h = self._pick(self._hidden_states, self.weight.shape[1], n)
            mean = self.visible_bias + h @ self.weight.T
            return mean + torch.randn_like(mean) if self.real else (torch.rand_like(mean) < mean.sigmoid()).to(mean.dtype)
        return self._pick(lambda v: -self.free_energy(v), self.weight.shape[0], n)

    def _pick(self, log_weight: Callable[[Tensor], Tensor], units: int, n: int) -> Tensor:
        """Draw from all states of some units by the inverse of the cumulated masses."""
        mass = torch.cat([log_weight(part).double() for part in self._states(units)]).softmax(0).cumsum(0)
        at = torch.searchsorted(mass, torch.rand(n, dtype=torch.float64, device=mass.device) * mass[-1])
        places = torch.arange(units, device=mass.device)
        return (at.clamp(max=len(mass) - 1)[:, None] >> places & 1).to(self.weight.dtype)

    # -- annealing ----------------------------------------------------------------------------------------------------

    def base_normalizer(self, base: Tensor) -> Tensor:
        """log Z of independent visible units with biases ``base`` and hidden units that nothing drives."""
        own = base.new_tensor(0.5 * len(base) * math.log(2 * math.pi)) if self.real else softplus(base).sum()
        return own + self.weight.shape[1] * math.log(2)

    def anneal(self, base: Tensor, v: Tensor, betas: Sequence[float], num_sweeps: int, tick: Callable[[int], None]) -> Tensor:
        """Log-weights ``(C,)`` of chains from v along the temperatures, from ``base`` (0) to this law (1) or back."""

        def log_density(v: Tensor, beta: float) -> Tensor:
            field = torch.lerp(self._field(v, base), self._field(v, self.visible_bias), beta)
            return field + softplus(beta * self.hidden(v)).sum(-1)

        log_weight = v.new_zeros(len(v))
        for number, (before, beta) in enumerate(pairwise(betas)):
            log_weight = log_weight + log_density(v, beta) - log_density(v, before)
            for _ in range(num_sweeps):
                v = self._sweep(v, torch.lerp(base, self.visible_bias, beta), beta)
            tick(number)
        return log_weight
