"""Checkpoints: a resumed run is the run, whatever ended it; what cannot be resumed says so."""

import contextlib
import errno
import json
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded, state
from test_engine import Game, Two
from test_training import Stateful

import pgen
from pgen.models import VAE
from pgen.training import AdamW, checkpoint
from pgen.training.checkpoint import Checkpoint
from pgen.training.optim import SGD, Adam

LOOP = sys.modules["pgen.training.fit"]
X = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
Y = torch.linspace(-1.0, 3.0, 11)
INDUCTOR = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import


def vae(seed=0):
    return VAE((3,), 2, (5,), likelihood="gaussian", seed=seed)


def fit(model, data=X, **options):
    return model.fit(data, **{"steps": 9, "batch_size": 4, "progress": False, "compile": "eager", **options})


class StopAt(pgen.training.Callback):
    """Ctrl-C at a step."""

    def __init__(self, step):
        self.step = step

    def on_log(self, step, metrics):
        if step >= self.step:
            signal.raise_signal(signal.SIGINT)


def stopped(model, step, **options):
    """A fit that ends early."""
    with pytest.raises(KeyboardInterrupt):
        fit(model, **options, callbacks=[StopAt(step)])
    assert 0 < model.last_run.steps < options["steps"]


def same(run, again):
    for name in ("loss", "lr", "grad_norm", "step"):
        np.testing.assert_array_equal(run.history[name], again.history[name])
    assert (np.diff(again.history["seconds"]) >= 0).all()
    assert run.validation.keys() == again.validation.keys()
    for name, column in run.validation.items():
        np.testing.assert_array_equal(column, again.validation[name])
    assert run.restored == again.restored and run.skipped == again.skipped


# --- the same bits -------------------------------------------------------------------------------------------------------

RUNS = {
    "plain": {},
    "averaged, clipped, validated": {"ema": 0.9, "clip_norm": 1.0, "validation": X[:5], "validate_every": 4},
    "momentum, cosine": {"optimizer": SGD(1e-3, momentum=0.9), "schedule": "cosine"},
    "float64": {"precision": "float64", "optimizer": AdamW(1e-2)},
    "RMSprop": {"optimizer": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.3), "schedule": "linear"},
    "AMSGrad": {"optimizer": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True)},
    "two groups": {"optimizer": lambda p: torch.optim.Adagrad([{"params": p[:2], "lr": 0.1}, {"params": p[2:]}])},
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_a_resumed_run_is_the_run(name, tier, tmp_path):
    options = {"steps": 23, "compile": tier, "checkpoint_every": 2, **RUNS[name]}
    whole = vae()
    run = fit(whole, **options)
    stopped(vae(), 4, **options, checkpoint=tmp_path)
    other = vae(seed=5)
    again = fit(other, **options, checkpoint=tmp_path)
    assert torch.equal(state(whole), state(other))
    same(run, again)


@INDUCTOR
@pytest.mark.parametrize(("unroll", "batch_size"), [(1, 11), (3, 11), (1, 3)], ids=["single", "unrolled", "minibatches"])
def test_a_resumed_run_is_the_run_when_compiled(unroll, batch_size, tmp_path):
    """Blocks end elsewhere when a run is resumed; single steps and unrolled ones must still fall on the same numbers."""
    options = {
        "steps": 23,
        "compile": "compiled",
        "unroll": unroll,
        "batch_size": batch_size,
        "validation": X[:5],
        "validate_every": 8,
    }
    options |= {"data": X[:9] if batch_size == 3 else X}
    whole, other = vae(), vae(seed=5)
    run = fit(whole, **options)
    stopped(vae(), 10, **options, checkpoint=tmp_path)
    again = fit(other, **options, checkpoint=tmp_path)
    assert again.tier == "compiled" and again.tier_reason == run.tier_reason
    assert torch.equal(state(whole), state(other))
    same(run, again)


def test_buffers_are_resumed_too(tmp_path):
    whole = seeded(Stateful)
    fit(whole, steps=13)
    stopped(seeded(Stateful), 4, steps=13, checkpoint=tmp_path, checkpoint_every=2)
    other = seeded(Stateful, 4)
    fit(other, steps=13, checkpoint=tmp_path)
    assert torch.equal(state(whole), state(other))


def test_a_game_is_resumed(tmp_path):
    """Several players with optimizers of their own, one of them torch's."""
    whole, other = Two(), Two()
    optimizers = {"left": Adam(0.01), "right": lambda p: torch.optim.RMSprop(p, lr=0.01)}
    options = {"steps": 23, "objective": Game(), "optimizer": optimizers, "data": X[:, :2]}
    run = fit(whole, **options)
    stopped(Two(), 4, **options, checkpoint=tmp_path, checkpoint_every=2)
    same(run, fit(other, **options, checkpoint=tmp_path))
    assert torch.equal(state(whole), state(other)) and not torch.equal(state(whole), state(Two()))


def test_more_steps_go_on(tmp_path):
    whole, other = vae(), vae()
    fit(whole, steps=17)
    fit(other, steps=9, checkpoint=tmp_path)
    run = fit(other, steps=17, checkpoint=tmp_path)
    assert torch.equal(state(whole), state(other)) and run.resumed == 9


def test_a_finished_run_is_not_trained_further(tmp_path):
    options = {"steps": 500, "batch_size": 11, "validation": X[:4] * 3, "optimizer": 0.05,
               "early_stopping": 2, "validate_every": 5}  # fmt: skip
    model = vae()
    run = fit(model, checkpoint=tmp_path, **options)
    assert run.steps < 500
    content = (tmp_path / "checkpoint.pgen").read_bytes()
    again = fit(model, checkpoint=tmp_path, **options)
    assert again.steps == run.steps and again.stopped == run.stopped
    same(run, again)
    assert (tmp_path / "checkpoint.pgen").read_bytes() == content


def test_a_bound_without_an_error_is_checkpointed(tmp_path):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    run = fit(pgen.Pair(model), Y, validation=Y, batch_size=11, checkpoint=tmp_path)
    assert math.isnan(run.validation["std_error"][-1]) and (tmp_path / "checkpoint.pgen").exists()


def test_checkpoints_come_by_the_clock_unless_told(tmp_path, monkeypatch):
    """A twentieth of the time at most goes into writing."""
    written, now = [], [0.0]

    def clock():
        now[0] += 1e-6
        return now[0]

    monkeypatch.setattr(LOOP.time, "perf_counter", clock)
    advance, write = LOOP._Trainer._advance, Checkpoint.write

    def slow_advance(self):
        advance(self)
        now[0] += 1.0
        self.block = 1

    def slow_write(self, *args):
        written.append(now[0])
        now[0] += 2.0  # so that every forty seconds is a twentieth
        write(self, *args)

    monkeypatch.setattr(LOOP._Trainer, "_advance", slow_advance)
    monkeypatch.setattr(Checkpoint, "write", slow_write)
    monkeypatch.setattr(LOOP, "BLOCK_SECONDS", 0.0)
    fit(vae(), steps=100, checkpoint=tmp_path)
    assert written[0] == pytest.approx(11.0, abs=1.0) and np.diff(written[:-1]).min() >= 40.0


# --- what must be the same -----------------------------------------------------------------------------------------------

CHANGED = {
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 5},
    "optimizer": {"optimizer": Adam(2e-3)},
    "objective": {"objective": pgen.IWAE(2)},
    "precision": {"precision": "float64"},
    "clip_norm": {"clip_norm": 1.0},
    "ema": {"ema": 0.9},
    "data": {"data": X + 1e-3},
    "schedule": {"schedule": "linear"},
    "augment": {"augment": torch.sin},
    "validation": {"validation": X[:4]},
    "early_stopping": {"early_stopping": 3},
}


def refused(name, tmp_path, model=None, **options):
    before = (tmp_path / "checkpoint.pgen").read_bytes()
    with pytest.raises(ValueError, match=rf"holds a run with {name} = .*use another folder, or the same {name}") as error:
        fit(model or vae(), **{"data": X, "steps": 6, "checkpoint": tmp_path, **options})
    assert "\n" not in str(error.value)
    assert (tmp_path / "checkpoint.pgen").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pgen"]


@pytest.mark.parametrize("name", CHANGED)
def test_another_configuration_is_refused_by_name(name, tmp_path):
    fit(vae(), steps=3, checkpoint=tmp_path)
    refused(name, tmp_path, **CHANGED[name])


def test_another_model_version_or_tier_is_refused_by_name(tmp_path, monkeypatch):
    fit(vae(), steps=3, checkpoint=tmp_path)
    refused("model", tmp_path, VAE((3,), 2, (5,), likelihood="gaussian", activation="relu"))
    refused("model", tmp_path, VAE((3,), 2, (6,), likelihood="gaussian"))
    refused("compile", tmp_path, compile="compiled")
    monkeypatch.setattr(pgen, "__version__", "99.0")
    refused("pgen", tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "99.0")
    refused("torch", tmp_path)


def test_what_cannot_change_the_result_may_change(tmp_path):
    """Callbacks, progress, how often checkpoints come; eager and graph steps give the same bits."""
    whole, other = vae(), vae()
    fit(whole)
    fit(other, steps=4, checkpoint=tmp_path)
    fit(other, checkpoint=tmp_path, compile="graph", checkpoint_every=1, callbacks=[pgen.training.Callback()], max_nonfinite=2)
    assert torch.equal(state(whole), state(other))


def test_another_torch_optimizer_is_refused(tmp_path):
    fit(vae(), steps=3, checkpoint=tmp_path, optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01))
    refused("optimizer", tmp_path, optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.5))
    refused("optimizer", tmp_path, optimizer=lambda p: torch.optim.Adagrad(p, lr=0.01))


def test_an_optimizer_that_keeps_what_a_file_cannot_hold_is_refused(tmp_path):
    class Own(torch.optim.RMSprop):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["past"] = object()

    with pytest.raises(ValueError, match="the optimizer keeps a object, which a checkpoint cannot hold"):
        fit(vae(), optimizer=lambda p: Own(p, lr=0.01), checkpoint=tmp_path)


def test_what_is_packed_comes_back():
    value = {0: {"step": torch.tensor(3.0), "momentum": None}, "groups": [{"betas": (0.9, 0.99), "on": True, "lr": math.inf}]}
    tensors = {}
    packed = json.loads(json.dumps(checkpoint.pack(value, "optimizer", tensors), allow_nan=False))
    assert checkpoint.unpack(packed, tensors) == value and list(tensors) == ["optimizer.0"]


# --- damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, of steps 4 and 5, and the bits of the whole run."""
    whole = vae()
    fit(whole)
    fit(vae(), steps=5, checkpoint=tmp_path, checkpoint_every=4)
    paths = [tmp_path / name for name in ("checkpoint.pgen", "checkpoint-before.pgen")]
    assert [pgen.files.read_metadata(path)["counters"]["done"] for path in paths] == [5, 4]
    return tmp_path, state(whole)


def test_any_flipped_bit_falls_back_to_the_checkpoint_before(two):
    folder, whole = two
    path, choose = folder / "checkpoint.pgen", random.Random(3)
    content = path.read_bytes()
    for _ in range(150):
        position, bit = choose.randrange(len(content)), choose.randrange(8)
        path.write_bytes(content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :])
        with pytest.warns(UserWarning, match="checkpoint.pgen.*falling back to the one before"), Checkpoint(folder) as store:
            assert store.read()[2]["counters"]["done"] == 4
    other = vae(seed=5)
    with pytest.warns(UserWarning, match="falling back to the one before"):
        assert fit(other, checkpoint=folder).resumed == 4
    assert torch.equal(whole, state(other))


def test_a_run_that_cannot_be_read_is_not_started_over(two):
    folder, _ = two
    for name in ("checkpoint.pgen", "checkpoint-before.pgen"):
        (folder / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"has no checkpoint that can be read .*not a pgen file.*move it away"):
        fit(vae(), checkpoint=folder)


class Killed(BaseException):
    """Stands for kill -9: what follows never runs."""


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_inside_a_save_loses_nothing(moment, two, monkeypatch):
    """Killed before any of the renames or after the last one: the newest whole state is taken up, and no litter stays."""
    folder, whole = two
    calls, replace = [], os.replace

    def killed(*paths):
        calls.append(paths)
        if len(calls) > moment:
            raise Killed
        replace(*paths)

    monkeypatch.setattr(os, "replace", killed)
    with contextlib.suppress(Killed):
        fit(vae(), steps=8, checkpoint=folder, checkpoint_every=1)
    monkeypatch.undo()
    other = vae(seed=5)
    run = fit(other, checkpoint=folder, steps=9)
    assert run.resumed == (5 if moment == 0 else 6) and torch.equal(whole, state(other))
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-before.pgen", "checkpoint.pgen"]


@contextlib.contextmanager
def no_file_longer_than(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_was_saved(two):
    """Training goes on with a warning; a fit whose last state cannot be written ends with the error, the model fitted."""
    folder, whole = two
    content = (folder / "checkpoint.pgen").read_bytes()
    line = r"cannot write .*checkpoint.new: .* \(\d+ bytes needed, \d+ bytes free\)"
    model = vae()
    with no_file_longer_than(1000), pytest.raises(OSError, match=line) as error:
        with pytest.warns(UserWarning, match=rf"no checkpoint at step 7: .*{line}; what was saved before is intact"):
            fit(model, checkpoint=folder, checkpoint_every=2)
    assert "\n" not in str(error.value)
    assert torch.equal(whole, state(model)) and model.last_run.steps == 9
    assert (folder / "checkpoint.pgen").read_bytes() == content
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-before.pgen", "checkpoint.pgen"]
    other = vae(seed=5)
    assert fit(other, checkpoint=folder).resumed == 5
    assert torch.equal(whole, state(other))


def test_a_disk_that_has_room_again_is_written_to(two, monkeypatch):
    folder, _ = two
    write, calls = pgen.files.write, []

    def once_full(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "cannot write it: No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint.files, "write", once_full)
    with pytest.warns(UserWarning, match="no checkpoint at step 7: .*No space left on device"):
        fit(vae(), checkpoint=folder, checkpoint_every=2)
    assert pgen.files.read_metadata(folder / "checkpoint.pgen")["counters"]["done"] == 9


# --- one run at a time ---------------------------------------------------------------------------------------------------


def holder(**changes):
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "since": "now", "started": checkpoint._started(pid), **changes}


def test_a_second_run_on_one_folder_is_refused(tmp_path):
    with Checkpoint(tmp_path):
        with pytest.raises(
            ValueError, match=rf"in use by process {os.getpid()} on .* since .*; wait for it or use another"
        ) as error:
            fit(vae(), checkpoint=tmp_path)
        assert "\n" not in str(error.value)
        assert (tmp_path / "lock").exists()
    fit(vae(), checkpoint=tmp_path)
    assert not (tmp_path / "lock").exists()


def ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


STALE = {
    "ended": lambda: json.dumps(holder(pid=ended())),
    "its number used again": lambda: json.dumps(holder(started="another time")),
    "torn": lambda: '{"pid": 1',
    "empty": lambda: "",
    "nonsense": lambda: "[1]",
}


@pytest.mark.skipif(not checkpoint._started(os.getpid()), reason="needs /proc")
@pytest.mark.parametrize("name", STALE)
def test_a_stale_lock_is_recognised(name, tmp_path):
    (tmp_path / "lock").write_text(STALE[name]())
    with Checkpoint(tmp_path):
        assert json.loads((tmp_path / "lock").read_text()) == holder(since=json.loads((tmp_path / "lock").read_text())["since"])


def test_a_lock_of_another_machine_is_believed(tmp_path):
    (tmp_path / "lock").write_text(json.dumps(holder(host="elsewhere", pid=1)))
    with pytest.raises(ValueError, match=r"process 1 on elsewhere .*if that machine is gone, delete .*lock"):
        Checkpoint(tmp_path)


def test_a_lock_is_released_when_the_fit_fails(tmp_path):
    class Fails(pgen.training.Callback):
        def on_log(self, step, metrics):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(vae(), checkpoint=tmp_path, callbacks=[Fails()])
    assert not (tmp_path / "lock").exists()


# --- kill -9 -------------------------------------------------------------------------------------------------------------

KILLS = """
import contextlib, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pgen.models import VAE

x = torch.randn(50, 3, generator=torch.Generator().manual_seed(2))

def train(folder):
    model = VAE((3,), 2, (5,), likelihood="gaussian")
    run = model.fit(x, steps=300, batch_size=10, compile="eager", progress=False, checkpoint=folder, checkpoint_every=2)
    open(folder + "/bits", "wb").write(torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().tobytes())
    os._exit(0)

def child(folder):
    pid = os.fork()
    return pid or train(folder)

def wait_for_saves(folder, number):
    seen = set()
    while len(seen) < number:
        with contextlib.suppress(FileNotFoundError):
            seen.add(os.stat(folder + "/checkpoint.pgen").st_mtime_ns)

os.makedirs(sys.argv[1] + "/whole")
os.waitpid(child(sys.argv[1] + "/whole"), 0)
folder, choose, kills = sys.argv[1] + "/killed", random.Random(4), 0
os.makedirs(folder)
for _ in range(3):
    pid = child(folder)
    wait_for_saves(folder, choose.randint(3, 20))
    time.sleep(choose.uniform(0, 0.003))
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
assert os.waitpid(child(folder), 0)[1] == 0
assert open(folder + "/bits", "rb").read() == open(sys.argv[1] + "/whole/bits", "rb").read()
print(kills, *sorted(os.listdir(folder)))
"""


def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(pgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", KILLS, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    kills, *files = out.stdout.split()
    assert int(kills) == 3 and files == ["bits", "checkpoint-before.pgen", "checkpoint.pgen"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_another_number_of_steps_a_call_is_refused_where_it_decides_the_noise(tmp_path):
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(2))
    options = {"batch_size": 10, "progress": False, "checkpoint": tmp_path, "compile": "compiled"}
    VAE((3,), 2, (5,), likelihood="gaussian").fit(x, steps=4, unroll=2, **options)
    with pytest.raises(ValueError, match="unroll = '2', this one has '3'"):
        VAE((3,), 2, (5,), likelihood="gaussian").fit(x, steps=8, unroll=3, **options)
