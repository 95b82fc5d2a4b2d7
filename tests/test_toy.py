"""Toy targets: their densities integrate to one, their samples agree, their entropies are the known ones."""

import math

import pytest
import torch
from pyro.distributions.testing.gof import multinomial_goodness_of_fit, vector_density_goodness_of_fit

import pgen
from pgen.data import toy

SMALL = {**toy.TOYS, "funnel": lambda: toy.funnel(3, sd=1.0), "banana": lambda: toy.banana(4)}
PLANAR = [name for name in toy.TOYS if name not in ("funnel", "banana", "checkerboard")]
ENTROPY = {
    "eight_gaussians": (2.838, 7e-3),  # which leaves the overlaps out,
    "two_moons": (1.004, 5e-3),
    "checkerboard": (math.log(32), 1e-12),
    "gaussian_grid": (0.0653, 1e-4),
    "gaussian_ring": (-4.2930, 1e-4),
    "rings": (2.624, 1e-3),
    "circles": (3.272, 5e-3),
    "two_spirals": (2.638, 8e-3),
    "funnel": (15.288, 1e-3),
    "banana": (2.1447, 1e-4),
}
"""Nats, by closed form or Monte Carlo elsewhere, and their precision."""


@pytest.mark.parametrize("name", SMALL)
def test_samples_are_keyed_and_leave_the_global_state_alone(name):
    target = SMALL[name]()
    before = torch.get_rng_state()
    x = target.sample(7, seed=1)
    assert x.shape == (7, target.dim) and x.dtype == torch.get_default_dtype()
    assert torch.equal(x, target.sample(7, seed=1)) and not torch.equal(x, target.sample(7, seed=2))
    assert torch.equal(torch.get_rng_state(), before)
    assert target.log_prob(x).dtype == torch.float64 and bool(target.log_prob(x).isfinite().all())


@pytest.mark.parametrize("name", [name for name in SMALL if name != "checkerboard"])  # whose edges no neighbour knows
def test_samples_agree_with_the_density(name):
    target = SMALL[name]()
    x = target.sample(1501 * target.dim, seed=3)
    assert vector_density_goodness_of_fit(x.double(), target.log_prob(x).exp()) > 1e-4  # the share of right targets that fail


@pytest.mark.parametrize("name", PLANAR)
def test_a_density_in_the_plane_integrates_to_one(name):
    target = toy.TOYS[name]()
    step, half = 0.71 * target.noise, target.reach + 8 * target.noise
    axis = torch.arange(-half, half, step, dtype=torch.float64)
    mass = sum(target.log_prob(torch.cartesian_prod(row, axis)).exp().sum() for row in axis.split(64))
    assert float(mass) * step**2 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("target", [toy.funnel(2, sd=1.3), toy.banana(2)], ids=["funnel", "banana"])
def test_a_density_with_a_conditional_integrates_to_one(target):
    first = torch.arange(-8, 8, 0.1, dtype=torch.float64)
    scale = (first / 2).exp() if isinstance(target, toy._Funnel) else torch.full_like(first, 0.5)
    centre = torch.zeros_like(first) if isinstance(target, toy._Funnel) else first.square()
    z = torch.arange(-9, 9, 0.1, dtype=torch.float64)
    x = torch.stack([first[:, None].expand(-1, len(z)), centre[:, None] + scale[:, None] * z], -1)
    mass = (target.log_prob(x.reshape(-1, 2)).exp().reshape(len(first), -1).sum(1) * scale).sum() * 0.01
    assert float(mass) == pytest.approx(1, abs=1e-9)


def test_the_checkerboard_fills_its_dark_squares_evenly():
    target = toy.checkerboard()
    x = target.sample(6000, seed=5)
    cells = torch.cartesian_prod(torch.arange(-3.5, 4), torch.arange(-3.5, 4))
    mass = target.log_prob(cells).exp()
    assert float(mass.sum()) == pytest.approx(1)
    counts = torch.bincount(((x[:, 0].floor() + 4) * 8 + x[:, 1].floor() + 4).long(), minlength=64)
    assert bool((counts[mass == 0] == 0).all())
    assert multinomial_goodness_of_fit(mass[mass > 0], counts[mass > 0], total_count=6000) > 1e-4
    assert float(target.log_prob(torch.tensor([[4.5, 0.5]]))) == -math.inf


@pytest.mark.parametrize("name", ENTROPY)
def test_entropies_are_the_known_ones(name):
    known, precision = ENTROPY[name]
    assert toy.TOYS[name]().entropy == pytest.approx(known, abs=precision)


def test_entropy_of_moons_of_another_noise():
    assert toy.two_moons(0.05).entropy == pytest.approx(0.291, abs=2e-3)


@pytest.mark.parametrize("name", SMALL)
def test_entropy_is_minus_the_mean_log_density(name):
    target = SMALL[name]()
    log_p = target.log_prob(target.sample(4000, seed=6))
    assert float(log_p.mean()) == pytest.approx(-target.entropy, abs=4.5 * float(log_p.std()) / math.sqrt(4000) + 1e-6)


def test_quadrature_along_a_curve_agrees_with_a_much_finer_one():
    target = toy.two_moons(0.1)
    fine = toy.two_moons(0.01)  # ten times the nodes
    fine.noise = 0.1
    x = torch.tensor([[0.0, 1.0], [0.3, -1.5], [-2.0, 0.5], [1.9, 0.9], [0.5, 0.25]])
    torch.testing.assert_close(target.log_prob(x), fine.log_prob(x), rtol=0, atol=1e-9)


def test_a_ring_agrees_with_the_curve_it_is():
    rings, angle = toy.circles(0.3), torch.arange(0, 2 * math.pi, 2 * math.pi / 400, dtype=torch.float64)
    points = torch.cat([r * torch.stack([angle.cos(), angle.sin()], -1) for r in (1.5, 3.0)])
    x = torch.tensor([[0.0, 0.1], [1.5, 0.2], [-2.0, 2.5]], dtype=torch.float64)
    brute = torch.distributions.Normal(points, 0.3).log_prob(x[:, None]).sum(-1).exp().mean(1).log()
    torch.testing.assert_close(rings.log_prob(x), brute, rtol=0, atol=1e-9)


def test_log_densities_have_gradients():
    x = torch.tensor([[0.4, 0.3]], dtype=torch.float64, requires_grad=True)
    for name in ("two_moons", "two_spirals", "rings", "eight_gaussians"):
        (slope,) = torch.autograd.grad(toy.TOYS[name]().log_prob(x).sum(), x)
        assert bool(slope.isfinite().all()) and bool(slope.abs().max() > 0)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`x` should have shape \(N, 2\), got \(2, 3\); did you mean x.T"):
        toy.two_moons().log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="`noise` should be a positive number, got 0"):
        toy.two_moons(noise=0)
    with pytest.raises(ValueError, match="`dim` should be even"):
        toy.banana(3)
    with pytest.raises(ValueError, match="`dim` should be at least 2"):
        toy.funnel(1)
    assert pgen.data.toy is toy
