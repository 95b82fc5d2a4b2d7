r"""Robust Bayesian regression in minibatches: global coefficients, and one latent spread a datum.

.. math::

    \alpha, \beta_i \sim \mathcal{N}(0, 2^2), \quad s \sim \mathrm{HalfNormal}(1), \quad
    \log u_n \sim \mathcal{N}(0, 1), \quad y_n \sim \mathcal{N}(\alpha + x_n^\top \beta, \; (s u_n)^2)

Summed over :math:`u_n` the noise has long tails, so gross errors in the data do not move the line as they move least squares.
Two ways to fit it: with the spreads as local latents, one row of the guide's parameters each; and with the spreads summed out
by Gauss-Hermite quadrature. The first is what a model needs whose local latents cannot be summed out, and it pays: its guide
has the spreads independent of the line, so it is surer of the line than it should be. The second has only global latents and
answers for new rows. The data are made here, so the true coefficients are known.
Run ``python examples/minibatch_regression.py``.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pgen

INTERCEPT, SLOPES, NOISE = -1.0, torch.tensor([2.0, 0.0, -0.5]), 0.7
NODES, WEIGHTS = (torch.tensor(part, dtype=torch.float32) for part in np.polynomial.hermite_e.hermegauss(20))


def make_data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs ``(rows, 3)`` and answers ``(rows,)``; one answer in twenty is a gross error, 15 too high."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, len(SLOPES), generator=noise)
    y = INTERCEPT + x @ SLOPES + NOISE * torch.randn(rows, generator=noise)
    return x, y + 15.0 * (torch.rand(rows, generator=noise) < 0.05)


def line(x: Tensor) -> tuple[Tensor, Tensor]:
    """The global latents: the height of the line at each row, and the scale of the noise."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 2.0))
    slopes = pyro.sample("slopes", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    return intercept + x @ slopes, pyro.sample("scale", dist.HalfNormal(1.0))


def local_spreads(x: Tensor, y: Tensor | None = None) -> None:
    """The model as it stands, written for the rows it is given; ``fit`` knows how many there are in all."""
    height, scale = line(x)
    with pyro.plate("data", len(x)):
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(height, scale * spread), obs=y)


def summed_out(x: Tensor, y: Tensor | None = None) -> None:
    """The same with the spreads summed out: a mixture over 20 of them."""
    height, scale = line(x)
    with pyro.plate("data", len(x)):
        noise = dist.Normal(height[:, None], scale * NODES.exp())
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(WEIGHTS.expand(len(x), -1)), noise), obs=y)


def coefficients(pair: pgen.Pair, data: dict[str, Tensor], num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of the intercept and the slopes."""
    posterior = pair.posterior(data, num_samples=num_samples, seed=2)["posterior"]
    draws = np.column_stack([posterior["intercept"][0], posterior["slopes"][0]])
    return draws.mean(0), draws.std(0)


def main(
    rows: int = 2000, steps: int = 3000, batch_size: int = 200, num_samples: int = 1000, progress: bool = True
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Fit both, and print the coefficients beside truth and least squares; returns means and sds."""
    start, console, found = time.perf_counter(), Console(highlight=False), {}
    x, y = make_data(rows, seed=1)
    data = {"x": x, "y": y}
    console.rule(f"Robust regression: {rows} rows in batches of {batch_size}", align="left")
    for name, model in {"local spreads": local_spreads, "summed out": summed_out}.items():
        pair = pgen.Pair(model, guide="full_rank")
        run = pair.fit(data, steps=steps, batch_size=batch_size, seed=1, progress=progress)
        found[name] = coefficients(pair, data, num_samples)
        console.print(f"{name:<14} bound {run.bound:.3f} nats a datum, {run.steps} steps in {run.seconds:.0f} s")

    design = torch.cat([torch.ones(rows, 1), x], 1)
    least_squares = torch.linalg.lstsq(design, y[:, None]).solution[:, 0].tolist()
    table = Table("", box=None, pad_edge=False, header_style="dim")
    for column in ("truth", "least squares", *found):
        table.add_column(column, justify="right")
    for i, name in enumerate(["intercept", *(f"slopes[{i}]" for i in range(len(SLOPES)))]):
        truth = INTERCEPT if i == 0 else float(SLOPES[i - 1])
        fitted = [f"{mean[i]:.3f} ± {sd[i]:.3f}" for mean, sd in found.values()]
        table.add_row(name, f"{truth:.3f}", f"{least_squares[i]:.3f}", *fitted)
    console.print()
    console.print(table)

    x_new, y_new = make_data(500, seed=2)
    replicates = pair.predict({"x": x_new, "y": y_new}, num_samples=num_samples, seed=3)["y"]  # (draws, 500)
    low, high = replicates.quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside = float(((y_new >= low) & (y_new <= high)).double().mean())
    console.print(f"\n{inside:.0%} of 500 new answers lie within their 90 % predictive interval (spreads summed out)")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Robust regression with local and global latents, in minibatches.")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps of each fit (default: 3000)")
    torch.set_num_threads(1)  # for matrices this small a second thread costs more than it brings
    main(steps=parser.parse_args().steps)
