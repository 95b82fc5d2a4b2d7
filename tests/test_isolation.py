"""Fits that share a process share nothing else: parameters, random numbers, Pyro's store, signal handlers."""

import signal

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state

import pgen
from pgen.models import VAE

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
Y = torch.linspace(-1.0, 3.0, 11)


def regression(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def named(start):
    """Programs that use one name of Pyro's store for parameters of their own."""

    def guide(y):
        loc, scale = pyro.param("loc", torch.tensor(start)), pyro.param("scale", torch.tensor(1.0))
        pyro.sample("mu", dist.Normal(loc, scale.exp()))

    return pgen.Pair(regression, guide)


MAKE = {
    "families": (lambda i: VAE((3,), 2, (5,), likelihood="gaussian", seed=i), X),
    "automatic guides": (lambda i: pgen.Pair(regression, "full_rank" if i else "mean_field"), Y),
    "one name in the store": (lambda i: named(float(3 * i)), Y),
}


def fit(model, data, **options):
    return model.fit(data, steps=12, batch_size=11, progress=False, **{"compile": "eager", **options})


class Between(pgen.training.Callback):
    """Runs something between the blocks of another fit."""

    def __init__(self, act):
        self.act = act

    def on_log(self, step, metrics):
        self.act()


@pytest.mark.parametrize(("name", "tier"), [*((name, "eager") for name in MAKE), ("one name in the store", "graph")])
def test_a_fit_inside_a_fit_is_as_if_each_were_alone(name, tier):
    """Every block of the one has a whole fit of the other in it."""
    make, data = MAKE[name]
    alone = [make(i) for i in range(2)]
    for i, model in enumerate(alone):
        fit(model, data, seed=i, compile=tier)
    outer, inner = make(0), []

    def act():
        inner.append(make(1))
        fit(inner[-1], data, seed=1, compile=tier)
        torch.rand(3), np.random.rand()

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_rng_state()
    numpy_state = np.random.get_state()
    fit(outer, data, seed=0, compile=tier, callbacks=[Between(act)])
    np.random.set_state(numpy_state)
    assert len(inner) > 1 and torch.equal(state(outer), state(alone[0]))
    assert all(torch.equal(state(model), state(alone[1])) for model in inner)
    assert not torch.equal(state(alone[0])[:1], state(alone[1])[:1])
    assert len(pyro.get_param_store()) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_signal_during_an_inner_fit_ends_both():
    """The outer fit is told when the inner one is whole."""
    outer, inner = VAE((3,), 2, (5,), likelihood="gaussian"), VAE((3,), 2, (5,), likelihood="gaussian")

    def act():
        fit(inner, X, callbacks=[Between(lambda: signal.raise_signal(signal.SIGTERM))])

    with pytest.raises(SystemExit) as error:
        fit(outer, X, callbacks=[Between(act)])
    assert error.value.code == 143
    assert inner.last_run.steps == outer.last_run.steps == 1
