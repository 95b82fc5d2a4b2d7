"""Several starts in one batched run: distinct optima, the same distribution as lone fits, independence of each other."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state

import pgen

Y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
QUICK = {"compile": "graph", "progress": False, "precision": "float64"}


def normal(y):
    mu = pyro.sample("mu", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu[0], 1.0), obs=y)


def two_modes(y):
    """Half the posterior lies near -20, half near 20."""
    z = pyro.sample("z", dist.Normal(y.new_zeros(()), 20.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z.abs(), 1.0), obs=y)


def test_a_missed_mode_is_found_by_another_start():
    y = torch.full((1,), 20.0, dtype=torch.float64)
    found = pgen.multistart(two_modes, y, seeds=6, steps=1500, optimizer=0.05, schedule="cosine", **QUICK)
    assert found.num_optima == 2 and set(found.optima) == {0, 1}
    half = float(dist.Normal(0.0, math.sqrt(401.0)).log_prob(y))
    assert found.bounds == pytest.approx(half, abs=0.1)  # each start sees one half and cannot know of the other
    assert "6 starts ended at 2 optima" in str(found)
    means = [float(pair.draw(y, 200).values["z"].mean()) for pair in found.pairs]
    assert {round(m / 20) for m in means} == {-1, 1}


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_every_start_ends_where_a_lone_fit_does(guide):
    found = pgen.multistart(normal, Y, guide=guide, seeds=[3, 7, 11], steps=1500, **QUICK)
    assert found.num_optima == 1 and found.seeds == [3, 7, 11] and found.run.tier == "graph"
    lone = pgen.Pair(normal, guide)
    lone.fit(Y, steps=1500, seed=3, **QUICK)
    expected = lone.draw(Y, 4000).log_weight
    assert found.bounds == pytest.approx(float(expected.mean()), abs=0.08)
    assert not torch.equal(state(found.pairs[0]), state(found.pairs[1]))  # noise and starts of their own
    for i, pair in enumerate(found.pairs):
        assert pair.last_run.history["loss"][-1] == found.run.history[f"start_{i}"][-1]
    assert found.best is found.pairs[int(found.bounds.argmax())]


def test_the_tiers_agree_and_the_seeds_decide():
    first, again = (pgen.multistart(normal, Y, seeds=2, steps=20, **QUICK) for _ in range(2))
    eager = pgen.multistart(normal, Y, seeds=2, steps=20, **{**QUICK, "compile": "eager"})
    for a, b, c in zip(first.pairs, again.pairs, eager.pairs):
        assert torch.equal(state(a), state(b)) and torch.equal(state(a), state(c))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seeds": 1}, ValueError, "`seeds` should be two or more different integers"),
        ({"seeds": [4, 4]}, ValueError, "`seeds` should be two or more different integers"),
        ({"clip_norm": 1.0}, ValueError, "`clip_norm` would tie the starts"),
        ({"colour": 1.0}, TypeError, "unknown option 'colour'"),
        ({"guide": "laddr"}, ValueError, "`guide` is 'laddr'"),
    ],
)
def test_arguments_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        pgen.multistart(normal, Y, **options)


def test_a_model_with_parameters_is_refused():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match="this model has parameters of its own"):
        pgen.multistart(model, Y, **QUICK)


def test_starts_that_have_not_arrived_are_told_from_optima():
    def wide(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 100.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0])
    short = pgen.multistart(wide, y, seeds=3, steps=200, progress=False)
    assert short.unfinished.any()
    assert "still rose at the end: give more `steps`" in str(short)
    long = pgen.multistart(wide, y, seeds=3, steps=2000, optimizer=1.0, progress=False, schedule="cosine")
    assert not long.unfinished.any()
    assert long.num_optima == 1
