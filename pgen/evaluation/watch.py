r"""What becomes of a model's samples while it trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from ..contracts import Run, check_positive
from ..training.callbacks import Callback
from .features import train_classifier
from .sample_measures import Finding, label_coverage, mode_coverage

__all__ = ["Watch"]


class Watch(Callback):
    """Measures samples of a model while it trains, from the same latents each time; nothing of the training depends on it.

    It measures once before the first step, and forgets what it found, so that an error ends a fit at once and not under way.

    Args:
        model: Any family with ``sample``, the one that is being trained. Where an average of the parameters is kept, it is
            measured.
        measure: From samples ``(num, *event)`` to findings by name.
        every: Steps between measurements; the last step is measured too.
        num: Samples.
        context: Of the samples: one for all, or one for each.
        seed: Keys the samples.

    Attributes:
        history: Columns of equal length: ``step``, and the value of each finding.

    Example:
        >>> from pgen.data import toy
        >>> grid, gan = toy.gaussian_grid(), __import__("pgen").models.GAN((2,))
        >>> watch = Watch.modes(gan, grid, every=2, num=100)
        >>> run = gan.fit(grid.sample(200), steps=4, callbacks=[watch], progress=False)
        >>> list(watch.history), watch.history["step"]
        (['step', 'modes', 'good share', 'reverse KL'], [2, 4])
    """

    def __init__(
        self,
        model: Any,
        measure: Callable[[Tensor], Mapping[str, Finding]],
        *,
        every: int = 1000,
        num: int = 1000,
        context: Any = None,
        seed: int = 0,
    ) -> None:
        check_positive("every", every)
        check_positive("num", num)
        self.model, self.measure, self.every, self.num = model, measure, int(every), int(num)
        self.context, self.seed = context, seed
        self.history: dict[str, list[float]] = {}

    @classmethod
    def modes(cls, model: Any, target: Any, **options: Any) -> Self:
        """Which of a target's known modes samples reach; see ``mode_coverage``."""
        return cls(model, lambda x: mode_coverage(x, target), **options)

    @classmethod
    def classes(cls, model: Any, x: Any, labels: Any, **options: Any) -> Self:
        """Which classes of labelled data samples reach, by a classifier that is trained on the data at once."""
        known = train_classifier(x, labels, seed=options.get("seed", 0))
        share = torch.bincount(known.predict(x), minlength=len(known.classes)).double()
        return cls(model, lambda drawn: label_coverage(known.predict(drawn), share / share.sum()), **options)

    def on_start(self, run: Run) -> None:
        """A row that nobody keeps."""
        with torch.no_grad():
            self._row(0)

    def on_state(self, step: int) -> None:
        """One row of the history."""
        for name, value in self._row(step).items():
            self.history.setdefault(name, []).append(value)

    def _row(self, step: int) -> dict[str, float]:
        given = {} if self.context is None else {"context": self.context}
        found = self.measure(self.model.sample(self.num, **given, seed=self.seed, progress=False))
        return {"step": step, **{name: finding.value for name, finding in found.items()}}
