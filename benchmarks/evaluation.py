"""CPU seconds of `log_prob` (the K-sample bound) in each tier, against the same bound written by hand in plain torch.

    python benchmarks/evaluation.py             # two VAEs, 200 images, K = 1000 and 5000; annealing; a table in Markdown
    python benchmarks/evaluation.py --quick     # K = 100, to see that it runs

One thread. CPU time, not wall time, so that other jobs on the machine matter less. Capture and compilation, with the C++
compiler that it calls, are counted: the compiler's cache empty ("first") and filled ("cached"). The floor is the decoder's
products at 200 GFLOP/s.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile

import torch

from pgen.models import VAE

MODELS = {
    "digits 64-256-256-8": {"event_shape": (8, 8), "latent_dim": 8, "hidden": (256, 256), "activation": "silu"},
    "784-200-200-50": {"event_shape": (784,), "latent_dim": 50, "hidden": (200, 200), "activation": "tanh"},
}
IMAGES = 200
PEAK = 200e9


def prepared(name):
    """The model, untrained, and its images."""
    vae = VAE(**MODELS[name], seed=0)
    generator = torch.Generator().manual_seed(1)
    return vae, torch.bernoulli(torch.rand(IMAGES, *vae.event_shape, generator=generator), generator=generator)


def by_hand(vae, x, num_samples, chunk=50, rows=100):
    """The bound as one writes it in plain torch: the encoder once a batch, the decoder for `chunk` draws at a time."""
    bounds = []
    with torch.no_grad():
        for part in x.flatten(1).split(rows):
            loc, log_scale = vae.encoder.network(part).chunk(2, -1)
            log_weights = []
            for _ in range(num_samples // chunk):
                noise = torch.randn(chunk, *loc.shape)
                z = loc + log_scale.exp() * noise
                logits = vae.decoder(z)
                likelihood = -torch.nn.functional.binary_cross_entropy_with_logits(
                    logits, part.expand_as(logits), reduction="none"
                ).sum(-1)
                prior, proposal = -0.5 * z.square().sum(-1), -0.5 * noise.square().sum(-1) - log_scale.sum(-1)
                log_weights.append(likelihood + prior - proposal)
            bounds.append(torch.cat(log_weights).logsumexp(0) - math.log(num_samples))
    return torch.cat(bounds)


def floor(vae, num_samples):
    """Seconds of the decoder's products at the peak."""
    products = sum(m.in_features * m.out_features for m in vae.decoder if isinstance(m, torch.nn.Linear))
    return 2 * products * IMAGES * num_samples / PEAK


def timed(question):
    start = sum(os.times()[:4])
    value = question()
    return sum(os.times()[:4]) - start, float(value.double().mean())


def measure(name, tier, num_samples):
    """One number in a process of its own: CPU seconds, and the mean bound that tells that the same was computed."""
    vae, x = prepared(name)
    by_hand(vae, x, 50)
    if tier == "by hand":
        return timed(lambda: by_hand(vae, x, num_samples))
    if tier.startswith("ais"):
        settings = {"method": "ais", "num_temps": num_samples, "num_chains": 16, "leapfrog": 10}
        return timed(lambda: vae.log_prob(x[:20], compile=tier.split()[1], progress=False, **settings).value)
    return timed(lambda: vae.log_prob(x, num_samples=num_samples, compile=tier, progress=False).value)


def alone(cache, *arguments):
    """`measure` in a child process."""
    command = [sys.executable, __file__, "--measure", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    seconds, bound = out.split()[-2:]
    return float(seconds), float(bound)


def table(counts, temps):
    """Print the tables."""
    cache = tempfile.mkdtemp()
    print("| model | K | floor | by hand | eager | graph | compiled, first | compiled, cached | auto | bounds agree within |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in MODELS:
        for count in counts:
            tiers = ["by hand", "eager", "graph", "compiled", "compiled", "auto"]
            shutil.rmtree(cache, ignore_errors=True)
            found = [alone(cache, name, tier, count) for tier in tiers]
            bounds = [bound for _, bound in found]
            cells = [floor(prepared(name)[0], count), *(seconds for seconds, _ in found)]
            print(f"| {name} | {count} |", " | ".join(f"{s:.2f}" for s in cells), f"| {max(bounds) - min(bounds):.3f} nats |")
    print("\n| annealing, 20 images, 16 chains, 10 leapfrog steps | T | eager | graph | compiled, first | compiled, cached |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in MODELS:
        shutil.rmtree(cache, ignore_errors=True)
        tiers = ["ais eager", "ais graph", "ais compiled", "ais compiled"]
        cells = [alone(cache, name, tier, temps)[0] for tier in tiers]
        print(f"| {name} | {temps} |", " | ".join(f"{s:.2f}" for s in cells), "|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "TIER", "COUNT"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.measure:
        print(*measure(given.measure[0], given.measure[1], int(given.measure[2])))
    else:
        table((100,) if given.quick else (1000, 5000), 10 if given.quick else 100)
