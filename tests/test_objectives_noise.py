"""The signal-to-noise ratio of gradients, for comparing estimators."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import X_KNOWN, W, gaussian_model, seeded
from torch import nn

import pgen
from pgen import ELBO, IWAE
from pgen.diagnostics import gradient_snr
from pgen.objectives import DReG, Linear
from pgen.programs import keyed_rng


def pair():
    """The linear-Gaussian model with a guide a little away from the best."""
    network = seeded(lambda: nn.Linear(5, 2)).double()
    with torch.no_grad():
        network.weight.copy_(torch.linalg.solve(W.T @ W + 0.25 * torch.eye(2, dtype=torch.float64), W.T) + 0.02)
        network.bias.fill_(0.05)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), math.sqrt(1 / 12)).to_event(1))

    made = pgen.Pair(gaussian_model, guide)
    made.fit(X_KNOWN, steps=1, optimizer=1e-12, progress=False, compile="eager", precision="float64")
    return made


def test_an_encoders_signal_drowns_in_samples_unless_doubly_reparameterised():
    made, ratio = pair(), {}
    for objective in (IWAE(1), IWAE(64), DReG(1), DReG(64)):
        measured = gradient_snr(made, X_KNOWN, objective, num_repeats=600)
        ratio[objective] = sum(measured.tensors.values())
    assert ratio[IWAE(64)] / ratio[IWAE(1)] < 0.4  # 1 / 8 in the limit
    assert ratio[DReG(64)] / ratio[DReG(1)] > 1.0


def test_the_ratio_of_a_known_gradient():
    """The loss of a draw is (loc + noise)^2 / 2 up to constants: its gradient has mean loc and standard deviation one."""

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.5))

        def forward(self, y):
            pyro.sample("z", dist.Normal(self.loc, 1.0))

    made = pgen.Pair(lambda y: pyro.sample("z", dist.Normal(0.0, 1.0)), Guide())
    y = torch.zeros(1)
    made.fit(y, steps=1, optimizer=1e-12, progress=False, compile="eager", precision="float64")
    state = torch.get_rng_state()
    measured = gradient_snr(made, y, ELBO(kl_weight=Linear(0, 1)), num_repeats=2000, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    (name,) = measured.snr
    assert name == "_guide.loc" and measured.snr[name].shape == ()
    assert float(measured.mean[name]) == pytest.approx(0.5, abs=4 / math.sqrt(2000))
    assert float(measured.sd[name]) == pytest.approx(1.0, rel=0.08)
    assert measured.tensors[name] == pytest.approx(0.5, abs=0.12)
    assert "_guide.loc: 0." in str(measured)
    same = gradient_snr(made, y, ELBO(), num_repeats=2000, seed=3)
    assert torch.equal(same.mean[name], measured.mean[name])


def test_a_family_with_context_can_be_measured():
    vae = pgen.models.VAE((2, 3), 2, (4,), likelihood="gaussian", context_dim=5, seed=0)
    with keyed_rng(0):
        x, context = torch.randn(7, 2, 3), torch.randn(7, 5)
    measured = gradient_snr(vae, {"x": x, "context": context}, num_repeats=4)
    assert set(measured.tensors) == {name for name, _ in vae.named_parameters()}


@pytest.mark.parametrize("bad", [0, 1, 2.5])
def test_repeats_are_checked(bad):
    with pytest.raises(ValueError, match="`num_repeats` should be"):
        gradient_snr(pair(), X_KNOWN, num_repeats=bad)
