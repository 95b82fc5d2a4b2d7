r"""Regression instead of a bound: the simple loss of diffusion models, and flow matching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..contracts import Batch, Kind
from ..programs import innermost, run_sites
from .elbo import Scalars

__all__ = ["Simple"]


@dataclass(frozen=True)
class Simple:
    r"""Half the squared error of what the network predicts, every level of noise alike.

    .. math:: L = \tfrac12\, \mathbb{E}_{t, \epsilon} \lVert y - f(z_t, t) \rVert^2

    with y the noise, the velocity or the data, whatever f predicts. It is no bound: for a diffusion model that predicts noise
    it is the bound with its weights left out, which spends less on details that nobody sees; for flow matching it is the
    objective. It is summed over the sites whose distribution has ``regression(value)``, rows of such errors.

    References:
        Ho, Jain, Abbeel (2020), arXiv:2006.11239, equation 14; Lipman, Chen, Ben-Hamu, Nickel, Le (2023), Flow matching for
        generative modeling, arXiv:2210.02747, equation 9.
    """

    kind: ClassVar[Kind] = "unnormalised"
    word: ClassVar[str] = "squared error"

    def __call__(
        self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, scalars: Scalars
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean error over the data."""
        return -self.rows(model, guide, batch)[0].mean(), {}

    def rows(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus each datum's error, ``(B,)``, at one time and one draw of noise, and zero."""
        sites = [(innermost(fn), value) for fn, value in run_sites(model, guide, batch).values()]
        errors = [fn.regression(value) for fn, value in sites if hasattr(fn, "regression")]
        if not errors:
            raise ValueError("objective Simple needs a model with a site that is a regression: Diffusion or FlowMatching")
        total = torch.stack(errors).sum(0)
        return -total, total.new_zeros(())
