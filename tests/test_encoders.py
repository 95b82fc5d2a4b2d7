"""Encoders: densities by other means, a posterior that is known, chained latents, files and tiers."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state
from torch import nn

import pgen
from pgen.guides import ENCODERS, FlowEncoder, FullCovarianceEncoder, GaussianEncoder, StructuredEncoder
from pgen.guides.transport import Transported, autoregressive_flow

DOUBLE = torch.float64

# --- probabilistic PCA: x = W z + 0.5 e, whose posterior precision is [[14, 4], [4, 14]] ------------------------------

W = torch.tensor([[1.0, 1.0], [1.0, -0.5], [0.5, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)
DATA = torch.randn(300, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)) @ W.T
DATA = DATA + 0.5 * torch.randn(300, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
EVIDENCE = torch.distributions.MultivariateNormal(W.new_zeros(5), W @ W.T + 0.25 * torch.eye(5, dtype=DOUBLE)).log_prob(DATA)
GAP = -0.5 * math.log(1 - (2 / 7) ** 2)  # of the best diagonal Gaussian


def ppca(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ W.to(x).T, 0.5).to_event(1), obs=x)


class Guide(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.encoder(x))


def linear(outputs):
    torch.manual_seed(3)
    network = nn.Linear(5, outputs)
    for parameter in network.parameters():
        parameter.data *= 0.1
    return network


@pytest.mark.parametrize(
    ("name", "gap", "within"), [("gaussian", GAP, 0.006), ("full_covariance", 0.0, 0.008), ("flow", 0.0, 0.008)]
)
def test_a_correlated_posterior(name, gap, within):
    pair = pgen.Pair(ppca, Guide(ENCODERS[name](linear, 2)))
    quick = {"compile": "graph", "progress": False, "precision": "float64"}
    pair.fit(DATA, steps=1000, objective=pgen.ELBO(4), optimizer=0.02, schedule="cosine", seed=1, **quick)
    draws = pair.draw(DATA, 300, seed=2)
    measured = EVIDENCE - draws.log_weight_rows.mean(0)
    assert float(measured.mean()) == pytest.approx(gap, abs=0.008 + 3 * float(measured.std()) / math.sqrt(300) * (gap > 0))
    weight = (draws.log_weight_rows - EVIDENCE).exp()  # its mean is one whatever q is: the density is exact
    assert float(weight.mean()) == pytest.approx(1.0, abs=0.01)


# --- densities --------------------------------------------------------------------------------------------------------


def encoders():
    torch.manual_seed(0)

    def make(outputs):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double()

    return {
        "gaussian": GaussianEncoder(make(6)),
        "full_covariance": FullCovarianceEncoder(make(FullCovarianceEncoder.outputs(3)), 3),
        "flow": FlowEncoder(make(FlowEncoder.outputs(3)), 3, hidden=(5,)).double(),
        "spline": FlowEncoder(make(FlowEncoder.outputs(3, 7)), 3, context=7, transforms=3, spline=True).double(),
        "one latent": FlowEncoder(make(FlowEncoder.outputs(1)), 1).double(),
    }


@pytest.mark.parametrize("name", ["gaussian", "full_covariance", "flow", "spline", "one latent"])
def test_the_density_of_a_draw_agrees_with_that_of_its_value(name):
    encoder = encoders()[name]
    for parameter in encoder.parameters():  # far from the start, where a flow is the identity
        parameter.data += 0.3 * torch.randn_like(parameter)
    q = encoder(torch.randn(7, 4, dtype=DOUBLE))
    z = q.rsample()
    assert z.shape == (7, 1 if name == "one latent" else 3) and q.log_prob(z).shape == (7,)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()), rtol=0, atol=1e-8)
    many = q.rsample((2000,))
    assert many.shape == (2000, *z.shape)
    error = 5 * many.std(0) / math.sqrt(2000)
    assert bool(((many.mean(0) - q.mean).abs() < error + 0.02 * many.std(0)).all())


def test_a_full_covariance_is_the_multivariate_normal():
    encoder = encoders()["full_covariance"]
    q = encoder(torch.randn(7, 4, dtype=DOUBLE))
    root = q.lower + torch.diag_embed(q.scale)
    assert bool((root.triu(1) == 0).all()) and bool((root.tril(-1) != 0).any())
    z = torch.randn(7, 3, dtype=DOUBLE)
    torch.testing.assert_close(q.log_prob(z), torch.distributions.MultivariateNormal(q.loc, scale_tril=root).log_prob(z))
    wide = q.expand((2, 7))
    assert wide.rsample().shape == (2, 7, 3)
    torch.testing.assert_close(wide.log_prob(z.expand(2, 7, 3)), q.log_prob(z).expand(2, 7))


def test_a_flow_integrates_to_one():
    torch.manual_seed(1)
    bend = autoregressive_flow(2, 2, (6,)).double()
    for parameter in bend.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    q = Transported(torch.zeros(2, dtype=DOUBLE), torch.tensor([0.5, 1.0], dtype=DOUBLE), bend=bend.transform())
    line = torch.linspace(-14, 14, 561, dtype=DOUBLE)
    grid = torch.cartesian_prod(line, line)
    assert float(q.log_prob(grid).exp().sum().detach()) * 0.05**2 == pytest.approx(1.0, abs=1e-3)


def test_a_flow_encoder_refuses_many_latents():
    with pytest.raises(ValueError, match="`latent_dim` of a flow encoder should be at most 512, got 513"):
        FlowEncoder(nn.Linear(3, FlowEncoder.outputs(513)), 513)


# --- chained latents --------------------------------------------------------------------------------------------------


def chain(x):
    """z2 -> z1 -> x; the posterior of (z1, z2) is one correlated Gaussian."""
    with pyro.plate("data", len(x)):
        z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        z1 = pyro.sample("z1", dist.Normal(z2.expand(*z2.shape[:-1], 2), 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z1, 0.7).to_event(1), obs=x)


class Chained(nn.Module):
    def __init__(self, structured):
        super().__init__()
        torch.manual_seed(4)
        first = FullCovarianceEncoder(nn.Linear(2, FullCovarianceEncoder.outputs(2)), 2)
        self.structured = StructuredEncoder({"z1": first, "z2": GaussianEncoder(nn.Linear(4, 2))})
        self.apart = GaussianEncoder(nn.Linear(2, 2))
        self.is_structured = structured
        for parameter in self.parameters():  # unit scales: a wild start leaves Adam small steps for long
            parameter.data *= 0.1

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.is_structured:
                self.structured(x)
            else:
                pyro.sample("z1", self.structured.parts[0](x))
                pyro.sample("z2", self.apart(x))


def test_latents_that_see_the_earlier_ones_close_the_gap():
    generator = torch.Generator().manual_seed(5)
    covariance = torch.ones(2, 2, dtype=DOUBLE) + (0.25 + 0.49) * torch.eye(2, dtype=DOUBLE)
    exact = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=DOUBLE), covariance)
    x = torch.randn(200, 2, dtype=DOUBLE, generator=generator) @ torch.linalg.cholesky(covariance).T
    gaps = {}
    for structured in (True, False):
        pair = pgen.Pair(chain, Chained(structured))
        pair.fit(x, steps=1200, objective=pgen.ELBO(4), optimizer=0.02, schedule="cosine", compile="graph", progress=False,
                 precision="float64")  # fmt: skip
        gaps[structured] = float((exact.log_prob(x) - pair.draw(x, 200, seed=1).log_weight_rows.mean(0)).mean())
    # the best independent z1 and z2: half the log-determinant that their correlation takes away
    assert abs(gaps[True]) < 0.004 and gaps[False] > 0.2


def test_a_structured_encoder_wants_parts():
    with pytest.raises(ValueError, match="`parts` is empty"):
        StructuredEncoder({})


# --- the VAE ----------------------------------------------------------------------------------------------------------

X = (torch.rand(23, 3, 2, generator=torch.Generator().manual_seed(6)) < 0.4).float()


def small(name):
    return pgen.models.VAE((3, 2), latent_dim=3, hidden=(7,), encoder=name)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_vae_with_each_encoder_saves_loads_and_agrees_between_tiers(name, tmp_path):
    eager, graph = small(name), small(name)
    for vae, tier in ((eager, "eager"), (graph, "graph")):
        run = vae.fit(X, steps=9, batch_size=5, compile=tier, progress=False, seed=2)
        assert run.tier == tier
    assert torch.equal(state(eager), state(graph))
    eager.save(tmp_path / "vae.pgen")
    again = pgen.load(tmp_path / "vae.pgen")
    assert again.encoder_name == name and torch.equal(again.log_prob(X).value, eager.log_prob(X).value)
    assert again.encode(X).shape == (23, 3) and again.reconstruct(X).shape == X.shape
    iwae = eager.fit(X, steps=3, objective=pgen.IWAE(4), batch_size=5, compile="graph", progress=False)
    assert math.isfinite(iwae.bound)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
def test_the_compiled_tier_agrees_on_a_flow():
    graph, compiled = small("flow"), small("flow")
    for vae, tier in ((graph, "graph"), (compiled, "compiled")):
        run = vae.fit(X, steps=6, batch_size=12, compile=tier, unroll=1, progress=False, seed=2)
        assert run.tier == tier
    torch.testing.assert_close(state(graph), state(compiled), rtol=1e-4, atol=1e-5)


def test_names_of_encoders_are_checked():
    with pytest.raises(ValueError, match="`encoder` is 'full', which is unknown"):
        small("full")
