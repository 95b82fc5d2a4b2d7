"""Questions at speed: one answer whatever the tier, the memory or the clock."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import LOG_EVIDENCE, X_KNOWN, exact_guide, gaussian_guide, gaussian_model, log_evidence

import pgen
from pgen.contracts import as_seed
from pgen.evaluation import units
from pgen.evaluation.units import Deal, Unit, rows_of
from pgen.models import VAE
from pgen.training import progress

BITS = torch.bernoulli(torch.rand(70, 2, 3, generator=torch.Generator().manual_seed(1)))
WIDE = torch.bernoulli(torch.rand(70, 12, 14, generator=torch.Generator().manual_seed(1)))


def small():
    return VAE((2, 3), 4, (7,), seed=3)


def known(guide=gaussian_guide):
    pair = pgen.Pair(gaussian_model, guide)
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 1.5
    return pair, torch.cat([X_KNOWN, x])


# --- units ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [1, 5, 64, 65, 100, 200, 1797])
@pytest.mark.parametrize("most", [1, 3, 64])
def test_what_is_dealt_out_is_everything_once_and_evenly(total, most):
    deal = Deal(total, most)
    kept = [deal.kept(unit) for unit in range(deal.units)]
    assert sum(kept) == total and all(0 < k <= deal.size <= most for k in kept) and set(kept[:-1]) <= {deal.size}
    assert deal.size * deal.units - total < deal.units


def test_the_last_unit_is_filled_up_with_the_last_row():
    batch = {"x": torch.arange(7), "scale": torch.tensor(2.0), "none": None}
    deal = Deal(7, 3)
    assert [rows_of(batch, deal, i)["x"].tolist() for i in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
    assert rows_of(batch, deal, 2)["scale"] == 2.0 and rows_of(batch, deal, 2)["none"] is None


def noisy(x):
    return [torch.tanh(x + torch.randn_like(x)).sum(0), x.exp()]


def test_a_unit_gives_the_same_numbers_in_every_tier():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    eager, graph, compiled = (Unit(noisy, [], [x], [y], calls=2, compile=t) for t in ("eager", "graph", "compiled"))
    assert [u.tier for u in (eager, graph, compiled)] == ["eager", "graph", "compiled"]
    for given in (x, y):
        want = eager(7, given)
        assert all(torch.equal(a, b) for a, b in zip(want, graph(7, given)))
        torch.testing.assert_close(want, compiled(7, given))
    assert not torch.equal(graph(7, x)[0], graph(8, x)[0])


def test_the_tier_follows_from_the_amount_of_work():
    x = torch.randn(5, 3)
    assert Unit(noisy, [], [x], calls=100).tier == "eager"
    assert Unit(noisy, [], [x], calls=100_000).tier == "graph"
    assert Unit(noisy, [], [x], calls=1_000_000).tier == "compiled"


def test_a_refused_capture_stays_eager_and_can_be_asked_for():
    def branches(x):
        return [x + 1 if x.sum() > 0 else x]

    x = torch.ones(3)
    unit = Unit(branches, [], [x], calls=10**6)
    assert unit.tier == "eager" and "control flow" in unit.reason
    assert unit(0, -x)[0].tolist() == [-1.0] * 3
    with pytest.raises(ValueError, match=r"compile='graph' cannot be had, the program's control flow"):
        Unit(branches, [], [x], calls=1, compile="graph")
    with pytest.raises(ValueError, match="`compile` is 'gaph'"):
        Unit(branches, [], [x], calls=1, compile="gaph")


def test_units_that_are_a_loop_of_many_operations_are_not_captured():
    def long(x):
        for _ in range(units._MOST_OPERATIONS + 1):
            x = x + 1
        return [x]

    unit = Unit(long, [], [torch.ones(2)], calls=10**6)
    assert unit.tier == "eager" and "too many" in unit.reason


def test_a_parameter_that_changes_later_is_seen_by_the_graph():
    weight = torch.nn.Parameter(torch.ones(3))
    unit = Unit(lambda x: [x * weight.exp()], [weight], [torch.ones(3)], calls=1, compile="graph")
    with torch.no_grad():
        weight.zero_()
    assert unit(0, torch.ones(3))[0].tolist() == [1.0] * 3


# --- every question, in every tier -----------------------------------------------------------------------------------------


QUESTIONS = {
    "log_prob": lambda m, **o: [m.log_prob(BITS, num_samples=100, **o).value],
    "draw": lambda m, **o: [m.draw(BITS, 30, **o).values["z"], m.draw(BITS, 30, **o).log_weight_rows],
    "predict": lambda m, **o: [m.predict(BITS, 30, **o)["x"]],
    "sample": lambda m, **o: [m.sample(1500, **o)],
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_eager_and_graph_give_the_same_bits_and_compiled_the_same_numbers(name):
    ask, vae = QUESTIONS[name], small()
    eager = ask(vae, compile="eager", seed=5)
    assert all(torch.equal(a, b) for a, b in zip(eager, ask(vae, compile="graph", seed=5)))
    assert all(torch.equal(a, b) for a, b in zip(eager, ask(vae, seed=5)))
    if name in ("log_prob", "predict"):
        torch.testing.assert_close(ask(vae, compile="compiled", seed=5), eager, rtol=1e-5, atol=1e-4)
    assert not torch.equal(eager[0], ask(vae, seed=6)[0])


def test_many_draws_come_in_several_units_and_none_is_lost(monkeypatch):
    monkeypatch.setattr("pgen.evaluation.posterior.UNIT_NUMBERS", 1000)  # two draws of 70 data of 6 numbers
    vae = small()
    draws = vae.draw(BITS, 7, seed=1)
    z = draws.values["z"]
    assert z.shape == (7, 70, 4) and draws.log_p.shape == (7,)
    assert len({float(v) for v in z[:, 0, 0]}) == 7
    assert torch.equal(z, vae.draw(BITS, 7, seed=1, compile="graph").values["z"])
    assert vae.predict(BITS, 5)["x"].shape == (5, 70, 2, 3)


def test_a_pairs_own_arguments_and_plates_go_through_a_graph():
    def model(x, y, scale):
        slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x * scale, 0.5), obs=y)

    pair = pgen.Pair(model)
    data = (torch.linspace(-1, 1, 12), torch.linspace(-2, 2, 12), torch.ones(12))
    pair.fit(data, steps=20, progress=False)
    one, other = (pair.draw(data, 2500, seed=3, compile=tier) for tier in ("eager", "graph"))
    assert torch.equal(one.values["slope"], other.values["slope"]) and torch.equal(one.log_weight, other.log_weight)
    assert one.dims == other.dims and torch.equal(one.observed["y"], data[1])


def test_encode_and_reconstruct_take_rows_in_units():
    x = WIDE.repeat(8, 1, 1)  # 560 data: three units, the last one ragged
    vae = VAE((12, 14), 4, (7,), seed=3)
    z = vae.encode(x)
    assert z.shape == (560, 4)
    torch.testing.assert_close(z[70:140], vae.encode(x[:70]))
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(z))


def test_context_of_each_datum_goes_with_it_through_several_units():
    vae = VAE((2, 3), 4, (7,), context_dim=2, seed=3)
    context = torch.randn(1100, 2)
    one, other = (vae.sample(1100, context, seed=4, compile=tier) for tier in ("eager", "graph"))
    assert one.shape == (1100, 2, 3) and torch.equal(one, other)


# --- known answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_the_bound_of_an_exact_guide_is_the_evidence(tier):
    pair, x = known(exact_guide)
    score = pair.log_prob(x, num_samples=3, compile=tier)
    torch.testing.assert_close(score.value, log_evidence(x), rtol=0, atol=1e-10)
    assert float(score.value[0]) == pytest.approx(LOG_EVIDENCE, abs=1e-6)
    assert float(score.mc_error.max()) < 1e-6


def test_the_bound_of_many_draws_nears_the_evidence_from_below():
    pair, x = known()
    values = torch.stack([pair.log_prob(x, num_samples=65, seed=s).value for s in range(80)])
    gap = log_evidence(x) - values.mean(0)
    assert float(gap.mean()) == pytest.approx(0.0595 / 65, abs=0.005)  # chi-square divergence over 2 K
    error = pair.log_prob(x, num_samples=65, seed=0).mc_error
    assert float(error.mean()) == pytest.approx(float(values.std(0).mean()), rel=0.2)


def test_new_rows_of_a_guide_bound_to_rows_take_their_latents_from_the_model():
    def model(x, y=None):
        level = pyro.sample("level", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            own = pyro.sample("own", dist.Normal(level, 2.0))
            pyro.sample("y", dist.Normal(own + 0.0 * x, 0.5), obs=y)

    y = 7.0 + 2.0 * torch.randn(60)
    for options in ({}, {"batch_size": 20}):
        pair = pgen.Pair(model)
        data = {"x": torch.zeros(60), "y": y}
        pair.fit(data, steps=800, progress=False, optimizer=0.1 if options else None, **options)
        own = pair.predict(data, 500, seed=1)["y"]
        assert float((own.mean(0) - y).abs().mean()) < 0.6  # the training rows know their latents
        new = pair.predict({"x": torch.zeros(7)}, 4000, seed=1)
        assert set(new) == {"y"} and new["y"].shape == (4000, 7)
        level = pair.posterior(data, 500)["posterior"]["level"].mean().item()
        assert float(new["y"].mean()) == pytest.approx(level, abs=0.1)
        assert float(new["y"][:, 0].std()) == pytest.approx(math.hypot(2.0, 0.5), rel=0.1)
        with pytest.raises(pgen.NotAvailable, match="does not know these rows"):
            pair.posterior({"x": torch.zeros(7), "y": torch.zeros(7)})


# --- seeds ---------------------------------------------------------------------------------------------------------------


def test_a_generator_is_a_stream_of_seeds():
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    seeds = [as_seed(first) for _ in range(3)]
    assert seeds == [as_seed(second) for _ in range(3)] and len(set(seeds)) == 3
    for wrong in (True, 1.5, "0", None):
        with pytest.raises(ValueError, match=r"`seed` should be an integer or a torch\.Generator, got"):
            as_seed(wrong)


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_takes_a_generator(name):
    ask, vae = QUESTIONS[name], small()
    answers = [ask(vae, seed=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2)]
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])
    with pytest.raises(ValueError, match=r"`seed` should be an integer or a torch\.Generator"):
        ask(vae, seed=0.5)


def test_fit_and_the_weights_take_a_generator():
    def fitted(seed):
        generator = torch.Generator().manual_seed(seed)
        vae = VAE((2, 3), 4, (7,), seed=generator)
        vae.fit(BITS, steps=2, seed=generator, progress=False)
        return torch.cat([p.detach().flatten() for p in vae.parameters()])

    assert torch.equal(fitted(1), fitted(1)) and not torch.equal(fitted(1), fitted(2))


# --- what a person sees --------------------------------------------------------------------------------------------------


@pytest.fixture
def screen(monkeypatch):
    """What bars write, without the wait."""
    import rich.console

    text, console = io.StringIO(), rich.console.Console
    wide = {"file": text, "width": 100, "force_terminal": True, "color_system": None}
    monkeypatch.setattr(rich.console, "Console", lambda **_: console(**wide))
    for module in ("pgen.evaluation.likelihood", "pgen.evaluation.posterior"):
        monkeypatch.setattr(f"{module}.QUIET_SECONDS", -1.0)
    return text


@pytest.mark.parametrize("name", QUESTIONS)
def test_long_questions_show_a_bar_with_their_name(name, screen):
    QUESTIONS[name](small(), progress=False)
    assert screen.getvalue() == ""
    QUESTIONS[name](small())
    assert name in screen.getvalue()
    assert progress._OPEN == []


def test_questions_show_nothing_where_there_is_no_terminal(capfd, monkeypatch):
    for module in ("pgen.evaluation.likelihood", "pgen.evaluation.posterior"):
        monkeypatch.setattr(f"{module}.QUIET_SECONDS", -1.0)
    for ask in QUESTIONS.values():
        ask(small())
    assert capfd.readouterr() == ("", "")


def test_bars_inside_a_bar_add_their_words_to_it(screen):
    with progress.Progress(3, True, quiet=-1.0) as outer:
        outer.at(1, "claim 8")
        small().sample(1500)
    assert "claim 8 · sample 1/2" in screen.getvalue()
    screen.truncate(0)
    with progress.Progress(3, False, quiet=-1.0):
        small().sample(1500)
    assert "sample" not in screen.getvalue()


def test_an_interrupted_question_leaves_no_bar_and_no_state(screen, monkeypatch):
    before = torch.get_rng_state()
    calls = []

    def interrupted(self, noise, *inputs):
        calls.append(noise)
        raise KeyboardInterrupt

    monkeypatch.setattr(Unit, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small().log_prob(BITS)
    assert calls and progress._OPEN == [] and torch.equal(before, torch.get_rng_state())
