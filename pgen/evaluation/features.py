r"""Named feature spaces, in which samples are compared: the data themselves, principal components, a classifier trained here.

A distance between samples means something only together with its space, so every space says what it is. No network from
elsewhere is brought: a space of your own is any function from ``(n, *event)`` to ``(n, F)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contracts import Seed, as_seed, check_choice
from ..data.arrays import as_batch
from ..data.batches import key
from ..nn import MLP
from ..programs import keyed_rng
from ..training.progress import Progress
from .sample_measures import same_sample
from .units import QUIET_SECONDS

__all__ = ["SPACES", "Classes", "Features", "feature_space", "train_classifier"]

SPACES = ("pixels", "pca", "classifier")
_VARIANCE, _COMPONENTS = 0.95, 64
_HIDDEN, _BATCH, _EPOCHS, _STEPS, _HELD = (128, 64), 64, 60, 4000, 0.2


@dataclass(frozen=True, repr=False)
class Features:
    """A feature space.

    Attributes:
        name: Of the space, short.
        recipe: How it was made, in words.
        of: From samples ``(n, *event)`` to features ``(n, F)``, float64.
    """

    name: str
    recipe: str
    of: Callable[[Any], Tensor]

    def __repr__(self) -> str:
        return f"{self.name}: {self.recipe}"


@dataclass(frozen=True, repr=False)
class Classes:
    """A classifier trained on labelled data.

    Attributes:
        network: From standardised rows to logits.
        centre: Mean of the columns.
        scale: The standard deviation of all numbers.
        classes: The labels, ``(K,)``.
        accuracy: On the fifth of the rows that it was not trained on.
        recipe: How it was trained, in words.
    """

    network: nn.Sequential
    centre: Tensor
    scale: Tensor
    classes: Tensor
    accuracy: float
    recipe: str

    def _rows(self, x: Any) -> Tensor:
        (rows,) = same_sample(1, x=x)
        return ((rows.to(self.centre) - self.centre) / self.scale).float()

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        """Activations of the last hidden layer, ``(n, 64)``, float64."""
        return nn.Sequential(*list(self.network)[:-1])(self._rows(x)).double()

    @torch.no_grad()
    def predict(self, x: Any) -> Tensor:
        """The number of the likeliest class, int64 ``(n,)``."""
        return self.network(self._rows(x)).argmax(1)


def feature_space(features: str | Callable[[Any], Any], data: Any, *, classes: Classes | None = None) -> Features:
    r"""A named feature space, made from real data alone.

    - ``"pixels"``: the numbers of a datum as they are;
    - ``"pca"``: the principal components of ``data`` that hold 95 % of the variance, 64 at most, not scaled;
    - ``"classifier"``: the last hidden layer of ``classes``, see ``train_classifier``;
    - a function from samples to ``(n, F)``, under its own name.

    Args:
        features: Which.
        data: What the space is made from: training data, or real data.
        classes: For ``"classifier"``.

    Raises:
        ValueError: If the name is unknown, or a classifier is asked for and there is none.

    Example:
        >>> x = torch.tensor([[-3.0, 0.1], [3.0, -0.1], [0.0, 0.0], [1.0, 0.0]])
        >>> space = feature_space("pca", x)
        >>> space, space.of(x).shape
        (PCA: 1 component, 100 % of the variance, torch.Size([4, 1]))
    """
    if callable(features):
        function, name = features, getattr(features, "__name__", type(features).__name__)
        return Features(name, "features of your own", lambda x: _given(function, name, x))
    check_choice("features", features, SPACES)
    if features == "classifier":
        if classes is None:
            raise ValueError("features='classifier' needs `labels`, the classes of the data it is trained on; or take 'pca'")
        return Features("classifier", classes.recipe, classes.features)
    (rows,) = same_sample(2, data=data)
    if features == "pixels":
        return Features("pixels", f"the {rows.shape[1]} numbers of a datum as they are", lambda x: same_sample(1, x=x)[0])
    return _pca(rows)


def _pca(rows: Tensor) -> Features:
    centre = rows.mean(0)
    _, singular, axes = torch.linalg.svd(rows - centre, full_matrices=False)
    share = singular.square() / singular.square().sum()
    if not bool(torch.isfinite(share).all()):
        raise ValueError("all rows of the data are equal, so they have no principal components; is the right file loaded?")
    kept = min(int((share.cumsum(0) < _VARIANCE).sum()) + 1, _COMPONENTS, len(share))
    held = f"{kept} component{'s' * (kept > 1)}, {100 * float(share[:kept].sum()):.0f} % of the variance"
    return Features("PCA", held, lambda x: (same_sample(1, x=x)[0].to(centre) - centre) @ axes[:kept].T)


def _given(function: Callable[[Any], Any], name: str, x: Any) -> Tensor:
    found = torch.as_tensor(function(x)).detach().double()
    if found.dim() != 2 or len(found) != len(x):
        raise ValueError(f"`features` ({name}) should give shape ({len(x)}, F) to {len(x)} samples, got {tuple(found.shape)}")
    return found


def train_classifier(x: Any, labels: Any, *, seed: Seed = 0, progress: bool = True) -> Classes:
    r"""A small classifier of labelled data, whose last hidden layer is a feature space, and which names the class of a sample.

    A perceptron with 128 and 64 SiLU units on centred data of standard deviation 1 over all numbers; Adam at 1e-3 falling
    linearly to zero, weight decay 1e-4, batches of 64, 60 epochs or 4000 steps if that is less. A fifth of the rows is held
    out, and the accuracy on it is part of the recipe.

    Shapes: x ``(n, *event)``, labels ``(n,)``.

    Raises:
        ValueError: If there are fewer than two classes, or a class has fewer than two rows.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> labels = torch.arange(200) % 2
        >>> train_classifier(torch.randn(200, 3, generator=g) + 4.0 * labels[:, None], labels).accuracy > 0.9
        True
    """
    (rows,) = same_sample(10, x=x)
    found = torch.as_tensor(as_batch(labels, name="labels")).detach().to(rows.device)
    if found.shape != (len(rows),):
        raise ValueError(f"`labels` should be one class a row, shape ({len(rows)},), got {tuple(found.shape)}")
    classes, target = found.unique(return_inverse=True)
    if len(classes) < 2 or int(target.bincount().min()) < 2 or len(classes) > len(rows) // 4:
        raise ValueError(
            f"`labels` has {len(classes)} classes in {len(rows)} rows; a classifier needs 2 or more, of several rows"
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(key(as_seed(seed), "classifier"))).to(rows.device)
    held, kept = order[: max(int(_HELD * len(rows)), 1)], order[max(int(_HELD * len(rows)), 1) :]
    centre, scale = rows[kept].mean(0), (rows[kept] - rows[kept].mean(0)).square().mean().sqrt().clamp(min=1e-12)
    inputs = ((rows - centre) / scale).float()
    network = _trained(inputs[kept], target[kept], len(classes), as_seed(seed), progress)
    with torch.no_grad():
        accuracy = float((network(inputs[held]).argmax(1) == target[held]).double().mean())
    recipe = (
        f"last of two hidden layers ({', '.join(map(str, _HIDDEN))} SiLU units) trained on {len(kept)} of these data in "
        f"{len(classes)} classes; accuracy {accuracy:.3f} on {len(held)} others"
    )
    return Classes(network, centre, scale, classes, accuracy, recipe)


def _trained(inputs: Tensor, target: Tensor, classes: int, seed: int, progress: bool) -> nn.Sequential:
    steps = min(_STEPS, _EPOCHS * -(-len(inputs) // _BATCH))
    with keyed_rng(key(seed, "weights"), inputs.device), Progress(steps, progress, QUIET_SECONDS) as bar, torch.enable_grad():
        network = MLP(inputs.shape[1], _HIDDEN, classes).to(inputs)
        adam = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, total_iters=steps)
        for step in range(steps):
            bar.at(step, "classifier of the data")
            rows = torch.randint(len(inputs), (_BATCH,), device=inputs.device)
            adam.zero_grad()
            nn.functional.cross_entropy(network(inputs[rows]), target[rows]).backward()
            adam.step()
            schedule.step()
    return network.requires_grad_(False).eval()
