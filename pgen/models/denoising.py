r"""What diffusion models and flow matching share: a network that sees noisy data, and how much of it is noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base import GenerativeModel, _evaluating, fewer_draws
from ..contracts import Batch, Kind, NotAvailable, Score, Seed, check_choice, check_positive
from ..data.batches import key
from ..data.transforms import Transform
from ..evaluation.posterior import by_rows
from ..nn.denoisers import ResidualMLP, UNet
from ..programs import isolated, keyed_rng
from ..samplers.diffusion import Field, runge_kutta
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["DenoisingModel"]

BLOCKS = 3
"""Residual blocks of the dense network, unless told otherwise."""
EXACT_UP_TO = 16
"""Numbers of a datum up to which a divergence is taken exactly, unless told otherwise."""
MOST_BLOCKS = 1000
ODE_ROWS = 4096
"""Most data whose equation is solved at a time, less where the divergence is exact."""


@dataclass(frozen=True)
class _Equation:
    """How the density is integrated.

    Args:
        steps: Of the fourth-order Runge-Kutta rule.
        divergence: ``"exact"``, ``"hutchinson"``, or None to choose by the size of a datum.
    """

    steps: int = 100
    divergence: str | None = None

    def __post_init__(self) -> None:
        check_positive("steps", self.steps)
        check_choice("divergence", self.divergence or "exact", ("exact", "hutchinson"))

    def exact(self, size: int) -> bool:
        """Whether the divergence is taken exactly."""
        return self.divergence == "exact" or (self.divergence is None and size <= EXACT_UP_TO)


def _unavailable(question: str) -> Callable[..., Any]:
    """A method that says why there is no answer."""

    def asked(self: DenoisingModel, *args: Any, **kwargs: Any) -> Any:
        """Not available: there are no latents, or draws of them have no weights."""
        raise self._without_latents(question)

    return asked


def _check_goes_with(network: str | nn.Module, **options: Any) -> None:
    """Refuse options that ``network`` would not heed; width and dropout are heeded by both that have a name."""
    theirs = {"mlp": tuple(options), "unet": ("width", "dropout")}
    heeded = theirs.get(network, tuple(options)) if isinstance(network, str) else ()
    for name, value in options.items():
        if value is not None and name not in heeded:
            what = repr(network) if isinstance(network, str) else f"{type(network).__name__}, a module of your own"
            known = " or ".join(repr(n) for n, names in theirs.items() if name in names)
            raise ValueError(f"`{name}` {value} does not go with the network {what}: it is of {known}, leave it out")


class DenoisingModel(GenerativeModel):
    """A model with a network ``(z, level, context)``; data are centred and scaled, and some contexts hidden in training.

    Args:
        event_shape: Shape of one datum.
        network: ``"mlp"``, ``"unet"``, or a module.
        width: Hidden units, or channels.
        blocks: Residual blocks of the dense network; None for three.
        octaves: Doublings of waves of z that the dense network sees.
        outputs: Numbers that the network gives for each of x.
        dropout: Of hidden units, in training.
        context_dim: Size of the context; 0 for none.
        context_dropout: Share of the data of a step whose context is hidden.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.
    """

    default_batch_size = 128
    default_steps = 5000
    has_posterior = False
    shift: Tensor
    scale: Tensor
    network: nn.Module
    _sampling: Any
    """How the program draws samples."""

    def __init__(
        self,
        event_shape: Sequence[int],
        network: str | nn.Module,
        *,
        width: int | None,
        blocks: int | None,
        octaves: int,
        outputs: int,
        dropout: float,
        context_dim: int,
        context_dropout: float,
        preprocess: Transform | None,
        seed: Seed,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("width", width, allow_none=True)
        check_positive("blocks", blocks, allow_none=True)
        if blocks is not None and blocks > MOST_BLOCKS:
            raise ValueError(f"`blocks` should be at most {MOST_BLOCKS}, got {blocks}")
        if octaves < 0:
            raise ValueError(f"`octaves` should be 0 or more, got {octaves}")
        for name, share in (("dropout", dropout), ("context_dropout", context_dropout)):
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` is a share in [0, 1), got {share}")
        _check_goes_with(network, width=width, dropout=dropout or None, blocks=blocks, octaves=octaves or None)
        self.width, self.octaves = width, octaves
        self.blocks = BLOCKS if blocks is None and network == "mlp" else blocks
        self.outputs = outputs
        self.dropout, self.context_dropout = float(dropout), float(context_dropout)
        self.network_name = network if isinstance(network, str) else ""
        with self.initial_weights(seed):
            self.network = network if isinstance(network, nn.Module) else self._made(network, outputs)
        self.register_buffer("shift", torch.zeros(math.prod(self.event_shape)))
        self.register_buffer("scale", torch.ones(math.prod(self.event_shape)))

    def _made(self, name: str, outputs: int) -> nn.Module:
        check_choice("network", name, ("mlp", "unet"))
        told = self.context_dim + 1 if self.context_dim else 0
        if name == "unet":
            return UNet(self.event_shape, self.width or 32, outputs=outputs, context_dim=told, dropout=self.dropout)
        return ResidualMLP(
            self.event_shape, self.width or 256, self.blocks or BLOCKS, octaves=self.octaves, outputs=outputs, context_dim=told,
            dropout=self.dropout,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("width", "blocks", "octaves", "dropout", "context_dim", "context_dropout")
        plain = {name: getattr(self, name) for name in names}
        return {"event_shape": list(self.event_shape), "network": self.network_name, **plain}

    def _check_savable(self) -> None:
        if not self.network_name:
            raise ValueError(
                f"a {type(self).__name__} with a network of your own cannot be saved whole; save network.state_dict() yourself"
            )

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = settings.schedule or (None if settings.stop == "converged" else "warmup_cosine")
        return Adam(1e-3), replace(settings, schedule=schedule, clip_norm=settings.clip_norm or 1.0)

    def prime(self, data: Batch) -> None:
        """Take the centre and the scale of the data: of each number of a vector, of all numbers of an array together."""
        x = self._prepared(data)[0]["x"].flatten(1)
        with torch.no_grad():
            self.shift.copy_(x.mean(0))
            apart = len(self.event_shape) == 1
            spread = x.std(0, correction=0) if apart else (x - self.shift).square().mean().sqrt().expand_as(self.scale)
            self.scale.copy_(torch.where(spread > 1e-6 * x.abs().amax(), spread, torch.ones_like(spread)))

    def _standard(self, x: Tensor) -> Tensor:
        return ((x.flatten(1) - self.shift) / self.scale).reshape(x.shape)

    def _told(self, context: Tensor | None, given: bool = True) -> Tensor | None:
        """The context and whether it is given; in training some are hidden."""
        if context is None:
            return None
        seen = context.new_full((len(context), 1), float(given))
        if self.training and self.context_dropout:
            seen = (torch.rand_like(seen) >= self.context_dropout).to(seen.dtype)
        return torch.cat([context * seen, seen], -1)

    def _run(self, z: Tensor, level: Tensor, told: Tensor | None) -> Tensor:
        out = self.network(z, level) if told is None else self.network(z, level, told)
        wanted = (*z.shape, self.outputs) if self.outputs > 1 else tuple(z.shape)
        if tuple(out.shape) != wanted:
            raise ValueError(f"`network` should give shape {wanted} for z of shape {tuple(z.shape)}, got {tuple(out.shape)}")
        return out

    def _check_guidance(self, guidance: float) -> float:
        if guidance != 1 and not (self.context_dim and self.context_dropout):
            raise ValueError(f"`guidance` {guidance} needs a model with context_dim and context_dropout above 0")
        return float(guidance)

    def _guided(
        self, estimate: Callable[[Tensor, Tensor, Tensor | None], Tensor], context: Tensor | None, guidance: float
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """What a solver asks for, a function of z and one time, from one of z, times and what the network is told."""
        told, free = self._told(context), self._told(context, given=False)

        def guided(z: Tensor, t: Tensor) -> Tensor:
            at = t.expand(len(z))
            with_context = estimate(z, at, told)
            if guidance == 1:
                return with_context
            without = estimate(z, at, free)
            return without + guidance * (with_context - without)

        return guided

    def _ode_score(
        self,
        x: Any,
        context: Any,
        start: Callable[[Tensor], tuple[Tensor, Tensor]],
        field: Callable[[Tensor | None], Field],
        times: Callable[[int], Tensor],
        *,
        drawn: bool,
        num_samples: int | None,
        batch_size: int | None,
        seed: Seed,
        compile: str,
        progress: bool,
        options: dict[str, Any],
    ) -> Score:
        """Densities by the equation whose velocity is ``field`` of the context, solved from data to noise.

        ``start`` gives from x where to begin, and what that adds to the log-density; ``drawn`` says whether it draws.
        """
        batch, size = self._batch("x", x, context), math.prod(self.event_shape)
        self._check_support(batch)
        known = [name for name in options if name not in ("steps", "divergence")]
        if known:
            raise TypeError(f"unknown option {known[0]!r} of method='ode' (known: steps, divergence)")
        equation = _Equation(**options)
        exact = equation.exact(size)
        count = 1 if exact and not drawn else num_samples or 10

        def solved(rows: Any) -> Tensor:
            z, gained = start(rows["x"])
            probe: Tensor | str = "exact" if exact else torch.randn_like(z).sign()
            end, spread = runge_kutta(field(rows.get("context")), z, times(equation.steps), probe)
            noise = -0.5 * (end.flatten(1).square().sum(-1) + size * math.log(2 * math.pi))
            return (gained + noise + spread).double()

        check_positive("batch_size", batch_size, allow_none=True)
        asked, most = self._asked(seed, compile, progress), batch_size or max(64, ODE_ROWS // (size if exact else 1))
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(asked["seed"], "log_prob"), self.scale.device):
                prepared, change = self._prepared(batch)
            values = torch.stack([by_rows(solved, prepared, most, name=f"ode {i}", **asked) for i in range(count)])
        error = None if count == 1 else values.std(0) / math.sqrt(count)
        bound = drawn or (self.preprocess is not None and self.preprocess.kind == "lower_bound")
        kind: Kind = "lower_bound" if bound else "exact" if exact else "estimate"
        value = values.mean(0) + (0.0 if change is None else change.double())
        return Score(value, kind, self._event_size(batch), error, None if count == 1 else count, self._measure(batch))

    @contextmanager
    def _drawing(self, sampling: Any) -> Iterator[None]:
        """While the program draws as ``sampling`` says."""
        before, self._sampling = self._sampling, sampling
        try:
            yield
        finally:
            self._sampling = before

    def predict(
        self, data: Any, num_samples: int = 100, seed: Seed = 0, context: Any = None, *, compile: str = "auto",
        progress: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Draws of x, given the context of each datum where there is one: ``{"x": (S, N, *event_shape)}``.

        Without a context there are ``max(2000, 10 N)`` at most, from which more draws are taken with repetition.
        """
        options: dict[str, Any] = {"compile": compile, "progress": progress}
        return self._generated(data, num_samples, seed, context, most=fewer_draws, **options)

    draw, posterior, encode, reconstruct, likelihood_regret, bdmc = (
        _unavailable(question) for question in ("draw", "posterior", "encode", "reconstruct", "likelihood_regret", "bdmc")
    )

    def _without_latents(self, question: str) -> NotAvailable:
        return NotAvailable(
            f"{type(self).__name__} has no latents but noise, so there is no {question}; ask for log_prob(x), or a VAE"
        )
