r"""The command line: it parses, calls and prints; everything else is the library's.

Exit codes: 0 done; 1 ``diagnose`` found a problem, or ``compare`` could not fit a family; 2 bad input, told in one line on
standard error; 70 a defect of pgen, with its traceback; 130 interrupted (Ctrl-C) and 143 terminated, after saving what there
is.

With ``--json`` a command prints exactly one JSON object on standard output; progress, warnings and whatever a user's own
program prints go to standard error.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pgen
from pgen import runs
from pgen.contracts import spoken

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from pgen.contracts import Batch
    from pgen.data import Table

__all__ = ["main", "run"]

_MOST_OF_A_LIST = 40  # characters of a setting
_CLICK_ERROR: Any = typer.BadParameter.__mro__[2]  # click's base of its errors, which typer brings under a changing address

app = typer.Typer(
    name="pgen",
    help="Fit generative models, question them, and judge them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that `pgen fit` wrote.")]
DataName = Annotated[str, typer.Argument(metavar="DATA", help="A file (csv, npy, npz, parquet) or a bundled set: `digits`.")]
Programs = Annotated[
    list[str] | None,
    typer.Option("--program", metavar="FILE.py:NAME", help="Your own model, and once more for its guide, if RUN is of one."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An argument of the family's constructor; see `pgen models`. Repeat it."),
]
Columns = Annotated[str | None, typer.Option("--columns", metavar="A,B", help="Columns of a table to take; all by default.")]
Without = Annotated[str | None, typer.Option("--without", metavar="A,B", help="Columns of a table to leave out.")]
Categorical = Annotated[
    str | None, typer.Option("--categorical", metavar="A,B", help="Columns of numbers that are categories; text always is.")
]
Complete = Annotated[bool, typer.Option("--complete", help="Leave out rows of a table that have missing entries.")]
Context = Annotated[
    str | None,
    typer.Option("--context", metavar="A,B", help="Columns to condition the others on; `label` of the digits: their classes."),
]
Seed = Annotated[int, typer.Option("--seed", help="Keys every random choice.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else there.")]


@dataclass
class Result:
    """What a command has to say: to programs, to people, and to the shell."""

    data: dict[str, Any]
    show: Callable[[Console], None]
    code: int = 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line, print its result, return its exit code."""
    as_json, stdout = "--json" in arguments, sys.stdout
    try:
        with _terminable(), contextlib.redirect_stdout(sys.stderr if as_json else stdout):
            result = app(list(arguments), prog_name="pgen", standalone_mode=False)
        if not isinstance(result, Result):  # help was shown, or an interrupt came where there was nothing to save
            return int(result or 0)
        if as_json:
            print(json.dumps(runs.plain(result.data), allow_nan=False), file=stdout, flush=True)
        else:
            result.show(_console())
    except SystemExit as stop:  # terminated where there was nothing to save
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return 0
    except Exception as error:
        return _failed(error, arguments, as_json)
    return result.code


# --- commands --------------------------------------------------------------------------------------------------------------


@app.command()
def fit(
    source: Annotated[
        list[str],
        typer.Argument(metavar="DATA | FILE.py:MODEL [FILE.py:GUIDE]", help="Data for a family, or a program of your own."),
    ],
    model: Annotated[str | None, typer.Option("--model", help="The family; see `pgen models`.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data for a program of your own.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write: the model, run.json, pictures.")] = Path("run"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the fit in that folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted fit in that folder.")] = False,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Data a step.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of Adam.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME[:KEY=VALUE,...]",
            help=f"What is optimised, as in adversarial:loss=hinge,r1=0.1: {', '.join(runs.OBJECTIVES)}.",
        ),
    ] = None,
    settings: Settings = None,
    latent_dim: Annotated[int | None, typer.Option("--latent-dim", help="Latent dimensions.")] = None,
    likelihood: Annotated[
        str | None, typer.Option("--likelihood", help="bernoulli, categorical, gaussian, ...; left out, the data decide.")
    ] = None,
    columns: Columns = None,
    without: Without = None,
    categorical: Categorical = None,
    complete: Complete = False,
    context: Context = None,
    guide: Annotated[str | None, typer.Option("--guide", help="For your own model: mean_field, full_rank or flow.")] = None,
    pictures: Annotated[
        int | None, typer.Option("--pictures", metavar="STEPS", help="Draw samples into OUT/progress every so many steps.")
    ] = None,
    compile: Annotated[str, typer.Option("--compile", help="auto, eager, graph or compiled.")] = "auto",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    seed: Seed = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")] = False,
    as_json: Json = False,
) -> Result:
    """Fit a family to data, or a Pyro program of your own."""
    _check_out(out, overwrite, resume)
    if pictures is not None and pictures < 1:
        raise ValueError(f"--pictures should be a positive number of steps, got {pictures}")
    if objective is None and resume:
        objective = runs.objective_of(out)
    if objective is not None:
        runs.parse_objective(objective, program=".py:" in source[0])
    if ".py:" in source[0]:
        options = {"--model": model, "--set": settings, "--latent-dim": latent_dim, "--likelihood": likelihood}
        reads = {"--columns": columns, "--without": without, "--categorical": categorical, "--complete": complete or None}
        _refuse("a program of your own", options | reads | {"--context": context, "--pictures": pictures})
        subject = runs.Subject.program(source, _required(data, "--data", "a program of your own"), guide)
    else:
        _refuse("a family", {"--data": data, "--guide": guide, source[-1]: source[1:] or None})
        given = runs.parse_settings(settings or [])
        for option, value in (("latent_dim", latent_dim), ("likelihood", likelihood)):
            if value is not None and given.setdefault(option, value) != value:
                raise ValueError(f"--set and --{option.replace('_', '-')} say different things: {given[option]} and {value}")
        reading = _reading(columns, without, categorical, complete, context)
        subject = runs.Subject.family(source[0], model, given, seed, reading)
        if (note := runs.note_of(subject.about["data"], [subject.about["model"]["family"]])) and not quiet:
            _say(f"note: {note}")
        if subject.about["data"]["held"] and not quiet:
            _say(f"columns: {subject.about['data']['held']}")
        if (found := runs.context_of(subject.about)) and not quiet:
            _say(f"context: {found.words()}")
    code, subject.about["model"]["objective"] = 0, objective
    if pictures is not None:
        progress = pgen.plots.Pictures(
            subject.model, out / runs.PROGRESS, every=pictures, context=subject.contexts(64),
            names=subject.about["data"]["columns"],
        )  # fmt: skip
    try:
        with runs.columns_named(subject.about["data"]["columns"]):
            subject.model.fit(
                subject.train, validation=subject.validation, epochs=epochs, steps=steps, batch_size=batch_size, optimizer=lr,
                seed=seed, compile=compile, device=device, progress=not quiet, checkpoint=out / runs.CHECKPOINT,
                callbacks=() if pictures is None else [progress], objective=runs.objective(objective, subject.x, seed),
            )  # fmt: skip
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 143 if isinstance(stop, SystemExit) else 130
        if subject.model.last_run is None:
            raise
    record = runs.save_run(out, subject, subject.model.last_run, finished=not code)
    return Result({"command": "fit", **record}, lambda console: None if quiet else _show_record(console, record), code)


@app.command()
def sample(
    folder: Folder,
    num: Annotated[
        int | None, typer.Option("-n", "--num", help="How many, at each context; 64, or one for each row of --given DATA.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--given", metavar="A=1,B=x | DATA", help="The context to draw at; or a table, each row of which is one."),
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw them here; RUN/samples.png if no file is named.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write them here, as .npy or .csv.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="For your own program: the data that it is given.")] = None,
    program: Programs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> Result:
    """Draw new data from a fitted model; for a program of your own, replicates of its data."""
    fitted, record = runs.open_run(folder, program)
    context: dict[str, list[str]] = {}
    if "file" in record["model"]:
        _refuse("a program of your own", {"--given": given})
        x = _replicates(fitted, runs.batch(_required(data, "--data", "replicates"), record), 64 if num is None else num, seed)
    else:
        _refuse("a family", {"--data": data})
        x, context = runs.sample(fitted, record, given or (), num, seed)
    png = folder / "samples.png" if png is None and out is None else png
    columns = record["data"].get("columns") if "family" in record["model"] else None
    if out is not None:
        _write_rows(out, x, columns, runs.table_of(record), context)
    if png is not None:
        pgen.plots.save(pgen.plots.of_samples(fitted, x, columns), png)
    files = [str(path) for path in (png, out) if path is not None]
    result = {"command": "sample", "num": len(x), "shape": list(x.shape), "seed": seed, "given": given or [], "files": files}
    facts = {"samples": f"{len(x)} of shape {tuple(x.shape[1:])}", "given": given, "written": files}
    return Result(result, lambda console: _facts(console, facts))


@app.command()
def score(
    folder: Folder,
    data: DataName,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Latent draws a datum, where there are latents.")] = 100,
    out: Annotated[Path | None, typer.Option("--out", help="Write each datum's number, as .npy or .csv.")] = None,
    program: Programs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> Result:
    """Log-density of data under a fitted model: exact, or a bound that says so."""
    fitted, record = runs.open_run(folder, program)
    scored, normalizer = runs.scored(fitted, runs.batch(data, record), num_samples=num_samples, seed=seed)
    if out is not None:
        _write_rows(out, scored.value, ["log_prob_nats"])
    names = ("kind", "mean", "std_error", "total", "event_size", "num_samples")
    result = {"command": "score", "data": data, **{name: getattr(scored, name) for name in names}, "num_data": len(scored)}
    result |= {"bits_per_dim": runs.bits_per_dim(scored), "normalizer": normalizer, "files": [str(out)] if out else []}
    facts = {"data": data, "log-density": str(scored), "normaliser": normalizer, "written": result["files"]}
    return Result(result, lambda console: _facts(console, facts))


@app.command()
def compare(
    source: Annotated[
        list[str], typer.Argument(metavar="DATA | RUN... DATA", help="Data to fit families to; or fitted runs, and test data.")
    ],
    models: Annotated[str | None, typer.Option("--models", help="Families to fit: gaussian,kernel_density,flow.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write: models, table, picture.")] = Path("comparison"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the comparison in that folder.")] = False,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data, where there is no closed form.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Data a step, where there is no closed form.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="MODEL.KEY=VALUE", help="A setting of one family. Repeat it.")
    ] = None,
    likelihood: Annotated[
        str | None, typer.Option("--likelihood", help="How values are seen: bernoulli, categorical, gaussian, ...")
    ] = None,
    columns: Columns = None,
    without: Without = None,
    categorical: Categorical = None,
    complete: Complete = False,
    context: Context = None,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Latent draws a datum, where there are latents.")] = 100,
    seed: Seed = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
    as_json: Json = False,
) -> Result:
    """Fit families to data and rank them on a part held out; or rank fitted runs. Exit code 1: a family could not be fitted."""
    if (out / runs.COMPARISON).exists() and not overwrite:
        raise ValueError(f"{out} already holds a comparison; name another folder with --out, or add --overwrite")
    options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": not quiet}
    failed: dict[str, str] = {}
    if models is None:
        _refuse("fitted runs", {"--epochs": epochs, "--batch-size": batch_size, "--set": settings, "--likelihood": likelihood})
        reads = {"--columns": columns, "--without": without, "--categorical": categorical, "--complete": complete or None}
        _refuse("fitted runs", reads | {"--context": context})
        if len(source) < 3:
            raise ValueError(
                "name families, `pgen compare DATA --models gaussian,vae`, or two runs: `pgen compare RUN1 RUN2 DATA`"
            )
        found, about = runs.compare_runs(source[:-1], source[-1], options, None if quiet else _say)
    else:
        _refuse("--models", {source[-1]: source[1:] or None})
        names = runs.check_models(models)
        given = runs.parse_each(settings or [], names)
        training = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "progress": not quiet}
        reading = _reading(columns, without, categorical, complete, context)
        parts = runs.Parts.of(source[0], likelihood, seed, reading, test=True, grey=runs.grey_of(given))
        if (note := runs.note_of({"prepared": parts.prepared}, names)) and not quiet:
            _say(f"note: {note}")
        if parts.context is not None and not quiet:
            _say(f"context: {parts.context.words()}")
        fitted, about, failed = runs.fit_each(parts, names, given, training, None if quiet else _say)
        if not fitted:
            raise ValueError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        found = pgen.compare(fitted, parts.batch(2), **options)
        runs.save_models(out, fitted)
    result = {"command": "compare", "data": source[-1], **found.to_dict(), "fits": about, "not_fitted": failed}
    result["files"] = runs.save_comparison(out, found, result)

    def show(console: Console) -> None:
        console.print(str(found))
        _facts(console, {f"not fitted: {name}": reason for name, reason in failed.items()})
        _facts(console, {"folder": f"{out}: {', '.join(result['files'])}"})

    return Result(result, show, int(bool(failed)))


def _reading(
    columns: str | None, without: str | None, categorical: str | None, complete: bool, context: str | None
) -> runs.Reading:
    """Names separated by commas, as tuples."""

    def names(text: str | None) -> tuple[str, ...]:
        return tuple(name.strip() for name in (text or "").split(",") if name.strip())

    return runs.Reading(names(columns) or None, names(without), names(categorical), complete, names(context))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def diagnose(
    folder: Folder,
    data: DataName,
    level: Annotated[str, typer.Option("--level", help="quick, standard or thorough.")] = "quick",
    html: Annotated[bool, typer.Option("--html", help="Write RUN/report.html too.")] = False,
    program: Programs = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> Result:
    """Judge a fitted model on its data: what is supported, contradicted, undecided, not measured. Exit code 1: a problem."""
    from pgen import diagnostics

    fitted, record = runs.open_run(folder, program)
    report = diagnostics.report(fitted, runs.batch(data, record), level=level, seed=seed)
    report.about.insert(0, f"run {folder} on {data}")
    files = [str(report.to_html(folder / runs.REPORT))] if html else []
    result = {"command": "diagnose", "data": data, **report.to_dict(), "files": files}

    def show(console: Console) -> None:
        console.print(str(report))
        _facts(console, {"written": files})

    return Result(result, show, int(report.overall.startswith("problem found")))


@app.command()
def evaluate(
    folder: Folder,
    data: DataName,
    num: Annotated[int, typer.Option("-n", "--num", help="Most samples, and most data that they are held against.")] = 2000,
    train: Annotated[
        str | None,
        typer.Option("--train", help="What the model was fitted to; left out, what RUN names, if that is there."),
    ] = None,
    features: Annotated[str, typer.Option("--features", help="Where distances are taken: pixels, pca or classifier.")] = "pca",
    num_samples: Annotated[int, typer.Option("--num-samples", help="Latent draws a datum, where there are latents.")] = 100,
    png: Annotated[Path | None, typer.Option("--png", help="Draw samples beside their nearest training data here.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write verdict and table here.")] = None,
    seed: Seed = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Json = False,
) -> Result:
    """Judge a fitted model by its samples, against data that it was not fitted to; and by its likelihood, where it has one."""
    from pgen.evaluation import samples

    if "file" in runs.read_record(folder)["model"]:
        raise ValueError(f"{folder} is of a program of your own: give replicates and data to pgen.evaluation.samples.evaluate")
    for path in (png, markdown):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} is in {str(path.parent)!r}, which is no folder; create it first")
    fitted, record = runs.open_run(folder, None)
    held = runs.held_out(data, train, record)
    if features == "classifier" and held.labels is None:
        raise ValueError("--features classifier needs training data with classes, which these have not; take pca or pixels")
    x = held.sample(fitted, num, seed)
    labels = held.labels if features == "classifier" else None
    try:
        found = samples.evaluate(
            x, held.real, train=held.train, labels=labels, features=features, most=num, seed=seed, progress=not quiet
        )
    except ValueError as error:
        if "which is too few" not in str(error):
            raise
        raise ValueError(f"{error}; `real` is {held.about_real}") from error
    log_prob = runs.likelihood(fitted, held.batch, num_samples=num_samples, seed=seed, progress=not quiet)
    if png is not None:
        pgen.plots.save(pgen.plots.samples_and_neighbours(found, record["data"].get("columns")), png)
    if markdown is not None:
        found.to_markdown(markdown)
    files = [str(path) for path in (png, markdown) if path is not None]
    about = {"data": held.about_real, "train": held.about_train, "log_prob": log_prob}
    result = {"command": "evaluate", **about, **found.to_dict(), "files": files}

    def show(console: Console) -> None:
        _facts(console, {"data": held.about_real, "training data": held.about_train, "log-density": log_prob["text"]})
        console.print(f"\n{found}")
        _facts(console, {"written": files})

    return Result(result, show)


@app.command()
def info(folder: Folder, as_json: Json = False) -> Result:
    """What a run folder holds, its model file checked against its digest."""
    from pgen import files

    record = runs.read_record(folder)
    runs.check_model(folder)
    files.read_metadata(folder / runs.MODEL)
    record = {name: value for name, value in record.items() if name not in ("history", "validation")}
    known = (runs.MODEL, runs.RECORD, *runs.PICTURES, runs.REPORT)
    record |= {"out": str(folder), "files": [name for name in known if (folder / name).exists()] + runs.shown(folder)}
    return Result({"command": "info", **record}, lambda console: _show_record(console, record))


@app.command()
def models(as_json: Json = False) -> Result:
    """The families that `pgen fit --model` knows."""
    rows: list[dict[str, Any]] = [
        {
            "model": name,
            "what": (inspect.getdoc(family) or "").split("\n")[0],
            "settings": runs.settings_of(name),
        }
        for name, family in sorted(pgen.models.REGISTRY.items())
    ]
    cells = [[row["model"], row["what"], ", ".join(row["settings"])] for row in rows]
    return Result({"command": "models", "models": rows}, lambda console: _table(console, ["model", "what", "settings"], cells))


# --- the run folder --------------------------------------------------------------------------------------------------------


def _check_out(out: Path, overwrite: bool, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is not a folder")
    if overwrite and resume:
        raise ValueError("give either --overwrite or --resume, not both")
    unfinished = runs.has_checkpoint(out)
    if resume and not unfinished:
        raise ValueError(f"{out} holds no interrupted fit to go on with; leave --resume out")
    if overwrite:
        runs.discard_checkpoint(out)
    elif unfinished and not resume:
        raise ValueError(f"{out} holds an interrupted fit; add --resume to go on with it, or --overwrite")
    elif (out / runs.MODEL).exists() and not resume:
        raise ValueError(f"{out} already holds a fit; name another folder with --out, or add --overwrite")


def _replicates(pair: Any, batch: Batch, num: int, seed: int) -> Tensor:
    sites = pair.predict(batch, num, seed=seed)
    if len(sites) != 1:
        raise ValueError(
            f"the program observes {', '.join(sites) or 'nothing'}; `pgen sample` writes one observed site: use Pair.predict"
        )
    return next(iter(sites.values()))


def _write_rows(
    path: Path, x: Tensor, columns: Sequence[str] | None, table: Table | None = None, beside: dict[str, list[str]] | None = None
) -> None:
    """Write rows as numbers; in a ``.csv`` the categories of a table as its texts, and columns of text ``beside`` them."""
    import csv

    import numpy as np

    if path.suffix == ".npy":
        np.save(path, x.detach().cpu().numpy(), allow_pickle=False)
    elif path.suffix == ".csv":
        flat = x.reshape(len(x), -1)
        cells = table.rows(x) if table is not None and columns else [[f"{value:.9g}" for value in row] for row in flat.tolist()]
        header = [*(columns or [f"x{i}" for i in range(flat.shape[1])]), *(beside or ())]
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = ([*row, *more] for row, more in zip(cells, zip(*beside.values()))) if beside else cells
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    else:
        raise ValueError(f"--out should end in .npy or .csv, got {str(path)!r}")


# --- what goes wrong -------------------------------------------------------------------------------------------------------


def _refuse(what: str, options: dict[str, Any]) -> None:
    """Options that do not go with what is fitted are refused, not ignored."""
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} does not go with {what}; leave it out")


def _required(value: str | None, option: str, what: str) -> str:
    if value is None:
        raise ValueError(f"{option} is missing: {what} needs data")
    return value


def _failed(error: Exception, arguments: Sequence[str], as_json: bool) -> int:
    """Tell an error: in one line where it is the input's, with a traceback where it is ours."""
    line = _one_line(error, arguments)
    if line is None:
        traceback.print_exception(error)
        line = f"this is a defect of pgen, please report it: {type(error).__name__}: {error}"
        code = 70
    else:
        code = 2
    print(f"error: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": line}))
    return code


def _one_line(error: Exception, arguments: Sequence[str]) -> str | None:
    """What is wrong with the input, and where in the user's own file; None if it is not the input."""
    if isinstance(error, _CLICK_ERROR):
        return " ".join(error.format_message().split())
    text = " ".join(str(error).split()) or type(error).__name__
    known = (ValueError, TypeError, OSError, ImportError, FloatingPointError, pgen.NotAvailable)
    named = [Path(argument.rpartition(":")[0]) for argument in arguments if ".py:" in argument]
    own = {file.resolve(): file for file in named}
    place = _place(error, own)
    if place:
        return f"{place}: {text}" if isinstance(error, ValueError) else f"{place}: {type(error).__name__}: {text}"
    return text if isinstance(error, known) else None


def _place(error: BaseException | None, own: dict[Path, Path]) -> str:
    """FILE:LINE of the innermost frame in one of the user's own files, as they spelled it."""
    while error is not None:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError) and error.filename:
            frames.append((error.filename, error.lineno))
        for name, line in reversed(frames):
            if Path(name).resolve() in own:
                return f"{own[Path(name).resolve()]}:{line}"
        error = error.__cause__
    return ""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends a command with its clean-up and code 143; a fit first ends the step at hand and is saved."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread: signals are the host program's business
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- what is printed -------------------------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


def _table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with rules on a terminal, aligned plain text elsewhere."""
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(header, *rows)]
        for row in (header, *rows) if any(header) else rows:
            console.print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=box.SIMPLE_HEAD, show_header=any(header), header_style="bold")
    for first, *others in rows:
        table.add_row(Text(first, style="cyan"), *map(Text, others))
    console.print(table, soft_wrap=False)


def _facts(console: Console, facts: dict[str, Any]) -> None:
    """Names and values; empty ones are left out."""
    words = {name: ", ".join(value) if isinstance(value, list) else str(value) for name, value in facts.items() if value}
    if words:
        _table(console, ("", ""), list(words.items()))


def _show_record(console: Console, record: dict[str, Any]) -> None:
    model, data, done = record["model"], record["data"], record["run"]
    program = f"{model.get('file')}:{', '.join(map(str, model.get('names') or ()))} {model.get('guide') or ''}"
    given = {name: value for name, value in (model.get("settings") or {}).items() if value is not None and name != "columns"}
    settings = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
    shape = f" of shape {tuple(data['shape'])}" if data["shape"] else ""
    held = f", {data['validation']} held out" if data["validation"] else ""
    prepared = "".join(f", {name.replace('_', ' ')} {value}" for name, value in data["prepared"].items())
    error = f" ± {_number(done['bound_std_error'])}" if done["bound_std_error"] is not None else ""
    name, sign, unit = spoken(done["word"], training=done["bound_of"] == "training")
    value = None if done["bound"] is None else sign * done["bound"]
    facts = {
        "model": f"{model['family']} ({settings})" if model.get("family") else program.strip(),
        "objective": model.get("objective"),
        "data": f"{data['source']}: {data['train']}{shape}{held}{prepared.replace(' True', '')}",
        "columns": data["held"],
        "context": context.words() if (context := runs.context_of(record)) else "",
        name: f"{_number(value)}{error}{unit} ({done['bound_of']})",
        "training": f"{done['steps']} steps, {_number(done['epochs'], 1)} epochs, {_number(done['seconds'], 1)} s",
        "seed": str(done["seed"]),
        "stopped": done["stopped"],
        "execution": done["tier"] + (f" ({done['tier_reason']})" if done["tier_reason"] else ""),
        "skipped": f"{done['skipped']} steps that were not finite" if done["skipped"] else "",
        "warning": "; ".join(map(str, done.get("warnings") or ())),
        "folder": f"{record['out']}: {', '.join(record['files'])}",
    }
    _facts(console, facts | {f"no {name}": reason for name, reason in record.get("not_drawn", {}).items()})


def _short(value: Any) -> str:
    """A setting in few words: a part by its name, and how many numbers a long list has."""
    if isinstance(value, dict) and "name" in value:
        rest = ", ".join(f"{name}={_short(part)}" for name, part in value.items() if name != "name")
        return f"{value['name']}({rest})" if rest else str(value["name"])
    text = str(value)
    return f"[{len(value)} values]" if isinstance(value, list) and len(text) > _MOST_OF_A_LIST else text


def _number(value: float | None, digits: int = 3) -> str:
    return "not a number" if value is None else f"{value:.{digits}f}"
