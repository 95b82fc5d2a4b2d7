"""What densities are for: compare, classify, detect. Run ``python examples/classify_and_detect.py [--out uses]``.

1. Three densities of two moons side by side, with paired errors.
2. A classifier by Bayes' rule: one mixture a moon, its decision boundary, its calibration.
3. Handwritten digits 0 to 4 as the known kind: what is strange, by three scores. Averages of several digits fool the density:
   they lie nearer to its mode than any digit. Typicality sees it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import pgen
from pgen.data import Compose, Dequantize, Standardize
from pgen.evaluation import ood
from pgen.models import Gaussian, GaussianMixture

NOISE = 0.15


def moons(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other, blurred; and which of the two each point is on."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    angle = torch.pi * torch.rand(n, generator=generator)
    sign = 1.0 - 2.0 * y
    x = torch.stack([angle.cos() * sign + y, angle.sin() * sign + 0.5 * y], 1)
    return x + NOISE * torch.randn(n, 2, generator=generator), y


def compare(train: Tensor, test: Tensor, out: Path) -> pgen.evaluation.Comparison:
    """A Gaussian, and mixtures of 4 and 12, on held-out points."""
    models = {"gaussian": Gaussian((2,)), "mixture of 4": GaussianMixture((2,), 4), "mixture of 12": GaussianMixture((2,), 12)}
    for model in models.values():
        model.fit(train, progress=False)
    found = pgen.compare(models, test)
    pgen.plots.save(pgen.plots.comparison(found), out / "comparison.png")
    return found


def classify(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], out: Path
) -> pgen.evaluation.Calibration:
    """One mixture of six Gaussians a moon, calibrated on held-out points."""
    classifier = pgen.GenerativeClassifier(lambda k: GaussianMixture((2,), 6, seed=k), num_classes=2)
    classifier.fit(*train, progress=False)
    classifier.calibrate(*held_out)
    found = classifier.evaluate(*test)
    boundary = pgen.plots.decision_boundary(classifier.predict_proba, *test)
    pgen.plots.save(boundary, out / "decision_boundary.png")
    pgen.plots.save(pgen.plots.reliability(found), out / "reliability.png")
    return found


def detect(out: Path) -> dict[str, ood.OODReport]:
    """A Gaussian of the digits 0 to 4, and a background of the same digits perturbed."""
    x = pgen.data.digits(integers=True)
    known = [
        part[y <= 4].float()
        for part, y in ((x.train, x.labels.train), (x.validation, x.labels.validation), (x.test, x.labels.test))
    ]
    make = lambda: Gaussian((8, 8), preprocess=Compose([Dequantize(17), Standardize()]))  # noqa: E731
    model, background = make(), make()
    model.fit(known[0])
    background.fit(ood.perturbed(known[0], levels=17))
    strange = {
        "digits 5 to 9": x.test[x.labels.test >= 5].float(),
        "averages of eight digits": torch.stack([known[2].roll(shift, 0) for shift in range(8)]).mean(0).round(),
    }
    found = {name: ood.report(model, known[2], other, null=known[1], background=background) for name, other in strange.items()}
    for number, report in enumerate(found.values(), 1):
        pgen.plots.save(pgen.plots.out_of_distribution(report), out / f"ood_{number}.png")
    return found


def main(out: Path, points: int = 2000) -> list[Path]:
    """Run all three parts, print what they find, return the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    train, held_out, test = (moons(points, seed) for seed in range(3))
    print("1  Two moons: three densities\n")
    print(compare(train[0], test[0], out))
    print("\n2  Two moons: a classifier by Bayes' rule\n")
    print(classify(train, held_out, test, out))
    print("\n3  Digits 0 to 4: what is strange?")
    for name, report in detect(out).items():
        print(f"\n{name}\n{report}")
    files = sorted(out.glob("*.png"))
    print("\npictures: " + ", ".join(str(file) for file in files))
    return files


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("uses"), help="folder for the pictures")
    main(parser.parse_args().out)
