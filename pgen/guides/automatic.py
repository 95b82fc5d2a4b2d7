r"""Automatic guides: a variational family for the latents of any traced program.

A guide works on the unconstrained space :math:`u` of the latents, :math:`z = T(u)` with Pyro's ``biject_to`` of each
site's support, so that :math:`\log q(z) = \log q(u) - \log |\det \partial T / \partial u|`.

Latents outside the data plate (and all latents, where every step sees all the data) have parameters of their own. Latents
inside the plate of a program that is fitted in minibatches have one row of parameters a datum, looked up by the row's index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
from .transport import autoregressive_flow

__all__ = ["AUTOMATIC", "Flow", "FullRank", "Latent", "LowRank", "MeanField"]

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
                f"latent {term.name!r} is discrete ({type(term.fn).__name__}) with endlessly many values, and automatic "
                f"guides are continuous: write a guide"
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

    def diagonal(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def start_at(self, other: _Automatic) -> None:
        """Start where another guide for the same latents is: rows here, shared latents in each guide."""
        for own, theirs in zip(self.tables, other.tables):
            own.load_state_dict(theirs.state_dict())

    @property
    def size(self) -> int:
        """Numbers in all shared latents together, D."""
        return sum(latent.start.numel() for latent in self.shared)

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

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Location and log standard deviation of all shared latents, ``(D,)`` each."""
        return _flat(self.loc), _flat(self.log_scale)

    def start_at(self, other: _Automatic) -> None:
        """Take over another guide's location and marginal scales."""
        super().start_at(other)
        for own, values in zip((self.loc, self.log_scale), other.diagonal()):
            for parameter, part in zip(own, values.split([p.numel() for p in own])):
                parameter.copy_(part.reshape(parameter.shape))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    parts = [t.detach().reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


class _Joint(_Automatic):
    """All shared latents at once, as one vector."""

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__(latents, num_data)
        self.sizes = [latent.start.numel() for latent in self.shared]
        self.loc = nn.Parameter(_flat(latent.start for latent in self.shared))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, math.log(INITIAL_SCALE)))

    def joint(self) -> Tensor:
        """State the vector of unconstrained latents, ``(D,)``."""
        raise NotImplementedError

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Location and log standard deviation of all shared latents, ``(D,)`` each."""
        return self.loc.detach(), self.log_scale.detach()

    def start_at(self, other: _Automatic) -> None:
        """Take over another guide's location and scales."""
        super().start_at(other)
        loc, log_scale = other.diagonal()
        self.loc.copy_(loc)
        self.log_scale.copy_(log_scale)

    def sample_shared(self) -> None:
        """State the vector, then make the statements of the latents that have parameters of their own."""
        if not self.shared:
            return
        for latent, part in zip(self.shared, self.joint().split(self.sizes)):
            latent.sample(part.reshape(latent.start.shape))


class LowRank(_Joint):
    r"""One Gaussian whose correlations have low rank, on all unconstrained latents outside minibatched plates.

    .. math:: u = \mu + \operatorname{diag}(\sigma)(\varepsilon + A \eta), \quad A \in \mathbb{R}^{D \times r}, \quad
        \varepsilon, \eta \sim \mathcal{N}(0, I)

    Its density needs the Cholesky factor of the r by r matrix :math:`I + A^\top A` alone (Woodbury), so a step costs
    :math:`D r^2` and no matrix is D by D. The rank is :math:`\sqrt D`, rounded.

    References:
        Ong, Nott, Smith (2018), Gaussian variational approximation with a factor covariance structure, arXiv:1701.03208.
    """

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__(latents, num_data)
        size = len(self.loc)
        rank = max(1, round(math.sqrt(size)))
        # at A = 0 the gradient vanishes, so the start is beside it
        self.factor = nn.Parameter(
            torch.randn(size, rank, dtype=self.loc.dtype, device=self.loc.device) * 0.1 / math.sqrt(rank)
        )

    def joint(self) -> Tensor:
        """One draw of the Gaussian."""
        scale = self.log_scale.exp()
        gaussian = dist.LowRankMultivariateNormal(self.loc, scale[:, None] * self.factor, scale.square())
        return pyro.sample("_joint", gaussian, infer={"is_auxiliary": True})

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Location and log standard deviation of all shared latents, ``(D,)`` each."""
        return self.loc.detach(), (self.log_scale + 0.5 * self.factor.square().sum(1).log1p()).detach()


class FullRank(_Joint):
    r"""One Gaussian with a full covariance on all unconstrained latents outside minibatched plates.

    .. math:: u = \mu + \operatorname{diag}(\sigma)(I + A)\varepsilon, \quad A \text{ strictly lower triangular}, \quad
        \varepsilon \sim \mathcal{N}(0, I)

    References:
        Kucukelbir et al. (2017), arXiv:1603.00788, section 2.4 (full-rank).
    """

    def __init__(self, latents: list[Latent], num_data: int) -> None:
        super().__init__(latents, num_data)
        self.lower = nn.Parameter(self.loc.new_zeros(len(self.loc), len(self.loc)))

    def bijection(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Latents u(noise) and log |det du/dnoise|."""
        mixed = noise + torch.tril(self.lower, -1) @ noise
        return self.loc + self.log_scale.exp() * mixed, self.log_scale.sum()

    def preimage(self, joint: Tensor) -> Tensor:
        """The noise behind unconstrained latents: the inverse of ``bijection``."""
        mixed = ((joint - self.loc) / self.log_scale.exp()).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.lower, mixed, upper=False, unitriangular=True).squeeze(-1)

    def joint(self) -> Tensor:
        """Draw the noise and state its image."""
        standard = dist.Normal(torch.zeros_like(self.loc), 1.0).to_event(1)
        noise = pyro.sample("_noise", standard, infer={"is_auxiliary": True, "preimage": ("_joint", self.preimage)})
        joint, log_det = self.bijection(noise)
        infer = {"is_auxiliary": True, "is_change_of_variables": True}
        return pyro.sample("_joint", dist.Delta(joint, log_density=-log_det, event_dim=1), infer=infer)

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Location and log standard deviation of all shared latents, ``(D,)`` each."""
        return self.loc.detach(), (self.log_scale + 0.5 * torch.tril(self.lower, -1).square().sum(1).log1p()).detach()

    def start_at(self, other: _Automatic) -> None:
        """Take over another guide's location and covariance."""
        super().start_at(other)
        if isinstance(other, FullRank):
            self.log_scale.copy_(other.log_scale)
            self.lower.copy_(other.lower)
        elif isinstance(other, LowRank):
            root = torch.linalg.cholesky(torch.eye(len(self.loc)).to(self.loc) + other.factor @ other.factor.T)
            self.log_scale.copy_(other.log_scale + root.diagonal().log())
            self.lower.copy_(torch.tril(root / root.diagonal()[:, None], -1))


class Flow(FullRank):
    r"""A normalizing flow of autoregressive affine transforms, then a full-rank affine map.

    .. math:: u = \mu + \operatorname{diag}(\sigma)(I + A)\, f_\theta(\varepsilon), \quad \varepsilon \sim \mathcal{N}(0, I)

    The transforms are zuko's, used in the direction in which one pass draws (inverse autoregressive flow). At the start
    :math:`f` is nearly the identity.

    References:
        Kingma et al. (2016), Improving variational inference with inverse autoregressive flow, arXiv:1606.04934.
    """

    def __init__(self, latents: list[Latent], num_data: int, transforms: int = 4, hidden: tuple[int, ...] = (32, 32)) -> None:
        super().__init__(latents, num_data)
        self.flow = autoregressive_flow(len(self.loc), transforms, hidden).to(self.loc)

    def bijection(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The flow, then the affine map."""
        bent, log_det = self.flow.transform().call_and_ladj(noise)  # type: ignore[operator]
        joint, log_det_affine = super().bijection(bent)
        return joint, log_det + log_det_affine

    def preimage(self, joint: Tensor) -> Tensor:
        """The noise behind unconstrained latents, in D passes of each transform."""
        return self.flow.transform().inv(super().preimage(joint))  # type: ignore[operator]


AUTOMATIC: dict[str, Callable[[list[Latent], int], _Automatic]] = {
    "mean_field": MeanField,
    "low_rank": LowRank,
    "full_rank": FullRank,
    "flow": Flow,
}
"""The automatic guides by name, from the simplest to the most flexible."""
