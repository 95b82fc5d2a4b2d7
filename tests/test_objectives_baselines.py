"""Baselines of score-function terms: no bias, less variance, state that fits carry."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded
from torch import nn

import pgen
from pgen import ELBO
from pgen.objectives import DecayingAverage
from pgen.programs import isolated

Y = torch.tensor([0.3, 1.4, -0.6, 2.2], dtype=torch.float64)


def model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)


def guide_of(logits):
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    return guide


def gradients(objective, logits, repeats):
    found = []
    for _ in range(repeats):
        with isolated():
            loss, _ = objective(model, guide_of(logits), Y, {"num_data": 4.0})
        found.append(torch.autograd.grad(loss, logits)[0])
    return torch.stack(found)


def exact(logits):
    q, bound = torch.sigmoid(logits), 0.0
    for z, probability, prior in ((0.0, 1 - q, 0.7), (1.0, q, 0.3)):
        bound = bound + probability * (math.log(prior) + dist.Normal(2 * z, 1.0).log_prob(Y) - probability.log())
    return -torch.autograd.grad(bound.mean(), logits)[0]


class Expected(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1.5, -0.3], dtype=torch.float64))

    def forward(self, y):
        return self.weight[0] + self.weight[1] * y.square()


@pytest.mark.parametrize(
    "objective",
    [ELBO(3), ELBO(baseline=DecayingAverage(0.8)), ELBO(2, baseline=Expected())],
    ids=["others", "average", "module"],
)
def test_a_baseline_adds_no_bias(objective):
    logits = torch.tensor([0.2, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    if isinstance(objective.baseline, DecayingAverage):
        objective.baseline.double()
    drawn = gradients(objective, logits, 500)
    error = drawn.std(0) / math.sqrt(500)
    assert bool(((drawn.mean(0) - exact(logits)).abs() < 4.5 * error).all())
    assert bool((exact(logits).abs() > 3 * error).any())


def test_baselines_take_variance_away():
    logits = torch.tensor([0.2, -0.7, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    average = ELBO(baseline=DecayingAverage(0.95).double())
    gradients(average, logits, 30)
    plain, less = (float(gradients(o, logits, 400).var(0).sum()) for o in (ELBO(), average))
    assert less < 0.6 * plain
    alone = plain / 4  # four particles on their own
    assert float(gradients(ELBO(4), logits, 400).var(0).sum()) < 0.8 * alone


def test_the_average_starts_plain_and_then_forgets():
    baseline = DecayingAverage(0.75).double()
    for value in (4.0, 6.0, 2.0):
        baseline.update({"shared": torch.tensor(value, dtype=torch.float64)})
    assert float(baseline.shared) == pytest.approx(4.0) and float(baseline.local) == 0.0
    for value in (8.0, math.nan, 8.0):
        baseline.update({"shared": torch.tensor(value, dtype=torch.float64)})
    assert float(baseline.shared) == pytest.approx(4.0 + 0.25 * 4.0 + 0.25 * 3.0)


def binary_pair():
    network = seeded(lambda: nn.Linear(5, 3))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_full((3,), 0.4)).to_event(1))
            pyro.sample("x", dist.Normal(z @ network.weight, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=network(x)).to_event(1))

    return pgen.Pair(model, guide)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = seeded(lambda: nn.Linear(5, 1), 3)

    def forward(self, x):
        return self.layer(x).squeeze(-1)


def _fit(objective, tier, **options):
    pair, x = binary_pair(), torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    run = pair.fit(x, objective=objective, steps=4, batch_size=5, compile=tier, unroll=1, progress=False, **options)
    assert run.tier == tier
    return torch.cat([p.detach().reshape(-1) for p in pair.parameters()])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("baseline", [DecayingAverage(), Linear()], ids=["average", "module"])
def test_the_tiers_carry_a_baseline_alike(baseline):
    objective = ELBO(baseline=baseline)
    before = [t.clone() for t in baseline.state_dict().values()]
    eager = _fit(objective, "eager")
    assert torch.equal(eager, _fit(objective, "graph"))  # and a second fit begins where the first began
    assert all(torch.equal(a, b) for a, b in zip(before, baseline.state_dict().values()))
    assert not torch.equal(eager, _fit(ELBO(), "eager"))
    if isinstance(baseline, DecayingAverage):
        torch.testing.assert_close(_fit(objective, "compiled"), eager, rtol=1e-4, atol=1e-5)


def test_a_baseline_is_resumed_with_the_run(tmp_path):
    objective = ELBO(baseline=DecayingAverage())
    pair, x = binary_pair(), torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    options = {"objective": objective, "batch_size": 5, "compile": "graph", "progress": False, "schedule": "constant"}
    pair.fit(x, steps=9, **options)
    whole = torch.cat([p.detach().reshape(-1) for p in pair.parameters()])
    for steps in (4, 9):
        again = binary_pair()
        again.fit(x, steps=steps, checkpoint=tmp_path, **options)
    assert torch.equal(whole, torch.cat([p.detach().reshape(-1) for p in again.parameters()]))


def test_a_baseline_gives_one_number_a_datum():
    class Wrong(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"`baseline` should give one number a datum, shape \(5,\), got \(5, 5\)"):
        _fit(ELBO(baseline=Wrong()), "eager")


def test_the_decay_is_checked():
    with pytest.raises(ValueError, match=r"`decay` should be in \(0, 1\)"):
        DecayingAverage(1.0)
