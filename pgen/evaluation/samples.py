r"""How good samples are, judged by samples alone: for models without a likelihood, and beside it for those with one.

``evaluate(generated, real, train=...)`` asks everything at once and says in words what was found. Each number comes with its
error and the sizes behind it, and beside it stands the same number for real data in place of the generated: the floor
that no model needs to beat. No single number ranks models: a classifier may tell samples apart by a trifle, a distance may be
small for samples that miss a class, and copies of the training data pass every test but that for copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..contracts import Seed, as_seed, check_positive
from ..data.batches import key
from ..training.progress import Progress
from .divergences import mmd
from .features import Classes, Features, feature_space, train_classifier
from .sample_measures import (
    Finding,
    frechet,
    label_coverage,
    memorisation,
    mode_coverage,
    neighbourhoods,
    number,
    parzen_estimate,
    same_sample,
    some,
    with_error,
)
from .two_sample import classifier_test
from .units import QUIET_SECONDS

if TYPE_CHECKING:
    import pandas as pd
    import xarray

__all__ = [
    "Classes",
    "Features",
    "Finding",
    "Row",
    "SampleReport",
    "classifier_test",
    "evaluate",
    "feature_space",
    "frechet",
    "memorisation",
    "mode_coverage",
    "neighbourhoods",
    "parzen_estimate",
    "train_classifier",
]

LEVEL = 0.01
"""Of all tests of one question together."""
UNITS = 20
"""Ratio of the largest absolute values from which samples and data look as if in different units."""
_SHOWN = 10
_LEVELS = 300
_STRETCH = 10.0  # columns of a table whose deviations differ by more are measured in units of their own
_SHORT = (
    ("coverage", "the neighbourhoods of real data hold a sample", "part of the data is missing"),
    ("precision", "the samples lie where data do", "the others lie beside the data"),
)
_HEADER = ("measure", "in", "samples", "real data", "by chance", "p", "n")


@dataclass(frozen=True)
class Row:
    """One measure of a report.

    Attributes:
        found: Of the generated samples.
        space: In which it was taken: ``data``, or the name of the features.
        floor: The same of training data in place of the generated (of classes and modes, of the real data); None without them.
    """

    found: Finding
    space: str
    floor: Finding | None = None


@dataclass(frozen=True, repr=False)
class SampleReport:
    """What ``evaluate`` found. Print it, draw it with ``pgen.plots.samples_and_neighbours``, or write it with ``to_markdown``.

    Attributes:
        rows: The measures, by name.
        verdict: What they say, in sentences; the first is the answer to "is it the data's law".
        features: What the feature space is.
        num_samples: Generated, real, and training data given (0 for none).
        shown: A few generated samples.
        neighbours: Of each of these the nearest training datum (real, if no training data were given).
        neighbours_of: Which of the two.
    """

    rows: dict[str, Row]
    verdict: list[str]
    features: str
    num_samples: tuple[int, int, int]
    shown: Tensor
    neighbours: Tensor
    neighbours_of: str
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Finding:
        """A measure of the generated samples by name."""
        if name not in self.rows:
            raise KeyError(f"{name!r} was not measured (there is {', '.join(self.rows)})")
        return self.rows[name].found

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        measures = {}
        for name, row in self.rows.items():
            found, floor = row.found, row.floor
            measures[name] = {
                "value": found.value, "std_error": found.std_error, "p_value": found.p_value, "chance": found.chance,
                "bias": found.bias, "space": row.space, "num_samples": list(found.num_samples), "note": found.note,
                "floor": floor and floor.value, "floor_std_error": floor and floor.std_error,
                "floor_p_value": floor and floor.p_value,
            }  # fmt: skip
        sizes = dict(zip(("generated", "real", "train"), self.num_samples))
        return {"verdict": self.verdict, "features": self.features, "sizes": sizes, "measures": measures, "notes": self.notes}

    def to_frame(self) -> pd.DataFrame:
        """One row a measure."""
        import pandas as pd

        return pd.DataFrame.from_dict(self.to_dict()["measures"], orient="index")

    def to_dataset(self) -> xarray.Dataset:
        """The numbers over the dimension ``measure``; NaN where something was not measured."""
        import xarray

        columns = ("value", "std_error", "p_value", "bias", "floor", "floor_std_error", "floor_p_value")
        rows = self.to_dict()["measures"].values()
        numbers = {name: ("measure", [math.nan if row[name] is None else row[name] for row in rows]) for name in columns}
        sizes = {
            f"num_{who}": ("measure", [row["num_samples"][i] for row in rows]) for i, who in enumerate(("generated", "real"))
        }
        about = {"verdict": " ".join(self.verdict), "features": self.features}
        return xarray.Dataset(numbers | sizes, coords={"measure": list(self.rows)}, attrs=about)

    def _cells(self) -> list[tuple[str, ...]]:
        return [(name, row.space, *_row_cells(row)) for name, row in self.rows.items()]

    def _head(self) -> str:
        generated, real, train = self.num_samples
        return f"{generated} samples against {real} real data{f', {train} training data' if train else ''}"

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Verdict and table in Markdown, also written to ``path`` if given."""
        cells = [_HEADER, ("---", "---", "---:", "---:", "---:", "---:", "---:"), *self._cells()]
        lines = [f"{self._head()}. {' '.join(self.verdict)}", "", *(f"| {' | '.join(row)} |" for row in cells), ""]
        lines += [f"- {self.features}", *(f"- {note}" for note in self.notes), ""]
        text = "\n".join(lines)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [_HEADER, *self._cells()]
        widths = [max(map(len, column)) for column in zip(*rows)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self._head(), *table, self.features, *notes, *(f"verdict: {line}" for line in self.verdict)])


def _row_cells(row: Row) -> tuple[str, ...]:
    """Value, floor, chance, p and sizes."""
    found, floor = row.found, row.floor
    chance = "" if found.chance is None else f"{number(found.chance[0])} to {number(found.chance[1])}"
    if found.bias is not None:
        chance = f"{number(found.bias)} by size"
    p_value = "" if found.p_value is None else f"{found.p_value:.2g}" if found.p_value >= 1e-4 else "< 1e-4"
    sizes = " + ".join(str(n) for n in found.num_samples if n)
    values = [with_error(f.value, f.std_error) if f is not None else "" for f in (found, floor)]
    return *values, chance, p_value, sizes


# --- one call --------------------------------------------------------------------------------------------------------------


def evaluate(
    generated: Any,
    real: Any,
    *,
    train: Any = None,
    context: Any = None,
    features: str | Callable[[Any], Any] = "pca",
    labels: Any = None,
    modes: Any = None,
    k: int = 5,
    most: int = 2000,
    seed: Seed = 0,
    progress: bool = True,
) -> SampleReport:
    r"""Judge samples against real data that the model was not fitted to.

    ====================================  ==================================================================================
    accuracy of kernels, of a forest      cross-validated accuracy of telling both apart: .5 is best (``classifier_test``)
    MMD²                                  kernel distance at the median width, p by permutation (``divergences.mmd``)
    Frechet distance                      of means and covariances in the features (``frechet``)
    precision, density                    how many samples lie where data do (``neighbourhoods``)
    recall, coverage                      how much of the data samples reach (``neighbourhoods``)
    nearest in train, distance ratio      copies of the training data (``memorisation``); needs ``train``
    classes, reverse KL                   classes that a classifier finds in samples; needs ``labels``
    modes, good share, reverse KL         known modes (``mode_coverage``); needs ``modes``
    ====================================  ==================================================================================

    Tests, and the search for copies, look at the data themselves; distances and neighbourhoods are taken in ``features``. With
    ``train``, each is measured again with training data in place of samples, of the same number: the floor.

    Args:
        generated: Samples ``(n, *event)``, or a fitted model, which then draws as many as there are real data.
        real: Data that the model was not fitted to, ``(m, *event)``.
        train: What it was fitted to.
        context: Of the draws of a conditional model: one for all, or that of each real datum, so that both are of one law.
        features: ``"pixels"``, ``"pca"``, ``"classifier"`` (needs ``labels``), or a function from samples to ``(n, F)``.
        labels: Classes of ``train``, or of ``real`` where ``train`` is not given.
        modes: A target of ``pgen.data.toy`` whose modes are known.
        k: Neighbours that span a neighbourhood.
        most: Rows of each sample that are looked at; costs grow like its cube. All training data are looked at for copies.
        seed: Keys everything.
        progress: Whether to show a bar on what takes more than two seconds.

    Returns:
        A report, which prints as a table and a verdict.

    Raises:
        ValueError: If samples are too few, differ in shape, or are not finite, in one line.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> found = evaluate(torch.randn(200, 2, generator=g) + 1.0, torch.randn(200, 2, generator=g), progress=False)
        >>> print(found.verdict[0].split(" at ")[0])
        A classifier (kernel) tells samples from data
    """
    check_positive("most", most)
    seed = as_seed(seed)
    given = {"real": real} | ({} if train is None else {"train": train}) | {"generated": _drawn(generated, real, context, seed)}
    rows = dict(zip(given, zip(given.values(), same_sample(max(10, 2 * k + 4), **given))))
    for name in set(given) - {"generated"}:
        if not bool((rows[name][1] != rows[name][1][0]).any()):
            raise ValueError(f"all {len(rows[name][1])} rows of `{name}` are equal, so it has no law to hold samples against")
    measured, stretch = _in_one_scale(rows) if modes is None and features in ("pca", "pixels") else (rows, 1.0)
    parts = {name: _thin(array, most, key(seed, name)) for name, (array, _) in measured.items()}
    with Progress(6, progress, QUIET_SECONDS) as bar:
        bar.at(0, "features")
        reference = measured["train" if train is not None else "real"][0]
        classes = None if labels is None else train_classifier(reference, labels, seed=seed, progress=progress)
        space = feature_space(features, reference, classes=classes)
        judge = _Judge(parts["real"], space, k, seed, progress)
        bar.at(1, "samples")
        found = dict(judge.all(parts["generated"]))
        bar.at(3, "held-out real data")
        floor = dict(judge.all(some(parts["train"], len(parts["generated"]), key(seed, "floor")))) if train is not None else {}
        table = {name: Row(f, where, floor.get(name, (None,))[0]) for name, (f, where) in found.items()}
        bar.at(5, "copies and modes")
        table |= _copies(measured, seed, parts["real"]) if train is not None else {}
        table |= _modes(parts, classes, labels, modes, seed)
    sizes = (len(rows["generated"][0]), len(rows["real"][0]), len(rows["train"][0]) if train is not None else 0)
    which = "train" if train is not None else "real"
    near = _nearest(parts["generated"][:_SHOWN], measured[which][0])  # as measured, and shown in the data's own units
    shown = _thin(rows["generated"][0], most, key(seed, "generated"))[:_SHOWN].cpu()
    neighbours = torch.as_tensor(rows[which][0])[near.to(torch.as_tensor(rows[which][0]).device)].cpu()
    recipe = f"features: {space}" + (f"; classes: {classes.recipe}" if classes and features != "classifier" else "")
    notes = _notes(rows, table, train is not None)
    if stretch > 1.0:
        notes.append(
            f"columns differ in scale by a factor of {float(f'{stretch:.2g}'):,.0f}: measured are columns divided by their "
            "standard deviations"
        )
    of = "training data" if train is not None else "real data"
    return SampleReport(table, _verdict(table), recipe, sizes, shown, neighbours, of, notes)


def _in_one_scale(rows: dict[str, tuple[Any, Tensor]]) -> tuple[dict[str, tuple[Any, Tensor]], float]:
    """Vectors whose columns have different units, over the columns' standard deviations, and the largest ratio of these."""
    reference = rows.get("train", rows["real"])
    deviation = reference[1].std(0)
    varying = deviation[deviation > 0]
    stretch = float(varying.max() / varying.min())
    if torch.as_tensor(reference[0]).dim() != 2 or stretch < _STRETCH:
        return rows, 1.0
    unit = torch.where(deviation > 0, deviation, 1.0)
    return {name: (x / unit, x / unit) for name, (_, x) in rows.items()}, stretch


def _drawn(generated: Any, real: Any, context: Any, seed: int) -> Any:
    """Samples: given, or drawn from a model."""
    given = {} if context is None else {"context": context}
    if callable(getattr(generated, "sample", None)) and not hasattr(generated, "to_numpy"):
        return generated.sample(len(real), **given, seed=seed)
    if given:
        raise ValueError(f"`context` is for a model that draws, got {type(generated).__name__}: these samples have had theirs")
    return generated


def _thin(array: Any, most: int, seed: int) -> Tensor:
    tensor = torch.as_tensor(array)
    return some(tensor.detach(), most, seed)


@dataclass(frozen=True)
class _Judge:
    """All measures against one real sample."""

    real: Tensor
    space: Features
    k: int
    seed: int
    progress: bool

    def all(self, x: Tensor) -> Iterator[tuple[str, tuple[Finding, str]]]:
        """Name, finding and space of each."""
        for classifier in ("kernel", "forest"):
            found = classifier_test(x, self.real, classifier=classifier, seed=self.seed, progress=self.progress)
            yield found.name, (found, "data")
        yield "MMD²", (self._mmd(x), "data")
        y, real = self.space.of(x), self.space.of(self.real)
        yield "Frechet distance", (frechet(y, real, seed=self.seed), self.space.name)
        for name, found in neighbourhoods(y, real, k=self.k, seed=self.seed).items():
            yield name, (found, self.space.name)

    def _mmd(self, x: Tensor) -> Finding:
        rows = same_sample(x=x, y=self.real)
        both = some(torch.cat(rows), 2000, self.seed)
        distance = torch.nn.functional.pdist(both)
        width = float(distance[distance > 0].median()) if bool((distance > 0).any()) else 1.0
        found = mmd(*rows, bandwidth=width, permutations=500, seed=self.seed, progress=self.progress)
        return Finding("MMD²", found.value, found.std_error, found.num_samples, found.p_value, note=f"h = {width:.4g}")


def _copies(rows: dict[str, tuple[Tensor, Tensor]], seed: int, real: Tensor) -> dict[str, Row]:
    """Whether samples are nearer to training data; nothing where real data are among them."""
    if _overlap(rows["real"][1], rows["train"][1]) > 0.5:
        return {}
    found = memorisation(rows["generated"][1], rows["train"][1], rows["real"][1], seed=seed)
    return {name: Row(f, "data") for name, f in found.items()}


def _overlap(real: Tensor, train: Tensor) -> float:
    """The share of the real rows that are training rows."""
    known = {hash(row.tobytes()) for row in train.cpu().numpy()}
    return sum(hash(row.tobytes()) in known for row in real.cpu().numpy()) / len(real)


def _modes(parts: dict[str, Tensor], classes: Classes | None, labels: Any, modes: Any, seed: int) -> dict[str, Row]:
    """Classes that a classifier finds, or known modes, with the same of real data as the floor."""
    if modes is not None:
        found, floor = (mode_coverage(parts[name], modes, seed=seed) for name in ("generated", "real"))
        return {name: Row(f, "data", floor[name]) for name, f in found.items()}
    if classes is None:
        return {}
    _, target = torch.as_tensor(labels).unique(return_inverse=True)
    shares = target.bincount().double() / len(target)
    found, floor = (label_coverage(classes.predict(parts[name]), shares.cpu(), seed=seed) for name in ("generated", "real"))
    renamed = {"modes": "classes", "reverse KL": "reverse KL"}
    return {renamed[name]: Row(replace(f, name=renamed[name]), "classifier", floor[name]) for name, f in found.items()}


def _nearest(shown: Tensor, data: Tensor) -> Tensor:
    """Of each sample the number of its nearest datum."""
    x, rows = same_sample(1, x=shown, data=data)
    return torch.cdist(x, rows).argmin(1)


# --- in words --------------------------------------------------------------------------------------------------------------


def _verdict(rows: dict[str, Row]) -> list[str]:
    said = [_told_apart(rows)]
    differ = _test_level([row.floor for row in rows.values()])
    if differ is not None:
        said.append(
            f"Held-out real data differ from the training data themselves ({differ}): part of what is found is not the model's."
        )
    copies = rows.get("nearest in train")
    if copies is not None and copies.found.p_value is not None and copies.found.p_value < LEVEL:
        share, chance = copies.found.value, copies.found.chance or (math.nan, math.nan)
        said.append(
            f"{share:.3f} of the samples are nearest to a training datum, by chance {chance[0]:.3f} to {chance[1]:.3f}: "
            + ("the model knows its training data too well, or those differ." if differ else "the model copies training data.")
        )
    for name, words in (
        ("coverage", "of the neighbourhoods of real data hold a sample"),
        ("precision", "of the samples lie where data do"),
    ):
        row = rows[name]
        if row.floor is not None and row.floor.value - row.found.value > 3 * math.hypot(
            row.found.std_error, row.floor.std_error
        ):
            more = "part of the data is missing." if name == "coverage" else "the others lie beside the data."
            said.append(f"{row.found.value:.2f} {words}, of training data {row.floor.value:.2f}: {more}")
    return said


def _told_apart(rows: dict[str, Row]) -> str:
    tests = {name: row.found for name, row in rows.items() if name.startswith("accuracy") or name == "MMD²"}
    sure = [f for f in tests.values() if f.p_value is not None and f.p_value < LEVEL / len(tests)]
    classifiers = [f for f in sure if f.name.startswith("accuracy")]
    sizes = " + ".join(map(str, next(iter(tests.values())).num_samples))
    if classifiers:
        best = max(classifiers, key=lambda f: f.value)
        which = best.name.removeprefix("accuracy, ")
        return (
            f"A classifier ({which}) tells samples from data at {best.value:.2f} ± {best.std_error:.2f} (chance 0.50): "
            "not yet the data's law."
        )
    if sure:
        return f"MMD tells samples from data (p = {sure[0].p_value:.2g}), classifiers do not: near the data's law, but not it."
    best = max(tests.values(), key=lambda f: f.value if f.name.startswith("accuracy") else 0.0)
    least, limit = min(f.p_value for f in tests.values() if f.p_value is not None), LEVEL / len(tests)
    near = f": the smallest p is {least:.2g}, and below {limit:.2g} one would" if least < 0.05 else ""
    return (
        f"No test tells samples from data (best accuracy {best.value:.2f} ± {best.std_error:.2f}, chance 0.50) "
        f"at {sizes} data; more data may{near}."
    )


def _test_level(floors: list[Finding | None]) -> str | None:
    """What tells held-out real data from training data, if anything does."""
    tests = [f for f in floors if f is not None and f.p_value is not None]
    sure = [f for f in tests if f.p_value is not None and f.p_value < LEVEL / len(tests)]
    return f"{sure[0].name} {sure[0].value:.2f}, p = {sure[0].p_value:.2g}" if sure else None


def _notes(rows: dict[str, tuple[Tensor, Tensor]], table: dict[str, Row], trained: bool) -> list[str]:
    said = []
    if not trained:
        said.append("no floor, and no search for copies: give `train`, the data that the model was fitted to")
    elif "nearest in train" not in table:
        said.append("most of the real data are training data: no search for copies; give data that the model was not fitted to")
    drawn, real = (rows[name][1] for name in ("generated", "real"))
    tops = [float(x.abs().max()) for x in (drawn, real)]
    if min(tops) > 0 and max(tops) > UNITS * min(tops):
        ends = (f"[{number(float(x.min()))}, {number(float(x.max()))}]" for x in (drawn, real))
        said.append("samples lie in {}, real data in {}: are both in the same units?".format(*ends))
    levels = rows["real"][1].unique()
    if len(levels) <= min(_LEVELS, rows["real"][1].numel() // 2):  # few numbers that are all different are no levels
        on = float(torch.isin(rows["generated"][1].float(), levels.float()).double().mean())
        if on < 0.5:
            said.append(
                f"real data take {len(levels)} values, and {100 * (1 - on):.0f} % of the generated numbers lie between them, "
                "which gives them away: round the samples, or dequantise the data"
            )
    return said
