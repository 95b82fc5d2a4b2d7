"""How many groups? A mixture of Gaussians, its number of components chosen on held-out data, and a picture.

The data are made here, in the manner of the Old Faithful geyser: how long an eruption lasts and how long one waits for the
next, minutes. Short eruptions are followed by short waits, long ones by long waits, and now and then an eruption is
interrupted: three groups of very different size, each stretched along a line of its own. Mixtures of one to six components are
fitted to one half and judged by the other: the likelihood of the training data rises with every component, that of the
held-out data does not, and the one-standard-error rule takes the smallest that is not shown to be worse than the best.
Run ``python examples/mixture.py [--out demo/mixture]``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

import pgen
from pgen.models import GaussianMixture

SHARES = (0.34, 0.58, 0.08)
MEANS = ((2.0, 54.0), (4.4, 80.0), (3.0, 64.0))
SPREADS = ((0.25, 5.5), (0.38, 5.6), (0.15, 3.0))
SLOPES = (0.45, 0.55, -0.3)  # correlations


def geyser(n: int, seed: int) -> Tensor:
    """Eruptions and waits, minutes, ``(n, 2)``."""
    noise = torch.Generator().manual_seed(seed)
    group = torch.multinomial(torch.tensor(SHARES), n, replacement=True, generator=noise)
    z = torch.randn(n, 2, generator=noise)
    slope = torch.tensor(SLOPES)[group]
    z[:, 1] = slope * z[:, 0] + (1 - slope**2).sqrt() * z[:, 1]
    return torch.tensor(MEANS)[group] + torch.tensor(SPREADS)[group] * z


def truth(x: Tensor) -> float:
    """Mean log-density of the process that made the data, nats a datum."""
    model = GaussianMixture((2,), 3).double()
    outer = [[[s * s, r * s * t], [r * s * t, t * t]] for (s, t), r in zip(SPREADS, SLOPES)]
    model.place(SHARES, MEANS, outer)
    return model.log_prob(x.double(), progress=False).mean


def draw(model: GaussianMixture, x: Tensor, choice: pgen.Choice, train: dict[str, float]) -> Figure:
    """The density with its components, and the held-out likelihood against their number."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    low, high = x.min(0).values - x.std(0) / 3, x.max(0).values + x.std(0) / 3
    across, up = (torch.linspace(float(a), float(b), 120) for a, b in zip(low, high))
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), -1)
    density = model.log_prob(grid.reshape(-1, 2), progress=False).value.reshape(120, 120)
    left.contourf(across, up, density.clamp(min=float(density.max()) - 9), levels=18, cmap="Blues", alpha=0.7)
    labels = model.labels(x, progress=False)
    left.scatter(x[:, 0], x[:, 1], c=labels, cmap="Dark2", s=5, alpha=0.6, linewidths=0)
    for mean, covariance in zip(model.means(), model.covariances()):
        values, vectors = np.linalg.eigh(covariance.numpy())
        angle = np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1]))
        width, height = 4 * np.sqrt(values[::-1])  # two standard deviations on each side
        left.add_patch(Ellipse(mean.tolist(), width, height, angle=angle, fill=False, color="black", lw=1))
    left.set(xlabel="eruption [min]", ylabel="wait for the next [min]", title=f"{model.num_components} components, chosen")
    counts = [int(name) for name in choice.models]
    scores = [choice.comparison.scores[name] for name in choice.models]
    right.errorbar(counts, [s.mean for s in scores], [s.std_error for s in scores], marker="o", capsize=3, label="held out")
    right.plot(counts, list(train.values()), marker=".", ls="--", label="training")
    right.axvline(model.num_components, color="grey", lw=0.8)
    right.set(xlabel="components", ylabel="log-likelihood [nats a datum]", xticks=counts, title="how many?")
    right.legend(frameon=False)
    return figure


def main(
    out: str | Path = "demo/mixture", n: int = 1000, most: int = 6, steps: int = 400, progress: bool = True
) -> tuple[pgen.Choice, Path]:
    """Choose, say what came out, and draw it; returns the choice and the picture's file."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out, test = (geyser(n, seed) for seed in (1, 2, 3))
    models = {k: GaussianMixture((2,), k) for k in range(1, most + 1)}
    choice = pgen.choose(models, train, held_out, steps=steps, progress=progress)
    print(choice)
    model = choice.model
    score = model.log_prob(test, progress=False)
    print(f"\ntest data: {score}\nthe process itself: {truth(test):.2f} nats a datum")
    for k in model.weights().argsort(descending=True).tolist():
        mean = ", ".join(f"{v:.2f}" for v in model.means()[k].tolist())
        print(f"  component {k}: {model.weights()[k]:.0%} of the data around ({mean})")
    fitted = {name: each.log_prob(train, progress=False).mean for name, each in choice.models.items()}
    path = pgen.plots.save(draw(model, train, choice, fitted), out / "mixture.png")
    print(f"\npicture: {path}")
    return choice, path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A mixture of Gaussians whose number of components is chosen.")
    parser.add_argument("--out", default="demo/mixture", help="folder for the picture (default: demo/mixture)")
    torch.set_num_threads(1)
    main(parser.parse_args().out)
