r"""Automatic guides: a variational family for the latents of any traced program.

A guide works on the unconstrained space :math:`u` of the latents, :math:`z = T(u)` with Pyro's ``biject_to`` of each
site's support, so that :math:`\log q(z) = \log q(u) - \log |\det \partial T / \partial u|`.

Latents outside the data plate (and all latents, where every step sees all the data) have parameters of their own. Latents
inside the plate of a program that is fitted in minibatches have one row of parameters a datum, looked up by the row's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform

from ..contracts import NotAvailable
from ..programs import DATA_PLATE, Term, current_rows

__all__ = ["AUTOMATIC", "Flow", "FullRank", "Latent", "MeanField"]

INITIAL_SCALE = 0.1
"""Standard deviation of every unconstrained latent at the start."""


class _Frames(Messenger):
    """Says that statements lie in plates which are not entered again (a name can be entered once a trace)."""

    def __init__(self, frames: tuple[CondIndepStackFrame, ...]) -> None:
        super().__init__()
        self.frames = frames

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        msg["cond_indep_stack"] = (*self.frames, *msg["cond_indep_stack"])


@dataclass(frozen=True)
class Latent:
    """What a guide must know of a latent site.

    Attributes:
        name: The site.
        transform: From unconstrained to constrained space.
        start: Unconstrained starting point, shape ``(*batch, *unconstrained event)``.
        event_dim: Event axes of the constrained value.
        batch_dim: Batch axes of the site.
        plates: ``(name, axis, size)`` of each plate around the site.
        row_axis: Axis of ``start`` (from the left) that runs over the data of a minibatch; None for shared latents.
    """

    name: str
    transform: Transform
    start: Tensor
    event_dim: int
    batch_dim: int
    plates: tuple[tuple[str, int, int], ...]
    row_axis: int | None

    @classmethod
    def from_term(cls, term: Term, draws: Tensor, minibatch: bool) -> Latent:
        """From a latent site and draws of its prior ``(S, *shape)``, whose median is the starting point."""
        if getattr(term.fn, "has_enumerate_support", False) or term.fn.support.is_discrete:
            raise ValueError(
                f"latent {term.name!r} is discrete ({type(term.fn).__name__}), and automatic guides are continuous; "
                f"sum it out of the model or write a guide"
            )
        transform = biject_to(term.fn.support)
        start = transform.inv(draws).median(0).values.nan_to_num(0.0, 0.0, 0.0)
        axes = {name: axis for name, axis in term.plates}
        batch_dim = term.log_prob.dim()
        plates = tuple((n, a, int(term.log_prob.shape[a])) for n, a in term.plates)
        row_axis = batch_dim + axes[DATA_PLATE] if minibatch and DATA_PLATE in axes else None
        return cls(term.name, transform, start, term.fn.event_dim, batch_dim, plates, row_axis)

    def context(self, rows: int | None) -> _Frames:
        """The site's plates; the data plate has ``rows`` rows where given."""
        sizes = ((n, axis, rows if n == DATA_PLATE and rows is not None else size) for n, axis, size in self.plates)
        return _Frames(tuple(CondIndepStackFrame(name, axis, size, 0) for name, axis, size in sizes))

    def sample(self, unconstrained: Tensor, rows: int | None = None) -> None:
        """Make the site's statement at T(unconstrained), with the density of the change of variables."""
        value = self.transform(unconstrained)
        log_det = self.transform.log_abs_det_jacobian(unconstrained, value)
        log_det = log_det.flatten(self.batch_dim).sum(-1) if log_det.dim() > self.batch_dim else log_det
        with self.context(rows):
            delta = dist.Delta(value, log_density=-log_det, event_dim=self.event_dim)
            pyro.sample(self.name, delta, infer={"is_change_of_variables": True})


class _RowTable(nn.Module):
    """Diagonal Gaussian parameters, one row a datum, for a latent inside the data plate."""

    def __init__(self, latent: Latent, num_data: int) -> None:
        super().__init__()
        row = latent.start.movedim(cast(int, latent.row_axis), 0).double().mean(0).to(latent.start.dtype)
        self.latent = latent
        self.loc = nn.Parameter(row.expand(num_data, *row.shape).clone())
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(INITIAL_SCALE)))

    def forward(self, rows: int) -> None:
        index = current_rows()
        if index is None and rows != len(self.loc):
            raise NotAvailable(
                f"the automatic guide has parameters for the {len(self.loc)} training rows of {self.latent.name!r}, not for "
                f"{rows} other rows; an amortized guide (a function of the data) can answer for new data"
            )
        loc, log_scale = (self.loc, self.log_scale) if index is None else (self.loc[index], self.log_scale[index])
        loc, log_scale = (t.movedim(0, cast(int, self.latent.row_axis)) for t in (loc, log_scale))
        _diagonal(self.latent, loc, log_scale, len(self.loc) if index is None else len(index))


def _diagonal(latent: Latent, loc: Tensor, log_scale: Tensor, rows: int | None) -> None:
    normal = dist.Normal(loc, log_scale.exp()).to_event(loc.dim() - latent.batch_dim)
    identity = _is_identity(latent.transform)
    with latent.context(rows):
        name, infer = (latent.name, {}) if identity else (f"{latent.name}_unconstrained", {"is_auxiliary": True})
        unconstrained = pyro.sample(name, normal, infer=infer)
    if not identity:
        latent.sample(unconstrained, rows)


def _is_identity(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, ComposeTransform) and not transform.parts


class _Automatic(nn.Module):
    """The part common to all: which latents have rows, and how many rows the batch has."""

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__()
        self.shared = [latent for latent in latents if latent.row_axis is None]
        self.tables = nn.ModuleList(_RowTable(latent, num_data) for latent in latents if latent.row_axis is not None)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.sample_shared()
        for table in self.tables:
            table(_rows(args, kwargs))

    def sample_shared(self) -> None:
        raise NotImplementedError

    def shared_alone(self, *args: Any, **kwargs: Any) -> None:
        """The statements that need no row of a minibatch, whatever the data."""
        self.sample_shared()

    @property
    def local_names(self) -> list[str]:
        """Latents that belong to one datum each."""
        own = [latent.name for latent in self.shared if any(name == DATA_PLATE for name, _, _ in latent.plates)]
        return own + [cast(_RowTable, table).latent.name for table in self.tables]

    @property
    def bound_to_rows(self) -> bool:
        """Whether some latent belongs to one datum, so that the guide answers for its training data alone."""
        return len(self.local_names) > 0


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    leaves = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0]
    return len(leaves[0]) if leaves else 0


class MeanField(_Automatic):
    r"""Independent Gaussians on the unconstrained latents.

    .. math:: q(u) = \prod_i \mathcal{N}(u_i; \mu_i, \sigma_i^2)

    References:
        Kucukelbir et al. (2017), Automatic differentiation variational inference, arXiv:1603.00788, section 2.4.
    """

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__(latents, num_data)
        self.loc = nn.ParameterList(latent.start.clone() for latent in self.shared)
        self.log_scale = nn.ParameterList(torch.full_like(latent.start, math.log(INITIAL_SCALE)) for latent in self.shared)

    def sample_shared(self) -> None:
        """Make the statements of the latents that have parameters of their own."""
        for latent, loc, log_scale in zip(self.shared, self.loc, self.log_scale):
            _diagonal(latent, loc, log_scale, None)


class _Joint(_Automatic):
    """A bijection of standard normal noise onto all shared latents at once."""

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__(latents, num_data)
        self.sizes = [latent.start.numel() for latent in self.shared]
        start = [latent.start.reshape(-1) for latent in self.shared]
        self.loc = nn.Parameter(torch.cat(start) if start else torch.zeros(0))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(INITIAL_SCALE)))
        self.lower = nn.Parameter(self.loc.new_zeros(len(self.loc), len(self.loc)))

    def bijection(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents u(noise) and log |det du/dnoise|."""
        raise NotImplementedError

    def affine(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u = mu + diag(sigma) (I + strictly lower) noise."""
        mixed = noise + torch.tril(self.lower, -1) @ noise
        return self.loc + self.log_scale.exp() * mixed, self.log_scale.sum()

    def sample_shared(self) -> None:
        """Draw the noise, then make the statements of the latents that have parameters of their own."""
        if not self.shared:
            return
        standard = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        noise = pyro.sample("_noise", standard, infer={"is_auxiliary": True})
        joint, log_det = self.bijection(noise)
        infer = {"is_auxiliary": True, "is_change_of_variables": True}
        pyro.sample("_joint", dist.Delta(joint, log_density=-log_det, event_dim=1), infer=infer)
        for latent, part in zip(self.shared, joint.split(self.sizes)):
            latent.sample(part.reshape(latent.start.shape))


class FullRank(_Joint):
    r"""One Gaussian with a full covariance on all unconstrained latents outside minibatched plates.

    .. math:: u = \mu + \operatorname{diag}(\sigma)(I + A)\varepsilon, \quad A \text{ strictly lower triangular}, \quad
        \varepsilon \sim \mathcal{N}(0, I)

    References:
        Kucukelbir et al. (2017), arXiv:1603.00788, section 2.4 (full-rank).
    """

    def bijection(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The affine map."""
        return self.affine(noise)


class Flow(_Joint):
    r"""A normalizing flow of autoregressive affine transforms, then a full-rank affine map.

    .. math:: u = \mu + \operatorname{diag}(\sigma)(I + A)\, f_\theta(\varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I)

    The transforms are zuko's, used in the direction in which one pass draws (inverse autoregressive flow). At the start
    :math:`f` is nearly the identity.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934.
    """

    def __init__(self, latents: list[Latent], num_data: int, transforms: int = 4, hidden: tuple[int, ...] = (32, 32)) -> None:
        super().__init__(latents, num_data)
        with _validation_flag_kept():
            import zuko
        size = len(self.loc)
        self.flow = zuko.flows.MAF(size, transforms=transforms, hidden_features=hidden, randperm=False).to(self.loc)
        with torch.no_grad():
            for name, parameter in self.flow.named_parameters():
                if len(parameter) == 2 * size or ".phi." in name:
                    parameter.mul_(0.01)

    def bijection(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The flow, then the affine map."""
        bent, log_det = self.flow.transform().call_and_ladj(noise)
        joint, log_det_affine = self.affine(bent)
        return joint, log_det + log_det_affine


@contextmanager
def _validation_flag_kept() -> Iterator[None]:
    """Importing zuko turns torch's argument validation off for everyone; keep what the caller had."""
    before = torch.distributions.Distribution._validate_args  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(bool(before))


AUTOMATIC: dict[str, Callable[[list[Latent], int], _Automatic]] = {
    "mean_field": MeanField,
    "full_rank": FullRank,
    "flow": Flow,
}
"""The automatic guides by name, from the simplest to the most flexible."""
