r"""Choosing between models by held-out likelihood: how many components, which covariance, which family.

.. math:: \hat m = \arg\max_m \frac{1}{N} \sum_n \log p_m(x_n), \qquad
    m^* = \min \{ m : \overline{\log p_{\hat m}(x) - \log p_m(x)} \le \operatorname{se} \}

The best mean is often a draw among equals. The one-standard-error rule takes the first model, in the order given (simplest
first), whose shortfall against the best is within one standard error of that difference, paired datum by datum (Breiman,
Friedman, Olshen, Stone 1984, Classification and regression trees, section 3.4.3, with the error of the difference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contracts import Seed, check_choice, kind_of, plus_minus
from ..training.progress import Progress
from .compare import Comparison, compare
from .units import QUIET_SECONDS

__all__ = ["Choice", "choose"]

RULES = ("one_standard_error", "best")


@dataclass(frozen=True, repr=False)
class Choice:
    """What ``choose`` found; print it.

    Attributes:
        models: The fitted models by name, in the order given.
        comparison: Their held-out log-likelihoods.
        name: The model chosen.
        rule: How.
    """

    models: dict[str, Any]
    comparison: Comparison
    name: str
    rule: str

    @property
    def model(self) -> Any:
        """The fitted model that was chosen."""
        return self.models[self.name]

    @property
    def best(self) -> str:
        """The model with the highest held-out mean."""
        return self.comparison.names[0]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{'model':<20}  {'held-out nats a datum':>22}  {'less the best':>18}"]
        for name in self.models:
            score, gap = self.comparison.scores[name], self.comparison.difference(name, self.best)
            against = "" if name == self.best else plus_minus(gap.mean, gap.std_error, 3, "+")
            mean = plus_minus(score.mean, score.std_error, 3)
            lines.append(f"{name:<20}  {mean:>22}  {against:>18}{'  <- chosen' if name == self.name else ''}".rstrip())
        how = "the first within one standard error of the best" if self.rule == RULES[0] else "the best"
        return "\n".join([*lines, f"chosen: {self.name}, {how} ({self.best}), of {len(self.models)} models"])


def choose(
    models: Mapping[Any, Any],
    data: Any,
    validation: Any,
    *,
    context: Any = None,
    validation_context: Any = None,
    rule: str = "one_standard_error",
    seed: Seed = 0,
    progress: bool = True,
    **options: Any,
) -> Choice:
    """Fit each model and choose one by its log-likelihood on held-out data.

    The figure of the chosen model on the same held-out data is a little too good, as it was chosen by it: report that of a test
    set.

    Args:
        models: Unfitted models of any families by name, or by number of components; simplest first.
        data: Training data of all of them.
        validation: Held-out data that decide.
        context: Context of the training data.
        validation_context: Context of the held-out data.
        rule: ``"one_standard_error"``, or ``"best"``: the highest mean.
        seed: Keys every fit.
        progress: Whether to show bars on what takes more than two seconds.
        **options: Further arguments of every ``fit``.

    Returns:
        A Choice: ``choice.model`` is fitted; ``print(choice)`` is the table.

    Raises:
        ValueError: If there is no model, or scores cannot be compared.

    Example:
        >>> import torch
        >>> from pgen.models import GaussianMixture
        >>> noise = torch.Generator().manual_seed(0)
        >>> x = torch.randn(400, 1, generator=noise) + torch.tensor([[-5.0], [5.0]]).repeat(200, 1)
        >>> choice = choose({k: GaussianMixture((1,), k) for k in (1, 2, 3)}, x[:200], x[200:], steps=100, progress=False)
        >>> choice.name
        '2'
    """
    if not isinstance(models, Mapping) or not models:
        got = "an empty one" if isinstance(models, Mapping) else kind_of(models)
        raise ValueError(f"`models` should be a dict of models, such as {{2: GaussianMixture((5,), 2), 3: ...}}, got {got}")
    check_choice("rule", rule, RULES)
    for name, model in models.items():
        if isinstance(model, type) or not hasattr(model, "fit"):
            raise TypeError(f"`models[{name!r}]` should be a model, got {kind_of(model)}")
    named = {str(name): model for name, model in models.items()}
    given = {} if context is None else {"context": context}
    with Progress(len(named), progress, QUIET_SECONDS) as bar:
        for done, (name, model) in enumerate(named.items()):
            bar.at(done, name)
            try:
                model.fit(data, seed=seed, progress=False, **given, **options)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
    comparison = compare(named, validation, context=validation_context, seed=seed, progress=progress)
    return Choice(named, comparison, _chosen(list(named), comparison, rule), rule)


def _chosen(names: list[str], comparison: Comparison, rule: str) -> str:
    """The first name, in the order given, that the rule accepts."""
    best = comparison.names[0]
    if rule == "best":
        return best
    if len(comparison.scores[best]) < 2:
        raise ValueError("`validation` has one datum, so differences have no standard error; give more, or rule='best'")
    for name in names:
        gap = comparison.difference(best, name)
        if name == best or gap.mean <= gap.std_error:
            return name
    return best
