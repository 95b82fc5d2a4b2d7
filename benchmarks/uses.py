"""What densities are for: out-of-distribution scores on declared pairs, and classifiers by Bayes' rule.

    python benchmarks/uses.py --markdown docs/benchmarks/uses.md      # PGEN_DATA or ../shared/data holds mnist, fashion_mnist
    python benchmarks/uses.py --only digits                           # what needs no data beside scikit-learn's

Rows are kept in `--rows` as they come, and not computed twice. CPU, one thread, a declared seed; budgets are epochs, and CPU
minutes are printed. Nothing is tuned on out-data: settings are the families' defaults but for those printed; models stop early
on validation data; p-values refer to validation data; test data are touched once.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch

import pgen
from pgen import models
from pgen.data import Compose, Dequantize, Standardize
from pgen.evaluation import ood
from pgen.evaluation.calibration import assess

SEED = 0
RATE = 0.2  # of the numbers that are replaced for a background model
DATA = Path(os.environ.get("PGEN_DATA", Path(__file__).parents[2] / "shared" / "data"))


def grey_dequantised(levels):
    return Compose([Dequantize(levels), Standardize()])


# --- out of distribution ---------------------------------------------------------------------------------------------------

DIGITS = {
    "Gaussian, full covariance": lambda: models.Gaussian((8, 8), preprocess=grey_dequantised(17)),
    "VAE, categorical, latent 8": lambda: models.VAE(
        (8, 8), 8, (128, 128), likelihood="categorical", num_classes=17, seed=SEED
    ),
    "MADE, categorical, 256 units": lambda: models.MADE((8, 8), (256,), likelihood="categorical", num_classes=17, seed=SEED),
}
IMAGES = {
    "Gaussian, full covariance": (lambda: models.Gaussian((28, 28), preprocess=grey_dequantised(256)), {}),
    "VAE, Bernoulli of grey/255 binarised at 1/2, latent 20": (
        lambda: models.VAE((28, 28), 20, (200,), likelihood="bernoulli", seed=SEED),
        {"epochs": 10, "binary": True},
    ),
    "VAE, one discretised logistic, latent 20": (
        lambda: models.VAE(
            (28, 28), 20, (200,), likelihood="discretized_logistic_mixture", num_classes=256, num_components=1, seed=SEED
        ),
        {"epochs": 10},
    ),
    "MADE, 3 discretised logistics, 300 units": (
        lambda: models.MADE(
            (28, 28), (300,), likelihood="discretized_logistic_mixture", num_classes=256, num_components=3, seed=SEED
        ),
        {"epochs": 6},
    ),
    "PixelCNN, 16 channels, 3 layers, 5 discretised logistics": (
        lambda: models.PixelCNN(
            (28, 28), 16, 3, head=32, likelihood="discretized_logistic_mixture", num_classes=256, num_components=5, seed=SEED
        ),
        {"epochs": 3},
    ),
}


def digits_pairs():
    """Digits 0 to 4, and what they are to be told from."""
    x = pgen.data.digits(integers=True)
    labels = x.labels
    low = [
        part[y <= 4].float() for part, y in ((x.train, labels.train), (x.validation, labels.validation), (x.test, labels.test))
    ]
    pairs = {
        "digits 0-4 against 5-9": x.test[x.labels.test >= 5].float(),
        "digits 0-4 against the same, negated": 16 - low[2],
        "digits 0-4 against the same, turned by 90 degrees": low[2].rot90(1, (1, 2)),
    }
    return low, pairs


def image_sets(size, tested):
    """Fashion-MNIST in grey levels: training and validation rows, its test rows, and MNIST's."""
    fashion, digits = (pgen.data.idx_folder(DATA / name, num_validation=5000) for name in ("fashion_mnist", "mnist"))
    levels = [(part * 255).round() for part in (fashion.train[:size], fashion.validation[:tested], fashion.test[:tested])]
    return levels, (digits.test[:tested] * 255).round()


def fit(make, train, validation, **options):
    model, began = make(), time.process_time()
    if model.solvable:
        options = {}
    run = model.fit(train, validation=validation, seed=SEED, progress=False, **options)
    return model, run, (time.process_time() - began) / 60


def ood_rows(name, make, parts, pairs, levels, options, num_samples=50):
    """Model and background fitted once, every pair judged."""
    train, validation, test = parts
    began = time.process_time()
    model, run, _ = fit(make, train, validation, **options)
    background, _, _ = fit(make, ood.perturbed(train, RATE, levels=levels, seed=SEED), validation, **options)
    minutes = (time.process_time() - began) / 60
    for pair, outside in pairs.items():
        found = ood.report(
            model, test, outside, null=validation, background=background, num_samples=num_samples, progress=False
        )
        yield {
            "table": "ood",
            "pair": pair,
            "model": name,
            "kind": model.log_prob(test[:2], num_samples=2).kind,
            "bound": run.bound,
            "epochs": run.epochs,
            "minutes": minutes,
            "methods": found.rows,
            "sizes": [len(train), len(validation), len(test), len(outside)],
        }


# --- classifiers -----------------------------------------------------------------------------------------------------------

CLASSIFIERS = {
    "Gaussian, diagonal": lambda k: models.Gaussian((8, 8), "diagonal", preprocess=grey_dequantised(17)),
    "Gaussian, full covariance": lambda k: models.Gaussian((8, 8), preprocess=grey_dequantised(17)),
    "probabilistic PCA, 12 directions": lambda k: models.ProbabilisticPCA((8, 8), 12, preprocess=grey_dequantised(17)),
    "MADE, discretised logistics, 64 units": lambda k: models.MADE(
        (8, 8), (64,), likelihood="discretized_logistic_mixture", num_classes=17, num_components=2, seed=SEED
    ),
}


def conditional_vae():
    return models.VAE((8, 8), 8, (128, 128), likelihood="categorical", num_classes=17, context_dim=10, seed=SEED)


def classifier_row(name, classifier, before, after, temperature, minutes):
    shown = lambda found: {n: getattr(found, n) for n in ("accuracy", "accuracy_error", "log_loss", "ece")}  # noqa: E731
    return {
        "table": "classifier", "model": name, "before": shown(before), "after": shown(after), "temperature": temperature,
        "minutes": minutes, "kind": before.kind,
    }  # fmt: skip


def classifier_rows(done):
    """Each classifier fitted on 1000 digits, its temperature set on 350, tested on 447."""
    x = pgen.data.digits(integers=True)
    train, validation, test = (part.float() for part in (x.train, x.validation, x.test))
    labels = x.labels
    if "logistic regression (scikit-learn)" not in done:
        yield logistic_row(train, validation, test, labels)
    entries = {**CLASSIFIERS, "VAE conditioned on the class": conditional_vae}
    for name, make in entries.items():
        if name in done:
            continue
        began = time.process_time()
        one = make is conditional_vae
        classifier = pgen.GenerativeClassifier(make() if one else make, None if one else 10)
        solvable = classifier.models[0].solvable
        held = {} if solvable else {"validation": (validation, labels.validation)}
        classifier.fit(train, labels.train, seed=SEED, progress=False, **held)
        minutes = (time.process_time() - began) / 60
        before = classifier.evaluate(test, labels.test, progress=False)
        temperature = classifier.calibrate(validation, labels.validation, progress=False)
        yield classifier_row(
            name, classifier, before, classifier.evaluate(test, labels.test, progress=False), temperature, minutes
        )


def logistic_row(train, validation, test, labels):
    """The discriminative baseline: its penalty chosen, and its temperature set, on the validation digits."""
    from scipy.optimize import minimize_scalar
    from sklearn.linear_model import LogisticRegression

    began = time.process_time()
    flat = [part.flatten(1).numpy() / 16 for part in (train, validation, test)]
    fits = {c: LogisticRegression(C=c, max_iter=2000).fit(flat[0], labels.train.numpy()) for c in (0.01, 0.1, 1.0, 10.0, 100.0)}
    best = max(fits.values(), key=lambda model: model.predict_log_proba(flat[1])[range(350), labels.validation.numpy()].mean())
    logits = [torch.as_tensor(best.decision_function(part)) for part in flat]
    found = minimize_scalar(
        lambda t: float(torch.nn.functional.cross_entropy(logits[1] / t, labels.validation)),
        bounds=(0.05, 20),
        method="bounded",
    )
    before, after = (assess((logits[2] / t).softmax(1), labels.test) for t in (1.0, found.x))
    minutes = (time.process_time() - began) / 60
    return classifier_row("logistic regression (scikit-learn)", None, before, after, float(found.x), minutes)


# --- rows and tables -------------------------------------------------------------------------------------------------------


def compute(arguments):
    """Rows that are missing, written as they come."""
    path = Path(arguments.rows)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {row["model"] for row in rows if row["table"] == "classifier"}, {(r["model"], r.get("pair")) for r in rows}

    def keep(row):
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    if arguments.only in (None, "classifier"):
        for row in classifier_rows(done[0]):
            keep(row)
    if arguments.only in (None, "digits"):
        parts, pairs = digits_pairs()
        for name, make in DIGITS.items():
            if any((name, pair) not in done[1] for pair in pairs):
                for row in ood_rows(name, make, parts, pairs, 17, {}):
                    keep(row)
    if arguments.only in (None, "images"):
        parts, outside = image_sets(arguments.images, arguments.tested)
        for name, (make, options) in IMAGES.items():
            pair = "Fashion-MNIST against MNIST"
            if (name, pair) in done[1]:
                continue
            options = dict(options)
            binary = options.pop("binary", False)
            seen = [(part >= 128).float() for part in parts] if binary else parts
            out = (outside >= 128).float() if binary else outside
            for row in ood_rows(name, make, seen, {pair: out}, 2 if binary else 256, options, num_samples=20):
                keep(row)
    return rows


def markdown(rows, command):
    about = (
        f"`{command}`, {time.strftime('%Y-%m-%d')}, torch {version('torch')} CPU, scikit-learn {version('scikit-learn')}, "
        f"Python {platform.python_version()}, pgen {pgen.__version__}; one thread, seed {SEED}. CPU minutes are of model and "
        "background together, on a machine that others used."
    )
    lines = ["# What densities are for", "", about, "", "## Out of distribution", "", *PROSE, ""]
    for pair in dict.fromkeys(row["pair"] for row in rows if row["table"] == "ood"):
        chosen = [row for row in rows if row.get("pair") == pair]
        sizes = chosen[0]["sizes"]
        lines += [f"### {pair}", "", f"{sizes[0]} training, {sizes[1]} validation, {sizes[2]} in, {sizes[3]} out.", ""]
        lines += [
            "| model | log p is | epochs | likelihood | typicality | ratio | regret | CPU min |",
            "|---|---|---:|" + "---:|" * 5,
        ]
        for row in chosen:
            cells = [
                f"{row['methods'][m]['auroc']:.3f} ± {row['methods'][m]['std_error']:.3f}" if m in row["methods"] else ""
                for m in ood.METHODS
            ]
            kind = row["kind"].replace("_", " ")
            lines.append(f"| {row['model']} | {kind} | {row['epochs']:.0f} | {' | '.join(cells)} | {row['minutes']:.1f} |")
        lines.append("")
    lines += PUBLISHED
    lines += ["", "## Classifiers by Bayes' rule, digits", "", *CLASSIFIER_PROSE, ""]
    lines += ["| classifier | accuracy | log loss | ECE | T | log loss at T | ECE at T | CPU min |", "|---|" + "---:|" * 7]
    for row in (r for r in rows if r["table"] == "classifier"):
        a, b = row["before"], row["after"]
        lines.append(
            f"| {row['model']} | {a['accuracy']:.3f} ± {a['accuracy_error']:.3f} | {a['log_loss']:.3f} | {a['ece']:.3f} | "
            f"{row['temperature']:.2f} | {b['log_loss']:.3f} | {b['ece']:.3f} | {row['minutes']:.2f} |"
        )
    return "\n".join(lines) + "\n"


PROSE = [
    "AUROC: the probability that a random out-datum gets a higher score than a random in-datum, with DeLong's standard error",
    "over the data (not over seeds). The background model of the ratio is the same network fitted to data of which a fifth of",
    f"the numbers were replaced by uniform ones (rate {RATE}, not tuned). `exact` and `lower bound` say what log p is; a",
    "density of dequantised levels is a bound of their mass.",
]
PUBLISHED = [
    "Published for Fashion-MNIST against MNIST: likelihood .089, ratio .994 (PixelCNN++, Ren et al. 2019); a VAE gave",
    "likelihood 1.0 elsewhere. Below one half the density alone fails: here for every model whose levels are ordered",
    "(discretised logistics), small and briefly trained as they are; ratio, typicality and regret mend it.",
]
CLASSIFIER_PROSE = [
    "1000 digits to fit, 350 to stop fits early, to choose the penalty of the logistic regression and to set all temperatures,",
    "447 to test, in the file's order. ECE: 15 bins of equal width. Temperatures of the generative classifiers temper the",
    "likelihood alone. Where log p is a bound (VAE, dequantised levels) probabilities are estimates.",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", help="write the tables here")
    parser.add_argument("--rows", default="uses.jsonl", help="rows as they come, not computed twice")
    parser.add_argument("--only", choices=("classifier", "digits", "images"))
    parser.add_argument("--images", type=int, default=5000, help="training images of Fashion-MNIST")
    parser.add_argument("--tested", type=int, default=500, help="images of each kind that are scored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = markdown(compute(arguments), "python benchmarks/uses.py")
    if arguments.markdown:
        Path(arguments.markdown).write_text(text)
    print(text)


if __name__ == "__main__":
    main()
