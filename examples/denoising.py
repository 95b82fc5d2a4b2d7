r"""From noise to digits: the path of a diffusion model, one column a class, and what guidance does.

The network is told the class, hidden in a tenth of the data of each step, so that the same network also knows what digits
look like in general; guidance w walks further along the difference of the two estimates,
:math:`\hat{x}_\varnothing + w (\hat{x}_c - \hat{x}_\varnothing)`. Run ``python examples/denoising.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import one_hot

import pgen
from pgen.samplers.diffusion import ancestral

FRAMES = 6


def path(model: pgen.models.Diffusion, context: Tensor, steps: int = 200) -> tuple[list[Tensor], list[Tensor]]:
    """z and the estimate of x at some stops of the ancestral sampler, in grey levels, ``(classes, 8, 8)`` each."""
    told = torch.cat([context, torch.ones(len(context), 1)], 1)  # the last number: the class is given

    def estimate(z: Tensor, log_snr: Tensor) -> Tensor:
        return model.denoise(z, log_snr.expand(len(z)), told)

    def grey(y: Tensor) -> Tensor:
        return (model.shift + model.scale * y.flatten(1)).reshape(y.shape)

    levels = torch.linspace(*model.schedule.ends.tolist(), steps + 1)
    z, seen, guessed = torch.randn(len(context), 8, 8), [], []
    for part in torch.arange(steps).chunk(FRAMES):
        seen.append(grey(z))
        guessed.append(grey(estimate(z, levels[part[0]])))
        z = ancestral(estimate, z, levels[part[0] : part[-1] + 2])
    return [*seen, grey(z)], [*guessed, grey(estimate(z, levels[-1]))]


def picture(rows: list[tuple[str, Tensor]]) -> Figure:
    """A row of images for each name."""
    figure = Figure(figsize=(7, 0.72 * len(rows)), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(len(rows), 10), rows):
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, image in zip(axes, images):
            ax.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=16)
            ax.set(xticks=[], yticks=[])
    return figure


def main(folder: str | Path = ".", epochs: int = 200, width: int = 256, progress: bool = True) -> pgen.Score:
    """Fit, score, draw; gives the bound of the test data, classes given."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    x = pgen.data.digits(integers=True, split="random")
    classes = [one_hot(labels.long(), 10).float() for labels in (x.labels.train, x.labels.test)]
    model = pgen.models.Diffusion(
        (8, 8), width=width, blocks=2, dropout=0.3, likelihood="categorical", num_classes=17, context_dim=10
    )
    model.fit(x.train, context=classes[0], epochs=epochs, batch_size=128, ema=0.999, progress=progress)
    score = model.log_prob(x.test, classes[1], num_samples=20, progress=progress)
    print(f"test digits, classes given: {score}")
    each = torch.eye(10)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noisy, guessed = path(model.eval(), each)
    rows = [(f"z {i}/{FRAMES}", z) for i, z in enumerate(noisy)] + [(f"guess {i}/{FRAMES}", x) for i, x in enumerate(guessed)]
    rows += [(f"w = {w:g}", model.sample(10, each, guidance=w, seed=1, progress=progress)) for w in (0, 1, 3)]
    file = Path(folder) / "denoising.png"
    picture(rows).savefig(file, dpi=100)
    print(f"written: {file}")
    return score


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="demo/denoising", help="folder for the picture (default: demo/denoising)")
    parser.add_argument("--epochs", type=int, default=200)
    options = parser.parse_args()
    main(options.out, options.epochs)
