"""Generative adversarial networks: modes of 25 and of 8 Gaussians, the cost of a step, and digits 8 x 8.

    python benchmarks/gan.py --markdown docs/benchmarks/gan.md
    python benchmarks/gan.py --parts grid --variants "R1" --seeds 0 1 2 --markdown docs/benchmarks/gan.md

Runs can be made piecemeal: each row is kept in docs/benchmarks/gan.json and the page is written from all that is there;
``--again`` makes rows anew. One thread; times are CPU seconds of this process, so that other work does not count.

*grid*, *ring*: the data and the measure of PacGAN's protocol (25 means on {-4, -2, 0, 2, 4}^2, sd .05; 8 on the unit circle,
sd .01; 100 000 training data; 2 500 samples; good ones lie within 3 sd of the nearest mode; the reverse KL is that of the good
samples' modes against equal shares), with smaller networks than the published ones: 3 x 128, no batch normalisation, z of 2
numbers, batches of 128, Adam (.5, .999) falling linearly to zero. *steps*: the same networks and losses by hand in plain torch,
in blocks that take turns. *digits*: split at random, [-1, 1], DCGAN; judged on the test part by `pgen.evaluation.samples`.
"""

import argparse
import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from svi import cpu_name
from torch import nn

import pgen
from pgen.data import toy
from pgen.evaluation.sample_measures import mode_coverage
from pgen.models import GAN
from pgen.objectives import Adversarial, Linear
from pgen.training import Adam
from pgen.training.callbacks import Callback

KEPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "gan.json"
PARTS = ("steps", "grid", "ring", "digits")
HIDDEN, BATCH, STEPS = (128, 128, 128), 128, 30_000
TARGETS = {"grid": toy.gaussian_grid, "ring": toy.gaussian_ring}
PUBLISHED = {
    "grid": [("GAN", "17.3 ± .8", "94.8", ".70"), ("ALI", "24.1", "95.7", ".14"), ("PacGAN4", "24.8 ± .2", "93.6", ".04")],
    "ring": [("GAN", "6.3 ± .5", "98.2", ".45"), ("ALI", "6.6", "97.6", ".36"), ("PacGAN4", "7.8", "95.9", ".07")],
}
VARIANTS = {
    "plain": {"model": {}, "objective": Adversarial(), "lr": 5e-4, "ema": None, "batch": BATCH},
    "pack of 4": {"model": {"pack": 4}, "objective": Adversarial(), "lr": 5e-4, "ema": None, "batch": 4 * BATCH},
    "R1": {"model": {}, "objective": Adversarial(r1=Linear(0.1, 0.001)), "lr": 1e-3, "ema": 0.999, "batch": BATCH},
}


class Clock(Callback):
    """CPU seconds at each block of steps."""

    def __init__(self):
        self.marks = []

    def on_log(self, step, metrics):
        self.marks.append((step, time.process_time()))

    def step_seconds(self):
        """Of a step, over the later two thirds: capturing and compiling are over by then."""
        (a, start), (b, end) = self.marks[len(self.marks) // 3], self.marks[-1]
        return (end - start) / (b - a)


# --- modes ----------------------------------------------------------------------------------------------------------------


def modes(part, variant, seed, steps):
    """One fit, measured."""
    target, recipe, clock = TARGETS[part](), VARIANTS[variant], Clock()
    model = GAN((2,), 2, HIDDEN, seed=seed, **recipe["model"])
    start = time.process_time()
    run = model.fit(
        target.sample(100_000, seed=0), objective=recipe["objective"], optimizer=Adam(recipe["lr"], betas=(0.5, 0.999)),
        schedule="linear", ema=recipe["ema"], steps=steps, batch_size=recipe["batch"], seed=seed, compile="compiled",
        callbacks=[clock], progress=False,
    )  # fmt: skip
    seconds = time.process_time() - start
    found = mode_coverage(model.sample(2500, seed=seed, progress=False), target)
    return {
        "modes": found["modes"].value, "good": found["good share"].value, "kl": found["reverse KL"].value, "cpu": seconds,
        "step": clock.step_seconds(), "warnings": run.warnings,
    }  # fmt: skip


# --- the cost of a step ---------------------------------------------------------------------------------------------------


def networks():
    """The generator and the critic by hand."""

    def layers(activation, outputs):
        sizes = [part for _ in range(2) for part in (nn.Linear(128, 128), activation())]
        return nn.Sequential(nn.Linear(2, 128), activation(), *sizes, nn.Linear(128, outputs))

    return layers(nn.ReLU, 2), layers(lambda: nn.LeakyReLU(0.2), 1)


def by_hand(name, x, compiled):
    """A training loop as one writes it; yields after each block of steps, of the number sent."""
    torch.manual_seed(0)
    g, d = networks()
    options = {"lr": 5e-4, "betas": (0.5, 0.999), "fused": True}
    step_g, step_d = torch.optim.Adam(g.parameters(), **options), torch.optim.Adam(d.parameters(), **options)
    softplus = nn.functional.softplus

    def critic_loss(real, z, u):
        fake = g(z).detach()
        if name == "non_saturating":
            return softplus(-d(real)).mean() + softplus(d(fake)).mean()
        between = (fake + u * (real - fake)).requires_grad_()
        (slope,) = torch.autograd.grad(d(between).sum(), between, create_graph=True)
        return d(fake).mean() - d(real).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()

    def generator_loss(z):
        fake = d(g(z))
        return (softplus(-fake) if name == "non_saturating" else -fake).mean()

    if compiled and name == "non_saturating":  # torch.compile has no double backward
        critic_loss, generator_loss = torch.compile(critic_loss), torch.compile(generator_loss)
    n = yield
    while True:
        for _ in range(n):
            real = x[torch.randint(len(x), (BATCH,))]
            step_d.zero_grad(set_to_none=True)
            critic_loss(real, torch.randn(BATCH, 2), torch.rand(BATCH, 1)).backward()
            step_d.step()
            step_g.zero_grad(set_to_none=True)
            generator_loss(torch.randn(BATCH, 2)).backward()
            step_g.step()
        n = yield


def ours(name, x, tier):
    """The same in pgen; each block is a fit that goes on."""
    model, objective = GAN((2,), 2, HIDDEN, seed=0), Adversarial(name)
    n = yield
    while True:
        clock = Clock()
        model.fit(
            x, objective=objective, optimizer=Adam(5e-4, betas=(0.5, 0.999)), steps=n, batch_size=BATCH, compile=tier,
            callbacks=[clock], progress=False,
        )  # fmt: skip
        n = yield clock.step_seconds()


def steps_of(name, tier, blocks=5, steps=300):
    """Milliseconds a step by hand and in pgen, medians over blocks that take turns."""
    x = toy.gaussian_grid().sample(20_000, seed=0)
    hand, own = by_hand(name, x, tier == "compiled"), ours(name, x, tier)
    next(hand), next(own), hand.send(100)
    times = {"hand": [], "pgen": []}
    for _ in range(blocks):
        start = time.process_time()
        hand.send(steps)
        times["hand"].append((time.process_time() - start) / steps)
        times["pgen"].append(own.send(steps))
    middle = {side: sorted(found)[len(found) // 2] * 1e3 for side, found in times.items()}
    return {"hand": middle["hand"], "pgen": middle["pgen"], "hand_compiled": tier == "compiled" and name == "non_saturating"}


# --- digits ---------------------------------------------------------------------------------------------------------------


def digits(seed):
    """DCGAN on 8 x 8 digits by its own recipe, and what a held-out real sample scores in its place."""
    from pgen.evaluation import samples

    x = pgen.data.digits(integers=True, split="random")
    train, test = x.train.float() / 8 - 1, x.test.float() / 8 - 1
    model = GAN((8, 8), 32, architecture="dcgan", output="tanh", seed=seed)
    start = time.process_time()
    run = model.fit(train, batch_size=64, seed=seed, progress=False)
    seconds = time.process_time() - start
    drawn = ((model.sample(len(test), seed=seed, progress=False) + 1) * 8).round() / 8 - 1  # to the nearest level
    found = samples.evaluate(drawn, test, train=train, labels=x.labels.train, features="classifier", progress=False)
    return {"cpu": seconds, "steps": run.steps, "table": found.to_markdown(), "warnings": run.warnings}


# --- the page -------------------------------------------------------------------------------------------------------------


def mean_sd(values):
    """Mean ± standard deviation over seeds."""
    values = torch.tensor(values, dtype=torch.float64)
    return f"{float(values.mean()):.3g}" + (f" ± {float(values.std()):.2g}" if len(values) > 1 else "")


def runs(rows):
    """Days and processors of each part."""
    found = {}
    for name, row in rows.items():
        found.setdefault(name.split("|")[0], {})[row.get("when", "2026-11-21 on AMD EPYC")] = None
    return {part: list(when) for part, when in found.items()}


def write(rows, path):
    """The page."""
    text = [
        "# Generative adversarial networks",
        "",
        "By `python benchmarks/gan.py --markdown docs/benchmarks/gan.md`, "
        f"torch {version('torch')}, {platform.machine()}, one thread;",
        "times are CPU seconds of the process, taken while other work ran on the machine.",
        "Runs: " + "; ".join(f"{part} {', '.join(when)}" for part, when in runs(rows).items()) + ".",
    ]
    for part in ("grid", "ring"):
        found = {k: v for k, v in rows.items() if k.startswith(f"{part}|")}
        if found:
            text += ["", *mode_table(part, found)]
    if found := {k: v for k, v in rows.items() if k.startswith("steps|")}:
        text += ["", *step_table(found)]
    if found := {k: v for k, v in rows.items() if k.startswith("digits|")}:
        text += ["", *digit_table(found)]
    Path(path).write_text("\n".join(text) + "\n")


def mode_table(part, found):
    """Modes, good share and reverse KL of each variant, mean ± sd over seeds, the published rows below."""
    count = 25 if part == "grid" else 8
    lines = [
        f"## {'25 Gaussians' if part == 'grid' else 'Ring of 8'}",
        "",
        "PacGAN's data and measure with smaller networks than the published ones: 3 x 128, no batch normalisation, z of 2",
        "numbers, batches of 128, Adam (.5, .999) falling linearly to zero; 2 500 samples; mean ± sd over seeds. The target",
        f"itself has 98.9 % good samples and a reverse KL of {(count - 1) / 5000:.4f}. *plain*: non-saturating, Adam 5e-4.",
        "*pack of 4*: the same with 128 packs a batch. *R1*: R1 falling from .1 to .001, Adam 1e-3, parameters averaged",
        "(.999); chosen among five recipes on the grid by shorter runs of seed 0. Each row says how many seeds.",
        "",
        f"| variant | steps | seeds | modes of {count} | in every seed | good % | reverse KL | CPU s a seed | ms a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups = {}
    for name, row in found.items():
        _, variant, steps, _ = name.split("|")
        groups.setdefault((variant, int(steps)), []).append(row)
    for (variant, steps), group in groups.items():
        column = {key: [row[key] for row in group] for key in ("modes", "good", "kl", "cpu", "step")}
        every = "yes" if min(column["modes"]) == count else f"{int(min(column['modes']))} at worst"
        lines.append(
            f"| {variant} | {steps} | {len(group)} | {mean_sd(column['modes'])} | {every} | "
            f"{mean_sd([100 * g for g in column['good']])} | {mean_sd(column['kl'])} | {sum(column['cpu']) / len(group):.0f} | "
            f"{1e3 * sum(column['step']) / len(group):.2f} |"
        )
    for name, *cells in PUBLISHED[part]:
        lines.append(
            f"| published {name}, 4 x 400 and maxout, 400 epochs | 400000 | 10 | {cells[0]} | | {cells[1]} | {cells[2]} | | |"
        )
    return lines


def step_table(found):
    """A step by hand and in pgen."""
    lines = [
        "## A step", "",
        "Milliseconds of CPU a step of both players (G and D 3 x 128, batch 128), medians over five blocks that take turns.",
        "Eager (both networks as written) and graph (the captured step, not compiled; what `fit` takes after about a second)",
        "against a plain loop with fused Adam; compiled against `torch.compile` of both losses with fused Adam (it has no",
        "double backward, so the gradient penalty is left to the plain loop there). In eager steps of networks as small as",
        "these gradient norms, checks and metrics cost half a millisecond, which shows.",
        "",
        "| loss | tier | by hand | pgen | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in found.items():
        _, loss, tier = name.split("|")
        side = "torch.compile" if row["hand_compiled"] else "plain"
        lines.append(f"| {loss} | {tier} | {row['hand']:.2f} ({side}) | {row['pgen']:.2f} | {row['pgen'] / row['hand']:.2f} |")
    return lines


def digit_table(found):
    """What `pgen.evaluation.samples` says of each seed."""
    lines = ["## Digits, 8 x 8", ""]
    for name, row in found.items():
        lines += [
            f"Seed {name.split('|')[1]}: {row['steps']} steps in {row['cpu']:.0f} CPU seconds.",
            "",
            row["table"].strip(),
            "",
        ]
    return lines[:-1]


def wanted(options):
    """Keys of the rows asked for, and how to make each."""
    for part in options.parts:
        if part == "steps":
            for name in ("non_saturating", "wasserstein"):
                for tier in ("eager", "graph", "compiled"):
                    yield f"steps|{name}|{tier}", lambda name=name, tier=tier: steps_of(name, tier)
        for seed in options.seeds:
            if part == "digits":
                yield f"digits|{seed}", lambda seed=seed: digits(seed)
            for variant in options.variants if part in TARGETS else ():
                key = f"{part}|{variant}|{options.steps}|{seed}"
                yield key, lambda p=part, v=variant, s=seed: modes(p, v, s, options.steps)


def main():
    """Make the rows asked for that are not there, and the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(10))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--again", action="store_true", help="make rows that are there once more")
    parser.add_argument("--results", type=Path, default=KEPT)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for key, make in wanted(options):
        if key in rows and not options.again:
            continue
        rows[key] = {**make(), "when": f"{date.today()} on {cpu_name()}"}
        print(key, {k: v for k, v in rows[key].items() if k != "table"}, flush=True)
        options.results.write_text(json.dumps(rows, indent=1) + "\n")
    if options.markdown:
        write(rows, options.markdown)


if __name__ == "__main__":
    main()
