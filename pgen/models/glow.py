r"""Multi-scale flow over images: squeeze, actnorm, 1x1 convolutions, affine couplings, and halves that leave early.

.. math:: h_0 = x, \qquad (z_l, h_l) = \mathrm{split}(\mathrm{steps}_l(\mathrm{squeeze}(h_{l-1}))), \qquad z = (z_1, \dots, z_L)
    \sim \mathcal{N}(0, I)

A step is an actnorm, a 1x1 convolution of the channels and an affine coupling, whose network sees half of the channels. Density
and draws take one pass each.

Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803; Kingma and Dhariwal (2018), Glow,
arXiv:1807.03039.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel
from ..contracts import Batch, Seed, check_positive
from ..data.transforms import Transform
from ..distributions.events import with_event_shape
from ..distributions.flows import ActNorm, Bijection, Chain, FlowDistribution
from ..training.fit import Training
from ..training.optim import Adam
from .flow import check_atoms

__all__ = ["Glow"]

LOOKED = 500
"""Images that the start of a fit looks at."""


class Squeeze(Bijection):
    """Every 2x2 block of pixels becomes four channels: ``(C, H, W)`` to ``(4 C, H / 2, W / 2)``."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A reordering."""
        return nn.functional.pixel_unshuffle(x, 2), x.new_zeros(x.shape[:-3])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The pixels where they were."""
        return nn.functional.pixel_shuffle(z, 2)


class Conv1x1(Bijection):
    r"""A linear map of the channels, the same at every pixel, kept as :math:`W = P L (U + \operatorname{diag} s)`.

    .. math:: \log |\det| = H W \sum_c \log |s_c|

    P and the signs of s are fixed; L and U are unit triangular. At the start W is a random rotation.

    References:
        Kingma and Dhariwal (2018), arXiv:1807.03039, eq. 10.
    """

    order: Tensor
    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # the factors of a meta tensor have no values
            p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(channels, channels))[0])
        s = upper.diagonal()
        self.register_buffer("order", p.argmax(1))
        self.register_buffer("signs", s.sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(s.abs().log())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag s."""
        return self.lower.tril(-1) + torch.eye(len(self.log_s)).to(self.lower), self.upper.triu(1) + torch.diag(
            self.signs * self.log_s.exp()
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """W at every pixel."""
        lower, upper = self.factors()
        z = torch.einsum("dc,...chw->...dhw", (lower @ upper).index_select(0, self.order), x)
        return z, (x.shape[-2] * x.shape[-1] * self.log_s.sum()).expand(x.shape[:-3])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """By substitution in both triangles."""
        lower, upper = self.factors()
        z = z.index_select(-3, self.order.argsort())
        height, width = z.shape[-2:]
        z = z.flatten(-2)
        z = torch.linalg.solve_triangular(lower, z, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, z, upper=True).unflatten(-1, (height, width))


class AffineCoupling(Bijection):
    r"""The second half of the channels, shifted and scaled by functions of the first half and the context.

    .. math:: z_b = (x_b + t(x_a)) \, e^{s(x_a)}, \qquad s = 2 \tanh(r(x_a) / 2)

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), arXiv:1605.08803, eq. 4; Kingma and Dhariwal (2018), arXiv:1807.03039, table 1.
    """

    def __init__(self, channels: int, hidden: int, context: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(channels // 2 + context, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )
        with torch.no_grad():
            for parameter in self.network[-1].parameters():
                parameter.mul_(0.01)

    def shift_and_log_scale(self, a: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """t and s."""
        if context is not None:
            plane = context[..., None, None].expand(*a.shape[:-3], -1, *a.shape[-2:])
            a = torch.cat([a, plane], -3)
        shift, raw = self.network(a).chunk(2, -3)
        return shift, 2 * (raw / 2).tanh()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z and the sum of s."""
        a, b = x.chunk(2, -3)
        shift, log_scale = self.shift_and_log_scale(a, context)
        return torch.cat([a, (b + shift) * log_scale.exp()], -3), log_scale.flatten(-3).sum(-1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The same network, run forwards."""
        a, b = z.chunk(2, -3)
        shift, log_scale = self.shift_and_log_scale(a, context)
        return torch.cat([a, b * (-log_scale).exp() - shift], -3)


class MultiScale(Bijection):
    """Levels one after another; after each but the last, half of the channels leave. z has the shape of x."""

    def __init__(self, shape: tuple[int, int, int], levels: int, steps: int, hidden: int, context: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.shape, self.levels = shape, nn.ModuleList()
        for level in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            parts: list[Bijection] = [Squeeze()]
            for _ in range(steps):
                norm = ActNorm((channels, 1, 1), height * width)
                parts += [norm, Conv1x1(channels), AffineCoupling(channels, hidden, context)]
            self.levels.append(Chain(parts))
            channels = channels // 2 if level < levels - 1 else channels

    def start(self, x: Tensor, context: Tensor | None) -> None:
        """Start every actnorm at what reaches it from data, ``(N, C, H, W)``."""
        for level in self.levels:
            for part in cast(Chain, level).parts:
                x = part.start(x) if isinstance(part, ActNorm) else part(x, context)[0]
            x = x.chunk(2, -3)[1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All levels; log-determinants add."""
        left, total = [], torch.zeros(())
        for number, level in enumerate(self.levels):
            x, log_det = level(x, context)
            total = log_det + total.to(log_det)
            if number < len(self.levels) - 1:
                gone, x = x.chunk(2, -3)
                left.append(gone.flatten(-3))
        return torch.cat([*left, x.flatten(-3)], -1).unflatten(-1, self.shape), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """From the last level to the first; each half joins again where it left."""
        _, height, width = self.shape
        size, sizes = math.prod(self.shape), []
        for _ in self.levels[:-1]:
            size //= 2
            sizes.append(size)
        *left, x = z.flatten(-3).split([*sizes, size], -1)
        scale = 2 ** len(self.levels)
        x = x.unflatten(-1, (-1, height // scale, width // scale))
        for number, level in reversed(list(enumerate(self.levels))):
            if number < len(self.levels) - 1:
                x = torch.cat([left[number].unflatten(-1, x.shape[-3:]), x], -3)
            x = cast(Bijection, level).inverse(x, context)
        return x


class Glow(GenerativeModel):
    r"""Multi-scale flow over images.

    Shapes: x ``(N, C, H, W)``, or ``(N, H, W)`` of one channel; context ``(N, context_dim)``. H and W are multiples of
    ``2 ** levels``. Pixels are whole numbers, so give ``preprocess=Compose([Dequantize(256), Logit(0.05)])``.

    Args:
        event_shape: Shape of one image.
        levels: Scales: each halves height and width.
        steps: Steps (actnorm, 1x1 convolution, coupling) a level.
        hidden: Channels of the couplings' networks.
        context_dim: Size of the vector that the flow is conditioned on; 0 for none.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> from pgen.data import Compose, Dequantize, Logit
        >>> glow = Glow((8, 8), levels=2, steps=2, hidden=16, preprocess=Compose([Dequantize(17), Logit(0.05)]))
        >>> glow.sample(2).shape
        torch.Size([2, 8, 8])
    """

    family = "glow"
    default_batch_size = 64
    default_epochs = 100

    def __init__(
        self,
        event_shape: Sequence[int],
        levels: int = 2,
        steps: int = 8,
        hidden: int = 128,
        *,
        context_dim: int = 0,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        for name, number in (("levels", levels), ("steps", steps), ("hidden", hidden)):
            check_positive(name, number)
        if len(self.event_shape) not in (2, 3) or any(n % 2**levels for n in self.event_shape[-2:]):
            raise ValueError(
                f"`event_shape` should be (H, W) or (C, H, W) with H and W multiples of 2 ** levels = {2**levels}, got "
                f"{self.event_shape}; take fewer levels, or pad the images"
            )
        self.num_levels, self.steps, self.hidden = levels, steps, hidden
        self.image = cast(tuple[int, int, int], (1, *self.event_shape)[-3:])
        with self.initial_weights(seed):
            self.flow = MultiScale(self.image, levels, steps, hidden, context_dim)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        numbers = {"levels": self.num_levels, "steps": self.steps, "hidden": self.hidden, "context_dim": self.context_dim}
        return {"event_shape": list(self.event_shape), **numbers}

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = settings.schedule or (None if settings.stop == "converged" else "warmup_cosine")
        return Adam(1e-3), replace(settings, schedule=schedule, clip_norm=settings.clip_norm or 50.0)

    def prime(self, data: Batch) -> None:
        """Start every actnorm at the data, and refuse pixels that have no density."""
        batch = self._prepared(data)[0]
        check_atoms(batch["x"].flatten(1)[: 10 * LOOKED])
        with torch.no_grad():
            self.flow.start(
                batch["x"][:LOOKED].reshape(-1, *self.image), batch["context"][:LOOKED] if self.context_dim else None
            )

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c)."""
        noise = dist.Normal(next(self.flow.parameters()).new_zeros(self.image), 1.0).to_event(3)
        fn = FlowDistribution(self.flow, noise, context, validate_args=False)
        with self.plate(x, context):
            return pyro.sample("x", with_event_shape(fn, self.event_shape), obs=x)
