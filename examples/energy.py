r"""Energies in the plane: landscapes with draws, and what becomes of them when energies are added and taken off.

.. math:: p(x) \propto \prod_k p_k(x)^{w_k} \qquad \Leftrightarrow \qquad E(x) = \sum_k w_k E_k(x)

Two models are trained apart, on eight Gaussians and on two moons. Their sum is what both like; the first less a fifth of the
second is what the first likes and the second does not. Run ``python examples/energy.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from pgen.data.toy import eight_gaussians, two_moons
from pgen.models import EnergyBased

GRID = 120  # points of a picture's side


def picture(panels: list[tuple[str, Any, torch.Tensor]], reach: float = 4.0) -> Figure:
    """Each energy above its least, and draws of it."""
    figure = Figure(figsize=(3.2 * len(panels), 3.4), layout="constrained")
    side = torch.linspace(-reach, reach, GRID)
    for ax, (name, energy, drawn) in zip(figure.subplots(1, len(panels)), panels):
        height = energy.energy(torch.cartesian_prod(side, side)).reshape(GRID, GRID).T
        above = (height - height.min()).clamp(max=12).numpy()
        ax.contourf(side.numpy(), side.numpy(), above, levels=24, cmap="viridis_r")
        ax.scatter(*drawn.T.numpy(), s=2, c="white", linewidths=0)
        ax.set(title=name, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    return figure


def main(folder: str | Path = ".", steps: int = 2000, temps: int = 200, progress: bool = True) -> dict[str, float]:
    """Fit both, compose, draw; gives the share of the draws of each sum in the right half."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    gaussians, moons = (EnergyBased((2,), seed=seed, tempering=(temps, temps // 2, 5)) for seed in (0, 1))
    gaussians.fit(eight_gaussians().sample(5000, seed=0), steps=steps, progress=progress)
    moons.fit(two_moons().sample(5000, seed=1) * 2 - torch.tensor([1.0, 0.5]), steps=steps, progress=progress)
    energies = {
        "eight Gaussians": gaussians,
        "two moons": moons,
        "both": gaussians + moons,
        "Gaussians - moons / 5": gaussians - 0.2 * moons,
    }
    panels, shares = [], {}
    for name, energy in energies.items():
        drawn = energy.sample(1000, num_temps=temps, num_steps=temps // 2, seed=2, progress=progress)
        shares[name] = float((drawn[:, 0] > 0).float().mean())
        print(f"{name}: {shares[name]:.2f} of the draws in the right half")
        panels.append((name, energy, drawn))
    print(gaussians.log_normalizer(num_temps=temps, progress=progress))
    path = Path(folder) / "energy.png"
    picture(panels).savefig(path, dpi=100)
    print(f"written: {path}")
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="demo/energy", help="folder for the picture (default: demo/energy)")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    main(options.out, options.steps)
