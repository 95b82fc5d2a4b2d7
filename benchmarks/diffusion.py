"""Diffusion and flow matching: bits of the digits, 25 Gaussians, few steps against many, and what a training step costs.

    python benchmarks/diffusion.py --markdown docs/benchmarks/diffusion.md
    python benchmarks/diffusion.py --parts digits --epochs 600 --markdown docs/benchmarks/diffusion.md

The second runs some parts; rows of others are kept from before (docs/benchmarks/diffusion.json). One thread; times are CPU
seconds of this process, so that other work on the machine does not count. Hyperparameters were chosen on validation data; the
test data are scored once.
"""

import argparse
import json
import math
import multiprocessing
import platform
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from svi import cpu_name

import pgen
from pgen.data.toy import gaussian_grid
from pgen.evaluation import divergences, samples
from pgen.models import Diffusion, FlowMatching

COSINE = "warmup_cosine"
KEPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "diffusion.json"
PARTS = ("digits", "grid", "solvers", "steps")


def fitted(model, data, **options):
    start = time.process_time()
    run = model.fit(data, progress=False, compile="graph", **options)
    return time.process_time() - start, run


# --- digits ---------------------------------------------------------------------------------------------------------------

RECIPES = {
    "classes": ({}, ("random", "file")),
    "velocity": ({"prediction": "velocity"}, ("random",)),
}


def digit_model(seed=0, **options):
    return Diffusion(
        (8, 8), width=512, blocks=2, dropout=0.3, likelihood="categorical", num_classes=17, seed=seed, **options
    )  # fmt: skip


def digits(seeds, epochs):
    """17 levels, the bound of their mass in bits a pixel."""
    rows = []
    for name, (options, splits) in RECIPES.items():
        for split in splits:
            for seed in range(seeds if name == "classes" else 1):
                x = pgen.data.digits(integers=True, split=split)
                model = digit_model(seed, **options)
                seconds, run = fitted(
                    model, x.train, validation=x.validation, epochs=epochs, batch_size=128, ema=0.999, seed=seed
                )
                if (name, split, seed) == ("classes", "random", 0):
                    model.save(kept("digits"))
                held_out = model.log_prob(x.validation, num_samples=50, progress=False)
                bound = model.log_prob(x.test, num_samples=200, progress=False)
                row = {
                    "prediction": name, "split": split, "seed": seed, "cpu": seconds, "steps": run.steps,
                    "validation": held_out.bits_per_dim, "test": bound.bits_per_dim,
                    "error": bound.std_error / 64 / math.log(2),
                }  # fmt: skip
                ode = model.log_prob(x.test, method="ode", steps=50, num_samples=2, progress=False)
                rows.append({**row, "ode": ode.bits_per_dim})
                yield rows


# --- 25 Gaussians ---------------------------------------------------------------------------------------------------------


def grid_model(name, seed):
    kind = {"diffusion": Diffusion, "flow matching": FlowMatching}[name]
    return kind((2,), width=128, blocks=2, octaves=6, seed=seed)


SAMPLERS = {
    "diffusion": [{"solver": "dpm", "steps": 20}, {"solver": "dpm", "steps": 50}, {"solver": "ancestral", "steps": 1000}],
    "flow matching": [{"solver": "midpoint", "steps": 20}, {"solver": "rk4", "steps": 20}],
}


def grid(seeds, steps):
    """PacGAN's protocol: 100 000 training data, 2500 samples; and the gap of the density to the truth."""
    target, rows = gaussian_grid(), []
    train, test = target.sample(100_000, seed=1).float(), target.sample(2000, seed=2)
    truth = target.log_prob(test)
    for seed in range(seeds):
        for name, samplers in SAMPLERS.items():
            model = grid_model(name, seed)
            seconds, _ = fitted(
                model, train, steps=steps, batch_size=512, ema=0.999, optimizer=2e-3, schedule=COSINE, seed=seed
            )
            if (name, seed) == ("diffusion", 0):
                model.save(kept("25 Gaussians"))
            score = model.log_prob(test.float(), method="ode", progress=False)
            gap = float((truth.double() - score.value).mean())
            for options in samplers:
                drawn = model.sample(2500, seed=seed + 10, progress=False, **options)
                found = samples.mode_coverage(drawn.double(), target)
                rows.append({
                    "model": name, "seed": seed, "cpu": seconds, "gap": gap, **options,
                    **{measure: found[measure].value for measure in ("modes", "good share", "reverse KL")},
                })  # fmt: skip
                yield rows


# --- 20 steps against 1000 ------------------------------------------------------------------------------------------------


def kept(name):
    """Where the parts before leave a model for the solvers."""
    return Path(tempfile.gettempdir()) / f"pgen benchmark {name}.pgen"


def solvers():
    """Samples of each solver beside samples of 1000 ancestral steps of the same model."""
    rows = []
    for name in ("25 Gaussians", "digits"):
        if not kept(name).exists():
            print(f"left out: {name}; the parts digits and grid leave the models that are sampled here")
            continue
        model = pgen.load(kept(name))
        began = time.process_time()
        count = 500 if name == "digits" else 1000
        reference = model.sample(count, solver="ancestral", steps=1000, seed=1, progress=False).flatten(1).float()
        slow = time.process_time() - began
        for solver, number in (("ancestral", 1000), ("dpm", 20), ("heun", 20), ("ddim", 20), ("dpm", 10), ("ancestral", 20)):
            began = time.process_time()
            drawn = model.sample(count, solver=solver, steps=number, seed=2, progress=False).flatten(1).float()
            seconds = time.process_time() - began
            test = divergences.mmd(drawn, reference, permutations=200, progress=False)
            told = samples.classifier_test(drawn.double(), reference.double(), permutations=100, most=500, progress=False)
            rows.append({
                "model": name, "solver": solver, "steps": number, "mmd_p": test.p_value, "accuracy": told.value,
                "accuracy_p": told.p_value, "cpu": seconds, "reference_cpu": slow,
            })  # fmt: skip
            yield rows


# --- steps ----------------------------------------------------------------------------------------------------------------


class Plain:
    """The loop that one writes by hand: continuous time, velocity, linear log-SNR, Adam."""

    def __init__(self, network, compiled):
        self.network = network
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)

    def _loss(self, x):
        t = (torch.rand(1) + torch.arange(len(x)) / len(x)) % 1
        log_snr = 13.3 - 23.3 * t
        alpha, sigma = (torch.sigmoid(s * log_snr).sqrt()[:, None, None] for s in (1, -1))
        noise = torch.randn_like(x)
        error = alpha * noise - sigma * x - self.network(alpha * x + sigma * noise, t)
        return (0.5 * 23.3 * torch.sigmoid(log_snr) * error.square().flatten(1).sum(1)).mean()

    def run(self, x, batch, count):
        for _ in range(count):
            loss = self.loss(x[torch.randint(0, len(x), (batch,))])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def steps(count=40, rounds=2):
    """CPU seconds of a training step of the same network; sides in turn, each in a process of its own, the fastest blocks."""
    rows = []
    for name, options, batch in (("dense 512, 2 blocks", {"width": 512, "blocks": 2}, 128),
                                 ("U-Net 32, 64", {"network": "unet"}, 64)):  # fmt: skip
        row = {"model": f"{name}, batch {batch}"}
        for tier, compiled in (("eager", False), ("graph", False), ("compiled", True)):
            sides = {} if tier == "graph" else {f"plain {tier}": (plain_step, (options, batch, compiled, count))}
            sides[tier] = (own_step, (options, batch, tier, count))
            found = {side: [] for side in sides}
            for _ in range(rounds):
                for side, (timed, arguments) in sides.items():
                    with multiprocessing.get_context("spawn").Pool(1) as pool:  # one's allocator is not the other's
                        found[side].append(pool.apply(timed, arguments))
            row |= {side: min(times) for side, times in found.items()}
        rows.append(row)
        yield rows


def plain_step(options, batch, compiled, count, blocks=6):
    torch.set_num_threads(1)
    x, plain = torch.randn(1149, 8, 8), Plain(Diffusion((8, 8), **options).network, compiled)
    plain.run(x, batch, 5)
    times = []
    for _ in range(blocks):
        start = time.process_time()
        plain.run(x, batch, count)
        times.append((time.process_time() - start) / count)
    return min(times)


def own_step(options, batch, tier, count, blocks=6):
    torch.set_num_threads(1)
    clock = Blocks(count)
    Diffusion((8, 8), **options).fit(
        torch.randn(1149, 8, 8), steps=count * (blocks + 2), batch_size=batch, compile=tier, progress=False, optimizer=1e-3,
        clip_norm=None, callbacks=[clock],
    )  # fmt: skip
    return min(clock.times, default=math.nan)


class Blocks(pgen.training.Callback):
    """CPU seconds a step, block by block."""

    def __init__(self, count):
        self.count, self.times, self.begun = count, [], None

    def on_log(self, step, metrics):
        now = time.process_time()
        if self.begun is not None and step - self.begun[0] >= self.count:
            self.times.append((now - self.begun[1]) / (step - self.begun[0]))
        if self.begun is None or step - self.begun[0] >= self.count:
            self.begun = (step, now)


# --- the page -------------------------------------------------------------------------------------------------------------


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def page(found, settings):
    parts = [
        "# Diffusion and flow matching",
        f"`python benchmarks/diffusion.py --markdown docs/benchmarks/diffusion.md`. {settings}. CPU seconds of "
        f"this process; fits in "
        "the graph tier. Hyperparameters were chosen on validation data.",
        "Runs: " + "; ".join(f"{part} {found['runs'][part]}" for part in PARTS if part in found["runs"]) + ".",
    ]
    writers = {"digits": digits_page, "grid": grid_page, "solvers": solvers_page, "steps": steps_page}
    return "\n\n".join([*parts, *(writers[part](found[part]) for part in PARTS if part in found)]) + "\n"


def digits_page(rows):
    body = [
        [f"{r['prediction']}, {r['split']} split, seed {r['seed']}", r["steps"], f"{r['cpu']:.0f}", f"{r['validation']:.3f}",
         f"{r['test']:.3f} ± {r['error']:.3f}", f"{r['ode']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return "\n\n".join([
        "## Digits, bits a pixel",
        "8 x 8 pixels of 17 levels, no dequantisation: the bound is one of the levels' mass. Continuous time, "
        "dense network of 512 "
        "units and 2 residual blocks, dropout 0.3, batch 128, Adam at 0.001 with a cosine, moving average 0.999, "
        "200 times for each "
        "datum of the test set (± standard error over data). `velocity` is the same run with the usual "
        "prediction in place of "
        "classes. To reach: 2.67 (a plain continuous-time dense network, 553 s on one core) and 2.4; a spline "
        "flow has 2.20 on the "
        "random split (numbers measured for this project, random split: 1149 / 288 / 360).",
        table(["prediction, split", "steps", "CPU s", "validation", "test, bound", "test, by the equation (bound)"], body),
    ])  # fmt: skip


def grid_page(rows):
    body = [
        [f"{r['model']}, seed {r['seed']}, {r['solver']} {r['steps']}", f"{r['cpu']:.0f}", f"{r['modes']:.0f}",
         f"{100 * r['good share']:.1f}", f"{r['reverse KL']:.3f}", f"{r['gap']:.3f}"]
        for r in rows
    ]  # fmt: skip
    return "\n\n".join([
        "## 25 Gaussians",
        "PacGAN's protocol (arXiv:1712.04086): 100 000 training data, 2500 samples, good within three standard "
        "deviations; dense "
        "network of 128 units and 2 residual blocks with 6 octaves of waves, batch 512, smaller than PacGAN's. "
        "The truth itself has 98.9 % and "
        "about .005 at this sample "
        "size. Published: plain GAN 17.3 modes, 94.8 %, .70; PacGAN4 24.8, 93.6 %, .04. The gap is that of the "
        "exact log-density by "
        "the equation to the truth, 2000 test data, nats.",
        table(["model, sampler", "CPU s", "modes", "good, %", "reverse KL", "gap, nats"], body),
    ])  # fmt: skip


def solvers_page(rows):
    body = [
        [f"{r['model']}, {r['solver']} {r['steps']}", f"{r['mmd_p']:.3f}", f"{r['accuracy']:.3f}", f"{r['accuracy_p']:.3f}",
         f"{r['cpu']:.1f}"]
        for r in rows
    ]  # fmt: skip
    return "\n\n".join([
        "## Few steps against a thousand",
        "1000 samples (digits: 500) of each solver against as many of 1000 ancestral steps of the same model, "
        "other seed: p-value of "
        "the maximum mean discrepancy (200 permutations), and accuracy and p-value of a kernel classifier (100 "
        "permutations). The "
        "first row of each is the floor: ancestral against itself.",
        table(["model, solver, steps", "p, MMD", "accuracy", "p, classifier", "CPU s"], body),
    ])  # fmt: skip


def steps_page(rows):
    sides = ("plain eager", "eager", "graph", "plain compiled", "compiled")
    body = [[r["model"], *(f"{1000 * r[side]:.2f}" if side in r else "" for side in sides)] for r in rows]
    return "\n\n".join([
        "## A training step",
        "CPU milliseconds, the fastest of some blocks, sides in turn and each in a process of its own; the plain loop is the "
        "same network, loss and optimizer (fused Adam), written by hand; freed memory stays with the process while `fit` runs.",
        table(["model", "plain torch", "fit, eager", "fit, graph", "torch.compile", "fit, compiled"], body),
    ])  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--keep", type=Path, default=KEPT, help="rows found so far (JSON)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=300, help="of the fits to digits")
    parser.add_argument("--fit-steps", type=int, default=6000, help="of the fits to 25 Gaussians")
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.keep.read_text()) if given.keep.exists() else {}
    runs = {
        "digits": lambda: digits(given.seeds, given.epochs), "grid": lambda: grid(given.seeds, given.fit_steps),
        "solvers": solvers, "steps": steps,
    }  # fmt: skip
    settings = f"Python {platform.python_version()}, torch {version('torch')}, one thread of {platform.machine()}"
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
