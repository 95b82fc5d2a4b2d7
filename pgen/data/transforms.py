r"""Invertible preprocessing that accounts for itself: every transform knows log |dy/dx|.

Density is reported in the units of the data as given: :math:`\log p(x) = \log p(y) + \log |\mathrm{d}y / \mathrm{d}x|`.
What runs at every step is made of torch operations alone, so that it can be captured into a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..contracts import check_event_shape, nearest
from ..programs import keyed_rng
from .arrays import check_finite
from .batches import key

__all__ = ["Compose", "Dequantize", "Logit", "Standardize", "Transform", "from_settings"]

_MAX_PARTS = 16
_MAX_SIZE = 10_000_000  # numbers in the event shape of a saved file


class Transform(nn.Module):
    r"""A map y = f(x) of each datum, its inverse, and the log-density that it costs.

    Subclasses define ``forward_with_log_det``, ``inverse`` and ``settings``. Shapes: x and y ``(N, *event)``.

    Attributes:
        unit: A buffer that holds nothing but the floating dtype of y where x is integer; it follows ``.to(dtype)``.
    """

    unit: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("unit", torch.ones(()), persistent=False)

    @property
    def kind(self) -> Literal["exact", "lower_bound"]:
        """``"exact"``, or ``"lower_bound"`` where f adds noise: then log p(y) + log_det bounds log p(x) in expectation."""
        return "exact"

    def fit(self, x: Tensor) -> Transform:
        """Learn from training data what the map needs, and check that x lies in its domain."""
        check_finite(x, "x")
        self.check(x)
        return self

    def check(self, x: Tensor, name: str = "x", numbers: Tensor | None = None) -> None:
        """Refuse x, ``(N, *event)``, outside the domain of the map; here every number is in it.

        Args:
            x: The data.
            name: What an error calls them.
            numbers: Those of the rows, where they are not 0, 1, ...
        """

    def forward(self, x: Tensor) -> Tensor:
        """The transformed data y, ``(N, *event)``."""
        return self.forward_with_log_det(x)[0]

    def log_det(self, x: Tensor) -> Tensor:
        r""":math:`\log |\mathrm{d}y / \mathrm{d}x|` summed over the event axes, in nats, ``(N,)``.

        Where f adds noise this belongs to another draw than ``forward``'s: use ``forward_with_log_det`` for both.
        """
        return self.forward_with_log_det(x)[1]

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The transformed data y, ``(N, *event)``, and the log-determinant, ``(N,)`` in nats, that belongs to it."""
        raise NotImplementedError(f"{type(self).__name__} should define forward_with_log_det")

    def inverse(self, y: Tensor) -> Tensor:
        """The data x, ``(N, *event)``, in their own units."""
        raise NotImplementedError(f"{type(self).__name__} should define inverse")

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs to build the same transform, less its buffers: plain JSON."""
        raise NotImplementedError(f"{type(self).__name__} should define settings")

    def _dtype(self, x: Tensor) -> torch.dtype:
        """The floating dtype of y: at least float32, for the steps of narrower ones are too coarse here."""
        return torch.promote_types(x.dtype if x.is_floating_point() else self.unit.dtype, torch.float32)


class Standardize(Transform):
    r"""Zero mean and unit standard deviation of every feature.

    .. math:: y = (x - \mu) / \sigma, \qquad \log |\mathrm{d}y / \mathrm{d}x| = -\sum_d \log \sigma_d

    The statistics are those of the data given to ``fit``, in float64, with :math:`\sigma^2` the mean squared deviation.

    Args:
        event_shape: Shape of one datum; taken from the data where ``fit`` is called.

    Example:
        >>> Standardize().fit(torch.tensor([[1.0], [3.0]]))(torch.tensor([[5.0]]))
        tensor([[3.]])
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, event_shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tuple(event_shape)))
        self.register_buffer("sd", torch.ones(tuple(event_shape)))

    def fit(self, x: Tensor, observed: Tensor | None = None) -> Standardize:
        """Take mean and standard deviation from x, ``(N, *event)``, of the entries observed if they are not all.

        Raises:
            ValueError: If a feature is constant.
        """
        super().fit(x)
        wide, seen = x.double(), torch.ones_like(x, dtype=torch.bool) if observed is None else observed
        wide, count = torch.where(seen, wide, 0.0), seen.sum(0).clamp(min=1)
        mean = wide.sum(0) / count
        sd = (torch.where(seen, wide - mean, 0.0).square().sum(0) / count).sqrt()
        constant = (sd <= 1e-10 * wide.abs().amax(0)).nonzero()
        if len(constant):
            place = tuple(constant[0].tolist())
            column = place[0] if len(place) == 1 else place or 0
            raise ValueError(
                f"`x` is constant in column {column} (every value is {mean[place].item():g}): a density cannot be fitted "
                f"to it; drop it ({len(constant)} of {sd.numel()} columns are constant)"
            )
        self.mean, self.sd = mean.to(self._dtype(x)), sd.to(self._dtype(x))
        return self

    def forward_with_log_det(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Centre and scale x, ``(N, *event)``; entries that are not observed count nothing."""
        if self.mean.dim() == 0 and x.dim() > 1:
            raise ValueError("Standardize has not seen data yet; call fit(x) first, of the model that it belongs to or its own")
        check_event_shape("x", x, tuple(self.mean.shape))
        y, cost = (x - self.mean) / self.sd, self.sd.double().log()
        if observed is not None:
            return y, -(cost * observed).flatten(1).sum(1).to(y.dtype)
        return y, -cost.sum().to(y.dtype).expand(len(y))

    def inverse(self, y: Tensor) -> Tensor:
        """Give scale and centre back."""
        return y * self.sd + self.mean

    def settings(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"transform": "standardize", "event_shape": list(self.mean.shape)}


class Dequantize(Transform):
    r"""Uniform dequantisation of whole numbers 0, 1, ..., levels - 1 into the unit interval.

    .. math:: y = (x + u) / L, \quad u \sim U[0, 1), \qquad \log |\mathrm{d}y / \mathrm{d}x| = -D \log L

    By Jensen's inequality :math:`\log P(x) \ge \mathbb{E}_u[\log p(y)] - D \log L`: a bound on the log-probability of the
    discrete data. The noise comes from torch's global generator, which the caller keys. The inverse floors.

    Args:
        levels: L, the number of values that a datum's entry can take.

    References:
        Theis, van den Oord and Bethge (2016), A note on the evaluation of generative models, arXiv:1511.01844, eq. 2.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        _check_levels(levels)
        self.levels = levels

    @property
    def kind(self) -> Literal["exact", "lower_bound"]:
        """A bound: the noise is averaged outside the logarithm."""
        return "lower_bound"

    def check(self, x: Tensor, name: str = "x", numbers: Tensor | None = None) -> None:
        """Check that x holds whole numbers in [0, levels).

        Raises:
            ValueError: If some value does not.
        """
        x = x.to(self._dtype(x))
        off = (x < 0) | (x >= self.levels) | (x % 1 != 0)
        if bool(off.any()):
            row, value = int(off.nonzero()[0, 0]), x[off][0].item()
            row = row if numbers is None else int(numbers[row])
            hint = f"; multiply by {self.levels - 1}?" if 0 <= float(x.min()) and float(x.max()) <= 1 else ""
            raise ValueError(f"`{name}` has {value:g} in row {row}; expected whole numbers from 0 to {self.levels - 1}{hint}")

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add noise from torch's global generator to x, ``(N, *event)``."""
        x = x.to(self._dtype(x))
        # Keep off the two ends by a rounding error, so that the floor finds every x again.
        margin = self.levels * torch.finfo(x.dtype).eps
        y = (x + torch.rand_like(x).clamp(margin, 1.0 - margin)) / self.levels
        return y, y.new_full((len(y),), -math.log(self.levels) * math.prod(y.shape[1:]))

    def inverse(self, y: Tensor) -> Tensor:
        """The whole number below."""
        return (y * self.levels).floor().clamp(0.0, self.levels - 1.0)

    def settings(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"transform": "dequantize", "levels": self.levels}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"levels={self.levels}"


class Logit(Transform):
    r"""The unit interval, drawn in a little at its ends, mapped to the real line.

    .. math:: s = \alpha + (1 - 2\alpha) x, \quad y = \log \frac{s}{1 - s}, \qquad
        \log |\mathrm{d}y / \mathrm{d}x| = \sum_d \log \frac{1 - 2\alpha}{s_d (1 - s_d)}

    The inverse is clamped to [0, 1].

    Args:
        alpha: The margin, in (0, 1/2), that keeps 0 and 1 finite.

    References:
        Dinh, Sohl-Dickstein and Bengio (2017), Density estimation using Real NVP, arXiv:1605.08803, section 4.1.
    """

    def __init__(self, alpha: float = 1e-6) -> None:
        super().__init__()
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 < alpha < 0.5:
            raise ValueError(f"`alpha` should lie strictly between 0 and 0.5, got {alpha!r}")
        self.alpha = float(alpha)

    def check(self, x: Tensor, name: str = "x", numbers: Tensor | None = None) -> None:
        """Check that x lies in [0, 1].

        Raises:
            ValueError: If some value does not.
        """
        if bool(((x < 0) | (x > 1)).any()):
            raise ValueError(
                f"`{name}` should lie in [0, 1] for Logit, got values from {float(x.min()):g} to {float(x.max()):g}; "
                "rescale it, or put Dequantize(levels) first"
            )

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds of s, for x ``(N, *event)`` in [0, 1]."""
        width = 1.0 - 2.0 * self.alpha
        x = x.to(self._dtype(x))
        log_s = (self.alpha + width * x).log()
        log_rest = (self.alpha + width * (1.0 - x)).log()
        return log_s - log_rest, _sum_event(math.log(width) - log_s - log_rest)

    def inverse(self, y: Tensor) -> Tensor:
        """The x, in [0, 1], whose s has log-odds y."""
        return ((y.sigmoid() - self.alpha) / (1.0 - 2.0 * self.alpha)).clamp(0.0, 1.0)

    def settings(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"transform": "logit", "alpha": self.alpha}

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"alpha={self.alpha:g}"


class Compose(Transform):
    """Transforms one after the other; their log-determinants add up.

    Args:
        parts: In the order in which they meet the data.

    Example:
        >>> Compose([Dequantize(17), Logit()]).kind
        'lower_bound'
    """

    def __init__(self, parts: Sequence[Transform]) -> None:
        super().__init__()
        for part in parts:
            if not isinstance(part, Transform):
                raise TypeError(f"`parts` should be transforms, got {type(part).__name__}; Compose takes a list")
        self.parts = nn.ModuleList(parts)

    @property
    def kind(self) -> Literal["exact", "lower_bound"]:
        """A bound as soon as one part is."""
        return "lower_bound" if any(part.kind == "lower_bound" for part in self._parts()) else "exact"

    def fit(self, x: Tensor) -> Compose:
        """Fit each part to what the parts before it make of x. Noise has a key of its own: the random state is untouched."""
        with torch.no_grad(), keyed_rng(key("transforms", "fit"), x.device):
            for part in self._parts():
                x = part.fit(x)(x)
        return self

    def check(self, x: Tensor, name: str = "x", numbers: Tensor | None = None) -> None:
        """Refuse x outside the domain of the first part."""
        for part in self._parts()[:1]:
            part.check(x, name, numbers)

    def forward_with_log_det(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Apply every part in turn to x, ``(N, *event)``."""
        log_det = torch.zeros(len(x), dtype=self._dtype(x), device=x.device)
        for part in self._parts():
            x, change = part.forward_with_log_det(x)
            log_det = log_det + change
        return x, log_det

    def inverse(self, y: Tensor) -> Tensor:
        """Undo every part, the last one first."""
        for part in reversed(self._parts()):
            y = part.inverse(y)
        return y

    def settings(self) -> dict[str, Any]:
        """The argument of the constructor."""
        return {"transform": "compose", "parts": [part.settings() for part in self._parts()]}

    def _parts(self) -> list[Transform]:
        return list(self.parts)  # type: ignore[arg-type]


def from_settings(settings: Any) -> Transform:
    """Build a transform from its ``settings()``, every value checked; its buffers follow by ``load_state_dict``.

    Raises:
        ValueError: If the settings are not of a transform that pgen knows.
    """
    name = settings.get("transform") if isinstance(settings, dict) else None
    if not isinstance(name, str) or name not in _BUILDERS:
        raise ValueError(f"unknown transform {str(name)[:30]!r}{nearest(str(name)[:30], _BUILDERS)}")
    argument, build = _BUILDERS[name]
    if set(settings) != {"transform", argument}:
        raise ValueError(f"settings of the transform {name!r} should be {argument!r} alone")
    return build(settings[argument])


# --- helpers -------------------------------------------------------------------------------------------------------------


def _sum_event(x: Tensor) -> Tensor:
    return x.unsqueeze(-1).flatten(1).sum(-1)


def _check_levels(levels: Any) -> None:
    if type(levels) is not int or not 2 <= levels <= 65_536:
        raise ValueError(f"`levels` should be an integer from 2 to 65536, got {str(levels)[:30]!r}")


def _build_standardize(event_shape: Any) -> Standardize:
    sound = isinstance(event_shape, list) and len(event_shape) <= 16
    if not sound or not all(type(size) is int and size > 0 for size in event_shape) or math.prod(event_shape) > _MAX_SIZE:
        raise ValueError(f"`event_shape` should be a list of at most 16 positive integers, got {str(event_shape)[:30]!r}")
    return Standardize(event_shape)


def _build_compose(parts: Any) -> Compose:
    if not isinstance(parts, list) or len(parts) > _MAX_PARTS or any(_is_compose(part) for part in parts):
        raise ValueError(f"`parts` should be a list of at most {_MAX_PARTS} transforms, none of them composed")
    return Compose([from_settings(part) for part in parts])


def _is_compose(settings: Any) -> bool:
    return isinstance(settings, dict) and settings.get("transform") == "compose"


_BUILDERS: dict[str, tuple[str, Any]] = {
    "standardize": ("event_shape", _build_standardize),
    "dequantize": ("levels", Dequantize),
    "logit": ("alpha", Logit),
    "compose": ("parts", _build_compose),
}
