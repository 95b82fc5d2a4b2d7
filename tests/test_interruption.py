"""Ctrl-C and SIGTERM: the step at hand ends, the run is saved, the process ends as the signal asks."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import state

import pgen
from pgen.models import VAE
from pgen.training import interruption

LOOP = sys.modules["pgen.training.fit"]
CHECKPOINT = sys.modules["pgen.training.checkpoint"]
X = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import


def vae(seed=0):
    return VAE((3,), 2, (5,), likelihood="gaussian", seed=seed)


def fit(model, **options):
    return model.fit(X, **{"steps": 23, "batch_size": 4, "progress": False, "compile": "eager", **options})


ENDS = {signal.SIGINT: (KeyboardInterrupt, "Ctrl-C"), signal.SIGTERM: (SystemExit, "SIGTERM")}


def interrupted(model, number, **options):
    """A fit that a signal ends, its handlers restored; what was raised."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    error, word = ENDS[number]
    with pytest.raises(error) as caught:
        fit(model, **options)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    if model.last_run is not None:
        assert model.last_run.stopped.startswith(f"interrupted ({word})")
    return caught.value


def at_step(monkeypatch, wanted, number):
    """Send ``number`` during the ``wanted``-th step of any tier."""
    call = LOOP._Trainer._call

    def signalling(self, step, limit, *rest):
        taken, out = call(self, step, limit, *rest)
        if step < wanted <= step + taken:
            signal.raise_signal(number)
        return taken, out

    monkeypatch.setattr(LOOP._Trainer, "_call", signalling)


def resumed(tmp_path, monkeypatch, **options):
    """The run taken up where it was saved gives the bits of the whole one."""
    monkeypatch.undo()
    whole, other = vae(), vae(seed=5)
    run = fit(whole, **options)
    again = fit(other, **options, checkpoint=tmp_path)
    assert torch.equal(state(whole), state(other))
    np.testing.assert_array_equal(run.history["loss"], again.history["loss"])
    for name, column in run.validation.items():
        np.testing.assert_array_equal(column, again.validation[name])
    return again


@pytest.mark.parametrize("number", ENDS, ids=lambda n: n.name)
@pytest.mark.parametrize("step", [1, 8], ids=["first step", "mid-epoch"])
@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_a_signal_ends_the_fit_after_the_step_at_hand(number, step, tier, tmp_path, monkeypatch):
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", 1e9)  # whole epochs in one block
    at_step(monkeypatch, step, number)
    model = vae()
    error = interrupted(model, number, checkpoint=tmp_path, compile=tier)
    assert model.last_run.steps == step == len(model.last_run.history["loss"])
    if number == signal.SIGTERM:
        assert error.code == 143
    else:
        words = f"fit ended after step {step} of 23: interrupted (Ctrl-C); the same call goes on from {tmp_path}"
        assert str(error) == words
    assert resumed(tmp_path, monkeypatch, compile=tier).resumed == step


@INDUCTOR
def test_a_signal_during_unrolled_steps(tmp_path, monkeypatch):
    options = {"compile": "compiled", "unroll": 3, "batch_size": 11}
    at_step(monkeypatch, 7, signal.SIGTERM)
    model = vae()
    interrupted(model, signal.SIGTERM, checkpoint=tmp_path, **options)
    assert model.last_run.steps == 9 and model.last_run.tier == "compiled"
    resumed(tmp_path, monkeypatch, **options)


@pytest.mark.parametrize("options", [{}, {"ema": 0.9}], ids=["", "averaged"])
def test_a_signal_during_validation(options, tmp_path, monkeypatch):
    """The validation is thrown away and made again; parameters held aside for the average come back."""
    options = {**options, "validation": X[:5], "validate_every": 4}
    bound_rows = VAE.bound_rows

    def signalling(self, objective, batch, pause):
        signal.raise_signal(signal.SIGINT)
        return bound_rows(self, objective, batch, pause)

    monkeypatch.setattr(VAE, "bound_rows", signalling)
    model = vae()
    interrupted(model, signal.SIGINT, checkpoint=tmp_path, **options)
    assert model.last_run.steps == 4 and not model.last_run.validation
    assert all(module.training for module in model.modules())
    resumed(tmp_path, monkeypatch, **options)


@INDUCTOR
def test_a_signal_during_compilation_cuts_it_short(tmp_path, monkeypatch):
    def endless(graph, inputs):
        signal.raise_signal(signal.SIGTERM)
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(LOOP, "compile_graph", endless)
    options = {"compile": "compiled", "batch_size": 11, "unroll": 2}
    interrupted(vae(), signal.SIGTERM, checkpoint=tmp_path, **options)
    assert pgen.files.read_metadata(tmp_path / "checkpoint.pgen")["counters"]["done"] == 0


def test_a_signal_during_capture(tmp_path, monkeypatch):
    graph = LOOP.Step.graph

    def signalling(self, index, other):
        signal.raise_signal(signal.SIGINT)
        return graph(self, index, other)

    monkeypatch.setattr(LOOP.Step, "graph", signalling)
    interrupted(vae(), signal.SIGINT, checkpoint=tmp_path, compile="graph")
    resumed(tmp_path, monkeypatch, compile="graph")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_signal_during_a_save_lets_it_end(call, tmp_path, monkeypatch):
    real = getattr(os, call)

    def signalling(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(os, call, signalling)
    model = vae()
    interrupted(model, signal.SIGTERM, checkpoint=tmp_path, checkpoint_every=3)
    assert model.last_run.steps == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pgen"]
    resumed(tmp_path, monkeypatch)


def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(interruption, "ECHO_SECONDS", -1.0)
    before = CHECKPOINT.files.write

    def twice(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal did not end the save")

    fit(vae(), steps=3, checkpoint=tmp_path, checkpoint_every=1)
    content = (tmp_path / "checkpoint.pgen").read_bytes()
    monkeypatch.setattr(CHECKPOINT.files, "write", twice)
    with pytest.raises(KeyboardInterrupt):
        fit(vae(), checkpoint=tmp_path, checkpoint_every=1)
    assert CHECKPOINT.files.write is not before
    assert (tmp_path / "checkpoint.pgen").read_bytes() == content
    resumed(tmp_path, monkeypatch)


def test_an_echo_of_the_first_signal_is_not_a_second_one(monkeypatch):
    call = LOOP._Trainer._call

    def twice(self, *args):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        return call(self, *args)

    monkeypatch.setattr(LOOP._Trainer, "_call", twice)
    model = vae()
    interrupted(model, signal.SIGTERM)
    assert model.last_run.steps == 1


def test_handlers_of_the_program_are_called_after_the_fit(monkeypatch):
    """A program that looks after SIGTERM itself is told once the model is whole, and decides what comes next."""
    called, model = [], vae()
    at_step(monkeypatch, 2, signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, lambda *_: called.append(model.last_run))
    try:
        run = fit(model)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(called) == 1 and run.steps == 2 and run.stopped == "interrupted (SIGTERM)"


def test_ignored_signals_stay_ignored(monkeypatch):
    at_step(monkeypatch, 2, signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert fit(vae()).steps == 23
    finally:
        signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_signals_are_left_alone():
    runs = []
    thread = threading.Thread(target=lambda: runs.append(fit(vae())))
    thread.start()
    thread.join()
    assert runs[0].steps == 23


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import pgen
from pgen.models import VAE

class Tell(pgen.training.Callback):
    def on_log(self, step, metrics):
        if step > 10:
            print("training", flush=True)

x = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
model = VAE((3,), 2, (5,), likelihood="gaussian")
try:
    model.fit(x, steps=10_000_000, batch_size=4, checkpoint=sys.argv[1], progress=False, compile="eager", callbacks=[Tell()])
finally:
    print("cleaned up after", model.last_run.steps, flush=True)
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)], ids=["SIGTERM", "SIGINT"]
)
def test_a_script_saves_cleans_up_and_leaves_with_the_code_of_the_signal(number, code, tmp_path):
    """Python ends itself by SIGINT after an uncaught KeyboardInterrupt, which a shell reports as 130."""
    environment = {**os.environ, "PYTHONPATH": str(Path(pgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "training\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    steps = int(out.split()[-1])
    model = vae()
    again = fit(model, checkpoint=tmp_path, steps=steps + 3)
    assert again.resumed == steps and again.steps == steps + 3
