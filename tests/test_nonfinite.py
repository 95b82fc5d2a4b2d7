"""Steps that are not finite: they change nothing, are counted, and after a few in a row the fit says what went wrong."""

import math
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state
from torch import nn

import pgen
from pgen.models import VAE
from pgen.training import SGD, Adam, NonFinite

LOOP = sys.modules["pgen.training.fit"]
INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
X = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
BAD = 7
"""The row whose ratio is 0 / 0."""
Y = X.clone()
Y[BAD] = 0.0


def fit(model, data, **options):
    return model.fit(data, **{"steps": 12, "batch_size": 4, "progress": False, "unroll": 1, **options})


class Ratios(pgen.GenerativeModel):
    """Batch statistics of ratios of the data; dropout too."""

    def __init__(self, dropout=0.2):
        super().__init__((3,))
        with self.initial_weights(0):
            self.net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 3))

    def model(self, x=None, context=None):
        with self.plate(x, context):
            pyro.sample("x", dist.Normal(self.net(x / x[:, :1]), 1.0).to_event(1), obs=x)

    def settings(self):
        return {}


@pytest.mark.parametrize("optimizer", [Adam(0.01), SGD(0.01, momentum=0.9), lambda p: torch.optim.RMSprop(p, lr=0.01)])
@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_a_skipped_step_changes_nothing_at_all(tier, optimizer, tmp_path):
    """Parameters, the optimizer's state, the moving average and the batch statistics, as the checkpoint holds them."""
    options = {"optimizer": optimizer, "ema": 0.9, "compile": tier}
    first = int(np.flatnonzero(np.isnan(fit(Ratios(), Y, **(options | {"compile": "eager"})).history["loss"]))[0])
    states = []
    for steps in (first, first + 1):
        run = fit(Ratios(), Y, steps=steps, checkpoint=tmp_path / str(steps), **options)
        assert run.tier == tier
        states.append(pgen.files.read(tmp_path / str(steps) / "checkpoint.pgen")[0])
    assert run.skipped == 1 and len(states[0]) > 12
    for name, tensor in states[0].items():
        if not name.startswith("history."):
            assert torch.equal(tensor, states[1][name]) and bool(torch.isfinite(tensor).all()), name


@INDUCTOR
def test_unrolled_steps_skip_as_single_ones_do():
    """One of the three steps in each call is not finite."""
    reference, unrolled = Ratios(dropout=0.0), Ratios(dropout=0.0)
    options = {"data": torch.cat([Y, X[:1]]), "ema": 0.9, "precision": "float64"}
    whole = fit(reference, **options, compile="eager")
    run = fit(unrolled, **options, compile="compiled", unroll=3)
    assert run.tier == "compiled" and run.skipped == whole.skipped == 4
    np.testing.assert_array_equal(np.isnan(run.history["loss"]), np.isnan(whole.history["loss"]))
    torch.testing.assert_close(state(unrolled), state(reference), rtol=1e-9, atol=1e-12)


def test_statistics_taken_anew_leave_out_batches_that_are_not_finite():
    """Those of averaged parameters come from batches of their own, the bad row among them."""
    model = Ratios()
    assert fit(model, Y, ema=0.9).skipped > 0
    norm = model.net[0]
    assert all(bool(torch.isfinite(b).all()) for b in norm.buffers()) and int(norm.num_batches_tracked) > 2


def row_of_zeros(x):
    """The ratio of one row is 0 / 0."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu * x[:, 0] / x[:, 1], 1.0), obs=x[:, 2])


def overflowing(x):
    """A guide whose scale grows by its gradient until float32 has no more room."""
    pyro.sample("z", dist.Normal(0.0, 1e18))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=x)


def growing(x):
    pyro.sample("z", dist.Normal(0.0, pyro.param("log_scale", torch.tensor(40.0)).exp()))


def gradient_alone(x):
    """The square root's slope at zero is infinite though its value is not."""
    a = pyro.param("a", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.sqrt(a * a), 1.0).expand([3]).to_event(1), obs=x)


class Spoil(pgen.training.Callback):
    """Sets a parameter to NaN."""

    def __init__(self, model):
        self.model = model

    def on_log(self, step, metrics):
        with torch.no_grad():
            self.model.encoder.network[0].bias.fill_(math.nan)


def row():
    return pgen.Pair(row_of_zeros), Y, {"max_nonfinite": 1}


def parameter():
    model = VAE((3,), 2, (5,), likelihood="gaussian")
    return model, X, {"callbacks": [Spoil(model)], "checkpoint_every": 500, "steps": 500}


def rate():
    return VAE((3,), 2, (5,), likelihood="gaussian"), X, {"optimizer": SGD(1e3), "steps": 500}


def scale():
    return pgen.Pair(overflowing, growing), X, {"optimizer": SGD(660.0), "schedule": "constant", "batch_size": 11, "steps": 50}


def gradient():
    return pgen.Pair(gradient_alone, lambda x: None), X, {"batch_size": 11}


NAMED = {
    row: r"1 non-finite steps in a row up to step \d+: model site 'x': log-density not finite in 1 of \d rows "
    rf"\(first: data row {BAD}\), its loc is not finite",
    parameter: r"5 non-finite steps in a row up to step \d+: parameter 'encoder.network.0.bias' is not finite",
    rate: r"5 non-finite steps in a row up to step \d+: \w+ site '[xz]': (value|log-density) not finite in . of . rows",
    scale: r"5 non-finite steps in a row up to step \d+: guide site 'z': .* not finite, its scale is not finite",
    gradient: r"5 non-finite steps in a row up to step 5: the gradient of '.*a' is not finite though the loss is",
}


@pytest.mark.parametrize(
    ("case", "tier"),
    [(case, tier) for case in NAMED for tier in ("eager", "graph")] + [pytest.param(scale, "compiled", marks=INDUCTOR)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_went_wrong_is_named(case, tier, tmp_path):
    model, data, options = case()
    with pytest.raises(NonFinite, match=NAMED[case]) as error:
        fit(model, data, checkpoint=tmp_path, compile=tier, **{"checkpoint_every": 1, **options})
    assert "\n" not in str(error.value) and len(str(error.value)) < 250
    run = error.value.run
    assert run is model.last_run and run.tier == tier and run.skipped >= options.get("max_nonfinite", 5)
    finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert finite != (case is parameter)  # what somebody else set to NaN is theirs
    for path in tmp_path.glob("*.pgen"):
        tensors = pgen.files.read(path)[0]
        assert all(bool(torch.isfinite(t).all()) for name, t in tensors.items() if not name.startswith("history."))


@pytest.mark.parametrize("block", [1e-9, 10.0])
def test_skipped_steps_that_are_not_in_a_row_are_counted_alone(block, monkeypatch):
    """A row that no model can stand is skipped with its batch, epoch after epoch."""
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", block)
    run = fit(pgen.Pair(row_of_zeros), Y, steps=30, compile="eager")
    assert run.skipped == 10 and "10 non-finite steps skipped" in str(run)


@pytest.mark.parametrize("block", [1e-9, 10.0])
def test_where_blocks_end_does_not_decide_whether_training_stops(block, monkeypatch):
    """Five in a row are five in a row, in the middle of a block too."""
    calls = []

    def spoil(x):
        calls.append(1)
        return x * (math.nan if 10 < len(calls) <= 15 else 1.0)

    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", block)
    with pytest.raises(NonFinite, match="5 non-finite steps in a row up to step 14"):
        fit(VAE((3,), 2, (5,), likelihood="gaussian"), X, steps=60, augment=spoil, compile="eager")


def test_no_fit_ends_with_a_parameter_that_is_not_finite(tmp_path):
    """One step that overflows in its update, with finite loss and gradient, and none after it to notice."""
    pair = pgen.Pair(overflowing, growing)
    with pytest.raises(NonFinite, match=r"a parameter is not finite after step 1: parameter '.*log_scale' is not finite"):
        fit(pair, X, steps=1, batch_size=11, optimizer=SGD(1e60), schedule="constant", compile="eager", checkpoint=tmp_path)
    assert not list(tmp_path.glob("*.pgen"))
