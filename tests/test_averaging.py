"""Iterates: what R-hat and the effective number say of known series, and fits that stop when they have converged."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state

import pgen
from pgen.diagnostics import iterate_ess, split_rhat
from pgen.training.converge import Iterates

Y = torch.tensor([1.0, 2.0, 4.0, -1.0], dtype=torch.float64)
QUICK = {"compile": "graph", "progress": False, "precision": "float64"}


def model(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


VARIANCE = 1 / (4 + 1 / 9)
MEAN = 6 * VARIANCE

# --- known series ---------------------------------------------------------------------------------------------------------


def test_split_rhat_of_a_trend_is_the_root_of_seven():
    x = torch.stack([torch.linspace(0.0, 1.0, 20_000), torch.full((20_000,), 3.0), torch.randn(20_000)], 1)
    rhat = split_rhat(x)
    assert float(rhat[0]) == pytest.approx(math.sqrt(7), abs=1e-3)
    assert float(rhat[1]) == pytest.approx(1.0, abs=1e-4) and float(rhat[2]) == pytest.approx(1.0, abs=2e-3)
    step = torch.cat([torch.zeros(50, 1), torch.ones(50, 1)])
    assert math.isinf(split_rhat(step)[0])


def test_effective_number_of_an_autoregression():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    x = torch.zeros_like(noise)
    for t in range(1, len(noise)):
        x[t] = 0.95 * x[t - 1] + noise[t]
    ess = iterate_ess(x)
    assert float(ess.mean()) == pytest.approx(513, rel=0.1) and bool((split_rhat(x) < 1.02).all())
    mcse = x.std(0) / ess.sqrt()
    assert float(mcse.mean()) == pytest.approx(0.1414, rel=0.1)
    assert float(iterate_ess(noise).mean()) == pytest.approx(20_000, rel=0.1)
    assert float(iterate_ess(torch.ones(40, 1))[0]) == 40


def test_iterates_are_thinned_evenly_when_there_is_no_more_room():
    value = torch.zeros(2, 3)
    iterates = Iterates([value])
    room, stride = len(iterates.buffer), iterates.stride
    steps = stride * (3 * room + 5)
    for step in range(1, steps + 1):
        value.fill_(float(step))
        iterates.observe(step)
    kept = iterates.rows[:, 0]
    assert iterates.stride == 4 * stride and len(kept) == steps // iterates.stride
    torch.testing.assert_close(kept, torch.arange(1, len(kept) + 1) * float(iterates.stride))
    assert iterates.mean(2)[0].shape == (2, 3)


# --- fits -----------------------------------------------------------------------------------------------------------------


def test_a_fit_stops_when_it_has_converged_and_is_exact():
    pair = pgen.Pair(model, "full_rank")
    run = pair.fit(Y, stop="converged", seed=1, **QUICK)
    assert run.stopped.startswith("converged: halving the learning rate gained ") and run.steps < 20_000
    assert "R-hat" in run.stopped or "bound flat" in run.stopped
    loc, log_scale = (p.detach() for p in pair._guide.diagonal())
    assert float(loc) == pytest.approx(MEAN, abs=0.03 * math.sqrt(VARIANCE))
    assert float(log_scale.exp()) == pytest.approx(math.sqrt(VARIANCE), rel=0.03)
    rates = run.history["lr"]
    assert rates[0] == pytest.approx(0.1) and rates[-1] <= 0.05 and bool((rates[1:] <= rates[:-1]).all())


def test_a_fit_that_may_not_go_far_enough_says_so():
    far = Y + 1000.0
    run = pgen.Pair(model).fit(far, stop="converged", steps=250, optimizer=0.01, **QUICK)
    assert run.stopped.startswith("all 250 steps done; not converged: still moving at the first learning rate")


def test_the_mean_of_the_last_iterates_is_nearer_than_the_last():
    def error(seed, **options):
        pair = pgen.Pair(model)
        run = pair.fit(Y, steps=600, optimizer=0.1, schedule="constant", **{**QUICK, "seed": seed}, **options)
        return abs(float(next(p.detach() for n, p in pair.named_parameters() if "loc" in n)) - MEAN), run

    last = [error(seed)[0] for seed in range(4)]
    mean = [error(seed, average=400)[0] for seed in range(4)]
    assert sum(mean) < 0.6 * sum(last)
    assert "; mean of the last 400 steps kept (bound " in error(0, average=400)[1].stopped


def test_a_mean_that_is_worse_is_not_kept():
    far = Y + 1000.0  # still on the way: the mean of the way lies behind
    run = pgen.Pair(model).fit(far, steps=100, optimizer=0.1, schedule="constant", average=90, **QUICK)
    assert "last iterate kept, as the mean of the last" in run.stopped


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
@pytest.mark.parametrize("option", [{"stop": "converged", "steps": 500}, {"average": 30, "steps": 60, "schedule": "constant"}])
def test_tiers_agree(option):
    states, reasons = [], []
    for tier in ("eager", "graph", "compiled"):
        pair = pgen.Pair(model)
        run = pair.fit(Y, seed=1, **{**QUICK, "compile": tier}, unroll=1, **option)
        assert run.tier == tier
        states.append(state(pair))
        reasons.append(run.stopped.split(" (bound")[0])
    assert torch.equal(states[0], states[1])
    torch.testing.assert_close(states[2], states[0], rtol=1e-7, atol=1e-7)


def test_a_resumed_fit_ends_at_the_same_bits(tmp_path):
    options = {"stop": "converged", "tolerance": 1e-9, "seed": 1, **QUICK}
    whole, part, again = (pgen.Pair(model) for _ in range(3))
    whole.fit(Y, steps=900, **options)
    part.fit(Y, steps=500, checkpoint=tmp_path, **options)
    run = again.fit(Y, steps=900, checkpoint=tmp_path, **options)
    assert run.steps == 900 and torch.equal(state(again), state(whole))


def test_a_minibatched_network_stops_by_its_bound():
    x = (torch.rand(60, 4, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    vae = pgen.models.VAE((4,), latent_dim=1, hidden=(5,))
    run = vae.fit(
        x, batch_size=25, stop="converged", steps=6000, optimizer=0.01, tolerance=0.05, compile="graph", progress=False
    )
    assert run.stopped.startswith("converged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "convergence"}, "`stop` is 'convergence', which is unknown; did you mean 'converged'"),
        ({"stop": "converged", "schedule": "cosine"}, "lowers the learning rate by itself; leave `schedule` out"),
        ({"ema": 0.9, "average": 100}, "`ema` is an average of iterates already"),
        ({"average": 0}, "`average` should be a positive integer, got 0"),
        ({"tolerance": -1.0}, "`tolerance` should be a positive number"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        pgen.Pair(model).fit(Y, **options)
