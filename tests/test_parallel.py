"""Several processes: what they train, what they refuse, how they stop. Processes are forked, and talk over gloo on the CPU."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import seeded, state
from torch import nn

import pgen
from pgen.models import GAN, VAE, Diffusion, EnergyBased
from pgen.objectives import Adversarial, ContrastiveDivergence
from pgen.training.parallel import Workers

N, D = 37, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(5))
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.3


# --- processes -----------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(rank, world, port, work, folder):
    code = 3
    try:
        with open(folder / f"{rank}.err", "w") as log:
            os.dup2(log.fileno(), 2)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        result = work(rank)
        np.savez(folder / f"{rank}.npz", **result)
        code = 0
    except BaseException as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run_on(world, work, folder, timeout=60):
    """What ``work(rank)`` gives on each of ``world`` processes: a dict of arrays, or the text of what it raised."""
    folder.mkdir(parents=True, exist_ok=True)
    port, children = free_port(), []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            _child(rank, world, port, work, folder)
        children.append(child)
    until = time.monotonic() + timeout
    left = set(children)
    while left and time.monotonic() < until:
        left -= {c for c in left if os.waitpid(c, os.WNOHANG)[0]}
        time.sleep(0.01)
    for child in left:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert not left, "processes hang: " + " | ".join((folder / f"{r}.err").read_text()[-500:] for r in range(world))
    return [_result(folder, rank) for rank in range(world)]


def _result(folder, rank):
    if (folder / f"{rank}.npz").exists():
        with np.load(folder / f"{rank}.npz") as found:
            return dict(found)
    failed = folder / f"{rank}.txt"
    return failed.read_text() if failed.exists() else "died"


# --- models --------------------------------------------------------------------------------------------------------------


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ w + b, 0.5), obs=y)


class Stateful(pgen.GenerativeModel):
    """Batch statistics, which change in each micro-batch, and dropout."""

    def __init__(self):
        super().__init__((D,))
        self.norm, self.drop = nn.BatchNorm1d(D), nn.Dropout(0.3)
        self.encoder, self.decoder = nn.Linear(D, 4), nn.Linear(2, D)

    def model(self, x=None, context=None):
        with self.plate(x, context):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x=None, context=None):
        with self.plate(x, context):
            loc, log_scale = self.encoder(self.drop(self.norm(x))).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def vae():
    return VAE((D,), 2, (5,), likelihood="gaussian")


MODELS = {
    "vae": (vae, X),
    "regression": (lambda: pgen.Pair(regression), (X, Y)),
    "flow guide": (lambda: seeded(lambda: pgen.Pair(regression, "flow")), (X, Y)),
    "batch statistics": (lambda: seeded(Stateful), X),
    "game": (lambda: GAN((D,), 2, (5,), pack=2), X),
    "energy": (lambda: EnergyBased((D,), hidden=(5,)), X),
    "diffusion": (lambda: Diffusion((D,), width=8, blocks=1), X),
}
OBJECTIVES = {  # critics move twice, on shares of their own; chains begin at the data
    "game": {"objective": Adversarial(critic_moves=2, r1=0.1), "batch_size": 16},
    "energy": {"objective": ContrastiveDivergence(2)},
}


def trained(name, data=None, **options):
    """Parameters and losses after some steps; 37 rows in batches of 10 leave a last one of 7."""
    make, given = MODELS[name]
    model = make()
    size = 14 if name == "batch statistics" else 10  # whose last micro-batches have two rows, not one
    options = {
        "steps": 24,
        "batch_size": size,
        "seed": 3,
        "compile": "eager",
        "micro_batches": 4,
        "progress": False,
        **OBJECTIVES.get(name, {}),
        **options,
    }
    run = model.fit(given if data is None else data, timeout=20, **options)
    return {
        "state": state(model).numpy(),
        "loss": run.history["loss"],
        "norm": run.history["grad_norm"],
        "tier": np.array(run.tier),
    }


# --- what is trained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_processes_trains_the_same(name, tmp_path):
    alone = trained(name)
    for result in run_on(2, lambda rank: trained(name), tmp_path):
        rtol = 1e-5 if name == "diffusion" else 1e-6  # its errors are weighed by signal-to-noise ratios up to 600 000
        np.testing.assert_allclose(result["loss"], alone["loss"], rtol=rtol, atol=1e-6)
        np.testing.assert_allclose(result["state"], alone["state"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, tier, world", [(name, "eager", 2) for name in MODELS] + [
    ("regression", "eager", 4), ("vae", "graph", 2), ("batch statistics", "graph", 2), ("game", "graph", 2)])  # fmt: skip
def test_the_bits_are_the_same_in_exact_mode(name, tier, world, tmp_path):
    options = {"deterministic": True, "compile": tier, "clip_norm": 0.5, "ema": 0.9}
    alone = trained(name, **options)
    assert alone["tier"] == tier
    for result in run_on(world, lambda rank: trained(name, **options), tmp_path):
        np.testing.assert_array_equal(result["loss"], alone["loss"])
        np.testing.assert_array_equal(result["state"], alone["state"])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, at import
def test_compiled_gradients_agree_to_rounding():
    graph, compiled = (trained("vae", compile=tier, batch_size=12) for tier in ("graph", "compiled"))
    assert compiled["tier"] == "compiled"
    np.testing.assert_allclose(compiled["loss"], graph["loss"], rtol=1e-5)


def test_uneven_shares_are_weighted_by_their_rows(tmp_path):
    """Three micro-batches on two processes, all 37 rows a step, no noise: the gradient is that of all rows at once."""

    def sgd(micro_batches):
        return trained("vae", steps=5, batch_size=N, micro_batches=micro_batches, objective=Quiet(),
                       optimizer=pgen.training.SGD(1e-2), precision="float64")  # fmt: skip

    whole = sgd(None)
    for result in run_on(2, lambda rank: sgd(3), tmp_path):
        np.testing.assert_allclose(result["loss"], whole["loss"], rtol=1e-12)
        np.testing.assert_allclose(result["norm"], whole["norm"], rtol=1e-12)


class Quiet:
    """Minus the log-likelihood at the guide's mean: a sum over rows without noise."""

    kind = "estimate"

    def __call__(self, model, guide, batch, scalars):
        z = pyro.poutine.trace(guide).get_trace(**batch).nodes["z"]["fn"].mean
        return -pyro.poutine.trace(pyro.condition(model, {"z": z})).get_trace(**batch).log_prob_sum() / len(batch["x"]), {}


def test_every_micro_batch_has_noise_of_its_own():
    seen = []

    class Spy:
        kind = "estimate"

        def __call__(self, model, guide, batch, scalars):
            seen.append(float(torch.rand(())))
            return sum(p.sum() for p in guide.__self__.parameters()) * 0.0, {}

    trained("vae", steps=3, objective=Spy())
    drawn = seen[-12:]
    assert len(set(drawn)) == 12
    seen.clear()
    trained("vae", steps=3, objective=Spy())
    assert seen[-12:] == drawn


def test_each_process_reads_its_own_rows(tmp_path):
    class Rows:
        def __init__(self):
            self.asked = []

        def __len__(self):
            return N

        def rows(self, indices):
            self.asked.append(indices)
            return X[indices]

    def work(rank):
        source = Rows()
        result = trained("vae", source, deterministic=True)
        return {**result, "asked": next(asked for asked in source.asked if len(asked) > N).numpy()}  # a block of steps

    resident = trained("vae", deterministic=True)
    one, two = run_on(2, work, tmp_path)
    np.testing.assert_array_equal(one["state"], resident["state"])
    np.testing.assert_array_equal(two["state"], resident["state"])
    # An epoch's batches of 10, 10, 10 and 7 are cut into 3 + 3 and 2 + 2 (2 + 2 and 2 + 1) rows.
    assert sorted([*one["asked"][:22], *two["asked"][:15]]) == list(range(N))


# --- agreeing ------------------------------------------------------------------------------------------------------------


class Log(pgen.training.Callback):
    """Notes what it is told."""

    def __init__(self):
        self.calls = 0

    def on_log(self, step, metrics):
        self.calls += 1


def test_one_process_stops_all_and_one_writes(tmp_path):
    def work(rank):
        class Signal(Quiet):
            calls = 0

            def __call__(self, *args):
                self.calls += 1
                if rank == 1 and self.calls == 60:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().__call__(*args)

        log = Log()
        model = vae()
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            model.fit(X, steps=100_000, batch_size=10, objective=Signal(), compile="eager", callbacks=[log], timeout=20,
                      checkpoint=tmp_path / "run", progress=False)  # fmt: skip
        return {"steps": np.array(model.last_run.steps), "calls": np.array(log.calls)}

    one, two = run_on(2, work, tmp_path)
    assert one["steps"] == two["steps"] < 100_000
    assert one["calls"] > 0 and two["calls"] == 0
    assert (tmp_path / "run" / "checkpoint.pgen").exists()


def test_early_stopping_is_agreed(tmp_path):
    def work(rank):
        model = vae()
        options = {"validation": X[:5], "early_stopping": 2, "validate_every": 4, "optimizer": 0.3}
        run = model.fit(X, steps=4000, batch_size=10, compile="eager", timeout=20, progress=False, **options)
        return {"steps": np.array(run.steps), "state": state(model).numpy()}

    one, two = run_on(2, work, tmp_path)
    assert one["steps"] == two["steps"] < 4000
    np.testing.assert_array_equal(one["state"], two["state"])


def test_four_then_two_then_one_process_resume_to_the_same_bits(tmp_path):
    options = {"deterministic": True, "checkpoint": tmp_path / "run", "micro_batches": None}
    whole = trained("vae", steps=30, deterministic=True, micro_batches=4)
    run_on(4, lambda rank: trained("vae", steps=9, **options), tmp_path / "4")
    run_on(2, lambda rank: trained("vae", steps=18, **options), tmp_path / "2")
    last = trained("vae", steps=30, **options)
    np.testing.assert_array_equal(last["state"], whole["state"])
    np.testing.assert_array_equal(last["loss"], whole["loss"])


# --- refusing ------------------------------------------------------------------------------------------------------------


def test_another_model_or_other_data_on_a_process_is_refused_by_name(tmp_path):
    def other_model(rank):
        return {"state": state_of(VAE((D,), 2, (5 + rank,), likelihood="gaussian"), X)}

    def other_data(rank):
        return {"state": state_of(vae(), X + rank)}

    for result in run_on(2, other_model, tmp_path / "model"):
        assert "the processes do not train the same thing: process 1 has parameter decoder.0.bias (6,)" in result
        assert "process 0 has parameter decoder.0.bias (5,)" in result
    for result in run_on(2, other_data, tmp_path / "data"):
        assert "process 1 has data " in result


def state_of(model, data):
    model.fit(data, steps=2, batch_size=10, compile="eager", timeout=20, progress=False)
    return state(model).numpy()


def test_parameters_start_as_those_of_the_first_process(tmp_path):
    def work(rank):
        torch.manual_seed(rank)
        return {"state": state_of(Stateful(), X)}

    one, two = run_on(2, work, tmp_path)
    np.testing.assert_array_equal(one["state"], two["state"])


def test_more_processes_than_parts_and_too_small_batches_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="2 micro-batches cannot be divided between 3 processes; start at most 2"):
        Workers(2, world=3)
    with pytest.raises(ValueError, match="a batch of 10 rows cannot be cut into 11 micro-batches"):
        trained("vae", micro_batches=11)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but the environment has no RANK, MASTER_ADDR, MASTER_PORT"):
        trained("vae")


def test_a_guide_that_joins_all_rows_is_not_torn_apart():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="`guide` 'full_rank' joins the latents of all rows, which 2 micro-batches"):
        pgen.Pair(model, "full_rank").fit(Y, steps=2, micro_batches=2, progress=False)
    pgen.Pair(model).fit(Y, steps=2, micro_batches=2, progress=False)


# --- failing -------------------------------------------------------------------------------------------------------------


def failing(rank, act, timeout):
    class Failing(Quiet):
        calls = 0

        def __call__(self, *args):
            self.calls += 1
            if rank == 1 and self.calls == 12:
                act()
            return super().__call__(*args)

    model = vae()
    model.fit(X, steps=10_000, batch_size=10, objective=Failing(), compile="eager", timeout=timeout, progress=False)
    return {}


def test_what_one_process_raises_reaches_the_others(tmp_path):
    def act():
        raise ArithmeticError("the sky has fallen")

    began = time.monotonic()
    one, two = run_on(2, lambda rank: failing(rank, act, 20), tmp_path)
    assert one == "LostProcess: process 0 of 2 stops: process 1 failed: ArithmeticError: the sky has fallen"
    assert two == "ArithmeticError: the sky has fallen" and time.monotonic() - began < 15


def test_a_process_that_hangs_is_named_within_the_limit(tmp_path):
    one, _ = run_on(2, lambda rank: failing(rank, lambda: time.sleep(5), 2), tmp_path)
    assert one == "LostProcess: process 0 of 2 stops: no answer from process 1 within 2 s, or it has gone"


def test_a_process_that_dies_is_named(tmp_path):
    one, two = run_on(2, lambda rank: failing(rank, lambda: os._exit(7), 20), tmp_path)
    assert one == "LostProcess: process 0 of 2 stops: no answer from process 1 within 20 s, or it has gone" and two == "died"


def test_a_group_that_is_already_there_is_used_and_left_alone(tmp_path):
    def work(rank):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        result = trained("vae", deterministic=True)
        assert torch.distributed.is_initialized()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        return result

    alone = trained("vae", deterministic=True)
    for result in run_on(2, work, tmp_path):
        np.testing.assert_array_equal(result["state"], alone["state"])


# --- torchrun ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, torch, pgen
class Killed(pgen.ELBO):
    calls = 0
    def __call__(self, *args):
        Killed.calls += 1
        if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and Killed.calls == 90:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args)
    __repr__ = pgen.ELBO.__repr__
x = torch.randn(37, 3, generator=torch.Generator().manual_seed(5))
model = pgen.models.VAE((3,), 2, (5,), likelihood="gaussian")
run = model.fit(x, steps=80, batch_size=10, seed=3, objective=Killed(), compile="eager", deterministic=True, micro_batches=2,
                checkpoint=sys.argv[1], checkpoint_every=5, timeout=20, progress=True)
model.save(sys.argv[1] + "/" + os.environ.get("RANK", "0") + ".pgen")
"""


def test_torchrun_restarts_a_killed_process_and_goes_on_to_the_same_bits(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(pgen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}

    def start(*launcher, out):
        command = [sys.executable, *launcher, str(tmp_path / "script.py"), str(tmp_path / out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]

    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    start(*run, out="two")
    start(out="one")
    states = [state(pgen.load(tmp_path / part)) for part in ("one/0.pgen", "two/0.pgen", "two/1.pgen")]
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])
