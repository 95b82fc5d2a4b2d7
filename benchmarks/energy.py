"""Energy-based models and the restricted Boltzmann machine against exact answers, and what a training step costs.

    python benchmarks/energy.py --markdown docs/benchmarks/energy.md
    python benchmarks/energy.py --parts rbm steps --seeds 1 --markdown docs/benchmarks/energy.md

The second runs some parts; rows of others are kept from before (docs/benchmarks/energy.json). One thread; times are CPU seconds
of this process, compilation included, so that other work on the machine does not count.
"""

import argparse
import json
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from svi import cpu_name
from torch import nn

import pgen
from pgen.data import toy
from pgen.evaluation.sample_measures import mode_coverage
from pgen.evaluation.samples import evaluate
from pgen.models import RBM, EnergyBased, Gaussian, GaussianMixture
from pgen.objectives import DenoisingScoreMatching, NoiseContrastive, PersistentContrastiveDivergence, SlicedScoreMatching
from pgen.training import Adam

KEPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "energy.json"
PARTS = ("steps", "rbm", "toys", "grid", "digits")
TOYS = ("eight_gaussians", "two_moons", "rings", "checkerboard")


# --- the restricted Boltzmann machine ---------------------------------------------------------------------------------------


def rbm(seeds, steps):
    """Digits binarised at 8, split A: the exact log-likelihood, and annealing against the sum over all states."""
    x = pgen.data.digits(binarize=True, split="random")
    for seed in range(seeds):
        model, start = RBM((8, 8), 20, seed=seed), time.process_time()
        objective = PersistentContrastiveDivergence(5, "gibbs", num_chains=100)
        model.fit(
            x.train, objective=objective, optimizer=Adam(5e-3), ema=0.9995, steps=steps, batch_size=100, seed=seed,
            schedule="constant", compile="compiled", progress=False,
        )  # fmt: skip
        row = {"seed": seed, "steps": steps, "cpu": time.process_time() - start}
        for part in ("train", "validation", "test"):
            row[part] = model.log_prob(getattr(x, part), progress=False).mean
        truth, start = model.log_normalizer().value, time.process_time()
        found = [model.log_normalizer("ais", seed=s, progress=False) for s in range(5)]
        row |= {"log_z": truth, "ais_cpu": (time.process_time() - start) / len(found)}
        row["off"] = [f.value - truth for f in found]
        row["error"], row["gap"] = (float(np.mean([getattr(f, name) for f in found])) for name in ("error", "gap"))
        row["inside"] = sum(f.lower < truth < f.upper for f in found)
        yield row


# --- densities in the plane -------------------------------------------------------------------------------------------------

WAVES = "persistent chains, 4 octaves"
OBJECTIVES = {
    "persistent chains": lambda: None,
    WAVES: lambda: None,
    "denoising score matching, sd .1": lambda: DenoisingScoreMatching(0.1),
    "sliced score matching": SlicedScoreMatching,
    "noise contrast, 4 a datum": lambda: NoiseContrastive(Gaussian((2,)), 4),
}


def on_grid(model, target, reach=6.0, side=400):
    """Divergences from the truth and log Z, by sums over a grid: nats."""
    axis = torch.linspace(-reach, reach, side, dtype=torch.float64)
    points, cell = torch.cartesian_prod(axis, axis), 2 * float((axis[1] - axis[0]).log())
    log_q = -model.energy(points.float())
    log_z = float(torch.logsumexp(log_q + cell, 0))
    log_q, log_p = log_q - log_z + cell, target.log_prob(points) + cell
    log_p = log_p - log_p.logsumexp(0)
    p, q, mean = log_p.exp(), log_q.exp(), torch.logaddexp(log_p, log_q) - np.log(2)
    some = p > 0
    forward = float((p[some] * (log_p - log_q)[some]).sum())
    js = 0.5 * float((p[some] * (log_p - mean)[some]).sum()) + 0.5 * float((q * (log_q - mean)).sum())
    return {"kl": forward, "js": js, "log_z": log_z}


def toys(seeds, steps, rate=5e-3):
    """5000 data, a network 2 x 128; the divergence from the truth needs no test data."""
    for name in TOYS:
        target = getattr(toy, name)()
        for label, make in OBJECTIVES.items():
            for seed in range(seeds):
                waves = label == WAVES
                model, start = EnergyBased((2,), octaves=4 * waves, seed=seed), time.process_time()
                model.fit(
                    target.sample(5000, seed=seed), objective=make(), optimizer=Adam(rate), schedule="cosine", steps=steps,
                    seed=seed, ema=0.999 if waves else None, progress=False,
                )  # fmt: skip
                row = {"target": name, "objective": label, "steps": steps, "rate": rate, "seed": seed}
                row["cpu"] = time.process_time() - start
                row |= on_grid(model, target)
                if "chains" in label:
                    start = time.process_time()
                    found = model.log_normalizer(progress=False)
                    row |= {"ais": found.value, "ais_error": found.error, "inside": found.lower < row["log_z"] < found.upper}
                    row |= {"ais_temps": found.num_temps, "ais_cpu": time.process_time() - start}
                yield row


GRID = {  # steps, those of a batch, and what a fit is told beside them
    "chains at 8 temperatures": (2500, 200, lambda x, seed: {}),
    "noise contrast": (5000, 500, lambda x, seed: {"objective": contrast(x, seed)}),
    "chains at 1 temperature": (
        2500, 200, lambda x, seed: {"objective": PersistentContrastiveDivergence(10, num_chains=1000, restart=0.02)},
    ),
}  # fmt: skip


def grid(seeds, steps):
    """25 narrow Gaussians, 2500 draws."""
    target = toy.gaussian_grid()
    for name, (usual, batch, options) in GRID.items():
        for seed in range(seeds if "1 temperature" not in name else 1):
            x, count = target.sample(10_000, seed=seed), steps or usual
            start = time.process_time()
            model = EnergyBased((2,), hidden=(128, 128, 128), octaves=6, tempering=(300, 50, 3), seed=seed)
            settings = {"optimizer": Adam(3e-3), "schedule": "cosine", "clip_norm": 10.0, "ema": 0.999, **options(x, seed)}
            model.fit(x, steps=count, batch_size=batch, seed=seed, progress=False, **settings)
            row = {"recipe": name, "octaves": 6, "seed": seed, "steps": count, "cpu": time.process_time() - start}
            found = mode_coverage(model.sample(2500, seed=seed, progress=False), target)
            row |= {"total": time.process_time() - start, **{n: f.value for n, f in found.items()}}
            yield row | on_grid(model, target, reach=5.0, side=600)


def contrast(x, seed):
    """Against a mixture of eight Gaussians, too few to be the answer."""
    noise = GaussianMixture((2,), 8, seed=seed)
    noise.fit(x, seed=seed, progress=False)
    return NoiseContrastive(noise, ratio=4)


# --- digits -----------------------------------------------------------------------------------------------------------------


def digits(seeds, steps):
    """Grey levels made continuous, centred; samples against the test digits."""
    x = pgen.data.digits(integers=True, split="random")
    for seed in range(seeds):
        before = pgen.data.Compose([pgen.data.Dequantize(17), pgen.data.Standardize()])
        model, start = EnergyBased((8, 8), hidden=(256, 256), preprocess=before, seed=seed), time.process_time()
        options = {"optimizer": Adam(3e-3), "schedule": "cosine", "clip_norm": 10.0, "batch_size": 100}
        model.fit(x.train.float(), steps=steps, seed=seed, progress=False, **options)
        cpu = time.process_time() - start
        for origin, count, options in (("chains", 256, {"num_steps": 1}), ("noise", len(x.test), {})):
            start = time.process_time()
            drawn = model.sample(count, start=origin, seed=seed, progress=False, **options).floor().clamp(0, 16)
            row = {"model": "dense 2 x 256", "start": origin, "seed": seed, "cpu": cpu, "drawing": time.process_time() - start}
            report = evaluate(drawn, x.test.float(), train=x.train.float(), progress=False)
            row["found"] = {name: [one.found.value, None if one.floor is None else one.floor.value]
                            for name, one in report.rows.items()}  # fmt: skip
            yield row


# --- a step -----------------------------------------------------------------------------------------------------------------


def plain_rbm(x, compiled):
    """Persistent contrastive divergence with five sweeps, as one writes it in torch."""
    weight, a, b = (nn.Parameter(t) for t in (0.01 * torch.randn(64, 20), torch.zeros(64), torch.zeros(20)))
    optimizer = torch.optim.Adam([weight, a, b], 3e-3, fused=True)
    chains = x[:100].clone()

    def free_energy(v):
        return -v @ a - nn.functional.softplus(v @ weight + b).sum(1)

    def sweep(v):
        for _ in range(5):
            h = torch.bernoulli(torch.sigmoid(v @ weight + b))
            v = torch.bernoulli(torch.sigmoid(h @ weight.T + a))
        return v

    def loss(data, v):
        return free_energy(data).mean() - free_energy(v).mean()

    sweep, loss = (torch.compile(sweep), torch.compile(loss)) if compiled else (sweep, loss)

    def step():
        nonlocal chains
        with torch.no_grad():
            chains = sweep(chains)
        optimizer.zero_grad()
        loss(x[torch.randint(len(x), (100,))], chains).backward()
        optimizer.step()

    return step


def plain_energy(x, compiled):
    """Persistent chains of ten corrected Langevin steps, as one writes them in torch."""
    net = nn.Sequential(nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1))
    optimizer, chains, size = torch.optim.Adam(net.parameters(), 1e-3, fused=True), x[:200].clone(), 0.3

    def log_f(v):
        return -net(v).squeeze(1) - 0.5 * v.square().sum(1)

    slope = torch.func.grad(lambda v: log_f(v).sum())

    def move(v):
        value, gradient = log_f(v), slope(v)
        for _ in range(10):
            p = torch.randn_like(v)
            half = p + 0.5 * size * gradient
            there = v + size * half
            there_value, there_gradient = log_f(there), slope(there)
            q = half + 0.5 * size * there_gradient
            error = there_value - value + 0.5 * (p.square().sum(1) - q.square().sum(1))
            taken = (torch.rand_like(error) < error.clamp(max=0).exp())[:, None]
            v, gradient = torch.where(taken, there, v), torch.where(taken, there_gradient, gradient)
            value = torch.where(taken[:, 0], there_value, value)
        return v

    def loss(data, v):
        return log_f(v).mean() - log_f(data).mean()

    move, loss = (torch.compile(move), torch.compile(loss)) if compiled else (move, loss)

    def step():
        nonlocal chains
        with torch.no_grad():
            chains = move(chains)
        optimizer.zero_grad()
        loss(x[torch.randint(len(x), (200,))], chains).backward()
        optimizer.step()

    return step


def steps_of(seeds, steps):
    """CPU milliseconds a step, the fastest of several blocks after a warm-up."""
    digits, plane = pgen.data.digits(binarize=True, split="random").train, toy.eight_gaussians().sample(2000)
    gibbs = PersistentContrastiveDivergence(5, "gibbs", num_chains=100)
    langevin = PersistentContrastiveDivergence(10, num_chains=200)
    ours = {
        "RBM 64-20, 5 sweeps, batch 100": (
            digits.flatten(1), plain_rbm, lambda: RBM((64,), 20), {"objective": gibbs, "batch_size": 100}, 400,
        ),
        "energy 2-128-128, 10 Langevin steps, batch 200": (
            plane, plain_energy, lambda: EnergyBased((2,)), {"objective": langevin, "batch_size": 200}, 100,
        ),
        "the same, 2 steps at each of 8 temperatures (default)": (
            plane, None, lambda: EnergyBased((2,)), {"batch_size": 200}, 50,
        ),
    }  # fmt: skip
    for name, (x, plain, make, options, count) in ours.items():
        row = {"step": name}
        for label, compiled in (("plain", False), ("torch.compile", True)):
            row[label] = fastest(plain(x, compiled), count) if plain else None
        for tier in ("eager", "graph", "compiled"):
            watch = Watch()
            make().fit(x, steps=5 * count, compile=tier, optimizer=1e-3, progress=False, callbacks=[watch], **options)
            row[tier] = watch.fastest()
        yield row


def fastest(step, count, blocks=4):
    """CPU milliseconds a step."""
    for _ in range(5):
        step()
    found = []
    for _ in range(blocks):
        start = time.process_time()
        for _ in range(count):
            step()
        found.append((time.process_time() - start) / count)
    return 1e3 * min(found)


class Watch(pgen.training.callbacks.Callback):
    """CPU time at each look of a fit at its losses."""

    def __init__(self):
        self.seen = []

    def on_log(self, step, values):
        """Note the time."""
        self.seen.append((step, time.process_time()))

    def fastest(self):
        """CPU milliseconds a step, of the fastest stretch between two looks of at least 4 steps."""
        pairs = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(self.seen, self.seen[1:]) if b[0] - a[0] >= 4]
        return 1e3 * min(pairs) if pairs else float("nan")


# --- the page ---------------------------------------------------------------------------------------------------------------


def table(header, rows):
    """Markdown."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, rule, *rows])


def spread(values, digits=2):
    """Mean, and standard deviation over seeds."""
    sd = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{sd}"


def page(found, settings):
    """All parts."""
    parts = [
        "# Energy-based models",
        f"`python benchmarks/energy.py --markdown docs/benchmarks/energy.md`. {settings}. Times are CPU seconds of one thread, "
        "compilation included; other work shared the machine. ± is the standard deviation over seeds.",
    ]
    if runs := found.get("runs"):
        parts.append("Runs: " + "; ".join(f"{part} {runs[part]}" for part in PARTS if part in runs) + ".")
    if rows := found.get("rbm"):
        best = max(rows, key=lambda r: r["validation"])
        off = [abs(v) for r in rows for v in r["off"]]
        parts += [
            "## Restricted Boltzmann machine, digits binarised at 8",
            "Split A (1149, 288, 360), 64 visible and 20 hidden units, five sweeps a step, Adam at 5e-3, moving average .9995. "
            "Nats an image, exact: all 2^20 states of the hidden units are summed. To reach: -18.05 (plain torch, one seed, 60 "
            "thousand steps, 44 CPU s). Annealing: 1000 temperatures, 100 chains each way, three sweeps each, five seeds. "
            "Other settings, seed 0, validation and test, 2026-11-30: 20 000 steps -17.74, -18.27; AdamW with a decay of .01 "
            "for 40 000 steps -17.72, -18.18, of .03 -17.85, -18.23, of .1 -18.27, -18.66; batches and chains of 400, 30 000 "
            "steps, cosine, -17.70, -18.21.",
            table(
                ["seed", "steps", "train", "validation", "test", "CPU s", "log Z", "largest error of AIS", "its own error",
                 "gap of the bounds", "truth inside", "CPU s an estimate"],
                [[r["seed"], r["steps"], *(f"{r[p]:.2f}" for p in ("train", "validation", "test")), f"{r['cpu']:.0f}",
                  f"{r['log_z']:.3f}", f"{max(map(abs, r['off'])):.3f}", f"{r['error']:.3f}", f"{r['gap']:.2f}",
                  f"{r['inside']} of {len(r['off'])}", f"{r['ais_cpu']:.1f}"] for r in rows],
            ),
            f"Test mean {spread([r['test'] for r in rows])}; best on validation {best['test']:.2f}. AIS within .05 "
            f"nats of the sum in {sum(v <= 0.05 for v in off)} of {len(off)} estimates.",
        ]  # fmt: skip
    if rows := found.get("toys"):

        def kind(row):
            return row["target"], row["objective"], row["steps"], f"{row['rate']:g}"

        body = []
        for name in dict.fromkeys(map(kind, rows)):
            own = [r for r in rows if kind(r) == name]
            ais = [r for r in own if "ais" in r]
            error = f"{np.mean([abs(r['ais'] - r['log_z']) for r in ais]):.3f}" if ais else ""
            inside = f"{sum(r['inside'] for r in ais)} of {len(ais)}" if ais else ""
            temps = ", ".join(str(r.get("ais_temps", 300)) for r in ais)
            spent = f"{ais[0]['ais_cpu']:.0f}" if ais and "ais_cpu" in ais[0] else ""
            body.append([*name, len(own), spread([r["kl"] for r in own], 3), spread([r["js"] for r in own], 3),
                         f"{np.mean([r['cpu'] for r in own]):.0f}", error, inside, temps, spent])  # fmt: skip
        parts += [
            "## Densities in the plane",
            "5000 data, a network of 2 x 128 units, batches of 200, Adam falling to zero. Divergences from the truth in nats, "
            "by sums over a grid of 400 x 400; log Z by annealing against the same sums. Persistent chains are the default, at "
            "eight temperatures; with waves of x as octaves the parameters are averaged (.999).",
            table(
                [
                    "target",
                    "objective",
                    "steps",
                    "rate",
                    "seeds",
                    "KL(truth, model)",
                    "JS",
                    "CPU s",
                    "error of log Z",
                    "inside",
                    "temperatures",
                    "CPU s for log Z",
                ],
                body,
            ),
        ]
        if some := [name for name in TOYS if name not in {r["target"] for r in rows}]:
            parts.append(f"Not run yet: {', '.join(some)}.")
    if rows := found.get("grid"):
        names = ("modes", "good share", "reverse KL")
        parts += [
            "## 25 Gaussians",
            "3 x 128 units, 10 000 data, Adam falling from 3e-3 to zero, parameters averaged (.999; chains at one "
            "temperature and noise contrast: not), 2500 draws led from noise through 300 temperatures (with the usual 100 "
            "one density's reverse KL was .010, .018, .014 over three seeds of the draws, with 300 .007, .009, .007); good "
            "is within 3 standard deviations of a mode (the target itself: 98.9 %, reverse KL .005). Noise contrast is "
            "against a mixture of eight "
            "Gaussians; waves of x as many octaves. The last column is the trained density's, by a sum over a grid of "
            "600 x 600, whatever its draws are.",
            table(["objective", "octaves", "steps", "seed", *names, "CPU s to fit", "CPU s in all", "KL(truth, model)"],
                  [[r["recipe"], r["octaves"], r["steps"], r["seed"], *(f"{r[n]:.3f}" for n in names), f"{r['cpu']:.0f}",
                    f"{r['total']:.0f}", f"{r['kl']:.3f}" if "kl" in r else ""] for r in rows]),
        ]  # fmt: skip
    if rows := found.get("digits"):
        names = list(rows[0]["found"])
        parts += [
            "## Digits, 8 x 8",
            "1149 digits to train, levels made continuous, eight temperatures, batches of 100, Adam falling from 3e-3 to zero. "
            "Samples against the 360 test digits: the 256 chains that the fit kept, or as many as test digits led from noise; "
            "in brackets the same of training digits.",
            table(["model", "samples", "seed", *names, "CPU s to fit", "CPU s to draw"],
                  [[r["model"], r["start"], r["seed"],
                    *(f"{v:.3g}" + ("" if f is None else f" ({f:.3g})") for v, f in r["found"].values()),
                    f"{r['cpu']:.0f}", f"{r['drawing']:.0f}"] for r in rows]),
        ]  # fmt: skip
    if rows := found.get("steps"):
        names = ("plain", "eager", "graph", "torch.compile", "compiled")
        parts += [
            "## A training step",
            "CPU milliseconds, the fastest block. Plain: the loop that one writes by hand in torch with fused Adam, and the "
            "same with `torch.compile` on chains and loss; eager, graph and compiled: `fit` in each tier, of "
            "which it takes a faster one by itself where a fit lasts longer than seconds.",
            table(["step", "plain torch", "fit, eager", "fit, graph", "plain, torch.compile", "fit, compiled"],
                  [[r["step"], *("" if r[n] is None else f"{r[n]:.2f}" for n in names)] for r in rows]),
        ]  # fmt: skip
    if missing := [part for part in PARTS if part not in found]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def main():
    """Run the parts that are asked for, keep their rows, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", type=Path, default=KEPT, help="rows found so far (JSON)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of every fit, instead of each part's own number")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    usual = {"steps": (steps_of, 0), "rbm": (rbm, 60_000), "toys": (toys, 2000), "grid": (grid, None), "digits": (digits, 2500)}
    settings = (
        f"{date.today()}, Python {platform.python_version()}, torch {version('torch')}, one thread of {platform.machine()}"
    )
    for part in given.parts:
        run, steps = usual[part]
        rows = []
        for row in run(given.seeds, given.steps or steps):
            rows.append(row)
            found[part] = rows
            found.setdefault("runs", {})[part] = f"{date.today()}, {cpu_name()}"
            given.keep.write_text(json.dumps(found, indent=1))
            print(part, row, flush=True)
            if given.markdown:
                given.markdown.write_text(page(found, settings))


if __name__ == "__main__":
    main()
