"""Normalizing flows: maps, their inverses and log-determinants, and what a flow refuses."""

import math

import numpy as np
import pytest
import torch
from cases import seeded

import pgen
from pgen.data import Dequantize, flow_set
from pgen.data.toy import gaussian_grid
from pgen.distributions.flows import TRANSFORMS, ActNorm, Bijection, Chain, DeepSigmoid, FlowDistribution, bijection
from pgen.models import VAE, Flow, Glow
from pgen.models.glow import MultiScale

SIZE, ROWS, CONTEXT = 4, 3, 2


def maps(transform, size=SIZE, context=0, **options):
    """A chain far from the identity, in float64."""
    chain = seeded(lambda: bijection(transform, size, 2, (7,), context=context, bins=5, **options)).double()
    with torch.no_grad():
        for p in chain.parameters():
            p += 0.3 * seeded(lambda p=p: torch.randn(p.shape, dtype=p.dtype), seed=4)
    return chain.eval()


def points(scale=2.0, size=SIZE):
    return seeded(lambda: scale * torch.randn(ROWS, size, dtype=torch.float64), seed=1)


def jacobian(chain, x, context):
    return torch.stack(
        [
            torch.autograd.functional.jacobian(
                lambda v, i=i: chain(v[None], None if context is None else context[i : i + 1])[0][0], x[i]
            )
            for i in range(len(x))
        ]
    )


VARIANTS = [(transform, {}) for transform in TRANSFORMS] + [
    ("spline_autoregressive", {"permutation": "random"}),
    ("affine_coupling", {"permutation": "lu"}),
]


@pytest.mark.parametrize("context_dim", [0, CONTEXT], ids=["plain", "context"])
@pytest.mark.parametrize(("transform", "options"), VARIANTS, ids=[f"{t} {' '.join(o.values())}" for t, o in VARIANTS])
def test_log_determinants_are_those_of_the_jacobian_and_inverses_find_back(transform, options, context_dim):
    chain, x = maps(transform, context=context_dim, **options), points()
    context = seeded(lambda: torch.randn(ROWS, context_dim, dtype=torch.float64)) if context_dim else None
    z, log_det = chain(x, context)
    exact = jacobian(chain, x, context).det().abs().log()
    # The determinant of a Runge-Kutta map is the integral of the divergence up to its order.
    torch.testing.assert_close(log_det, exact, rtol=0, atol=2e-3 if transform == "continuous" else 1e-8)
    assert bool(((z - x).abs() > 0.1).any())
    torch.testing.assert_close(chain.inverse(z, context), x, rtol=0, atol=1e-3 if transform == "continuous" else 1e-6)


def test_a_continuous_flow_converges_with_its_steps_at_the_fourth_order():
    x, errors = points(0.7), []
    for steps in (8, 16):
        chain = maps("continuous")
        for part in chain.parts:
            part.steps = steps
        z, log_det = chain(x)
        exact = jacobian(chain, x, None).det().abs().log()
        errors.append(torch.stack([(chain.inverse(z) - x).abs().max(), (log_det - exact).abs().max()]).detach())
    assert bool(((errors[0] / errors[1]).log2() > 3.8).all())


@pytest.mark.parametrize("kind", ["affine", "spline", "neural"])
def test_an_autoregressive_map_has_a_triangular_jacobian(kind):
    chain = seeded(lambda: bijection(f"{kind}_autoregressive", SIZE, 1, (9,))).double()
    found = jacobian(chain, points(), None)
    assert bool((found.triu(1) == 0).all()) and bool((found.tril() != 0).float().mean() > 0.6)
    assert bool((found.diagonal(dim1=1, dim2=2) > 0).all())


def test_a_coupling_changes_the_first_half_by_itself():
    found = jacobian(seeded(lambda: bijection("affine_coupling", SIZE, 1, (9,))).double(), points(), None)
    half = SIZE // 2
    assert bool((found[:, :half, half:] == 0).all()) and bool((found[:, half:, :half] != 0).all())
    assert all(bool((block - torch.diag_embed(block.diagonal(dim1=1, dim2=2)) == 0).all())
               for block in (found[:, :half, :half], found[:, half:, half:]))  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_map_of_one_number_works(transform):
    chain, x = maps(transform, size=1), points(size=1)
    z, log_det = chain(x)
    assert log_det.shape == (ROWS,)
    torch.testing.assert_close(chain.inverse(z), x, rtol=0, atol=1e-3)


def test_far_from_the_data_every_map_is_finite_and_comes_back():
    for transform in TRANSFORMS[:-1]:
        chain, x = maps(transform), points(300.0)
        z, log_det = chain(x)
        assert bool(torch.isfinite(z).all()) and bool(torch.isfinite(log_det).all())
        torch.testing.assert_close(chain.inverse(z), x, rtol=1e-6, atol=1e-6)


def test_a_deep_sigmoid_with_equal_slopes_and_shifts_is_affine():
    zero = torch.zeros(2, 3, dtype=torch.float64)
    x, slope = points(size=2)[:2], math.exp(1.2 / (1 + 1.2 / 5))
    y, log_slope = DeepSigmoid(zero, zero + 1.2, zero + torch.tensor([8 / 3, 0.0, -8 / 3])).call_and_ladj(x)
    torch.testing.assert_close(y, slope * x)
    torch.testing.assert_close(log_slope, torch.full_like(x, math.log(slope)))


def test_actnorm_starts_at_zero_mean_and_unit_variance():
    x = seeded(lambda: torch.randn(50, 3, 4, 5, dtype=torch.float64) * torch.tensor([1.0, 2.0, 5.0])[:, None, None] + 7)
    norm = ActNorm((3, 1, 1), 20).double()
    z = norm.start(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(norm(x)[1], -20 * norm.log_scale.sum().expand(50))


def test_a_flow_distribution_expands_over_its_context():
    chain = maps("affine_autoregressive", context=CONTEXT)
    base = torch.distributions.Normal(torch.zeros(SIZE, dtype=torch.float64), 1.0)
    context = seeded(lambda: torch.randn(5, CONTEXT, dtype=torch.float64))
    fn = FlowDistribution(chain, pgen.models.flow.dist.Independent(base, 1), context)
    wide = fn.expand((6, 5))
    assert fn.batch_shape == (5,) and wide.batch_shape == (6, 5) and wide.event_shape == (SIZE,)
    x = wide.rsample()
    assert x.shape == (6, 5, SIZE)
    torch.testing.assert_close(wide.log_prob(x)[2], fn.log_prob(x[2]))


def test_an_empty_chain_leaves_the_base():
    class Shift(Bijection):
        def forward(self, x, context=None):
            return x - 1, torch.zeros_like(x[..., 0])

        def inverse(self, z, context=None):
            return z + 1

    base = pgen.models.flow.dist.Normal(torch.zeros(2), 1.0).to_event(1)
    fn = FlowDistribution(Chain([Shift(), Shift()]), base)
    assert float(fn.log_prob(torch.full((2,), 2.0))) == pytest.approx(-math.log(2 * math.pi), rel=1e-6)


# --- the family ------------------------------------------------------------------------------------------------------------


def test_a_mixture_base_starts_at_the_islands_of_the_data():
    target = gaussian_grid()
    flow = Flow((2,), hidden=(8,), transforms=1, base_components=25)
    flow.fit(target.sample(4000), steps=1, optimizer=1e-9, progress=False)
    x = target.sample(2000, seed=1)
    assert float(target.log_prob(x).mean()) - flow.log_prob(x).mean < 0.2
    plain = Flow((2,), hidden=(8,), transforms=1)
    plain.fit(target.sample(4000), steps=1, optimizer=1e-9, progress=False)
    assert float(target.log_prob(x).mean()) - plain.log_prob(x).mean > 2


def test_a_fit_starts_at_the_scale_of_the_data():
    x = seeded(lambda: torch.randn(500, 2)) * torch.tensor([1e-3, 1e4]) + torch.tensor([5.0, -3e4])
    run = Flow((2,), hidden=(8,)).fit(x, steps=1, batch_size=500, progress=False)
    entropy = math.log(2 * math.pi * math.e) + math.log(1e-3) + math.log(1e4)
    assert run.history["loss"][0] == pytest.approx(entropy, abs=0.2)


def test_splines_start_where_the_data_fill_their_interval():
    """Values at all quantiles: uniform ones to 0.85 of the interval, long tails half drawn in; affine maps standardise."""
    u = torch.linspace(-1, 1, 1001)[:, None]
    x = torch.cat([u, (u * 4).sinh() + u / 10, 3 * u.sign() * u.abs() ** 30], 1)
    for transform, expected in (("spline_coupling", [3.4, 3.4, None]), ("affine_coupling", [None] * 3)):
        flow = Flow((3,), transform, hidden=(4,), transforms=1)
        flow.fit(x, steps=1, optimizer=1e-9, progress=False)
        z = flow.actnorm(x)[0].detach()
        for column, end in enumerate(expected):
            if end is not None:
                assert float(z[1:-1, column].abs().max()) == pytest.approx(end, rel=0.02)
    long = Flow((3,), hidden=(4,))
    long.fit(x, steps=1, optimizer=1e-9, progress=False)
    assert float(long.actnorm(x)[0].detach()[:, 2].std(correction=0)) == pytest.approx(0.5, rel=1e-3)
    assert float(z[:, 0].std(correction=0)) == pytest.approx(1.0, rel=1e-3)


def test_data_beyond_the_box_of_a_spline_have_a_finite_density():
    flow = Flow((2,), hidden=(8,), tail_bound=3.0)
    flow.fit(seeded(lambda: torch.randn(100, 2)), steps=5, progress=False)
    values = flow.log_prob(torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, -1e3]])).value
    assert bool(torch.isfinite(values).all()) and float(values[0]) > float(values[1]) > float(values[2])


def test_the_inverse_is_judged_without_dropout():
    flow = Flow((2,), dropout=0.5, hidden=(16,))
    x = seeded(lambda: torch.randn(40, 2))
    flow.fit(x, steps=5, progress=False)
    assert float(flow.inverse_error(x).max()) < 1e-4


def test_an_inverse_that_is_off_is_told():
    flow = Flow((2,), "continuous", hidden=(16,))
    x = seeded(lambda: torch.randn(40, 2))
    flow.fit(x, steps=2, progress=False)
    assert flow.inverse_error(x).shape == (40,) and float(flow.inverse_error(x).max()) < 1e-4
    with torch.no_grad():
        for p in flow.chain.parameters():
            p *= 1000
    with pytest.warns(RuntimeWarning, match=r"does not find \d+ of 40 data again \(largest error .*precision='float64'"):
        flow.inverse_error(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.stack([torch.arange(40.0), torch.full((40,), 2.0)], 1),
            r"number 1 of each datum is constant \(2 in 100% of the data\).*Dequantize",
        ),
        (
            torch.stack([torch.arange(40.0), torch.arange(40.0) % 3], 1),
            r"number 1 of each datum is discrete .*3\d% of the.*Dequantize",
        ),
        (torch.zeros(1, 2), "a flow needs two data or more to know their scale, got 1"),
        (torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "data row 0, column 1 is nan; drop or fill"),
    ],
)
def test_data_without_a_density_are_refused(x, message):
    with pytest.raises(ValueError, match=message) as error:
        Flow((2,), hidden=(8,)).fit(x, steps=1, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "spline_autoregresive"}, "`transform` .*did you mean 'spline_autoregressive'"),
        ({"permutation": "swap"}, "`permutation`"),
        ({"bins": 0}, "`bins`"),
        ({"base_components": 0}, "`base_components`"),
        ({"tail_bound": -1.0}, "`tail_bound`"),
        ({"dropout": 1.0}, "`dropout`"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Flow((2,), **options)


def test_whole_numbers_are_dequantised():
    x = seeded(lambda: torch.randint(0, 4, (200, 2)))
    flow = Flow((2,), hidden=(8,), preprocess=Dequantize(4))
    flow.fit(x, steps=60, optimizer=1e-2, progress=False)
    score = flow.log_prob(x)
    assert score.kind == "lower_bound" and score.mean == pytest.approx(-2 * math.log(4), abs=0.15)
    assert set(flow.sample(50).unique().tolist()) <= {0, 1, 2, 3}


def test_every_tier_gives_the_same_loss():
    x = seeded(lambda: torch.randn(20, 2))
    for transform in ("spline_autoregressive", "neural_coupling"):
        losses = [
            Flow((2,), transform, hidden=(4,), transforms=1, bins=3)
            .fit(x, steps=3, batch_size=8, compile=tier, progress=False)
            .history["loss"]
            for tier in ("eager", "graph")
        ]
        np.testing.assert_array_equal(*losses)


# --- images ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_dim", [0, CONTEXT])
@pytest.mark.parametrize(("shape", "levels"), [((1, 4, 8), 2), ((3, 2, 4), 1)])
def test_a_multi_scale_map_has_the_jacobian_it_says_and_finds_back(shape, levels, context_dim):
    made = seeded(lambda: MultiScale(shape, levels, 2, 5, context_dim)).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * seeded(lambda p=p: torch.randn(p.shape, dtype=p.dtype), seed=4)
    x = seeded(lambda: torch.randn(2, *shape, dtype=torch.float64))
    context = seeded(lambda: torch.randn(2, context_dim, dtype=torch.float64)) if context_dim else None
    z, log_det = made(x, context)
    assert z.shape == x.shape and log_det.shape == (2,)
    torch.testing.assert_close(made.inverse(z, context), x, rtol=0, atol=1e-6)
    for i in range(2):
        found = torch.autograd.functional.jacobian(
            lambda v, i=i: made(v.reshape(1, *shape), None if context is None else context[i : i + 1])[0].flatten(),
            x[i].flatten(),
        )
        torch.testing.assert_close(log_det[i], found.det().abs().log(), rtol=0, atol=1e-8)


def test_every_actnorm_of_a_multi_scale_map_starts_at_what_reaches_it():
    x = seeded(lambda: 5 + 3 * torch.randn(200, 1, 4, 4))
    glow = Glow((1, 4, 4), 2, 2, 5)
    glow.fit(x, steps=1, optimizer=1e-9, progress=False)
    z, _ = glow.flow(x)
    assert float(z.mean().detach()) == pytest.approx(0, abs=0.1) and float(z.std().detach()) == pytest.approx(1, abs=0.1)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"multiples of 2 \*\* levels = 8, got \(28, 28\); take fewer levels"):
        Glow((28, 28), levels=3)


def test_a_flow_prior_is_trained_and_drawn_from():
    x = seeded(lambda: torch.randn(40, 5))
    vae = VAE((5,), 3, (7,), likelihood="gaussian", prior="flow")
    before = [p.detach().clone() for p in vae.prior_flow.parameters()]
    vae.fit(x, steps=3, batch_size=20, progress=False)
    assert all(bool((a != b).any()) for a, b in zip(before, vae.prior_flow.parameters()))
    assert isinstance(vae.prior(), FlowDistribution) and vae.sample(4).shape == (4, 5)
    with pytest.raises(ValueError, match="`prior`"):
        VAE((5,), 3, prior="flows")


# --- the literature's tables -----------------------------------------------------------------------------------------------


def test_a_table_of_the_literature_is_read_from_the_users_file(tmp_path):
    path = tmp_path / "power.npz"
    with pytest.raises(FileNotFoundError, match=r"prepare POWER with the scripts of gpapamak/maf .*6 columns each"):
        flow_set("power", path)
    np.savez(path, train=np.zeros((5, 6)), validation=np.zeros((2, 6)), test=np.ones((3, 6)))
    split = flow_set("power", path)
    assert split.train.shape == (5, 6) and split.test.dtype == torch.float32 and float(split.test.sum()) == 18
    with pytest.raises(ValueError, match=r"should have shape \(rows, 8\), got \(5, 6\)"):
        flow_set("gas", path)
    np.savez(path, train=np.zeros((5, 6)))
    with pytest.raises(ValueError, match="has no array 'validation'"):
        flow_set("power", path)
    with pytest.raises(ValueError, match="one of power, gas"):
        flow_set("iris", path)
