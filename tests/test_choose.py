"""Choosing between models by held-out likelihood."""

import pytest
import torch
from cases import seeded

import pgen
from pgen.evaluation.choose import _chosen
from pgen.models import Gaussian, GaussianMixture


def groups(n, seed):
    """Three groups on a line, of equal size."""
    return seeded(lambda: torch.randn(n, 1), seed) + torch.tensor([-6.0, 0.0, 6.0])[torch.arange(n) % 3][:, None]


@pytest.fixture(scope="module")
def choice():
    models = {k: GaussianMixture((1,), k) for k in (1, 2, 3, 5)}
    return pgen.choose(models, groups(300, 1), groups(300, 2), steps=100, compile="eager", progress=False)


def test_the_number_of_groups_is_found(choice):
    assert choice.name == "3" and choice.model is choice.models["3"] and choice.model.num_components == 3
    assert list(choice.models) == ["1", "2", "3", "5"]


def test_the_table_says_what_was_chosen(choice):
    said = str(choice)
    assert "<- chosen" in said.splitlines()[3] and said.count("±") >= 7
    assert "the first within one standard error of the best" in said and repr(choice) == said


def scores(**values):
    kinds = {name: pgen.Score(torch.tensor(value, dtype=torch.float64), "exact") for name, value in values.items()}
    return pgen.compare(kinds)


def test_the_rule_takes_the_first_within_one_standard_error():
    even, odd = [-1.0, -2.0, -3.0, -4.0], [-1.1, -1.9, -3.1, -3.9]  # equal means, paired sd 0.115, so se 0.058
    found = scores(rich=even, simple=[v - 0.05 for v in odd], poor=[v - 0.07 for v in odd])
    assert _chosen(["poor", "simple", "rich"], found, "one_standard_error") == "simple"
    assert _chosen(["poor", "simple", "rich"], found, "best") == "rich"
    assert _chosen(["rich", "simple"], found, "one_standard_error") == "rich"


def test_any_families_and_contexts_take_part():
    c = seeded(lambda: torch.rand(200, 1), 4)
    y = 3 * c + 0.1 * seeded(lambda: torch.randn(200, 1), 5)
    models = {"one": GaussianMixture((1,), 1, context_dim=1, hidden=(8,)), "two": GaussianMixture((1,), 2, context_dim=1)}
    found = pgen.choose(
        models, y[:100], y[100:], context=c[:100], validation_context=c[100:], rule="best", steps=20, progress=False
    )
    assert found.best == found.name
    assert pgen.choose({"gaussian": Gaussian((1,))}, y[:100], y[100:], progress=False).name == "gaussian"


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match=r"`models` should be a dict of models"):
        pgen.choose({}, torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="`rule` is 'first', which is unknown"):
        pgen.choose({"a": Gaussian((1,))}, torch.zeros(2, 1), torch.zeros(2, 1), rule="first")
    with pytest.raises(ValueError, match=r"^a: number 0 of each datum is constant"):
        pgen.choose({"a": GaussianMixture((1,), 1)}, torch.zeros(4, 1), torch.zeros(2, 1), progress=False)


def test_one_datum_has_no_standard_error():
    x = torch.linspace(-1.0, 1.0, 20)[:, None]
    given = {"one": Gaussian((1,)), "same": Gaussian((1,))}
    with pytest.raises(ValueError, match=r"`validation` has one datum, .* rule=.best."):
        pgen.choose(given, x, x[:1], progress=False)
    assert pgen.choose(given, x, x[:1], rule="best", progress=False).name in given
