"""What callbacks leave behind."""

import pytest
import torch

import pgen
from pgen.evaluation import Watch
from pgen.evaluation.sample_measures import Finding
from pgen.training import Callback, TensorBoard


def test_tensorboard_holds_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x = (torch.arange(150) % 3 == 0).float().reshape(50, 3)
    vae = pgen.models.VAE((3,), 2, (5,))
    run = vae.fit(x, validation=x[:9], steps=12, batch_size=25, progress=False, callbacks=[TensorBoard(tmp_path)])
    written = EventAccumulator(str(tmp_path))
    written.Reload()
    assert {"loss", "grad_norm", "lr", "validation_bound"} <= set(written.Tags()["scalars"])
    assert written.Scalars("loss")[-1].step == 12
    assert written.Scalars("validation_bound")[-1].value == pytest.approx(run.validation["bound"][-1], rel=1e-5)


def test_a_fit_that_stops_early_shows_what_it_keeps():
    class Seen(Callback):
        every = 4

        def __init__(self, model):
            self.model, self.steps, self.bound = model, [], 0.0

        def on_state(self, step):
            self.steps.append(step)
            self.bound = self.model.log_prob(x[:9], progress=False).mean

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    model = pgen.models.MADE((3,), (5,), likelihood="gaussian")
    seen = Seen(model)
    options = {"batch_size": 25, "progress": False, "callbacks": [seen], "optimizer": 1.0}
    run = model.fit(x, validation=x[:9], steps=400, validate_every=3, early_stopping=2, **options)
    assert run.steps < 400 and run.steps % 4 and seen.steps[-1] == run.steps and seen.steps[:-1] == [*range(4, run.steps, 4)]
    assert seen.bound == pytest.approx(max(run.validation["bound"]), abs=1e-4)


class Moved(pgen.models.Gaussian):
    """Draws of a conditional model without fitting one: the context itself."""

    def sample(self, n=1, context=None, *, seed=0, progress=True):
        if context is None:
            raise ValueError("`context` is missing")
        return torch.as_tensor(context).expand(n, -1)


def test_a_conditional_model_is_watched_and_what_is_amiss_ends_the_fit_before_its_first_step():
    def measure(x):
        return {"mean": Finding("mean", float(x.mean()), 0.0, (len(x), 0)), "rows": Finding("rows", len(x), 0.0, (len(x), 0))}

    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    options = {"steps": 5, "batch_size": 25, "progress": False}
    model = Moved((3,))
    watch = Watch(model, measure, every=2, num=7, context=torch.tensor([[1.0, 2.0, 6.0]]))
    model.fit(x, callbacks=[watch], **options)
    assert watch.history == {"step": [2, 4, 5], "mean": [3.0, 3.0, 3.0], "rows": [7, 7, 7]}
    steps = []
    counted = type("Counted", (Callback,), {"on_log": lambda self, step, metrics: steps.append(step)})()
    with pytest.raises(ValueError, match="`context` is missing"):
        model.fit(x, callbacks=[counted, Watch(model, measure, every=2, num=7)], **options)
    assert steps == []
