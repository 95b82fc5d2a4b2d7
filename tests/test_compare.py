"""Scores side by side: pairing, what bounds prove, units."""

import math
import re

import pytest
import torch

import pgen
from pgen import plots
from pgen.contracts import Score, difference_kind
from pgen.models import VAE, Gaussian


def score(values, kind="exact", **fields):
    return Score(torch.as_tensor(values, dtype=torch.float64), kind, **fields)


def noisy(shift, kind="exact", n=400, seed=1, noise=0.1):
    generator = torch.Generator().manual_seed(seed)
    hard = 5 * torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return score(hard + shift + noise * torch.randn(n, generator=generator, dtype=torch.float64), kind)


# --- arithmetic ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "kind"),
    [
        ("exact", "exact", "exact"),
        ("lower_bound", "exact", "lower_bound"),
        ("exact", "lower_bound", "upper_bound"),
        ("upper_bound", "exact", "upper_bound"),
        ("exact", "upper_bound", "lower_bound"),
        ("lower_bound", "upper_bound", "lower_bound"),
        ("upper_bound", "lower_bound", "upper_bound"),
        ("lower_bound", "lower_bound", "estimate"),
        ("upper_bound", "upper_bound", "estimate"),
        ("estimate", "exact", "estimate"),
        ("unnormalised", "lower_bound", "unnormalised"),
    ],
)
def test_a_difference_knows_what_its_terms_leave_it(first, second, kind):
    assert difference_kind(first, second) == kind
    assert (score([1.0, 2.0], first) - score([0.5, 1.0], second)).kind == kind


def test_a_difference_adds_errors_in_squares_and_is_a_ratio():
    a = score([1.0, 2.0], "lower_bound", mc_error=torch.tensor([3.0, 0.0]), measure="density")
    b = score([0.5, 3.0], "lower_bound", mc_error=torch.tensor([4.0, 1.0]), measure="density")
    assert (a - b).value.tolist() == [0.5, -1.0]
    assert (a - b).mc_error.tolist() == [5.0, 1.0] and (a - b).measure == "ratio"
    with pytest.raises(ValueError, match="one score has 2 data, the other 1"):
        a - score([1.0])
    with pytest.raises(TypeError):
        a - 1.0


# --- verdicts ------------------------------------------------------------------------------------------------------------


def test_differences_are_paired():
    found = pgen.compare({"a": noisy(0.05, seed=1), "b": noisy(0.0, seed=2)})
    difference = found.difference("a", "b")
    assert found.scores["a"].std_error > 0.2  # 5 / sqrt(400): either mean alone says nothing
    assert difference.std_error == pytest.approx(0.1 * math.sqrt(2 / 400), rel=0.2)
    assert difference.winner == "a" and difference.verdict == "a is better"
    assert found.difference("b", "a").winner == "a"
    assert found.names == ["a", "b"] and found.best == ["a"]


@pytest.mark.parametrize(
    ("high", "low", "winner"),
    [
        ("exact", "exact", "high"),
        ("lower_bound", "exact", "high"),  # its density is higher still
        ("exact", "lower_bound", None),  # the bound may be loose
        ("exact", "upper_bound", "high"),
        ("upper_bound", "exact", None),
        ("lower_bound", "upper_bound", "high"),
        ("upper_bound", "lower_bound", None),
        ("lower_bound", "lower_bound", None),
        ("estimate", "exact", None),
        ("exact", "estimate", None),
        ("unnormalised", "exact", None),
    ],
)
def test_bounds_prove_what_they_can(high, low, winner):
    found = pgen.compare({"low": noisy(0.0, low, seed=1), "high": noisy(2.0, high, seed=2)})
    assert found.difference("high", "low").winner == winner
    assert found.difference("low", "high").winner == winner
    assert found.best == (["high"] if winner else ["low"] if high == "unnormalised" else ["high", "low"])
    assert ("undecided" in str(found)) == (winner is None)


def test_what_is_not_normalised_comes_last_and_has_no_bits():
    raw = score([5000.0, 5001.0, 5003.0], "unnormalised", event_size=2)
    assert str(raw) == "5001.33 ± 0.88 nats a datum (unnormalised), 3 data" and "bits" not in str(score([1.0], "unnormalised"))
    found = pgen.compare(
        {"raw": raw, "g": score([-3.0, -4.0, -3.0], event_size=2), "h": score([-5.0, -6.0, -7.0], event_size=2)}
    )
    assert found.names == ["g", "h", "raw"] and "raw" not in found.best
    assert [row["bits_per_dim"] is None for row in found.to_dict()["models"]] == [False, False, True]
    line = str(found).splitlines()[3]
    assert line.split()[:2] == ["3", "raw"] and re.search(r"unnormalised +- +- +undecided: not normalised$", line)
    assert "raw is not normalised: its mean says nothing beside others'" in found.to_markdown()
    assert pgen.compare({"a": raw, "b": raw}).best == ["a", "b"]


def test_noise_is_not_a_victory_and_more_pairs_ask_for_more():
    scores = {name: noisy(0.0, seed=i) for i, name in enumerate("abcdefgh")}
    found = pgen.compare(scores)
    assert found.best == found.names
    assert found.difference("a", "b").width == pytest.approx(3.1237, abs=1e-3)  # the normal quantile of 1 - 0.05 / 56
    assert pgen.compare({"a": scores["a"], "b": scores["b"]}).difference("a", "b").width == pytest.approx(1.95996, abs=1e-4)


def test_verdicts_hold_together_at_their_level():
    wrong = sum(
        len(pgen.compare({name: noisy(0.0, seed=10 * trial + i) for i, name in enumerate("abc")}).best) < 3
        for trial in range(300)
    )
    assert wrong <= 28  # at most 15 expected; more than 28 has a probability below 0.001


def test_no_density_at_all_loses_and_is_noted():
    found = pgen.compare({"hole": score([-1.0, -math.inf, -1.0]), "whole": score([-3.0, -4.0, -3.0])})
    assert found.names == ["whole", "hole"] and found.best == ["whole"]
    assert "hole gives no density at all to 1 of 3 data" in str(found)
    bound = pgen.compare({"hole": score([-1.0, -math.inf, -1.0], "lower_bound"), "whole": score([-3.0, -4.0, -3.0])})
    assert set(bound.best) == {"hole", "whole"}
    lost = pgen.compare({"nan": score([-1.0, math.nan, -1.0]), "whole": score([-3.0, -4.0, -3.0])})
    assert lost.names == ["whole", "nan"] and lost.difference("whole", "nan").winner is None and "NaN" in str(lost)


def test_a_density_of_zero_has_no_standard_error():
    hole = score([-1.0, -math.inf, -3.0, -math.inf], event_size=2)
    told = "-inf nats a datum (exact), inf bits/dim, 4 data; 2 of 4 lie where the density is zero (the others: -2.00)"
    assert str(hole) == told
    assert str(score([-math.inf])) == "-inf nats (exact), inf bits/dim; 1 of 1 lies where the density is zero"
    whole = score([-3.0, -4.0, -3.0, -4.0], event_size=2)
    for text in (str(pgen.compare({"hole": hole, "whole": whole})), pgen.compare({"a": hole, "b": hole}).to_markdown()):
        assert "nan" not in text and "-inf" in text and "no density at all to 2 of 4 data" in text
    assert pgen.compare({"a": hole, "b": hole}).difference("a", "b").verdict == "undecided: zero density on both sides"


# --- units ---------------------------------------------------------------------------------------------------------------


def test_unlike_scores_are_refused_in_one_line():
    with pytest.raises(ValueError, match="'a' has 2 data, 'b' 3; score the same data"):
        pgen.compare({"a": score([1.0, 2.0]), "b": score([1.0, 2.0, 3.0])})
    with pytest.raises(ValueError, match="a datum of 'a' has 1 numbers, one of 'b' 4"):
        pgen.compare({"a": score([1.0, 2.0]), "b": score([1.0, 2.0], event_size=4)})
    with pytest.raises(ValueError, match=r"'a' is a log-density, 'b' a log-mass: .*Dequantize"):
        pgen.compare({"a": score([1.0, 2.0], measure="density"), "b": score([1.0, 2.0], measure="mass")})
    with pytest.raises(TypeError, match=r"`models` should be a dict .*, got a list$"):
        pgen.compare([score([1.0])])
    with pytest.raises(TypeError, match=r"`models\['a'\]` should be a Score or a fitted model"):
        pgen.compare({"a": 3.0})
    with pytest.raises(ValueError, match="`data` is missing: 'g' is a model"):
        pgen.compare({"g": Gaussian((2,))})
    with pytest.raises(ValueError, match="`level` should lie between 0 and 1"):
        pgen.compare({"a": score([1.0])}, level=95)
    with pytest.raises(ValueError, match="'c' is not in this comparison"):
        pgen.compare({"a": score([1.0])}).difference("a", "c")


def test_unknown_units_are_noted():
    found = pgen.compare({"a": score([1.0, 2.0], measure="density"), "mine": score([1.0, 2.0])})
    assert "Whether mine is a density or a mass is not known" in str(found)


def test_models_know_their_measure():
    x = torch.bernoulli(torch.full((30, 4), 0.5), generator=torch.Generator().manual_seed(0))
    gaussian, vae = Gaussian((4,)), VAE((4,), 2, (5,))
    gaussian.fit(x)
    bound = Gaussian((4,), preprocess=pgen.data.Dequantize(2))
    bound.fit(x)
    assert gaussian.log_prob(x).measure == "density"
    assert vae.log_prob(x, num_samples=2).measure == vae.log_prob(x, method="ais", num_temps=2).measure == "mass"
    assert (bound.log_prob(x).kind, bound.log_prob(x).measure) == ("lower_bound", "mass")
    with pytest.raises(ValueError, match="'gaussian' is a log-density, 'vae' a log-mass"):
        pgen.compare({"gaussian": gaussian, "vae": vae}, x)
    found = pgen.compare({"bound": bound, "vae": vae}, x, num_samples=5)
    assert {s.kind for s in found.scores.values()} == {"lower_bound"}


# --- models --------------------------------------------------------------------------------------------------------------


def test_models_are_asked_about_the_data_and_the_better_one_wins():
    torch_generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 1, generator=torch_generator) @ torch.ones(1, 3) + 0.3 * torch.randn(600, 3, generator=torch_generator)
    train, test = x[:400], x[400:]
    models = {"diagonal": Gaussian((3,), "diagonal"), "full": Gaussian((3,))}
    for model in models.values():
        model.fit(train)
    found = pgen.compare(models, test)
    assert found.names == ["full", "diagonal"] and found.best == ["full"]
    # The mutual information that independence throws away: 1/2 log of the product of variances over the determinant.
    gain = 0.5 * math.log(1.09**3 / (0.09**2 * 3.09))
    assert found.difference("full", "diagonal").mean == pytest.approx(gain, abs=0.2)
    with pytest.raises(ValueError, match=r"^full: `x` should have shape \(N, 3\)"):
        pgen.compare({"full": models["full"]}, test[:, :2])
    with pytest.raises(pgen.NotAvailable, match=r"^ae: "):
        pgen.compare({"ae": pgen.models.Autoencoder((3,), 2)}, test)


# --- what is printed -----------------------------------------------------------------------------------------------------


def test_tables_say_the_same_everywhere(tmp_path):
    found = pgen.compare({"a|b": noisy(0.0, "lower_bound"), "c": noisy(1.0, seed=2)})
    text, markdown, plain, frame = str(found), found.to_markdown(tmp_path / "t.md"), found.to_dict(), found.to_frame()
    assert text.splitlines()[1].startswith("1     c") and "lower bound" in text and repr(found) == text
    assert markdown == (tmp_path / "t.md").read_text() and "a\\|b" in markdown
    assert [row["model"] for row in plain["models"]] == ["c", "a|b"] == list(frame["model"])
    assert plain["pairs"][0]["winner"] is None and plain["pairs"][0]["kind"] == "upper_bound"
    assert frame.loc[2, "difference"] == pytest.approx(-1.0, abs=0.05)


def test_the_picture_has_a_mark_for_each_model_and_arrows_for_bounds():
    found = pgen.compare({"a": noisy(0.0, "lower_bound"), "b": noisy(1.0, seed=2), "c": noisy(-300.0, "upper_bound", seed=3)})
    ax = plots.comparison(found).axes[0]
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["b", "a", "c"]
    assert [container[0].get_marker() for container in ax.containers] == ["o", ">", "<"]
    assert ax.get_xscale() == "symlog"


def test_what_all_scores_are_of_is_told():
    of = "of draws blurred by s = 0.1, not of the GAN"
    scores = {n: Score(torch.randn(9), "estimate", 2, measure="density", note=of) for n in "ab"}
    found = pgen.compare(scores)
    assert f"All scores are {of}." in str(found) and f"All scores are {of}." in found.to_dict()["notes"]


def test_what_is_not_normalised_has_no_place_on_the_axis():
    kinds = {"energy": ("unnormalised", 400.0), "gaussian": ("exact", -2.0), "flow": ("exact", -1.5)}
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    scores = {
        n: Score(mean + (i + 1) * 0.1 * noise, kind, 2, measure="density") for i, (n, (kind, mean)) in enumerate(kinds.items())
    }
    (ax,) = plots.comparison(pgen.compare(scores)).axes
    assert len(ax.containers) == 2 and ax.get_xscale() == "linear" and ax.get_xlim()[1] < 1
    assert ax.get_yticklabels()[-1].get_text() == "energy\nunnormalised"
