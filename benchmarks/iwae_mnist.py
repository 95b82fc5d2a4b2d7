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
from svi import cpu_name

import pgen

HELD_OUT = 1000
POINTS = 20  # of the curve
STAGES = 8


def read_idx(path):
    """Images of an IDX file, plain or gzipped, as float32 in [0, 1]."""
    path = path if path.exists() else path.with_name(path.name + ".gz")
    raw = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return torch.from_numpy(pixels.astype(np.float32) / 255)


def binarise(images, seed):
    return torch.bernoulli(images, generator=torch.Generator().manual_seed(seed))


def staged(progress):
    """The paper's stages i = 0..7 of 3^i epochs at 10^(-i/7) of the first rate."""
    ends = [(3**i - 1) / (3**STAGES - 1) for i in range(1, STAGES)]
    return 10 ** (-sum(progress >= end for end in ends) / (STAGES - 1))


class EnoughTime(Exception):
    """Ends the fit."""


class Watch(pgen.training.Callback):
    """Keeps the time, ends the fit, and draws the curve at even times; what the curve costs does not count as training.

    Args:
        vae: The model that is being fitted.
        images: Held-out images of the curve.
        seconds: Training time.
        steps: Exactly so many steps, instead of the time.
    """

    def __init__(self, vae, images, seconds, steps):
        self.vae, self.images, self.limit, self.steps = vae, images, seconds, steps
        self.rows, self.spent, self.elapsed = [], 0.0, 0.0

    def progress(self, step):
        """From 0 to 1, for the learning rate; by time it moves on a block of steps at a time."""
        return step / self.steps if self.steps else min(self.elapsed / self.limit, 1.0)

    def on_start(self, run):
        self.run, self.start = run, time.perf_counter()

    def on_log(self, step, metrics):
        self.elapsed = time.perf_counter() - self.start - self.spent
        over = step >= self.steps if self.steps else self.elapsed >= self.limit
        if over or self.progress(step) * POINTS >= len(self.rows) + 1:
            self.measure(step, metrics["loss"])
        if over:
            raise EnoughTime

    def measure(self, step, loss):
        began = time.perf_counter()
        bound = self.vae.log_prob(self.images, num_samples=100, seed=0)
        elbo = self.vae.log_prob(self.images, num_samples=1, seed=0)
        row = {"minutes": self.elapsed / 60, "step": step, "train_loss": loss}
        row |= {"validation_elbo": elbo.mean, "validation_iw100": bound.mean, "std_error": bound.std_error}
        self.rows.append(row)
        print("  ".join(f"{name} {value:.6g}" for name, value in row.items()), flush=True)
        self.spent += time.perf_counter() - began


def train(arguments, images, held_out):
    """The trained VAE and what was watched; capture and compilation belong to the training time."""
    torch.manual_seed(arguments.seed)
    vae = pgen.models.VAE((28, 28), latent_dim=50, hidden=(200, 200), activation=torch.nn.Tanh, likelihood="bernoulli")
    watch = Watch(vae, held_out, arguments.minutes * 60, arguments.steps)
    first, last = (1e-3, 1e-4) if arguments.paper else (arguments.lr, arguments.final_lr)
    decay = staged if arguments.paper else lambda progress: (last / first) ** progress
    with contextlib.suppress(EnoughTime):
        vae.fit(
            images,
            augment=torch.bernoulli,
            objective=pgen.IWAE(arguments.k),
            optimizer=pgen.training.Adam(first, betas=(0.9, 0.999), eps=1e-4),
            schedule=lambda step: decay(watch.progress(step)),
            steps=arguments.steps or 10**9,
            batch_size=arguments.batch,
            seed=arguments.seed,
            compile=arguments.compile,
            progress=arguments.progress,
            callbacks=[watch],
        )
    return vae, watch


def facts(arguments, watch, images):
    run = watch.run
    versions = {name: version(name) for name in ("torch", "pyro-ppl", "numpy")}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": "python benchmarks/iwae_mnist.py " + " ".join(sys.argv[1:]),
        "versions": versions | {"pgen": pgen.__version__, "python": platform.python_version()},
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "seed": arguments.seed,
        "k": arguments.k,
        "batch": arguments.batch,
        "rates": "paper's stages" if arguments.paper else [arguments.lr, arguments.final_lr],
        "training_minutes": watch.elapsed / 60,
        "curve_minutes": watch.spent / 60,
        "steps": run.steps,
        "epochs": run.epochs,
        "tier": run.tier,
        "tier_reason": run.tier_reason,
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
    minutes = [row["minutes"] for row in rows]
    for name, label in (("validation_elbo", "ELBO"), ("validation_iw100", "100-sample bound")):
        axes.plot(minutes, [-row[name] for row in rows], label=f"held out, minus {label}")
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
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, compilation included; not evaluation")
    parser.add_argument("--steps", type=int, help="exactly so many steps, instead of a time")
    parser.add_argument("--k", type=int, default=1, choices=(1, 5, 50))
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--final-lr", type=float, default=1e-4)
    parser.add_argument("--paper", action="store_true", help="the paper's rates in its eight stages, squeezed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compile", default="auto", choices=("auto", "eager", "graph", "compiled"))
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
    vae, watch = train(arguments, images, held_out)
    result = facts(arguments, watch, images) | evaluate(vae, test, arguments)
    write(arguments.out, watch.rows, result)
    print("{steps} steps, {epochs:.0f} epochs, {training_minutes:.1f} minutes of training, {tier} tier".format(**result))
    print("test NLL {test_nll:.2f} ± {std_error:.2f} nats by the {samples}-sample bound".format(**result))


if __name__ == "__main__":
    main()
