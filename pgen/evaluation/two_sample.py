r"""The classifier two-sample test: how well a classifier tells two samples apart, on data it has not seen.

An accuracy of one half says that nothing was found; it is a bound from below on how far the laws are apart, as a better
classifier could find more: :math:`\operatorname{TV}(p, q) \ge 2 a - 1` for the accuracy a of any classifier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..contracts import Seed, as_seed, check_choice, check_positive
from ..data.batches import key
from ..programs import keyed_rng
from ..training.progress import Progress
from .sample_measures import Finding, same_sample, some
from .units import QUIET_SECONDS

__all__ = ["CLASSIFIERS", "classifier_test"]

CLASSIFIERS = ("kernel", "forest", "mlp", "logistic")
MOST = 2000
"""Rows of each sample that a classifier sees."""
_INFLATED = 2.0
"""Variance of a cross-validated accuracy over that of independent trials, at most; see ``classifier_test``."""


def classifier_test(
    x: Any,
    y: Any,
    *,
    classifier: Any = "kernel",
    folds: int = 5,
    permutations: int | None = None,
    most: int = MOST,
    seed: Seed = 0,
    progress: bool = True,
) -> Finding:
    r"""The cross-validated accuracy of a classifier that tells x from y, with its p-value.

    - ``"kernel"``: ridge regression of the sign on Gaussian kernels of three widths between the median distance of all pairs
      and that of nearest neighbours, of the columns as they are and standardised; the best accuracy of the six counts. Its
      predictions are linear in the labels, so one solution serves all permutations of them, and the p-value is exact: labels
      are permuted inside each fold, and the permuted best counts too.
    - ``"forest"``, ``"mlp"``, ``"logistic"``: scikit-learn's, on standardised columns; or any object with ``fit`` and
      ``predict``, which is copied for each fold. Each permutation is a fit, so by default there is none: the p-value is then
      that of a normal law with *twice* the variance of independent trials. A datum trains some folds and tests another, so the
      variance is larger than theirs (measured up to 1.8 times, where the plain binomial test rejects up to 11 % at the level
      of 5 %).

    The kernels find differences of shape and dependence best, the forest values that the other sample never has
    (benchmarks/samples.py); ``evaluate`` asks both. The standard error is that of
    a share, after Agresti and Coull (two more successes and failures). Samples are thinned to one
    size, at most ``most`` rows.

    Shapes: x ``(n, *event)``, y ``(m, *event)``.

    Args:
        x: A sample.
        y: Another.
        classifier: One of the four names, or an object with ``fit`` and ``predict``.
        folds: Of the cross-validation.
        permutations: For the p-value; 500 for ``"kernel"`` and 0 for others if None.
        most: Rows of each sample.
        seed: Keys folds, permutations, thinning and classifiers.
        progress: Whether to show a bar on what takes more than two seconds.

    Raises:
        ValueError: If a sample has fewer than twice as many rows as there are folds, or both are one point.

    References:
        Lopez-Paz and Oquab (2017), Revisiting classifier two-sample tests, arXiv:1610.06545, section 3.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(200, 2, generator=g)
        >>> apart = classifier_test(x, torch.randn(200, 2, generator=g) + 2.0)
        >>> apart.value > 0.9, round(apart.p_value, 3)  # the best possible: Phi(sqrt(2)) = 0.921
        (True, 0.002)
    """
    check_positive("folds", folds)
    check_positive("most", most)
    seed, kernel = as_seed(seed), isinstance(classifier, str) and classifier == "kernel"
    if folds < 2:
        raise ValueError("`folds` should be 2 or more: a classifier is judged on rows that it was not trained on")
    permutations = (500 if kernel else 0) if permutations is None else permutations
    if permutations < 0:
        raise ValueError(f"`permutations` should be 0 or more, got {permutations}")
    samples = same_sample(2 * folds, x=x, y=y)
    n = min(most, *map(len, samples))
    both = torch.cat([some(part, n, key(seed, "thin", side)) for side, part in enumerate(samples)])
    if not bool((both != both[0]).any()):
        raise ValueError("`x` and `y` are one and the same point, so there is nothing to tell apart")
    fold, sign = _dealt(n, folds, seed), torch.cat([both.new_ones(n), -both.new_ones(n)])
    signs = _permuted(sign, fold, permutations, seed)
    right = (
        _kernel_right(both, signs, fold, progress) if kernel else _fitted_right(classifier, both, signs, fold, seed, progress)
    )
    return _finding(right, n, classifier)


def _dealt(n: int, folds: int, seed: int) -> Tensor:
    """The fold of each row: as many of one sample as of the other, to one row."""
    generator = torch.Generator().manual_seed(key(seed, "folds"))
    return torch.cat([torch.randperm(n, generator=generator) % folds for _ in range(2)])


def _permuted(sign: Tensor, fold: Tensor, permutations: int, seed: int) -> Tensor:
    """The signs ``(N, 1 + B)``: as they are, and permuted inside each fold."""
    generator = torch.Generator().manual_seed(key(seed, "permutations"))
    signs = sign[:, None].repeat(1, 1 + permutations)
    for rows in (fold == f for f in fold.unique()):
        inside = sign[rows.to(sign.device)]
        order = torch.rand(len(inside), permutations, generator=generator).argsort(0).to(sign.device)
        signs[rows.to(sign.device), 1:] = inside[order]
    return signs


def _finding(right: Tensor, n: int, classifier: Any) -> Finding:
    """From the share told rightly, as it is and under each permutation."""
    accuracy, name = float(right[0]), classifier if isinstance(classifier, str) else type(classifier).__name__
    near = (2 * n * accuracy + 2) / (2 * n + 4)
    error = math.sqrt(near * (1 - near) / (2 * n + 4))
    if len(right) > 1:
        p_value = float((right >= right[0] - 1e-9).double().mean())
        low, high = right[1:].quantile(torch.tensor([0.025, 0.975], dtype=right.dtype)).tolist()
    else:
        null = NormalDist(0.5, math.sqrt(_INFLATED * 0.25 / (2 * n)))
        p_value, low, high = 1 - null.cdf(accuracy), null.inv_cdf(0.025), null.inv_cdf(0.975)
    return Finding(f"accuracy, {name}", accuracy, error, (n, n), p_value, (low, high))


# --- kernels ---------------------------------------------------------------------------------------------------------------


def _kernel_right(both: Tensor, signs: Tensor, fold: Tensor, progress: bool) -> Tensor:
    """The best share told rightly among kernels, for each column of signs."""
    fold, best = fold.to(both.device), torch.zeros(signs.shape[1], dtype=both.dtype)
    with Progress(6, progress, QUIET_SECONDS) as bar:
        for number, (kernel, ridge) in enumerate(_kernels(both)):
            bar.at(number, "classifier")
            right = both.new_zeros(signs.shape[1])
            for f in fold.unique():
                test, train = (fold == f).nonzero()[:, 0], (fold != f).nonzero()[:, 0]
                gram = kernel[train][:, train]
                gram.diagonal().add_(ridge)
                dual = torch.cholesky_solve(signs[train], torch.linalg.cholesky(gram))
                right += _right(kernel[test][:, train] @ dual, signs[test])
            best = torch.maximum(best, right.cpu() / len(both))
    return best


def _right(score: Tensor, sign: Tensor) -> Tensor:
    """How many are told rightly, those on the border by half."""
    return ((score * sign).sign().sum(0) + len(sign)) / 2


def _kernels(both: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Kernel matrices and their ridges; nothing here looks at the labels."""
    centred = both - both.mean(0)
    sd = centred.std(0)
    for rows in (centred, centred / sd.where(sd > 1e-9 * sd.max(), sd.max())):
        distance = torch.cdist(rows, rows)
        positive = distance[distance > 1e-7 * distance.max()]
        middle = float(some(positive, 100_000, 0).median())
        distance.fill_diagonal_(math.inf)
        nearest = max(float(distance.min(1).values.median()), 1e-3 * middle)
        square = distance.fill_diagonal_(0.0).square_()
        for width, ridge in ((middle, 3.0), (math.sqrt(middle * nearest), 0.3), (nearest, 0.1)):
            yield (square * (-0.5 / width**2)).exp_(), ridge


# --- scikit-learn ----------------------------------------------------------------------------------------------------------


def _fitted_right(classifier: Any, both: Tensor, signs: Tensor, fold: Tensor, seed: int, progress: bool) -> Tensor:
    """The share told rightly by a classifier that is fitted anew for each fold and column of signs."""
    sd = both.std(0)
    rows = (both / sd.where(sd > 1e-9 * sd.max(), sd.max())).cpu().numpy()
    fold_of, labels, right = fold.numpy(), signs.cpu().numpy(), []
    with Progress(signs.shape[1], progress, QUIET_SECONDS) as bar, keyed_rng(key(seed, "classifier")):
        for number in range(signs.shape[1]):
            bar.at(number, "classifier")
            told = 0
            for f in range(int(fold.max()) + 1):
                test, made = fold_of == f, _made(classifier, key(seed, "classifier", number, f) % 2**32)
                made.fit(rows[~test], labels[~test, number])
                told += int((made.predict(rows[test]) == labels[test, number]).sum())
            right.append(told / len(rows))
    return torch.tensor(right, dtype=torch.float64)


def _made(classifier: Any, seed: int) -> Any:
    """A new classifier."""
    if not isinstance(classifier, str):
        if not (callable(getattr(classifier, "fit", None)) and callable(getattr(classifier, "predict", None))):
            names, kind = ", ".join(CLASSIFIERS), type(classifier).__name__
            raise TypeError(f"`classifier` should be one of {names}, or have fit and predict, got {kind}")
        return copy.deepcopy(classifier)
    check_choice("classifier", classifier, CLASSIFIERS)
    if classifier == "forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(50, min_samples_leaf=2, random_state=seed)
    if classifier == "mlp":
        from sklearn.neural_network import MLPClassifier

        return MLPClassifier((100,), early_stopping=True, random_state=seed)
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000)
