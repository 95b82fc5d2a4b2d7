"""A critic that wins: the minimax generator's gradient vanishes, and the non-saturating one's does not, in measured norms.

python examples/vanishing_gradient.py          # prints the figures and writes vanishing_gradient.png

Data lie at 4, draws begin at 0. First the generator is held still while the critic learns: the better it tells them apart, the
less the minimax loss, E log(1 - D(G(z))), has to say to the generator, whose gradient falls with D(G(z)) itself (Goodfellow et
al. 2014, section 3; Arjovsky and Bottou 2017, arXiv:1701.04862, theorem 2.4). The non-saturating loss, -E log D(G(z)), has the
same fixed point and keeps its gradient. Then both play the whole game against a critic that moves five times a step.
"""

import argparse
import warnings

import numpy as np
import torch

import pgen
from pgen.models import GAN
from pgen.objectives import Adversarial
from pgen.training import SGD, Adam

LOSSES = ("minimax", "non_saturating")


def data():
    """A Gaussian about 4."""
    return 4 + 0.3 * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))


def fitted(loss, generator, steps, moves=1):
    """A fit with its model."""
    model = GAN((2,), 2, (32, 32), seed=0)
    run = model.fit(
        data(), objective=Adversarial(loss, critic_moves=moves), optimizer={"critic": Adam(2e-3), "generator": generator},
        steps=steps, batch_size=64, seed=0, progress=False,
    )  # fmt: skip
    return model, run


def still(steps):
    """Gradient norms of a generator that does not move, as its critic learns."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        runs = {loss: fitted(loss, SGD(1e-30), steps)[1] for loss in LOSSES}
    print("the generator held still, its critic learning")
    print("step    critic right    generator's gradient norm: minimax    non-saturating    ratio")
    for step in [n for n in (1, 100, 300, 1000, 3000) if n <= steps]:
        right = (runs["minimax"].history["critic_accuracy_real"] + runs["minimax"].history["critic_accuracy_fake"])[
            step - 1
        ] / 2
        low, high = (runs[loss].history["generator_grad_norm"][step - 1] for loss in LOSSES)
        print(f"{step:4d} {right:12.1%} {low:32.2e} {high:20.2e} {high / low:14.1f}")
    for warning in heard:
        print(f"and pgen warned: {warning.message}")
    return runs


def game(steps):
    """The whole game: how far the draws come."""
    print(f"\nthe whole game, {steps} steps, five moves of the critic in each; data lie at (4, 4)")
    ends = {}
    for loss in LOSSES:
        model, run = fitted(loss, SGD(0.02), steps, moves=5)
        ends[loss] = model.sample(1000, seed=1).mean(0)
        norm = np.median(run.history["generator_grad_norm"][-50:])
        print(f"{loss:15s} draws about ({ends[loss][0]:.2f}, {ends[loss][1]:.2f}), gradient norm {norm:.2e}")
    return ends


def picture(runs, path):
    """Both norms over the critic's training, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (loss, run), colour in zip(runs.items(), (pgen.plots.ORANGE, pgen.plots.BLUE)):
        axes.semilogy(run.history["step"], run.history["generator_grad_norm"], color=colour, label=loss.replace("_", "-"))
    axes.set_xlabel("steps of the critic, the generator held still")
    axes.set_ylabel("generator's gradient norm")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(path=None, steps=3000):
    """Print everything; draw the norms if a file is named."""
    runs = still(steps)
    ends = game(max(20, steps // 5))
    if path:
        picture(runs, path)
    return runs, ends


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", default="vanishing_gradient.png", help="where the picture goes")
    main(parser.parse_args().picture)
