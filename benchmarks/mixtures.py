"""Mixtures and hidden Markov models beside EM: held-out log-likelihoods, and what a step costs.

    python benchmarks/mixtures.py --markdown docs/benchmarks/mixtures.md

Sections run one by one (``--only digits bits sets uci chorales speed``); what each found is kept in ``--results`` (JSON) and
not run again, and the page is written from all that is there. Peers run in the same run: scikit-learn's EM for Gaussians, EM in
NumPy for bits; Baum-Welch is not run. Everything is chosen on validation data, and test data are looked at once. Data: the
handwritten digits of scikit-learn, and the folder in PGEN_DATA (by default ../shared/data).
"""

import argparse
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

import pgen
from pgen.models import GaussianMixture, HiddenMarkov, Mixture

HERE = Path(__file__).parent
DATA = Path(os.environ.get("PGEN_DATA", HERE.parents[1] / "shared" / "data"))
SETS = ("nltcs", "plants", "baudio", "accidents", "mushrooms", "dna", "nips")
FACTORISED = {"nltcs": -9.2336, "plants": -31.2662, "baudio": -49.3369, "accidents": -45.5597, "mushrooms": -34.2315,
              "dna": -100.3859, "nips": -294.8022}  # fmt: skip
OPTIONS = {"progress": False, "compile": "graph"}


def tensor(x):
    return torch.as_tensor(np.ascontiguousarray(x, dtype=np.float32))


def timed(fn, *args, **options):
    """What ``fn`` gives, and its CPU seconds."""
    began = time.process_time()
    return fn(*args, **options), time.process_time() - began


def paired(first, second):
    """Mean and standard error of the difference, datum by datum."""
    difference = np.asarray(first) - np.asarray(second)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference)))


def digits_split():
    """Split A: train_test_split(.2, random_state=0) twice, 1149 / 288 / 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(load_digits().data, test_size=0.2, random_state=0)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0)
    return train, validation, test, rest


# ---------------------------------------------------------------- digits, continuous
def digits():
    """y = (x + u) / 17: EM and SVI at K and regulariser chosen on validation, refitted on training and validation."""
    from sklearn.mixture import GaussianMixture as EM

    train, validation, test, rest = digits_split()
    noise = np.random.default_rng(0)

    def grey(x):
        return (x + noise.random(x.shape)) / 17

    train, validation, rest, tests = grey(train), grey(validation), grey(rest), [grey(test) for _ in range(5)]
    found = {}
    for name, kind, count in (("full", "full", 10), ("diag", "diagonal", 40)):
        floors = (1e-4, 1e-3, 1e-2)
        em = {f: EM(count, covariance_type=name, reg_covar=f, random_state=0).fit(train).score(validation) for f in floors}
        floor = max(em, key=em.get)
        options = {"covariance_type": name, "reg_covar": floor, "max_iter": 500}
        _, seconds = timed(EM(count, random_state=0, **options).fit, rest)
        shares = (0.01, 0.03, 0.1, 0.3) if kind == "full" else (1e-4, 1e-3, 1e-2, 3e-2)
        tried = {}
        for share in shares:
            model = GaussianMixture((64,), count, kind, floor=share)
            model.fit(tensor(train), steps=300, **OPTIONS)
            tried[share] = model.log_prob(tensor(validation)).mean
        share = max(tried, key=tried.get)
        ours = []
        for seed in range(3):
            model = GaussianMixture((64,), count, kind, floor=share, seed=seed)
            _, cpu = timed(model.fit, tensor(rest), seed=seed, **OPTIONS)
            held = float(np.mean([model.log_prob(tensor(t)).mean for t in tests]))
            ours.append((held, model.log_prob(tensor(rest)).mean, cpu))
        theirs = [EM(count, random_state=seed, **options).fit(rest) for seed in range(3)]
        found[kind] = {
            "K": count, "reg_covar": floor, "floor": share,
            "em_test": [float(np.mean([m.score(t) for t in tests])) for m in theirs],
            "em_train": [m.score(rest) for m in theirs], "em_s": seconds, "svi_test": [o[0] for o in ours],
            "svi_train": [o[1] for o in ours], "svi_s": ours[0][2],
        }  # fmt: skip
        print(kind, found[kind], flush=True)
    return found


# ---------------------------------------------------------------- bits
def em_bits(x, count, seed, smoothing=1.0, iterations=200):
    """A mixture of Bernoullis by EM in NumPy, one count added to each value."""
    from sklearn.cluster import KMeans

    x = np.asarray(x, dtype=np.float64)
    r = np.eye(count)[KMeans(count, n_init=1, random_state=seed).fit(x).labels_]
    before = -math.inf
    for _ in range(iterations):
        total = r.sum(0)
        weights, p = total / len(x), (r.T @ x + smoothing) / (total[:, None] + 2 * smoothing)
        scores = joint_bits(x, weights, p)
        top = scores.max(1, keepdims=True)
        log_p = top[:, 0] + np.log(np.exp(scores - top).sum(1))
        r = np.exp(scores - log_p[:, None])
        if log_p.mean() - before < 1e-6:
            break
        before = log_p.mean()
    return weights, p


def joint_bits(x, weights, p):
    return x @ (np.log(p) - np.log1p(-p)).T + np.log1p(-p).sum(1) + np.log(weights + 1e-300)


def score_bits(x, fitted):
    joint = joint_bits(np.asarray(x, dtype=np.float64), *fitted)
    top = joint.max(1)
    return top + np.log(np.exp(joint - top[:, None]).sum(1))


def bits():
    """Binarised digits, K = 60."""
    train, validation, test, rest = (np.float64(part >= 8) for part in digits_split())
    em = [timed(em_bits, rest, 60, seed) for seed in range(3)]
    ours = []
    for seed in range(3):
        model = Mixture((64,), 60, seed=seed)
        _, cpu = timed(model.fit, tensor(rest), seed=seed, **OPTIONS)
        ours.append((model.log_prob(tensor(test)).mean, model.log_prob(tensor(rest)).mean, cpu))
    tried = {}
    for count in (20, 40, 60, 80, 120):
        model = Mixture((64,), count)
        model.fit(tensor(train), **OPTIONS)
        tried[count] = model.log_prob(tensor(validation)).mean
    best = max(tried, key=tried.get)
    model = Mixture((64,), best)
    model.fit(tensor(rest), **OPTIONS)
    found = {
        "em_test": [float(score_bits(test, f).mean()) for f, _ in em],
        "em_train": [float(score_bits(rest, f).mean()) for f, _ in em],
        "em_s": em[0][1], "svi_test": [o[0] for o in ours], "svi_train": [o[1] for o in ours], "svi_s": ours[0][2],
        "chosen": best, "chosen_test": model.log_prob(tensor(test)).mean,
    }  # fmt: skip
    print(found, flush=True)
    return found


def chosen_bits(train, validation):
    """EM at the best K on validation, smoothed by 0.1, then at its best smoothing: K, smoothing, the fit, CPU seconds.

    Thirty iterations choose, and what is chosen goes on until it stands still.
    """
    tried = {}

    def score(count, smoothing):
        tried[count, smoothing] = float(score_bits(validation, em_bits(train, count, 0, smoothing, iterations=30)).mean())

    for count in (10, 25, 50, 100, 200) if len(train) > 1000 else (2, 5, 10, 20, 40):
        score(count, 0.1)
    best = max(tried, key=tried.get)[0]
    for smoothing in (1.0, 0.01, 0.001):
        score(best, smoothing)
    count, smoothing = max(tried, key=tried.get)
    return count, smoothing, *timed(em_bits, train, count, 0, smoothing)


def sets(results, save):
    """The binary sets: K and smoothing on validation with EM, for both sides; test once."""
    found = results.setdefault("sets", {})
    for name in SETS:
        if "smoothing" in found.get(name, {}):
            continue
        file = np.load(DATA / "binary_density" / f"{name}.npz", allow_pickle=False)
        train, validation, test = (file[part] for part in ("train", "valid", "test"))
        count, smoothing, em, seconds = chosen_bits(train, validation)
        model = Mixture((train.shape[1],), count, smoothing=smoothing)
        _, cpu = timed(model.fit, tensor(train), **OPTIONS)
        score, theirs = model.log_prob(tensor(test)), score_bits(test, em)
        difference, error = paired(score.value.numpy(), theirs)
        found[name] = {
            "variables": train.shape[1], "K": count, "smoothing": smoothing, "svi": score.mean, "error": score.std_error,
            "svi_s": cpu, "em": float(theirs.mean()), "em_s": seconds, "difference": difference, "difference_error": error,
        }  # fmt: skip
        print(name, found[name], flush=True)
        save()
    return found


# ---------------------------------------------------------------- small tables
def uci(results, save):
    """KFold(5, shuffle, 0), standardised on the training fold; K and regulariser by an inner 5-fold with EM, for both sides."""
    from sklearn.datasets import load_breast_cancer, load_iris, load_wine
    from sklearn.mixture import GaussianMixture as EM
    from sklearn.model_selection import GridSearchCV, KFold

    found = results.setdefault("uci", {})
    tables = {"iris": load_iris, "wine": load_wine, "breast cancer": load_breast_cancer}
    for name, load in tables.items():
        for kind, theirs in (("diagonal", "diag"), ("full", "full")):
            if f"{name}, {kind}" in found:
                continue
            x, rows = load().data, []
            for train, test in KFold(5, shuffle=True, random_state=0).split(x):
                mean, sd = x[train].mean(0), x[train].std(0)
                a, b = (x[train] - mean) / sd, (x[test] - mean) / sd
                grid = {"n_components": [1, 2, 3, 4, 6, 8], "reg_covar": [1e-6, 1e-3, 1e-2, 1e-1]}
                inner = KFold(5, shuffle=True, random_state=0)
                em = GridSearchCV(EM(covariance_type=theirs, random_state=0, n_init=3), grid, cv=inner).fit(a).best_estimator_
                model = GaussianMixture((x.shape[1],), em.n_components, kind, floor=em.reg_covar)
                model.fit(tensor(a), steps=300, precision="float64", **OPTIONS)
                ours = [model.log_prob(torch.as_tensor(part)).mean for part in (b, a)]
                rows.append((em.score(b), ours[0], em.score(a), ours[1]))
            rows = np.array(rows)
            difference = rows[:, 1] - rows[:, 0]
            found[f"{name}, {kind}"] = {
                "em": rows[:, 0].mean(), "svi": rows[:, 1].mean(), "folds": rows[:, 1].std(ddof=1) / math.sqrt(5),
                "difference": difference.mean(), "difference_error": difference.std(ddof=1) / math.sqrt(5),
                "em_train": rows[:, 2].mean(), "svi_train": rows[:, 3].mean(),
            }  # fmt: skip
            print(name, kind, found[f"{name}, {kind}"], flush=True)
            save()
    return found


# ---------------------------------------------------------------- chorales
def chorale_batches():
    file = np.load(DATA / "polyphonic_music" / "jsb_chorales_quarter.npz", allow_pickle=False)
    roll, offsets, split = file["roll"], file["offsets"], file["split"]
    pieces = [roll[a:b] for a, b in itertools.pairwise(offsets)]
    longest = max(len(p) for p in pieces)
    return [pgen.data.pad([tensor(p) for p, s in zip(pieces, split) if s == part], longest) for part in range(3)]


def chorales(results, save):
    """JSB chorales: nats a frame over all frames; the number of states on validation."""
    train, validation, test = chorale_batches()
    frames = [float(batch["lengths"].sum()) for batch in (train, validation, test)]
    inside = torch.arange(train["x"].shape[1]) < train["lengths"][:, None]
    seen = train["x"][inside]
    p = (seen.sum(0) + 1) / (len(seen) + 2)
    held = test["x"][torch.arange(test["x"].shape[1]) < test["lengths"][:, None]]
    found = results.setdefault("chorales", {"tried": {}})
    found["independent"] = -float((held * p.log() + (1 - held) * (1 - p).log()).sum(1).mean())
    found["frames"] = frames
    for count in (16, 32, 64, 100):
        if str(count) in found["tried"]:
            continue
        model = HiddenMarkov((train["x"].shape[1], 88), count, "bernoulli")
        _, cpu = timed(model.fit, train, steps=150, validation=validation, validate_every=30, **OPTIONS)
        scores = [-model.log_prob(batch).total / n for batch, n in zip((train, validation, test), frames)]
        found["tried"][str(count)] = {"train": scores[0], "validation": scores[1], "test": scores[2], "cpu": cpu}
        print(count, found["tried"][str(count)], flush=True)
        save()
    return found


# ---------------------------------------------------------------- speed
def torch_step(kind, x, count):
    """A gradient step of the same mixture by hand: fused Adam, the same products."""
    size = x.shape[1]
    logits, a = torch.zeros(count, requires_grad=True), torch.randn(count, size).mul(0.1).requires_grad_()
    b = torch.zeros(count, size, requires_grad=True)
    adam = torch.optim.Adam([logits, a, b], lr=0.01, fused=True)

    def step():
        if kind == "bits":
            score = x @ a.T - torch.nn.functional.softplus(a).sum(1)
        else:
            w = (-2 * b).exp()
            y, m, v = x.double(), a.double(), w.double()
            square = y.square() @ v.T - 2 * (y @ (v * m).T) + (v * m.square()).sum(1)
            score = -0.5 * square.float() - b.sum(1) - 0.5 * size * math.log(2 * math.pi)
        loss = -torch.logsumexp(score + logits.log_softmax(0), 1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def pyro_step(kind, x, count):
    """The same in Pyro: TraceEnum_ELBO over a parallel-enumerated component."""
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, TraceEnum_ELBO

    pyro.clear_param_store()
    pyro.enable_validation(False)

    def model(x):
        logits = pyro.param("logits", torch.zeros(count))
        a = pyro.param("a", lambda: torch.randn(count, x.shape[1]) * 0.1)
        b = pyro.param("b", torch.zeros(count, x.shape[1]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            fn = dist.Bernoulli(logits=a[z]) if kind == "bits" else dist.Normal(a[z], b[z].exp())
            pyro.sample("x", fn.to_event(1), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    return lambda: svi.step(x)


def per_step(step, steps=30, blocks=5):
    """Fastest of some blocks, CPU milliseconds a step."""
    step()
    best = math.inf
    for _ in range(blocks):
        began = time.process_time()
        for _ in range(steps):
            step()
        best = min(best, (time.process_time() - began) / steps)
    return 1e3 * best


def pgen_step(make, x, tier, steps):
    """CPU milliseconds a step: a longer fit less a shorter one, so that capture and compilation cancel."""
    spent = []
    for total in (steps, 5 * steps):
        model = make()
        spent.append(min(timed(make_fit, model, x, tier, total)[1] for _ in range(2)))
    return 1e3 * (spent[1] - spent[0]) / (4 * steps)


def make_fit(model, x, tier, steps):
    model.primed = True
    return model.fit(x, steps=steps, batch_size=2000, compile=tier, progress=False)


def speed():
    train = digits_split()[0]
    y, bit = tensor((train + 0.5) / 17), tensor(train >= 8)
    found = {}
    sides = {
        "bits": (bit, lambda: Mixture((64,), 60), 60),
        "gaussians": (y, lambda: GaussianMixture((64,), 40, "diagonal"), 40),
    }
    for kind, (x, make, count) in sides.items():
        blocks = {"eager": 40, "graph": 40, "compiled": 100}
        each = {tier: pgen_step(make, x, tier, steps) for tier, steps in blocks.items()}
        each["torch"] = per_step(torch_step(kind, x, count))
        each["pyro"] = per_step(pyro_step(kind, x, count), 10, 3)
        if kind == "bits":
            each["em"] = timed(em_bits, x.numpy(), 60, 0, iterations=20)[1] / 20 * 1e3
        found[kind] = each
        print(kind, each, flush=True)
    return found


# ---------------------------------------------------------------- the page
def spread(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def row(*cells):
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(*names):
    """The head of a table, its first column to the left."""
    return [row(*names), row("---", *["---:"] * (len(names) - 1))]


HEAD = """\
# Mixtures and hidden Markov models

`python benchmarks/mixtures.py`, {date}, one thread of an {machine} processor, torch {torch}, scikit-learn {sklearn},
Pyro {pyro}, pgen {pgen}. CPU seconds, beside other work on the same cores: ratios hold, absolute times are upper limits.
SVI is `fit(x)` at its defaults (600 steps of Adam from the best of several k-means starts) unless said; EM is scikit-learn's,
or written down in NumPy for bits. Everything is chosen on validation data. ± over three seeds is the sample standard
deviation, ± of a difference the paired standard error over test data or folds.
"""


def page(results):
    """The page, of whatever was measured."""
    versions = {"torch": "torch", "sklearn": "scikit-learn", "pyro": "pyro-ppl"}
    head = {key: version(name) for key, name in versions.items()}
    head |= {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "pgen": pgen.__version__}
    parts = [HEAD.format(**head)] + ["\n".join(write(results[name])) + "\n" for name, write in PAGES.items() if name in results]
    return "\n".join(parts)


DIGITS = """\
## Digits, continuous

y = (x + u) / 17, split 1149 / 288 / 360, refitted on 1437; mean of five test dequantisations. The regulariser is chosen on
validation: `reg_covar` of EM in squared units of y, `floor` of pgen as a share of each pixel's own variance, which suits pixels
that are nearly always zero better.
"""


def digits_page(found):
    known = {"full": 61.413, "diagonal": 64.516}
    lines = [DIGITS, *table("mixture", "EM, test nats", "SVI, test nats", "SVI, bits/dim", "EM, training", "SVI, training",
                            "EM s", "SVI s", "reference, EM")]  # fmt: skip
    for kind, f in found.items():
        bits_per_dim = (-np.mean(f["svi_test"]) / 64 + math.log(17)) / math.log(2)
        what = f"{kind}, K = {f['K']}, reg_covar {f['reg_covar']:g}, floor {f['floor']:g}"
        scores = [spread(f[name]) for name in ("em_test", "svi_test", "em_train", "svi_train")]
        times = [f"{f[name]:.1f}" for name in ("em_s", "svi_s")]
        lines.append(row(what, *scores[:2], f"{bits_per_dim:.4f}", *scores[2:], *times, known[kind]))
    return lines


BITS = """\
## Digits, binarised at 8

Mixture of Bernoullis, K = 60, one count added to each value, refitted on 1437 images; reference figure of EM -18.388.
"""


def bits_page(f):
    return [
        BITS,
        *table("", "test nats", "training nats", "CPU s"),
        row("EM, NumPy", spread(f["em_test"]), spread(f["em_train"]), f"{f['em_s']:.1f}"),
        row("SVI", spread(f["svi_test"]), spread(f["svi_train"]), f"{f['svi_s']:.1f}"),
        row(f"SVI, K = {f['chosen']} on validation, of 20, 40, 60, 80, 120", f"{f['chosen_test']:.3f}", "", ""),
    ]


SETS_TEXT = """\
## Binary density sets

Mixture of Bernoullis, trained on the training part alone. K of 10, 25, 50, 100, 200 (nips: 2, 5, 10, 20, 40), with a tenth of a
count added to each value, then the counts added, 1, 0.1, 0.01 or 0.001, are chosen on validation with EM from one start, the
same for both sides. Test log-likelihood in nats: what other families have to beat.
"""


def sets_page(found):
    lines = [
        SETS_TEXT,
        *table("set", "variables", "independent", "K", "counts added", "SVI", "EM", "SVI less EM", "SVI s", "EM s"),
    ]
    for name, f in found.items():
        score, gap = f"{f['svi']:.3f} ± {f['error']:.3f}", f"{f['difference']:+.3f} ± {f['difference_error']:.3f}"
        times = [f"{f[side]:.1f}" for side in ("svi_s", "em_s")]
        lines.append(
            row(name, f["variables"], f"{FACTORISED[name]:.3f}", f["K"], f["smoothing"], score, f"{f['em']:.3f}", gap, *times)
        )
    return lines


UCI = """\
## Small tables

Standardised on the training fold, KFold(5, shuffle, 0); K of 1, 2, 3, 4, 6, 8 and regulariser of 1e-6, 1e-3, 1e-2, 1e-1 by an
inner 5-fold with EM (three starts), the same for both sides: on standardised data `floor` and `reg_covar` are one thing.
Mean test log-likelihood in nats, 300 steps. Differences are those of local optima.
"""
KNOWN = {"iris, diagonal": -2.791, "iris, full": -2.399, "wine, diagonal": -15.101, "wine, full": -15.064,
         "breast cancer, diagonal": -29.265, "breast cancer, full": -6.099}  # fmt: skip


def uci_page(found):
    lines = [UCI, *table("table", "EM", "SVI", "SVI less EM, by fold", "EM, training", "SVI, training", "reference, EM")]
    for name, f in found.items():
        score, gap = f"{f['svi']:.3f} ± {f['folds']:.3f}", f"{f['difference']:+.3f} ± {f['difference_error']:.3f}"
        trained = [f"{f[side]:.3f}" for side in ("em_train", "svi_train")]
        lines.append(row(name, f"{f['em']:.3f}", score, gap, *trained, KNOWN[name]))
    return lines


CHORALES = """\
## JSB chorales

88 notes, quarter-note steps, the splits of Boulanger-Lewandowski et al. (2012): {0:.0f} / {1:.0f} / {2:.0f} frames. Hidden
Markov model, notes independent given the state. Minus log-likelihood in nats a frame, *total over total frames*, first frames
included. Independent notes give {independent:.3f} in this run (reference 11.06), per-note Markov chains 10.49 (frames 2..T),
a GRU 8.65. 150 steps of 64 pieces; the best validated parameters are kept.
"""


def chorales_page(f):
    lines = [CHORALES.format(*f["frames"], independent=f["independent"])]
    lines += table("states", "training", "validation", "test", "CPU s")
    best = min(f["tried"], key=lambda k: f["tried"][k]["validation"])
    for count, each in f["tried"].items():
        test = f"**{each['test']:.3f}** (chosen)" if count == best else f"{each['test']:.3f}"
        lines.append(row(count, f"{each['train']:.3f}", f"{each['validation']:.3f}", test, f"{each['cpu']:.0f}"))
    return lines


SPEED = """\
## A step

1149 rows a step, 64 numbers, K = 60 (bits) and 40 (diagonal Gaussians), CPU ms. By hand: plain torch, the same matrix
products, fused Adam, eager. Pyro: TraceEnum_ELBO. EM: one iteration in NumPy, its k-means start included. pgen: a long fit
less a short one.
"""


def speed_page(found):
    lines = [SPEED, *table("mixture", "by hand", "eager", "graph", "compiled", "Pyro", "EM")]
    for kind, f in found.items():
        sides = [f"{f[side]:.2f}" for side in ("torch", "eager", "graph", "compiled", "pyro")]
        lines.append(row(kind, *sides, f"{f['em']:.2f}" if "em" in f else ""))
    return lines


PAGES = {
    "digits": digits_page, "bits": bits_page, "sets": sets_page, "uci": uci_page, "chorales": chorales_page,
    "speed": speed_page,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(PAGES), default=list(PAGES))
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs" / "benchmarks" / "mixtures.json")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}

    def save():
        args.results.write_text(json.dumps(results, indent=1, default=float))

    for name in args.only:
        if name in ("digits", "bits", "speed"):
            if name not in results:
                results[name] = globals()[name]()
        else:
            results[name] = globals()[name](results, save)
        save()
    if args.markdown:
        args.markdown.write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
