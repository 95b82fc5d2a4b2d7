r"""Flow matching: a velocity that carries noise to data in straight lines, learned by regression.

.. math::

    z_t = (1 - t) x + t \epsilon, \qquad
    \min_v \mathbb{E} \lVert v(z_t, t) - (\epsilon - x) \rVert^2, \qquad
    \frac{dz}{dt} = v(z, t), \quad z_1 \sim \mathcal{N}(0, I)

The sibling of ``Diffusion`` with the same networks: one observed site, the image of noise under an equation, whose density
is exact where the divergence of v is. Noise is at t = 1 here, as it is there.

Lipman, Chen, Ben-Hamu, Nickel, Le (2023), Flow matching for generative modeling, arXiv:2210.02747.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..contracts import Score, Seed, check_choice, check_positive
from ..data.transforms import Transform
from ..distributions.noising import Transport
from ..objectives import Simple
from ..samplers.diffusion import FLOWS, Field, runge_kutta
from .denoising import EXACT_UP_TO, DenoisingModel

__all__ = ["FlowMatching"]

PROGRAM_STEPS = 20
"""Runge-Kutta steps of the density inside the program; ``log_prob`` takes more."""


@dataclass(frozen=True)
class _Sampling:
    """How samples are drawn."""

    solver: str = "midpoint"
    steps: int = 20
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_choice("solver", self.solver, tuple(FLOWS))
        check_positive("steps", self.steps)


class FlowMatching(DenoisingModel):
    r"""Flow matching along straight lines.

    Inside, x is centred and scaled: each number by its own standard deviation in a vector, all by one in an array.

    Shapes: x ``(N, *event_shape)``, context ``(N, context_dim)``.

    Args:
        event_shape: Shape of one datum.
        network: ``"mlp"``, ``"unet"`` (for images), or a module ``(z, level, context)`` -> ``(B, *event_shape)``, as for
            ``Diffusion``; level is t.
        width: Hidden units, or channels.
        blocks: Residual blocks of the dense network; None for three.
        octaves: Doublings of waves of z that the dense network sees beside z; 6 for few numbers of fine structure, such as
            narrow islands in the plane. What a network would not heed is refused.
        dropout: Of hidden units, in training.
        context_dim: Size of the context; 0 for none.
        context_dropout: Share of the data of a step whose context is hidden, for classifier-free guidance.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> model = FlowMatching((2,), width=16, blocks=1)
        >>> run = model.fit(torch.randn(200, 2), steps=5, progress=False)
        >>> model.sample(3, steps=4).shape
        torch.Size([3, 2])
    """

    family = "flow_matching"

    def __init__(
        self,
        event_shape: Sequence[int],
        network: str | nn.Module = "mlp",
        *,
        width: int | None = None,
        blocks: int | None = None,
        octaves: int = 0,
        dropout: float = 0.0,
        context_dim: int = 0,
        context_dropout: float = 0.1,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(
            event_shape, network, width=width, blocks=blocks, octaves=octaves, outputs=1, dropout=dropout,
            context_dim=context_dim, context_dropout=context_dropout, preprocess=preprocess, seed=seed,
        )  # fmt: skip
        self._sampling = _Sampling()

    def default_objective(self) -> Simple:
        """The regression."""
        return Simple()

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c)."""
        with self.plate(x, context) as rows:
            fn = Transport(
                lambda z, t: self._run(z, t, self._told(context)), self._standard, lambda x: self._density(x, context),
                lambda count: self._draw(count, context), rows=len(rows), event_shape=self.event_shape,
            )  # fmt: skip
            return pyro.sample("x", fn, obs=x)

    def _field(self, context: Tensor | None, guidance: float = 1.0) -> Field:
        return self._guided(self._run, context, guidance)

    def _density(self, x: Tensor, context: Tensor | None) -> Tensor:
        """log p(x), by few steps."""
        z, gained = self._entered(x)
        probe: Any = "exact" if self.scale.numel() <= EXACT_UP_TO else torch.randn_like(z).sign()
        end, spread = runge_kutta(self._field(context), z, self._times(PROGRAM_STEPS), probe)
        return gained + spread - 0.5 * (end.flatten(1).square().sum(-1) + self.scale.numel() * math.log(2 * math.pi))

    def _entered(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._standard(x), -self.scale.log().sum().expand(len(x))

    def _times(self, steps: int) -> Tensor:
        return torch.linspace(0, 1, steps + 1).to(self.scale)

    # -- samples and densities ------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int = 1,
        context: Any = None,
        *,
        solver: str = "midpoint",
        steps: int = 20,
        guidance: float = 1.0,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
    ) -> Tensor:
        """Draw x from the model.

        Args:
            n: How many.
            context: One context for all, shape ``(1, context_dim)``, or one for each.
            solver: ``"euler"``, ``"midpoint"`` or ``"rk4"``.
            steps: Of the solver.
            guidance: Of the velocity, as ``Diffusion.sample`` has it.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Shape ``(n, *event_shape)``, in the units of the data.
        """
        with self._drawing(_Sampling(solver, steps, self._check_guidance(guidance))):
            return super().sample(n, context, seed=seed, compile=compile, progress=progress)

    def _draw(self, rows: int, context: Tensor | None) -> Tensor:
        z = torch.randn(rows, *self.event_shape, device=self.scale.device, dtype=self.scale.dtype)
        rule: Callable[[Field, Tensor, Tensor], Tensor] = FLOWS[self._sampling.solver]
        z = rule(self._field(context, self._sampling.guidance), z, self._times(self._sampling.steps).flip(0))
        return (self.shift + self.scale * z.flatten(1)).reshape(z.shape)

    def log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        method: str = "ode",
        num_samples: int | None = None,
        seed: Seed = 0,
        batch_size: int | None = None,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        """Log-density of each datum in nats, by solving the equation from x to noise.

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            method: ``"ode"``.
            num_samples: Hutchinson's vectors, where there are any; by default 10.
            seed: Keys them.
            batch_size: Most rows at a time.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: ``steps`` of the fourth-order Runge-Kutta rule (default 40), ``divergence="exact"`` or
                ``"hutchinson"`` (default exact up to 16 numbers).

        Returns:
            A Score of kind ``exact``, or ``estimate`` with Hutchinson's vectors; ``lower_bound`` of the mass of dequantised x.
        """
        check_positive("num_samples", num_samples, allow_none=True)
        check_choice("method", method, ("ode",))
        return self._ode_score(
            x, context, self._entered, self._field, self._times, drawn=False, num_samples=num_samples, batch_size=batch_size,
            seed=seed, compile=compile, progress=progress, options={"steps": 40, **options},
        )  # fmt: skip
