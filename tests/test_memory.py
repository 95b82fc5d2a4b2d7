"""Memory is flat: a step leaves nothing behind but its row of the history."""

import gc
from pathlib import Path

import pytest
import torch

import pgen
from pgen.models import VAE

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))
PAGE = 4096


class Watch(pgen.training.Callback):
    """Live tensors and resident bytes at a step and at the end."""

    def __init__(self, start):
        self.start, self.seen = start, []

    def on_log(self, step, metrics):
        if step >= self.start and not self.seen:
            self.seen.append(self.look())

    def on_end(self, run):
        self.seen.append(self.look())

    @staticmethod
    def look():
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
@pytest.mark.parametrize("tier", ["eager", "graph", "compiled"])
def test_two_thousand_steps_leave_nothing_behind(tier):
    watch = Watch(300)
    model = VAE((3,), 2, (5,), likelihood="gaussian")
    run = model.fit(X, steps=2000, batch_size=40, compile=tier, unroll=1, ema=0.9, progress=False, callbacks=[watch])
    (tensors, resident), (tensors_after, resident_after) = watch.seen
    assert run.steps == 2000 and run.tier == tier
    assert tensors_after <= tensors + 10
    assert resident_after - resident < 5e6


def test_the_history_costs_a_few_numbers_a_step():
    run = VAE((3,), 2, (5,), likelihood="gaussian").fit(X, steps=50, batch_size=20, progress=False)
    assert sum(column.nbytes for column in run.history.values()) / 50 <= 100
