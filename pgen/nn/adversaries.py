r"""Generators and critics: dense, deep convolutional and residual; spectral normalisation.

A generator maps noise (and context) to a datum, a critic a pack of data (and their contexts) to one number.

Radford, Metz and Chintala (2016), DCGAN, arXiv:1511.06434; Gulrajani et al. (2017), arXiv:1704.00028, appendix C (residual
networks); Miyato et al. (2018), arXiv:1802.05957 (spectral normalisation); Miyato and Koyama (2018), arXiv:1802.05637
(projected contexts).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .dense import MLP

__all__ = ["ARCHITECTURES", "OUTPUTS", "Critic", "Generator", "SpectralNorm", "spectral_norm"]

SMALLEST = 4
"""Side of the image that convolutions start from, at the least."""
OUTPUTS: dict[str, Callable[[], nn.Module]] = {"linear": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}
"""What a generator ends in."""


# --- spectral normalisation ------------------------------------------------------------------------------------------------


class SpectralNorm(nn.Module):
    r"""A weight divided by its largest singular value, of which one power iteration a step keeps track.

    .. math:: W / \sigma, \qquad v \leftarrow W^\top u / \lVert W^\top u \rVert, \quad u \leftarrow W v / \lVert W v \rVert,
        \quad \sigma = u^\top W v

    References:
        Miyato et al. (2018), arXiv:1802.05957, algorithm 1; convolutions are taken as matrices of (outputs, the rest).
    """

    u: Tensor

    def __init__(self, weight: Tensor, warm_up: int = 30) -> None:
        super().__init__()
        self.register_buffer("u", torch.nn.functional.normalize(torch.randn(len(weight), dtype=weight.dtype), dim=0))
        for _ in range(warm_up):
            self.u.copy_(self._iterated(weight.detach().flatten(1))[0])

    def _iterated(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.nn.functional.normalize(matrix.T @ self.u, dim=0)
        return torch.nn.functional.normalize(matrix @ v, dim=0), v

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its norm; in training, after a step of the power iteration."""
        matrix = weight.flatten(1)
        with torch.no_grad():
            u, v = self._iterated(matrix)
            if self.training:
                self.u.copy_(u)
        return weight / (u @ (matrix @ v))


def spectral_norm(network: nn.Module) -> nn.Module:
    """Give every linear map and convolution of a network, in place, a `SpectralNorm`; returns the network.

    Example:
        >>> layer = spectral_norm(nn.Linear(4, 3))
        >>> round(float(torch.linalg.matrix_norm(layer.weight.detach(), 2)), 3)
        1.0
    """
    for module in list(network.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))
    return network


# --- the two players -------------------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """A body that makes data of one shape from noise with the context beside it, and what it ends in.

    Shapes: z ``(N, latent_dim)``, context ``(N, context_dim)`` -> ``(N, *event_shape)``.

    Args:
        body: From ``(N, latent_dim + context_dim)`` to as many numbers as a datum has.
        event_shape: Of a datum.
        output: One of ``OUTPUTS``.
    """

    def __init__(self, body: nn.Module, event_shape: tuple[int, ...], output: str) -> None:
        super().__init__()
        self.body, self.event_shape, self.output = body, event_shape, OUTPUTS[output]()

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """x = G(z, c)."""
        x = self.body(z if context is None else torch.cat([z, context], -1))
        return self.output(x.reshape(-1, *self.event_shape))


class Critic(nn.Module):
    r"""Features of a pack of data, and one number from them; a context is projected on the features.

    .. math:: T(x, c) = w^\top \phi(x) + b + (V c)^\top \phi(x)

    Shapes: x ``(N, pack * n, ...)``, context ``(N, pack * context_dim)`` -> ``(N,)``.

    Args:
        features: The map :math:`\phi`, to ``(N, num_features)``.
        num_features: Its numbers.
        context_dim: Size of the contexts of a pack; 0 for none.

    References:
        Miyato and Koyama (2018), cGANs with projection discriminator, arXiv:1802.05637, eq. 3.
    """

    def __init__(self, features: nn.Module, num_features: int, context_dim: int = 0) -> None:
        super().__init__()
        self.features, self.last = features, nn.Linear(num_features, 1)
        self.projection = nn.Linear(context_dim, num_features, bias=False) if context_dim else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """T(x, c)."""
        h = self.features(x)
        numbers = self.last(h).squeeze(-1)
        return numbers if self.projection is None else numbers + (self.projection(context) * h).sum(-1)


# --- dense -----------------------------------------------------------------------------------------------------------------


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.2)


def _dense_generator(inputs: int, shape: tuple[int, ...], hidden: tuple[int, ...], batch_norm: bool) -> nn.Module:
    """Linear layers with ReLU, behind batch normalisation if asked for."""
    layers: list[nn.Module] = []
    for n, m in pairwise((inputs, *hidden)):
        layers += [nn.Linear(n, m), *([nn.BatchNorm1d(m)] if batch_norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], math.prod(shape)))


def _dense_critic(shape: tuple[int, ...], pack: int, hidden: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Linear layers with leaky ReLU over all numbers of a pack."""
    features = MLP(pack * math.prod(shape), hidden[:-1], hidden[-1], _leaky)
    return nn.Sequential(nn.Flatten(), features, _leaky()), hidden[-1]


# --- images ----------------------------------------------------------------------------------------------------------------


def _image(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Channels, side lengths of the smallest image, and how often it is doubled."""
    if len(shape) not in (2, 3):
        raise ValueError(f"convolutions need images, (H, W) or (C, H, W), got event_shape {shape}; use architecture='dense'")
    channels, height, width = (1, *shape) if len(shape) == 2 else shape
    doublings = 0
    while height % 2 == 0 and width % 2 == 0 and min(height, width) // 2 >= SMALLEST:
        height, width, doublings = height // 2, width // 2, doublings + 1
    if not doublings:
        raise ValueError(f"convolutions need sides that are multiples of 2, {2 * SMALLEST} or more, got event_shape {shape}")
    return channels, height, width, doublings


def _widths(hidden: tuple[int, ...], doublings: int) -> list[int]:
    """Channels at each size from the smallest image on: as given, else doubled at each halving."""
    if len(hidden) == 1:
        return [hidden[0] * 2**i for i in reversed(range(doublings + 1))]
    if len(hidden) != doublings + 1:
        raise ValueError(
            f"`hidden` is the number of channels at the full size, or at each of the {doublings + 1} sizes from the smallest "
            f"image on, got {hidden}"
        )
    return list(hidden)


def _normed(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


def _opened(inputs: int, channels: int, height: int, width: int) -> list[nn.Module]:
    """The smallest image from noise."""
    return [nn.Linear(inputs, channels * height * width), nn.Unflatten(1, (channels, height, width))]


class _AsImages(nn.Module):
    """A pack of images side by side as channels, ``(N, pack * C, H, W)``, from ``(N, pack * n, ...)``."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.shape = (channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)


def _conv_generator(inputs: int, shape: tuple[int, ...], hidden: tuple[int, ...], batch_norm: bool) -> nn.Module:
    """Transposed convolutions that double the image, with batch normalisation and ReLU (DCGAN)."""
    channels, height, width, doublings = _image(shape)
    widths = _widths(hidden, doublings)
    layers = [*_opened(inputs, widths[0], height, width), _normed(widths[0], batch_norm), nn.ReLU()]
    for n, m in pairwise(widths):
        layers += [nn.ConvTranspose2d(n, m, 4, stride=2, padding=1), _normed(m, batch_norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], channels, 3, padding=1))


def _conv_critic(shape: tuple[int, ...], pack: int, hidden: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Convolutions of stride two with leaky ReLU (DCGAN's without batch normalisation, which would mix the data)."""
    channels, height, width, doublings = _image(shape)
    widths, full = _widths(hidden, doublings)[::-1], 2**doublings
    layers: list[nn.Module] = [_AsImages(pack * channels, height * full, width * full)]
    layers += [nn.Conv2d(pack * channels, widths[0], 3, padding=1), _leaky()]
    for n, m in pairwise(widths):
        layers += [nn.Conv2d(n, m, 4, stride=2, padding=1), _leaky()]
    return nn.Sequential(*layers, nn.Flatten()), widths[-1] * height * width


class _Residual(nn.Module):
    r"""Two convolutions beside a shortcut, which double the image's sides, or halve them, or leave them.

    .. math:: y = s(x) + c_2(\sigma(c_1(\sigma(x))))
    """

    def __init__(self, inputs: int, outputs: int, *, up: bool = False, down: bool = False, batch_norm: bool = False) -> None:
        super().__init__()
        resize = nn.Upsample(scale_factor=2) if up else nn.Identity()
        self.body = nn.Sequential(
            _normed(inputs, batch_norm), nn.ReLU(), resize, nn.Conv2d(inputs, outputs, 3, padding=1),
            _normed(outputs, batch_norm), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.AvgPool2d(2) if down else nn.Identity(),
        )  # fmt: skip
        self.shortcut = nn.Sequential(resize, nn.Conv2d(inputs, outputs, 1), nn.AvgPool2d(2) if down else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def _residual_generator(inputs: int, shape: tuple[int, ...], hidden: tuple[int, ...], batch_norm: bool) -> nn.Module:
    """Residual blocks that double the image."""
    channels, height, width, doublings = _image(shape)
    widths = _widths(hidden, doublings)
    blocks = [_Residual(n, m, up=True, batch_norm=batch_norm) for n, m in pairwise(widths)]
    last = [_normed(widths[-1], batch_norm), nn.ReLU(), nn.Conv2d(widths[-1], channels, 3, padding=1)]
    return nn.Sequential(*_opened(inputs, widths[0], height, width), *blocks, *last)


class _SumPool(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h).sum((2, 3))


def _residual_critic(shape: tuple[int, ...], pack: int, hidden: tuple[int, ...]) -> tuple[nn.Module, int]:
    """Residual blocks that halve the image, then sums over it."""
    channels, height, width, doublings = _image(shape)
    widths, full = _widths(hidden, doublings)[::-1], 2**doublings
    first = [_AsImages(pack * channels, height * full, width * full), nn.Conv2d(pack * channels, widths[0], 3, padding=1)]
    blocks = [_Residual(n, m, down=True) for n, m in pairwise(widths)]
    return nn.Sequential(*first, *blocks, _Residual(widths[-1], widths[-1]), _SumPool()), widths[-1]


@dataclass(frozen=True)
class Architecture:
    """How the two players of a kind are built.

    Attributes:
        generator: From (inputs, event shape, hidden, batch_norm) to the generator's body.
        critic: From (event shape, pack, hidden) to the critic's features and how many they are.
        hidden: Sizes unless told otherwise: of layers, or the channels at the full size.
        batch_norm: Whether the generator has batch normalisation unless told otherwise.
    """

    generator: Callable[[int, tuple[int, ...], tuple[int, ...], bool], nn.Module]
    critic: Callable[[tuple[int, ...], int, tuple[int, ...]], tuple[nn.Module, int]]
    hidden: tuple[int, ...]
    batch_norm: bool


ARCHITECTURES = {
    "dense": Architecture(_dense_generator, _dense_critic, (128, 128, 128), False),
    "dcgan": Architecture(_conv_generator, _conv_critic, (32,), True),
    "residual": Architecture(_residual_generator, _residual_critic, (32,), True),
}
"""Architectures by name."""
