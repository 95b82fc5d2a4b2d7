r"""Score matching: fitting the gradient of a log-density, in which the normaliser has no part.

.. math:: J(\theta) = \tfrac12 \mathbb{E}_{data} \bigl\| \nabla_x \log p_\theta(x) - \nabla_x \log p_{data}(x) \bigr\|^2

Hyvarinen (2005), Estimation of non-normalized statistical models by score matching, JMLR 6:695.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contracts import Batch, Kind, check_positive
from .density import check_without_latents, conditionals, is_discrete, law, parts, score
from .elbo import Scalars

__all__ = ["DenoisingScoreMatching", "SlicedScoreMatching"]

Program = Callable[..., Any]
KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold)
"""Activations whose second derivative is zero where there is one."""


class _ScoreMatching:
    """What the two have in common."""

    kind: ClassVar[Kind] = "unnormalised"
    word: ClassVar[str] = "score-matching loss"
    takes_sites: ClassVar[bool] = True

    def begin(self, model: Program, guide: Program, batch: Batch) -> Any:
        """The objective itself, once the model is known to fit it."""
        check_without_latents(self, model, batch)
        if is_discrete(law(model, batch)):
            raise ValueError(
                f"{type(self).__name__} follows the gradient of a density, and the model's x is discrete: use "
                "ContrastiveDivergence(sampler='gibbs')"
            )
        return self

    def __call__(self, model: Program, guide: Program, batch: Batch, scalars: Scalars) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over data, and the metric ``score``, the mean length of the model's score."""
        rows, found = self._rows(model, batch)
        metrics = {"score": found.detach().flatten(1).norm(dim=1).mean()}
        return (rows - conditionals(model, batch)).mean(), metrics

    def rows(self, model: Program, guide: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus each datum's loss."""
        rows, _ = self._rows(model, batch)
        return (conditionals(model, batch) - rows).detach(), rows.new_zeros(())

    def _rows(self, model: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each datum's loss ``(B,)``, and the score where it was taken."""
        raise NotImplementedError


@dataclass(frozen=True)
class DenoisingScoreMatching(_ScoreMatching):
    r"""Denoising score matching: the score of data to which Gaussian noise was added points back to where they were.

    .. math:: \mathrm{loss} = \tfrac12 \mathbb{E}_{x, \varepsilon} \bigl\| \sigma \nabla \log f(x + \sigma \varepsilon)
        + \varepsilon \bigr\|^2

    Its minimum is the score of the data's law blurred by :math:`\mathcal{N}(0, \sigma^2 I)`: the model learns that law, which
    is the data's own as :math:`\sigma \to 0`, where the variance of the loss grows as :math:`1 / \sigma^2`.

    Args:
        sd: :math:`\sigma`, in the units of the preprocessed data.

    References:
        Vincent (2011), A connection between score matching and denoising autoencoders, doi:10.1162/NECO_a_00142, eq. 9, times
        :math:`\sigma^2`.
    """

    sd: float = 0.1

    def __post_init__(self) -> None:
        check_positive("sd", self.sd, integer=False)

    def _rows(self, model: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        x, *_ = parts(batch)
        noise = torch.randn_like(x)
        found = score(model, batch)(x + self.sd * noise)
        return 0.5 * (self.sd * found + noise).square().flatten(1).sum(1), found


@dataclass(frozen=True)
class SlicedScoreMatching(_ScoreMatching):
    r"""Sliced score matching: the trace in Hyvarinen's loss by random directions v of signs.

    .. math:: \mathrm{loss} = \mathbb{E}_{x, v} \bigl[ v^\top \nabla_x (v^\top \nabla_x \log f(x)) \bigr]
        + \tfrac12 \mathbb{E}_x \| \nabla_x \log f(x) \|^2

    Unbiased for the score matching of the data's own law; the energy must be twice differentiable (SiLU, softplus or tanh;
    modules such as ``nn.ReLU`` are refused). Exact with one direction where the Hessian is diagonal.

    Args:
        num_slices: Directions a datum.

    References:
        Song, Garg, Shi, Ermon (2019), Sliced score matching, arXiv:1905.07088, eq. 8 (with reduced variance).
    """

    num_slices: int = 1

    def __post_init__(self) -> None:
        check_positive("num_slices", self.num_slices)

    def begin(self, model: Program, guide: Program, batch: Batch) -> Any:
        """The objective itself, once the model is known to fit it."""
        owner = getattr(model, "__self__", model)
        for name, module in owner.named_modules() if isinstance(owner, nn.Module) else ():
            if isinstance(module, KINKED):
                raise ValueError(
                    f"SlicedScoreMatching needs an energy that is twice differentiable, and {name!r} is a "
                    f"{type(module).__name__}: use activation='silu', or DenoisingScoreMatching(sd)"
                )
        return super().begin(model, guide, batch)

    def _rows(self, model: Program, batch: Batch) -> tuple[Tensor, Tensor]:
        x, *_ = parts(batch)
        field = score(model, batch)
        found = field(x)
        rows = 0.5 * found.square().flatten(1).sum(1)
        for _ in range(self.num_slices):
            sign = torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0).to(x.dtype)
            curvature = torch.func.grad(lambda at: (field(at) * sign).sum())(x)  # noqa: B023 - called at once
            rows = rows + (curvature * sign).flatten(1).sum(1) / self.num_slices
        return rows, found
