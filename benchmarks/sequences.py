"""Sequences: text, sound and music in bits or nats a symbol, and what steps cost.

    python benchmarks/sequences.py --markdown docs/benchmarks/sequences.md
    python benchmarks/sequences.py --parts ar2 sampling --keep /tmp/sequences.json     # some parts; others are kept from before

Data in the folder PGEN_DATA, or ../shared/data beside the project. One thread; times are CPU time of this process, so that
other work on the machine does not count. Hyperparameters were chosen on validation data; test sets are scored once.
"""

import argparse
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
from pgen.data import mu_law, mu_law_inverse, pad, windows
from pgen.models import CausalTransformer, WaveNet

DATA = Path(os.environ.get("PGEN_DATA", Path(__file__).parents[2] / "shared" / "data"))
KEPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "sequences.json"
LN2 = math.log(2)


class Clock(pgen.training.Callback):
    """CPU time at the end of each block of steps."""

    def __init__(self):
        self.marks = []

    def on_log(self, step, metrics):
        self.marks.append((step, time.process_time()))

    def milliseconds(self):
        """The fastest block, a step."""
        return 1e3 * min((t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in zip(self.marks, self.marks[1:]) if s1 > s0)


def fitted(model, data, validation, steps, batch, validate_every, **options):
    """Fit; CPU minutes."""
    start = time.process_time()
    run = model.fit(
        data, validation=validation, steps=steps, batch_size=batch, validate_every=validate_every, compile="compiled",
        progress=False, **options,
    )  # fmt: skip
    return (time.process_time() - start) / 60, run


# --- text -----------------------------------------------------------------------------------------------------------------


def text_data(length, stride):
    text = (DATA / "tinyshakespeare" / "input.txt").read_text()
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    a, b = int(0.9 * len(codes)), int(0.95 * len(codes))
    train, validation, test = codes[:a], codes[a:b], codes[b:]
    return alphabet, train, (windows(train, length, stride), windows(validation, length), windows(test, length))


def text(budget):
    """Characters of tinyshakespeare in nanoGPT's setting for a CPU."""
    return characters(int(2000 * budget), 12, "Text, bits a character")


def text_longer(budget):
    """The same network, more characters a step."""
    return characters(int(2000 * budget), 32, "Text, larger batches")


def characters(steps, batch, title):
    alphabet, train, (x, validation, test) = text_data(64, 8)
    model = CausalTransformer((64,), num_classes=len(alphabet), width=128, layers=4, heads=4)
    minutes, run = fitted(model, x, validation, steps, batch, steps // 4, early_stopping=0)
    bits = [model.log_prob(part, progress=False).bits_per_dim for part in (validation, test)]
    counts = torch.bincount(train, minlength=len(alphabet)).double() + 1
    frequencies = (counts / counts.sum()).log()
    alone = [float(-frequencies[part].mean()) / LN2 for part in (validation, test)]
    rows = [["single characters", "-", "-", "-", *(f"{b:.3f}" for b in alone)]]
    rows.append(["transformer", f"{steps} x {batch} x 64", f"{minutes:.1f}", run.tier, *(f"{b:.3f}" for b in bits)])
    prompt = torch.tensor([[alphabet.index(c) for c in "ROMEO:\n"]])
    shown = "".join(alphabet[i] for i in model.complete(prompt, 300, seed=1, progress=False)[0].tolist())
    note = (
        "Alphabet of 65, split 90/5/5 in order; windows of 64 that do not overlap, so that a character sees 0 to 63 before it "
        "(1 to 64 in nanoGPT's own loss). Four layers, four heads, width 128, 0.8 million parameters, no dropout, the default "
        "recipe of `fit`. nanoGPT reports (recalled, not run here) 1.88 nats = 2.71 bits for 2000 steps of 12 x 64 in three "
        "minutes on a CPU, and 1.47 nats = 2.12 bits for its ten times larger network on a GPU, on a split 90/10."
    )
    sample = "\n".join("    " + line for line in shown.splitlines())
    return {
        "title": title,
        "head": ["model", "steps x batch x window", "CPU min", "tier", "validation", "test"],
        "rows": rows,
        "note": note + "\n\nA completion:\n\n" + sample,
    }


# --- sound ----------------------------------------------------------------------------------------------------------------

WINDOW = 2048


def sound_data(train_clips):
    loaded = np.load(DATA / "fsdd" / "fsdd.npz")
    audio, offsets, test = loaded["audio"], loaded["offsets"], loaded["test"]
    clips = [audio[a:b].astype(np.float32) / 32768 for a, b in itertools.pairwise(offsets)]
    order = np.random.default_rng(0).permutation(np.flatnonzero(~test))
    train, held = [clips[i] for i in order[:train_clips]], [clips[i] for i in order[train_clips : train_clips + 60]]
    return train, held, [clips[i] for i in np.flatnonzero(test)]


def cut(clips, stride):
    """Windows of all clips; what is left at an end is padded."""
    parts = [torch.from_numpy(clip[i : i + WINDOW].copy()) for clip in clips for i in range(0, len(clip), stride)]
    padded = pad([mu_law(part) for part in parts if len(part) > 1], WINDOW)
    return padded


def autoregression(train, test, order=16):
    """Bits a sample of a linear autoregression with Gaussian noise, its density summed over each mu-law class."""

    def design(clip):
        rows = np.lib.stride_tricks.sliding_window_view(np.concatenate([np.zeros(order, np.float32), clip]), order)[:-1]
        return rows.astype(np.float64), clip.astype(np.float64)

    pairs = [design(clip) for clip in train]
    gram = sum(a.T @ a for a, _ in pairs) + 1e-9 * np.eye(order)
    weights = np.linalg.solve(gram, sum(a.T @ y for a, y in pairs))
    sd = math.sqrt(np.mean(np.concatenate([(y - a @ weights) ** 2 for a, y in pairs])))
    edges = class_edges()
    bits, count = 0.0, 0
    for clip in test:
        a, y = design(clip)
        classes = mu_law(torch.from_numpy(clip)).numpy()
        upper, lower = ((edges[classes + k] - a @ weights) / sd for k in (1, 0))
        mass = gaussian_mass(torch.from_numpy(lower), torch.from_numpy(upper))
        bits -= float(mass.sum()) / LN2
        count += len(y)
    return bits / count


def class_edges():
    """Where mu-law classes begin and end, ``(257,)``; the last ones reach to infinity."""
    y = np.arange(257) / 128 - 1
    edges = np.sign(y) * np.expm1(np.abs(y) * math.log(256)) / 255
    edges[0], edges[-1] = -np.inf, np.inf
    return edges


def gaussian_mass(lower, upper):
    """log P(lower < Z < upper), without cancellation."""
    flip = lower > 0
    a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_b, log_a = torch.special.log_ndtr(b), torch.special.log_ndtr(a)
    return log_b + torch.log1p(-torch.exp(log_a - log_b))


def sound(budget):
    """Spoken digits at 8 kHz, mu-law 256."""
    train, held, test = sound_data(max(20, int(900 * budget)))
    counts = torch.bincount(torch.cat([mu_law(torch.from_numpy(c)) for c in train]), minlength=256).double() + 1
    frequencies = (counts / counts.sum()).log()
    alone = float(-frequencies[torch.cat([mu_law(torch.from_numpy(c)) for c in test])].mean()) / LN2
    rows = [["8-bit classes, independent", "-", "-", "-", f"{alone:.3f}"]]
    rows.append(["AR(16), Gaussian noise", "-", "-", "-", f"{autoregression(train, test):.3f}"])
    model = WaveNet((WINDOW,), num_classes=256, channels=32, skip_channels=64, dilations=[2**i for i in range(9)])
    steps = int(600 * budget)
    minutes, _ = fitted(model, cut(train, WINDOW), cut(held, WINDOW), steps, 4, 300, early_stopping=0)
    bits = model.log_prob(cut(test, WINDOW), progress=False).bits_per_dim
    name = f"WaveNet, 9 layers of 32, field {model.receptive_field}"
    rows.append([name, f"{steps} x 4 x {WINDOW}", f"{minutes:.1f}", f"{len(train)} clips", f"{bits:.3f}"])
    note = (
        f"The official test clips ({len(test)}, every sample), and of the 2 700 training clips the first {len(train)} of a "
        f"permutation (seed 0): a short budget on a subset. Windows of {WINDOW} samples, each scored from nothing before it."
    )
    return {
        "title": "Sound, bits a sample",
        "head": ["model", "steps", "CPU min", "trained on", "test"],
        "rows": rows,
        "note": note,
    }


# --- music ----------------------------------------------------------------------------------------------------------------


def music_data():
    loaded = np.load(DATA / "polyphonic_music" / "jsb_chorales_quarter.npz")
    roll, offsets, split = loaded["roll"], loaded["offsets"], loaded["split"]
    pieces = [torch.from_numpy(roll[a:b].astype(np.float32)) for a, b in itertools.pairwise(offsets)]
    longest = max(map(len, pieces))
    return [pad([piece for piece, part in zip(pieces, split) if part == k], longest) for k in range(3)]


def music(budget):
    """JSB chorales, 88 notes a frame."""
    train, validation, test = music_data()
    shape = tuple(train["x"].shape[1:])
    model = WaveNet(shape, "bernoulli", channels=64, dilations=(1, 2, 4, 8, 16), dropout=0.3)
    counted = torch.cat([x[:n] for x, n in zip(train["x"], train["lengths"])])
    p = counted.mean(0).clamp(1e-4, 1 - 1e-4)
    frames = torch.cat([x[:n] for x, n in zip(test["x"], test["lengths"])])
    alone = -float((frames * p.log() + (1 - frames) * (1 - p).log()).sum(1).mean())
    steps = int(600 * budget)
    minutes, _ = fitted(model, train, validation, steps, 20, 60, early_stopping=0)
    found = [-model.log_prob(part, progress=False).total / float(part["lengths"].sum()) for part in (validation, test)]
    rows = [["independent Bernoulli", "-", "-", "-", f"{alone:.3f}"]]
    rows.append(["WaveNet, 5 layers of 64, dropout .3", str(steps), f"{minutes:.1f}", *(f"{value:.3f}" for value in found)])
    note = (
        "Nats a frame, summed over 88 notes and averaged over all frames of all pieces, the first ones included (229/76/77 "
        "pieces). On the same normalisation a GRU of 256 units gives 8.65 and the independent model 11.06; the TCN's paper, on "
        "frames 2..T, prints 8.43 (GRU) and 8.10 (TCN). Models in which notes of a chord are not independent given the past "
        "(RNN-NADE 5.56) are of another kind."
    )
    return {
        "title": "Music, nats a frame",
        "head": ["model", "steps", "CPU min", "validation", "test"],
        "rows": rows,
        "note": note,
    }


# --- a signal of known entropy ----------------------------------------------------------------------------------------


def oscillation(n, length, seed):
    """An AR(2) signal on the grid of mu-law classes, and the exact log-mass of each class given those before."""
    generator = torch.Generator().manual_seed(seed)
    a, b, sd = 1.6, -0.8, 0.05
    edges, centres = torch.from_numpy(class_edges()), mu_law_inverse(torch.arange(256)).double()
    one = two = torch.zeros(n, dtype=torch.float64)
    classes, masses = [], []
    for _ in range(length):
        mean = a * one + b * two
        x = mean + sd * torch.randn(n, generator=generator, dtype=torch.float64)
        k = mu_law(x.clamp(-1, 1))
        masses.append(gaussian_mass((edges[k] - mean) / sd, (edges[k + 1] - mean) / sd))
        classes.append(k)
        one, two = centres[k], one
    return torch.stack(classes, 1), torch.stack(masses, 1)


def ar2(budget):
    """Bits a sample beyond the entropy."""
    T, rows = 128, []
    x, _ = oscillation(8000, T, 0)
    held, _ = oscillation(200, T, 1)
    test, masses = oscillation(2000, T, 2)
    truth = -masses.sum(1) / T / LN2
    models = {
        "WaveNet, categorical": WaveNet((T,), num_classes=256, channels=32, dilations=(1, 2, 4)),
        "WaveNet, mixture of 5 discretised logistics": WaveNet(
            (T,), "discretized_logistic_mixture", 256, num_components=5, channels=32, dilations=(1, 2, 4)
        ),
    }
    for name, model in models.items():
        minutes, _ = fitted(model, x, held, int(3000 * budget), 32, 500, early_stopping=0)
        value = -model.log_prob(test, progress=False).value / T / LN2
        gap = value - truth
        error = float(gap.std() / math.sqrt(len(gap)))
        rows.append(
            [
                name,
                f"{minutes:.1f}",
                f"{float(value.mean()):.4f}",
                f"{float(truth.mean()):.4f}",
                f"{float(gap.mean()):.4f} ± {error:.4f}",
            ]
        )
    note = (
        "x_t = 1.6 x_{t-1} - 0.8 x_{t-2} + 0.05 e_t, rounded to mu-law 256 before it is fed back, so that the mass of every "
        "class given the classes before is known exactly; 8 000 signals of 128 to train on, 3000 steps of 32, 2 000 to "
        "test; the gap is paired."
    )
    return {
        "title": "A signal of known entropy, bits a sample",
        "head": ["model", "CPU min", "model's", "exact", "gap"],
        "rows": rows,
        "note": note,
    }


# --- what steps cost ------------------------------------------------------------------------------------------------------


def naive(model, length, steps):
    """CPU seconds of ``length`` samples, each by a pass over all that the network sees, from passes at ``steps`` places."""
    found = []
    for t in steps:
        x = torch.zeros(1, min(t, model.receptive_field) + 1)
        with torch.no_grad():
            model.network(x, None)
            start = time.process_time()
            outputs = model.network(x, None)[:, -1]
            model.observation.draw(outputs, torch.tensor(t))
            found.append(time.process_time() - start)
    return float(np.trapezoid(found, steps)) * length / (steps[-1] - steps[0])


def sampling(budget):
    """8 000 samples of a WaveNet, cached against naive."""
    length, rows = 8000, []
    for layers in (10, 20):
        model = WaveNet(
            (length,), num_classes=256, channels=32, skip_channels=64, dilations=[2 ** (i % 10) for i in range(layers)]
        )
        seconds = {}
        for name, tier in (("eager", "eager"), ("first", "compiled"), ("again", "compiled")):
            start = time.process_time()
            model.sample(1, compile=tier, progress=False)
            seconds[name] = time.process_time() - start
        whole = naive(model, length, [0, length // 16, length // 8, length // 4, length // 2, length - 1])
        cells = [f"{seconds[n]:.2f}" for n in ("eager", "first", "again")]
        rows.append(
            [
                f"{layers} layers, field {model.receptive_field}",
                f"{whole:.1f}",
                *cells,
                f"{whole / seconds['eager']:.0f}",
                f"{whole / seconds['again']:.0f}",
            ]
        )
    note = (
        f"CPU seconds for one sound of {length} samples. Naive: a pass over the receptive field for each sample, without "
        "caches, timed at six places and integrated. Cached: the step as written in Python; captured and compiled, "
        "compilation included (first) or taken from its cache (again), repeated by the native loop."
    )
    head = [
        "WaveNet of 32 channels",
        "naive",
        "cached, eager",
        "compiled, first",
        "compiled, again",
        "naive / eager",
        "naive / compiled",
    ]
    return {"title": "Sampling", "head": head, "rows": rows, "note": note}


def by_hand(model, x, batch, steps):
    """The plain loop of the same network, a step in CPU milliseconds: the fastest of blocks of five."""
    optimizer = torch.optim.Adam(model.network.parameters(), lr=1e-3, fused=True)
    generator, found = torch.Generator().manual_seed(0), []
    for block in range(-1, steps // 5):
        start = time.process_time()
        for _ in range(5):
            rows = x[torch.randint(0, len(x), (batch,), generator=generator)]
            logits = model.network(rows.float(), None)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
        found += [(time.process_time() - start) / 5] if block >= 0 else []
    return 1e3 * min(found)


def speed(budget):
    """A step of training against the plain loop of the same network."""
    made = {
        "transformer, 4 x 128, batch 12 x 64": (lambda: CausalTransformer((64,), num_classes=65), 12, 64, 65),
        "WaveNet, 9 x 32, batch 8 x 1024": (
            lambda: WaveNet((1024,), num_classes=256, dilations=[2**i for i in range(9)]),
            8,
            1024,
            256,
        ),
    }
    rows = []
    for name, (make, batch, length, classes) in made.items():
        x = torch.randint(0, classes, (256, length), generator=torch.Generator().manual_seed(1))
        found = {"plain": [], "eager": [], "graph": [], "compiled": []}
        for _ in range(3):
            for tier, times in found.items():
                if tier == "plain":
                    times.append(by_hand(make(), x, batch, max(10, int(30 * budget))))
                    continue
                clock = Clock()
                options = {"batch_size": batch, "compile": tier, "callbacks": [clock], "progress": False}
                make().fit(x, steps=max(30, int(60 * budget)), **options)
                times.append(clock.milliseconds())
        least = [min(times) for times in found.values()]
        rows.append([name, *(f"{t:.1f} ({max(times):.1f})" for t, times in zip(least, found.values()))])
        rows[-1].append(f"{least[0] / least[-1]:.2f}")
    note = (
        "CPU milliseconds a step: the fastest block of three rounds in which all sides take turns, and in brackets that of the "
        "slowest round, for other work shares the caches. The plain loop clips and takes fused Adam, as `fit` does. The "
        "transformer's time is its matrix products, which graph and compiled code take from the same library."
    )
    head = ["network", "plain torch", "eager", "graph", "compiled", "plain / compiled"]
    return {"title": "Training", "head": head, "rows": rows, "note": note}


PARTS = {f.__name__: f for f in (text, text_longer, sound, music, ar2, sampling, speed)}


def markdown(found):
    """All parts as a page."""
    machine = f"{platform.machine()}, one thread, torch {version('torch')}, {date.today()}, seed 0"
    lines = ["# Sequences", "", f"`python benchmarks/sequences.py --markdown docs/benchmarks/sequences.md` ({machine}).", ""]
    if runs := found.get("runs"):
        lines += ["Runs: " + "; ".join(f"{name} {runs[name]}" for name in PARTS if name in runs) + ".", ""]
    for name in PARTS:
        if name in found:
            part = found[name]
            lines += [
                f"## {part['title']}",
                "",
                "| " + " | ".join(part["head"]) + " |",
                "|---" + "|---:" * (len(part["head"]) - 1) + "|",
            ]
            lines += ["| " + " | ".join(row) + " |" for row in part["rows"]]
            lines += ["", part["note"], ""]
    if missing := [PARTS[name].__doc__.split(".")[0] for name in PARTS if name not in found]:
        lines += ["## Not run yet", "", *(f"- {what}." for what in missing), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--keep", type=Path, default=KEPT, help="a JSON file of the parts found so far")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the steps of training")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(given.keep.read_text()) if given.keep and given.keep.exists() else {}
    for name in given.parts:
        found[name] = PARTS[name](given.budget)
        found.setdefault("runs", {})[name] = f"{date.today()}, {cpu_name()}"
        if given.keep:
            given.keep.write_text(json.dumps(found, indent=1))
        print(markdown({name: found[name]}), flush=True)
    if given.markdown:
        given.markdown.write_text(markdown(found))
