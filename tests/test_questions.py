"""Questions whose answers are known."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pgen
from pgen.models import VAE


def regression(x, y=None):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(x)):
        pyro.deterministic("line", b * x)
        pyro.sample("y", dist.Normal(b * x, 0.1), obs=y)


@pytest.fixture(scope="module")
def fitted():
    x = torch.linspace(-1.0, 2.0, 20)
    pair = pgen.Pair(regression)
    pair.fit({"x": x, "y": 3 * x}, steps=600, progress=False)
    return pair


def test_predict_at_new_inputs_without_the_observed_argument(fitted):
    new = torch.tensor([-2.0, 0.0, 5.0])
    out = fitted.predict({"x": new}, 2000, seed=1)
    assert set(out) == {"y"} and out["y"].shape == (2000, 3)
    torch.testing.assert_close(out["y"].mean(0), 3 * new, rtol=0, atol=0.1)
    assert float(out["y"][:, 1].std()) == pytest.approx(0.1, rel=0.1)


def test_sample_draws_latents_from_the_prior_and_returns_data_alone(fitted):
    x = torch.tensor([1.0, 2.0])
    for data in ({"x": x}, {"x": x, "y": 3 * x}):
        out = fitted.sample(4000, data, seed=2)
        assert set(out) == {"y"} and out["y"].shape == (4000, 2)
        assert float(out["y"][:, 0].std()) == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("likelihood", [{"likelihood": "bernoulli"}, {"likelihood": "categorical", "num_classes": 5}, {}])
def test_reconstruct_is_decode_of_encode(likelihood):
    x = torch.randint(0, likelihood.get("num_classes", 2), (9, 2, 3)).float()
    vae = VAE((2, 3), 4, (7,), **likelihood)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x)))


def test_the_mean_of_categories_is_the_mean_of_their_numbers():
    vae = VAE((3,), 2, (5,), likelihood="categorical", num_classes=4)
    z = torch.zeros(20_000, 2)
    probs = vae.observation.distribution(vae.decoder(z[:1])).base_dist.probs[0]
    torch.testing.assert_close(vae.decode(z[:1])[0], (probs * torch.arange(4)).sum(-1))


def test_decode_is_in_the_units_of_the_data():
    x = 100 + 5 * torch.randn(50, 3)
    vae = VAE((3,), 2, (5,), likelihood="gaussian", preprocess=pgen.data.Standardize())
    vae.fit(x, steps=3, progress=False)
    assert float((vae.decode(torch.zeros(1, 2)) - 100).abs().max()) < 10
