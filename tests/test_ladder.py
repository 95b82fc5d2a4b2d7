"""The ladder: which rung suffices on posteriors that are known, what it starts from, and what it says when none does."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pgen
from pgen.contracts import Draws, Run
from pgen.ladder import climb

QUICK = {"compile": "graph", "progress": False, "precision": "float64", "seed": 1}
Y = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)


def correlated(rho, size=3):
    """A Gaussian posterior whose latents correlate by ``rho``, through the prior; the data say nothing."""
    spread = (1 - rho) * torch.eye(size, dtype=torch.float64) + rho

    def model(y):
        pyro.sample("b", dist.MultivariateNormal(y.new_zeros(size), spread))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)

    return model


EVIDENCE = float(dist.Normal(0.0, 1.0).log_prob(Y).sum())


def test_the_first_rung_is_kept_where_it_suffices():
    pair = pgen.Pair(correlated(0.1), "ladder")
    run = pair.fit(Y, steps=800, **QUICK)
    assert [rung.guide for rung in pair.ladder.rungs] == ["mean_field"] and pair.ladder.suffices
    assert pair.guide_name == "mean_field" and run is pair.last_run and run.steps == 800
    assert "mean_field suffices" in str(pair.ladder)


def test_it_climbs_until_the_weights_can_repair_the_draws(tmp_path):
    pair = pgen.Pair(correlated(0.95), "ladder")
    pair.fit(Y, steps=1000, **QUICK)
    tried = {rung.guide: rung for rung in pair.ladder.rungs}
    # k of the best independent Gaussians is 1 - (1 - rho) / (1 + (D - 2) rho) = 0.97
    assert tried["mean_field"].status == "contradicted" and tried["mean_field"].khat == pytest.approx(0.97, abs=0.25)
    assert pair.ladder.suffices and pair.ladder.chosen == list(tried)[-1] != "mean_field"
    best = tried[pair.ladder.chosen]
    assert best.bound == pytest.approx(EVIDENCE, abs=0.1) and best.ess > 100 and best.tier == "graph"
    spread = torch.corrcoef(pair.draw(Y, 4000).values["b"].T)
    assert float(spread[0, 1]) == pytest.approx(0.95, abs=0.1)
    said = str(pair.ladder).splitlines()
    assert said[0].split()[:3] == ["guide", "ELBO", "k-hat"] and said[1].startswith("mean_field") and "contradicted" in said[1]
    pair.save(tmp_path / "pair.pgen")
    again = pgen.Pair(correlated(0.95), "ladder").load(tmp_path / "pair.pgen")
    assert torch.equal(again.draw(Y, 10).log_q, pair.draw(Y, 10).log_q)


def test_a_rung_starts_where_the_one_before_ended():
    pair = pgen.Pair(correlated(0.95), "ladder")
    pair.fit(Y + 0.0, steps=600, **QUICK)
    first = pgen.Pair(correlated(0.95), "low_rank").fit(Y, steps=1, **QUICK).history["loss"][0]
    second = pair.ladder.rungs[1]
    assert second.guide == "low_rank" and second.bound > -3 * first - 0.1


def test_it_says_when_none_suffices_and_keeps_the_best_bound():
    def funnel(y):
        scale = pyro.sample("scale", dist.Normal(y.new_zeros(()), 3.0))
        pyro.sample("z", dist.Normal(y.new_zeros(9), (scale / 2).exp()).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)

    pair = pgen.Pair(funnel, "ladder")
    pair.fit(Y, steps=120, **QUICK)
    ladder = pair.ladder
    assert [rung.guide for rung in ladder.rungs] == ["mean_field", "low_rank", "full_rank", "flow"] and not ladder.suffices
    assert ladder.chosen == max(ladder.rungs, key=lambda rung: rung.bound).guide == pair.guide_name
    assert "No rung suffices" in str(ladder) and "non-centred" in str(ladder)
    assert float(pair.draw(Y, 10_000, 1).log_weight.mean()) == pytest.approx(max(rung.bound for rung in ladder.rungs), abs=1.0)


def test_each_rung_trains_until_converged_unless_told_otherwise():
    pair = pgen.Pair(correlated(0.0, size=1), "ladder")
    pair.fit(Y, **QUICK)
    assert pair.ladder.rungs[0].stopped.startswith("converged")


def test_rungs_that_cannot_help_are_not_tried():
    def one(y):
        mu = pyro.sample("mu", dist.StudentT(1.1, y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0 * mu, 1.0), obs=y)

    pair = pgen.Pair(one, "ladder")
    pair.fit(Y, steps=60, **QUICK)
    assert [rung.guide for rung in pair.ladder.rungs] == ["mean_field", "flow"]
    assert pair.ladder.skipped == dict.fromkeys(["low_rank", "full_rank"], "one latent has no correlation")
    assert "low_rank    not tried: one latent has no correlation" in str(pair.ladder)


def test_latents_of_each_datum_are_judged_each_by_itself():
    def local(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.linspace(-2.0, 2.0, 40, dtype=torch.float64)
    pair = pgen.Pair(local, "ladder")
    pair.fit(y, steps=800, **QUICK)
    assert pair.ladder.rungs[0].status == "supported" and "of data" not in pair.ladder.chosen


def test_parameters_of_the_model_are_those_of_the_rung_that_is_kept():
    network = nn.Linear(1, 1)

    def model(y):
        b = pyro.sample("b", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(network(b.sum(-1, keepdim=True)), 1.0).to_event(0), obs=y)

    pair = pgen.Pair(model, "ladder")
    pair.fit(Y, steps=50, **QUICK)
    best = next(rung for rung in pair.ladder.rungs if rung.guide == pair.ladder.chosen)
    assert float(pair.draw(Y, best.draws, 1).log_weight.mean()) == pytest.approx(best.bound, abs=1e-6)


def test_a_climb_takes_any_two_functions():
    asked = []

    def draw(count):
        asked.append(count)
        noise = torch.randn(count, generator=torch.Generator().manual_seed(len(asked)), dtype=torch.float64)
        weight = 0.65 * torch.distributions.Exponential(1.0).icdf(torch.special.ndtr(noise).clamp(max=1 - 1e-12))
        values = {"z": noise}
        return Draws(values, {"z": ()}, weight, torch.zeros_like(weight), None, None, {}, {}, {}, True, False)

    found = climb(["a", "b"], lambda name: Run(steps=len(name)), draw)
    assert asked[:3] == [10_000, 30_000, 100_000]  # k = 0.65 is too near to 0.7 for few draws
    assert found.rungs[0].draws == 100_000 and found.rungs[0].khat == pytest.approx(0.65, abs=0.15)
    assert math.isfinite(found.seconds)


def test_a_ladder_is_asked_for_by_name():
    with pytest.raises(ValueError, match="`guide` is 'laddr', which is unknown; did you mean 'ladder'"):
        pgen.Pair(correlated(0.1), "laddr")
