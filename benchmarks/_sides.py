"""The sides of `svi.py`: each runs in a process of its own, is built and warmed up once, then times blocks of steps on request.

Protocol, one JSON object a line: the side says `{"build_s": s, "ops": counts}` when it is ready, then answers every
`{"steps": n}` with `{"cpu": s, "wall": s, "steps": n}` until its input closes. Only one side works at a time. A side of pgen
says `{"tier": name, "reason": text}` at last.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass

ROWS = 10_000  # resident data set of the VAEs
SCAN = 100  # steps in one lax.scan
Y = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
SIGMA = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)


@dataclass(frozen=True)
class VAESize:
    """Bernoulli VAE: prior N(0, I), diagonal Gaussian q with sd = exp(linear), sampled ELBO with one draw."""

    hidden: tuple[int, ...]
    latent: int
    batch: int
    activation: str = "tanh"
    pixels: int = 784

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every matrix product, the encoder's first; loc and log-scale of q are one product."""
        encoder, decoder = (self.pixels, *self.hidden), (self.latent, *reversed(self.hidden), self.pixels)
        return [*itertools.pairwise(encoder), (self.hidden[-1], 2 * self.latent), *itertools.pairwise(decoder)]


MODELS: dict[str, VAESize | None] = {
    "eight_schools": None,
    "vae_b20": VAESize((200, 200), 50, 20),
    "vae_b100": VAESize((200, 200), 50, 100),
    "b32_h32_z2": VAESize((32,), 2, 32, "softplus"),
    "b128_h400_z10": VAESize((400,), 10, 128, "softplus"),
    "b256_h400_z50": VAESize((400,), 50, 256, "softplus"),
}
SCOREBOARD = ("b32_h32_z2", "b128_h400_z10", "b256_h400_z50")


# ---------------------------------------------------------------- torch: shared parts
def torch_rows(size):
    import torch

    return (torch.rand(ROWS, size.pixels, generator=torch.Generator().manual_seed(0)) < 0.3).float()


def torch_batches(size):
    """Endless batches of shuffled rows, fetched by index."""
    import torch

    data = torch_rows(size)
    while True:
        order = torch.randperm(len(data))
        for start in range(0, len(data) - size.batch + 1, size.batch):
            yield data[order[start : start + size.batch]]


def torch_networks(size):
    """Encoder (to loc and log-scale side by side) and decoder (to logits)."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    activation = {"tanh": nn.Tanh, "softplus": nn.Softplus}[size.activation]

    def stack(dims):
        layers = [nn.Linear(dims[0], dims[1])]
        for i, o in itertools.pairwise(dims[1:]):
            layers += [activation(), nn.Linear(i, o)]
        return nn.Sequential(*layers)

    return stack((size.pixels, *size.hidden, 2 * size.latent)), stack((size.latent, *reversed(size.hidden), size.pixels))


def loop(step):
    """A side from a function of one step."""

    def run(steps):
        for _ in range(steps):
            step()

    return run


# ---------------------------------------------------------------- Pyro
def pyro_schools():
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    sigma, y = torch.tensor(SIGMA), torch.tensor(Y)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", 8):
            theta = pyro.sample("theta_raw", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    return model, AutoNormal(model), lambda: (y,)


def pyro_vae(size):
    import pyro
    import pyro.distributions as dist

    encoder, decoder = torch_networks(size)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), size.latent), x.new_ones(len(x), size.latent)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    batches = torch_batches(size)
    return model, guide, lambda: (next(batches),)


def pyro_side(size, validation):
    import pyro
    from pyro.infer import SVI, Trace_ELBO

    pyro.enable_validation(validation)
    pyro.set_rng_seed(0)
    model, guide, fetch = pyro_vae(size) if size else pyro_schools()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return loop(lambda: svi.step(*fetch()))


# ---------------------------------------------------------------- hand-written torch
def torch_schools():
    import torch

    sigma, y = torch.tensor(SIGMA), torch.tensor(Y)
    # normalisers of mu, tau, theta_raw and y, less those of q
    constant = math.log(2 / math.pi) - 2 * math.log(5) - sigma.log().sum() - (1 + 8 + 8 - 10) / 2 * math.log(2 * math.pi)
    loc, log_scale = torch.zeros(10, requires_grad=True), torch.full((10,), -2.3, requires_grad=True)
    adam = torch.optim.Adam([loc, log_scale], lr=1e-3, fused=True)

    def step():
        noise = torch.randn(10)
        z = loc + log_scale.exp() * noise
        mu, log_tau, theta = z[0], z[1], z[2:]
        tau = log_tau.exp()
        log_joint = -0.5 * (mu / 5).square() - (tau / 5).square().log1p() + log_tau - 0.5 * theta.square().sum()
        log_joint = log_joint - 0.5 * ((y - mu - tau * theta) / sigma).square().sum() + constant
        log_q = -0.5 * noise.square().sum() - log_scale.sum()
        loss = log_q - log_joint
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def torch_vae(size):
    import torch
    from torch.nn import functional as F

    encoder, decoder = torch_networks(size)
    adam = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)
    batches = torch_batches(size)

    def step():
        x = next(batches)
        loc, log_scale = encoder(x).chunk(2, -1)
        noise = torch.randn_like(loc)
        z = loc + log_scale.exp() * noise
        kl = (0.5 * z.square() - 0.5 * noise.square() - log_scale).sum()  # log q - log p at the draw, not its mean
        loss = (F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl) / len(x)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def torch_side(size):
    import torch

    torch.manual_seed(0)
    return loop(torch_vae(size) if size else torch_schools())


# ---------------------------------------------------------------- NumPyro
def numpyro_schools():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.autoguide import AutoNormal

    sigma, y = jnp.array(SIGMA), jnp.array(Y)

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("data", 8):
            theta = numpyro.sample("theta_raw", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * theta, sigma), obs=y)

    return model, AutoNormal(model), y


def numpyro_vae(size):
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from jax.example_libraries import stax

    activation = {"tanh": stax.Tanh, "softplus": stax.Softplus}[size.activation]

    def stack(dims):
        layers = [stax.Dense(dims[0])]
        for width in dims[1:]:
            layers += [activation, stax.Dense(width)]
        return stax.serial(*layers)

    encoder, decoder = stack((*size.hidden, 2 * size.latent)), stack((*reversed(size.hidden), size.pixels))

    def model(x):
        decode = numpyro.module("decoder", decoder, (len(x), size.latent))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), size.latent)), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        encode = numpyro.module("encoder", encoder, (len(x), size.pixels))
        with numpyro.plate("data", len(x)):
            loc, log_scale = jnp.split(encode(x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    return model, guide, jnp.array(np.random.default_rng(0).random((ROWS, size.pixels)) < 0.3, jnp.float32)


def numpyro_side(size, scan):
    import jax
    import numpy as np
    import numpyro
    from numpyro.infer import SVI, Trace_ELBO

    model, guide, data = numpyro_vae(size) if size else numpyro_schools()
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), data[: size.batch] if size else data)

    def step(state, rows):
        return svi.update(state, data[rows] if size else data)

    update = jax.jit(step, donate_argnums=0)
    many = jax.jit(lambda state, rows: jax.lax.scan(step, state, rows), donate_argnums=0)
    rng, queue = np.random.default_rng(0), []

    def indices():
        """Rows of the next step; whole epochs are shuffled at a time."""
        if not size:
            return 0
        if not queue:
            queue.extend(rng.permutation(ROWS)[: ROWS // size.batch * size.batch].reshape(-1, size.batch))
        return queue.pop()

    def run(steps):
        nonlocal state
        if scan:
            for _ in range(steps // SCAN):
                state, _ = many(state, np.stack([indices() for _ in range(SCAN)]))
        else:
            for _ in range(steps):
                state, _ = update(state, indices())
        jax.block_until_ready(state)

    return run


# ---------------------------------------------------------------- pgen
def pgen_fit(size, tier, callback):
    """Fit the Pyro side's programs without end; the callback takes the turns. Without a guide a pair gets a mean-field one."""
    import torch

    import pgen

    model, guide = pyro_vae(size)[:2] if size else (pyro_schools()[0], None)
    data, batch = (torch_rows(size), size.batch) if size else (torch.tensor(Y), None)
    optimizer = pgen.training.Adam(lr=1e-3)
    options = {"steps": 10**12, "batch_size": batch, "compile": tier, "progress": False}
    with contextlib.suppress(NoMoreTurns):
        pgen.Pair(model, guide).fit(data, optimizer=optimizer, callbacks=[callback], **options)
    say(tier=callback.run.tier, reason=callback.run.tier_reason)


class NoMoreTurns(Exception):
    """Ends the fit."""


class FitTurns:
    """A callback that times the blocks of steps between two of its calls: a turn is as many blocks as it takes."""

    def __init__(self, started, count):
        self.started, self.count, self.turns, self.counter = started, count, None, None

    def on_start(self, run):
        self.run = run

    def on_validation(self, step, bound, std_error): ...

    def on_end(self, run): ...

    def on_log(self, step, metrics):
        """A block has ended after `step` steps in all."""
        if self.turns is None:
            self.prepare(step)
        elif step - self.first >= self.wanted:
            answer(self.clock, step - self.first)
            self.next_turn(step)

    def prepare(self, step):
        """Warm up, then count the calls of one block, then say ready."""
        if step < SCAN:
            return
        if self.counter is None:
            self.build_s = time.process_time() - self.started
            self.first, self.counter = step, torch_counter()
            if self.count:
                self.counter.__enter__()
            return
        if self.count:
            self.counter.__exit__(None, None, None)
        self.turns = requests()
        say(build_s=self.build_s, ops=self.counter.mean(step - self.first) if self.count else None)
        self.next_turn(step)

    def next_turn(self, step):
        self.wanted = next(self.turns, None)
        if self.wanted is None:
            raise NoMoreTurns
        self.first, self.clock = step, clock()


# ---------------------------------------------------------------- the worker
SIDES = {
    "pyro": lambda size: pyro_side(size, validation=True),
    "pyro, validation off": lambda size: pyro_side(size, validation=False),
    "torch by hand": torch_side,
    "numpyro jit": lambda size: numpyro_side(size, scan=False),
    "numpyro scan": lambda size: numpyro_side(size, scan=True),
}
PGEN_SIDES = {"pgen graph": "graph", "pgen compiled": "compiled"}


def say(**message):
    print(json.dumps(message), flush=True)


def requests():
    """Steps asked for, turn by turn."""
    for line in sys.stdin:
        yield json.loads(line)["steps"]


def clock():
    return time.process_time(), time.perf_counter()


def answer(since, steps):
    cpu, wall = clock()
    say(cpu=cpu - since[0], wall=wall - since[1], steps=steps)


def torch_counter():
    """Counts the torch calls that reach a kernel, and the numbers that they compute (a view computes none)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counter(TorchDispatchMode):
        calls = elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.calls += 1
            if not func.is_view:
                self.elements += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
            return out

        def mean(self, steps):
            return {"calls": round(self.calls / steps), "elements": round(self.elements / steps)}

    return Counter()


def serve(side, model, core):
    os.sched_setaffinity(0, {core})  # before the heavy imports: thread pools are sized by it
    uses_torch = "numpyro" not in side
    if uses_torch:
        import torch

        torch.set_num_threads(1)
    started = time.process_time()
    if side in PGEN_SIDES:
        tier = PGEN_SIDES[side]
        return pgen_fit(MODELS[model], tier, FitTurns(started, count=tier != "compiled"))
    run = SIDES[side](MODELS[model])
    run(SCAN)  # builds, compiles, fills caches
    build_s, ops = time.process_time() - started, None
    if uses_torch:
        with torch_counter() as counter:
            run(1)
        ops = counter.mean(1)
    say(build_s=build_s, ops=ops)
    for steps in requests():
        since = clock()
        run(steps)
        answer(since, steps)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
