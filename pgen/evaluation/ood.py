r"""What is out of distribution: four scores, each with p-values against held-out data, and what is known to go wrong.

A model's density alone is a poor witness: images of another kind may lie where the density is high (smoother, darker) and are
yet nothing like the data. Each score here answers that differently:

.. math::

    \text{likelihood:} \; -\log p(x), \qquad \text{typicality:} \; |-\log p(x) - \hat H|, \qquad
    \text{ratio:} \; -\log \frac{p(x)}{p_{\text{background}}(x)}, \qquad
    \text{regret:} \; \max_q \mathcal{L}(x; q) - \mathcal{L}(x; q_\phi)

All grow with strangeness. Whatever the score, the p-value of x among n held-out data of the known kind is *conformal*,
:math:`(1 + \#\{i : t_i \ge t(x)\}) / (1 + n)`: at most a share a of new data of that kind gets a p-value of a or less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contracts import Batch, NotAvailable, Score, Seed, as_seed, check_choice
from ..data.arrays import as_batch, check_finite
from ..data.batches import key
from ..programs import batch_length, innermost, keyed_rng, run_program
from ..training.progress import Progress
from .likelihood import log_joint, take
from .units import QUIET_SECONDS, device_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["METHODS", "Detection", "OODReport", "auroc", "conformal", "detect", "perturbed", "regret", "report"]

METHODS = {
    "likelihood": "-log p(x): strange where the density is low",
    "typicality": "|-log p(x) - entropy|: strange where the density is unlike that of the data, low or high",
    "ratio": "-log p(x) + log p_background(x): strange where the model knows no better than a model of perturbed data",
    "regret": "what a guide of x's own would gain over the encoder: strange where the encoder has never been",
}
"""The scores, by name; sources: Bishop (1994), doi:10.1049/ip-vis:19941330; Nalisnick et al. (2019b), arXiv:1906.02994;
Ren et al. (2019), arXiv:1906.02845; Xiao, Yan, Amit (2020), arXiv:2003.02977."""

KNOWN_FAILURE = (
    "A density alone is known to fail: models of Fashion-MNIST give MNIST the higher density (AUROC .09 for PixelCNN++), "
    "models of CIFAR-10 SVHN (Nalisnick et al. 2019, arXiv:1810.09136). What works on these out-data may fail on others."
)
_ROWS = 256  # data whose guides are optimised together


@dataclass(frozen=True)
class Detection:
    """How strange each datum is.

    Attributes:
        method: Of ``METHODS``.
        statistic: The score of each datum; larger is stranger. Nats.
        p_value: Conformal, of each datum.
        null: The scores of the held-out data that p-values refer to.
    """

    method: str
    statistic: Tensor
    p_value: Tensor
    null: Tensor


def detect(
    model: Any,
    x: Any,
    *,
    null: Any,
    method: str = "typicality",
    background: Any = None,
    num_samples: int = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> Detection:
    """Score data by one method, with p-values against held-out data of the known kind.

    Args:
        model: A fitted family.
        x: Data to judge.
        null: Held-out data of the known kind, which the model was not fitted to.
        method: ``"likelihood"``, ``"typicality"``, ``"ratio"`` (needs ``background``) or ``"regret"`` (a VAE).
        background: For the ratio: the same family, fitted to ``perturbed`` data.
        num_samples: Draws a datum, where ``log_prob`` is a bound.
        seed: Keys them.
        progress: Whether to show a bar on what takes more than two seconds.
    """
    found = _statistics(model, {"x": x, "null": null}, [method], background, num_samples, as_seed(seed), progress)[method]
    return Detection(method, found["x"], conformal(found["x"], found["null"]), found["null"])


def conformal(statistic: Tensor, null: Tensor) -> Tensor:
    r"""The share of held-out scores that are at least as large, counting x itself: :math:`(1 + \#\{t_i \ge t\}) / (1 + n)`.

    References:
        Bates, Candes, Lei, Romano, Sesia (2023), Testing for outliers with conformal p-values, arXiv:2104.08279, eq. 2.

    Example:
        >>> conformal(torch.tensor([0.0, 2.5, 9.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor([1.0000, 0.5000, 0.2500], dtype=torch.float64)
    """
    _check_scores(statistic=statistic, null=null)
    below = torch.searchsorted(null.double().sort().values, statistic.double())
    return (1 + len(null) - below).double() / (1 + len(null))


def auroc(inside: Tensor, outside: Tensor) -> tuple[float, float]:
    r"""The probability that an outside score exceeds an inside one, ties by half, and its standard error.

    The error is DeLong's; it is zero where the two are perfectly apart, which says only that no pair was in the wrong order.

    References:
        DeLong, DeLong, Clarke-Pearson (1988), Biometrics 44:837.

    Example:
        >>> auroc(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.5, 4.0]))[0]  # 6 of 8 pairs
        0.75
    """
    _check_scores(inside=inside, outside=outside)
    low, high = inside.double().sort().values, outside.double().sort().values

    def above(values: Tensor, others: Tensor) -> Tensor:
        left, right = torch.searchsorted(others, values), torch.searchsorted(others, values, right=True)
        return (left + right).double() / (2 * len(others))

    won, lost = above(high, low), 1 - above(low, high)
    error = sum(float(part.var()) / len(part) if len(part) > 1 else math.nan for part in (won, lost))
    return float(won.mean()), math.sqrt(error)


def _check_scores(**scores: Tensor) -> None:
    """One number a datum, in vectors."""
    for name, values in scores.items():
        if not isinstance(values, Tensor) or values.dim() != 1 or not len(values):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"`{name}` should be scores, one a datum, a tensor of shape (n,), got {got}")


def perturbed(x: Tensor, rate: float = 0.2, *, levels: int | None = None, seed: Seed = 0) -> Tensor:
    """Data for a background model: each number is replaced, with probability ``rate``, by one that knows nothing of the rest.

    Whole numbers are replaced by uniform ones from 0 to ``levels`` - 1, real numbers by the same column of another row. What is
    left to learn is what all such data share; the ratio to a model of the data themselves keeps what is particular.

    Args:
        x: Training data, ``(N, *event)``.
        rate: Share of the numbers to replace; the paper chooses among 0.1, 0.2 and 0.3.
        levels: Of whole numbers; the largest and one if None.
        seed: Keys everything.

    References:
        Ren et al. (2019), Likelihood ratios for out-of-distribution detection, arXiv:1906.02845, section 3.
    """
    if not 0 < rate < 1:
        raise ValueError(f"`rate` should lie strictly between 0 and 1, got {rate!r}")
    x = torch.as_tensor(as_batch(x, name="x"))
    check_finite(x, "x")
    generator = torch.Generator().manual_seed(key(as_seed(seed), "perturbed"))
    replaced = (torch.rand(x.shape, generator=generator) < rate).to(x.device)
    if bool((x == x.round()).all()) and float(x.min()) >= 0:
        other = torch.randint(levels or int(x.max()) + 1, x.shape, generator=generator).to(x)
    else:
        rows = torch.rand(x.shape, generator=generator).argsort(0).to(x.device)
        other = x.gather(0, rows)
    return torch.where(replaced, other, x)


def regret(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    batch: Batch,
    *,
    steps: int,
    learning_rate: float,
    num_samples: int,
    seed: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """What the bound of each datum gains when its Gaussian guide is optimised for it alone; see ``METHODS``.

    Args:
        model: The model program, all of whose latents lie in the data plate.
        guide: The guide program, Gaussian with independent coordinates.
        batch: The data, preprocessed; run inside ``isolated``.
        steps: Of Adam, from the encoder's mean and standard deviation.
        learning_rate: Of Adam.
        num_samples: Draws on which both bounds are compared, the same for both.
        seed: Keys the noise.
        progress: Whether to show a bar.

    Returns:
        Gain and its Monte Carlo standard error, ``(N,)`` each, float64, in nats.
    """
    rows, found = batch_length(batch), []
    starts = range(0, rows, _ROWS)
    with keyed_rng(0, device_of(batch)), Progress(len(starts) * steps, progress, QUIET_SECONDS) as bar:
        for number, start in enumerate(starts):
            part = take(batch, slice(start, min(start + _ROWS, rows)))
            own = _Guides(model, guide, part, key(seed, "regret", number))
            before = own.bounds(num_samples, "compare")
            own.optimise(steps, learning_rate, bar, number * steps)
            found.append(own.bounds(num_samples, "compare") - before)
    gain = torch.cat(found, 1)
    return gain.mean(0), gain.std(0) / math.sqrt(num_samples)


class _Guides:
    """A Gaussian guide for each datum of a batch, started at what the encoder gives."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], batch: Batch, seed: int) -> None:
        self.model, self.batch, self.seed = model, batch, seed
        self.loc: dict[str, Tensor] = {}
        self.log_scale: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, term in run_program(guide, batch).items():
                base = innermost(term.fn)
                if not isinstance(base, torch.distributions.Normal):
                    raise NotAvailable(
                        f"regret optimises a Gaussian guide with independent coordinates, and that of {name!r} is none "
                        f"({type(base).__name__}); make the VAE with encoder='gaussian'"
                    )
                self.loc[name] = base.loc.expand(term.value.shape).clone().requires_grad_()
                self.log_scale[name] = base.scale.log().expand(term.value.shape).clone().requires_grad_()
        if not self.loc:
            raise NotAvailable("regret needs a family with a guide, such as VAE; this one has no latent variables")

    def _bounds(self, num_samples: int, *words: int | str) -> Tensor:
        device = next(iter(self.loc.values())).device
        values, log_q = {}, 0.0
        with keyed_rng(key(self.seed, *words), device):
            for name, loc in self.loc.items():
                q = torch.distributions.Normal(loc, self.log_scale[name].exp(), validate_args=False)
                values[name] = z = q.rsample(torch.Size([num_samples]))
                log_q = log_q + q.log_prob(z).flatten(2).double().sum(2)
            return log_joint(self.model, self.batch, values) - log_q

    def bounds(self, num_samples: int, words: str) -> Tensor:
        """log p(x, z) - log q(z) at draws of the guides, ``(num_samples, rows)``."""
        with torch.no_grad():
            return self._bounds(num_samples, words)

    def optimise(self, steps: int, learning_rate: float, bar: Progress, done: int) -> None:
        """Climb every datum's own bound, 8 draws a step."""
        parameters = [*self.loc.values(), *self.log_scale.values()]
        adam = torch.optim.Adam(parameters, lr=learning_rate)
        for step in range(steps):
            bar.at(done + step, "regret")
            with torch.enable_grad():
                loss = -self._bounds(8, "step", step).mean(0).sum()
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients):
                parameter.grad = gradient
            adam.step()


# --- one call --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class OODReport:
    """What ``report`` found. Print it, draw it with ``pgen.plots.out_of_distribution``, write it with ``to_markdown``.

    Attributes:
        rows: For each method: AUROC with its standard error, the share of the out-data with a p-value of at most ``level``, and
            the same share of the in-data, which should be about ``level``.
        inside: Scores of the in-data, by method.
        outside: Scores of the out-data, by method.
        null: Scores of the held-out data, by method.
        level: False alarms that are accepted.
        warnings: What a reader must know.
    """

    rows: dict[str, dict[str, float]]
    inside: dict[str, Tensor]
    outside: dict[str, Tensor]
    null: dict[str, Tensor]
    level: float = 0.05
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {"level": self.level, "methods": self.rows, "warnings": list(self.warnings)}

    def to_frame(self) -> pd.DataFrame:
        """One row a method."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.rows, orient="index")

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (name, f"{row['auroc']:.3f} ± {row['std_error']:.3f}", f"{row['detected']:.3f}", f"{row['false_alarms']:.3f}")
            for name, row in self.rows.items()
        ]

    def _header(self) -> tuple[str, ...]:
        return ("score", "AUROC", f"out-data found at {self.level:g}", f"false alarms at {self.level:g}")

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown, also written to ``path`` if given."""
        lines = [f"| {' | '.join(cells)} |" for cells in (self._header(), ("---", "---:", "---:", "---:"), *self._cells())]
        text = "\n".join([*lines, "", *(f"- {warning}" for warning in self.warnings), ""])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [self._header(), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def report(
    model: Any,
    in_test: Any,
    out_test: Any,
    *,
    null: Any,
    background: Any = None,
    methods: Sequence[str] | None = None,
    level: float = 0.05,
    num_samples: int = 100,
    seed: Seed = 0,
    progress: bool = True,
) -> OODReport:
    """How well each score tells ``out_test`` from ``in_test``.

    Args:
        model: A fitted family.
        in_test: Test data of the kind that it was fitted to.
        out_test: Data of another kind.
        null: Held-out data of the known kind (such as validation data), which p-values refer to.
        background: The same family fitted to ``perturbed`` data, for the ratio.
        methods: Of ``METHODS``; by default all that this model and background can have.
        level: False alarms that are accepted.
        num_samples: Draws a datum, where ``log_prob`` is a bound.
        seed: Keys them.
        progress: Whether to show a bar on what takes more than two seconds.

    Raises:
        ValueError: If a method is unknown, or the ratio is asked for without a background.
        NotAvailable: If the regret is asked for and the model has no Gaussian guide.
    """
    if not 0 < level < 1:
        raise ValueError(f"`level` should lie between 0 and 1, such as 0.05, got {level!r}")
    data = {"in_test": in_test, "out_test": out_test, "null": null}
    chosen = list(methods) if methods is not None else _possible(model, in_test, background)
    found = _statistics(model, data, chosen, background, num_samples, as_seed(seed), progress)
    rows = {}
    for method, values in found.items():
        value, error = auroc(values["in_test"], values["out_test"])
        p_in, p_out = (conformal(values[part], values["null"]) for part in ("in_test", "out_test"))
        shares = [float((p <= level).double().mean()) for p in (p_out, p_in)]
        rows[method] = {"auroc": value, "std_error": error, "detected": shares[0], "false_alarms": shares[1]}
    inside, outside, held = ({method: values[part] for method, values in found.items()} for part in data)
    return OODReport(rows, inside, outside, held, level, _warnings(rows, inside, held, level, background))


def _possible(model: Any, x: Any, background: Any) -> list[str]:
    """The methods that can be had: the ratio needs a background, the regret a Gaussian guide."""
    chosen = ["likelihood", "typicality"] + ["ratio"] * (background is not None)
    try:
        few = {name: value[:2] for name, value in x.items()} if isinstance(x, dict) else x[:2]
        model.likelihood_regret(few, steps=1, num_samples=2, progress=False)
    except (NotAvailable, AttributeError):  # no latents, no Gaussian guide, or no family at all
        return chosen
    except (TypeError, ValueError, IndexError):  # what is wrong with x is told where it is scored
        return chosen
    return [*chosen, "regret"]


def _warnings(
    rows: dict[str, dict[str, float]],
    inside: dict[str, Tensor],
    null: dict[str, Tensor],
    level: float,
    background: Any,
) -> list[str]:
    said = []
    likelihood = rows.get("likelihood")
    if likelihood and likelihood["auroc"] + 2 * likelihood["std_error"] < 0.5:
        value = f"AUROC {likelihood['auroc']:.3f}"
        said.append(f"The density alone fails here: the out-data have the higher density ({value}). Do not rank by it.")
    for method, row in rows.items():
        size, held = len(inside[method]), len(null[method])
        if abs(row["false_alarms"] - level) > 4 * math.sqrt(level * (1 - level) * (1 / size + 1 / held)) + 1 / held:
            said.append(
                f"{row['false_alarms']:.3f} of the in-data get a p-value of {level:g} or less by {method}: they are not like "
                "the held-out data, so p-values do not mean what they say."
            )
    if background is None:
        said.append("The ratio was not measured: it needs `background`, the family fitted to ood.perturbed(training data).")
    return [*said, KNOWN_FAILURE]


def _statistics(
    model: Any, data: dict[str, Any], methods: Sequence[str], background: Any, num_samples: int, seed: int, progress: bool
) -> dict[str, dict[str, Tensor]]:
    """The score of every datum, by method and part; ``null`` is among the parts."""
    if not callable(getattr(model, "log_prob", None)):
        raise TypeError(f"`model` should be a fitted family, got {type(model).__name__}")
    for method in methods:
        check_choice("method", method, tuple(METHODS))
    if "ratio" in methods and background is None:
        raise ValueError("`background` is missing: the ratio needs the same family fitted to ood.perturbed(training data)")
    options = {"num_samples": num_samples, "seed": seed, "progress": progress}
    found: dict[str, dict[str, Tensor]] = {}
    with Progress(len(methods), progress, QUIET_SECONDS) as bar:
        scores = {n: _score(n, model, x, options) for n, x in data.items()} if set(methods) - {"regret"} else {}
        for done, method in enumerate(methods):
            bar.at(done, method)
            if method == "likelihood":
                found[method] = {name: -score.value.double() for name, score in scores.items()}
            elif method == "typicality":
                found[method] = _typicality(scores)
            elif method == "ratio":
                others = {n: _score(f"background, {n}", background, x, options) for n, x in data.items()}
                found[method] = {n: -(scores[n] - others[n]).value for n in data}
            else:
                found[method] = {
                    n: model.likelihood_regret(x, seed=seed, progress=progress).value.double() for n, x in data.items()
                }
    return found


def _score(name: str, model: Any, x: Any, options: dict[str, Any]) -> Score:
    """Log-densities of one part, which an error names."""
    try:
        return model.log_prob(x, **options)
    except (TypeError, ValueError) as error:
        told = str(error)  # models call their data x
        shape, rows = told.startswith("`x` "), told.startswith("x row ")
        where = f"`{name}` {told[4:]}" if shape else f"{name} {told[2:]}" if rows else f"{name}: {told}"
        raise type(error)(where) from error


def _typicality(scores: dict[str, Score]) -> dict[str, Tensor]:
    """The first half of the held-out data gives the entropy, the second half the null: so p-values stay exact."""
    held = -scores["null"].value.double()
    half = len(held) // 2
    if half < 1:
        raise ValueError(f"`null` should hold at least two data, got {len(held)}")
    entropy = held[:half].mean()
    parts = {name: -score.value.double() for name, score in scores.items()} | {"null": held[half:]}
    return {name: (value - entropy).abs() for name, value in parts.items()}
