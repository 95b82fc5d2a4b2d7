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
from pathlib import Path

HERE = Path(__file__).parent
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


@dataclass(frozen=True)
class Program:
    """A program that is no VAE of the plain kind; its functions carry its name."""

    name: str
    batch: int | None = None  # rows a step; all of them if None


MODELS: dict[str, VAESize | Program] = {
    "eight_schools": Program("schools"),
    "radon": Program("radon"),
    "logistic": Program("logistic"),
    "nsf_density": Program("density", 256),
    "vae_flow_guide": Program("flow", 100),
    "vae_b20": VAESize((200, 200), 50, 20),
    "vae_b100": VAESize((200, 200), 50, 100),
    "b32_h32_z2": VAESize((32,), 2, 32, "softplus"),
    "b128_h400_z10": VAESize((400,), 10, 128, "softplus"),
    "b256_h400_z50": VAESize((400,), 50, 256, "softplus"),
}
NOT_IN_NUMPYRO = ("nsf_density", "vae_flow_guide")
SCOREBOARD = ("b32_h32_z2", "b128_h400_z10", "b256_h400_z50")


def radon_data():
    """Radon in 919 houses of 85 counties (Gelman and Hill 2006), from posteriordb's file beside the project."""
    path = Path(os.environ.get("PGEN_DATA", HERE.parents[1] / "shared" / "data")) / "posteriordb"
    table = json.loads((path / "radon_mn-radon_hierarchical_intercept_noncentered.json").read_text())["data"]
    county = [i - 1 for i in table["county_idx"]]
    return county, table["log_uppm"], table["floor_measure"], table["log_radon"]


def logistic_data():
    """10 000 rows of 50 standard normal covariates, and labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, 50)).astype(np.float32)
    chance = 1 / (1 + np.exp(-x @ rng.standard_normal(50) / 7))
    return x, (rng.random(ROWS) < chance).astype(np.float32)


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


def pyro_radon():
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    county, *columns = (torch.tensor(column) for column in radon_data())

    def model(county, uranium, floor, y):
        mean, spread = pyro.sample("mean", dist.Normal(0.0, 10.0)), pyro.sample("spread", dist.HalfNormal(1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        slopes = [pyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("uranium", "floor")]
        with pyro.plate("county", 85):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        level = (mean + spread * z)[county] + slopes[0] * uranium + slopes[1] * floor
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(level, sigma), obs=y)

    return model, AutoNormal(model), lambda: (county, *columns)


def pyro_logistic():
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    x, y = (torch.from_numpy(column) for column in logistic_data())

    def model(x, y):
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(50), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, AutoNormal(model), lambda: (x, y)


def spline_flow():
    """A neural spline flow on 8 features, in zuko's spelling."""
    import torch
    import zuko

    torch.manual_seed(0)
    return zuko.flows.NSF(8, transforms=3, hidden_features=(64, 64))


def shuffled(data, batch):
    """Endless batches of shuffled rows."""
    import torch

    while True:
        order = torch.randperm(len(data))
        for start in range(0, len(data) - batch + 1, batch):
            yield data[order[start : start + batch]]


def spline_rows():
    import torch

    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))


def pyro_density():
    import pyro
    from pyro.contrib.zuko import ZukoToPyro

    flow, batches = spline_flow(), shuffled(spline_rows(), MODELS["nsf_density"].batch)

    def model(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("x", ZukoToPyro(flow()), obs=x)

    return model, lambda x: None, lambda: (next(batches),)


def flow_networks():
    """Networks of the 784-200-200-50 VAE whose posterior is a conditional coupling flow (two affine layers, zuko)."""
    import torch
    import zuko
    from torch import nn

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh())
    decoder = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784))
    return encoder, zuko.flows.MAF(50, 200, transforms=2, hidden_features=(200,), passes=2), decoder


def pyro_flow():
    import pyro
    import pyro.distributions as dist
    from pyro.contrib.zuko import ZukoToPyro

    encoder, posterior, decoder = flow_networks()
    size = MODELS["vae_b100"]

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        pyro.module("posterior", posterior)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(posterior(encoder(x))))

    batches = shuffled(torch_rows(size), MODELS["vae_flow_guide"].batch)
    return model, guide, lambda: (next(batches),)


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


def pyro_programs(size):
    """Model, guide and the function that fetches a step's arguments."""
    return pyro_vae(size) if isinstance(size, VAESize) else globals()[f"pyro_{size.name}"]()


def pyro_side(size, validation):
    import pyro
    from pyro.infer import SVI, Trace_ELBO

    pyro.enable_validation(validation)
    pyro.set_rng_seed(0)
    model, guide, fetch = pyro_programs(size)
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


def torch_radon():
    import torch

    county, *columns = (torch.tensor(column) for column in radon_data())
    uranium, floor, y = columns
    loc, log_scale = torch.zeros(90, requires_grad=True), torch.full((90,), -2.3, requires_grad=True)
    constant = -90 / 2 * math.log(2 * math.pi)
    adam = torch.optim.Adam([loc, log_scale], lr=1e-3, fused=True)

    def step():
        noise = torch.randn(90)
        u = loc + log_scale.exp() * noise  # mean, two slopes, log spread, log sigma, z
        spread, sigma = u[3].exp(), u[4].exp()
        level = (u[0] + spread * u[5:])[county] + u[1] * uranium + u[2] * floor
        prior = -0.005 * u[:3].square().sum() - 0.5 * (spread.square() + sigma.square()) + u[3] + u[4]
        prior = prior - 0.5 * u[5:].square().sum() + constant
        likelihood = -0.5 * ((y - level) / sigma).square().sum() - len(y) * u[4]
        loss = -0.5 * noise.square().sum() - log_scale.sum() - prior - likelihood
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def torch_logistic():
    import torch
    from torch.nn import functional as F

    x, y = (torch.from_numpy(column) for column in logistic_data())
    loc, log_scale = torch.zeros(51, requires_grad=True), torch.full((51,), -2.3, requires_grad=True)
    adam = torch.optim.Adam([loc, log_scale], lr=1e-3, fused=True)

    def step():
        noise = torch.randn(51)
        u = loc + log_scale.exp() * noise
        kl = 0.5 * u.square().sum() - 0.5 * noise.square().sum() - log_scale.sum()
        loss = F.binary_cross_entropy_with_logits(x @ u[1:] + u[0], y, reduction="sum") + kl
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def torch_density():
    import torch

    flow, batches = spline_flow(), shuffled(spline_rows(), MODELS["nsf_density"].batch)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)

    def step():
        loss = -flow().log_prob(next(batches)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss

    return step


def torch_flow():
    import torch
    from torch.nn import functional as F

    encoder, posterior, decoder = flow_networks()
    parameters = [p for network in (encoder, posterior, decoder) for p in network.parameters()]
    adam = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    batches = shuffled(torch_rows(MODELS["vae_b100"]), MODELS["vae_flow_guide"].batch)

    def step():
        x = next(batches)
        z, log_q = posterior(encoder(x)).rsample_and_log_prob()
        kl = (log_q + 0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)).sum()
        loss = (F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + kl) / len(x)
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
    return loop(torch_vae(size) if isinstance(size, VAESize) else globals()[f"torch_{size.name}"]())


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

    return model, AutoNormal(model), (y,)


def numpyro_radon():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.autoguide import AutoNormal

    county, *columns = (jnp.array(column) for column in radon_data())

    def model(county, uranium, floor, y):
        mean, spread = numpyro.sample("mean", dist.Normal(0.0, 10.0)), numpyro.sample("spread", dist.HalfNormal(1.0))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
        slopes = [numpyro.sample(name, dist.Normal(0.0, 10.0)) for name in ("uranium", "floor")]
        with numpyro.plate("county", 85):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        level = (mean + spread * z)[county] + slopes[0] * uranium + slopes[1] * floor
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(level, sigma), obs=y)

    return model, AutoNormal(model), (county, *columns)


def numpyro_logistic():
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer.autoguide import AutoNormal

    x, y = (jnp.array(column) for column in logistic_data())

    def model(x, y):
        bias = numpyro.sample("bias", dist.Normal(0.0, 1.0))
        weight = numpyro.sample("weight", dist.Normal(jnp.zeros(50), 1.0).to_event(1))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)

    return model, AutoNormal(model), (x, y)


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

    vae = isinstance(size, VAESize)
    model, guide, data = numpyro_vae(size) if vae else globals()[f"numpyro_{size.name}"]()
    svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
    state = svi.init(jax.random.key(0), data[: size.batch]) if vae else svi.init(jax.random.key(0), *data)

    def step(state, rows):
        return svi.update(state, data[rows]) if vae else svi.update(state, *data)

    update = jax.jit(step, donate_argnums=0)
    many = jax.jit(lambda state, rows: jax.lax.scan(step, state, rows), donate_argnums=0)
    rng, queue = np.random.default_rng(0), []

    def indices():
        """Rows of the next step; whole epochs are shuffled at a time."""
        if not vae:
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
    import pgen

    model, guide, fetch = pyro_programs(size)
    if isinstance(size, VAESize):
        data = torch_rows(size)
    elif size.batch is None:
        data, guide = fetch(), None
    else:
        data = spline_rows() if size.name == "density" else torch_rows(MODELS["vae_b100"])
    batch = size.batch
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
