r"""Fits from the command line: what is fitted, and the folder that it leaves behind.

The folder holds a model file, ``run.json`` and pictures. ``run.json`` is a record for people and programs; nothing in it is
ever executed. A program of the user's own is recorded by its file's name and digest, and its code is loaded only where the
user names the file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import pgen
from pgen import objectives
from pgen.contracts import Batch, Run, Score, check_choice, nearest
from pgen.data import ContextColumns, Loaded, Table
from pgen.distributions.observation import LEVELS
from pgen.evaluation.compare import Comparison
from pgen.models.unnormalised import UnnormalisedModel
from pgen.training.checkpoint import Checkpoint

__all__ = [
    "CHECKPOINT",
    "COMPARISON",
    "MODEL",
    "OBJECTIVES",
    "PICTURES",
    "PROGRESS",
    "RECORD",
    "REPORT",
    "HeldOut",
    "Parts",
    "Program",
    "Reading",
    "Subject",
    "batch",
    "bits_per_dim",
    "check_model",
    "check_models",
    "check_settings",
    "columns_named",
    "compare_runs",
    "context_of",
    "discard_checkpoint",
    "fit_each",
    "given",
    "grey_of",
    "has_checkpoint",
    "held_out",
    "likelihood",
    "note_of",
    "objective",
    "objective_of",
    "open_run",
    "parse_each",
    "parse_objective",
    "parse_settings",
    "plain",
    "read_record",
    "sample",
    "save_comparison",
    "save_models",
    "save_run",
    "scored",
    "settings_of",
    "shown",
]

MODEL, RECORD, REPORT, CHECKPOINT = "model.pgen", "run.json", "report.html", "checkpoint"
PROGRESS = "progress"
"""Folder of the pictures that a fit draws as it goes on."""
COMPARISON = "comparison.json"
PICTURES = ("bound.png", "game.png", "samples.png", "density.png", "reconstructions.png", "latent.png")
OF_LATENTS = ("reconstructions.png", "latent.png")
SCHEMA = 2
VALIDATION_SHARE = 0.1
"""Of data without a split of their own, drawn by the seed: held out while a family is fitted."""
TEST_SHARE = 0.2
"""Of such data, held out for a comparison."""
_LABEL = "label"
"""What the classes of data that are no table are called as a context."""
SPLITS = {"digits": pgen.data.digits}
"""Bundled sets that are split: bare names are fitted on ``:train`` and ``:validation`` and judged on ``:test``."""
SHORT = {
    "kde": "kernel_density", "gmm": "gaussian_mixture", "ppca": "probabilistic_pca", "fa": "factor_analysis",
    "hmm": "hidden_markov",
}  # fmt: skip
"""What families are called for short."""
OBJECTIVES: dict[str, Any] = {
    "elbo": objectives.ELBO, "iwae": objectives.IWAE, "dreg": objectives.DReG, "vimco": objectives.VIMCO,
    "renyi": objectives.Renyi, "simple": objectives.Simple, "adversarial": objectives.Adversarial,
    "contrastive": objectives.ContrastiveDivergence, "persistent": objectives.PersistentContrastiveDivergence,
    "denoising": objectives.DenoisingScoreMatching, "sliced": objectives.SlicedScoreMatching,
    "noise_contrastive": objectives.NoiseContrastive,
}  # fmt: skip
"""Objectives by the names that the command line knows them by."""
_BOUNDS = ("elbo", "iwae", "dreg", "vimco", "renyi")
_OBJECTIVES_KNOWN_AS = {
    **{made.__name__.lower(): name for name, made in OBJECTIVES.items()}, "pcd": "persistent", "cd": "contrastive",
    "nce": "noise_contrastive",
}  # fmt: skip
_PARTS = ("train", "validation", "test")
_LEVELS = (17, 256)  # of grey images given in [0, 1]
_NEXT_ASSIGNMENT = re.compile(r",(?=[^,=]*=)")
_CONSTANT = re.compile(r"constant in column (\d+)|number (\d+) of each datum is constant")
_MAX_RECORD = 64 * 2**20  # bytes
_MAX_HISTORY = 2000  # entries of the recorded history: means of equal stretches beyond that


# --- a program of the user's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A Pyro program of the user's own, loaded from the file that they named.

    Attributes:
        file: The Python file.
        names: Of the model, and of the guide if there is one, in that file.
        functions: The callables themselves, in the same order.
        sha256: Digest of the file's text.
    """

    file: Path
    names: tuple[str, ...]
    functions: tuple[Callable[..., Any], ...]
    sha256: str

    @classmethod
    def load(cls, specs: Sequence[str]) -> Program:
        """Run the file in ``FILE.py:MODEL [FILE.py:GUIDE]`` and pick the callables out.

        Raises:
            ValueError: If a specification is malformed, the files differ, or a name is missing or no callable.
        """
        parts = [spec.rpartition(":") for spec in specs]
        files = {file for file, _, _ in parts}
        if len(specs) not in (1, 2) or len(files) != 1 or not all(f.endswith(".py") and n.isidentifier() for f, _, n in parts):
            raise ValueError(f"a program is named FILE.py:MODEL [FILE.py:GUIDE], both from one file; got {' '.join(specs)}")
        file = Path(files.pop())
        if not file.is_file():
            raise ValueError(f"{file} is not a file")
        names = tuple(name for _, _, name in parts)
        module = _import(file)
        return cls(file, names, tuple(_pick(module, file, name) for name in names), _digest(file))

    def pair(self, rung: str | None) -> pgen.Pair:
        """The program with its own guide, else with an automatic one."""
        return pgen.Pair(self.functions[0], self.functions[1] if len(self.functions) > 1 else rung)

    def describe(self) -> dict[str, Any]:
        """What ``run.json`` keeps: names and a digest, no code."""
        return {"file": str(self.file), "names": list(self.names), "sha256": self.sha256}


def _import(file: Path) -> ModuleType:
    """Run ``file`` as a module, with its own folder importable, as ``python FILE`` would."""
    name = f"pgen_program_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules[name] = module  # dataclasses and forward references look a class's module up
    spec.loader.exec_module(module)
    return module


def _pick(module: ModuleType, file: Path, name: str) -> Callable[..., Any]:
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(f"{file} has no callable {name!r}{nearest(name, known)}")
    return function


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- what is fitted --------------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """A model about to be fitted, its data, and what the record says of both.

    Attributes:
        model: A family or a ``Pair``.
        train: The data to fit; of a family with a context a dict of ``x`` and ``context``.
        validation: Held-out data, alike; None for a program of the user's own.
        labels: Classes of ``train`` where the source has them.
        about: The parts ``model`` and ``data`` of the record.
    """

    model: Any
    train: Any
    validation: Any
    labels: Tensor | None
    about: dict[str, dict[str, Any]]

    @classmethod
    def family(
        cls, source: str, name: str | None, settings: dict[str, Any], seed: int, reading: Reading | None = None
    ) -> Subject:
        """A family for the data in ``source``, with held-out data beside it.

        Args:
            source: A file or the name of a bundled set.
            name: Of the family.
            settings: Of its constructor; None, or left out, where the data and the family decide (``GenerativeModel.suggest``).
            seed: Keys the initial parameters and what is held out.
            reading: How a table is read.
        """
        families = pgen.models.REGISTRY
        if name is None:
            raise ValueError(f"--model is missing: name a family{nearest('', sorted(families))}")
        name = _named("--model", name)
        settings = check_settings(name, settings)
        parts = Parts.of(source, settings.get("likelihood"), seed, reading, test=False, grey=grey_of({name: settings}))
        return cls.of_parts(parts, name, settings, seed)

    @classmethod
    def of_parts(cls, parts: Parts, name: str, settings: dict[str, Any], seed: int, *, alike: bool = False) -> Subject:
        """A family for data that are held out already."""
        family, prepared = pgen.models.REGISTRY[name], dict(parts.prepared)
        settings = parts.columned(name, {**({"likelihood": parts.asked} if parts.asked else {}), **settings}, alike=alike)
        settings = parts.conditioned(name, settings)
        found = {**family.suggest(torch.cat(parts.x), settings), **settings}
        if parts.context is not None and family.columns_of_context:
            found = _with_kinds(found, parts.context, math.prod(parts.x[0].shape[1:]))
        if "levels" in prepared and "num_classes" in found:
            found["num_classes"] = settings.get("num_classes", prepared["levels"])
        accepted, make = inspect.signature(family).parameters, cast(Any, family)
        given = {option: value for option, value in {**found, "seed": seed}.items() if option in accepted}
        needed = [key for key, p in accepted.items() if p.default is p.empty and key not in ("event_shape", *given)]
        if needed:
            raise ValueError(f"{name} needs a value of {needed[0]!r}: add --set {needed[0]}=...")
        model = make(tuple(parts.x[0].shape[1:]), **given)
        prepared |= _preprocessed(model.preprocess)
        data = {**_about(parts.source, parts.loaded), "validation": len(parts.x[1]), "prepared": prepared, "given": "whole"}
        data |= {"shape": list(parts.x[0].shape[1:]), **parts.told(model)}
        about = {"model": {"family": name, "settings": model.settings()}, "data": data}
        return cls(model, parts.batch(0), parts.batch(1), parts.loaded.labels, about)

    @property
    def x(self) -> Any:
        """What is modelled, without its context."""
        return _x(self.train)

    def contexts(self, num: int) -> Tensor | None:
        """The contexts of the first ``num`` training data, over again where they are fewer; None without a context."""
        found = self.train["context"] if _is_conditioned(self.train) else None
        return None if found is None else found[torch.arange(num) % len(found)]

    @classmethod
    def program(cls, specs: Sequence[str], source: str, rung: str | None) -> Subject:
        """A program of the user's own, with a guide of their own or an automatic one (``rung``)."""
        if len(specs) > 1 and rung:
            raise ValueError(f"give either a guide of your own, {specs[1]}, or --guide {rung}, not both")
        own, loaded = Program.load(specs), _load(source)
        given = _how_given(own.functions[0], loaded)
        about = {
            "model": {**own.describe(), "guide": rung},
            "data": {**_about(source, loaded), "validation": 0, "prepared": {}, "given": given, "categories": None, "held": ""},
        }
        about["data"]["context"] = None
        return cls(own.pair(rung), _arguments(loaded, given), None, loaded.labels, about)


@dataclass
class Parts:
    """Data for a family: what is fitted, what is held out, and how values are seen.

    Attributes:
        source: Where they come from.
        loaded: The part that is fitted, as it was read.
        x: The parts, prepared: to fit, to validate on, and to test on where that was asked for.
        prepared: What was done to the data for the sake of a likelihood.
        asked: The likelihood, where the user said which.
        table: The columns that are modelled, where the data are a table.
        context: What the model is conditioned on, if anything.
        contexts: The context vectors of each part, ``(N, size)``; none without a context.
    """

    source: str
    loaded: Loaded
    x: list[Tensor]
    prepared: dict[str, Any]
    asked: str | None = None
    table: Table | None = None
    context: ContextColumns | None = None
    contexts: tuple[Tensor, ...] = ()

    @classmethod
    def of(
        cls, source: str, likelihood: str | None, seed: int, reading: Reading | None = None, *, test: bool, grey: str = "bits"
    ) -> Parts:
        """The parts of ``source``: its own split where it has one, else drawn by the seed; ``grey`` comes from ``grey_of``."""
        table, context, loaded = _held_out(source, seed, reading or Reading(), test=test)
        given = [_x(part.data) for part in loaded]
        plain = table is None or not (any(table.categories) or table.missing)
        prepared = _observation(torch.cat(given), likelihood, grey)[1] if grey and plain else {}
        prepared |= {"complete": True} if reading and reading.complete else {}
        contexts = () if context is None else tuple(cast(dict[str, Tensor], part.data)["context"] for part in loaded)
        x = [_prepare(part, prepared) for part in given]
        return cls(source, loaded[0], x, prepared, likelihood, table, context, contexts)

    def batch(self, number: int) -> Any:
        """One of the parts, as a family takes it: x, or a dict of x and its context."""
        return {"x": self.x[number], "context": self.contexts[number]} if self.contexts else self.x[number]

    def conditioned(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings with the size of the context.

        Raises:
            ValueError: If the family takes no context, or the settings give it another size.
        """
        if self.context is None:
            return settings
        if not _takes_context(name):
            takes = [family for family in sorted(pgen.models.REGISTRY) if _takes_context(family)]
            raise ValueError(f"{name} takes no context: choose {_either(takes)}, or leave --context out")
        if settings.setdefault("context_dim", self.context.size) != self.context.size:
            raise ValueError(
                f"--set context_dim={settings['context_dim']}, and the context has {self.context.size} numbers "
                f"({self.context.words()}); leave it out"
            )
        return settings

    def columned(self, name: str, settings: dict[str, Any], *, alike: bool = False) -> dict[str, Any]:
        """Settings with the kinds of columns where the family takes them and they differ.

        Args:
            name: Of the family.
            settings: Its settings so far.
            alike: Whether binary columns count as numbers, as for families beside it that know no kinds of columns.

        Raises:
            ValueError: If the family cannot take what the table holds.
        """
        if self.table is None:
            return settings
        _check_takes(name, self.table)
        if not _takes_columns(name) or "columns" in settings:
            return settings
        if any(self.table.categories) or (not alike and "likelihood" not in settings and len(set(self.table.columns)) > 1):
            return {**settings, "columns": self.table.columns}
        return settings

    def told(self, model: Any) -> dict[str, Any]:
        """What the record says of a table's columns: the texts of categories, and in words what each column was taken as."""
        context = {"context": None if self.context is None else self.context.to_dict()}
        if self.table is None:
            return {"categories": None, "held": "", **context}
        categories = [list(texts) for texts in self.table.categories]
        if getattr(model, "columns", None) and len(set(self.table.columns)) > 1:
            return {"categories": categories, "held": self.table.words() + self._codes(), **context}
        seen = getattr(model, "likelihood", None) or ("categorical" if self.prepared.get("counts") else "continuous")
        return {"categories": categories, "held": f"{seen}: all {len(categories)}", **context}

    def _codes(self) -> str:
        """Columns of numbers that look like codes of categories."""
        table = cast(Table, self.table)
        numbers = zip(table.names, table.columns, table.x.unbind(1))
        found = [name for name, kind, column in numbers if kind == "continuous" and _few_values(column)]
        return f" (few whole values in {', '.join(found)}: categories?)" if found else ""


@dataclass(frozen=True)
class Reading:
    """How a table is read.

    Attributes:
        columns: Names of the columns to take; None for all.
        without: Names of columns to leave out.
        categorical: Names of columns of numbers that are categories.
        complete: Whether rows with missing entries are left out.
        context: Names of columns that the others are conditioned on; they need not be among ``columns``.
    """

    columns: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    complete: bool = False
    context: tuple[str, ...] = ()

    def table(self, source: str) -> Table:
        """The table of a file, the context's columns among the others."""
        columns = self.columns
        for name in self.context:
            check_choice("--context", name, pgen.data.column_names(source))
            if name in self.without:
                raise ValueError(f"--context and --without both name {name!r}; take it out of one")
        if columns is not None:
            columns += tuple(name for name in self.context if name not in columns)
        if self.without:
            names = columns or pgen.data.column_names(source)
            for name in self.without:
                check_choice("--without", name, names)
            columns = tuple(name for name in names if name not in self.without)
        table = pgen.data.table(source, columns, categories=self.categorical)
        return _told_complete(table) if self.complete else table


def _told_complete(table: Table) -> Table:
    """The rows without a missing entry, and a line that says how many are left out."""
    whole = _complete(table)
    if left := len(table.x) - len(whole.x):
        print(f"note: {left} of {len(table.x)} rows have missing entries and are left out", file=sys.stderr)
    return whole


def _complete(table: Table) -> Table:
    """The rows without a missing entry."""
    whole = ~table.x.isnan().any(1)
    if not bool(whole.any()):
        raise ValueError(f"{table.name} has no row without a missing entry; leave columns out with --without")
    return replace(table, x=table.x[whole])


_FEW_VALUES = 10


def _few_values(column: Tensor) -> bool:
    """Whether a column holds whole numbers of few values, as codes do."""
    seen = column[~column.isnan()]
    return bool((seen == seen.round()).all()) and len(seen.unique()) <= _FEW_VALUES


def _takes_columns(name: str) -> bool:
    """Whether a family knows kinds of the columns of a table; sequences have columns in each frame."""
    family = pgen.models.REGISTRY[name]
    return "columns" in inspect.signature(family).parameters and "lengths" not in family.also


def _takes_context(name: str) -> bool:
    """Whether a family that the command line can make takes a context."""
    return {"context_dim", "event_shape"} <= set(inspect.signature(pgen.models.REGISTRY[name]).parameters)


def _with_kinds(settings: dict[str, Any], context: ContextColumns, size: int) -> dict[str, Any]:
    """Settings of a family whose ``columns`` go on over the context, with the kinds of its numbers if any is no number."""
    kinds = context.kinds
    if set(kinds) == {"continuous"}:
        return settings
    columns = settings.get("columns") or ["continuous"] * size
    found = {**settings, "columns": [*columns, *kinds] if len(columns) == size else columns}
    found.pop("preprocess", None)  # it goes with numbers alone
    return found


def _check_takes(name: str, table: Table) -> None:
    """Refuse categories and missing entries where the family knows neither."""
    families = pgen.models.REGISTRY
    texts = [column for column, categories in zip(table.names, table.categories) if categories]
    if texts and not _takes_columns(name):
        takes = [family for family in sorted(families) if _takes_columns(family)]
        raise ValueError(
            f"{name} takes numbers alone, and {_listed(texts)} categories: choose {_either(takes)}, or leave such columns "
            f"out with --without{', or condition on them with --context' if _takes_context(name) else ''}"
        )
    if empty := next((column for column, count in table.missing.items() if count == len(table.x)), None):
        raise ValueError(f"column {empty!r} is missing in all {len(table.x)} rows; leave it out with --without")
    takes = [family for family in sorted(families) if "observed" in families[family].also]
    _check_missing(name, table, f"choose {_either(takes)}, or leave such rows out with --complete")


def _check_missing(name: str, table: Table, remedy: str) -> None:
    """Refuse missing entries where the family does not know them."""
    if not table.missing or "observed" in pgen.models.REGISTRY[name].also:
        return
    (column, count), *others = table.missing.items()
    more = f", and {len(others)} more column{'s have' if len(others) > 1 else ' has'} some" if others else ""
    raise ValueError(
        f"{count} of {len(table.x)} entries are missing in column {column!r}{more}, which {name} cannot take: {remedy}"
    )


def _either(names: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _listed(names: list[str]) -> str:
    return f"column {names[0]!r} holds" if len(names) == 1 else f"columns {', '.join(names)} hold"


def check_settings(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the family ``name``, those that are None left out.

    Raises:
        ValueError: If the family has no such setting, or a value is not of its kind, in one line.
    """
    family = pgen.models.REGISTRY[name]
    accepted = inspect.signature(family).parameters
    if "event_shape" not in accepted:
        raise ValueError(f"{name} is made of other models, which the command line cannot name; use pgen.models in Python")
    known = [key for key in accepted if key not in ("event_shape", "preprocess", "seed")]
    offered = settings_of(name)
    given = {key: value for key, value in settings.items() if value is not None}
    for key, value in given.items():
        if key == "likelihood" and family.has_density:  # it says how values are seen, whether the family asks or not
            continue
        if key not in known:
            option = f"--{key.replace('_', '-')}" if key in _OPTIONS else f"--set {key}={value}"
            raise ValueError(f"{option}: {name} has no setting {key!r}; leave it out{nearest(key, offered)}")
        _check_kind(name, key, value, str(accepted[key].annotation))
    return given


_OPTIONS = ("latent_dim", "likelihood")  # settings that the command line has an option for
_PLAIN_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,), "float": (int, float), "str": (str,), "bool": (bool,), "Sequence": (list,), "Literal": (str,),
    "None": (type(None),), "tuple": (list,),
}  # fmt: skip
_PARTS_OF_TUPLE = re.compile(r"tuple\[((?:int|float)(?:, (?:int|float))*)\]")
_IN_PYTHON = {"num_labels": "the class of each datum"}
"""What settings of plain types need beside them that only a program can give."""


def _check_kind(name: str, key: str, value: Any, annotation: str, what: str = "setting") -> None:
    """Compare a value with the plain types in an annotation; arguments that no plain value can be are refused."""
    if key in _IN_PYTHON:
        raise ValueError(
            f"the {what} {key!r} of {name} needs {_IN_PYTHON[key]}, which the command line cannot give; use Python"
        )
    words = _words(annotation)
    if not _is_plain(key, annotation):
        raise ValueError(f"the {what} {key!r} of {name} is {annotation}, which the command line cannot give; use Python")
    wrong = isinstance(value, bool) and "bool" not in words
    if wrong or not any(isinstance(value, _PLAIN_KINDS[word]) for word in words if word in _PLAIN_KINDS):
        such = f", such as --set {key}=[64,64]" if annotation.startswith("Sequence[int]") else ""
        raise ValueError(f"the {what} {key!r} of {name} should be {annotation}{such}, got {value!r}")
    parts = _PARTS_OF_TUPLE.search(annotation)
    if isinstance(value, list) and parts:
        kinds = [_PLAIN_KINDS[part.strip()] for part in parts[1].split(",")]
        if len(value) != len(kinds) or not all(
            isinstance(part, kind) and not isinstance(part, bool) for part, kind in zip(value, kinds)
        ):
            such = ",".join("3" if kind == (int,) else "0.5" for kind in kinds)
            raise ValueError(f"the {what} {key!r} of {name} should be {parts[0]}, such as --set {key}=[{such}], got {value!r}")


def _words(annotation: str) -> list[str]:
    """The types that an annotation names, without what stands in brackets."""
    return re.findall(r"[A-Za-z_]+", re.sub(r"\[[^\]]*\]", "", annotation))


def _is_plain(key: str, annotation: str) -> bool:
    """Whether the command line can give such a setting."""
    return key not in _IN_PYTHON and any(word in _PLAIN_KINDS and word != "None" for word in _words(annotation))


def settings_of(name: str) -> list[str]:
    """The settings of a family that the command line can give; of one made of other models none."""
    accepted = inspect.signature(pgen.models.REGISTRY[name]).parameters
    if "event_shape" not in accepted:
        return []
    hidden = ("event_shape", "preprocess", "seed")
    return [key for key, p in accepted.items() if key not in hidden and _is_plain(key, str(p.annotation))]


def parse_objective(text: str, *, program: bool = False) -> tuple[str, dict[str, Any]]:
    """``"adversarial:loss=hinge,critic_moves=2"`` as the name of an objective and its arguments, checked.

    Args:
        text: What ``--objective`` was given.
        program: Whether it is for a program of the user's own: a bound, then.

    Raises:
        ValueError: If there is no such objective or argument, or a value is not of its kind, in one line.

    Example:
        >>> parse_objective("adversarial:loss=hinge,critic_moves=2")
        ('adversarial', {'loss': 'hinge', 'critic_moves': 2})
        >>> parse_objective("simple")
        ('simple', {})
    """
    name, _, rest = text.partition(":")
    check_choice("--objective", name, tuple(OBJECTIVES), _OBJECTIVES_KNOWN_AS)
    if program and name not in _BOUNDS:
        raise ValueError(f"--objective {name} does not go with a program of your own; take {_either(list(_BOUNDS))}")
    accepted = {field.name: str(field.type) for field in fields(OBJECTIVES[name]) if field.init and field.repr}
    offered = [key for key, annotation in accepted.items() if key == "noise" or _is_plain(key, annotation)]
    given = parse_settings(re.split(_NEXT_ASSIGNMENT, rest) if rest else [], f"--objective {name}:", "KEY=VALUE,...")
    for key, value in given.items():
        if key not in offered:
            has = f"has no argument {key!r}{nearest(key, offered)}" if offered else f"takes no arguments, got {key!r}"
            raise ValueError(f"--objective {name} {has}")
        if key == "noise":
            _named("--objective noise_contrastive:noise", str(value))
        elif not ("Schedule" in accepted[key] and _is_line(value)):
            _check_kind(name, key, value, accepted[key], "argument")
    return name, given


def _is_line(value: Any) -> bool:
    """Whether a value gives the two ends of a straight line."""
    numbers = isinstance(value, list) and all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in value)
    return numbers and len(value) == 2


def objective(text: str | None, x: Any, seed: int) -> Any:
    """The objective that ``--objective`` names, for data like ``x``; None for the model's own.

    A number that may change takes ``[START,END]``: a straight line over all of the training. ``noise`` is the name of a family.
    """
    if text is None:
        return None
    name, given = parse_objective(text)
    given = {key: objectives.Linear(*value) if _is_line(value) else value for key, value in given.items()}
    if name == "noise_contrastive":
        given["noise"] = _noise(str(given.get("noise", "gaussian")), x, seed)
    return OBJECTIVES[name](**given)


def _noise(name: str, x: Tensor, seed: int) -> Any:
    """A family of its own settings for the noise of noise contrast, which sees data as the model does."""
    family, given = cast(Any, pgen.models.REGISTRY[_named("noise", name)]), {"seed": seed}
    accepted = inspect.signature(family).parameters
    likelihood = "bernoulli" if bool(((x == 0) | (x == 1)).all()) else "gaussian"
    given |= {key: value for key, value in family.suggest(x, {"likelihood": likelihood}).items() if key != "preprocess"}
    if needed := [key for key, p in accepted.items() if p.default is p.empty and key not in ("event_shape", *given)]:
        raise ValueError(f"--objective noise_contrastive:noise={name}: {name} needs a value of {needed[0]!r}; take gaussian")
    return family(tuple(x.shape[1:]), **{key: value for key, value in given.items() if key in accepted})


def parse_settings(
    assignments: Sequence[str], option: str = "--set", such: str = "key=value, such as --set rank=2"
) -> dict[str, Any]:
    """``["rank=2", "hidden=[64, 64]"]`` as a dict: values are JSON, or else text.

    Example:
        >>> parse_settings(["rank=2", "covariance=low_rank", "hidden=[8, 8]"])
        {'rank': 2, 'covariance': 'low_rank', 'hidden': [8, 8]}
    """
    found: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes {such}, got {text!r}")
        if key in found:
            raise ValueError(f"{option} gives {key!r} twice")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _preprocessed(transform: Any) -> dict[str, Any]:
    """What the model itself does to the data, for the record."""
    if transform is None:
        return {}
    settings = transform.settings()
    parts = settings.get("parts", [settings])
    found: dict[str, Any] = {"standardised": True} if any(p["transform"] == "standardize" for p in parts) else {}
    levels = [p["levels"] for p in parts if p["transform"] == "dequantize"]
    return found | ({"dequantised": levels[0]} if levels else {})


def _load(source: str, part: str | None = None) -> Loaded:
    """``pgen.data.load``, and the parts of the bundled sets that are split: ``digits:test``."""
    name, _, named = source.partition(":")
    if name not in SPLITS or Path(source).exists() or not (named or part):
        return pgen.data.load(source)
    part = named or str(part)
    check_choice(f"{name}:", part, _PARTS)
    split = SPLITS[name]()
    return Loaded(getattr(split, part), None, getattr(split.labels, part, None), f"{name}:{part}")


def _is_table(source: str) -> bool:
    return source.lower().endswith((".csv", ".csv.gz")) and Path(source).is_file()


def _held_out(
    source: str, seed: int, reading: Reading, *, test: bool
) -> tuple[Table | None, ContextColumns | None, list[Loaded]]:
    """What is modelled, if it is a table; what it is conditioned on; and data to fit, to validate on, and to test on if asked
    for: the split of the source itself, or shares drawn by the seed."""
    if _is_table(source):
        table, context, loaded = _read_table(source, reading)
        return table, context, _shares(loaded, source, seed, test=test)
    if replace(reading, context=()) != Reading():
        raise ValueError(f"{source} is no table with named columns; leave --columns, --without, --categorical, --complete out")
    if source in SPLITS and not Path(source).exists():
        found = [_conditioned(source, _load(source, part), reading.context) for part in (_PARTS if test else _PARTS[:2])]
        return None, found[0][0], [loaded for _, loaded in found]
    context, loaded = _conditioned(source, _load(source), reading.context)
    return None, context, _shares(loaded, source, seed, test=test)


def _read_table(source: str, reading: Reading) -> tuple[Table, ContextColumns | None, Loaded]:
    """The columns of a table that are modelled, those that they are conditioned on, and both as data."""
    table = reading.table(source)
    if not reading.context:
        return table, None, _of_table(table)
    table, beside = table.split(reading.context)
    context = ContextColumns.of(beside)
    loaded = _of_table(table)
    return table, context, replace(loaded, data={"x": table.x, "context": context.encode(beside.x)})


def _conditioned(source: str, loaded: Loaded, names: tuple[str, ...]) -> tuple[ContextColumns | None, Loaded]:
    """Data that are no table with their context: an array of that name, or their classes where ``names`` ask for them."""
    if _is_conditioned(loaded.data):
        if names:
            raise ValueError(f"{source} has its context in the array 'context', which is taken as it is; leave --context out")
        data = cast(dict[str, Tensor], loaded.data)
        vectors = data["context"].flatten(1) if data["context"].dim() > 1 else data["context"][:, None]
        vectors = vectors.to(torch.get_default_dtype())
        return ContextColumns.plain(vectors.shape[1]), replace(loaded, data={"x": data["x"], "context": vectors})
    if not names:
        return None, loaded
    if loaded.labels is None:
        raise ValueError(
            f"{source} has no columns for a context; give a table (.csv), or leave --context out and give an .npz with the "
            "arrays 'x' and 'context'"
        )
    if names != (_LABEL,):
        raise ValueError(f"{source} has classes to condition on, called {_LABEL!r}; got --context {','.join(names)}")
    context = ContextColumns.classes(_LABEL, int(loaded.labels.max()) + 1)
    return context, _with_labels(loaded, context)


def _with_labels(loaded: Loaded, context: ContextColumns) -> Loaded:
    """Data with their classes as context."""
    values = cast(Tensor, loaded.labels)[:, None].to(torch.get_default_dtype())
    return replace(loaded, data={"x": _x(loaded.data), "context": context.encode(values)})


def _is_conditioned(data: Any) -> bool:
    return isinstance(data, dict) and set(data) == {"x", "context"}


def _x(data: Any) -> Any:
    """What is modelled, of data with or without a context."""
    return data["x"] if isinstance(data, dict) and "x" in data else data


def _shares(loaded: Loaded, source: str, seed: int, *, test: bool) -> list[Loaded]:
    """Data to fit, to validate on, and to test on if asked for, drawn by the seed."""
    data = loaded.data
    if not isinstance(data, Tensor) and not _is_conditioned(data):
        raise ValueError(
            f"{source} holds several arrays; a family is fitted to one: save it as .npy, or as 'x' beside a 'context' in .npz"
        )
    count = pgen.data.num_rows(data)
    held = round(VALIDATION_SHARE * count)
    tested = held + round(TEST_SHARE * count) if test else held
    if not held:
        raise ValueError(f"{source} has {count} row{'s' * (count > 1)}; a family needs at least 6, some of which are held out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = [order[tested:], order[:held], order[held:tested]][: 3 if test else 2]
    return [replace(loaded, data=pgen.data.rows(data, rows), labels=_at(loaded.labels, rows)) for rows in parts]


def _of_table(table: Table) -> Loaded:
    named = table.names != tuple(str(number) for number in range(len(table.names)))
    return Loaded(table.x, table.names if named else None, None, table.name)


def _at(labels: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if labels is None else labels[rows]


def grey_of(families: dict[str, dict[str, Any]]) -> str:
    """What families, given with their settings, see in grey images in [0, 1], all of them the same.

    ``"bits"`` where one of them has a distribution of bits; ``"real"`` numbers where all know their densities up to a constant;
    ``"levels"``, which other densities need to be finite, for the rest; nothing for a family that has no density.
    """
    kinds = {name: pgen.models.REGISTRY[name] for name in families}
    if not all(family.has_density for family in kinds.values()):
        return ""
    if any(_has_bits(family, families[name]) for name, family in kinds.items()):
        return "bits"
    return "real" if all(issubclass(family, UnnormalisedModel) for family in kinds.values()) else "levels"


def _has_bits(family: Any, settings: dict[str, Any]) -> bool:
    accepted = inspect.signature(family).parameters
    return "likelihood" in accepted or ("visible" in accepted and settings.get("visible") != "gaussian")


def note_of(about: dict[str, Any], names: Sequence[str]) -> str:
    """A line that says what became of grey images; empty where they are what they were."""
    prepared = about["prepared"]
    if "binarised_at" in prepared:
        takes = any("likelihood" in inspect.signature(pgen.models.REGISTRY[name]).parameters for name in names)
        keep = "--likelihood categorical or gaussian keeps" if takes else "--likelihood gaussian keeps"
        return f"grey images are taken as bits, 1 from {prepared['binarised_at']:g} on; {keep} their values"
    return f"grey images are taken as levels 0 to {prepared['levels'] - 1}" if "levels" in prepared else ""


def _observation(x: Any, likelihood: str | None, seen: str = "bits") -> tuple[str, dict[str, Any]]:
    """The likelihood, and what is done to the data for its sake: recorded, shown, and done again to later data.

    Ones and zeros are Bernoulli, counts up to 255 categorical, other tables Gaussian. Grey images in [0, 1] are, unless another
    likelihood is asked for, what ``seen`` says: ``"bits"``, binarised at one half; ``"levels"``, counted in their own levels as
    with ``categorical``, or real where they have none; or ``"real"``.
    """
    low, high = float(x.min()), float(x.max())
    binary = bool(((x == 0) | (x == 1)).all())
    counts = low >= 0 and high <= 255 and bool((x == x.round()).all())
    if likelihood is None:
        grey = x.dim() > 2 and low >= 0 and high <= 1
        if grey and not binary and seen != "bits":
            likelihood = "categorical" if seen == "levels" and _levels_of(x) else "gaussian"
        else:
            likelihood = "bernoulli" if binary or grey else "categorical" if counts else "gaussian"
    if likelihood == "bernoulli" and not binary:
        if low < 0 or x.dim() <= 2:
            raise ValueError(f"--likelihood bernoulli needs zeros and ones, the data lie in [{low:g}, {high:g}]; try gaussian")
        return likelihood, {"binarised_at": 0.5 if high <= 1 else high / 2}
    if likelihood in LEVELS and not counts:
        levels = _levels_of(x) if low >= 0 and high <= 1 else 0
        if not levels:
            raise ValueError(f"--likelihood {likelihood} needs counts 0, 1, ..., 255 (or grey levels in [0, 1]); try gaussian")
        return likelihood, {"levels": levels}
    return likelihood, {"counts": True} if likelihood in LEVELS else {}


def _levels_of(x: Tensor) -> int:
    """Of how many levels numbers in [0, 1] are; 0 if of none."""
    return next((n for n in _LEVELS if torch.allclose(x * (n - 1), (x * (n - 1)).round(), atol=1e-3)), 0)


def _prepare(x: Any, prepared: dict[str, Any]) -> Any:
    """Data as the model was fitted to: ``prepared`` comes from ``_observation``."""
    if _is_conditioned(x):
        return {**x, "x": _prepare(x["x"], prepared)}
    if "binarised_at" in prepared:
        return (x >= float(prepared["binarised_at"])).to(torch.get_default_dtype())
    if "levels" in prepared:
        return (x * (int(prepared["levels"]) - 1)).round().long()
    return x.long() if prepared.get("counts") else x


def _how_given(model: Callable[..., Any], loaded: Loaded) -> str:
    """How data become arguments: a table whose columns are all parameters of the model goes in by name."""
    columns = loaded.columns or ()
    if columns and set(columns) <= set(inspect.signature(model).parameters):
        return "by name"
    return "one column" if len(columns) == 1 else "whole"


def _arguments(loaded: Loaded, given: str) -> Batch:
    x = loaded.data
    if isinstance(x, Tensor) and given == "by name":
        return {name: x[:, i] for i, name in enumerate(loaded.columns or ())}
    return x[:, 0] if isinstance(x, Tensor) and given == "one column" and x.dim() == 2 else x


def _about(source: str, loaded: Loaded) -> dict[str, Any]:
    x = loaded.data
    shapes = list(x.shape[1:]) if isinstance(x, Tensor) else None
    rows = len(x) if isinstance(x, Tensor) else len(next(iter(x.values() if isinstance(x, dict) else x)))
    return {"source": source, "train": rows, "shape": shapes, "columns": list(loaded.columns) if loaded.columns else None}


# --- the folder ------------------------------------------------------------------------------------------------------------


def has_checkpoint(out: Path) -> bool:
    """Whether a fit was interrupted in this folder."""
    return any((out / CHECKPOINT).glob("checkpoint*"))


def discard_checkpoint(out: Path) -> None:
    """Remove the checkpoints of a fit; refuses where one is running."""
    folder = out / CHECKPOINT
    if folder.is_dir():
        with Checkpoint(folder) as checkpoint:
            checkpoint.clear()
        with contextlib.suppress(OSError):  # the user keeps something of their own there
            folder.rmdir()


def objective_of(out: Path) -> str | None:
    """The ``--objective`` of the interrupted fit in a folder, where it was left a record; None for the model's own."""
    return read_record(out)["model"].get("objective") if (out / RECORD).is_file() else None


def shown(folder: Path) -> list[str]:
    """The folder of pictures that a fit drew as it went on, if there are any, as a list of names."""
    return [f"{PROGRESS}/"] if any((folder / PROGRESS).glob("step-*.png")) else []


def save_run(out: Path, subject: Subject, fitted: Run, *, finished: bool = True) -> dict[str, Any]:
    """Write model and record into ``out``, and pictures of a finished fit, whose checkpoints go.

    Returns:
        The record, with the files written and why others are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in (*PICTURES, REPORT):
        (out / name).unlink(missing_ok=True)
    subject.model.save(out / MODEL)
    record = {"schema": SCHEMA, "pgen": pgen.__version__, "out": str(out), **subject.about, "run": summary(fitted)}
    write_record(out, record, fitted)
    drawn, reasons = _draw(out, subject, fitted) if finished else ([], {})
    if finished:
        discard_checkpoint(out)
    return {**record, "files": [MODEL, RECORD, *drawn, *shown(out)], "not_drawn": reasons}


def _draw(out: Path, subject: Subject, fitted: Run) -> tuple[list[str], dict[str, str]]:
    """Draw what the model can answer: names of the pictures, and why the others are missing."""
    drawn, reasons = [], {}
    for name, draw in _pictures(subject, fitted).items():
        try:
            pgen.plots.save(draw(), out / name)
            drawn.append(name)
        except pgen.NotAvailable as reason:
            if name not in OF_LATENTS:  # a family without latents lacks nothing
                reasons[name] = str(reason)
    return drawn, reasons


def _pictures(subject: Subject, fitted: Run) -> dict[str, Callable[[], Any]]:
    plots, model = pgen.plots, subject.model
    pictures: dict[str, Callable[[], Any]] = {}
    if fitted.steps and len(fitted.history.get("loss", ())):
        game = any(name.endswith("_grad_norm") for name in fitted.history)
        pictures["game.png" if game else "bound.png"] = lambda: (plots.plot_game if game else plots.plot_bound)(fitted)
    if "family" not in subject.about["model"]:
        return pictures
    train, names = _x(subject.train), subject.about["data"]["columns"]
    few, many = (24, 64) if train.dim() > 2 else (500, 1000)
    shown = pgen.data.rows(subject.validation, slice(few))
    plane = (
        not _is_conditioned(subject.train)
        and train.shape[1:] == (2,)
        and all(kind == "continuous" for kind in model.settings().get("columns") or ())
    )
    if plane and model.has_density and not bool(train.isnan().any()):
        score = model.log_prob(train[:2], progress=False)
        if (score.kind, score.measure) == ("exact", "density"):
            pictures["density.png"] = lambda: plots.density(model, train, names=names)
    return pictures | {
        "samples.png": lambda: plots.of_samples(
            model, _drawn(model, many, subject.contexts(many), fitted.seed), reference=train[:many], names=names
        ),
        "reconstructions.png": lambda: plots.reconstructions(_x(shown), model.reconstruct(shown), names=names),
        "latent.png": lambda: plots.latent_space(
            model.encode(pgen.data.rows(subject.train, slice(2000))), _at(subject.labels, torch.arange(len(train))[:2000])
        ),
    }


def _drawn(model: Any, num: int, context: Tensor | None, seed: int) -> Tensor:
    """Samples, at contexts where the model has one."""
    return cast(Tensor, model.sample(num, seed=seed) if context is None else model.sample(num, context=context, seed=seed))


# --- comparisons -----------------------------------------------------------------------------------------------------------


def _named(option: str, name: str) -> str:
    """The family of a name, which may be a short one."""
    name = SHORT.get(name, name)
    check_choice(option, name, sorted(pgen.models.REGISTRY))
    return name


def check_models(text: str) -> list[str]:
    """``"gaussian,vae"`` as a list of families that have a density."""
    families = pgen.models.REGISTRY
    names = [_named("--models", name.strip()) for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"--models takes families separated by commas, each once, such as gaussian,vae; got {text!r}")
    for name in names:
        if not families[name].has_density:
            raise ValueError(f"--models: {name} has no density to compare; leave it out; judge its samples by pgen evaluate")
    return names


def parse_each(assignments: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["vae.latent_dim=2"]`` as settings by family, checked."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for text in assignments:
        name, dot, assignment = text.partition(".")
        name = SHORT.get(name, name)
        if not dot or name not in found:
            raise ValueError(f"--set takes MODEL.KEY=VALUE with a model of --models ({', '.join(names)}), got {text!r}")
        found[name].append(assignment)
    return {name: check_settings(name, parse_settings(parts)) for name, parts in found.items()}


def fit_each(
    parts: Parts,
    names: Sequence[str],
    settings: dict[str, dict[str, Any]],
    training: dict[str, Any],
    say: Callable[[str], None] | None,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Fit families to the same data.

    Args:
        parts: The data.
        names: Of families.
        settings: Of each family.
        training: Arguments of ``fit``; epochs and batch size go to families without a closed form.
        say: Told a line about each fit.

    Returns:
        Fitted models, what there is to say about each fit, and why others could not be fitted, each by name.
    """
    fitted, about, failed = {}, {}, {}
    alike, shown = not all(map(_takes_columns, names)), ""
    for name in names:
        try:
            model = Subject.of_parts(parts, name, settings[name], training["seed"], alike=alike).model
            options = {k: v for k, v in training.items() if k in ("seed", "progress")} if model.solvable else training
            run = model.fit(parts.batch(0), validation=parts.batch(1), **options)
            normalizer = normalised(model, parts.batch(1), seed=training["seed"], progress=training["progress"])
        except (ValueError, FloatingPointError) as error:
            failed[name] = str(error)
            if say:
                say(f"{name}: not fitted: {error}")
            continue
        size = sum(p.numel() for p in model.parameters())
        fitted[name], about[name] = model, {"settings": model.settings(), "parameters": size, **summary(run)}
        if say:
            if (held := parts.told(model)["held"]) not in ("", shown):
                say(f"columns: {held}")
                shown = held
            how = f"{run.steps} steps in {run.seconds:.1f} s" if run.steps else run.stopped
            say(f"{name}: {run.figure}, {how}{f'; {normalizer}' if normalizer else ''}")
    return fitted, about, failed


def compare_runs(
    folders: Sequence[str], source: str, options: dict[str, Any], say: Callable[[str], None] | None = None
) -> tuple[Comparison, dict[str, Any]]:
    """Compare fitted runs of families on data, which each sees prepared as it was for its fit.

    Args:
        folders: Of runs.
        source: Data.
        options: Of ``log_prob``.
        say: Told a line about each normaliser that has to be estimated.
    """
    if len(set(folders)) != len(folders):
        raise ValueError(f"a run is named twice: {' '.join(folders)}")
    scores, about = {}, {}
    seen: list[Any] = []
    for folder in folders:
        model, record = open_run(Path(folder), None)
        data = batch(source, record)
        if seen and not _same(data, seen[0]):
            raise ValueError(
                f"{folders[0]} and {folder} see {source} differently; fit both to the same columns with the same --likelihood"
            )
        seen.append(data)
        scores[folder], normalizer = scored(model, data, **options)
        if say and normalizer:
            say(f"{folder}: {normalizer}")
        about[folder] = {"settings": record["model"].get("settings"), **record["run"]}
    return pgen.compare(scores), about


def _same(one: Any, other: Any) -> bool:
    """Whether two arrays hold the same, missing entries at the same places; contexts may differ."""
    one, other = _x(one), _x(other)
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def save_models(out: Path, fitted: dict[str, Any]) -> None:
    """Write each model of a comparison to a file of its name."""
    out.mkdir(parents=True, exist_ok=True)
    for name, model in fitted.items():
        model.save(out / f"{name}.pgen")


def save_comparison(out: Path, found: Comparison, result: dict[str, Any]) -> list[str]:
    """Write the table as Markdown and JSON, and the picture; returns the names of all files of the comparison."""
    out.mkdir(parents=True, exist_ok=True)
    stem = Path(COMPARISON).stem
    found.to_markdown(out / f"{stem}.md")
    pgen.plots.save(pgen.plots.comparison(found), out / f"{stem}.png")
    models = [f"{name}.pgen" for name in found.names if (out / f"{name}.pgen").is_file()]
    files = [COMPARISON, f"{stem}.md", f"{stem}.png", *models]
    text = json.dumps(plain({**result, "files": files}), indent=1, allow_nan=False)
    (out / COMPARISON).write_text(text + "\n", encoding="utf-8")
    return files


# --- the folder, read ------------------------------------------------------------------------------------------------------


def open_run(folder: Path, program: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """The fitted model of a run folder, and its record. Code comes from where the user says, never from the folder.

    Args:
        folder: What ``save_run`` wrote.
        program: ``FILE.py:MODEL [FILE.py:GUIDE]`` where the run is of the user's own program.
    """
    record = read_record(folder)
    check_model(folder)
    about = record["model"]
    if "file" not in about:
        if program:
            raise ValueError(f"--program does not go with {folder}, a run of {about.get('family')}; leave it out")
        model: Any = pgen.load(folder / MODEL)
    elif not program:
        again = " ".join(f"--program {about['file']}:{name}" for name in about.get("names") or ())
        raise ValueError(f"{folder} is of a program of your own, whose code is not in it: name it again, {again}")
    else:
        own = Program.load(program)
        if own.sha256 != about.get("sha256"):
            print(f"note: {own.file} has changed since the fit", file=sys.stderr)
        model = own.pair(about.get("guide")).load(folder / MODEL)
    model.last_run = run_of(record)
    return model, record


def check_model(folder: Path) -> None:
    """Refuse a run folder without its model file."""
    if not (folder / MODEL).is_file():
        raise ValueError(f"{folder} has no {MODEL}, which `pgen fit` wrote beside {RECORD}; bring it back, or fit again")


def batch(source: str, record: dict[str, Any]) -> Any:
    """Data for a question, prepared and given as they were to the fit; of a bundled set its test data."""
    about = record["data"]
    loaded = _loaded(source, record, None if "file" in record["model"] else "test")
    return _prepare(_arguments(loaded, about["given"]), about["prepared"])


@dataclass
class HeldOut:
    """Data to judge samples by.

    Attributes:
        real: Data that the model was not fitted to, prepared as its own.
        train: What it was fitted to; None if that is not at hand.
        labels: Classes of ``train``, if it has any.
        about_real: What ``real`` is, in words.
        about_train: What ``train`` is, or why there is none.
        context: The contexts of ``real``, if the model has one.
    """

    real: Tensor
    train: Tensor | None
    labels: Tensor | None
    about_real: str
    about_train: str
    context: Tensor | None = None

    @property
    def batch(self) -> Any:
        """``real`` as the model takes it."""
        return self.real if self.context is None else {"x": self.real, "context": self.context}

    def sample(self, model: Any, most: int, seed: int) -> Tensor:
        """As many samples as ``real`` has, at its contexts, or at ``most`` of them drawn by the seed."""
        num = min(most, len(self.real))
        rows = torch.randperm(len(self.real), generator=torch.Generator().manual_seed(seed))[:num].sort().values
        return _drawn(model, num, _at(self.context, rows), seed)


def held_out(source: str, train: str | None, record: dict[str, Any]) -> HeldOut:
    """What to judge the samples of a run by: ``source``, or what the fit held out where that is what was fitted.

    Args:
        source: Data that the model was not fitted to.
        train: What it was fitted to; None for what the record names, where that is still there.
        record: Of the run.
    """
    about = record["data"]
    loaded: Loaded | None
    loaded, said = _fitted_to(record) if train is None else (_loaded(train, record, "train"), train)
    if source == about["source"] and not _is_split(source):
        held, said_real = _parts_of(record)[1], f"the rows of {source} that the fit held out"
    else:
        held, said_real = _loaded(source, record, "test"), source

    def prepared(part: Loaded) -> Any:
        found = _prepare(_arguments(part, about["given"]), about["prepared"])
        if not isinstance(found, Tensor) and not _is_conditioned(found):
            raise ValueError(f"{source} holds several arrays; samples are judged one at a time: use pgen.evaluation.samples")
        return found

    real, fitted = prepared(held), None if loaded is None else _x(prepared(loaded))
    context = real["context"] if _is_conditioned(real) else None
    real, labels = _x(real), None if loaded is None else loaded.labels
    said_real += f" ({len(real)}{'' if context is None else ', samples at their contexts'})"
    return HeldOut(real, fitted, labels, said_real, said, context)


def _is_split(source: str) -> bool:
    return source.partition(":")[0] in SPLITS and not Path(source).exists()


def _parts_of(record: dict[str, Any]) -> list[Loaded]:
    """What a run was fitted to and what it held out, read and drawn again."""
    source, seed = record["data"]["source"], record["run"]["seed"]
    if source in SPLITS and not Path(source).exists():
        return [_loaded(source, record, part) for part in _PARTS[:2]]
    return _shares(_loaded(source, record, None), source, seed, test=False)


def _fitted_to(record: dict[str, Any]) -> tuple[Loaded | None, str]:
    """The rows that a run was fitted to, drawn again from its source by its seed; or why they cannot be had."""
    source = record["data"]["source"]
    try:
        loaded = _parts_of(record)[0]
    except (OSError, ValueError) as error:
        return None, f"not at hand ({error}); name them with --train"
    if pgen.data.num_rows(loaded.data) != record["data"]["train"]:
        return None, f"{source} has changed since the fit; name the training data with --train"
    return loaded, f"{source} ({record['data']['train']})"


def likelihood(model: Any, x: Any, **options: Any) -> dict[str, Any]:
    """The log-density of data in plain numbers, or why there is none; ``text`` says it in words."""
    try:
        score, normalizer = scored(model, x, **options)
    except (pgen.NotAvailable, FloatingPointError) as reason:
        return {"kind": None, "mean": None, "std_error": None, "bits_per_dim": None, "text": f"not available: {reason}"}
    found = {"kind": score.kind, "mean": score.mean, "std_error": score.std_error, "bits_per_dim": bits_per_dim(score)}
    return {**found, "text": f"{score}; {normalizer}" if normalizer else str(score)}


def scored(model: Any, x: Any, *, seed: int = 0, progress: bool = True, **options: Any) -> tuple[Score, str]:
    """The log-density of data, for which the normaliser of a family that has none yet is estimated where there is one for all.

    Returns:
        The score, and in words what the normaliser was found to be; empty where none was asked for.
    """
    normalizer = normalised(model, x, seed=seed, progress=progress)
    return model.log_prob(x, seed=seed, progress=progress, **options), normalizer


def normalised(model: Any, x: Any, *, seed: int, progress: bool) -> str:
    """Estimate the normaliser of a family that does not know its own, which takes seconds; say in words what it is, or why not.

    Empty for all other families.
    """
    if not isinstance(model, UnnormalisedModel):
        return ""
    if model.log_prob(pgen.data.rows(x, slice(1)), progress=False).kind != "unnormalised":
        return ""
    if model.context_dim:
        return "not comparable: each context has a normaliser of its own, which log_normalizer(context) estimates in Python"
    return str(model.log_normalizer(seed=seed, progress=progress))


def bits_per_dim(score: Score) -> float | None:
    """Bits a dimension; None of a density without its normaliser."""
    return None if score.kind == "unnormalised" else score.bits_per_dim


def _loaded(source: str, record: dict[str, Any], part: str | None) -> Loaded:
    """Data read as those of the fit were, with the same context, and of the same shape where a family was fitted."""
    loaded = _like_the_fit(source, record, part)
    x = _x(loaded.data)
    if record["model"].get("family") and isinstance(x, Tensor) and list(x.shape[1:]) != record["data"]["shape"]:
        shapes = tuple(x.shape[1:]), tuple(record["data"]["shape"])
        raise ValueError(
            f"a datum of {source} has shape {shapes[0]}, and those of the fit had {shapes[1]}; give data like those"
        )
    return loaded


def _like_the_fit(source: str, record: dict[str, Any], part: str | None) -> Loaded:
    about, context = record["data"], context_of(record)
    if about["categories"] is not None and _is_table(source):
        return _again(source, record, context)
    loaded = _load(source, part)
    if context is None:
        return loaded
    if loaded.labels is not None and context.names == (_LABEL,):
        return _with_labels(loaded, context)
    if not _is_conditioned(loaded.data):
        raise ValueError(
            f"{source} has no context ({context.words()}), which the fit had; give data that have one, as those had"
        )
    return _conditioned(source, loaded, ())[1]


def context_of(record: dict[str, Any]) -> ContextColumns | None:
    """What the model of a run is conditioned on, if anything."""
    found = record["data"].get("context")
    return None if found is None else ContextColumns.from_dict(found)


def given(texts: Sequence[str], record: dict[str, Any]) -> tuple[Tensor, bool]:
    """The values of the context that samples are asked for.

    Args:
        texts: ``NAME=VALUE,...`` once or more often; or one name of a file or set with the columns of the context.
        record: Of the run.

    Returns:
        Values, ``(N, columns)``, and whether they were read from data.

    Raises:
        ValueError: If the run has no context, or it is not given whole, in one line.
    """
    context = context_of(record)
    if context is None:
        raise ValueError("--given does not go with this run, which was fitted without --context; leave it out")
    if len(texts) == 1 and ("=" not in texts[0] or Path(texts[0]).exists()):
        return _read_contexts(texts[0], record, context), True
    values: dict[str, str] = {}
    for assignment in (part for text in texts for part in re.split(_NEXT_ASSIGNMENT, text)):
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or name in values:
            wrong = f"gives {name!r} twice" if equals else f"takes NAME=VALUE,... or one file, got {assignment!r}"
            raise ValueError(f"--given {wrong}")
        values[name] = value
    return context.parse(values, "--given"), False


def _read_contexts(source: str, record: dict[str, Any], context: ContextColumns) -> Tensor:
    if _is_table(source):
        return context.read(source)
    loaded = _loaded(source, record, "test")
    if loaded.labels is not None:
        return loaded.labels[:, None].to(torch.get_default_dtype())
    if context != ContextColumns.plain(context.size):
        raise ValueError(f"--given {source} is no table with the columns of the context ({context.words()})")
    return cast(dict[str, Tensor], loaded.data)["context"]


def sample(
    model: Any, record: dict[str, Any], texts: Sequence[str], num: int | None, seed: int
) -> tuple[Tensor, dict[str, list[str]]]:
    """Draws of a family, of one with a context at what ``texts`` give.

    Args:
        model: The family.
        record: Of its run.
        texts: What ``given`` takes; none for a family without a context.
        num: How many, at each context; None for 64, or one at each row of data.
        seed: Keys them.

    Returns:
        The draws, and the columns of their contexts as texts, by name.
    """
    context = context_of(record)
    if context is None and not texts:
        return _drawn(model, 64 if num is None else num, None, seed), {}
    if context is not None and not texts:
        names = ",".join(f"{name}={(found or ('0',))[0]}" for name, found in zip(context.names, context.categories))
        raise ValueError(f"--given is missing: the run is conditioned on {context.words()}; give it, such as --given {names}")
    values, rows = given(texts, record)
    num = num if num is not None else 1 if rows else 64
    if num < 1:
        raise ValueError(f"-n should be a positive number, got {num}")
    context, values = cast(ContextColumns, context), values.repeat_interleave(num, 0)
    x = _drawn(model, len(values), context.encode(values), seed)
    return x, dict(zip(context.names, map(list, zip(*context.rows(values)))))


def table_of(record: dict[str, Any]) -> Table | None:
    """The columns of the table that a run was fitted to, without rows."""
    categories = record["data"]["categories"]
    if categories is None:
        return None
    names = record["data"]["columns"] or [str(number) for number in range(len(categories))]
    return Table(torch.zeros(0, len(categories)), tuple(names), tuple(map(tuple, categories)), record["data"]["source"])


def _again(source: str, record: dict[str, Any], context: ContextColumns | None) -> Loaded:
    """A table read as that of the fit was: the same columns by name, the same categories."""
    about = record["data"]
    texts = {name: found for name, found in zip(about["columns"] or (), about["categories"]) if found}
    names = about["columns"]
    if context is not None:
        texts |= context.texts()
        names = [*(names or map(str, range(len(about["categories"])))), *context.names]
    table = pgen.data.table(source, names, categories=texts)
    whole = _told_complete(table) if about["prepared"].get("complete") else table
    if record["model"].get("family"):
        _check_missing(record["model"]["family"], whole, f"leave such rows out of {source}, or fit with --complete")
    if context is None:
        return _of_table(whole)
    x, beside = whole.split(context.names)
    return replace(_of_table(x), data={"x": x.x, "context": context.encode(beside.x)})


@contextlib.contextmanager
def columns_named(names: Sequence[str] | None) -> Iterator[None]:
    """Errors that number a constant column say its name too, where it has one, and how to leave it out."""
    try:
        yield
    except ValueError as error:
        found = _CONSTANT.search(str(error))
        if names is None or found is None or type(error) is not ValueError:
            raise
        name = names[int(found[1] or found[2])]
        raise ValueError(f"{error}; that is column {name!r}: leave it out with --without {name}") from error


# --- the record ------------------------------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, Any]:
    """The outcome of a fit in plain numbers and words; ``bound`` is the figure that ``word`` names."""
    validated = len(run.validation.get("bound", ())) > 0
    return {
        "word": run.word,
        "bound": run.bound,
        "bound_of": "validation" if validated else "training",
        "bound_std_error": run.bound_std_error if validated else None,
        "restored": run.restored,
        "stopped": run.stopped,
        "steps": run.steps,
        "epochs": run.epochs,
        "seconds": run.seconds,
        "tier": run.tier,
        "tier_reason": run.tier_reason,
        "skipped": run.skipped,
        "num_data": run.num_data,
        "seed": run.seed,
        "warnings": run.warnings,
    }


def write_record(folder: Path, record: dict[str, Any], run: Run) -> None:
    """Write ``run.json``, beside its target and renamed over it."""
    history = {"history": _thin(run.history), "validation": {name: list(map(float, v)) for name, v in run.validation.items()}}
    text = json.dumps(plain({**record, **history}), indent=1, allow_nan=False)
    temporary = folder / f"{RECORD}.{os.getpid()}.tmp"
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(folder / RECORD)


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a folder.

    Raises:
        ValueError: If it is missing, too large, or not what ``write_record`` writes.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ValueError(f"{folder} has no {RECORD}; is it a folder that `pgen fit` wrote?")
    if path.stat().st_size > _MAX_RECORD:
        raise ValueError(f"{path} is over the limit of {_MAX_RECORD} bytes")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON text: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a record of schema {SCHEMA}; was it written by this version of `pgen fit`?")
    if isinstance(record.get("data"), dict) and record["data"].setdefault("context", None) is not None:
        try:
            context_of(record)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: 'context': {error}; fit again") from None
    for section, types in _SECTIONS.items():
        part, absent = record.get(section), None if section == "model" else ...  # a model has a family or a file
        if not isinstance(part, dict) or not all(isinstance(part.get(name, absent), kinds) for name, kinds in types.items()):
            raise ValueError(f"{path} is damaged: {section!r} is not what `pgen fit` writes; fit again")
    return record


_FACTS = ("word", "stopped", "tier", "tier_reason", "steps", "skipped", "num_data", "seed")
_TEXT, _NUMBER = (str, type(None)), (int, float, type(None))
_SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "family": _TEXT,
        "file": _TEXT,
        "guide": _TEXT,
        "settings": (dict, type(None)),
        "names": (list, type(None)),
        "objective": _TEXT,
    },
    "data": {
        "source": str,
        "train": int,
        "validation": int,
        "shape": (list, type(None)),
        "columns": (list, type(None)),
        "categories": (list, type(None)),
        "held": str,
        "prepared": dict,
        "given": str,
    },
    "run": {
        **dict.fromkeys(("stopped", "tier", "tier_reason", "word", "bound_of"), str),
        **dict.fromkeys(("steps", "skipped", "num_data", "seed"), int),
        **dict.fromkeys(("bound", "bound_std_error", "restored", "epochs", "seconds"), _NUMBER),
    },
    "history": {},
    "validation": {},
}


def run_of(record: dict[str, Any]) -> Run:
    """The ``Run`` that a record tells of, its history thinned."""
    facts = {name: record["run"][name] for name in _FACTS}
    times: dict[str, Any] = {name: float(record["run"][name] or 0) for name in ("epochs", "seconds")}
    times["restored"] = record["run"]["restored"]
    try:
        history, validation = (
            {name: np.array(column, dtype=float) for name, column in record[part].items()} for part in ("history", "validation")
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{RECORD} is damaged: {error}; fit again") from None
    return Run(history=history, validation=validation, **facts, **times)


def _thin(history: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Means of equal stretches, so that a record stays small; of ``step`` and ``epoch`` the last in each."""
    length = max((len(column) for column in history.values()), default=0)
    stretch = math.ceil(length / _MAX_HISTORY) or 1
    starts = np.arange(0, length, stretch)
    ends = np.minimum(starts + stretch, length) - 1
    thin = {}
    for name, column in history.items():
        values = np.asarray(column, dtype=float)
        last = name in ("step", "epoch", "seconds")
        thin[name] = (
            (values[ends] if last else np.add.reduceat(values, starts) / (ends - starts + 1)).tolist() if length else []
        )
    return thin


def plain(value: Any) -> Any:
    """JSON values only: arrays and tensors become lists, paths strings, and numbers that are not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
