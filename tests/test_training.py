"""The training loop: tiers, optimizers, schedules, stopping, checkpoints, randomness."""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import CASES, seeded, state
from torch import nn

import pgen
from pgen.models import VAE
from pgen.training import AdamW, JsonLines
from pgen.training.fit import NonFinite
from pgen.training.optim import SGD, Adam
from pgen.training.schedule import TorchSchedule

LOOP = sys.modules["pgen.training.fit"]  # the package's name `fit` is the function
X = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))


def vae(seed=0, **options):
    return VAE((3,), 2, (5,), likelihood="gaussian", seed=seed, **options)


def fit(model, data=X, **options):
    return model.fit(data, **{"steps": 9, "batch_size": 4, "progress": False, "compile": "eager", **options})


def regression(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


Y = torch.linspace(-1.0, 3.0, 11)

# --- tiers ---------------------------------------------------------------------------------------------------------------


class Stateful(pgen.GenerativeModel):
    """Batch statistics and dropout in the guide: buffers that change, and noise of another kind."""

    def __init__(self):
        super().__init__((3,))
        self.norm, self.drop = nn.BatchNorm1d(3), nn.Dropout(0.3)
        self.encoder, self.decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(self, x=None, context=None):
        with self.plate(x, context):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x=None, context=None):
        with self.plate(x, context):
            loc, log_scale = self.encoder(self.drop(self.norm(x))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def gamma_pair():
    """Noise by rejection, a positive latent, and no reparameterisation of a second one."""

    def model(y):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("y", dist.Normal(z * rate, 1.0), obs=y)

    def guide(y):
        a = pyro.param("a", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.sample("rate", dist.Gamma(a, 1.0))
        p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(p))

    return pgen.Pair(model, guide)


TIERS = {
    "vae": (vae, X, {}),
    "all rows": (vae, X, {"batch_size": 11}),
    "iwae": (vae, X, {"objective": pgen.IWAE(3)}),
    "particles, clipped, averaged": (vae, X, {"objective": pgen.ELBO(3), "clip_norm": 0.5, "ema": 0.9}),
    "batch statistics": (lambda: seeded(Stateful), X, {}),
    "rejection and scores": (gamma_pair, Y, {}),
    "mean field": (lambda: pgen.Pair(regression), Y, {}),
    "full rank": (lambda: pgen.Pair(regression, "full_rank"), Y, {}),
    "augmented": (vae, X, {"augment": lambda x: x + 0.1 * torch.randn_like(x)}),
    "bfloat16": (vae, X, {"precision": "bfloat16"}),
    "float64, AdamW, cosine": (vae, X, {"precision": "float64", "optimizer": AdamW(1e-2), "schedule": "cosine"}),
    "momentum": (vae, X, {"optimizer": SGD(1e-3, momentum=0.9)}),
    "outside optimizer": (vae, X, {"optimizer": lambda p: torch.optim.RMSprop(p, lr=1e-3)}),
    "dequantized": (CASES["vae_dequantized"].model, CASES["vae_dequantized"].x, {}),
    "categorical": (CASES["vae_categorical"].model, CASES["vae_categorical"].x, {}),
}


@pytest.mark.parametrize("name", TIERS)
def test_the_graph_gives_the_bits_of_the_programs(name):
    make, data, options = TIERS[name]
    results = {}
    for tier in ("eager", "graph"):
        model = make()
        run = fit(model, data, compile=tier, **options)
        assert run.tier == tier
        results[tier] = state(model), run.history["loss"]
    np.testing.assert_array_equal(results["eager"][1], results["graph"][1])
    assert torch.equal(results["eager"][0], results["graph"][0])


INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import


def compiled(unroll, **options):
    model = vae()
    run = fit(model, steps=12, compile="compiled", unroll=unroll, **options)
    assert run.tier == "compiled"
    return state(model), run.history["loss"]


@INDUCTOR
def test_one_compiled_step_agrees_with_the_programs_to_rounding():
    model = vae()
    run = fit(model, steps=12, clip_norm=1.0, ema=0.9)
    parameters, loss = compiled(1, clip_norm=1.0, ema=0.9)
    np.testing.assert_allclose(loss, run.history["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parameters, state(model), rtol=1e-5, atol=1e-5)


@INDUCTOR
def test_unrolled_steps_do_not_depend_on_the_clock(monkeypatch):
    """How many steps lie between two looks at the device is a matter of speed: it must not decide the noise."""
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", 10.0)
    long = compiled(3, batch_size=11)
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", 1e-9)
    short = compiled(3, batch_size=11)
    np.testing.assert_array_equal(long[1], short[1])
    assert torch.equal(long[0], short[0])


CALLS = []


def item(y):
    return 1.0 if y.mean().item() > 0 else 2.0


def branch(y):
    return torch.tensor(1.0) if y.sum() > 0 else torch.tensor(2.0)


def python_random(y):
    return 1.0 + random.random() * 1e-3


def python_coin(y):
    return 1.0 if random.random() < 0.999 else 2.0


def numpy_random(y):
    return 1.0 if np.random.rand() < 0.999 else 2.0


def to_numpy(y):
    return float(y.numpy().std()) + 1.0


def to_list(y):
    return y.tolist()[0] * 0.0 + 1.0


def python_counter(y):
    CALLS.append(1)
    return 1.0 + len(CALLS) * 1e-3


REFUSALS = {
    item: "depends on tensor values",
    branch: "depends on tensor values",
    python_random: "Python's or NumPy's random numbers",
    python_coin: "Python's or NumPy's random numbers",
    numpy_random: "Python's or NumPy's random numbers",
    to_numpy: r"\.numpy\(\)|data-dependent|tensor values",
    to_list: r"tolist",
    python_counter: "different graphs|a constant of the program differs",
}


@pytest.mark.parametrize("escape", REFUSALS, ids=lambda escape: escape.__name__)
def test_programs_that_leave_the_graph_are_refused(escape, monkeypatch):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, escape(y)), obs=y)

    state_before = random.getstate(), np.random.get_state()
    np.random.rand()
    try:
        with pytest.raises(ValueError, match=f"compile='graph' is not possible: .*({REFUSALS[escape]}).*falls back") as error:
            fit(pgen.Pair(model), Y, compile="graph")
        assert "\n" not in str(error.value)
        monkeypatch.setattr(LOOP, "CAPTURE_WORTH_SECONDS", 0.0)
        run = fit(pgen.Pair(model), Y, compile="auto")
        assert run.tier == "eager" and run.steps == 9
        assert run.tier_reason and "\n" not in run.tier_reason
    finally:
        random.setstate(state_before[0])
        np.random.set_state(state_before[1])


def test_values_of_parameters_are_never_frozen():
    """``tolist`` on a parameter gives the same list at both captures, so comparing them would not notice."""
    results = []
    for tier in ("eager", "auto"):
        weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        holder = nn.Module()
        holder.weight = weight

        def model(y, holder=holder):
            first = holder.weight.tolist()[0]
            mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mu * holder.weight[1] * first + holder.weight[0], 1.0), obs=y)

        model.__globals__["HOLDER"] = holder  # a name that the program refers to
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LOOP, "CAPTURE_WORTH_SECONDS", 0.0)
            pair = pgen.Pair(_Referring(holder, model))
            results.append(fit(pair, Y, steps=20, compile=tier, optimizer=0.05).history["loss"])
    np.testing.assert_array_equal(*results)


class _Referring(nn.Module):
    def __init__(self, holder, model):
        super().__init__()
        self.holder, self._program = holder, model

    def forward(self, y):
        return self._program(y)


def test_a_ragged_batch_that_cannot_be_captured_falls_back(monkeypatch):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if len(y) == 3 and y.sum().item() > 1e9:
            mu = mu + 1
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    monkeypatch.setattr(LOOP, "CAPTURE_WORTH_SECONDS", 0.0)
    run = fit(pgen.Pair(model), Y, compile="auto", steps=12)
    assert run.steps == 12 and run.tier == "eager" and "depends on tensor values" in run.tier_reason


@pytest.mark.parametrize("slow", [True, False])
def test_auto_leaves_compiled_steps_that_are_slower(slow, monkeypatch):
    taken = []

    class Instead:
        """In the place of compilation, ready at once: eager steps, late ones if asked."""

        def __init__(self, loop, step, unroll, wait):
            self.loop = loop

        def poll(self):
            self.loop.tier, self.loop.reason = "compiled", ""

        def run(self, step, limit, table):
            index = self.loop.index(step)
            time.sleep(0.05 if slow else 0.0)
            taken.append(step)
            return 1, [o.reshape(1) for o in self.loop.step.eager(index, table[0])]

        def cancel(self):
            pass

    for name, value in {"CAPTURE_WORTH_SECONDS": 0.0, "COMPILE_WORTH_SECONDS": 0.0, "_Compilation": Instead}.items():
        monkeypatch.setattr(LOOP, name, value)
    monkeypatch.setattr(LOOP, "TRIAL_BLOCKS", 3)
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(LOOP, "SLOWER", 1.05 if slow else 1e6)
    steps = 40
    run = fit(pgen.Pair(regression), Y, steps=steps, compile="auto")
    np.testing.assert_array_equal(run.history["step"], np.arange(1, steps + 1))
    if slow:
        assert run.tier == "graph" and 0 < len(taken) < 20
        assert re.fullmatch(r"compiled code took [\d.]+ ms a step, the graph [\d.]+", run.tier_reason)
    else:
        assert run.tier == "compiled" and run.tier_reason == "" and taken[-1] == steps - 1


def test_auto_takes_the_graph_once_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(LOOP, "CAPTURE_WORTH_SECONDS", 0.0)
    slow, fast = vae(), vae()
    runs = fit(slow, steps=20), fit(fast, steps=20, compile="auto")
    assert [run.tier for run in runs] == ["eager", "graph"]
    assert torch.equal(state(slow), state(fast))


# --- optimizers ----------------------------------------------------------------------------------------------------------


def by_torch(make, num_steps=50, schedule=None, clip_norm=None):
    """The same steps by torch's optimizer on the same quadratic of noise-free gradients."""
    w = nn.Parameter(torch.linspace(-1.0, 2.0, 5, dtype=torch.float64))
    optimizer = make([w])
    scheduler = None if schedule is None else torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in range(num_steps):
        optimizer.zero_grad()
        quadratic(w).backward()
        if clip_norm:
            nn.utils.clip_grad_norm_([w], clip_norm)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return w.detach()


def quadratic(w):
    return (torch.arange(1.0, 6.0, dtype=w.dtype) * (w - 0.3) ** 2).sum() + w.prod()


class Deterministic:
    """An objective without programs."""

    kind = "unnormalised"

    def __call__(self, model, guide, batch, scalars):
        return quadratic(pyro.param("w", torch.linspace(-1.0, 2.0, 5, dtype=torch.float64))), {}

    def rows(self, model, guide, batch):
        loss = -quadratic(pyro.param("w"))
        return loss.expand(3), loss.new_zeros(())


def holds_w(y):
    pyro.param("w", torch.linspace(-1.0, 2.0, 5, dtype=torch.float64))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def by_pgen(optimizer, num_steps=50, **options):
    pair = pgen.Pair(holds_w)
    run = fit(pair, Y.double(), steps=num_steps, objective=Deterministic(), optimizer=optimizer,
              **{"precision": "float64", "batch_size": 11, "schedule": "constant", **options})  # fmt: skip
    return state(pair), run


OPTIMIZERS = {
    "Adam": (Adam(0.05, (0.8, 0.99), 1e-6), lambda p: torch.optim.Adam(p, 0.05, (0.8, 0.99), 1e-6)),
    "a number": (0.05, lambda p: torch.optim.Adam(p, 0.05)),
    "AdamW": (AdamW(0.05, weight_decay=0.1), lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1)),
    "SGD": (SGD(0.01), lambda p: torch.optim.SGD(p, 0.01)),
    "SGD, momentum": (SGD(0.01, momentum=0.7), lambda p: torch.optim.SGD(p, 0.01, momentum=0.7)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_optimizers_step_as_torch_does(name, tier):
    ours, theirs = OPTIMIZERS[name]
    got, _ = by_pgen(ours, compile=tier)
    torch.testing.assert_close(got, by_torch(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_two_spellings_of_an_update_agree(name):
    """In place for eager and graph steps; as plain arithmetic for compiled ones."""
    ours = OPTIMIZERS[name][0]
    ours = Adam(ours) if isinstance(ours, float) else ours
    here, there = ([torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)] for _ in range(2))
    state_here, state_there = ours.init(here), ours.init(there)
    for t in range(20):
        grads = [torch.sin(here[0] * 3 + t)]
        skip = torch.tensor(t % 7 == 3)
        s = torch.from_numpy(ours.scalars(np.array([t]), np.array([0.05]))[0])
        ours.update_(here, grads, state_here, s, skip)
        there, state_there = ours.update(there, grads, state_there, s, skip)
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.3),
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, nesterov=True),
        lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
        lambda p: torch.optim.Adam(p, lr=0.05),
    ],
    ids=["RMSprop", "L2 Adam", "Nesterov", "AMSGrad", "Adam"],
)
@pytest.mark.parametrize("schedule", [None, "linear"])
def test_any_torch_optimizer_steps_as_it_does_alone(make, schedule):
    factor = None if schedule is None else lambda t: 1 - t / 50
    got, run = by_pgen(make, schedule=schedule or "constant")
    torch.testing.assert_close(got, by_torch(make, schedule=factor), rtol=1e-12, atol=1e-12)
    base = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    np.testing.assert_allclose(run.history["lr"], [base * (factor or (lambda t: 1.0))(t) for t in range(50)], rtol=1e-12)


def test_an_optimizer_of_the_models_parameters_is_taken_as_it_is():
    ours, theirs = vae(), vae()
    fit(ours, optimizer=Adam(0.01))
    fit(theirs, optimizer=torch.optim.Adam(theirs.parameters(), lr=0.01))
    assert torch.equal(state(ours), state(theirs))


def test_gradients_are_clipped_as_torch_clips_them():
    got, run = by_pgen(SGD(0.05), clip_norm=3.0)
    torch.testing.assert_close(got, by_torch(lambda p: torch.optim.SGD(p, 0.05), clip_norm=3.0), rtol=1e-10, atol=1e-12)
    w = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(quadratic(w), w)
    assert run.history["grad_norm"][0] == pytest.approx(float(gradient.norm()), rel=1e-12)  # before clipping
    assert run.history["grad_norm"].max() > 3.0 > run.history["grad_norm"].min()


def test_the_moving_average_is_what_the_model_holds_afterwards():
    path, average = [], None
    for t in range(1, 7):
        path.append(by_pgen(SGD(0.01), num_steps=t)[0])
    average = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)
    for t, w in enumerate(path):
        decay = min(0.3, (1 + t) / (10 + t))  # .1, .18, .25, then .3
        average = decay * average + (1 - decay) * w
    torch.testing.assert_close(by_pgen(SGD(0.01), num_steps=6, ema=0.3)[0], average, rtol=1e-12, atol=1e-12)


SCHEDULES = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t / 9,
    "cosine": lambda t: (1 + math.cos(math.pi * t / 9)) / 2,
    "decay": lambda t: 0.01 ** (t / 9),
    (lambda t: 1 / (t + 1)): lambda t: 1 / (t + 1),
    TorchSchedule(lambda o: torch.optim.lr_scheduler.StepLR(o, 4, 0.1)): lambda t: 0.1 ** (t // 4),
    TorchSchedule(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=10)): None,
}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s if isinstance(s, str) else type(s).__name__)
def test_schedules_are_functions_of_the_step(schedule):
    run = fit(vae(), optimizer=Adam(0.02), schedule=schedule)
    curve = SCHEDULES[schedule]
    if curve is None:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.02)
        reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10)
        rates = []
        for _ in range(9):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            reference.step()
    else:
        rates = [0.02 * curve(t) for t in range(9)]
    np.testing.assert_allclose(run.history["lr"], rates, rtol=1e-9)


# --- stopping ------------------------------------------------------------------------------------------------------------


def test_early_stopping_restores_the_best_parameters():
    model = vae()
    run = fit(model, validation=X[:4] * 3, steps=500, batch_size=11, optimizer=0.05, early_stopping=3, validate_every=5)
    bounds = run.validation["bound"]
    assert "did not improve in 3 validations; best parameters restored" in run.stopped
    assert run.steps < 500 and len(bounds) == run.steps // 5 and bounds.argmax() == len(bounds) - 4
    again = vae()
    short = fit(again, validation=X[:4] * 3, steps=int(run.validation["step"][bounds.argmax()]), batch_size=11,
                optimizer=0.05, early_stopping=0, validate_every=5)  # fmt: skip
    assert torch.equal(state(model), state(again))
    assert short.validation["bound"][-1] == bounds.max()
    assert run.bound == bounds.max()  # of the parameters that the model holds


def test_validation_uses_the_same_noise_every_time():
    model = vae()
    run = fit(model, validation=X, steps=9, optimizer=1e-12, validate_every=3)
    assert len(run.validation["bound"]) == 3
    assert np.ptp(run.validation["bound"]) < 1e-5
    assert list(run.validation["step"]) == [3, 6, 9]


def test_a_bound_that_is_not_a_number_is_never_the_best():
    class Bound(Deterministic):
        calls = 0

        def rows(self, model, guide, batch):
            Bound.calls += 1
            value = torch.tensor([math.nan, -3.0, -1.0, -2.0][Bound.calls - 1], dtype=torch.float64)
            return value.expand(3), torch.zeros((), dtype=torch.float64)

    pair = pgen.Pair(holds_w)
    fit(pair, Y.double(), validation=Y.double(), steps=8, objective=Bound(), optimizer=SGD(0.01), precision="float64",
        batch_size=11, schedule="constant", validate_every=2, early_stopping=10)  # fmt: skip
    assert torch.equal(state(pair), by_pgen(SGD(0.01), num_steps=6)[0])


def poisoned(start, stop):
    """A model whose density is not a number from call ``start`` to ``stop``."""
    calls = []

    def model(y):
        calls.append(1)
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        bad = math.nan if start <= len(calls) < stop else 1.0
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.factor("poison", torch.zeros(len(y)) * bad)

    return model


def trained(make):
    """What ``make`` gives; nothing where the first look already found the poison."""
    try:
        return make()
    except ValueError:
        return None


def test_a_non_finite_step_changes_no_parameter():
    def make(start, stop):
        pair = pgen.Pair(poisoned(start, stop))
        run = fit(pair, Y, steps=4, batch_size=11, optimizer=SGD(0.01), schedule="constant", ema=0.5, max_nonfinite=3)
        return state(pair), run

    clean, _ = make(0, 0)
    assert bool(torch.isfinite(clean).all())
    first = next(n for n in range(1, 50) if trained(lambda n=n: make(n, n + 1)[1].skipped == 1))
    parameters, run = make(first, first + 2)
    assert run.skipped == 2 and np.isnan(run.history["loss"]).sum() == 2
    assert bool(torch.isfinite(parameters).all())


def test_training_stops_at_the_site_that_is_not_finite():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        a = pyro.param("a", torch.tensor(0.05))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
            pyro.sample("root", dist.Normal(torch.sqrt(a).expand(len(y)), 1.0), obs=torch.full((len(y),), -9.0))

    pair = pgen.Pair(model)
    where = r"5 non-finite steps in a row up to step \d+: model site 'root': .*its loc is not finite"
    with pytest.raises(NonFinite, match=where) as error:
        fit(pair, Y, steps=400, optimizer=SGD(0.05), schedule="constant", batch_size=11)
    assert "\n" not in str(error.value)
    assert all(bool(torch.isfinite(p).all()) for p in pair.parameters())
    assert error.value.run.skipped >= 5 and error.value.run is pair.last_run


# --- the rest of the options -------------------------------------------------------------------------------------------------


def test_augmentation_makes_the_data_that_the_model_wants():
    """Grey images, binarised anew at every step."""
    grey = torch.rand(11, 3)
    seen = []

    def binarise(x):
        out = torch.bernoulli(x)
        seen.append(out.clone())
        return out

    model = VAE((3,), 2, (5,))
    run = fit(model, grey, augment=binarise, steps=4, batch_size=11)
    assert run.steps == 4 and np.isfinite(run.history["loss"]).all()
    assert len({tuple(x.flatten().tolist()) for x in seen}) >= 4


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical", "gaussian"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
def test_precisions(likelihood, precision):
    case = CASES[f"vae_{likelihood}"]
    model = case.model()
    run = case.fit(model, precision=precision)
    wanted = torch.float64 if precision == "float64" else torch.float32
    assert {p.dtype for p in model.parameters()} == {wanted}
    assert np.isfinite(run.history["loss"]).all()
    if precision == "bfloat16":  # the same noise, coarser products
        np.testing.assert_allclose(run.history["loss"][0], case.fit(case.model()).history["loss"][0], rtol=0.05)
    assert model.log_prob(case.x).value.dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_json_lines_hold_what_was_logged(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    run = fit(vae(), steps=9, validation=X[:4], validate_every=3, callbacks=[JsonLines(path)])
    lines = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        for line in path.read_text().splitlines()
    ]
    validated = [line for line in lines if "validation_bound" in line]
    assert [line["step"] for line in validated] == [3, 6, 9]
    np.testing.assert_allclose([line["validation_bound"] for line in validated], run.validation["bound"])
    logged = [line for line in lines if "loss" in line]
    assert logged[-1]["step"] == 9 and math.isfinite(logged[-1]["loss"]) and lines[-1]["stopped"] == run.stopped


def test_the_history_has_a_row_a_step():
    run = fit(vae(), steps=9, validation=X[:4])
    assert {len(column) for column in run.history.values()} == {9}
    np.testing.assert_array_equal(run.history["step"], np.arange(1, 10))
    np.testing.assert_allclose(run.history["epoch"], np.arange(1, 10) / 3)
    assert run.epochs == pytest.approx(3.0) and run.num_data == 11 and run.seed == 0
    assert "9 steps, 3.0 epochs" in str(run) and "eager tier (as asked)" in str(run)


def test_every_row_is_seen_once_an_epoch():
    seen = []

    class Watch(pgen.ELBO):
        def __call__(self, model, guide, batch, scalars):
            seen.append(batch["x"].clone())
            return super().__call__(model, guide, batch, scalars)

    fit(vae(), steps=6, objective=Watch())
    seen = seen[1:]  # the first look at the programs
    assert [len(x) for x in seen] == [4, 4, 3] * 2
    for epoch in (seen[:3], seen[3:]):
        rows = torch.cat(epoch)
        assert torch.equal(rows[rows[:, 0].argsort()], X[X[:, 0].argsort()])
    assert not torch.equal(seen[0], seen[3])


SCRIPT = """
import torch
torch.set_num_threads(1)
if {noise}: torch.rand({noise})
from pgen.models import VAE
x = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
model = VAE((3,), 2, (5,), likelihood="gaussian")
if {noise}: torch.rand({noise})
model.fit(x, steps=7, batch_size=4, seed=3, progress=False)
print(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes().hex())
"""


def test_the_same_seed_gives_the_same_bits_in_every_process():
    root = str(Path(pgen.__file__).parent.parent)
    bits = set()
    for noise, hash_seed in ((0, "0"), (5, "1")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        out = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(noise=noise)], capture_output=True, text=True, env=environment
        )
        assert out.returncode == 0, out.stderr
        bits.add(out.stdout)
    assert len(bits) == 1 and len(bits.pop()) > 100


def test_initial_values_do_not_depend_on_the_random_state():
    models = []
    for _ in range(2):
        models.append(VAE((3,), 2, (5,), likelihood="gaussian"))
        torch.rand(3)
    for model in models:
        fit(model, seed=3)
    assert torch.equal(*map(state, models))


def test_another_seed_gives_another_fit():
    models = [vae(), vae()]
    for seed, model in enumerate(models):
        fit(model, seed=seed)
    assert not torch.equal(*map(state, models))


def test_a_loaded_model_is_trained_on_from_where_it_was(tmp_path):
    model = vae(preprocess=pgen.data.Standardize())
    fit(model, steps=9)
    model.save(tmp_path / "model.pgen")
    again = pgen.load(tmp_path / "model.pgen")
    fit(again, X * 2 + 5, steps=1, optimizer=1e-12)
    torch.testing.assert_close(state(again), state(model), rtol=0, atol=1e-9)


def test_a_second_fit_goes_on():
    model = vae()
    fit(model, steps=200, optimizer=0.01)
    first = model.log_prob(X).mean
    fit(model, steps=1, optimizer=1e-12)
    assert model.log_prob(X).mean == pytest.approx(first, abs=1e-4)


class Accuracy(pgen.ELBO):
    word = "critic accuracy"


@pytest.mark.parametrize(
    ("model", "objective", "word", "fitted", "signs", "unit"),
    [
        (vae(), None, "bound", "bound", (1, 1), " nats a datum"),
        (vae(), pgen.objectives.Renyi(3, -1.0), "estimate", "estimate", (1, 1), " nats a datum"),
        (pgen.models.Gaussian((3,)), None, "log-likelihood", "log-likelihood", (1, 1), " nats a datum"),
        (pgen.models.ProbabilisticPCA((3,), 1), None, "log-likelihood", "log-likelihood", (1, 1), " nats a datum"),
        (vae(), Accuracy(), "critic accuracy", "loss", (-1, 1), ""),
        (pgen.models.Autoencoder((3,), 1), None, "squared error", "squared error", (-1, -1), ""),
    ],
)
def test_a_run_says_what_was_maximised(model, objective, word, fitted, signs, unit):
    run = fit(model, objective=objective)
    assert run.word == word and str(run).startswith(f"training {fitted} {signs[0] * run.bound:.3f}{unit} (N = 11")
    run = fit(model, objective=objective, validation=X[:5])
    error = f"± {run.bound_std_error:.3f}"
    assert str(run).startswith(f"validation {word} {signs[1] * run.bound:.3f} {error}{unit} (N = 11)")
    assert pgen.plots.plot_bound(run).axes[0].get_ylabel().startswith(fitted if signs[0] > 0 else f"minus {fitted}")


def test_closed_forms_say_that_they_are_exact_unless_preprocessing_bounds_a_mass():
    counts = torch.arange(12.0).reshape(6, 2) % 5
    assert pgen.models.Gaussian.for_data(counts).fit(counts).word == "bound"
    assert pgen.models.Gaussian((2,)).fit(counts).word == "log-likelihood"
    assert pgen.models.ProbabilisticPCA((2,), 1).fit(counts, validation=counts[:3]).word == "log-likelihood"


def test_default_rates_of_a_pair():
    """Variational parameters move fast and settle; networks get the rate that networks stand."""
    assert pgen.Pair(regression).fit(Y, steps=4, progress=False).history["lr"][0] == pytest.approx(0.02)

    net = torch.nn.Sequential(torch.nn.Linear(1, 600), torch.nn.Tanh(), torch.nn.Linear(600, 1))

    def guide(y):
        pyro.module("net", net)
        pyro.sample("mu", dist.Normal(net(y.mean()[None])[0], 1.0))

    assert pgen.Pair(regression, "flow").fit(Y, steps=4, progress=False).history["lr"][0] == pytest.approx(0.01)
    lr = pgen.Pair(regression, guide).fit(Y, steps=4, progress=False).history["lr"]
    assert lr.tolist() == pytest.approx([1e-3] * 4)
