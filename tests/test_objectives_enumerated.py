"""Exact sums over discrete latents: mixtures, chains in time, classes that a guide proposes."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded
from pyro import poutine
from torch import nn

import pgen
from pgen import ELBO, IWAE
from pgen.programs import isolated, run_pair

WEIGHTS, MEANS, SCALES = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.3, 0.5], [-2.0, 0.1, 3.0], [0.5, 1.0, 1.5]))
X = torch.tensor([0.3, -1.9, 4.0, 0.9, 2.2, -0.4, 1.1], dtype=torch.float64)


def nothing(*args):
    pass


def evaluate(objective, model, guide, batch, num_data):
    with isolated():
        return objective(model, guide, batch, {"num_data": float(num_data)})


def rows(objective, model, guide, batch):
    with isolated():
        return objective.rows(model, guide, batch)


def mixture(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        pyro.sample("x", dist.Normal(MEANS[z], SCALES[z]), obs=x)


def log_mixture(x):
    return torch.logsumexp(WEIGHTS.log() + dist.Normal(MEANS, SCALES).log_prob(x[:, None]), -1)


# --- known sums ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ELBO(), ELBO(3), IWAE(2)], ids=repr)
def test_a_mixture_has_its_exact_likelihood(objective):
    local, outside = rows(objective, mixture, nothing, X)
    torch.testing.assert_close(local, log_mixture(X), rtol=0, atol=1e-12)
    loss, _ = evaluate(objective, mixture, nothing, X, 7)
    assert float(outside) == 0.0 and float(loss) == pytest.approx(-float(log_mixture(X).mean()), abs=1e-12)


@pytest.mark.parametrize("lengths", [(7,), (3, 4), (5, 2), (1, 1, 5)])
def test_mean_over_a_partition_is_the_full_one(lengths):
    parts = [evaluate(ELBO(), mixture, nothing, part, 7)[0] for part in X.split(lengths)]
    assert sum(n / 7 * float(p) for n, p in zip(lengths, parts)) == pytest.approx(-float(log_mixture(X).mean()), abs=1e-12)


def test_a_mask_acts_inside_the_sum_and_a_scale_outside():
    mask = torch.arange(7) % 2 == 0

    def model(x):
        with poutine.scale(scale=3.0), pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(MEANS[z], SCALES[z]), obs=x)

    whole = poutine.mask(model, mask=mask)
    for masked in (model, whole):
        local, _ = rows(ELBO(), masked, nothing, X)
        torch.testing.assert_close(local, 3 * log_mixture(X) * mask, rtol=0, atol=1e-12)


def test_sites_of_one_sum_need_one_scale():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(MEANS[z], 1.0), obs=x)

    with pytest.raises(ValueError, match="another scale than the sites with which it shares a sum over a discrete latent"):
        rows(ELBO(), model, nothing, X)


def test_a_sum_does_not_underflow():
    """Prior and likelihood disagree by far more than float32 can hold."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=torch.tensor([0.0, -200.0])))
            pyro.sample("x", dist.Normal(torch.tensor([30.0, 0.0])[z], 1.0), obs=x)

    local, _ = rows(ELBO(), model, nothing, torch.zeros(1))
    assert float(local) == pytest.approx(-200.0 - 0.5 * math.log(2 * math.pi), rel=1e-5)


def test_several_latents_are_summed_together():
    """Two that meet in x, one that stands alone behind y, one that nothing depends on."""
    table = torch.randn(2, 3, dtype=torch.float64)

    def model(x, y):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(0.3)))
            b = pyro.sample("b", dist.Categorical(WEIGHTS))
            c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.6)))
            pyro.sample("d", dist.Bernoulli(x.new_tensor(0.6)))
            pyro.sample("x", dist.Normal(table[a.long(), b], 0.7), obs=x)
            pyro.sample("y", dist.Normal(c, 0.7), obs=y)

    y = X.flip(0)
    parts = [
        math.log(0.3 if a else 0.7) + WEIGHTS[b].log() + dist.Normal(table[a, b], X.new_tensor(0.7)).log_prob(X)
        for a, b in itertools.product(range(2), range(3))
    ]
    others = [math.log(0.6 if c else 0.4) + dist.Normal(float(c), X.new_tensor(0.7)).log_prob(y) for c in range(2)]
    expected = torch.logsumexp(torch.stack(parts), 0) + torch.logsumexp(torch.stack(others), 0)
    torch.testing.assert_close(rows(ELBO(), model, nothing, (X, y))[0], expected, rtol=0, atol=1e-12)


def test_a_latent_of_an_inner_plate_is_summed_for_each_of_its_places():
    words = torch.randn(4, 5, dtype=torch.float64)

    def model(words):
        with pyro.plate("data", len(words), dim=-1):
            topic = pyro.sample("topic", dist.Categorical(WEIGHTS))
            with pyro.plate("words", 5, dim=-2):
                switch = pyro.sample("switch", dist.Bernoulli(words.new_tensor(0.3)))
                pyro.sample("word", dist.Normal(MEANS[topic] * switch, 1.0), obs=words.T)

    inside = [
        torch.logaddexp(
            math.log(0.3) + dist.Normal(m, 1.0).log_prob(words), math.log(0.7) + dist.Normal(0.0, 1.0).log_prob(words)
        )
        for m in MEANS
    ]
    expected = torch.logsumexp(torch.stack([w.log() + part.sum(1) for w, part in zip(WEIGHTS, inside)]), 0)
    torch.testing.assert_close(rows(ELBO(), model, nothing, words)[0], expected, rtol=0, atol=1e-12)


TRANSITION = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)


def hidden_markov(series):
    """Sequences of equal length in rows; states forget all but the one before."""
    with pyro.plate("data", len(series)):
        z = 0
        for t in pyro.markov(range(series.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"x{t}", dist.Normal(MEANS[z], SCALES[z]), obs=series[:, t])


def forward_algorithm(series):
    alpha = TRANSITION[0].log() + dist.Normal(MEANS, SCALES).log_prob(series[:, 0, None])
    for t in range(1, series.shape[1]):
        alpha = torch.logsumexp(alpha[:, :, None] + TRANSITION.log(), 1)
        alpha = alpha + dist.Normal(MEANS, SCALES).log_prob(series[:, t, None])
    return torch.logsumexp(alpha, -1)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_hidden_markov_chain_has_the_forward_algorithms_likelihood(length):
    series = torch.randn(4, length, dtype=torch.float64) * 2
    torch.testing.assert_close(rows(ELBO(), hidden_markov, nothing, series)[0], forward_algorithm(series), rtol=0, atol=1e-11)
    loss, _ = evaluate(ELBO(2), hidden_markov, nothing, series, 4)
    assert float(loss) == pytest.approx(-float(forward_algorithm(series).mean()), abs=1e-11)


def test_a_latent_shared_by_all_data_is_summed_over_the_whole():
    def model(x):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(MEANS[z], 1.0), obs=x)

    expected = torch.logsumexp(WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(X[:, None]).sum(0), -1)
    loss, _ = evaluate(ELBO(), model, nothing, X, 7)
    assert float(loss) == pytest.approx(-float(expected) / 7, abs=1e-12)
    with pytest.raises(ValueError, match=r"discrete latent 'z' lies outside the plate \"data\".*all 7 data in each step"):
        pgen.Pair(model, nothing).fit(X, batch_size=3, steps=1, progress=False)


# --- beside continuous latents -------------------------------------------------------------------------------------------


def clusters(x):
    """A continuous latent whose prior is a mixture, and data that depend on both."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(WEIGHTS))
        w = pyro.sample("w", dist.Normal(MEANS[z], 1.0))
        pyro.sample("x", dist.Normal(w, SCALES[z]), obs=x)


def cluster_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("w", dist.Normal(0.8 * x, 0.9))


def test_latents_of_the_guide_and_latents_that_are_summed_live_together():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        with isolated():
            traces = run_pair(clusters, cluster_guide, X)
    w = traces.guide["w"].value
    joint = WEIGHTS.log() + dist.Normal(MEANS, 1.0).log_prob(w[:, None]) + dist.Normal(w[:, None], SCALES).log_prob(X[:, None])
    total = sum(term.rows for term in traces.model.values())
    torch.testing.assert_close(total, torch.logsumexp(joint, -1), rtol=0, atol=1e-12)
    assert set(traces.latents) == {"w"} and set(traces.likelihoods) == {"x"}


def test_a_prior_that_is_a_mixture_stays_a_prior():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(WEIGHTS))
            w = pyro.sample("w", dist.Normal(MEANS[z], SCALES[z]))
            pyro.sample("x", dist.Normal(w, 0.5), obs=x)

    with isolated():
        traces = run_pair(model, cluster_guide, X)
    assert set(traces.latents) == {"w"}
    torch.testing.assert_close(traces.model["w"].rows, log_mixture(traces.guide["w"].value), rtol=0, atol=1e-12)


def test_bounds_with_summed_latents_converge_to_the_evidence():
    exact = torch.logsumexp(WEIGHTS.log() + dist.Normal(MEANS, (1 + SCALES.square()).sqrt()).log_prob(X[:, None]), -1)
    score = pgen.Pair(clusters, cluster_guide).log_prob(X, num_samples=20_000)
    assert score.kind == "lower_bound"
    assert bool(((score.value - exact).abs() < 5 * score.mc_error + 1e-4).all())


# --- fits ----------------------------------------------------------------------------------------------------------------


class Clusters(nn.Module):
    """A mixture of three Gaussians to be learned."""

    def __init__(self):
        super().__init__()
        self.logits, self.means = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.means[z], 0.5), obs=x)


@pytest.fixture(scope="module")
def three_heaps():
    generator = torch.Generator().manual_seed(0)
    z = torch.multinomial(torch.tensor([0.2, 0.3, 0.5]), 600, replacement=True, generator=generator)
    return torch.tensor([-3.0, 0.0, 3.0])[z] + 0.5 * torch.randn(600, generator=generator)


def test_a_model_with_a_discrete_latent_just_fits(three_heaps):
    pair = pgen.Pair(Clusters())
    pair.fit(three_heaps, steps=300, batch_size=200, optimizer=0.05, progress=False)
    learned = dict(pair.named_parameters())
    assert sorted(learned["_model.means"].tolist()) == pytest.approx([-3, 0, 3], abs=0.15)
    assert sorted(learned["_model.logits"].softmax(0).tolist()) == pytest.approx([0.2, 0.3, 0.5], abs=0.06)
    score = pair.log_prob(three_heaps[:20])
    assert score.kind == "exact" and score.num_samples is None
    mix = dist.MixtureSameFamily(
        dist.Categorical(logits=learned["_model.logits"].detach()), dist.Normal(learned["_model.means"].detach(), 0.5)
    )
    torch.testing.assert_close(score.value, mix.log_prob(three_heaps[:20]).double(), rtol=0, atol=1e-5)
    with pytest.raises(pgen.NotAvailable, match="no latent variables"):
        pair.posterior(three_heaps)
    assert set(pair.predict(three_heaps, num_samples=3)) == {"x"}


def bayesian_mixture(x):
    means = pyro.sample("means", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("x", dist.Normal(means[z], 0.5), obs=x)


def test_automatic_guides_leave_summed_latents_out(three_heaps):
    pair = pgen.Pair(bayesian_mixture)
    pair.fit(three_heaps, steps=300, batch_size=150, progress=False, compile="eager")
    draws = pair.draw(three_heaps, 400)
    assert set(draws.values) == {"means"} and draws.log_likelihood["x"].shape == (400, 600)
    assert draws.values["means"].mean(0).tolist() == pytest.approx([-3, 0, 3], abs=0.2)
    tree = pair.posterior(three_heaps, 50)
    assert set(tree["posterior"].data_vars) == {"means"}
    assert tree["observed_data"]["x"].shape == (600,)


def test_a_chain_can_be_questioned(three_heaps):
    start = torch.eye(3)[0] + 0.01

    def model(series):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(series)):
            z = pyro.sample("z0", dist.Categorical(start / start.sum()))
            for t in pyro.markov(range(series.shape[1])):
                z = pyro.sample(f"z{t + 1}", dist.Categorical(TRANSITION.float()[z]))
                pyro.sample(f"x{t}", dist.Normal(MEANS.float()[z] + loc, 1.0), obs=series[:, t])

    pair, series = pgen.Pair(model), three_heaps.reshape(100, 6)
    pair.fit(series, steps=20, progress=False, compile="eager")
    draws = pair.draw(series, 30)
    assert set(draws.observed) == {f"x{t}" for t in range(6)}
    assert draws.log_likelihood["x0+...+x5"].shape == (30, 100)
    assert pair.posterior(series, 10)["posterior"]["loc"].shape == (1, 10)


@pytest.mark.parametrize("guide", [None, nothing], ids=["automatic", "empty"])
def test_a_discrete_latent_without_end_is_refused(guide):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Poisson(x.new_tensor(3.0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'z'.*is discrete"):
        pgen.Pair(model, guide).fit(X, steps=1, progress=False)


def test_a_model_that_does_not_broadcast_says_so():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.OneHotCategorical(WEIGHTS))
            pyro.sample("x", dist.Normal(torch.cat([x[:, None], z], -1).sum(-1), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"at all values of 'z' at once.*write what depends on it with broadcasting"):
        pgen.Pair(model, nothing).fit(X, steps=1, progress=False)


# --- classes that a guide proposes ---------------------------------------------------------------------------------------


class M2(nn.Module):
    """Semi-supervised digits in small: p(y) p(z) p(x | z, y), q(y | x) q(z | x, y); no label is seen here."""

    def __init__(self):
        super().__init__()
        self.decoder, self.classifier, self.encoder = nn.Linear(2 + 3, 5), nn.Linear(5, 3), nn.Linear(5 + 3, 4)
        self.double()

    def forward(self, x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(WEIGHTS.to(x)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(torch.cat([z, y], -1)), 0.7).to_event(1), obs=x)

    def guide(self, x, point=False):
        with pyro.plate("data", len(x)):
            logits = self.classifier(x)
            y = pyro.sample("y", dist.OneHotCategorical(logits=logits), infer={"enumerate": "parallel"})
            loc, log_scale = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
            if point:  # a draw that is a function of x and y, so that the bound can be added up by hand
                value = loc + 0.3 * log_scale.exp()
                log_q = dist.Normal(loc, log_scale.exp()).to_event(1).log_prob(value)
                pyro.sample("z", dist.Delta(value, log_density=log_q, event_dim=1))
            else:
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def by_hand(self, x):
        q, total = self.classifier(x).softmax(-1), 0.0
        for k in range(3):
            y = torch.eye(3, dtype=torch.float64)[k].expand(len(x), 3)
            loc, log_scale = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
            z = loc + 0.3 * log_scale.exp()
            inner = dist.Normal(self.decoder(torch.cat([z, y], -1)), 0.7).log_prob(x).sum(-1)
            inner = inner + dist.Normal(x.new_zeros(2), 1.0).log_prob(z).sum(-1) + WEIGHTS[k].log() - q[:, k].log()
            total = total + q[:, k] * (inner - dist.Normal(loc, log_scale.exp()).log_prob(z).sum(-1))
        return total


@pytest.fixture
def m2():
    return seeded(M2), torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("particles", [1, 3])
def test_a_class_that_the_guide_proposes_is_summed(m2, particles):
    model, x = m2

    def guide(x):
        model.guide(x, point=True)

    expected = model.by_hand(x)
    torch.testing.assert_close(rows(ELBO(particles), model, guide, x)[0], expected, rtol=0, atol=1e-12)
    loss, _ = evaluate(ELBO(particles), model, guide, x, 6)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    wanted = torch.autograd.grad(-expected.mean(), list(model.parameters()))
    assert float(loss.detach()) == pytest.approx(-float(expected.detach().mean()), abs=1e-12)
    for got, want in zip(grads, wanted):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    halves = [evaluate(ELBO(particles), model, guide, part, 6)[0] for part in x.split((5, 1))]
    assert float((5 * halves[0] + halves[1]).detach() / 6) == pytest.approx(float(loss.detach()), abs=1e-12)


@pytest.mark.parametrize("options", [{"sticking_the_landing": True}, {"analytic_kl": True}], ids=str)
def test_other_estimators_of_the_sum_expect_the_same(m2, options):
    model, x = m2
    parameters = list(model.parameters())

    def gradients(objective):
        losses = [evaluate(objective, model, model.guide, x, 6)[0] for _ in range(30)]
        return torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]) for loss in losses])

    plain, other = gradients(ELBO(100)), gradients(ELBO(100, **options))
    error = ((plain.var(0) + other.var(0)) / 30).sqrt()
    assert bool(((plain.mean(0) - other.mean(0)).abs() < 5 * error + 1e-12).all())


def test_a_proposed_class_outside_the_plate_and_one_given_another():
    """Global a, local b given a: 2 x 3 joint values, weighted by q(a) and q(b | a)."""
    table = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=torch.float64)

    def program(prior, obs):
        def run(x):
            a = pyro.sample("a", dist.Bernoulli(x.new_tensor(prior)), infer={"enumerate": "parallel"})
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Categorical(table[a.long()]), infer={"enumerate": "parallel"})
                if obs:
                    pyro.sample("x", dist.Normal(MEANS[b] + a, 1.0), obs=x)

        return run

    loss, _ = evaluate(ELBO(), program(0.5, True), program(0.3, False), X, 7)
    bound = sum(
        q * (math.log(0.5 / q) + sum(table[a, b] * dist.Normal(MEANS[b] + a, 1.0).log_prob(X).sum() for b in range(3)))
        for a, q in ((0, 0.7), (1, 0.3))
    )
    assert float(loss) == pytest.approx(-float(bound) / 7, abs=1e-12)


def test_a_proposed_class_in_an_inner_plate_is_refused():
    def program(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("inner", 4, dim=-2):
            pyro.sample("a", dist.Bernoulli(x.new_tensor(0.4)), infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="guide site 'a' lies in a plate inside or beside \"data\""):
        evaluate(ELBO(), program, program, X, 7)


def test_particles_run_in_one_batch(m2):
    model, x = m2
    calls = []

    def guide(x):
        calls.append(1)
        model.guide(x)

    def counted(x):
        calls.append(1)
        mixture(x)

    evaluate(ELBO(50), model, guide, x, 6)
    evaluate(ELBO(50), counted, nothing, X, 7)
    assert len(calls) == 3  # the guide at the first class and at the others, the mixture once


# --- tiers ---------------------------------------------------------------------------------------------------------------


def series_model(series):
    means = pyro.param("means", MEANS.float())
    with pyro.plate("data", len(series)):
        z = 0
        for t in pyro.markov(range(series.shape[1])):
            z = pyro.sample(f"z{t}", dist.Categorical(TRANSITION.float()[z]))
            pyro.sample(f"x{t}", dist.Normal(means[z], 1.0), obs=series[:, t])


class M2InFloat32(M2):
    """Its prior in the precision of its parameters."""

    def double(self):
        return self


def _fit(which, tier, three_heaps):
    if which == "classes":
        model = seeded(M2InFloat32)
        pair, x = pgen.Pair(model, model.guide), torch.randn(12, 5, generator=torch.Generator().manual_seed(1))
    else:
        made = {"mixture": Clusters(), "bayesian": bayesian_mixture, "chain": series_model}[which]
        pair, x = pgen.Pair(made), three_heaps.reshape(-1, 6) if which == "chain" else three_heaps
    run = pair.fit(x, steps=3, batch_size=len(x) // 3, compile=tier, unroll=1, progress=False)
    assert run.tier == tier
    return torch.cat([p.detach().reshape(-1) for p in pair.parameters()])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("which", ["mixture", "bayesian", "chain", "classes"])
def test_the_tiers_agree(which, three_heaps):
    eager, graph = (_fit(which, tier, three_heaps) for tier in ("eager", "graph"))
    assert torch.equal(eager, graph)
    if which in ("bayesian", "classes"):
        torch.testing.assert_close(_fit(which, "compiled", three_heaps), eager, rtol=1e-4, atol=1e-5)
