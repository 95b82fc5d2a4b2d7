"""Normalizing flows beside zuko's plain training loop: toys with a known entropy, digits, tables.

    python benchmarks/flows.py --markdown docs/benchmarks/flows.md

`--parts toys interval digits images tables speed`, `--results FILE` keeps what is done, `--steps` and `--table-steps` are the
lengths of the runs, `--minutes` the CPU time of a fit to images, `--splits` how many of the ten splits of a table. Both sides
have the same number of maps, networks, bins, steps and batch; seconds are those of the processor, of all threads and children
of the process, with compilation. On real data the best of 20 looks at the validation data is kept, and the test data are scored
once. Data in `$PGEN_DATA` or `../shared/data`.
"""

import argparse
import copy
import gzip
import itertools
import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import zuko
from svi import cpu_name

import pgen
from pgen.data import Compose, Dequantize, Logit
from pgen.data.toy import checkerboard, eight_gaussians, gaussian_grid, two_moons
from pgen.models import flow as flow_module

HERE = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PGEN_DATA", HERE.parent / "shared" / "data"))
TOYS = {"8gaussians": eight_gaussians, "moons": two_moons, "checkerboard": checkerboard, "grid25": gaussian_grid}
PUBLISHED = {"8gaussians": 0.017, "moons": 0.001, "checkerboard": 0.060, "grid25": 0.891}
TABLES = ("concrete", "bike", "elevators", "protein", "parkinsons", "energy", "yacht", "keggdirected")
ATOM = 0.05
"""A value that so large a share of the rows have is an atom, which no density fits: its column is spread."""
BATCH, LOOKS = 256, 20


def cpu_seconds():
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def zuko_loop(x, steps, validation=None, seed=0, **network):
    """A neural spline flow in zuko's own spelling: Adam, cosine rate, gradients clipped."""
    torch.manual_seed(seed)
    flow = zuko.flows.NSF(x.shape[1], **network)
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, kept = -math.inf, None
    for step in range(steps):
        loss = -flow().log_prob(x[torch.randint(len(x), (BATCH,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if validation is not None and (step + 1) % (steps // LOOKS) == 0:
            with torch.no_grad():
                bound = float(flow().log_prob(validation).mean())
            if bound > best:
                best, kept = bound, copy.deepcopy(flow.state_dict())
    if kept is not None:
        flow.load_state_dict(kept)
    return flow


def toys(steps, done):
    for name, make in TOYS.items():
        target = make()
        x, test = target.sample(100_000, seed=1), target.sample(20_000, seed=2)
        truth = target.log_prob(test)
        for side, options in (("pgen", {}), ("pgen, 25", {"base_components": 25}), ("zuko", None)):
            if f"toy {name}, {side}" in done:
                continue
            began = cpu_seconds()
            if options is None:
                flow = zuko_loop(x, steps, transforms=3, hidden_features=(128, 128))
                with torch.no_grad():
                    row = gap(truth, flow().log_prob(test))
            else:
                flow = pgen.models.Flow((2,), **options)
                run = flow.fit(x, steps=steps, batch_size=BATCH, progress=False)
                row = gap(truth, flow.log_prob(test).value) | {"tier": run.tier}
            yield f"toy {name}, {side}", row | {"seconds": cpu_seconds() - began, "steps": steps}


def interval(done):
    """What the start of the splines' interval is worth: data standardised as they are, or scaled to fill it (the default)."""
    variants = {"standardised, 5": (5.0, False), "standardised, 3": (3.0, False), "filled, 4": (4.0, True)}
    start = flow_module._scale_to_fill
    for name, (variant, (bound, fill)) in itertools.product([*TOYS, "concrete", "parkinsons"], variants.items()):
        if f"interval {name}, {variant}" in done:
            continue
        flow_module._scale_to_fill = start if fill else lambda x, end: torch.ones_like(x[0])
        if name in TOYS:
            target = TOYS[name]()
            test = target.sample(20_000, seed=2)
            flow = pgen.models.Flow((2,), tail_bound=bound)
            flow.fit(target.sample(100_000, seed=1), steps=1500, batch_size=BATCH, progress=False)
            value = gap(target.log_prob(test), flow.log_prob(test).value)["gap"]
        else:
            train, validation, _ = table(name)
            flow = pgen.models.Flow((train.shape[1],), tail_bound=bound)
            options = {"validate_every": 50, "early_stopping": LOOKS, "progress": False}
            flow.fit(train, validation=validation, steps=1000, batch_size=BATCH, **options)
            value = flow.log_prob(validation).mean
        yield f"interval {name}, {variant}", value
    flow_module._scale_to_fill = start


class Clock(pgen.training.Callback):
    """CPU time at the end of each block of steps."""

    def __init__(self):
        self.marks = []

    def on_log(self, step, metrics):
        self.marks.append((step, time.process_time()))

    def milliseconds(self):
        """The fastest block, a step."""
        return 1e3 * min((t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in itertools.pairwise(self.marks))


def speed(done, rounds=3, steps=60):
    """CPU milliseconds of a step; sides take turns, and the fastest of their blocks counts."""
    for size in (2, 10):
        if f"speed {size}" in done:
            continue
        x, row = torch.randn(4096, size), {}
        for _ in range(rounds):
            for tier in ("graph", "compiled"):
                clock = Clock()
                options = {"batch_size": BATCH, "compile": tier, "callbacks": [clock], "progress": False}
                pgen.models.Flow((size,)).fit(x, steps=10 * steps if tier == "compiled" else steps, **options)
                row[tier] = min(row.get(tier, math.inf), clock.milliseconds())
            for _ in range(3):
                began = time.process_time()
                zuko_loop(x, steps // 3, transforms=3, hidden_features=(128, 128))
                row["zuko"] = min(row.get("zuko", math.inf), 1e3 * (time.process_time() - began) / (steps // 3))
        yield f"speed {size}", row


def gap(truth, values):
    difference = truth.double() - values.double()
    return {"gap": float(difference.mean()), "error": float(difference.std() / math.sqrt(len(difference)))}


def digit_split():
    """Split A: a fifth to test, a fifth of the rest to validate."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(load_digits().images, test_size=0.2, random_state=0)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0)
    return [torch.tensor(part).float() for part in (train, validation, test)]


def digits(done):
    if "digits" in done:
        return
    train, validation, test = digit_split()
    rows = {}
    for seed in range(3):
        began = cpu_seconds()
        flow = pgen.models.Flow(
            (8, 8), transforms=1, hidden=(256, 256), bins=16, dropout=0.3, preprocess=Dequantize(17), seed=seed
        )
        run = flow.fit(train, validation=validation, epochs=300, batch_size=128, seed=seed, progress=False)
        scores = [flow.log_prob(test, seed=u).bits_per_dim for u in range(5)]
        held_out = [flow.log_prob(validation, seed=u).bits_per_dim for u in range(5)]
        rows[f"seed {seed}"] = {
            "test": float(np.mean(scores)), "validation": float(np.mean(held_out)), "seconds": cpu_seconds() - began,
            "steps": run.steps,
        }  # fmt: skip
    yield "digits", rows


def mixed(images, seed=0):
    """In a random order, always the same."""
    return torch.tensor(images[np.random.default_rng(seed).permutation(len(images))])


def pictures():
    """Training, validation and test images, whole levels; levels; scales of the flow and channels of its networks."""

    def digit_images():
        return digit_split(), 17

    def mnist():
        split = pgen.data.idx_folder(DATA / "mnist")
        return [(255 * part).round() for part in (split.train, split.validation[:500], mixed(split.test.numpy())[:2000])], 256

    def cifar():
        file = np.load(DATA / "cifar10_5k" / "cifar10_5k.npz")
        train, test = (mixed(file[f"{part}_images"].transpose(0, 3, 1, 2)).float() for part in ("train", "test"))
        return [train[:3500], train[3500:], test], 256

    return {"digits 8 x 8": (digit_images, 2, 64), "MNIST": (mnist, 2, 64), "CIFAR-10, first 5000": (cifar, 3, 96)}


def images(minutes, done):
    """The multi-scale flow on dequantised images, beside a Gaussian on the same, in so many CPU minutes."""
    for name, (load, levels, hidden) in pictures().items():
        if f"images {name}" in done:
            continue
        (train, validation, test), count = load()
        shape = tuple(train.shape[1:])

        def make(shape=shape, levels=levels, hidden=hidden, count=count):
            change = Compose([Dequantize(count), Logit(0.05)])
            return pgen.models.Glow(shape, levels=levels, steps=8, hidden=hidden, preprocess=change)

        clock = Clock()
        make().fit(train[:2000], steps=40, batch_size=64, compile="graph", callbacks=[clock], progress=False)
        steps = int(60e3 * minutes / clock.milliseconds())
        began, flow = cpu_seconds(), make()
        options = {"validate_every": max(1, steps // LOOKS), "early_stopping": LOOKS, "progress": False}
        run = flow.fit(train, validation=validation, steps=steps, batch_size=64, **options)
        row = {"seconds": cpu_seconds() - began, "steps": run.steps, "tier": run.tier, "epochs": steps * 64 / len(train)}
        score = flow.log_prob(test, progress=False)
        row |= {"bits": score.bits_per_dim, "error": score.std_error / (math.log(2) * math.prod(shape))}
        few = math.prod(shape) > 1000  # more numbers than data: a few directions and equal noise
        gaussian = (
            pgen.models.ProbabilisticPCA(shape, 200, preprocess=Dequantize(count))
            if few
            else pgen.models.Gaussian(shape, preprocess=Dequantize(count))
        )
        gaussian.fit(train[:20_000])
        row["gaussian"] = gaussian.log_prob(test, progress=False).bits_per_dim
        yield f"images {name}", row


def read(path):
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", ndmin=2)


def table(name, split=0):
    """A split of a table: constant columns left out, columns with atoms spread, standardised; a tenth validates."""
    rows, mask = (read(DATA / "uci_regression" / f"{name}.{part}.csv.gz") for part in ("data", "test_mask"))
    rows = spread(rows[:, rows.std(0) > 0])
    held_out = mask[:, split] > 0.5
    train, test = rows[~held_out], rows[held_out]
    train = train[np.random.default_rng(split).permutation(len(train))]
    mean, sd = train.mean(0), train.std(0)
    train, test = (torch.from_numpy((part - mean) / sd).float() for part in (train, test))
    cut = len(train) // 10
    return train[cut:], train[:cut], test


def spread(rows):
    """Columns with atoms (a value in a twentieth of the rows) plus uniform noise as wide as the usual gap of their values."""
    noise, rows = np.random.default_rng(0), rows.copy()
    for column in rows.T:
        values, counts = np.unique(column, return_counts=True)
        if counts.max() >= ATOM * len(column):
            column += np.median(np.diff(values)) * noise.random(len(column))
    return rows


def tables(steps, done, names, splits):
    for split, name in itertools.product(range(splits), names):
        if f"table {name} {split}" in done:
            continue
        train, validation, test = table(name, split)
        size, row = train.shape[1], {"rows": len(train), "columns": train.shape[1], "steps": steps}
        gaussian = pgen.models.Gaussian((size,))
        gaussian.fit(train)
        row["gaussian"] = gaussian.log_prob(test).mean
        began = cpu_seconds()
        flow = pgen.models.Flow((size,), seed=split)
        run = flow.fit(
            train, validation=validation, steps=steps, batch_size=BATCH, progress=False, validate_every=steps // LOOKS,
            early_stopping=LOOKS, compile="graph", seed=split,
        )  # fmt: skip
        mine = flow.log_prob(test).value
        row["pgen"] = {"mean": float(mine.mean()), "seconds": cpu_seconds() - began, "tier": run.tier}
        began = cpu_seconds()
        peer = zuko_loop(train, steps, validation, seed=split, transforms=3, hidden_features=(128, 128))
        with torch.no_grad():
            theirs = peer().log_prob(test).double()
        row["zuko"] = {"mean": float(theirs.mean()), "seconds": cpu_seconds() - began}
        row["difference"] = gap(mine, theirs)
        yield f"table {name} {split}", row


def markdown(found):
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "zuko", "pyro-ppl"))
    head = (
        f"One thread, Python {platform.python_version()}, {versions}, pgen {pgen.__version__}. Other jobs shared the machine. "
    )
    head += "Runs: " + "; ".join(f"{part} {when}" for part, when in found.get("runs", {}).items()) + "."
    parts = [["# Normalizing flows", "", "`python benchmarks/flows.py`.", __doc__.strip().split("\n\n")[2], "", head, ""]]
    for prefix, write in (
        ("toy ", toy_lines),
        ("interval ", interval_lines),
        ("digits", digit_lines),
        ("images ", image_lines),
        ("table ", table_lines),
        ("speed ", speed_lines),
    ):
        if rows := {name.removeprefix(prefix): row for name, row in found.items() if name.startswith(prefix)}:
            parts.append(write(rows))
    return "\n".join(line for part in parts for line in part)


def toy_lines(rows):
    steps = next(iter(rows.values()))["steps"]
    lines = [
        "## Toys: how far the mean log-density of 20 000 test draws lies below minus the entropy, nats",
        "",
        f"NSF (AR), 3 maps of 128-128, 8 bins; {steps} steps of {BATCH}. pgen: the defaults, and a base of 25 Gaussians in the",
        "place of the normal one. The last column is zuko's after 6000 steps of 256, in 40 s, measured at another time. The",
        "first runs compiled the step, later ones found it in the compiler's cache.",
        "",
        "| target | pgen | CPU s | pgen, 25 Gaussians | CPU s | zuko | CPU s | zuko, 6000 steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in TOYS:
        sides = [rows[f"{name}, {side}"] for side in ("pgen", "pgen, 25", "zuko") if f"{name}, {side}" in rows]
        cells = [f"{r['gap']:.4f} ± {r['error']:.4f} | {r['seconds']:.0f}" for r in sides]
        if len(cells) == 3:
            lines.append(f"| {name} | {' | '.join(cells)} | {PUBLISHED[name]} |")
    return [*lines, ""]


def interval_lines(rows):
    variants = list(dict.fromkeys(name.partition(", ")[2] for name in rows))
    lines = [
        "## Where the interval of the splines lies",
        "",
        "How the default was chosen: data standardised, with `tail_bound` 5 or 3, or scaled until all but a thousandth of each",
        "number lie within 0.85 of a `tail_bound` of 4 (the default). Toys: 1500 steps, nats below minus the entropy. Tables:",
        "1000 steps, mean log-density of the *validation* rows of the first split.",
        "",
        "| data | " + " | ".join(variants) + " |",
        "|---" + "|---:" * len(variants) + "|",
    ]
    for name in dict.fromkeys(name.partition(", ")[0] for name in rows):
        cells = [f"{rows[f'{name}, {v}']:.3f}" if f"{name}, {v}" in rows else "not run" for v in variants]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def digit_lines(rows):
    rows = rows[""]
    lines = [
        "## Digits 8x8, y = (x + u) / 17, bits a dimension",
        "",
        "Split A: 1149 to train, 288 to validate, 360 to test; mean of 5 test dequantisations. NSF (AR), one map of 256-256,",
        "16 bins, dropout 0.3, 300 epochs of batch 128, chosen on validation among five settings. zuko's NSF (AR), one map of",
        "256, 16 bins, gave 2.203 and its MAF 2.581 on this split (measured at another time).",
        "",
        "| seed | validation | test | CPU s |",
        "|---|---:|---:|---:|",
    ]
    lines += [f"| {name[5:]} | {r['validation']:.4f} | {r['test']:.4f} | {r['seconds']:.0f} |" for name, r in rows.items()]
    return [*lines, f"| mean | | **{np.mean([r['test'] for r in rows.values()]):.4f}** | |", ""]


def image_lines(rows):
    lines = [
        "## Images, bits a dimension",
        "",
        "`Glow`: 8 steps a scale, 2 scales of 64 channels (CIFAR-10: 3 of 96), levels dequantised, then the logit; some CPU",
        "minutes each, the best of 20 looks at validation data; test images scored once (MNIST: a random 2000), ± over images.",
        "Gaussian: full covariance, of CIFAR-10 200 directions and equal noise. Published with GPU days, on all training data:",
        "MNIST 1.05 and CIFAR-10 3.35 (Glow), 1.06 and 3.49 (RealNVP), a Gaussian on CIFAR-10 4.70. CIFAR-10 here is the first",
        "tenth.",
        "",
        "| data | steps | epochs | CPU min | Glow | Gaussian |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['steps']} | {r['epochs']:.1f} | {r['seconds'] / 60:.1f} | {r['bits']:.3f} ± {r['error']:.3f} | "
            f"{r['gaussian']:.3f} |"
        )
    return [*lines, ""]


def table_lines(rows):
    names = [name for name in TABLES if f"{name} 0" in rows]
    first = rows[f"{names[0]} 0"]
    lines = [
        "## UCI tables, joint density: mean test log-density of standardised columns, nats",
        "",
        "Columns with one value in a twentieth of the rows have no density; uniform noise as wide as the usual gap between",
        "their values is added, the same for all sides. Constant columns are left out. NSF (AR), 3 maps of 128-128, 8 bins;",
        f"{first['steps']} steps of {BATCH}, in the graph tier, for so few do not pay for compiling. Means over the splits",
        "that were run; ± is the standard error over splits, of a single split that over its test data. The full Gaussian is",
        "the closed form on the same rows.",
        "",
        "| table | training rows | columns | splits | Gaussian | pgen | CPU s | zuko | CPU s | pgen - zuko, paired |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in names:
        some = [row for key, row in rows.items() if key.split()[0] == name]
        means = [f"{np.mean([row[s]['mean'] for row in some]):.3f} | {np.mean([row[s]['seconds'] for row in some]):.0f}"
                 for s in ("pgen", "zuko")]  # fmt: skip
        found = [row["difference"]["gap"] for row in some]
        error = np.std(found, ddof=1) / math.sqrt(len(found)) if len(found) > 1 else some[0]["difference"]["error"]
        gaussian = np.mean([row["gaussian"] for row in some])
        lines.append(
            f"| {name} | {some[0]['rows']} | {some[0]['columns']} | {len(some)} | {gaussian:.3f} | {' | '.join(means)} | "
            f"{np.mean(found):+.3f} ± {error:.3f} |"
        )
    return [*lines, ""]


def speed_lines(rows):
    lines = [
        "## A training step, CPU ms",
        "",
        f"NSF (AR), 3 maps of 128-128, 8 bins, batch {BATCH}: the fastest block of each side, which took turns.",
        "",
        "| numbers | zuko | pgen, graph | pgen, compiled | zuko / compiled |",
        "|---:|---:|---:|---:|---:|",
    ]
    for size, r in rows.items():
        lines.append(f"| {size} | {r['zuko']:.2f} | {r['graph']:.2f} | {r['compiled']:.2f} | {r['zuko'] / r['compiled']:.2f} |")
    return [*lines, ""]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", default=["toys", "interval", "digits", "images", "tables", "speed"])
    parser.add_argument("--tables", nargs="+", default=TABLES)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--table-steps", type=int, default=1000)
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--results", type=Path, default=HERE / "docs" / "benchmarks" / "flows.json")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(options.results.read_text()) if options.results.exists() else {}
    runs = {
        "toys": lambda: toys(options.steps, done),
        "interval": lambda: interval(done),
        "digits": lambda: digits(done),
        "images": lambda: images(options.minutes, done),
        "tables": lambda: tables(options.table_steps, done, options.tables, options.splits),
        "speed": lambda: speed(done),
    }
    for part in options.parts:
        for name, row in runs[part]():
            done[name] = row
            done.setdefault("runs", {})[part] = f"{time.strftime('%Y-%m-%d')}, {cpu_name()}"
            options.results.write_text(json.dumps(done, indent=1))
            print(name, row, flush=True)
    if options.markdown:
        options.markdown.write_text(markdown(done))


if __name__ == "__main__":
    main()
