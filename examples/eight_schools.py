r"""Eight schools: a guide of one's own and the three automatic ones, beside the reference.

.. math::

    \mu \sim \mathcal{N}(0, 5^2), \quad \tau \sim \mathrm{HalfCauchy}(5), \quad \theta_j \sim \mathcal{N}(0, 1), \quad
    y_j \sim \mathcal{N}(\mu + \tau \theta_j, \sigma_j^2)

Data: Rubin (1981), doi:10.3102/10769986006004377. Every guide misses something of the posterior of tau; importance weights
see how much, and mend it where k-hat allows. Run ``python examples/eight_schools.py``.
"""

from __future__ import annotations

import argparse
import time

import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen

EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
REFERENCE = {"mu": 4.41, "tau": 3.60}  # posterior means published in posteriordb, eight_schools_noncentered


def model(y: Tensor | None = None) -> None:
    """The joint density of the three equations above."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(SIGMA)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * theta, SIGMA), obs=y)


def guide(y: Tensor | None = None) -> None:
    """Gaussian mu and theta, log-normal tau whose scale grows with mu's distance from zero: q(tau | mu)."""
    positive = dist.constraints.positive
    mu = pyro.sample(
        "mu", dist.Normal(pyro.param("mu_loc", torch.tensor(0.0)), pyro.param("mu_scale", torch.tensor(1.0), positive))
    )
    tau_loc = pyro.param("tau_loc", torch.tensor(0.0)) + pyro.param("tau_slope", torch.tensor(0.0)) * mu
    pyro.sample("tau", dist.LogNormal(tau_loc, pyro.param("tau_scale", torch.tensor(0.5), positive)))
    with pyro.plate("data", len(SIGMA)):
        loc = pyro.param("theta_loc", torch.zeros(len(SIGMA)))
        pyro.sample("theta", dist.Normal(loc, pyro.param("theta_scale", torch.ones(len(SIGMA)), positive)))


def main(
    steps: int = 3000, num_samples: int = 10_000, seed: int = 1, progress: bool = True
) -> dict[str, pgen.diagnostics.Report]:
    """Fit the model with each guide and print one table; returns the report on each."""
    console, reports = Console(highlight=False), {}
    table = Table("guide", box=None, pad_edge=False, header_style="dim")
    for column in ("mu raw", "mu PSIS", "tau raw", "tau PSIS", "k-hat", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, choice in {"own": guide, "mean-field": "mean_field", "full rank": "full_rank", "flow": "flow"}.items():
        start = time.perf_counter()
        pair = pgen.Pair(model, choice)
        pair.fit(EFFECT, steps=steps, seed=seed, progress=progress)
        seconds = time.perf_counter() - start
        reports[name] = pgen.diagnostics.report(pair, EFFECT, num_samples=num_samples, seed=seed)
        table.add_row(name, *_row(reports[name]), f"{seconds:.0f}")
    table.add_row("reference", "", f"{REFERENCE['mu']:.2f}       ", "", f"{REFERENCE['tau']:.2f}       ", "", "")
    console.print(table)
    console.print("\nposterior means; ± is the Monte Carlo standard error of the weighted mean\n")
    for name, report in reports.items():
        console.print(f"{name:<11} {report.overall.split('; not checked')[0]}")
    return reports


def _row(report: pgen.diagnostics.Report) -> list[str]:
    parameters = report.parameters.set_index("name")
    cells = []
    for name in REFERENCE:
        found = parameters.loc[name]
        cells += [f"{found.q_mean:.2f}", f"{found.psis_mean:.2f} ± {found.psis_mcse:.2f}"]
    return [*cells, f"{report.claims.loc[2, 'estimate']:.2f}"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Eight schools with four guides.")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps for each guide (default: 3000)")
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    main(parser.parse_args().steps)
