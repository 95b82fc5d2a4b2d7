"""Images, one pixel after another: what is seen, that steps agree with whole passes, prefixes and missing pixels."""

import pytest
import torch
from cases import seeded

import pgen
from pgen.models import PixelCNN, PixelRNN

FAMILIES = {
    "pixel_cnn": lambda **options: PixelCNN((5, 6), 4, 3, head=30, **options),
    "pixel_cnn_wide": lambda **options: PixelCNN((4, 7), 3, 2, kernel=5, first_kernel=7, head=30, **options),
    "pixel_cnn_colours": lambda **options: PixelCNN((3, 4, 5), 4, 2, first_kernel=5, head=30, **options),
    "pixel_cnn_context": lambda **options: PixelCNN((5, 6), 4, 3, head=30, context_dim=2, **options),
    "pixel_rnn": lambda **options: PixelRNN((5, 6), 4, 2, head=30, **options),
    "pixel_rnn_colours_context": lambda **options: PixelRNN((3, 4, 5), 4, 3, kernel=5, head=30, context_dim=2, **options),
    "diagonal": lambda **options: PixelRNN((5, 6), 4, 2, lstm="diagonal", first_kernel=3, head=30, **options),
    "diagonal_context": lambda **options: PixelRNN(
        (6, 4), 3, 2, lstm="diagonal", first_kernel=5, head=30, context_dim=2, **options
    ),
    "diagonal_colours_context": lambda **options: PixelRNN((3, 4, 5), 4, 3, lstm="diagonal", head=30, context_dim=2, **options),
}
families = pytest.mark.parametrize("name", FAMILIES)
diagonals = pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("diagonal")])


def made(name, **options):
    return moved(FAMILIES[name](**options))


def moved(model):
    model = model.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):  # away from the zeros that some start at
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
    return model


def context(model, rows):
    if not model.context_dim:
        return None
    return torch.randn(rows, model.context_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def images(model, rows=2):
    x = torch.rand(rows, len(model.order), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.round()


def what_is_seen(model):
    """Which numbers each output depends on."""
    x = images(model, 1)
    jacobian = torch.autograd.functional.jacobian(lambda x: model.network(x, context(model, 1))[0], x)
    return (jacobian != 0)[:, 0, 0].reshape(len(model.order), len(model.order))


@families
def test_outputs_see_all_that_comes_before_and_nothing_else(name):
    model = made(name)
    seen = what_is_seen(model)
    before = torch.ones_like(seen).tril(-1)
    assert not bool((seen & ~before).any())
    _, width, channels = model.size
    place = torch.arange(len(before)) // channels
    row, column = place // width, place % width
    near = (row[:, None] - row < 3) & ((column[:, None] - column).abs() <= 1) & (place[:, None] != place)
    assert bool(seen[before & near].all())  # without a blind spot
    if channels > 1:  # the channels of a pixel see those before
        assert bool(seen[before & (place[:, None] == place)].all())


@diagonals
def test_diagonals_see_the_whole_past(name):
    seen = what_is_seen(made(name))
    assert torch.equal(seen, torch.ones_like(seen).tril(-1))


def test_one_diagonal_layer_sees_what_no_row_lstm_sees():
    for lstm, far in (("row", False), ("diagonal", True)):
        seen = what_is_seen(moved(PixelRNN((3, 7), 4, 1, lstm=lstm, first_kernel=3, head=30)))
        assert bool(seen[7, 6]) == far  # from the left end of row 1, the right end of row 0


def recurrence(layer, x, known, told, reverse):
    """One stream of a Diagonal BiLSTM, pixel by pixel from equation 3: x ``(C, H, W)``, ``told`` ``(8 C,)``."""
    size, height, width = x.shape
    into, half = (layer.right, 1) if reverse else (layer.left, 0)
    gates = slice(4 * size * half, 4 * size * (half + 1))
    from_above, from_beside = layer.state_to_state.weight[gates].unbind(2)
    nothing = torch.zeros(size, dtype=x.dtype)
    h, c = {}, {}
    for i in range(height):
        for j in reversed(range(width)) if reverse else range(width):
            beside = (i, j + 1 if reverse else j - 1)
            s = into.weight[:, :, 0, 0] @ (known if reverse else x)[:, i, j] + into.bias + told[gates]
            s = s + from_above @ h.get((i - 1, j), nothing) + from_beside @ h.get(beside, nothing)
            o, f, k, g = s.split(size)
            c[i, j] = f.sigmoid() * c.get(beside, nothing) + k.sigmoid() * g.tanh()
            h[i, j] = o.sigmoid() * c[i, j].tanh()
    return h


@diagonals
def test_diagonals_follow_the_recurrence_pixel_by_pixel(name):
    model = made(name)
    trunk, where = model.network.trunk, context(model, 1)
    height, width, _ = model.size
    pixels = torch.randn(1, trunk.first.in_channels, height, width, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        found = trunk(pixels, where)[0]
        x = trunk.first(pixels)[0]
        known = x + torch.einsum("oi,ihw->ohw", trunk.itself.weight[:, :, 0, 0], pixels[0])
        for layer in trunk.layers:
            told = torch.zeros(8 * len(x)).double() if where is None else layer.condition.weight @ where[0]
            left, right = (recurrence(layer, x, known, told, reverse) for reverse in (False, True))
            out = x.clone()
            for i, j in left:
                out[:, i, j] += left[i, j] + (right[i - 1, j] if i else 0)
            x = known = out
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


def test_a_context_reaches_every_pixel_through_both_streams():
    model = made("diagonal_context")
    x, where = images(model, 1), context(model, 1)
    jacobian = torch.autograd.functional.jacobian(lambda c: model.network(x, c)[0, :, 0], where)[:, 0]
    assert bool((jacobian != 0).all())
    model.network(x, where).sum().backward()
    for layer in model.network.trunk.layers:
        assert bool((layer.condition.weight.grad != 0).all())


@families
def test_steps_give_what_one_pass_gives(name):
    model = made(name)
    x, where = images(model), context(model, 2)
    with torch.no_grad():
        whole = model.network(x, where)
        state, previous = model.network.start(2, where), torch.zeros(2, dtype=torch.float64)
        for t in range(x.shape[1]):
            outputs, state = model.network.step(state, torch.tensor(t), previous)
            torch.testing.assert_close(outputs, whole[:, t], rtol=1e-10, atol=1e-12, msg=lambda m, t=t: f"position {t}: {m}")
            previous = x[:, t]


@families
def test_samples_are_those_of_whole_passes_in_every_tier(name):
    model = made(name)
    where = context(model, 3)
    fn = model.distribution(where).expand((3,))

    def naive():
        x = torch.zeros(3, len(model.order), dtype=torch.float64)
        for t in range(x.shape[1]):
            x[:, t] = model.observation.draw(model.network(x, where)[:, t], torch.tensor(t))
        return x

    with torch.no_grad():
        slow = seeded(naive)
        assert torch.equal(seeded(fn.sample).flatten(1), slow[:, model.order[:, 0].argsort()])
    assert 0.05 < float(slow.mean()) < 0.95
    drawn = [model.sample(3, where, seed=1, compile=tier) for tier in ("eager", "graph")]
    assert torch.equal(*drawn)


def enumerated(count):
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * count)


def test_next_and_completions_are_conditionals_of_the_density(tiny):
    model, x = tiny, enumerated(6)
    log_prob = model.log_prob(x.reshape(-1, 2, 3), progress=False).value
    prefix = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    fits = (x[:, :3] == prefix).all(1)
    one = fits & (x[:, 3] == 1)
    share = float((log_prob[one].logsumexp(0) - log_prob[fits].logsumexp(0)).exp())
    assert float(model.next(prefix).probs) == pytest.approx(share, abs=1e-9)
    drawn = model.complete(prefix.expand(4000, -1), seed=2)
    assert bool((drawn.flatten(1)[:, :3] == prefix).all())
    expected = (log_prob[fits] - log_prob[fits].logsumexp(0)).exp()
    counts = torch.stack([(drawn.flatten(1) == row).all(1).double().mean() for row in x[fits]])
    assert bool(((counts - expected).abs() < 4.5 * (expected * (1 - expected) / 4000).sqrt()).all())


@pytest.fixture(scope="module")
def tiny():
    """Two rows that are mostly equal."""
    generator = torch.Generator().manual_seed(0)
    top = torch.bernoulli(torch.full((300, 1, 3), 0.5), generator=generator)
    flips = torch.bernoulli(torch.full((300, 1, 3), 0.1), generator=generator)
    model = PixelCNN((2, 3), 6, 2, first_kernel=3, head=8)
    model.fit(torch.cat([top, (top - flips).abs()], 1), steps=250, optimizer=0.02, progress=False, precision="float64")
    return model


def test_missing_pixels_follow_the_conditional_distribution(tiny):
    model, x = tiny, enumerated(6)
    log_prob = model.log_prob(x.reshape(-1, 2, 3), progress=False).value
    nan = float("nan")
    given = torch.tensor([[nan, 1.0, nan], [nan, 0.0, 1.0]], dtype=torch.float64)
    known = ~given.isnan().flatten()
    fits = (x[:, known] == given.flatten()[known]).all(1)
    expected = (log_prob[fits] - log_prob[fits].logsumexp(0)).exp()
    drawn = model.infill(given.expand(1500, 2, 3), num_particles=50, seed=1).flatten(1)
    assert bool((drawn[:, known] == given.flatten()[known]).all())
    counts = torch.stack([(drawn == row).all(1).double().mean() for row in x[fits]])
    assert float((counts - expected).abs().max()) < 0.05
    # Drawn in order and blind to what is observed later, they would be far off.
    blind = model.infill(given.expand(1500, 2, 3), num_particles=1, seed=1).flatten(1)
    blind_counts = torch.stack([(blind == row).all(1).double().mean() for row in x[fits]])
    assert float((blind_counts - expected).abs().max()) > 0.1


@pytest.mark.parametrize(
    "make",
    [lambda: PixelCNN((5, 6), 4, 2, dropout=0.1), lambda: PixelRNN((4, 3), 5, 1, lstm="diagonal", dropout=0.1)],
    ids=["pixel_cnn", "diagonal"],
)
def test_tiers_train_the_same(make):
    x = torch.bernoulli(torch.full((16, *make().event_shape), 0.3), generator=torch.Generator().manual_seed(0))
    found = []
    for tier in ("eager", "graph"):
        model = make()
        run = model.fit(x, steps=4, batch_size=8, compile=tier, progress=False, precision="float64")
        found.append(torch.tensor(run.history["loss"]))
    torch.testing.assert_close(*found)


def test_a_file_knows_the_kind_of_recurrence(tmp_path):
    x, where = torch.zeros(2, 6, 4), torch.ones(2, 2)
    for options in ({"lstm": "diagonal"}, {"kernel": 5}):
        model = PixelRNN((6, 4), 3, 2, first_kernel=5, head=7, context_dim=2, dropout=0.25, **options)
        model.save(tmp_path / "model")
        again = pgen.load(tmp_path / "model")
        assert again.settings() == model.settings()
        assert {"lstm": "row", "kernel": None, **options}.items() <= again.settings().items()
        assert torch.equal(again.log_prob(x, where).value, model.log_prob(x, where).value)
        assert torch.equal(again.sample(2, where, seed=1), model.sample(2, where, seed=1))


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match="look 7 pixels sideways, which should be less than the width of the image, 6"):
        PixelCNN((8, 6), layers=6)
    with pytest.raises(ValueError, match="`kernel` should be a positive odd number, got 4"):
        PixelCNN((8, 8), kernel=4)
    with pytest.raises(ValueError, match=r"`lstm` is 'diagnal', which is unknown.*diagonal"):
        PixelRNN((8, 8), lstm="diagnal")
    with pytest.raises(ValueError, match=r"`kernel` goes with lstm='row', not 'diagonal'.*leave it out"):
        PixelRNN((8, 8), lstm="diagonal", kernel=3)
    with pytest.raises(ValueError, match="`first_kernel` should be at least 3, got 1, which sees none of the pixels before"):
        PixelRNN((8, 8), first_kernel=1)
    with pytest.raises(ValueError, match=r"`event_shape` should be \(height, width\)"):
        PixelCNN((8,))
    model = PixelCNN((3, 4), 2, 1)
    with pytest.raises(ValueError, match=r"`prefix` should have shape \(N, t\).*t at most 11, got \(2, 12\)"):
        model.next(torch.zeros(2, 12))
    with pytest.raises(ValueError, match=r"`prefix` holds 2, outside the support Boolean\(\)"):
        model.complete(torch.full((2, 3), 2.0))
    with pytest.raises(ValueError, match=r"`x` holds 0\.5, outside the support"):
        model.infill(torch.full((2, 3, 4), 0.5))
    with pytest.raises(ValueError, match=r"data row 1 holds 0\.5, outside the support Boolean\(\)"):
        model.fit(torch.tensor([0.0, 0.5]).reshape(2, 1, 1).expand(2, 3, 4).clone(), progress=False)
    levels = PixelCNN((3, 4), 2, 1, likelihood="discretized_logistic_mixture", num_classes=256)
    with pytest.raises(ValueError, match=r"holds 256, outside the support .*upper_bound=255"):
        levels.fit(torch.full((2, 3, 4), 256.0), progress=False)
