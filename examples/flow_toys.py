r"""Flows on targets in the plane that know their entropy: what a fit leaves, drawn beside the target.

.. math:: \mathbb{E}_p[\log q(x)] = -H(p) - \mathrm{KL}(p \,\|\, q)

so the gap between the mean log-density of fresh draws and minus the entropy is the divergence that is left. Islands far from
each other need a base that has islands, too: ``base_components=25``. Run ``python examples/flow_toys.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import pgen
from pgen.data.toy import checkerboard, gaussian_grid, two_moons

TARGETS = {"two moons": two_moons, "checkerboard": checkerboard, "25 Gaussians": gaussian_grid}
GRID = 120  # points of a picture's side


def picture(panels: list[tuple[str, torch.Tensor, torch.Tensor, pgen.models.Flow]]) -> Figure:
    """A row for each target: its draws, the flow's, and the flow's density."""
    figure = Figure(figsize=(9, 3 * len(panels)), layout="constrained")
    for axes, (name, x, drawn, flow) in zip(figure.subplots(len(panels), 3, squeeze=False), panels):
        reach = 1.1 * float(x.abs().max())
        side = torch.linspace(-reach, reach, GRID)
        density = flow.log_prob(torch.cartesian_prod(side, side), progress=False).value.exp().reshape(GRID, GRID).T
        for ax, points, title in ((axes[0], x, name), (axes[1], drawn, "draws of the flow")):
            ax.scatter(*points.T.numpy(), s=1)
            ax.set(title=title, xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes[2].imshow(density.numpy(), origin="lower", extent=(-reach, reach, -reach, reach))
        axes[2].set(title="density of the flow")
    return figure


def main(folder: str | Path = ".", steps: int = 3000, hidden: int = 128, progress: bool = True) -> dict[str, float]:
    """Fit, print what is left, and draw; gives the gaps in nats by target."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    panels, gaps = [], {}
    for name, make in TARGETS.items():
        target = make()
        flow = pgen.models.Flow((2,), hidden=(hidden, hidden), base_components=25)
        flow.fit(target.sample(50_000, seed=1), steps=steps, optimizer=5e-4, schedule="warmup_cosine", progress=progress)
        x = target.sample(5000, seed=2)
        gaps[name] = float(target.log_prob(x).mean()) - flow.log_prob(x, progress=progress).mean
        off = float(flow.inverse_error(x).max())
        print(f"{name}: entropy {target.entropy:.3f} nats, left {gaps[name]:.3f}; inverse off by {off:.1e}")
        panels.append((name, x, flow.sample(5000, seed=3, progress=progress), flow))
    path = Path(folder) / "flow_toys.png"
    picture(panels).savefig(path, dpi=100)
    print(f"written: {path}")
    return gaps


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="demo/flow_toys", help="folder for the picture (default: demo/flow_toys)")
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    main(options.out, options.steps)
