"""Memory is flat: a step leaves nothing behind but its row of the history."""

import gc
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pgen
from pgen.models import VAE
from pgen.training.heap import _library, heap_kept

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


FAULTS = """
import ctypes, resource, sys
import torch, pgen
from pgen.training.heap import heap_kept

torch.set_num_threads(1)
seen = []

class Faults(pgen.training.Callback):
    def on_log(self, step, metrics):
        seen.append((step, resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
        if sys.argv[2] == "given back":
            ctypes.CDLL(None).mallopt(-1, 128 * 1024)  # the library's first threshold

model = pgen.models.VAE((300,), 8, (700, 700), likelihood="gaussian")
x = torch.randn(64, 300, generator=torch.Generator().manual_seed(3))
model.fit(x, steps=40, batch_size=64, compile=sys.argv[1], progress=False, callbacks=[Faults()])
pairs = list(zip(seen, seen[1:]))[len(seen) // 2 :]
print(sorted((after[1] - before[1]) / (after[0] - before[0]) for before, after in pairs)[len(pairs) // 2])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told")
def test_steps_get_their_memory_back_without_the_system():
    """Faults a step, in processes whose heaps nothing else has torn."""
    kept, given_back = (
        float(subprocess.run([sys.executable, "-c", FAULTS, "eager", how], capture_output=True, check=True, text=True).stdout)
        for how in ("kept", "given back")
    )
    assert kept < 0.2 * given_back and given_back > 200


def test_other_systems_keep_their_heap_as_it_is(monkeypatch):
    monkeypatch.setattr("pgen.training.heap.sys.platform", "darwin")
    assert _library.__wrapped__() is None
    with heap_kept(torch.device("cuda")):  # no graphics processor is asked for
        pass


def test_a_fit_within_a_fit_leaves_the_heap_to_the_outer_one(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "pgen.training.heap._library", lambda: SimpleNamespace(mallopt=lambda *a: calls.append(a), malloc_trim=calls.append)
    )
    monkeypatch.setattr("pgen.training.heap.LONG", 0.0)
    cpu = torch.device("cpu")
    with pytest.raises(KeyError), heap_kept(cpu):
        with heap_kept(cpu):
            calls.clear()
        assert calls == []
        raise KeyError
    assert calls == [(-1, 64 * 2**20), 0]


def test_thresholds_of_the_environment_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    assert _library.__wrapped__() is None
