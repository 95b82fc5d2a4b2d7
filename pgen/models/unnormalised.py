r"""What families without a normaliser have in common: chains that they keep, and densities with what is known of log Z."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyro
import torch
from torch import Tensor

from ..base import GenerativeModel, fewer_draws
from ..contracts import Batch, NotAvailable, Score, Seed, check_positive
from ..data.transforms import Transform
from ..evaluation.normalizer import LogNormalizer
from ..programs import Sites, isolated

__all__ = ["UnnormalisedModel"]

KEPT = 256
"""Chains of a fit that a model keeps."""
LARGE, SMALL = 10.0, 0.1
"""Root mean square of data above which, and standard deviation below which, they are in units that do not suit."""


class UnnormalisedModel(GenerativeModel):
    """A family whose ``sites`` are those of its model program: ``x`` with minus an energy as its log-density first.

    Args:
        event_shape: Shape of one datum.
        preprocess: Invertible preprocessing of x.
        context_dim: Size of the context.
    """

    chains: Tensor
    chains_context: Tensor
    loc: Tensor
    scale: Tensor
    log_z: Tensor
    own = False
    """Whether a network of the user's own has a part in it."""

    def __init__(self, event_shape: Sequence[int], *, preprocess: Transform | None = None, context_dim: int = 0) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        self.register_buffer("chains", torch.full((KEPT, *self.event_shape), math.inf))
        self.register_buffer("chains_context", torch.full((KEPT, context_dim), math.inf))
        self.register_buffer("loc", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))
        self.register_buffer("log_z", torch.full((2,), math.inf, dtype=torch.float64))  # with its error; not known yet

    def _fitted_to(self, data: Any) -> None:
        """Forget the normaliser of the parameters before."""
        self.log_z.fill_(math.inf)

    def _warn_of_scale(self, x: Tensor) -> None:
        """Say that preprocessed x is far from unit scale, where networks, and units of variance 1, learn little."""
        flat = x.double()
        spread, size = float(flat.std(correction=0)), float(flat.square().mean().sqrt())
        if size <= LARGE and (spread >= SMALL or spread == 0):
            return
        where = f"x lies in [{float(x.min()):.3g}, {float(x.max()):.3g}]" + (" after `preprocess`" if self.preprocess else "")
        cure = "end `preprocess` with " if self.preprocess else "use preprocess="
        warnings.warn(
            f"{where}, with a standard deviation of {spread:.3g}, and {type(self).__name__} takes numbers about 0 of one near "
            f"1: {cure}pgen.data.Standardize()",
            stacklevel=2,
        )

    # -- programs -----------------------------------------------------------------------------------------------------

    def sites(self, x: Any, context: Tensor | None = None, **also: Tensor | None) -> Sites:
        """Name, law and value of what the model observes; to be marked by ``lists_sites``."""
        raise NotImplementedError

    def model(self, x: Tensor | None = None, context: Tensor | None = None, **also: Tensor | None) -> Tensor:
        """The sites as a Pyro program."""
        with self.plate(x, context):
            found = [pyro.sample(name, law, obs=value) for name, law, value in self.sites(x, context, **also)]
        return found[0]

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, **also: Tensor | None) -> None:
        """No latents."""

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch.

        Objectives that take listed sites do without Pyro's handlers, where ``model`` is the sites and no network has its own.
        """
        listed = getattr(objective, "takes_sites", False) and getattr(self.sites, "lists_sites", False)
        if self.own or not listed or type(self).model is not UnnormalisedModel.model:
            return super().loss(objective, batch, scalars)
        with isolated(self.home):
            return objective(self.sites, self.guide, self.prepare(batch), scalars)

    # -- chains -------------------------------------------------------------------------------------------------------

    def keep_chains(self, x: Tensor, given: Sequence[Tensor]) -> None:
        """Keep some of the chains of a fit: sampling and a further fit may go on from them."""
        rows = torch.arange(KEPT, device=x.device) * len(x) // KEPT
        self.chains.copy_(x[rows])
        if given and self.context_dim:
            self.chains_context.copy_(given[-1][rows])

    def kept_chains(self) -> tuple[Tensor, list[Tensor]] | None:
        """The chains that were kept, and their contexts; None if there are none."""
        if not bool(torch.isfinite(self.chains).all()):
            return None
        return self.chains.clone(), [self.chains_context.clone()] if self.context_dim else []

    def take_normalizer(self, value: Tensor) -> None:
        """Take over a log-normaliser that was learnt beside the model; its error is not known. One not finite is left alone."""
        if bool(torch.isfinite(value)):
            self.log_z.copy_(torch.stack([value.detach().double(), torch.full_like(value, -1.0, dtype=torch.float64)]))

    def check_parameters(self) -> None:
        """Refuse parameters that are not numbers, of which chains would make draws that look like any others.

        Raises:
            FloatingPointError: Naming the first of them.
        """
        if bad := self._lost():
            raise FloatingPointError(
                f"parameter {bad!r} of this {type(self).__name__} is not finite, so nothing can be drawn; fit it again, "
                "or load a file of before"
            )

    def _lost(self) -> str:
        """The name of the first parameter that is not finite."""
        return next((name for name, value in self.named_parameters() if not bool(torch.isfinite(value).all())), "")

    # -- densities ----------------------------------------------------------------------------------------------------

    def _normalizer(self, seed: Seed, progress: bool) -> tuple[float, float] | None:
        """log Z of preprocessed x and its standard error (0 where it is exact, negative if not known), if it is known."""
        value, error = self.log_z.tolist()
        return None if math.isinf(value) else (value, error)

    def log_prob(self, x: Any, context: Any = None, **options: Any) -> Score:
        """Log-density of each datum: ``unnormalised`` until the normaliser is known.

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            **options: ``seed``, ``batch_size``, ``compile``, ``progress`` of ``GenerativeModel.log_prob``.

        Returns:
            A Score of kind ``unnormalised``; after ``log_normalizer()`` ``estimate``, its ``mc_error`` shared by all data (it
            does not average out); ``exact`` where the normaliser is enumerated (``lower_bound`` of the mass of dequantised x).
        """
        if options.get("method", "importance") != "importance" or "num_samples" in options:
            check_positive("num_samples", options.get("num_samples", 1))
            options = {name: value for name, value in options.items() if name != "num_samples"}
        if options.get("method", "importance") != "importance":
            raise NotAvailable(f"{type(self).__name__} has no latents to anneal; ask for log_normalizer(), then log_prob(x)")
        score = super().log_prob(x, context, **options)
        known = self._normalizer(options.get("seed", 0), options.get("progress", True))
        if known is None:
            return replace(score, kind="unnormalised")
        value, error = known
        if error == 0:  # enumerated: exact, or a bound of the mass of dequantised x
            return replace(score, value=score.value - value)
        spread = torch.full_like(score.value, error) if error > 0 else None
        return replace(score, value=score.value - value, kind="estimate", mc_error=spread)

    def log_normalizer(self, **options: Any) -> LogNormalizer:
        """Estimate log Z."""
        raise NotImplementedError

    def energy(self, x: Any, context: Any = None, **options: Any) -> Tensor:
        """E(x) of each datum in the units of the data, ``(N,)`` in nats: minus the log-density without its normaliser."""
        return -super().log_prob(x, context, **options).value

    def predict(
        self,
        data: Any,
        num_samples: int = 100,
        seed: Seed = 0,
        context: Any = None,
        *,
        compile: str = "auto",
        progress: bool = True,
    ) -> dict[str, Tensor]:
        """Draws of x, given the context of each datum where there is one: ``{"x": (S, N, *event_shape)}``.

        Chains are dear: there are ``max(2000, 10 N)`` at most, of which with a context each datum has its share, and more draws
        are repetitions of theirs.
        """
        options: dict[str, Any] = {"compile": compile, "progress": progress}
        return self._generated(data, num_samples, seed, context, most=fewer_draws, **options)

    def _word(self, objective: Any, latent: bool) -> str:
        return str(getattr(objective, "word", "unnormalised log-density"))
