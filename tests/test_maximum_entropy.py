"""Maximum entropy: known distributions recovered from their moments, moments matched, the infeasible refused."""

import itertools
import math

import pytest
import torch
from pyro.distributions.testing.gof import density_goodness_of_fit, multinomial_goodness_of_fit, vector_density_goodness_of_fit
from torch.distributions import Beta, Exponential, Gamma, Geometric, MultivariateNormal, Normal, Poisson, VonMises

import pgen
from pgen.models import MaximumEntropy


def matched(moments, *args, **options):
    model = MaximumEntropy(*args, **options).double()
    model.match(moments)
    return model


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def digamma(x):
    return float(torch.digamma(torch.tensor(x, dtype=torch.float64)))


def double(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


KNOWN = {
    "uniform": (lambda: matched([0.5], (1,), ["x"], "unit"), lambda x: torch.zeros_like(x), (0.1, 0.5, 0.99)),
    "exponential": (lambda: matched([2.5], (1,), ["x"], "positive"), Exponential(*double(0.4)).log_prob, (0.01, 1.0, 20.0)),
    "exponential to the left": (
        lambda: matched([-1.5], (1,), ["x"], (None, 1.0)), lambda x: Exponential(*double(0.4)).log_prob(1 - x), (0.9, -20.0)
    ),
    "gaussian": (
        lambda: matched([3.0, 9.25], (1,), ["x", "x^2"]), Normal(*double(3.0, 0.5)).log_prob, (1.0, 3.0, 4.5)
    ),
    "gaussian far away": (
        lambda: matched([1000.0, 1000.0**2 + 0.01], (1,), ["x", "x^2"]), Normal(*double(1000.0, 0.1)).log_prob, (999.9, 1000.2)
    ),
    "gamma": (
        lambda: matched([1.5, digamma(3.0) - math.log(2.0)], (1,), ["x", "log x"], "positive"),
        Gamma(*double(3.0, 2.0)).log_prob, (0.1, 1.5, 6.0),
    ),
    "gamma with a pole": (
        lambda: matched([0.3, digamma(0.3)], (1,), ["x", "log x"], "positive"), Gamma(*double(0.3, 1.0)).log_prob, (1e-6, 5.0)
    ),
    "beta": (
        lambda: matched([digamma(2.0) - digamma(5.0), digamma(3.0) - digamma(5.0)], (1,), ["log x", "log(1-x)"], "unit"),
        Beta(*double(2.0, 3.0)).log_prob, (0.02, 0.5, 0.95),
    ),
    "laplace": (lambda: matched([2.0], (1,), ["|x|"], edges=[0.0]), lambda x: -x.abs() / 2 - math.log(4), (-3.0, 0.2, 9.0)),
    "cauchy": (
        lambda: matched([math.log(4)], (1,), ["log(1+x^2)"]), lambda x: -torch.log1p(x**2) - math.log(math.pi), (-50.0, 3.0)
    ),
    "von mises": (
        lambda: matched([0.44639, 0.0], (1,), ["cos x", "sin x"], (-math.pi, math.pi)), VonMises(*double(0.0, 1.0)).log_prob,
        (-3.0, 2.0),
    ),
    "poisson": (
        lambda: matched([3.5], (1,), ["x"], values=range(80), base="1/x!"), Poisson(*double(3.5)).log_prob, (0.0, 3.0, 12.0)
    ),
    "geometric": (lambda: matched([4.0], (1,), ["x"], values=range(500)), Geometric(*double(0.2)).log_prob, (0.0, 7.0, 30.0)),
    "histogram": (
        lambda: matched([0.2, 0.3], (1,), [("indicator", 0.0, 0.25), ("indicator", 0.25, 0.5)], "unit"),
        lambda x: torch.where(x < 0.25, math.log(0.8), torch.where(x < 0.5, math.log(1.2), 0.0)).double(), (0.1, 0.3, 0.9),
    ),
    "normal base": (lambda: matched([0.7], (1,), ["x"], base="exp(-x^2/2)"), Normal(*double(0.7, 1.0)).log_prob, (-2.0, 1.0)),
}  # fmt: skip
CLOSE = {"von mises": 1e-4, "cauchy": 1e-6, "gaussian far away": 1e-6}  # moments to five digits; tails cut; 1e6 - 1e6


@pytest.mark.parametrize("name", KNOWN)
def test_known_distributions_are_those_of_largest_entropy(name):
    make, known, at = KNOWN[name]
    model, x = make(), column(*at)
    score = model.log_prob(x)
    assert score.kind == "exact"
    torch.testing.assert_close(score.value, known(x)[:, 0], atol=CLOSE.get(name, 1e-8), rtol=0)
    assert model.quadrature_error() < 1e-8


def test_bernoulli_and_dice():
    coin = matched([0.3], (1,), ["x"], values=(0, 1))
    torch.testing.assert_close(coin.log_prob(column(0, 1)).value.exp(), column(0.7, 0.3)[:, 0])
    assert coin.multipliers["x"] == pytest.approx(math.log(3 / 7))
    assert coin.entropy() == pytest.approx(-0.3 * math.log(0.3) - 0.7 * math.log(0.7))
    fair = matched([3.5], (1,), ["x"], values=range(1, 7))
    assert fair.entropy() == pytest.approx(math.log(6))


def test_ising_couplings_are_recovered_from_its_moments():
    states = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    fields = torch.tensor([0.3, -0.2, 0.0, 0.5], dtype=torch.float64)
    couplings = torch.tensor([0.4, 0.0, -0.7, 0.2, 0.1, 0.6], dtype=torch.float64)
    first, second = torch.triu_indices(4, 4, 1)
    statistics = torch.cat([states, states[:, first] * states[:, second]], 1)
    log_p = torch.log_softmax(statistics @ torch.cat([fields, couplings]), 0)
    model = matched((log_p.exp() @ statistics).tolist(), (2, 2), ["x", "pairs"], values=(-1, 1))
    torch.testing.assert_close(torch.tensor(list(model.multipliers.values())).double(), torch.cat([fields, couplings]))
    torch.testing.assert_close(model.log_prob(states.reshape(-1, 2, 2)).value, log_p)


def test_a_plane_of_second_moments_is_gaussian():
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    model = matched([0.0, 1.0, 2.0, 1.5, 0.6], (2,), ["x", "x^2", "pairs"])
    x = torch.tensor([[0.5, 1.0], [-2.0, 0.2]], dtype=torch.float64)
    known = MultivariateNormal(torch.tensor([0.0, 1.0], dtype=torch.float64), covariance)
    torch.testing.assert_close(model.log_prob(x).value, known.log_prob(x), atol=1e-6, rtol=0)
    draws = model.sample(4000, seed=1)
    assert vector_density_goodness_of_fit(draws, known.log_prob(draws).exp()) > 1e-4


def test_three_numbers_on_the_line_are_gaussian():
    mean, factor = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.3, 0.9]])
    covariance = (factor @ factor.T).double()
    moments = covariance + torch.outer(mean, mean)
    pairs = [moments[0, 1], moments[0, 2], moments[1, 2]]
    model = MaximumEntropy((3,), ["x", "x^2", "pairs"]).double()
    model.match([*mean.tolist(), *moments.diagonal().tolist(), *map(float, pairs)])
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]], dtype=torch.float64)
    wanted = MultivariateNormal(mean.double(), covariance).log_prob(x)
    torch.testing.assert_close(model.log_prob(x).value, wanted, rtol=0, atol=1e-4)


def test_the_law_of_four_moments_has_the_largest_entropy():
    """Any other density with the same moments, here a mixture of two Gaussians, has less."""
    component = Normal(torch.tensor([-1.0, 1.0], dtype=torch.float64), 0.5)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    log_p = component.log_prob(x[:, None]).logsumexp(1) - math.log(2)
    weights = log_p.exp() * float(x[1] - x[0])
    model = matched([float(weights @ x**k) for k in (1, 2, 3, 4)], (1,), ["x", "x^2", "x^3", "x^4"])
    assert list(model.moments().values()) == pytest.approx([0.0, 1.25, 0.0, 1 + 6 / 4 + 3 / 16], abs=1e-8)
    assert 0.01 < model.entropy() + float(weights @ log_p) < 0.1


# --- data ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_mean_of_zero_without_a_second_moment_is_found(scale):
    laplace = MaximumEntropy((1,), ["x", "|x|"])
    laplace.match([0.0, scale])
    assert laplace.entropy() == pytest.approx(1 + math.log(2 * scale), abs=1e-4)


def test_data_of_which_most_are_zero_are_found():
    x = torch.cat([torch.zeros(60, 1), torch.linspace(1, 3, 40)[:, None]])
    exponential = MaximumEntropy((1,), ["x"], domain="positive")
    exponential.fit(x, progress=False)
    assert exponential.entropy() == pytest.approx(1 + math.log(float(x.mean())), abs=1e-6)


def test_fit_matches_the_moments_of_the_data_and_svi_agrees():
    generator = torch.Generator().manual_seed(0)
    x = -(torch.rand(300, 2, generator=generator, dtype=torch.float64).log().sum(1, keepdim=True))  # gamma, shape 2
    model = MaximumEntropy((1,), ["x", "log x"], "positive")
    run = model.fit(x, precision="float64")
    assert "Newton" in run.stopped and run.steps == 0
    assert list(model.moments().values()) == pytest.approx([float(x.mean()), float(x.log().mean())], abs=1e-9)
    best = model.log_prob(x).mean
    climbed = MaximumEntropy((1,), ["x", "log x"], "positive")
    climbed.primed = True
    with torch.no_grad():
        climbed.natural.copy_(torch.tensor([-1.0, 0.0]))  # Exp(1)
    climbed.fit(x, precision="float64", steps=500, batch_size=300, optimizer=0.05, schedule="cosine", progress=False)
    assert best - 1e-3 < climbed.log_prob(x).mean <= best + 1e-9


def test_functions_of_ones_own_serve_and_are_not_saved(tmp_path):
    def radius(x):
        return x.square().sum(1)

    model = matched({"radius": 2.0}, (2,), [radius])
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert float(model.log_prob(x).value) == pytest.approx(-1.0 - math.log(2 * math.pi), abs=1e-7)  # the standard normal
    with pytest.raises(ValueError, match="radius is a function of your own, which no file can hold"):
        model.save(tmp_path / "model.pgen")


def test_named_features_are_saved(tmp_path):
    model = matched([0.4, 0.3], (1,), ["x", ("indicator", 0.2, 0.5)], (0.0, 1.0))
    model.save(tmp_path / "model.pgen")
    again = pgen.load(tmp_path / "model.pgen")
    x = column(0.1, 0.3, 0.7)
    assert torch.equal(again.log_prob(x).value, model.log_prob(x).value)
    half = matched([3.0], (1,), ["x"], (2.0, None))
    half.save(tmp_path / "half.pgen")
    assert torch.equal(pgen.load(tmp_path / "half.pgen").sample(3, seed=1), half.sample(3, seed=1))


@pytest.mark.parametrize("name", ["exponential", "gaussian far away", "gamma", "beta", "laplace", "histogram", "cauchy"])
def test_samples_agree_with_the_density(name):
    make, known, _ = KNOWN[name]
    x = make().sample(4000, seed=2)
    assert density_goodness_of_fit(x[:, 0], known(x)[:, 0].exp()) > 1e-4


def test_samples_of_a_finite_domain_agree_with_the_masses():
    model = matched([4.5], (1,), ["x"], values=range(1, 7))
    counts = torch.bincount(model.sample(5000, seed=3)[:, 0].long() - 1, minlength=6)
    mass = model.log_prob(column(1, 2, 3, 4, 5, 6)).value.exp()
    assert multinomial_goodness_of_fit(mass, counts, total_count=5000) > 1e-4


# --- what cannot be ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moments", "args", "options", "message"),
    [
        ([7.0], ((1,), ["x"]), {"values": range(1, 7)}, r"E\[x\] = 7, which lies outside the ends of its range \(1, 6\)"),
        ([1.0], ((1,), ["x"]), {"values": (0, 1)}, r"E\[x\] = 1, which is one of the ends of its range \(0, 1\)"),
        ([0.5, 0.2], ((1,), ["x", "x^2"], "unit"), {}, r"has E\[x\] = 0.5, E\[x\^2\] = 0.2 together; correct"),
        ([2.0, 3.0], ((1,), ["x", "x^2"]), {}, "no distribution that covers the domain"),
        ([0.0, 1.0, 0.5], ((1,), ["x", "x^2", "x^3"]), {}, "do not bound (its|the) tails"),
        ([1.0], ((1,), ["x"]), {}, r"has E\[x\] = 1, or the features do not bound its tails; correct the moments"),
        ([0.5, 0.25 + 1e-5], ((1,), ["x", "x^2"], "unit"), {}, "too narrow for the quadrature"),
        ({"y": 1.0}, ((1,), ["x"]), {}, "`moments` should name x; 'y' is none of them"),
        ([1.0, 2.0], ((1,), ["x"]), {}, "`moments` has 2 numbers for 1 features"),
    ],
)  # fmt: skip
def test_infeasible_moments_are_refused_in_one_line(moments, args, options, message):
    with pytest.raises(ValueError, match=message) as error:
        matched(moments, *args, **options)
    assert "\n" not in str(error.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`features` names 'x\^5', which is unknown; did you mean 'x\^"):
        MaximumEntropy((1,), ["x^5"])
    with pytest.raises(ValueError, match="an interval serves x of 3 numbers or fewer, got 4"):
        MaximumEntropy((4,))
    with pytest.raises(ValueError, match="`domain` and `values` are both given"):
        MaximumEntropy((1,), ["x"], "unit", values=(0, 1))
    with pytest.raises(ValueError, match=r"`domain` should be \(low, high\) with low < high"):
        MaximumEntropy((1,), ["x"], (1.0, 0.0))
    with pytest.raises(ValueError, match=r"feature '<lambda>' should give shape \(N,\) or \(N, K\) for N = 2 data, got \(\)"):
        MaximumEntropy((1,), [lambda x: x.sum()])
    with pytest.raises(ValueError, match=r"feature 'log x' of data row 1 is -inf"):
        MaximumEntropy((1,), ["log x"], "positive").fit(column(1.0, 0.0))
    with pytest.raises(ValueError, match=r"outside the support the interval from 0 to 1"):
        MaximumEntropy((1,), ["x"], "unit").fit(column(0.5, 2.0))


def test_large_numbers_with_small_differences_are_no_problem_in_single_precision():
    x = 1e5 + column(*range(9))
    model, known = MaximumEntropy((1,)), pgen.models.Gaussian((1,))
    model.fit(x)
    known.fit(x)
    assert model.log_prob(x).mean == pytest.approx(known.log_prob(x).mean, abs=1e-4)
