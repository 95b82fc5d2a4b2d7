"""Densities one can compute: a Gaussian on held-out data, maximum likelihood against the truth, and Jaynes' dice.

python examples/density_basics.py          # prints the figures and writes density_basics.png
"""

import argparse

import torch

import pgen
from pgen.data import toy


def held_out():
    """A target that knows its entropy: no model can score more than minus that on its draws."""
    target = toy.banana()
    train, test = target.sample(500, seed=0), target.sample(5000, seed=1)
    gaussian = pgen.models.Gaussian((2,))
    gaussian.fit(train)
    print(f"Gaussian on the banana, training: {gaussian.log_prob(train)}")
    print(f"Gaussian on the banana, held out: {gaussian.log_prob(test)}")
    short = -target.entropy - gaussian.log_prob(test).mean
    print(f"the banana itself: {-target.entropy:.2f} nats, so the Gaussian is {short:.2f} short")
    return gaussian, test


def few_data():
    """Maximum likelihood flatters itself on few data; fewer parameters flatter less."""
    generator = torch.Generator().manual_seed(2)
    mix = torch.randn(2, 20, generator=generator)

    def draw(n):
        return torch.randn(n, 2, generator=generator) @ mix + 0.5 * torch.randn(n, 20, generator=generator)

    train, test = draw(40), draw(2000)
    families = {
        "diagonal": pgen.models.Gaussian((20,), "diagonal"),
        "factor analysis, q = 2": pgen.models.FactorAnalysis((20,), 2),
        "probabilistic PCA, q = 2": pgen.models.ProbabilisticPCA((20,), 2),
        "full": pgen.models.Gaussian((20,)),
    }
    print("\n40 data of 20 numbers      training   held out (nats a datum)")
    for name, model in families.items():
        model.fit(train)
        print(f"{name:25s} {model.log_prob(train).mean:9.2f} {model.log_prob(test).mean:10.2f}")


def dice():
    """A die that shows 4.5 on average: of all such dice, the one that assumes nothing else."""
    die = pgen.models.MaximumEntropy((1,), ["x"], values=range(1, 7))
    die.match({"x": 4.5})
    faces = torch.arange(1.0, 7.0)[:, None]
    print("\nfaces of a die with mean 4.5:", " ".join(f"{p:.3f}" for p in die.log_prob(faces).value.exp()))
    print(f"entropy {die.entropy():.3f} nats; a fair die has {torch.tensor(6.0).log():.3f}")


def main(picture=None):
    """Print everything; draw the Gaussian if a file is named."""
    gaussian, test = held_out()
    few_data()
    dice()
    if picture:
        pgen.plots.density(gaussian, test[:1000]).savefig(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--picture", default="density_basics.png", help="where the contours of the Gaussian go")
    main(parser.parse_args().picture)
