r"""What families of images have in common: pixels in raster order, prefixes, completions, and missing pixels filled in.

.. math:: p(x \mid c) = \prod_{t} p(x_t \mid x_1, \ldots, x_{t-1}, c)

over the numbers of an image, row by row from the top left, the channels of a pixel one after another. A *trunk* sums up the
pixels before each pixel as features; a *head* gives the distribution of the pixel's channels from those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, cast

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..base import SAMPLE_ROWS, GenerativeModel, _evaluating
from ..contracts import Batch, Seed, check_choice, check_event_shape, check_positive
from ..data.arrays import as_batch, check_finite, check_varies
from ..distributions.autoregressive import Autoregressive
from ..distributions.observation import OBSERVATIONS, Observation, observation
from ..evaluation.posterior import by_rows
from ..nn import MLP, MaskedMLP
from ..programs import isolated
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["ImageModel", "PixelNetwork", "Trunk", "put"]


class Trunk(Protocol):
    """A causal network over pixels, in one pass and one pixel at a time."""

    def __call__(self, pixels: Tensor, context: Tensor | None) -> Tensor:
        """Features ``(B, F, H, W)`` of pixels ``(B, C, H, W)``; those of a pixel depend on the pixels before it alone."""

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """The state before the first pixel: tensors of fixed shape."""

    def step(self, state: Sequence[Tensor], n: Tensor, before: Tensor) -> Tensor:
        """Features ``(B, F)`` of pixel n ``()``, from pixel n - 1 ``(B, C)`` (zeros at n = 0); changes the state in place.

        May be called several times for one pixel.
        """


class PixelNetwork(nn.Module):
    """A trunk and a head as one causal network over the numbers of an image, channels of a pixel one after another.

    Args:
        trunk: Gives the features of each pixel.
        features: F, how many.
        observation: Of one number.
        size: Height, width and channels of an image.
        hidden: Size of the head's hidden layer.
    """

    def __init__(self, trunk: Any, features: int, observation: Observation, size: tuple[int, int, int], hidden: int) -> None:
        super().__init__()
        self.trunk, self.observation = trunk, observation
        self.height, self.width, self.channels = size
        self.features = features
        # Of one channel the head sees the features alone, of several the channels before too.
        self.head: nn.Module = (
            MLP(features, (hidden,), observation.outputs, nn.ReLU)
            if self.channels == 1
            else MaskedMLP(self.channels, observation.width, (hidden,), observation.outputs, nn.ReLU, context_dim=features)
        )

    def last(self) -> nn.Linear:
        """The layer that gives the outputs."""
        return cast(nn.Linear, self.head[-1] if isinstance(self.head, MLP) else cast(MaskedMLP, self.head).last)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Outputs of all numbers ``(B, t, outputs)`` from the first t of each image, ``(B, t)``."""
        count = x.shape[1]
        whole = self.height * self.width * self.channels
        inputs = nn.functional.pad(self.observation.encode(x), (0, 0, 0, whole - count))  # (B, HWC, width)
        pixels = inputs.reshape(len(x), self.height, self.width, -1).permute(0, 3, 1, 2)
        features = self.trunk(pixels, context).permute(0, 2, 3, 1).reshape(-1, self.features)  # (BHW, F)
        outputs = self._outputs(inputs.reshape(len(features), self.channels, -1), features)
        return outputs.reshape(len(x), whole, -1)[:, :count]

    def _outputs(self, pixel: Tensor, features: Tensor) -> Tensor:
        """Outputs of the channels, ``(n, C, outputs)``, of n pixels ``(n, C, width)``."""
        if isinstance(self.head, MLP):
            return self.head(features).unsqueeze(1)
        return self.head(pixel, torch.arange(self.channels, device=pixel.device), features)

    def start(self, batch: int, context: Tensor | None) -> list[Tensor]:
        """The pixel before and the pixel at hand, ``(B, C, width)``, and the state of the trunk."""
        nothing = self.last().weight.new_zeros(batch, self.channels, self.observation.width)
        return [nothing, nothing.clone(), *self.trunk.start(batch, context)]

    def step(self, state: Sequence[Tensor], t: Tensor, previous: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """Outputs at number t."""
        before, pixel, *own = state
        n, channel = t // self.channels, t % self.channels
        inputs = self.observation.encode(previous) * (t > 0)
        pixel.index_copy_(1, ((t - 1) % self.channels).reshape(1), inputs.unsqueeze(1))
        before.copy_(torch.where(channel == 0, pixel, before))
        features = self.trunk.step(own, n, before.flatten(1))
        outputs = self._outputs(pixel, features)  # later channels hold the pixel before, which the mask hides
        return outputs.index_select(1, channel.reshape(1)).squeeze(1), state


def put(plane: Tensor, value: Tensor, row: Tensor, column: Tensor) -> None:
    """Set ``plane[:, :, row, column]`` to ``(B, C)``, in place."""
    plane.flatten(2).index_copy_(2, (row * plane.shape[3] + column).reshape(1), value.unsqueeze(2))


class ImageModel(GenerativeModel):
    """A family of images, generated pixel by pixel.

    Shapes: x ``(N, H, W)`` or ``(N, C, H, W)``; context ``(N, context_dim)``. What comes before what is the order of the
    rows of an image, and in a row from left to right; the channels of a pixel come one after another.
    """

    stepwise = True
    default_batch_size = 64
    default_epochs = 50
    network: PixelNetwork

    def __init__(
        self,
        event_shape: Sequence[int],
        channels: int,
        layers: int,
        *,
        kernel: int | None,
        first_kernel: int,
        head: int,
        likelihood: str,
        num_classes: int | None,
        num_components: int | None,
        dropout: float,
        context_dim: int,
    ) -> None:
        super().__init__(event_shape, context_dim=context_dim)
        if len(self.event_shape) not in (2, 3):
            raise ValueError(f"`event_shape` should be (height, width) or (channels, height, width), got {self.event_shape}")
        check_choice("likelihood", likelihood, tuple(OBSERVATIONS))
        for name, value in (("channels", channels), ("layers", layers), ("head", head)):
            check_positive(name, value)
        for name, width in (("kernel", kernel), ("first_kernel", first_kernel)):
            if width is not None and (width < 1 or width % 2 == 0):
                raise ValueError(f"`{name}` should be a positive odd number, got {width}")
        self.width, self.layers, self.kernel, self.first_kernel = channels, layers, kernel, first_kernel
        self.head, self.dropout = head, float(dropout)
        self.likelihood, self.num_classes, self.num_components = likelihood, num_classes, num_components
        self.observation: Observation = observation(likelihood, (), num_classes, num_components)
        self.channels = 1 if len(self.event_shape) == 2 else self.event_shape[0]
        numbers = torch.arange(math.prod(self.event_shape)).reshape(self.channels, -1)
        self.register_buffer("order", numbers.T.reshape(-1, 1))

    order: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return (*self.event_shape[-2:], self.channels)  # type: ignore[return-value]

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        network = ("layers", "kernel", "first_kernel", "head", "dropout", "context_dim")
        names = ("likelihood", "num_classes", "num_components", *network)
        own = {name: getattr(self, name) for name in names}
        return {"event_shape": list(self.event_shape), "channels": self.width, **own}

    def prime(self, data: Batch) -> None:
        """Start at the frequencies of single numbers."""
        x = self._prepared(data)[0]["x"].reshape(-1, self.channels, math.prod(self.event_shape[-2:]))
        pixels = x.movedim(1, -1).flatten(0, 1)
        if self.observation.support is constraints.real:  # one pixel may be constant, as the network sees where it is
            fix = "drop that channel, or take another likelihood"
            check_varies(pixels, what="number {} of each pixel", many="pixels", fix=fix)
        colours = observation(self.likelihood, (self.channels,), self.num_classes, self.num_components)
        with torch.no_grad():
            self.network.last().bias.copy_(colours.start(pixels))

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        schedule = settings.schedule if settings.schedule is not None or settings.stop == "converged" else "cosine"
        return Adam(2e-3), replace(settings, clip_norm=settings.clip_norm or 1.0, schedule=schedule)

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """p(x | c)."""
        with self.plate(x, context):
            return pyro.sample("x", self.distribution(context), obs=x)

    def distribution(self, context: Tensor | None = None) -> Autoregressive:
        """The distribution of an image."""
        return Autoregressive(self.network, self.observation, self.event_shape, context=context, order=self.order)

    # -- prefixes and missing pixels -----------------------------------------------------------------------------------

    def next(self, prefix: Any, context: Any = None) -> Any:
        """The distribution of the next number of images that begin with ``prefix``.

        Args:
            prefix: The first t numbers of each, in the order of generation, ``(N, t)``.
            context: One for each, or one for all.

        Returns:
            A distribution of batch shape ``(N,)``: ``.probs``, ``.log_prob``, ``.sample``.
        """
        given = self._prefix(prefix, most=len(self.order) - 1)
        where = self._where(context, len(given))
        with torch.no_grad(), isolated(self.home), _evaluating(self):
            return self.distribution(where).next(given)

    def complete(
        self, prefix: Any, context: Any = None, *, seed: Seed = 0, compile: str = "auto", progress: bool = True
    ) -> Tensor:
        """Draw images that begin with ``prefix``: exact draws from p(rest | prefix).

        Args:
            prefix: The first t numbers of each, in the order of generation, ``(N, t)``; for images of one channel
                ``x.flatten(1)[:, :t]``.
            context: One for each, or one for all.
            seed: Keys the draws.
            compile: The tier; ``"auto"`` goes by the amount of work.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            Images, ``(N, *event_shape)``.
        """
        given = self._prefix(prefix, most=len(self.order))
        places = self.order[: given.shape[1], 0]
        x = given.new_zeros(len(given), len(self.order)).index_copy(1, places, given)
        observed = torch.zeros_like(x, dtype=torch.bool).index_fill(1, places, True)
        batch = {"x": x.reshape(-1, *self.event_shape), "observed": observed.reshape(-1, *self.event_shape)}
        return self._drawn(_completed, "complete", batch, context, SAMPLE_ROWS, seed, compile, progress)

    def infill(
        self,
        x: Any,
        context: Any = None,
        *,
        num_particles: int = 64,
        seed: Seed = 0,
        progress: bool = True,
    ) -> Tensor:
        """Draw the missing pixels of images, approximately from p(missing | observed).

        A particle filter in the order of generation: each missing number is drawn given all before it, each observed one
        weighs the particles by its probability, and particles are resampled. Exact in the limit of many particles, and with
        any number where the observed pixels come first; with few it underrates what later pixels say about earlier ones.

        Args:
            x: Images ``(N, *event_shape)``, NaN where a number is missing.
            context: One for each, or one for all.
            num_particles: For each image.
            seed: Keys the draws.
            progress: Whether to show a bar on what takes more than two seconds.

        Returns:
            One draw for each image, ``(N, *event_shape)``.
        """
        check_positive("num_particles", num_particles)
        x, count = torch.as_tensor(as_batch(x, name="x")), int(num_particles)
        check_event_shape("x", x, self.event_shape)
        given = self._like(torch.where(torch.isnan(x), torch.zeros_like(x), x))
        self._check_numbers("x", given)
        batch = {"x": given, "observed": ~torch.isnan(x).to(given.device)}
        most = max(1, SAMPLE_ROWS // count)
        draw = partial(_infilled, count)
        return self._drawn(draw, "infill", batch, context, most, seed, "eager", progress)

    def _drawn(
        self,
        draw: Callable[[Autoregressive, dict[str, Tensor]], Tensor],
        name: str,
        batch: dict[str, Tensor],
        context: Any,
        most: int,
        seed: Seed,
        compile: str,
        progress: bool,
    ) -> Tensor:
        """What ``draw`` makes of the distribution and the rows of a batch."""
        where = self._where(context, len(batch["x"]))
        batch = batch if where is None else {**batch, "context": where}

        def drawn(rows: Batch) -> Tensor:
            own = dict(cast(dict[str, Tensor], rows))
            return draw(self.distribution(own.pop("context", None)), own)

        options = {**self._asked(seed, compile, progress), "compile": "eager"}
        with isolated(self.home), _evaluating(self), torch.no_grad(), self._stepping(compile, progress):
            return by_rows(drawn, batch, most, name=name, **options)

    def _prefix(self, prefix: Any, most: int) -> Tensor:
        given = torch.as_tensor(as_batch(prefix, name="prefix"))
        if given.dim() != 2 or given.shape[1] > most:
            raise ValueError(
                f"`prefix` should have shape (N, t), the first t numbers of each image, t at most {most}, got "
                f"{tuple(given.shape)}"
            )
        check_finite(given, "prefix")
        given = self._like(given)
        self._check_numbers("prefix", given)
        return given

    def _check_numbers(self, argument: str, x: Tensor) -> None:
        bad = ~self.observation.support.check(x)
        if bool(bad.any()):
            raise ValueError(
                f"`{argument}` holds {float(x[bad][0]):g}, outside the support {self.observation.support} of "
                f"likelihood={self.likelihood!r}"
            )


def _completed(fn: Autoregressive, rows: dict[str, Tensor]) -> Tensor:
    return fn.complete(**rows)


def _infilled(num_particles: int, fn: Autoregressive, rows: dict[str, Tensor]) -> Tensor:
    return fn.infill(**rows, num_particles=num_particles)
