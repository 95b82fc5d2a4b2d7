"""Kernel density estimates against brute force, known constants and grids."""

import math
import warnings

import pytest
import torch
from cases import seeded

import pgen
from pgen.distributions import kernel_mixture
from pgen.distributions.kernel_mixture import KernelMixture, log_table
from pgen.distributions.kernels import (
    Epanechnikov,
    Exponential,
    Gaussian,
    Kernel,
    Product,
    Student,
    Tophat,
    as_kernel,
)
from pgen.models import KernelDensity, kernel_density

N, D, Q = 700, 5, 90
QUIET = {"progress": False, "compile": "eager"}


class Logistic(Kernel):
    """A kernel of one's own."""

    def log_density(self, u):
        return -(u + 2 * torch.nn.functional.softplus(-u)).sum(-1)

    def sample(self, like):
        return torch.logit(torch.rand_like(like).clamp(1e-7, 1 - 1e-7))


RADIAL = [Gaussian(), Epanechnikov(), Exponential(), Tophat(), Student(3.0)]
KERNELS = [*RADIAL, *(Product(kernel) for kernel in RADIAL), Logistic()]
every_kernel = pytest.mark.parametrize(
    "kernel", KERNELS, ids=lambda k: f"{k.name}{getattr(getattr(k, 'base', None), 'name', '')}" or "own"
)


def normal(*shape, seed=0, dtype=torch.float64):
    return seeded(lambda: torch.randn(*shape, dtype=torch.float64), seed).to(dtype)


def brute(x, points, scale, log_k, weights=None):
    """log p by a float64 log-sum-exp of all pairs, from differences."""
    x, points, scale = x.double(), points.double(), scale.double()
    lower = scale if scale.dim() == 2 else torch.diag(scale.expand(points.shape[1]))
    u = (x[:, None] - points) @ torch.linalg.inv(lower).T
    weights = torch.ones(len(points)).double() if weights is None else weights.double()
    terms = log_k(u) + (weights / weights.sum()).log()
    return torch.logsumexp(terms, 1) - lower.diagonal().log().sum()


# --- kernels -------------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_kernel_integrates_to_one(kernel, dim):
    """In radius and direction for radial kernels, by a grid of the line for products."""
    if isinstance(kernel, Product | Logistic):
        if dim > 1:  # the product of the line's
            u = normal(4, dim)
            torch.testing.assert_close(kernel.log_density(u), sum(kernel.log_density(u[:, i : i + 1]) for i in range(dim)))
        edges = torch.sinh(torch.linspace(-12, 12, 400_001).double())
        middle = (edges[1:] + edges[:-1]) / 2
        assert float((kernel.log_density(middle[:, None]).exp() * edges.diff()).sum()) == pytest.approx(1, abs=1e-4)
        return
    edges = torch.linspace(0, 18, 400_001).double().expm1()
    radius = (edges[1:] + edges[:-1]) / 2
    u = torch.zeros(len(radius), dim).double()
    u[:, -1] = radius
    sphere = 2 * math.pi ** (dim / 2) / math.gamma(dim / 2)
    inside = kernel.log_density(u).exp() * sphere * radius ** (dim - 1) * edges.diff()
    assert float(inside.sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kernel", RADIAL, ids=lambda k: k.name)
def test_constants_are_those_of_scikit_learn(kernel):
    if kernel.name == "student":
        reference = torch.distributions.StudentT(3.0).log_prob(torch.tensor(0.7))
        assert float(kernel.log_density(torch.tensor([0.7]))) == pytest.approx(float(reference), abs=1e-6)
        return
    from sklearn.neighbors import KernelDensity as Other

    points, x = normal(40, 3), normal(9, 3, seed=1)
    other = Other(kernel=kernel.name, bandwidth=1.7, leaf_size=40).fit(points.numpy())
    mixture = KernelMixture(points, kernel=kernel, scale=torch.tensor(1.7, dtype=torch.float64))
    torch.testing.assert_close(mixture.log_prob(x), torch.from_numpy(other.score_samples(x.numpy())), rtol=1e-9, atol=1e-9)


@every_kernel
def test_draws_have_the_kernels_distribution(kernel):
    """Kolmogorov-Smirnov of log K(u) in three dimensions, against importance weights; and the variance."""
    n = 60_000
    u = seeded(lambda: kernel.sample(torch.empty(n, 3).double()), 1)
    broad = torch.distributions.StudentT(2.5, scale=0.8)
    proposal = seeded(lambda: broad.sample((4 * n, 3)).double(), 2)
    weight = (kernel.log_density(proposal) - broad.log_prob(proposal).sum(-1)).exp()
    assert float(weight.mean()) == pytest.approx(1, abs=0.03)
    for name, of in {"length": lambda v: v.norm(dim=-1), "one": lambda v: v[:, 1], "sum": lambda v: v.sum(-1)}.items():
        cuts = of(u).quantile(torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double())
        for share, cut in zip((0.1, 0.3, 0.5, 0.7, 0.9), cuts):
            inside = weight * (of(proposal) < cut)
            error = math.hypot(float(inside.std()) / math.sqrt(len(inside)), math.sqrt(share * (1 - share) / n))
            assert abs(float(inside.mean()) - share) < 5 * error, name  # 15 numbers a kernel: fails once in 100 000
    if not isinstance(kernel, Logistic) and "student" not in str(kernel.settings()):
        torch.testing.assert_close(u.var(0), torch.full((3,), kernel.variance(3)).double(), rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", ["categorical", "ordinal"])
def test_discrete_kernels_sum_to_one_and_are_drawn(kind):
    table = log_table((kind, 4), torch.tensor(0.3).double()).exp()
    torch.testing.assert_close(table.sum(0), torch.ones(4).double())
    if kind == "categorical":
        assert float(table[2, 2]) == pytest.approx(0.7) and float(table[0, 2]) == pytest.approx(0.1)
    else:
        assert float(table[0, 2] / table[1, 2]) == pytest.approx(0.3) and float(table[1, 2] / table[2, 2]) == pytest.approx(
            0.15
        )
    mixture = KernelMixture(
        torch.tensor([[2.0]]), kernel=Gaussian(), scale=torch.zeros(0), columns=[(kind, 4)], smoothing=torch.tensor([0.3])
    )
    drawn = seeded(lambda: mixture.sample((40_000,)))[:, 0].long()
    assert (drawn.bincount(minlength=4) / 40_000 - table[:, 2]).abs().max() < 5 * math.sqrt(0.25 / 40_000)


# --- sums ----------------------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("scale", ["one", "each", "full"])
def test_density_equals_brute_force(kernel, scale, monkeypatch):
    monkeypatch.setattr(kernel_mixture, "QUERIES", 64)
    monkeypatch.setattr(kernel_mixture, "POINTS", 150)
    points, x = normal(N, D) * 3 + 7, normal(Q, D, seed=1) * 2 + 7
    lower = normal(D, D, seed=2).tril() + 4 * torch.eye(D)
    h = {"one": torch.tensor(2.5).double(), "each": torch.linspace(2, 4, D).double(), "full": lower}[scale]
    weights = seeded(lambda: torch.rand(N).double())
    expected = brute(x, points, h, kernel.log_density, weights)
    found = KernelMixture(points, kernel=kernel, scale=h, weights=weights).log_prob(x)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim", [2, 8, 32, 64])
@pytest.mark.parametrize("shift", [0.0, 300.0])
def test_both_precisions_are_exact_to_what_they_promise(dim, shift):
    points, x = normal(3000, dim) + shift, normal(Q, dim, seed=1) + shift
    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        near, far = points.to(dtype), x.to(dtype)
        expected = brute(far, near, torch.tensor(0.5), Gaussian().log_density)
        found = KernelMixture(near, kernel=Gaussian(), scale=torch.tensor(0.5, dtype=dtype)).log_prob(far)
        assert found.dtype == dtype
        assert float((found.double() - expected).abs().max()) < allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_bandwidths_and_far_queries_lose_nothing(dtype):
    points = normal(400, 3, dtype=dtype)
    x = torch.cat([points[:40] + 1e-4, points[:5] + 200])
    h = torch.tensor(1e-4, dtype=dtype)
    found = KernelMixture(points, kernel=Gaussian(), scale=h).log_prob(x)
    rounding = 1e-7 if dtype == torch.float32 else 1e-14  # of the answer itself
    torch.testing.assert_close(found.double(), brute(x, points, h, Gaussian().log_density), rtol=rounding, atol=1e-9)


def test_adaptive_and_left_out_points_equal_brute_force():
    points, weights, local = (
        normal(50, 2),
        seeded(lambda: torch.rand(50).double()),
        seeded(lambda: torch.rand(50).double() + 0.5),
    )
    row = torch.arange(50)
    row[7] = -1
    mixture = KernelMixture(
        points, kernel=Gaussian(), scale=torch.tensor(0.6, dtype=torch.float64), weights=weights, local=local, without=row
    )
    for n, value in enumerate(mixture.log_prob(points)):
        keep = torch.arange(50) != row[n]
        sd = (0.6 * local[keep])[:, None]
        terms = torch.distributions.Normal(points[keep], sd).log_prob(points[n]).sum(1).exp() * weights[keep]
        assert float(value) == pytest.approx(float((terms.sum() / weights[keep].sum()).log()), abs=1e-10)


@every_kernel
@pytest.mark.parametrize("h", [0.01, 0.6])
def test_points_in_the_plane_are_taken_from_the_nearest_on(kernel, h, monkeypatch):
    for name, value in {"QUERIES": 30, "POINTS": 40, "CROWD": 2, "THIN": 1, "SPREAD": {True: 0.0, False: 0.0}}.items():
        monkeypatch.setattr(kernel_mixture, name, value)
    taken = []
    plain = kernel_mixture._Sum._height
    monkeypatch.setattr(kernel_mixture._Sum, "_height", lambda self, part: (taken.append(part), plain(self, part))[1])
    points, x = normal(1001, 2), normal(200, 2, seed=1)
    weights, local = (seeded(lambda: torch.rand(1001).double()) + 0.5 for _ in range(2))
    mixture = KernelMixture(points, kernel=kernel, scale=torch.tensor(h, dtype=torch.float64), weights=weights, local=local)
    found, blocks = mixture.log_prob(x), len(taken)
    u = (x[:, None] - points) / (h * local[:, None])
    expected = torch.logsumexp(kernel.log_density(u) + (weights / weights.sum()).log() - 2 * (h * local).log(), 1)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if h < 0.1 and kernel.name in ("gaussian", "epanechnikov", "tophat"):
        assert 26 < blocks < 0.7 * 7 * 26  # of 7 blocks of queries by 26 of points, and 26 to see where they lie


def test_a_bandwidth_without_steps_does_not_cost_all_pairs(monkeypatch):
    """The likelihood that a fit tells is that of some data, each with itself left out."""
    monkeypatch.setattr(kernel_density, "TOLD_PAIRS", 8 * 600)
    x, asked = normal(600, 2), []
    plain = KernelMixture.log_prob
    monkeypatch.setattr(KernelMixture, "log_prob", lambda self, value: (asked.append(len(value)), plain(self, value))[1])
    kde = pgen.models.KernelDensity((2,), bandwidth=0.4)
    run = kde.fit(x, precision="float64", progress=False)
    assert sum(asked) == 8
    some = torch.linspace(0, 599, 8, dtype=torch.float64).long()
    h = torch.tensor(0.4).double()
    left = [brute(x[i : i + 1], torch.cat([x[:i], x[i + 1 :]]), h, Gaussian().log_density) for i in some]
    assert -run.history["loss"][0] == pytest.approx(float(torch.cat(left).mean()), abs=1e-6)


def test_memory_does_not_grow_with_the_data():
    """The largest tensor that a sum makes, beside its arguments and answer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func.is_view is False:
                self.numbers = max(self.numbers, out.numel())
            return out

    found = []
    for size in (9_000, 18_000):
        mixture = KernelMixture(normal(size, 2), kernel=Gaussian(), scale=torch.tensor(0.5).double())
        with Largest() as largest:
            mixture.log_prob(normal(1_000, 2))
        found.append(largest.numbers)
    assert found == [kernel_mixture.QUERIES * kernel_mixture.POINTS] * 2


# --- fit -----------------------------------------------------------------------------------------------------------------


def test_rules_are_in_the_units_of_the_data():
    x = normal(300, 2) * torch.tensor([3.0, 0.02])
    for rule, factor in (("scott", 300 ** (-1 / 6)), ("silverman", (4 / 4) ** (1 / 6) * 300 ** (-1 / 6))):
        kde = KernelDensity((2,), bandwidth=rule)
        assert "rule" in kde.fit(x).stopped
        torch.testing.assert_close(kde.bandwidth.double(), factor * x.std(0, correction=0), rtol=1e-5, atol=0)
    full = KernelDensity((2,), bandwidth="scott", covariance="full")
    full.fit(x, precision="float64")
    torch.testing.assert_close(full.bandwidth @ full.bandwidth.T, 300 ** (-2 / 6) * x.T.cov(correction=0))
    flat = KernelDensity((2,), "tophat")  # the ball's variance is a quarter of the square of its radius
    flat.fit(x)
    torch.testing.assert_close(flat.bandwidth.double() / 2, 300 ** (-1 / 6) * x.std(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kernel", ["gaussian", "student", "exponential"])
def test_leave_one_out_gradient_is_that_of_finite_differences(kernel):
    x = normal(40, 2)
    kde = KernelDensity((2,), kernel, [0.7, 0.9], adaptive="nearest").double()
    kde.fit(x, precision="float64")
    batch = {"x": x[5:25], "row": torch.arange(5, 25)}

    def loss():
        return kde.loss(kde.default_objective(), batch, {"num_data": 40.0})[0]

    loss().backward()
    for i in range(2):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                kde.log_bandwidth[i] += step
                values.append(float(loss()))
                kde.log_bandwidth[i] -= step
        assert float(kde.log_bandwidth.grad[i]) == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-6)


def test_leave_one_out_bandwidth_is_the_best_of_a_grid():
    x = torch.cat([normal(150, 1) * 0.3 - 2, normal(150, 1, seed=1) + 2])
    kde = KernelDensity((1,), covariance="spherical")
    kde.fit(x, **QUIET, precision="float64")

    def score(h):
        one = KernelDensity((1,), bandwidth=float(h))
        one.fit(x, precision="float64")
        return one.log_prob({"x": x, "row": torch.arange(len(x))}).mean

    grid = torch.logspace(-2, 0.5, 120)
    best = grid[torch.tensor([score(h) for h in grid]).argmax()]
    assert float(kde.bandwidth) == pytest.approx(float(best), rel=0.03)
    assert score(kde.bandwidth) >= score(best) - 1e-6


def grouped(groups=40, within=6):
    """Rows of persons: a person's place, and little noise around it."""
    place = normal(groups, 2).repeat_interleave(within, 0)
    return place + 0.05 * normal(len(place), 2, seed=1), torch.arange(groups).repeat_interleave(within)


def test_leaving_out_a_group_is_leaving_out_its_points():
    x, group = grouped(7, 3)
    weights = normal(len(x), seed=2).square() + 0.1
    kde = KernelDensity((2,), bandwidth=0.4, adaptive="nearest")
    kde.fit({"x": x, "weights": weights, "group": 10 * group}, precision="float64")
    asked = 10 * group.clone()
    asked[4] = -1
    left = kde.log_prob({"x": x, "group": asked}).value
    centres, scale = x, 0.4 * kde.local
    log_kernel = -0.5 * ((x[:, None] - centres) / scale[:, None]).square().sum(-1) - 2 * scale.log() - math.log(2 * math.pi)
    for n in range(len(x)):
        keep = 10 * group != asked[n]
        share = weights[keep] / weights[keep].sum()
        assert float(left[n]) == pytest.approx(float((log_kernel[n, keep] + share.log()).logsumexp(0)), abs=1e-9)


def test_groups_widen_the_bandwidth_to_what_suits_new_groups():
    x, group = grouped()
    kde = KernelDensity((2,), covariance="spherical")
    kde.fit({"x": x, "group": group}, **QUIET, precision="float64")

    def by_folds(h):  # every group held out in turn
        log_kernel = -0.5 * torch.cdist(x, x).square() / h**2 - 2 * math.log(h) - math.log(2 * math.pi)
        others = group[:, None] != group
        return float((log_kernel.masked_fill(~others, -math.inf).logsumexp(1) - others.sum(1).log()).sum())

    grid = torch.logspace(-2, 0.5, 200).tolist()
    best = max(grid, key=by_folds)
    assert float(kde.bandwidth) == pytest.approx(best, rel=0.03)
    assert by_folds(float(kde.bandwidth)) >= by_folds(best) - 1e-6
    alone = KernelDensity((2,), covariance="spherical")
    alone.fit(x, **QUIET, precision="float64")
    assert float(alone.bandwidth) < 0.2 * float(kde.bandwidth)


def test_duplicates_of_one_group_are_left_out_together():
    x = normal(30, 2).repeat(2, 1)
    with pytest.raises(ValueError, match="exact duplicate"):
        KernelDensity((2,)).fit(x, **QUIET)
    kde = KernelDensity((2,))
    kde.fit({"x": x, "group": torch.arange(30).repeat(2)}, **QUIET, precision="float64")
    once = KernelDensity((2,))
    once.fit(x[:30], **QUIET, precision="float64")
    torch.testing.assert_close(kde.bandwidth, once.bandwidth, rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="exact duplicate"):  # of different groups
        KernelDensity((2,)).fit({"x": x, "group": torch.arange(60)}, **QUIET)


def test_a_feature_without_information_gets_a_wide_bandwidth():
    x = torch.stack([torch.where(normal(400) > 0, 3.0, -3.0) + 0.2 * normal(400, seed=1), normal(400, seed=2)], 1)
    kde = KernelDensity((2,))
    kde.fit(x, **QUIET)
    assert float(kde.bandwidth[0]) < 0.15 < 0.3 < float(kde.bandwidth[1])


@pytest.mark.parametrize("adaptive", ["abramson", "nearest"])
def test_adaptive_kernels_are_wider_where_data_are_sparse_and_score_better(adaptive):
    x = seeded(lambda: torch.distributions.StudentT(2.0).sample((500, 1)))
    test = seeded(lambda: torch.distributions.StudentT(2.0).sample((2000, 1)), 5)
    kdes = [KernelDensity((1,), bandwidth="silverman", adaptive=a) for a in (None, adaptive)]
    for kde in kdes:
        kde.fit(x)
    local = kdes[1].local
    assert float(local.double().log().mean()) == pytest.approx(0, abs=1e-5)
    assert float(local[x[:, 0].abs().argmax()]) > 3 * float(local.median())
    assert kdes[1].log_prob(test).mean > kdes[0].log_prob(test).mean


def test_weights_count_as_copies():
    x, counts = normal(30, 2), torch.arange(30) % 3 + 1
    weighted, copied = (KernelDensity((2,), bandwidth=0.8) for _ in range(2))
    weighted.fit({"x": x, "weights": counts})
    copied.fit(x.repeat_interleave(counts, 0))
    torch.testing.assert_close(weighted.log_prob(x).value, copied.log_prob(x).value, rtol=0, atol=1e-5)


def test_a_second_fit_takes_new_points():
    kde = KernelDensity((2,), bandwidth=1.0)
    kde.fit(normal(20, 2))
    kde.fit(normal(31, 2, seed=4))
    assert torch.equal(kde.points, normal(31, 2, seed=4).float())


def test_all_tiers_fit_the_same_bandwidth():
    x, found = normal(64, 3), []
    for tier in ("eager", "graph"):
        kde = KernelDensity((3,))
        kde.fit(x, steps=20, batch_size=16, compile=tier, progress=False)
        found.append(kde.bandwidth)
    torch.testing.assert_close(*found)


# --- mixed features, conditions ------------------------------------------------------------------------------------------

MIXED = ["continuous", ("categorical", 3), ("ordinal", 4), "continuous"]


def mixed(n=60, seed=0):
    def make():
        a = torch.randint(0, 3, (n,))
        return torch.stack([torch.randn(n) + a, a, torch.randint(0, 4, (n,)), torch.randn(n) * 2 - a], 1).double()

    return seeded(make, seed)


@pytest.mark.parametrize("kernel", [Gaussian(), Student(3.0), Product(Exponential()), Epanechnikov()], ids=lambda k: k.name)
def test_conditional_density_is_a_ratio_of_densities(kernel):
    """The denominator by summing the joint density over every value of what is not given."""
    kde = KernelDensity((4,), kernel, "silverman", columns=MIXED)
    kde.fit(mixed(), precision="float64")
    x = mixed(seed=1)[:5]
    score = kde.conditional_log_prob(x, given=[3, 1])
    assert score.kind == "exact" and score.event_size == 2
    grid = torch.linspace(-25, 30, 8001, dtype=torch.float64)
    for datum, found in zip(x, score.value):
        whole = datum.repeat(4 * len(grid), 1)
        whole[:, 0], whole[:, 2] = grid.repeat(4), torch.arange(4).repeat_interleave(len(grid))
        marginal = kde.log_prob(whole, progress=False).value.exp().sum() * float(grid[1] - grid[0])
        expected = kde.log_prob(datum[None]).value[0] - marginal.log()
        assert float(found) == pytest.approx(float(expected), abs=3e-3 if kernel.compact else 1e-4)


@pytest.mark.parametrize("kernel", [Gaussian(), Student(5.0), Product(Tophat()), Epanechnikov()], ids=lambda k: f"{k.name}")
def test_conditional_draws_have_the_conditional_density(kernel):
    x = torch.stack([normal(50), normal(50, seed=1)], 1) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double()
    kde = KernelDensity((2,), kernel, "silverman", covariance="full" if kernel.name != "product" else None)
    kde.fit(x, precision="float64")
    n = 20_000
    drawn = kde.conditional_sample(torch.full((n, 1), 0.9, dtype=torch.float64), given=[1], seed=2)
    assert bool((drawn[:, 1] == 0.9).all())
    edges = torch.linspace(-4, 5, 37, dtype=torch.float64)
    middle = ((edges[1:] + edges[:-1]) / 2).repeat_interleave(40) + torch.linspace(-0.5, 0.5, 41).double()[:-1].repeat(
        36
    ) * 0.25
    at = torch.stack([middle, torch.full_like(middle, 0.9)], 1)
    share = kde.conditional_log_prob(at, given=[1]).value.exp().reshape(36, 40).mean(1) * 0.25
    found = torch.histogram(drawn[:, 0], edges).hist / n
    assert ((found - share).abs() < 5 * (share / n).sqrt() + 2e-3).all()


def test_a_context_makes_the_density_conditional():
    c, x = normal(80, 1), normal(80, 2, seed=1) + 3 * normal(80, 1)
    joint = KernelDensity((3,), bandwidth=[0.5, 0.7, 0.9])
    joint.fit(torch.cat([c, x], 1), precision="float64")
    kde = KernelDensity((2,), bandwidth=[0.5, 0.7, 0.9], context_dim=1)
    kde.fit(x, context=c, precision="float64")
    expected = joint.conditional_log_prob(torch.cat([c, x], 1), given=[0])
    torch.testing.assert_close(kde.log_prob(x, c).value, expected.value)
    drawn = kde.sample(4000, torch.tensor([[1.0]]), seed=1)
    assert drawn.mean(0).tolist() == pytest.approx([3, 3], abs=0.6)


def test_leaving_out_conditions_on_the_remaining_points():
    c, x = normal(9, 1), normal(9, 1, seed=1)
    kde = KernelDensity((1,), bandwidth=[0.5, 0.7], context_dim=1)
    kde.fit(x, context=c, precision="float64")
    rest = KernelDensity((1,), bandwidth=[0.5, 0.7], context_dim=1)
    rest.fit(x[1:], context=c[1:], precision="float64")
    left = kde.log_prob({"x": x[:1], "context": c[:1], "row": torch.tensor([0])})
    torch.testing.assert_close(left.value, rest.log_prob(x[:1], c[:1]).value)


def test_mixed_features_are_a_mass_times_a_density():
    kde = KernelDensity((4,), columns=MIXED)
    kde.fit(mixed(), **QUIET)
    assert kde.log_prob(mixed()).measure == "density"
    discrete = KernelDensity((1,), columns=[("ordinal", 4)])
    discrete.fit(mixed()[:, 2:3], **QUIET)
    assert discrete.log_prob(mixed()[:, 2:3]).measure == "mass"
    x = kde.sample(200)
    assert set(x[:, 1].tolist()) == {0.0, 1.0, 2.0} and set(x[:, 2].tolist()) <= {0.0, 1.0, 2.0, 3.0}


# --- files and errors ----------------------------------------------------------------------------------------------------


def test_every_setting_survives_a_file(tmp_path):
    given = {"kernel": Product(Student(3.5)), "bandwidth": [0.5, 0.6], "adaptive": "nearest", "neighbors": 4, "floor": 0.1}
    kde = KernelDensity((4,), columns=MIXED, **given)
    kde.fit({"x": mixed(), "weights": torch.arange(60) + 1.0})
    kde.save(tmp_path / "kde.pgen")
    again = pgen.load(tmp_path / "kde.pgen")
    assert again.settings() == kde.settings() and again.settings()["count"] == 60
    assert torch.equal(again.log_prob(mixed()).value, kde.log_prob(mixed()).value)
    assert as_kernel(again.kernel.settings()).base.df == 3.5


def test_features_of_x_and_context_survive_a_file(tmp_path):
    kde = KernelDensity((1,), columns=["continuous", ("categorical", 3)], context_dim=1, bandwidth=0.5)
    x, kind = torch.linspace(-1, 1, 30)[:, None], torch.arange(30.0)[:, None] % 3
    kde.fit(x, context=kind, progress=False)
    kde.save(tmp_path / "kde.pgen")
    again = pgen.load(tmp_path / "kde.pgen")
    assert again.columns == kde.columns == (("categorical", 3), ("continuous", 0))
    assert torch.equal(again.log_prob(x, kind).value, kde.log_prob(x, kind).value)


def test_a_kernel_of_ones_own_fits_and_samples_but_has_no_name(tmp_path):
    kde = KernelDensity((2,), Logistic())
    kde.fit(normal(50, 2), **QUIET)
    assert kde.sample(7).shape == (7, 2)
    with pytest.raises(ValueError, match=r"Logistic of your own, which a file cannot name"):
        kde.save(tmp_path / "kde.pgen")


def duplicates():
    return normal(40, 2).repeat(2, 1)


CONSTANT = (
    "^`data` is constant in column 1, and a bandwidth is taken from the spread of its column, which is zero: drop it, declare "
    "it in `columns` as categorical, or give a `bandwidth`$"
)
BAD = {
    "duplicates": (
        lambda: KernelDensity((2,)).fit(duplicates(), **QUIET),
        r"100% of the points have an exact duplicate.*`floor`",
    ),
    "constant": (lambda: KernelDensity((2,)).fit(normal(9, 2) * torch.tensor([1.0, 0.0])), CONSTANT),
    "nan": (lambda: KernelDensity((2,)).fit(torch.full((3, 2), math.nan)), r"data row 0, column 0 is nan"),
    "empty": (lambda: KernelDensity((2,)).fit(torch.zeros(0, 2)), r"`data` has no rows"),
    "one_group": (
        lambda: KernelDensity((2,)).fit({"x": normal(4, 2), "group": torch.full((4,), 3)}),
        r"`data` has one group, 3, and nothing is left without it; give two or more",
    ),
    "broken_group": (
        lambda: KernelDensity((2,)).fit({"x": normal(4, 2), "group": torch.rand(4)}),
        r"`group` should be whole numbers, one a datum, shape \(N,\)",
    ),
    "unknown_group": (
        lambda: fitted().log_prob({"x": normal(1, 2), "group": torch.tensor([99])}),
        r"`group` has 99, which no point has; groups are those of the fit, and -1 leaves none out",
    ),
    "one": (lambda: KernelDensity((2,)).fit(torch.zeros(1, 2)), r"has 1 datum"),
    "unseen": (
        lambda: KernelDensity((4,), columns=MIXED).fit(mixed() + torch.tensor([0.0, 1.0, 0.0, 0.0])),
        r"row \d+ holds 3 in column 1, declared as categorical with values 0 to 2; declare more",
    ),
    "compact_asked": (
        lambda: KernelDensity((2,), "tophat", "leave_one_out").fit(normal(9, 2)),
        r"needs a kernel that is nowhere zero",
    ),
    "weights": (lambda: KernelDensity((1,)).fit({"x": normal(3, 1), "weights": [1, -1, 1]}), r"`weights` should be positive"),
    "bandwidth": (lambda: KernelDensity((2,), bandwidth=-1.0), r"`bandwidth` should be positive"),
    "matrix": (lambda: KernelDensity((2,), bandwidth=[[1, 2], [2, 1]]), r"not positive definite"),
    "shape": (lambda: KernelDensity((2,), bandwidth=[1.0, 2.0, 3.0]), r"a number, 2 of them or a 2 x 2 matrix"),
    "name": (lambda: KernelDensity((2,), "gausian"), r"did you mean 'gaussian'"),
    "features": (lambda: KernelDensity((2,), columns=["continuous"]), r"a kind for each of the 2 numbers"),
    "before": (lambda: KernelDensity((2,)).log_prob(normal(3, 2)), r"no points yet; call fit"),
    "given": (lambda: fitted().conditional_log_prob(normal(3, 2), [0, 1]), r"`given` should be some, not all"),
    "codes": (
        lambda: mixed_fit().conditional([0, 1], [[0.0, 0.0], [1.0, -1.0]]),
        r"`values` row 1 holds -1 in column 1, declared as categorical with values 0 to 2",
    ),
    "nan_given": (lambda: fitted().conditional([0], [[math.nan]]), r"values row 0, column 0 is nan"),
    "exponential": (lambda: fitted("exponential").conditional_log_prob(normal(3, 2), [0]), r"no marginals in closed form"),
    "neighbors": (lambda: KernelDensity((2,), neighbors=3), r"goes with adaptive='nearest'"),
}


def fitted(kernel="gaussian"):
    kde = KernelDensity((2,), kernel, 1.0)
    kde.fit(normal(9, 2))
    return kde


def mixed_fit():
    kde = KernelDensity((4,), columns=MIXED, bandwidth=1.0)
    kde.fit(mixed())
    return kde


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    call, match = BAD[name]
    with pytest.raises((ValueError, TypeError, pgen.NotAvailable), match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_duplicates_have_remedies():
    x = duplicates()
    floored = KernelDensity((2,), floor=0.2)
    floored.fit(x, **QUIET)
    assert 0.2 <= float(floored.bandwidth.min()) < 0.21
    kde = KernelDensity((2,))
    kde.fit({"x": x[:40], "weights": torch.full((40,), 2.0)}, **QUIET)
    assert float(kde.bandwidth.min()) > 0.1
    with pytest.warns(UserWarning, match=r"2% of the points have an exact duplicate"):
        KernelDensity((2,)).fit(normal(99, 2)[[0, *range(99)]], steps=2, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KernelDensity((2,), bandwidth="scott").fit(x)


def test_parzen_windows_prefer_centres_to_data():
    """Why samples are not judged by a kernel estimate: cluster centres score above held-out data."""
    from sklearn.cluster import KMeans

    x = pgen.data.digits()
    train, test = x.train.flatten(1), x.test.flatten(1)[:300]
    centres = KMeans(300, n_init=1, random_state=0).fit(train.double().numpy()).cluster_centers_
    scores = []
    for points in (torch.from_numpy(centres), train[:300]):
        kde = KernelDensity((64,), bandwidth=0.2)
        kde.fit(points)
        scores.append(kde.log_prob(test).mean)
    assert scores[0] > scores[1] + 3


@pytest.mark.parametrize("row", [-2, 30])
def test_a_point_that_is_left_out_is_one_of_those_kept(row):
    x = torch.linspace(-1.0, 1.0, 30)[:, None]
    kde = KernelDensity((1,), bandwidth=0.5)
    kde.fit(x, progress=False)
    kde.log_prob({"x": x[:2], "row": torch.tensor([-1, 29])})
    with pytest.raises(ValueError, match=rf"`row` has {row}; points are 0 to 29, and -1 leaves none out"):
        kde.log_prob({"x": x[:1], "row": torch.tensor([row])})


def test_one_vocabulary_of_columns():
    """The same kinds make a kernel density, a mixture, MADE and a hidden Markov model; binary columns are categories of two."""
    kinds = ["continuous", "binary", ("categorical", 3), ("ordinal", 4)]
    x = torch.tensor([[0.3, 1.0, 2.0, 3.0], [1.5, 0.0, 0.0, 1.0], [0.9, 1.0, 1.0, 0.0], [-0.2, 0.0, 2.0, 2.0]]).repeat(3, 1)
    made = [
        KernelDensity((4,), columns=kinds, bandwidth=1.0),
        pgen.models.Mixture((4,), 2, columns=kinds),
        pgen.models.MADE((4,), (5,), columns=kinds),
    ]
    for model in made:
        model.fit(x, **({} if model is made[0] else {"steps": 1, "progress": False}))
        assert model.settings()["columns"] == ["continuous", "binary", ["categorical", 3], ["ordinal", 4]]
        assert torch.isfinite(model.log_prob(x).value).all()
        with pytest.raises(ValueError, match=r"holds 3|\[2\]|outside the support"):
            model.log_prob(torch.tensor([[0.3, 1.0, 3.0, 3.0]]))
    chain = pgen.models.HiddenMarkov((1, 4), 2, columns=kinds)
    assert chain.settings()["columns"] == made[0].settings()["columns"]
