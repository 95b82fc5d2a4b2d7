"""Kernel density estimates: exactness and speed beside scikit-learn, bandwidths on digits, and why samples are not judged so.

    python benchmarks/kde.py --markdown docs/benchmarks/kde.md     # all; half an hour, most of it scikit-learn's
    python benchmarks/kde.py --parts narrow cost                   # some; others are kept (docs/benchmarks/kde.json)
    python benchmarks/kde.py --quick                               # small sizes, to see that it runs; nothing is kept

The truth is a log-sum-exp in float64 of differences, formed pair by pair.
"""

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import sklearn
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KernelDensity as Tree

import pgen
from pgen.models import KernelDensity

H = 0.5
DIMS = (2, 8, 32, 64)
PRECISIONS = ("float64", "float32")
LINES: list[str] = []
KEPT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "kde.json"


def say(*lines):
    """A line of the page."""
    for line in lines:
        print(line, flush=True)
        LINES.append(line)


def normal(rows, dim, seed):
    """Standard normal data, float64."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def truth(points, x, h=H):
    """log p by brute force in float64."""
    out = []
    for row in x.split(4):
        squared = (row[:, None] - points).square().sum(-1)
        out.append(torch.logsumexp(-0.5 * squared / h**2, 1))
    constant = math.log(len(points)) + points.shape[1] * math.log(h * math.sqrt(2 * math.pi))
    return torch.cat(out) - constant


def fitted(points, precision, **settings):
    """Ours, with the bandwidth of the comparison unless told otherwise."""
    kde = KernelDensity((points.shape[1],), **{"bandwidth": H, **settings})
    kde.fit(points, precision=precision, device="cpu", progress=False)
    return kde


def accuracy(rows, queries):
    """Largest errors of all sides."""
    say("## Exactness", "")
    say(
        f"N(0, I), {rows} points, {queries} queries, h = {H}; largest error of log p, nats. The last column is the mean of the "
        "truth. ours is `KernelDensity(..., bandwidth=0.5).fit(x, precision=...)`; float32 is compared with the truth at the "
        "rounded data.",
        "",
    )
    say("| features | scikit-learn, default | its mean error | leaf_size = n | ours, float64 | float32 | mean |")
    say("|---:|---:|---:|---:|---:|---:|---:|")
    for dim in (2, 4, 8, 12, 15, 24, 32, 64):
        points, x = normal(rows, dim, 0), normal(queries, dim, 1)
        right = truth(points, x)
        cells = []
        for leaf in (40, rows):
            tree = Tree(bandwidth=H, leaf_size=leaf).fit(points.numpy())
            error = torch.from_numpy(tree.score_samples(x.numpy())) - right
            cells += [f"{float(error.abs().max()):.2g}"] + ([f"{float(error.mean()):+.2g}"] if leaf == 40 else [])
        for precision in PRECISIONS:
            near, far = (points, x) if precision == "float64" else (points.float().double(), x.float().double())
            value = fitted(points, precision).log_prob(x, progress=False).value
            cells.append(f"{float((value - truth(near, far)).abs().max()):.1e}")
        say(f"| {dim} | " + " | ".join(cells) + f" | {float(right.mean()):.2f} |")
    say("")


def clocked(question, repeats=1):
    """Least CPU seconds, and least wall seconds."""
    found = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        question()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return tuple(min(column) for column in zip(*found))


def speed(sizes, queries, most_pairs):
    """Seconds of all sides."""
    threads = torch.get_num_threads()
    say("## Speed", "")
    say(
        f"{queries} queries, h = {H}, torch on {threads} thread{'s' * (threads > 1)} (scikit-learn's tree uses one); CPU "
        "seconds of the process, wall seconds in brackets. scikit-learn answers the share of the queries that is given, "
        "and its seconds are scaled up by it (its cost is proportional to the queries). Times are of `log_prob`, least of two "
        "(scikit-learn: one); building the tree is not counted.",
        "",
    )
    say("| points | features | scikit-learn, default | share | ours, float64 | ours, float32 | CPU ratio, float64 | float32 |")
    say("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for size in sizes:
        for dim in DIMS:
            points, x = normal(size, dim, 0), normal(queries, dim, 1)
            asked = max(1, min(queries, most_pairs // (size * (1 + dim // 8))))
            tree = Tree(bandwidth=H).fit(points.numpy())
            theirs = [t * queries / asked for t in clocked(lambda tree=tree, x=x, n=asked: tree.score_samples(x[:n].numpy()))]
            ours = []
            for precision in PRECISIONS:
                kde = fitted(points, precision)
                ours.append(clocked(lambda kde=kde, x=x: kde.log_prob(x, progress=False), 2))
            cells = " | ".join(f"{cpu:.2f} ({wall:.2f})" for cpu, wall in ours)
            ratios = " | ".join(f"{theirs[0] / cpu:.1f}" for cpu, _ in ours)
            say(f"| {size} | {dim} | {theirs[0]:.1f} ({theirs[1]:.1f}) | {asked / queries:.3g} | {cells} | {ratios} |")
    say("")


def narrow(size, queries):
    """Two features at narrow bandwidths, where a tree can leave much out."""
    points, x = normal(size, 2, 0), normal(queries, 2, 1)
    say(
        "## Narrow bandwidths",
        "",
        f"2 features, {size} points, {queries} queries, float64, CPU seconds. The first bandwidth is Silverman's. "
        "scikit-learn's tree leaves out what it may: nothing by default, with `rtol` what changes a density by less than that "
        "share of it. Ours takes the points from the nearest on and leaves out what adds less than a part in 1e15.",
        "",
        "| h | scikit-learn, default | rtol = 1e-6 | ours | default / ours | rtol = 1e-6 / ours |",
        "|---:|---:|---:|---:|---:|---:|",
    )
    rule = float(fitted(points, "float64", bandwidth="silverman", covariance="spherical").bandwidth)
    for h in (rule, 0.05, 0.02):
        kde = fitted(points, "float64", bandwidth=h)
        trees = [Tree(bandwidth=h, rtol=rtol).fit(points.numpy()) for rtol in (0.0, 1e-6)]
        theirs = [clocked(lambda tree=tree: tree.score_samples(x[: queries // 4].numpy()))[0] * 4 for tree in trees]
        ours = clocked(lambda kde=kde: kde.log_prob(x, progress=False), 2)[0]
        say(f"| {h:.3f} | {theirs[0]:.2f} | {theirs[1]:.2f} | {ours:.2f} | {theirs[0] / ours:.1f} | {theirs[1] / ours:.1f} |")
    say("")


def cost(sizes):
    """Time and memory as the points grow, each size in a process of its own."""
    say("## Cost and memory", "")
    say("8 features, float32, 1000 queries; peak memory of a process of its own, and what it holds before the question.", "")
    say("| points | CPU s | ns a pair | peak MB | of which before `log_prob` |", "|---:|---:|---:|---:|---:|")
    for size in sizes:
        command = [sys.executable, __file__, "--cost", str(size), "8", "float32"]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        pair = found["cpu"] / size / 1000 * 1e9
        say(f"| {size} | {found['cpu']:.2f} | {pair:.2f} | {found['peak']:.0f} | {found['before']:.0f} |")
    command = [sys.executable, __file__, "--cost", str(sizes[-2]), "64", "float64"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    say("", f"{sizes[-2]} points, 64 features, float64: peak {found['peak']:.0f} MB, {found['before']:.0f} before.", "")


def one_cost(size, dim, precision):
    """CPU seconds and megabytes of one question."""
    points, x = normal(size, dim, 0).to(getattr(torch, precision)), normal(1000, dim, 1)
    kde = fitted(points, precision)
    before = peak_megabytes()
    cpu, _ = clocked(lambda: kde.log_prob(x, progress=False))
    print(json.dumps({"cpu": cpu, "before": before, "peak": peak_megabytes()}))


def peak_megabytes():
    """The most memory that this program has held; what its parent held before does not count."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def bits(nats):
    """Bits a pixel of the 17 grey levels."""
    return (-nats / 64 + math.log(17)) / math.log(2)


def digits():
    """Leave-one-out bandwidths beside grids."""
    from sklearn.model_selection import train_test_split

    say("## Bandwidths", "")
    x = load_digits().data
    rest, test = train_test_split(x, test_size=0.2, random_state=0)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0)
    rng = np.random.default_rng(0)
    train, validation = (torch.from_numpy((part + rng.random(part.shape)) / 17) for part in (train, validation))
    both = torch.cat([train, validation])
    tests = [torch.from_numpy((test + rng.random(test.shape)) / 17) for _ in range(5)]

    def row(name, kde, seconds):
        nats = np.mean([kde.log_prob(part, progress=False).mean for part in tests])
        spread = kde.bandwidth if kde.bandwidth.dim() < 2 else (kde.bandwidth @ kde.bandwidth.T).diagonal().sqrt()
        h = f"{float(spread):.4f}" if spread.dim() == 0 else f"{float(spread.min()):.3f} to {float(spread.max()):.3f}"
        say(f"| {name} | {h} | {nats:.3f} | {bits(nats):.4f} | {seconds:.0f} |")

    say(
        "scikit-learn's digits, 64 pixels, 17 levels, y = (x + u) / 17; `train_test_split(.2, random_state=0)` twice, 1149 / "
        "288 / 360; points are train and validation together, dequantised once; mean of five dequantisations of the test set. "
        "Settings are chosen without the test set: the grid by validation, leave-one-out by the points themselves. To reach: "
        "32.173 nats, 3.3622 bits/dim (exact, h = .126, another dequantisation).",
        "",
    )
    say("| bandwidth | h | nats | bits/dim | CPU s |", "|---|---:|---:|---:|---:|")
    grid = np.logspace(-1.3, -0.3, 40)
    began = time.process_time()
    best = max(grid, key=lambda h: fitted(train, "float64", bandwidth=float(h)).log_prob(validation, progress=False).mean)
    row("grid of 40 by validation", fitted(both, "float64", bandwidth=float(best)), time.process_time() - began)
    for name, settings in {
        "leave-one-out, one": {"covariance": "spherical"},
        "the same, nearest neighbours": {"covariance": "spherical", "adaptive": "nearest"},
        "Silverman, one a feature": {"bandwidth": "silverman"},
        "Scott, full covariance": {"bandwidth": "scott", "covariance": "full"},
        "leave-one-out, one a feature (default)": {},
        "leave-one-out, full covariance": {"covariance": "full"},
    }.items():
        began = time.process_time()
        kde = KernelDensity((64,), **settings)
        kde.fit(both, precision="float64", progress=False)
        row(name, kde, time.process_time() - began)
    tree = Tree(bandwidth=float(best)).fit(both.numpy())
    wrong = np.mean([tree.score_samples(part.numpy()).mean() for part in tests])
    say("", f"scikit-learn's default tree at the grid's h: {wrong:.3f} nats.", "")


def pca(splits=10):
    """scikit-learn's example, digits in 15 principal components: bandwidths by leaving out folds, rows and groups."""
    from sklearn.decomposition import PCA
    from sklearn.model_selection import KFold

    data = torch.from_numpy(PCA(n_components=15, whiten=False).fit_transform(load_digits().data))
    grid = np.logspace(-1, 1, 20)

    def held_out(a, b, h):
        return fitted(a, "float64", bandwidth=float(h)).log_prob(b, progress=False).value

    def total(x, h, folds):
        """A fold's total, averaged over the folds: scikit-learn's ``score``."""
        return sum(float(held_out(x[a], x[b], h).sum()) for a, b in folds) / len(folds)

    def learned(x, group=None):
        kde = KernelDensity((15,), covariance="spherical")
        kde.fit(x if group is None else {"x": x, "group": group}, precision="float64", progress=False)
        return float(kde.bandwidth)

    def fold_of(x):  # five runs of rows, as KFold(5) cuts them
        found = torch.zeros(len(x), dtype=torch.long)
        for number, (_, b) in enumerate(KFold(5).split(x)):
            found[b] = number
        return found

    folds = list(KFold(5).split(data))
    ways = {
        "grid of 20, 5 folds in file order": max(grid, key=lambda h: total(data, h, folds)),
        "leave one row out": learned(data),
        "leave one of the same 5 folds out (groups)": learned(data, fold_of(data)),
    }
    say(
        "scikit-learn's example: digits, PCA to 15 numbers, `KFold(5)` in file order, `logspace(-1, 1, 20)`; to reach: "
        "3.79269, a fold's total -16721.45. By exact sums:",
        "",
        "| bandwidth | h | total of a fold |",
        "|---|---:|---:|",
        *(f"| {name} | {h:.5f} | {total(data, h, folds):.2f} |" for name, h in ways.items()),
        "",
    )
    found = []
    for seed in range(splits):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)))
        train, test = data[order[: len(data) // 5 * 4]], data[order[len(data) // 5 * 4 :]]
        mixed = list(KFold(5).split(train))
        best = max(grid, key=lambda h, x=train, f=mixed: total(x, h, f))
        own = learned(train)
        found.append([best, own, float(held_out(train, test, own).mean() - held_out(train, test, best).mean())])
    gain = np.array(found)
    train, test = data[: len(data) // 5 * 4], data[len(data) // 5 * 4 :]
    last = {
        "grid": max(grid, key=lambda h: total(train, h, list(KFold(5).split(train)))),
        "rows": learned(train),
        "groups": learned(train, fold_of(train)),
    }
    scores = {name: float(held_out(train, test, h).mean()) for name, h in last.items()}
    say(
        f"The file is ordered by writer, so its folds are new writers and random ones are not. {splits} random splits, a fifth "
        f"to test, both ways given the training rows alone (grid: 5 folds, mean h {gain[:, 0].mean():.2f}; leaving out rows: "
        f"{gain[:, 1].mean():.2f}): leaving out rows gains {gain[:, 2].mean():+.4f} ± "
        f"{gain[:, 2].std(ddof=1) / math.sqrt(splits):.4f} nats a test datum. The last fifth of the file to test, new writers: "
        f"grid {scores['grid']:.3f} (h {last['grid']:.2f}), rows {scores['rows']:.3f} ({last['rows']:.2f}), groups of a fifth "
        f"of the training rows {scores['groups']:.3f} ({last['groups']:.2f}).",
        "",
    )


def parzen():
    """Cluster centres above data."""
    from sklearn.cluster import KMeans

    say("## Why samples are not judged by Parzen windows", "")
    x = np.random.default_rng(0).permutation(load_digits().data / 16)
    train, validation, test = (torch.from_numpy(part) for part in (x[:900], x[900:1200], x[1200:]))
    sides = {
        "real training images": train[:300],
        "k-means centres of the training images": torch.from_numpy(
            KMeans(300, n_init=1, random_state=0).fit(train.numpy()).cluster_centers_
        ),
        "other real images (held out)": torch.from_numpy(x[1200 - 300 : 1200]),
    }
    say(
        "300 'samples' as points, h chosen on validation, mean log-density of 597 held-out digits, nats. Centres are blurred "
        "averages, no digits that anybody wrote, and score above real images: the score is not about samples.",
        "",
    )
    say("| points | h | nats |", "|---|---:|---:|")
    for name, points in sides.items():
        held = validation if "held out" not in name else train[:300]
        grid = np.logspace(-1.2, 0, 30)
        best = max(
            grid, key=lambda h, p=points, v=held: fitted(p, "float64", bandwidth=float(h)).log_prob(v, progress=False).mean
        )
        score = fitted(points, "float64", bandwidth=float(best)).log_prob(test, progress=False)
        say(f"| {name} | {best:.3f} | {score.mean:.2f} ± {score.std_error:.2f} |")
    say("")


PARTS = {
    "accuracy": lambda quick: accuracy(1000 if quick else 10_000, 20 if quick else 200),
    "speed": lambda quick: speed(
        (1000,) if quick else (10_000, 100_000), 100 if quick else 10_000, 10**5 if quick else 2 * 10**7
    ),
    "narrow": lambda quick: narrow(2000 if quick else 100_000, 100 if quick else 2000),
    "cost": lambda quick: cost((1000, 2000) if quick else (10_000, 100_000, 1_000_000)),
    "digits": lambda quick: None if quick else digits(),
    "pca": lambda quick: None if quick else pca(),
    "parzen": lambda quick: None if quick else parzen(),
}


def main(quick, parts, markdown):
    """Every table that is asked for; the page has those of before too."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() and not quick else {}
    for name in parts:
        LINES.clear()
        PARTS[name](quick)
        kept[name] = {"date": str(datetime.date.today()), "lines": list(LINES)}
        if not quick:
            KEPT.write_text(json.dumps(kept, indent=1))
    if markdown:
        Path(markdown).write_text(page(kept), encoding="utf-8")


def page(kept):
    """All parts as a page."""
    date = max(part["date"] for part in kept.values())
    head = (
        f"`python benchmarks/kde.py`, {date}, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, "
        f"scikit-learn {sklearn.__version__}, Python {platform.python_version()}, pgen {pgen.__version__}. Other jobs shared "
        "the cores: CPU seconds of both sides are compared, in one process; wall seconds say nothing."
    )
    lines = ["# Kernel density estimates", "", head, ""]
    for name in PARTS:
        lines += kept[name]["lines"] if name in kept else []
    if missing := [name for name in PARTS if name not in kept]:
        lines.append(f"Not run yet: {', '.join(missing)}.")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--markdown")
    parser.add_argument("--cost", nargs=3, metavar=("POINTS", "FEATURES", "PRECISION"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cost:
        one_cost(int(given.cost[0]), int(given.cost[1]), given.cost[2])
    else:
        main(given.quick, given.parts, given.markdown)
