"""Samples of every family judged by samples alone: digits 8 x 8 in 17 levels, a held-out real sample and the likelihood beside.

    python benchmarks/samples.py --markdown docs/benchmarks/samples.md
    python benchmarks/samples.py --parts families --families VAE Flow --minutes 1 --markdown docs/benchmarks/samples.md
    python benchmarks/samples.py --parts mnist --minutes 20 --markdown docs/benchmarks/samples.md  # meant for a GPU

Runs can be made piecemeal: each row is kept in docs/benchmarks/samples.json (``--results``) and the page is written from
all that is there; ``--again`` makes rows anew. ``--minutes`` bounds the CPU time of a fit, whose number of steps is the
budget over the time of a step, so that the rate falls to its end; families that are not there yet are left out. Parts:
``families``, ``tests`` (the power of classifiers in a two-sample test, and their level), ``parzen`` (why not to trust
Parzen windows), and, if it is asked for, ``mnist`` (28 x 28 in 16 levels, convolutional networks; where there is no GPU,
minutes of one CPU). One thread; times are CPU seconds, of ``mnist`` on a GPU seconds.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from svi import cpu_name

import pgen
from pgen import models
from pgen.data import Compose, Dequantize, Standardize, toy
from pgen.evaluation import samples

HERE = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PGEN_DATA", HERE.parent / "shared" / "data"))
SHAPE, LEVELS = (8, 8), 17
CATEGORICAL = {"likelihood": "categorical", "num_classes": LEVELS}


def same(x):
    return x


def centred(x, top=16):
    """Levels 0 to 16 to [-1, 1]."""
    return x / (top / 2) - 1


def levels(y, top=16):
    """And back to the nearest level."""
    return ((y + 1) * (top / 2)).round().clamp(0, top)


@dataclass
class Recipe:
    """A family on the digits.

    make: The model for a seed.
    epochs: At most; 0 for what needs none.
    encode: What it is fitted to, from levels.
    decode: Levels, from its samples.
    options: Of ``fit``.
    score: Of ``log_prob``.
    draw: Of ``sample``.
    """

    make: Callable
    epochs: int
    encode: Callable = same
    decode: Callable = same
    options: dict = field(default_factory=dict)
    score: dict = field(default_factory=dict)
    draw: dict = field(default_factory=dict)


def gan_options():
    objective = pgen.objectives.Adversarial(r1=1.0)
    optimizer = pgen.training.Adam(lr=5e-4, betas=(0.5, 0.999))
    return {"objective": objective, "optimizer": optimizer, "ema": 0.999, "schedule": "linear", "batch_size": 64}


def energy_options():
    return {"optimizer": pgen.training.Adam(3e-3), "schedule": "cosine", "clip_norm": 10.0, "batch_size": 100}


# Continuous densities are of dequantised levels, whose floor is a level.
RECIPES = {
    "Gaussian": Recipe(lambda s: models.Gaussian(SHAPE, preprocess=Dequantize(LEVELS), seed=s), 0),
    "GaussianMixture": Recipe(
        lambda s: models.GaussianMixture(SHAPE, 40, covariance="diagonal", preprocess=Dequantize(LEVELS), seed=s), 0
    ),
    "KernelDensity": Recipe(lambda s: models.KernelDensity(SHAPE, preprocess=Dequantize(LEVELS)), 0),
    "FactorAnalysis": Recipe(lambda s: models.FactorAnalysis(SHAPE, 16, preprocess=Dequantize(LEVELS)), 0),
    "Flow": Recipe(
        lambda s: models.Flow(
            SHAPE, transforms=1, hidden=(256, 256), bins=16, dropout=0.3, preprocess=Dequantize(LEVELS), seed=s
        ),
        300,
    ),
    "VAE": Recipe(lambda s: models.VAE(SHAPE, 16, **CATEGORICAL, seed=s), 400, score={"num_samples": 500}),
    "MADE": Recipe(lambda s: models.MADE(SHAPE, (512,), dropout=0.5, **CATEGORICAL, seed=s), 150),
    "PixelCNN": Recipe(lambda s: models.PixelCNN(SHAPE, 64, dropout=0.5, **CATEGORICAL, seed=s), 100),
    "PixelRNN": Recipe(lambda s: models.PixelRNN(SHAPE, 48, lstm="diagonal", dropout=0.5, **CATEGORICAL, seed=s), 100),
    "Diffusion": Recipe(
        lambda s: models.Diffusion(SHAPE, width=512, blocks=2, dropout=0.3, **CATEGORICAL, seed=s), 2000, options={"ema": 0.999}
    ),
    "FlowMatching": Recipe(
        lambda s: models.FlowMatching(SHAPE, width=512, blocks=2, dropout=0.3, preprocess=Dequantize(LEVELS), seed=s),
        2000,
        options={"ema": 0.999},
    ),
    "GAN": Recipe(
        lambda s: models.GAN(SHAPE, 32, architecture="dcgan", output="tanh", seed=s), 400, centred, levels, gan_options()
    ),
    "EnergyBased": Recipe(
        lambda s: models.EnergyBased(SHAPE, hidden=(256, 256), preprocess=Compose([Dequantize(LEVELS), Standardize()]), seed=s),
        600,
        decode=lambda x: x.floor().clamp(0, 16),
        options=energy_options(),
        draw={"start": "chains", "num_steps": 10},
    ),
}


IMAGE, GREYS = (28, 28), 16
GREY = {"likelihood": "categorical", "num_classes": GREYS}
MNIST = {
    "VAE": Recipe(lambda s: models.VAE(IMAGE, 32, (512, 512), **GREY, seed=s), 100, score={"num_samples": 100}),
    "PixelCNN": Recipe(lambda s: models.PixelCNN(IMAGE, 64, dropout=0.2, **GREY, seed=s), 100),
    "Diffusion": Recipe(lambda s: models.Diffusion(IMAGE, "unet", **GREY, seed=s), 200, options={"ema": 0.999}),
    "FlowMatching": Recipe(
        lambda s: models.FlowMatching(IMAGE, "unet", preprocess=Dequantize(GREYS), seed=s),
        200,
        options={"ema": 0.999},
        score={"batch_size": 200},
    ),
    "GAN": Recipe(
        lambda s: models.GAN(IMAGE, 64, architecture="dcgan", output="tanh", seed=s),
        100,
        partial(centred, top=GREYS - 1),
        partial(levels, top=GREYS - 1),
        gan_options(),
    ),
    "EnergyBased": Recipe(
        lambda s: models.EnergyBased(
            IMAGE, "conv", hidden=(32, 64, 128), preprocess=Compose([Dequantize(GREYS), Standardize()]), seed=s
        ),
        50,
        decode=lambda x: x.floor().clamp(0, GREYS - 1),
        options=energy_options(),
        draw={"start": "chains", "num_steps": 10},
    ),
}
"""On MNIST in 16 levels; the networks are the families' convolutional ones, of small size."""

clock = time.perf_counter if torch.cuda.is_available() else time.process_time


# --- families --------------------------------------------------------------------------------------------------------------


def number_of_steps(recipe, x, seconds):
    """As many as the budget holds, by the time of 40 steps after 20; at most those of the recipe's epochs."""
    spent, batch = [], recipe.options.get("batch_size", min(recipe.make(0).default_batch_size or 128, len(x)))
    options = {"batch_size": batch, "compile": "graph", "progress": False}
    for steps in (20, 60):
        began = clock()
        recipe.make(0).fit(x, steps=steps, **{**recipe.options, **options})
        spent.append(clock() - began)
    a_step = max((spent[1] - spent[0]) / 40, 1e-5)
    steps = max(50, min(int(seconds / a_step), math.ceil(recipe.epochs * len(x) / batch)))
    return {"steps": steps, "batch_size": batch, "compile": "graph"}


def fitted(recipe, x, validation, seed, minutes):
    """A fitted model, its seconds and steps."""
    x, validation, model = recipe.encode(x), recipe.encode(validation), recipe.make(seed)
    options = {"seed": seed, "progress": False, **recipe.options}
    if recipe.epochs:
        options |= number_of_steps(recipe, x, 60 * minutes)
    began = clock()
    run = model.fit(x, validation=validation, **options)
    return model, clock() - began, run.steps


def log_prob(model, x, **options):
    """Mean log-likelihood in nats, what kind of number it is, and its standard error; nothing where there is none."""
    try:
        score = model.log_prob(x, progress=False, **options)
    except pgen.NotAvailable:
        return {}
    return {"nats": score.mean, "nats_error": score.std_error, "kind": score.kind}


def judged(x, data):
    """The report of samples, and the Frechet distance in principal components beside."""
    report = samples.evaluate(
        x, data.test.float(), train=data.train.float(), labels=data.labels.train, features="classifier", progress=False
    )
    space = samples.feature_space("pca", data.train.float())
    pca = samples.frechet(space.of(x), space.of(data.test.float()))
    found = report.to_dict()
    kept = {name: {k: row[k] for k in ("value", "std_error", "p_value", "bias")} for name, row in found["measures"].items()}
    kept["Frechet, PCA"] = {"value": pca.value, "std_error": pca.std_error, "p_value": None, "bias": pca.bias}
    return kept, {"features": f"{found['features']}; {space}", "verdict": found["verdict"]}


@dataclass
class Subset:
    """Parts of a data set, as levels."""

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    labels: "Subset | None" = None


def mnist_in_levels(num_train=50_000, num_test=2000):
    """MNIST in 16 levels: as many training images, 2000 of validation and of test data each."""
    data = pgen.data.idx_folder(DATA / "mnist")
    ends = {"train": num_train, "validation": num_test, "test": num_test}
    grey = {part: (getattr(data, part)[:end] * 255 / GREYS).floor() for part, end in ends.items()}
    return Subset(**grey, labels=Subset(**{part: getattr(data.labels, part)[:end] for part, end in ends.items()}))


def families(data, recipes, names, seeds, minutes, split, kept, again):
    """One row a family and seed; the floor first."""
    if "held-out real" not in kept or again:
        order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[: len(data.test)]
        measures, about = judged(data.train[order].float(), data)
        kept["held-out real"] = {
            "measures": measures,
            **about,
            "split": split,
            "num": len(data.test),
            "images": len(data.train),
        }
        yield
    for name in names:
        if not hasattr(models, name):
            print(f"{name} is not there yet: left out")
            continue
        for seed in range(seeds):
            row = f"{name} {seed}"
            if row in kept and not again:
                continue
            print(row, flush=True)
            recipe = recipes[name]
            model, seconds, steps = fitted(recipe, data.train.float(), data.validation.float(), seed, minutes)
            x = recipe.decode(model.sample(len(data.test), seed=seed + 100, **recipe.draw).float().cpu())
            measures, about = judged(x, data)
            likelihood = log_prob(model, recipe.encode(data.test.float()), **recipe.score)
            kept[row] = {"measures": measures, **about, **likelihood, "cpu": seconds, "steps": steps, "minutes": minutes}
            yield


# --- two-sample tests --------------------------------------------------------------------------------------------------------


TASKS = 9


def tasks():
    """Pairs of samples of different laws, and at last of one."""
    g = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    x = normal(400, 10)
    yield "shift of 0.5 in one of 10", x, normal(400, 10) + 0.5 * torch.eye(10)[0]
    yield "1.3 times as wide, 10 numbers", x, 1.3 * normal(400, 10)
    y = normal(400, 2)
    yield "correlation 0.6, 2 numbers", normal(400, 2), torch.stack([y[:, 0], 0.6 * y[:, 0] + 0.8 * y[:, 1]], 1)
    yield (
        "grid of 25, sd 0.08 for 0.05",
        toy.gaussian_grid().sample(500, seed=1),
        toy.gaussian_grid(sd=0.08).sample(500, seed=2),
    )
    square = torch.rand(500, 2, generator=g) * 8 - 4
    yield "checkerboard, uniform square", toy.checkerboard().sample(500, seed=1), square
    data = pgen.data.digits(integers=True, split="random")
    real = torch.cat([data.test, data.validation])[:400].float()
    for name in ("Gaussian", "GaussianMixture", "KernelDensity"):
        model, _, _ = fitted(RECIPES[name], data.train.float(), data.validation.float(), 0, 1.0)
        yield f"digits, {name}", real, model.sample(400, seed=1)
    yield "digits, real (no difference)", real, data.train[torch.randperm(len(data.train), generator=g)[:400]].float()


def tests(kept, again):
    """Accuracy and p-value of each classifier on each task, and how often each rejects samples of one law."""
    power, level = kept.setdefault("power", {}), kept.setdefault("level", {})
    for name, x, y in tasks() if again or len(power) < TASKS else ():
        if name in power and not again:
            continue
        row = {}
        for classifier in ("kernel", "forest", "mlp", "logistic"):
            began = time.process_time()
            found = samples.classifier_test(x, y, classifier=classifier, progress=False)
            row[classifier] = {"value": found.value, "p": found.p_value, "cpu": time.process_time() - began}
        distance = pgen.evaluation.divergences.mmd(x, y, permutations=500, progress=False)
        row["MMD"] = {"value": distance.value, "p": distance.p_value}
        power[name] = row
        yield
    for dim, n in ((2, 100), (20, 100), (20, 400)):
        for classifier, repeats in (("kernel", 400), ("forest", 100), ("mlp", 100), ("logistic", 400)):
            name, p, z = f"{classifier}, {n} + {n} of {dim} numbers", [], []
            if name in level and not again:
                continue
            for repeat in range(repeats):
                x, y = torch.randn(2, n, dim, generator=torch.Generator().manual_seed(repeat))
                found = samples.classifier_test(x, y, classifier=classifier, permutations=99 if classifier == "kernel" else 0)
                p.append(found.p_value)
                z.append((found.value - 0.5) * math.sqrt(8 * n))
            plain = float(np.mean(np.array(z) > 1.645))
            row = {"level": float(np.mean(np.array(p) <= 0.05)), "plain": plain, "sd": float(np.std(z)), "repeats": repeats}
            level[name] = row
            yield


# --- Parzen windows ----------------------------------------------------------------------------------------------------------


def parzen(kept, again):
    """Centres of k-means against real data as the centres of Parzen windows: digits, and MNIST where it is at hand."""
    from sklearn.cluster import MiniBatchKMeans

    digits = pgen.data.digits(split="random")
    sets = {"digits, 8 x 8": (digits.train, digits.validation, digits.test, (100, 300))}
    if (DATA / "mnist").is_dir():
        mnist = pgen.data.idx_folder(DATA / "mnist")
        sets["MNIST"] = (mnist.train, mnist.validation[:1000], mnist.test, (1000,))
    for name, (train, validation, test, counts) in sets.items():
        for count in counts:
            row = f"{name}, {count} centres"
            if row in kept and not again:
                continue
            means = MiniBatchKMeans(count, n_init=1, random_state=0, batch_size=4096).fit(train.flatten(1).numpy())
            centres = torch.from_numpy(means.cluster_centers_).reshape(count, *train.shape[1:])
            real = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:count]]
            scores = [samples.parzen_estimate(y, test, validation=validation) for y in (centres, real)]
            gap = scores[0] - scores[1]
            kept[row] = {"centres": scores[0].mean, "real": scores[1].mean, "gap": gap.mean, "gap_error": gap.std_error}
            yield


# --- the page ----------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "Frechet, PCA": "Frechet, PCA", "Frechet distance": "Frechet, classifier", "density": "density", "coverage": "coverage",
    "accuracy, kernel": "accuracy, kernel", "accuracy, forest": "accuracy, forest",
}  # fmt: skip
KINDS = {"exact": "exact", "lower_bound": "bound", "estimate": "estimate", "unnormalised": "not normalised"}


def with_error(row):
    return pgen.evaluation.sample_measures.with_error(row["value"], row["std_error"])


def small(p):
    return f"{p:.3f}" if p >= 0.001 else "< .001"


def family_row(name, row):
    measures = row["measures"]
    likelihood = f"{row['nats']:.1f} ± {row['nats_error']:.1f} ({KINDS[row['kind']]})" if "nats" in row else "-"
    if row.get("kind") == "unnormalised":
        likelihood = "not normalised"
    p_values = [small(measures["MMD²"]["p_value"]), small(measures["nearest in train"]["p_value"]) if "cpu" in row else "-"]
    cells = [with_error(measures[key]) for key in COLUMNS]
    return [name, likelihood, *cells, *p_values, f"{row['cpu']:.0f}" if "cpu" in row else "-"]


def table(header, rows):
    lines = [" | ".join(map(str, row)) for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
    return [f"| {line} |" for line in lines] + [""]


def mnist_page(kept):
    if "held-out real" not in kept:
        return []
    floor = kept["held-out real"]
    budgets = ", ".join(f"{b:g}" for b in sorted({row["minutes"] for row in kept.values() if "minutes" in row}))
    lines = [
        "## MNIST, 28 x 28, 16 levels",
        "",
        f"{floor['num']} samples against as many test images, the first of the file; the floor is as many of the "
        f"{floor['images']} training images (told from those test images too: they are of other writers). Budget of a fit: "
        f"{budgets} minutes, a trial where that is few. Likelihood in nats, as for digits.",
        "",
        f"Spaces: {floor['features']}.",
        "",
    ]
    return [*lines, *rows_of(kept, MNIST)]


def family_page(kept):
    if "held-out real" not in kept:
        return []
    floor = kept["held-out real"]
    budgets = ", ".join(f"{b:g}" for b in sorted({row["minutes"] for row in kept.values() if "minutes" in row}))
    bias = {name: f"{floor['measures'][name]['bias']:.1f}" for name in ("Frechet, PCA", "Frechet distance")}
    lines = [
        "## Digits, 8 x 8, 17 levels",
        "",
        f"Split at random ({floor['num']} test digits; in the order of the file held-out digits are of other writers, and told "
        "from training digits at 0.76). As many samples as test digits; the floor is as many training digits. Budget of a fit: "
        f"{budgets} CPU minutes. Likelihood in nats of the test digits, probabilities of whole levels for all (dequantised "
        f"densities and latent variables give bounds). To Frechet distances the sample size alone adds about "
        f"{bias['Frechet, PCA']} in principal components, {bias['Frechet distance']} in the classifier's features. "
        "MMD and copies: p-values.",
        "",
        f"Spaces: {floor['features']}.",
        "",
    ]
    return [*lines, *rows_of(kept, RECIPES)]


def rows_of(kept, recipes):
    """The table, in the order of the recipes."""
    order = {name: place for place, name in enumerate(recipes)}
    names = ["held-out real", *sorted((n for n in kept if n.split()[0] in order), key=lambda n: order[n.split()[0]])]
    header = ["samples of", "log-likelihood", *COLUMNS.values(), "MMD", "copies", "CPU s"]
    return table(header, [family_row(name.removesuffix(" 0"), kept[name]) for name in names])


def tests_page(kept):
    lines = []
    if kept.get("power"):
        lines += ["## Classifiers in a two-sample test", "", "Accuracy (p-value), 400 or 500 of each sample, five folds."]
        lines += ["The last row has nothing to find.", ""]
        rows = []
        for name, row in kept["power"].items():
            cells = [f"{row[c]['value']:.3f} ({small(row[c]['p'])})" for c in ("kernel", "forest", "mlp", "logistic")]
            rows.append([name, *cells, f"p = {row['MMD']['p']:.3f}"])
        lines += table(["difference", "kernel", "forest", "mlp", "logistic", "MMD"], rows)
    if kept.get("level"):
        lines += [
            "## Their level",
            "",
            "Both samples standard normal. Share of tests with a p-value of at most 0.05: as computed here (kernel: by "
            "permutation; others: twice the variance of independent trials), and by the plain binomial law; and the standard "
            "deviation of the accuracy over that of independent trials.",
            "",
        ]
        found = kept["level"].items()
        rows = [[name, f"{r['level']:.3f}", f"{r['plain']:.3f}", f"{r['sd']:.2f}", r["repeats"]] for name, r in found]
        lines += table(["classifier", "rejected at 0.05", "by the plain binomial", "sd ratio", "repeats"], rows)
    return lines


def parzen_page(kept):
    if not kept:
        return []
    lines = [
        "## Parzen windows",
        "",
        "Mean log-density in nats of test data under Gaussian windows around centres of k-means, and around as many real "
        "training data; bandwidths by validation data. The centres win though they look like no datum: the reason not to trust "
        "such figures (Theis, van den Oord, Bethge 2016, arXiv:1511.01844, section 3.3).",
        "",
    ]
    rows = [[n, f"{r['centres']:.1f}", f"{r['real']:.1f}", f"{r['gap']:.1f} ± {r['gap_error']:.1f}"] for n, r in kept.items()]
    return lines + table(["data", "k-means", "real data", "difference"], rows)


def page(kept):
    versions = f"Python {platform.python_version()}, torch {version('torch')}, scikit-learn {version('scikit-learn')}"
    about = (
        f"`python benchmarks/samples.py --markdown docs/benchmarks/samples.md`. {versions}, one thread of "
        f"{platform.machine()}. Figures come with standard errors over the samples; one seed a family unless a row says which. "
        "Runs: " + "; ".join(f"{part} {when}" for part, when in kept.get("runs", {}).items()) + "."
    )
    parts = (
        family_page(kept.get("families", {})),
        mnist_page(kept.get("mnist", {})),
        tests_page(kept.get("tests", {})),
        parzen_page(kept.get("parzen", {})),
    )
    return "\n".join(["# Samples, judged by samples alone", "", about, "", *(line for part in parts for line in part)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = ["families", "tests", "parzen"]
    parser.add_argument("--parts", nargs="+", default=usual, choices=[*usual, "mnist"])
    parser.add_argument("--families", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--images", type=int, default=50_000, help="training images of MNIST")
    parser.add_argument("--held-out", type=int, default=2000, help="images of MNIST to judge by, and samples")
    parser.add_argument("--minutes", type=float, default=10.0, help="CPU minutes of a fit, at most")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--split", default="random", choices=["random", "file"])
    parser.add_argument("--again", action="store_true", help="make rows anew that are kept")
    parser.add_argument("--results", type=Path, default=HERE / "docs" / "benchmarks" / "samples.json")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = json.loads(options.results.read_text()) if options.results.is_file() else {}
    made = {
        "families": lambda rows: families(
            pgen.data.digits(integers=True, split=options.split), RECIPES, options.families, options.seeds, options.minutes,
            options.split, rows, options.again,
        ),
        "mnist": lambda rows: families(
            mnist_in_levels(options.images, options.held_out), MNIST, [n for n in options.families if n in MNIST],
            options.seeds, options.minutes, "", rows, options.again,
        ),
        "tests": lambda rows: tests(rows, options.again),
        "parzen": lambda rows: parzen(rows, options.again),
    }  # fmt: skip
    for part in options.parts:
        for _ in made[part](kept.setdefault(part, {})):
            kept.setdefault("runs", {})[part] = f"{date.today()} on {cpu_name()}"
            options.results.write_text(json.dumps(kept, indent=1) + "\n")
            if options.markdown:
                options.markdown.write_text(page(kept))
    text = page(kept)
    if options.markdown:
        options.markdown.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
