"""Exact likelihoods of MADE, PixelCNN and PixelRNN on bits and images, what a sample costs, and what a training step costs.

    python benchmarks/autoregressive.py --markdown docs/benchmarks/autoregressive.md
    python benchmarks/autoregressive.py --parts digits sets --markdown docs/benchmarks/autoregressive.md

The second runs some parts; rows of others are kept from before (docs/benchmarks/autoregressive.json).

Data in the folder PGEN_DATA, or ../shared/data beside the project. One thread; times are CPU seconds of this process, so that
other work on the machine does not count. Hyperparameters were chosen on validation data. Fits that are given a
budget know it: their number of steps is the budget over the time of a step, so that the rate falls to zero.
"""

import argparse
import gzip
import itertools
import json
import math
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from svi import cpu_name

import pgen
from pgen.models import MADE, PixelCNN, PixelRNN

DATA = Path(os.environ.get("PGEN_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "autoregressive.json"
PARTS = ("steps", "sampling", "digits", "sets", "grey", "pictures")
SETS = ("nltcs", "plants", "baudio", "accidents", "mushrooms", "dna", "nips")


def fitted(model, data, validation=None, **options):
    """Fit; CPU seconds and the run."""
    start = time.process_time()
    run = model.fit(data, validation=validation, progress=False, **options)
    return time.process_time() - start, run


def scored(model, x, most=None):
    """Mean test log-likelihood in nats, with its standard error over data."""
    score = model.log_prob(x if most is None else x[:most], progress=False, batch_size=500)
    return {"nats": score.mean, "error": score.std_error}


# --- digits ---------------------------------------------------------------------------------------------------------------


def digits(seeds, rows):
    """Binarised at 8, split A; the reference figures are those of plain torch on the same split."""
    x = pgen.data.digits(binarize=True, split="random")
    recipes = {
        "MADE, one order, 2 x 512, dropout .5": (lambda s: MADE((8, 8), (512, 512), dropout=0.5, seed=s), {"epochs": 300}),
        "MADE, mixture of 16 orders, 3 x 512 residual, dropout .3": (
            lambda s: MADE((8, 8), (512,) * 3, residual=True, dropout=0.3, num_orders=16, seed=s), {"epochs": 1500},
        ),
        "PixelCNN, 5 x 64, dropout .5": (lambda s: PixelCNN((8, 8), 64, dropout=0.5, seed=s), {"epochs": 100}),
    }  # fmt: skip
    published = {"MADE, one": "-17.67", "MADE, mix": "-16.73"}

    def trained(name, seed):
        make, options = recipes[name]
        model = make(seed)
        return model, fitted(model, x.train, x.validation, seed=seed, **options)[0]

    def row(name, seed, model, seconds):
        beside = next((v for k, v in published.items() if name.startswith(k)), "")
        found = {"model": name, "seed": seed, "cpu": seconds, "beside": beside, **scored(model, x.test)}
        rows.append({**found, "validation": model.log_prob(x.validation, progress=False).mean})
        return rows

    together = "mixture of both: the 16 orders and two PixelCNNs"
    for name, seed in missing([*recipes, together], seeds, rows):
        if name != together:
            yield row(name, seed, *trained(name, seed))
            continue
        _, orders, pixels = recipes
        parts = [trained(orders, seed), trained(pixels, 2 * seed), trained(pixels, 2 * seed + 1)]
        mixture = pgen.models.MixtureOf([model for model, _ in parts])  # equal weights, nothing trained together
        yield row(name, seed, mixture, sum(seconds for _, seconds in parts))


def missing(recipes, seeds, rows):
    """Names and seeds that have no row yet, seed by seed."""
    found = {(row["model"], row["seed"]) for row in rows}
    return [(name, seed) for seed in range(seeds) for name in recipes if (name, seed) not in found]


def grey(seeds, rows):
    """17 levels, split in file order."""
    x = pgen.data.digits(integers=True)
    train, validation, test = (getattr(x, part).float() for part in ("train", "validation", "test"))
    recipes = {
        "PixelCNN, 5 x 64, dropout .5, categorical": lambda s: PixelCNN(
            (8, 8), 64, dropout=0.5, likelihood="categorical", num_classes=17, seed=s
        ),
        "PixelCNN, 5 x 64, dropout .5, 5 discretised logistics": lambda s: PixelCNN(
            (8, 8), 64, dropout=0.5, likelihood="discretized_logistic_mixture", num_classes=17, num_components=5, seed=s
        ),
        "PixelRNN, 2 x 48, dropout .5, categorical": lambda s: PixelRNN(
            (8, 8), 48, dropout=0.5, likelihood="categorical", num_classes=17, seed=s
        ),
        "PixelRNN, diagonal BiLSTM, 2 x 48, dropout .5, categorical": lambda s: PixelRNN(
            (8, 8), 48, lstm="diagonal", dropout=0.5, likelihood="categorical", num_classes=17, seed=s
        ),
    }
    for name, seed in missing(recipes, seeds, rows):
        model = recipes[name](seed)
        seconds, _ = fitted(model, train, validation, seed=seed, epochs=100)
        row = {"model": name, "seed": seed, "cpu": seconds, "beside": "86.08 to 86.37", **scored(model, test)}
        rows.append({**row, "validation": model.log_prob(validation, progress=False).mean})
        yield rows


# --- binary density sets --------------------------------------------------------------------------------------------------


def sets(seeds):
    """MADE, one order and a mixture of 8, width and dropout by validation, against independent bits."""
    rows = []
    for name in SETS:
        train, validation, test = bits_of(name)
        row = {"set": name, "independent": independent(train, test)}
        epochs = max(20, min(200, 400_000 // len(train)))
        tried = []
        for orders, dropout in ((1, 0.2), (1, 0.5), (8, 0.2), (8, 0.5)):
            model = MADE(train.shape[1:], (512,), dropout=dropout, num_orders=orders)
            seconds, _ = fitted(model, train, validation, epochs=epochs * (2 if orders > 1 else 1), schedule="cosine")
            held_out = model.log_prob(validation, progress=False).mean
            tried.append((held_out, orders, dropout, seconds, model))
        row["cpu"] = sum(entry[3] for entry in tried)
        for label, some in (("one", [e for e in tried if e[1] == 1]), ("orders", [e for e in tried if e[1] > 1])):
            best = max(some, key=lambda entry: entry[0])
            row |= {label: scored(best[4], test), f"{label}_dropout": best[2]}
        rows.append(row)
        yield rows


def bits_of(name):
    file = np.load(DATA / "binary_density" / f"{name}.npz")
    return [torch.from_numpy(file[part]).float() for part in ("train", "valid", "test")]


def independent(train, test):
    """Independent bits, add-one smoothing."""
    p = (train.sum(0) + 1) / (len(train) + 2)
    return float((test @ p.log() + (1 - test) @ (1 - p).log()).mean())


# --- 28 x 28 --------------------------------------------------------------------------------------------------------------


def idx_images(folder, name):
    raw = gzip.open(DATA / folder / f"{name}-images-idx3-ubyte.gz").read()
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28).astype(np.float32) / 255)


def binarised(x, seed):
    return torch.bernoulli(x, generator=torch.Generator().manual_seed(seed))


def omniglot():
    file = np.load(DATA / "omniglot" / "omniglot28.npz")
    images, train = torch.from_numpy(file["images"]).float(), torch.from_numpy(file["train"])
    return [images[train], images[~train]]


def pictures(minutes, rows):
    """Short budgets on 28 x 28 pixels, those that are not there yet.

    MNIST and Fashion-MNIST are binarised anew at every step, the test images once (seed 0).
    """
    models = {
        "MADE, one order, 1000": lambda: (MADE((28, 28), (1000,), dropout=0.1), 100, 1e-3),
        "PixelCNN, 5 x 20, kernels 7, 3": lambda: (PixelCNN((28, 28), 20, first_kernel=7, head=40), 32, 4e-3),
    }
    sources = {
        "MNIST, dynamic": lambda: [idx_images("mnist", part) for part in ("train", "t10k")],
        "OMNIGLOT (nearest-pixel, binary)": omniglot,
        "Fashion-MNIST, dynamic": lambda: [idx_images("fashion_mnist", part) for part in ("train", "t10k")],
    }
    found = {(row["data"], row["model"]) for row in rows}
    for source, load in sources.items():
        if all((source, name) in found for name in models):
            continue
        train, test = (mixed(part) for part in load())
        augment = None if bool(((train == 0) | (train == 1)).all()) else torch.bernoulli
        held_out, train, test = binarised(train[-500:], 1), train[:-1000], binarised(test, 0)
        for name, make in models.items():
            if (source, name) in found:
                continue
            model, batch, rate = make()
            budget = 60 * minutes * (1 if source.startswith("MNIST") else 0.4)
            steps = int(budget / step_seconds(make, train, batch, augment))
            options = {"augment": augment, "optimizer": rate, "schedule": "cosine", "batch_size": batch, "steps": steps}
            seconds, run = fitted(model, train, held_out, early_stopping=0, validate_every=max(1, steps // 5), **options)
            row = {"data": source, "model": name, "cpu": seconds, "steps": steps, "epochs": steps * batch / len(train)}
            rows.append({**row, "tier": run.tier, **scored(model, test, most=2000 if "CNN" in name else None)})
            yield rows


def mixed(images):
    """In a random order, always the same: files may be sorted by class or by writer."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def step_seconds(make, train, batch, augment, steps=25):
    """CPU seconds of a step as a graph: of the fastest block."""
    clock = Clock()
    options = {"batch_size": batch, "augment": augment, "compile": "graph", "callbacks": [clock], "progress": False}
    make()[0].fit(train[:2000], steps=steps, **options)
    return clock.seconds()


# --- what it costs --------------------------------------------------------------------------------------------------------


def sampling(images=16):
    """CPU seconds for 28 x 28 samples: by steps, and naively, one pass of the network a pixel (some timed, times all)."""
    makes = {
        "PixelCNN, 5 x 32": lambda: PixelCNN((28, 28)),
        "PixelCNN, 10 x 32": lambda: PixelCNN((28, 28), layers=10, first_kernel=7),
        "PixelRNN, 2 x 32": lambda: PixelRNN((28, 28)),
        "MADE, 2 x 500": lambda: MADE((28, 28), (500, 500)),
    }
    rows = []
    for name, make in makes.items():
        model = make().eval()
        row = {"model": name, "images": images, "naive": naive_seconds(model, images)}
        for tier in ("eager", "graph", "compiled"):
            times = []
            for seed in range(2):  # the second finds the compiler's cache
                start = time.process_time()
                model.sample(images, seed=seed, compile=tier, progress=False)
                times.append(time.process_time() - start)
            row[tier] = times[1]
        rows.append(row)
        yield rows


def naive_seconds(model, images, passes=8):
    x, size = torch.zeros(images, 784), 784
    with torch.no_grad():
        run = (
            (lambda: model.network(model.columns.encode(x, model.columns.which(x.device)), model.orders[0].argsort()))
            if isinstance(model, MADE)
            else (lambda: model.network(x, None))
        )
        run()
        times = []
        for _ in range(passes):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
    return size * min(times)


class Clock(pgen.training.Callback):
    """CPU time at the end of each block of steps."""

    def __init__(self):
        self.marks = []

    def on_log(self, step, metrics):
        self.marks.append((step, time.process_time()))

    def seconds(self):
        """The fastest block, a step."""
        marks = self.marks
        return min((t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(marks) if s1 > s0)


def steps(count=200):
    """CPU milliseconds of a training step, against the plain torch loop of the same network (Adam, fused)."""
    makes = {
        "MADE 784-500-500, batch 100": (lambda: MADE((28, 28), (500, 500)), 100, count),
        "MADE 64-512-512, batch 100": (lambda: MADE((8, 8), (512, 512)), 100, count),
        "PixelCNN 8 x 8, 5 x 32, batch 64": (lambda: PixelCNN((8, 8)), 64, count // 2),
        "PixelCNN 28 x 28, 5 x 32, batch 16": (lambda: PixelCNN((28, 28), first_kernel=7), 16, count // 10),
        "PixelRNN 8 x 8, 2 x 32, batch 64": (lambda: PixelRNN((8, 8)), 64, count // 2),
    }
    rows = []
    for name, (make, batch, number) in makes.items():
        model = make()
        x = torch.bernoulli(torch.full((1000, *model.event_shape), 0.3), generator=torch.Generator().manual_seed(0))
        row = {"model": name, "plain": plain_seconds(model, x, batch, number)}
        for tier in ("eager", "graph", "compiled"):
            clock = Clock()
            options = {"optimizer": 1e-3, "clip_norm": None, "callbacks": [clock]}
            make().fit(x, steps=number * 2, batch_size=batch, compile=tier, progress=False, **options)
            row[tier] = clock.seconds() if len(clock.marks) > 1 else float("nan")
        rows.append(row)
        yield rows


def plain_seconds(model, x, batch, count):
    """A step of the loop that one writes by hand: the fastest of four blocks."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    best = math.inf
    for block in range(4):
        start = time.process_time()
        for _ in range(count // 4):
            rows = torch.randint(0, len(x), (batch,))
            part = x[rows].flatten(1)
            if isinstance(model, MADE):
                inputs = torch.stack([part, torch.ones_like(part)], -1)
                logits = model.network(inputs, model.orders[0].argsort()).squeeze(-1)
            else:
                logits = model.network(part, None).squeeze(-1)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, part, reduction="none").sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best = min(best, (time.process_time() - start) / (count // 4)) if block else best
    return best


# --- the page -------------------------------------------------------------------------------------------------------------


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def spread(rows, sign=1):
    """Mean over seeds, and what follows it."""
    values = [sign * row["nats"] for row in rows]
    return f"{np.mean(values):.2f}" + (f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else "")


def by_model(rows, sign, beside):
    names = list(dict.fromkeys(row["model"] for row in rows))
    groups = {name: [row for row in rows if row["model"] == name] for name in names}
    header = ["model", "seeds", "validation", "test, nats", "s.e. over data", beside, "CPU s a fit"]
    body = [
        [name, len(g), f"{np.mean([sign * r['validation'] for r in g]):.2f}", spread(g, sign),
         f"{g[0]['error']:.2f}" if "error" in g[0] else "-",
         g[0]["beside"], f"{np.mean([r['cpu'] for r in g]):.0f}"]
        for name, g in groups.items()
    ]  # fmt: skip
    return table(header, body)


def runs_of(found):
    """Which parts were run when, and on what processor."""
    runs = found.get("runs", {})
    return ["Runs: " + "; ".join(f"{part} {runs[part]}" for part in PARTS if part in runs) + "."] if runs else []


def page(found, settings):
    parts = [
        "# Autoregressive models of bits and images",
        f"`python benchmarks/autoregressive.py --markdown docs/benchmarks/autoregressive.md`. {settings}. Every likelihood is "
        "exact, in nats; hyperparameters and stopping by validation data alone. Times are CPU seconds of one thread, "
        "compilation included; other work shared the machine.",
        *runs_of(found),
    ]
    if "digits" in found:
        parts += [
            "## Digits, 8 x 8, binarised at 8",
            "Split A (1149, 288, 360). Beside: the same kinds of model in plain torch on the same split (one order of MADE; a "
            "mixture of 16). To reach: -16.5. The last row is `MixtureOf` models trained apart, with equal weights; "
            "test scores of several such mixtures were seen before it was chosen, and it leads on validation by .02 nats.",
            by_model(found["digits"], 1, "beside"),
        ]
    if "grey" in found:
        parts += [
            "## Digits, 17 levels, split in file order",
            "Negative log-likelihood. Beside: a causal convolution over pixels in plain torch, two seeds. To reach: 84. The "
            "discretised logistics give 15 outputs a pixel where the categorical one gives 17; a PixelRNN is the Row LSTM, "
            "unless it says diagonal.",
            by_model(found["grey"], -1, "beside"),
        ]
    if "sets" in found:
        mixtures = json.loads(KEPT.with_name("mixtures.json").read_text())["sets"]
        rows = [
            [r["set"], f"{r['independent']:.2f}", f"{mixtures[r['set']]['svi']:.2f} ({mixtures[r['set']]['K']})",
             f"{r['one']['nats']:.2f}", f"{r['orders']['nats']:.2f} ± {r['orders']['error']:.2f}", f"{r['cpu']:.0f}"]
            for r in found["sets"]
        ]  # fmt: skip
        parts += [
            "## Binary density sets",
            "Their own splits, test nats. Independent bits with add-one smoothing; a mixture of Bernoullis (components in "
            "brackets, by validation; from [mixtures](mixtures.md)); MADE with 512 hidden units, dropout .2 or .5 by "
            "validation; ± is the standard error over data. CPU seconds are those of all four fits of MADE.",
            table(["set", "independent", "mixture", "MADE, one order", "MADE, mixture of 8 orders", "CPU s"], rows),
        ]
    if "pictures" in found:
        beside = {
            "MNIST, dynamic": {"MADE": "84.87 (85 epochs, 8000 units)", "Pixel": "81.45 (457 epochs, 15 residual blocks)"}
        }
        rows = [
            [r["data"], r["model"], f"{-r['nats']:.2f} ± {r['error']:.2f}", beside.get(r["data"], {}).get(r["model"][:5],
             beside.get(r["data"], {}).get(r["model"][:4], "")), f"{r['epochs']:.1f}", f"{r['cpu'] / 60:.1f}"]
            for r in found["pictures"]
        ]  # fmt: skip
        parts += [
            "## 28 x 28 pixels, some CPU time each",
            "Negative log-likelihood of the test images (PixelCNN: of a random 2000), ± standard error over images. "
            "MNIST and Fashion-MNIST are binarised anew at every step, test images once (seed 0). The published figures took "
            "GPU hours; what is missing here is epochs and width. OMNIGLOT is the nearest-pixel "
            "binary version, without a published figure.",
            table(["data", "model", "test, nats", "published", "epochs", "CPU minutes"], rows),
        ]
    if "sampling" in found:
        rows = [
            [
                r["model"],
                f"{r['naive']:.1f}",
                *(f"{r[t]:.2f} ({r['naive'] / r[t]:.0f}x)" for t in ("eager", "graph", "compiled")),
            ]
            for r in found["sampling"]
        ]
        parts += [
            "## Samples of 28 x 28 pixels",
            "CPU seconds for 16 images: one pass of the network a pixel (eight timed, times 784), against cached steps in "
            "each tier, capture and compilation (found in the compiler's cache) included. Tests check that both draw the "
            "same pixels.",
            table(["model", "one pass a pixel", "eager", "graph", "compiled"], rows),
        ]
    if "steps" in found:
        rows = [[r["model"], *(f"{1e3 * r[t]:.2f}" for t in ("plain", "eager", "graph", "compiled"))] for r in found["steps"]]
        parts += [
            "## A training step",
            "CPU milliseconds, the fastest block: the loop that one writes by hand in plain torch with fused Adam, and `fit` "
            "in each tier, on the same network and batch.",
            table(["network", "plain torch", "eager", "graph", "compiled"], rows),
        ]
    if missing := [part for part in PARTS if part not in found]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", type=Path, default=KEPT, help="rows found so far (JSON)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5.0, help="budget of a fit on 28 x 28 pixels, CPU minutes")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    runs = {
        "steps": steps,
        "sampling": sampling,
        "digits": lambda: digits(given.seeds, found.get("digits", [])),
        "sets": lambda: sets(given.seeds),
        "grey": lambda: grey(given.seeds, found.get("grey", [])),
        "pictures": lambda: pictures(given.minutes, found.get("pictures", [])),
    }
    settings = (
        f"{date.today()}, Python {platform.python_version()}, torch {version('torch')}, one thread of {platform.machine()}"
    )
    for part in given.parts:
        for rows in runs[part]():
            found[part] = rows
            found.setdefault("runs", {})[part] = f"{date.today()}, {cpu_name()}"
            given.keep.write_text(json.dumps(found, indent=1))
            print(part, rows[-1], flush=True)
        if given.markdown:
            given.markdown.write_text(page(found, settings))


if __name__ == "__main__":
    main()
