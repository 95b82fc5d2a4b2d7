"""Transforms invert, and know their log-determinants."""

import json
import math

import pytest
import torch
from torch.func import jacrev, vmap

from pgen import files
from pgen.data import Compose, Dequantize, Logit, Standardize, digits, from_settings

EVENT = (3, 2)


def unit_data(n=7):
    return torch.rand(n, *EVENT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def real_data(n=7):
    return 100.0 + 5.0 * torch.randn(n, *EVENT, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


BIJECTIONS = {
    "standardize": (lambda: Standardize(), real_data),
    "logit": (lambda: Logit(), unit_data),
    "logit wide": (lambda: Logit(alpha=0.05), unit_data),
    "compose": (lambda: Compose([Logit(alpha=0.01), Standardize()]), unit_data),
    "nothing": (lambda: Compose([]), real_data),
}


@pytest.fixture(params=BIJECTIONS)
def fitted(request):
    make, data = BIJECTIONS[request.param]
    x = data()
    return make().fit(x), x


# --- laws ----------------------------------------------------------------------------------------------------------------


def test_inverse(fitted):
    transform, x = fitted
    y = transform(x)
    assert y.shape == x.shape and y.dtype == torch.float64
    assert torch.allclose(transform.inverse(y), x, rtol=1e-9, atol=1e-12)


def test_log_det_is_that_of_the_jacobian(fitted):
    transform, x = fitted
    size = math.prod(EVENT)
    jacobian = vmap(jacrev(lambda one: transform(one[None])[0]))(x).reshape(len(x), size, size)
    assert torch.allclose(transform.log_det(x), torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9)
    y, log_det = transform.forward_with_log_det(x)
    assert torch.equal(y, transform(x)) and torch.equal(log_det, transform.log_det(x))
    assert log_det.shape == (len(x),) and log_det.dtype == torch.float64
    assert transform.kind == "exact"


def test_density_of_numbers_not_vectors():
    x = unit_data()[:, 0, 0]
    logit = Logit(alpha=0.1).fit(x)
    assert torch.allclose(logit.log_det(x), vmap(jacrev(lambda one: logit(one[None])[0]))(x).log())
    scale = Standardize().fit(x)
    assert torch.allclose(scale.log_det(x), torch.full((7,), -math.log(float(x.std(correction=0))), dtype=torch.float64))


@pytest.mark.parametrize("name", [*BIJECTIONS, "dequantize"])
def test_settings_and_state_make_the_same_transform(tmp_path, name):
    make, data = BIJECTIONS.get(name, (lambda: Compose([Dequantize(17), Logit(), Standardize()]), levels))
    x = data()
    first = make().fit(x)
    settings = json.loads(json.dumps(first.settings()))
    files.write(tmp_path / "t", first.state_dict(), settings)
    tensors, settings = files.read(tmp_path / "t")
    second = from_settings(settings)
    second.double().load_state_dict(tensors)
    torch.manual_seed(3)
    y, log_det = first.forward_with_log_det(x)
    torch.manual_seed(3)
    again, log_det_again = second.forward_with_log_det(x)
    assert torch.equal(again, y) and torch.equal(log_det_again, log_det)
    assert torch.equal(second.inverse(y), first.inverse(y)) and second.kind == first.kind


def test_transforms_are_captured_into_a_graph():
    from torch.fx.experimental.proxy_tensor import make_fx

    x = levels()
    transform = Compose([Dequantize(17), Logit(), Standardize()]).fit(x)
    graph = make_fx(lambda x: transform.forward_with_log_det(x))(x)
    torch.manual_seed(5)
    want = transform.forward_with_log_det(x)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(graph(x), want))
    assert torch.equal(make_fx(lambda y: transform.inverse(y))(want[0])(want[0]), transform.inverse(want[0]))


# --- standardize ---------------------------------------------------------------------------------------------------------


def test_standardize_by_hand():
    x = torch.tensor([[1.0, 10.0], [3.0, 10.5]])
    scale = Standardize().fit(x)
    assert torch.equal(scale.mean, torch.tensor([2.0, 10.25])) and torch.equal(scale.sd, torch.tensor([1.0, 0.25]))
    assert torch.equal(scale(x), torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert torch.allclose(scale.log_det(x), torch.full((2,), math.log(4.0)))


def test_standardize_takes_its_statistics_in_float64():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 1e30  # its square overflows in float32
    assert torch.allclose(Standardize().fit(x).sd.double(), x.double().std(0, correction=0), rtol=1e-6)


def test_standardize_of_integers_follows_its_own_dtype():
    x = torch.tensor([[1, 5], [3, 9], [8, 2]])
    assert Standardize().fit(x)(x).dtype == torch.float32
    assert Standardize().double().fit(x)(x).dtype == torch.float64


@pytest.mark.parametrize("value", [1.0, 0.0, 0.1, -1e6])
def test_standardize_refuses_a_constant_column(value):
    x = torch.randn(50, 3)
    x[:, 1] = value
    with pytest.raises(ValueError, match=r"`x` is constant in column 1 .*drop it \(1 of 3 columns are constant\)") as caught:
        Standardize().fit(x)
    assert f"(every value is {value:g})" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"constant in column \(0, 0\)"):
        Standardize().fit(digits().train)


def test_standardize_refuses_a_constant_whose_mean_is_rounded():
    with pytest.raises(ValueError, match="constant in column 0"):
        Standardize().fit(torch.full((1000,), 0.1, dtype=torch.float64))


def test_standardize_checks_shapes():
    scale = Standardize().fit(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"`x` should have shape \(N, 3\), got \(5, 4\)"):
        scale(torch.randn(5, 4))


# --- dequantize ----------------------------------------------------------------------------------------------------------


def levels(n=40):
    return torch.randint(0, 17, (n, *EVENT), generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_levels", [2, 17, 49, 256])
def test_dequantize_inverts_exactly(num_levels, dtype):
    x = (torch.arange(14_000) % num_levels).reshape(-1, 7).to(dtype)
    transform = Dequantize(num_levels).fit(x)
    torch.manual_seed(0)
    y = transform(x)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert y.min() > 0 and y.max() < 1
    assert torch.equal(transform.inverse(y), x.to(y.dtype))


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-24])
def test_dequantize_inverts_at_the_ends_of_the_noise(monkeypatch, noise):
    x = torch.arange(256.0)[:, None]
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, noise))
    transform = Dequantize(256)
    assert torch.equal(transform.inverse(transform(x)), x)


def test_dequantize_is_uniform_in_its_cell_and_keyed_by_torch():
    x = torch.full((5000, 4), 3.0, dtype=torch.float64)
    transform = Dequantize(8).fit(x)
    torch.manual_seed(0)
    u = transform(x) * 8 - 3
    n = u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / n) ** 0.5  # five standard errors
    assert abs(float(u.var()) - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    assert not torch.equal(transform(x) * 8 - 3, u)
    torch.manual_seed(0)
    assert torch.equal(transform(x) * 8 - 3, u)
    assert transform.kind == "lower_bound"


def test_dequantize_bounds_the_log_probability_of_the_levels():
    """Uniform y has density 1: each of L^D images has probability L^-D, and the bound is tight."""
    transform = Dequantize(17)
    assert torch.allclose(transform.log_det(levels()), torch.tensor(-6 * math.log(17.0), dtype=torch.float64))
    # p(y) = 2 y on the unit interval: P(x) = ((x + 1)^2 - x^2) / L^2, and at x = 0 E[log 2y] - log L = log 2 - 1 - 2 log L.
    x = torch.tensor([[0.0], [3.0], [16.0]], dtype=torch.float64)
    log_p = torch.log((2 * x[:, 0] + 1) / 17**2)
    torch.manual_seed(0)
    y, log_det = transform.forward_with_log_det(x.repeat(20_000, 1))
    bound = (torch.log(2 * y[:, 0]) + log_det).reshape(-1, 3).mean(0)
    assert (bound < log_p).all() and (log_p - bound)[1:].max() < 0.01
    assert abs(float(bound[0]) - (math.log(2) - 1 - 2 * math.log(17))) < 5 / 20_000**0.5


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.tensor([[0.0], [0.5]]), r"`x` has 0.5 in row 1; expected whole numbers from 0 to 16; multiply by 16\?$"),
        (torch.tensor([[3.0], [17.0]]), "`x` has 17 in row 1; expected whole numbers from 0 to 16$"),
        (torch.tensor([[3], [-1]]), "`x` has -1 in row 1"),
        (torch.tensor([[3.0], [2.5]]), "`x` has 2.5 in row 1"),
        (torch.tensor([[3.0], [float("nan")]]), "x row 1, column 0 is nan"),
    ],
)
def test_dequantize_refuses_what_is_off_the_grid(x, match):
    with pytest.raises(ValueError, match=match):
        Dequantize(17).fit(x)


@pytest.mark.parametrize("bad", [1, 0, 70_000, 2.5, True, "17"])
def test_dequantize_levels(bad):
    with pytest.raises(ValueError, match="`levels` should be an integer from 2 to 65536"):
        Dequantize(bad)


# --- logit ---------------------------------------------------------------------------------------------------------------


def test_logit_by_hand():
    x = torch.tensor([[0.5, 0.0, 1.0]], dtype=torch.float64)
    y = Logit(alpha=0.1).fit(x)(x)
    assert torch.allclose(y, torch.tensor([[0.0, -math.log(9.0), math.log(9.0)]], dtype=torch.float64))
    want = math.log(0.8) * 3 - math.log(0.25) - 2 * math.log(0.09)
    assert torch.allclose(Logit(alpha=0.1).log_det(x), torch.tensor(want, dtype=torch.float64))


def test_logit_is_finite_and_inverts_at_the_ends_in_float32():
    x = torch.tensor([[0.0, 1e-7, 0.3, 1.0 - 6e-8, 1.0]])
    y, log_det = Logit().forward_with_log_det(x)
    assert y.isfinite().all() and log_det.isfinite().all() and torch.allclose(y[0, 0], -y[0, 4])
    assert torch.allclose(Logit().inverse(y), x, atol=3e-7)
    wild = Logit().inverse(torch.tensor([[-50.0, 50.0]]))
    assert wild.tolist() == [[0.0, 1.0]]


def test_logit_domain():
    with pytest.raises(ValueError, match=r"in \[0, 1\] for Logit, got values from 0 to 16; rescale it, or put Dequantize"):
        Logit().fit(digits(integers=True).train)
    for alpha in (0.0, 0.5, -1.0, True, "0.1", float("nan")):
        with pytest.raises(ValueError, match=r"`alpha` should lie strictly between 0 and 0.5"):
            Logit(alpha)


# --- compose -------------------------------------------------------------------------------------------------------------


def test_compose_of_noise_uses_one_draw_for_both():
    x = levels()
    transform = Compose([Dequantize(17), Logit()]).fit(x)
    assert transform.kind == "lower_bound"
    y, log_det = transform.forward_with_log_det(x)
    u = y.sigmoid()  # alpha is 1e-6: s and its logit are known from y
    want = math.log(1 - 2e-6) * 6 - (u.log() + (1 - u).log()).flatten(1).sum(1) - 6 * math.log(17)
    assert torch.allclose(log_det, want, rtol=1e-9)
    assert torch.equal(transform.inverse(y), x)


def test_fitting_leaves_the_random_state_alone_and_repeats():
    x = levels()
    torch.manual_seed(8)
    state = torch.get_rng_state()
    first = Compose([Dequantize(17), Standardize()]).fit(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    second = Compose([Dequantize(17), Standardize()]).fit(x)
    assert torch.equal(first.parts[1].mean, second.parts[1].mean)


def test_integers_follow_the_dtype_of_the_model():
    x = digits(integers=True).train
    transform = Compose([Dequantize(17), Logit()]).fit(x)
    assert transform(x).dtype == torch.float32
    y, log_det = transform.double().forward_with_log_det(x)
    assert y.dtype == log_det.dtype == torch.float64
    assert torch.equal(transform.inverse(y), x.double())


def test_compose_takes_transforms():
    with pytest.raises(TypeError, match="`parts` should be transforms, got type"):
        Compose([Logit])


# --- settings of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (None, "unknown transform 'None'"),
        ({"transform": "logits", "alpha": 0.1}, r"unknown transform 'logits'; did you mean 'logit'"),
        ({"transform": ["logit"]}, "unknown transform"),
        ({"transform": "logit"}, "should be 'alpha' alone"),
        ({"transform": "logit", "alpha": 0.1, "code": "x"}, "should be 'alpha' alone"),
        ({"transform": "logit", "alpha": [0.1]}, "`alpha` should"),
        ({"transform": "dequantize", "levels": 10**12}, "`levels` should"),
        ({"transform": "standardize", "event_shape": [10**12]}, "`event_shape` should"),
        ({"transform": "standardize", "event_shape": [2.0]}, "`event_shape` should"),
        ({"transform": "standardize", "event_shape": [-2, -2]}, "`event_shape` should"),
        ({"transform": "standardize", "event_shape": "22"}, "`event_shape` should"),
        ({"transform": "compose", "parts": {}}, "`parts` should"),
        ({"transform": "compose", "parts": [{"transform": "logit", "alpha": 0.1}] * 17}, "`parts` should"),
        ({"transform": "compose", "parts": [{"transform": "compose", "parts": []}]}, "`parts` should"),
        ({"transform": "compose", "parts": [3]}, "unknown transform"),
    ],
)
def test_unknown_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match) as caught:
        from_settings(settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
