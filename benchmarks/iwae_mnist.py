"""The one-layer VAE and IWAE of Burda, Grosse and Salakhutdinov (2016, arXiv:1509.00519) on MNIST, within a time limit.

    python benchmarks/iwae_mnist.py --data mnist/ --minutes 20 --k 1 --out iwae_k1/

The paper's architecture: latent 50, encoder and decoder 784-200-200 tanh, diagonal Gaussian q with sd = exp(linear), output
bias = logit of the training mean clipped to [.001, .999], Glorot uniform weights, Adam(.9, .999, eps 1e-4), pixels binarised
anew at every step. The paper's schedule, 3280 epochs at batch 20 from 1e-3 to 1e-4 in eight stages, is compressed: batch and
first rate are arguments, the rate falls exponentially to its last value over the time given. `--paper` keeps the paper's own.

The last 1000 training images are held out for the curve: the training bound and the 100-sample bound. The test images,
binarised once, are touched at the end: 5000-sample bound, mean and standard error over images.
"""

import argparse
import contextlib
import csv
import gzip
import hashlib
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import pgen

HELD_OUT = 1000
POINTS = 20  # of the curve
TRIAL_S = 10.0  # of steps in the chosen tier, to learn how many fit
STAGES = 8


def read_idx(path):
    """Images of an IDX file, plain or gzipped, as float32 in [0, 1]."""
    path = path if path.exists() else path.with_name(path.name + ".gz")
    raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def binarise(images, seed):
    return torch.bernoulli(images, generator=torch.Generator().manual_seed(seed))


def exponential(first, last, total):
    """Multiplier of `first` that reaches `last` after `total` steps."""
    return lambda step: (last / first) ** (step / total)


def staged(total):
    """The paper's stages i = 0..7 of 3^i epochs at 10^(-i/7) of the first rate, stretched over `total` steps."""
    ends = [total * (3**i - 1) / (3**STAGES - 1) for i in range(1, STAGES + 1)]
    return lambda step: 10 ** (-next((i for i, end in enumerate(ends) if step < end), STAGES - 1) / 7)


class EnoughTime(Exception):
    """The trial has seen enough."""


class Trial(pgen.training.Callback):
    """Measures the seconds a step over the second half of a time, then ends the fit."""

    def __init__(self, seconds):
        self.seconds, self.marks = seconds, []

    def on_log(self, step, metrics):
        now = time.perf_counter()
        if len(self.marks) < 2 and (not self.marks or now - self.marks[0][0] > self.seconds / 2):
            self.marks.append((now, step))
        elif now - self.marks[0][0] > self.seconds:
            self.step_s = (now - self.marks[1][0]) / (step - self.marks[1][1])
            raise EnoughTime


class Curve(pgen.training.Callback):
    """Bounds on held-out images at even times; its own time does not count as training."""

    def __init__(self, vae, images, seconds):
        self.vae, self.images, self.every, self.rows, self.spent = vae, images, seconds / POINTS, [], 0.0

    def on_start(self, run):
        self.start = self.due = time.perf_counter()

    def on_log(self, step, metrics):
        if time.perf_counter() - self.spent >= self.due:
            self.measure(step, metrics["loss"])
            self.due += self.every

    def measure(self, step, loss):
        began = time.perf_counter()
        bound = self.vae.log_prob(self.images, num_samples=100, seed=0)
        elbo = self.vae.log_prob(self.images, num_samples=1, seed=0)
        row = {"minutes": (began - self.spent - self.start) / 60, "step": step, "train_loss": loss}
        row |= {"validation_elbo": elbo.mean, "validation_iw100": bound.mean, "std_error": bound.std_error}
        self.rows.append(row)
        print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
        self.spent += time.perf_counter() - began


def new_vae(seed):
    """Weights by Glorot's uniform rule; the first fit starts the output's bias at the logit of the mean image."""
    torch.manual_seed(seed)
    return pgen.models.VAE((28, 28), latent_dim=50, hidden=(200, 200), activation=torch.nn.Tanh, likelihood="bernoulli")


def steps_within(fit, arguments):
    """Steps that the time allows, by a trial of the same fit in the same tier."""
    began, trial = time.perf_counter(), Trial(TRIAL_S)
    with contextlib.suppress(EnoughTime):
        fit(steps=10**9, callbacks=[trial])
    spent = time.perf_counter() - began
    print(f"{trial.step_s * 1e3:.3f} ms a step in a trial of {spent:.0f} s")
    return max(1, int((arguments.minutes * 60 - spent) / trial.step_s))


def train(arguments, images, held_out):
    """The trained VAE, its run, its curve, and the training minutes (trial and compilation included)."""
    rate = 1e-3 if arguments.paper else arguments.lr
    options = {
        "augment": torch.bernoulli,
        "objective": pgen.IWAE(arguments.k),
        "optimizer": pgen.training.Adam(rate, betas=(0.9, 0.999), eps=1e-4),
        "batch_size": arguments.batch,
        "seed": arguments.seed,
        "compile": arguments.compile,
    }
    began = time.perf_counter()

    def trial(**more):
        return new_vae(arguments.seed).fit(images, progress=False, **options, **more)

    steps = arguments.steps or steps_within(trial, arguments)
    schedule = staged(steps) if arguments.paper else exponential(rate, arguments.final_lr, steps)
    vae = new_vae(arguments.seed)
    curve = Curve(vae, held_out, arguments.minutes * 60)
    run = vae.fit(images, steps=steps, schedule=schedule, callbacks=[curve], progress=arguments.progress, **options)
    minutes = (time.perf_counter() - began - curve.spent) / 60
    curve.measure(run.steps, float(run.history["loss"][-1000:].mean()))
    return vae, run, curve.rows, minutes


def facts(arguments, run, minutes, images):
    versions = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/iwae_mnist.py " + " ".join(sys.argv[1:]),
        "versions": versions | {"pgen": pgen.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "seed": arguments.seed,
        "k": arguments.k,
        "batch": arguments.batch,
        "rates": "paper's stages" if arguments.paper else [arguments.lr, arguments.final_lr],
        "training_minutes": minutes,
        "steps": run.steps,
        "epochs": run.epochs,
        "tier": run.tier,
        "skipped_steps": run.skipped,
        "train_images": len(images),
    }


def evaluate(vae, test, arguments):
    began = time.perf_counter()
    score = vae.log_prob(test, num_samples=arguments.samples, seed=arguments.seed)
    elbo = vae.log_prob(test, num_samples=1, seed=arguments.seed)
    return {
        "test_nll": -score.mean,
        "std_error": score.std_error,
        "samples": arguments.samples,
        "test_minus_elbo": -elbo.mean,
        "mean_mc_error": float(score.mc_error.mean()),
        "test_images": len(test),
        "test_sha256": hashlib.sha256(test.to(torch.uint8).numpy().tobytes()).hexdigest(),
        "evaluation_minutes": (time.perf_counter() - began) / 60,
    }


def draw(rows, result, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    minutes = [row["minutes"] for row in rows[1:]]
    for name, label in (("validation_elbo", "ELBO"), ("validation_iw100", "100-sample bound")):
        axes.plot(minutes, [-row[name] for row in rows[1:]], label=f"held out, minus {label}")
    label = f"test, {result['samples']} samples: {result['test_nll']:.2f}"
    axes.axhline(result["test_nll"], color="k", lw=0.8, ls="--", label=label)
    axes.set(xlabel="wall minutes of training", ylabel="nats a datum", title=f"IWAE, k = {result['k']}, dynamic MNIST")
    axes.legend()
    figure.savefig(path, dpi=150)


def write(folder, rows, result):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "curve.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, result, folder / "curve.png")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the four IDX files, plain or gzipped")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.csv, curve.png, result.json")
    parser.add_argument("--minutes", type=float, default=20.0, help="training, trial and compilation included; not evaluation")
    parser.add_argument("--steps", type=int, help="exactly so many steps, instead of the trial")
    parser.add_argument("--k", type=int, default=1, choices=(1, 5, 50))
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--final-lr", type=float, default=1e-4)
    parser.add_argument("--paper", action="store_true", help="the paper's rates in its eight stages, stretched over the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", default="compiled", choices=("auto", "eager", "graph", "compiled"))
    parser.add_argument("--samples", type=int, default=5000, help="of the test bound")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--progress", action="store_true")
    return parser.parse_args()


def main():
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    grey = read_idx(arguments.data / "train-images-idx3-ubyte")
    images, held_out = grey[:-HELD_OUT], binarise(grey[-HELD_OUT:], seed=1)
    test = binarise(read_idx(arguments.data / "t10k-images-idx3-ubyte")[: arguments.test_images], seed=2)
    vae, run, rows, minutes = train(arguments, images, held_out)
    result = facts(arguments, run, minutes, images) | evaluate(vae, test, arguments)
    write(arguments.out, rows, result)
    print(run)
    print(
        f"test NLL {result['test_nll']:.2f} ± {result['std_error']:.2f} nats by {arguments.samples} samples, {minutes:.1f} min"
    )


if __name__ == "__main__":
    main()
