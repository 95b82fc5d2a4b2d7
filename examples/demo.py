"""The main job in two parts: fit, hear the verdict, see it, keep it. Run ``python examples/demo.py [--out demo]``.

1. A variational autoencoder of scikit-learn's handwritten digits as what they are, 17 grey levels a pixel: a held-out bound
   beside a baseline, the verdict of a report, pictures, a saved model that answers the same when it is loaded.
2. Eight schools (Rubin 1981) from two plain functions, a model and a guide: raw and importance-weighted posterior means
   beside the published reference.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen

console = Console(highlight=False)


@dataclass(frozen=True)
class Size:
    """How long to train, how many samples behind the bound, how many test digits and draws behind the verdicts."""

    epochs: int = 300
    steps: int = 3000
    num_samples: int = 1000
    judged: int = 447
    draws: int = 1000
    school_draws: int = 20_000


QUICK = Size(epochs=3, steps=300, num_samples=20, judged=30, draws=100, school_draws=1000)


# --- 1. a family off the shelf ---------------------------------------------------------------------------------------------


def pixel_baseline(train: Tensor, test: Tensor, levels: int = 17) -> pgen.Score:
    """Every pixel on its own: the frequency of each grey level in the training data, one pseudo-count each."""
    counts = torch.nn.functional.one_hot(train, levels).sum(0) + 1.0  # (8, 8, levels)
    log_mass = (counts / counts.sum(-1, keepdim=True)).double().log()
    picked = log_mass.expand(len(test), -1, -1, -1).gather(-1, test[..., None]).squeeze(-1)
    return pgen.Score(picked.flatten(1).sum(1), "exact", event_size=64)


def digits(out: Path, size: Size, progress: bool) -> list[Path]:
    """Fit, score, judge, draw, save and load again a VAE of the digits; returns the files written."""
    x = pgen.data.digits(integers=True)
    title("1  Handwritten digits: a family off the shelf")
    console.print(
        f"data  {len(x.train)} to train, {len(x.validation)} to validate, {len(x.test)} to test; 8 x 8, 17 grey levels\n"
    )

    vae = pgen.models.VAE((8, 8), latent_dim=16, hidden=(256,), likelihood="categorical", num_classes=17)
    run = vae.fit(
        x.train, validation=x.validation, epochs=size.epochs, optimizer=pgen.training.AdamW(5e-4, weight_decay=1.0),
        ema=0.998, early_stopping=8, seed=0, progress=progress,
    )  # fmt: skip
    console.print(f"fit   {run.steps} steps in {run.seconds:.0f} s, {run.tier} tier\n{run.stopped}\n")

    score = vae.log_prob(x.test, num_samples=size.num_samples)
    table = columns("on the test digits", "what it is", "nats a digit", "std. error", "bits/dim")
    table.add_row(*score_row("each pixel on its own", pixel_baseline(x.train, x.test)))
    table.add_row(*score_row("VAE, ELBO (1 sample)", vae.log_prob(x.test, num_samples=1)))
    table.add_row(*score_row(f"VAE, {size.num_samples} samples", score))
    console.print(table)

    report = pgen.diagnostics.report(vae, x.test[: size.judged], level="quick", num_samples=size.draws)
    verdict(report)
    weights = report.idata["sample_stats"]["log_weight_rows"]
    khat = pgen.diagnostics.pareto_khat(weights)
    figures = {
        "bound": pgen.plots.plot_bound(run),
        "samples": pgen.plots.sample_grid(vae.sample(100, seed=1), reference=x.test),
        "reconstructions": pgen.plots.reconstructions(x.test[:24], vae.reconstruct(x.test[:24])),
        "latent_space": pgen.plots.latent_space(vae.encode(x.test), x.labels.test),
        "khat": pgen.plots.plot_khat(khat.khat, khat.khat_se, threshold=float(khat.good_k)),
    }
    files = [pgen.plots.save(figure, out / f"{name}.png") for name, figure in figures.items()]
    shown = {"Samples": "samples", "Reconstructions": "reconstructions", "Latent space": "latent_space"}
    files.append(report.to_html(out / "digits.html", figures={name: figures[key] for name, key in shown.items()}))

    vae.save(out / "model.pgen")
    again = pgen.load(out / "model.pgen").log_prob(x.test, num_samples=size.num_samples)
    same = "the same to the last bit" if torch.equal(again.value, score.value) else "DIFFERENT"
    console.print(f"\nload  model.pgen answers {again.mean:.4f} nats: {same}")
    return [*files, out / "model.pgen"]


# --- 2. programs of one's own ----------------------------------------------------------------------------------------------

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])  # of coaching, points of a test, one a school
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])  # its standard error
REFERENCE = {"mu": 4.41, "tau": 3.60}  # posterior means published in posteriordb, eight_schools_noncentered


def model(y: Tensor | None = None) -> None:
    """Eight schools, non-centred: effects mu + tau * theta around a common mean."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(SIGMA)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, SIGMA), obs=y)


def guide(y: Tensor | None = None) -> None:
    """Independent: Gaussian mu and theta, log-normal tau."""
    positive = dist.constraints.positive
    pyro.sample("mu", dist.Normal(pyro.param("mu_loc", torch.tensor(0.0)), pyro.param("mu_scale", torch.tensor(1.0), positive)))
    tau_scale = pyro.param("tau_scale", torch.tensor(0.5), positive)
    pyro.sample("tau", dist.LogNormal(pyro.param("tau_loc", torch.tensor(0.0)), tau_scale))
    with pyro.plate("data", len(SIGMA)):
        loc = pyro.param("theta_loc", torch.zeros(len(SIGMA)))
        pyro.sample("theta", dist.Normal(loc, pyro.param("theta_scale", torch.ones(len(SIGMA)), positive)))


def schools(out: Path, size: Size, progress: bool) -> list[Path]:
    """Fit the two functions, judge them, and compare posterior means with the reference; returns the files written."""
    title("2  Eight schools: two plain functions")
    pair = pgen.Pair(model, guide)
    run = pair.fit(EFFECT, steps=size.steps, seed=1, progress=progress)
    console.print(
        f"fit   {run.steps} steps in {run.seconds:.0f} s, {run.tier} tier; bound {run.bound * len(EFFECT):.2f} nats in all\n"
    )

    report = pgen.diagnostics.report(pair, EFFECT, level="quick", num_samples=size.school_draws, seed=1)
    found = pgen.diagnostics.psis_expectation(report.idata, var_names=["mu", "tau"])
    raw = report.idata["posterior"]
    table = columns("posterior", "raw mean", "raw sd", "PSIS mean", "± MC error", "PSIS sd", "reference mean")
    for name, reference in REFERENCE.items():
        corrected = {key: float(found[name].sel(statistic=key)) for key in ("mean", "mcse", "sd")}
        numbers = (raw[name].mean(), raw[name].std(), corrected["mean"], corrected["mcse"], corrected["sd"], reference)
        table.add_row(name, *(f"{float(number):.2f}" for number in numbers))
    console.print(table)
    verdict(report)
    return [report.to_html(out / "eight_schools.html")]


# --- what both print -------------------------------------------------------------------------------------------------------


def title(text: str) -> None:
    """A line that opens a section."""
    console.print()
    console.rule(f"[bold]{text}", align="left")


def columns(first: str, *numbers: str) -> Table:
    """A table without lines: names on the left, numbers on the right."""
    table = Table(first, box=None, pad_edge=False, header_style="dim")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def score_row(name: str, score: pgen.Score) -> tuple[str, ...]:
    """A score in words."""
    kind = score.kind.replace("_", " ")
    return name, kind, f"{score.mean:.2f}", f"{score.std_error:.2f}", f"{score.bits_per_dim:.3f}"


COLOURS = {"supported": "green", "contradicted": "red", "undecided": "yellow", "not_measured": "dim"}


def verdict(report: pgen.diagnostics.Report) -> None:
    """The verdict, and the first thing to know about each claim behind it; the rest is in the report's page."""
    console.print(f"\nverdict: [bold]{report.overall.split('; not checked')[0]}[/]\n")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for claim in report.rows:
        if claim.number in (1, 2, 3, 8):
            status = f"[{COLOURS[claim.status]}]{claim.status.replace('_', ' ')}[/]"
            table.add_row(str(claim.number), status, f"{claim.claim}\n[dim]{claim.explanation.partition('. ')[0].rstrip('.')}.")
    console.print(table)


def main(out: str | Path = "demo", size: Size = Size(), progress: bool = True) -> list[Path]:
    """Run both parts; returns the files written into the folder ``out``."""
    start, out = time.perf_counter(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files = [*digits(out, size, progress), *schools(out, size, progress)]
    title(f"{len(files)} files in {time.perf_counter() - start:.0f} seconds")
    for path in files:
        console.print(f"  {path}  [dim]{path.stat().st_size / 1024:.0f} kB")
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit, judge, draw and save two models.")
    parser.add_argument("--out", default="demo", help="folder to write into (default: demo)")
    parser.add_argument("--quick", action="store_true", help="small sizes: everything runs, nothing is well fitted")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    main(arguments.out, QUICK if arguments.quick else Size())
