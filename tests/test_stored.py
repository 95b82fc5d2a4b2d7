"""Data larger than memory: memory maps, Parquet, any object with rows, and the feed that fetches them ahead of training."""

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import state

import pgen
from pgen.data import Batches, MemoryMapped, Parquet, Standardize
from pgen.data.stored import RING, Feed
from pgen.models import VAE

N, D = 53, 3
X = torch.randn(N, D, generator=torch.Generator().manual_seed(5))


def vae(**options):
    return VAE((D,), 2, (5,), likelihood="gaussian", **options)


def fit(model, data, **options):
    return model.fit(data, **{"steps": 30, "batch_size": 10, "progress": False, "compile": "eager", "seed": 3, **options})


def saved(folder, name="x.npy", array=X):
    np.save(folder / name, np.asarray(array))
    return folder / name


class Rows:
    """The least that a source is."""

    def __init__(self, data=X):
        self.data, self.asked = data, []

    def __len__(self):
        return len(self.data if isinstance(self.data, torch.Tensor) else next(iter(self.data.values())))

    def rows(self, indices):
        self.asked.append(indices)
        return pgen.data.rows(self.data, indices)


# --- sources -------------------------------------------------------------------------------------------------------------


def test_a_memory_map_gives_the_rows_asked_for(tmp_path):
    source = MemoryMapped(saved(tmp_path))
    where = torch.tensor([7, 0, 52, 7])
    assert len(source) == N and torch.equal(source.rows(where), X[where])


def test_memory_maps_of_several_files_and_kinds(tmp_path):
    whole = np.arange(N, dtype=">i4")
    files = {"x": saved(tmp_path), "k": saved(tmp_path, "k.npy", whole), "w": saved(tmp_path, "w.npy", X.double()[:, :2])}
    batch = MemoryMapped(files).rows(torch.tensor([4, 2]))
    assert [batch[name].dtype for name in ("x", "k", "w")] == [torch.float32, torch.int64, torch.float32]
    assert batch["k"].tolist() == [4, 2] and batch["w"].shape == (2, 2)
    pair = MemoryMapped((files["x"], files["k"])).rows(torch.tensor([1]))
    assert isinstance(pair, tuple) and torch.equal(pair[0], X[1:2])
    np.save(tmp_path / "short.npy", np.zeros(4))
    with pytest.raises(ValueError, match=r"differ in length along axis 0: x.npy 53, short.npy 4"):
        MemoryMapped((files["x"], tmp_path / "short.npy"))


def hostile(folder):
    """Files that a memory map must refuse, and what is said."""
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "scalar.npy", np.array(3.0))
    np.savez(folder / "archive.npy.npz", x=np.zeros(3))
    good = saved(folder, "good.npy").read_bytes()
    (folder / "cut.npy").write_bytes(good[:-1])
    (folder / "claim.npy").write_bytes(good.replace(b"(53, 3)", b"(5300000000, 3)").replace(b" " * 9, b"", 1))
    (folder / "text.npy").write_text("x,y\n1,2\n")
    return {
        "objects.npy": "pickled objects, which are never loaded",
        "words.npy": "holds <U1; expected real numbers",
        "scalar.npy": "axis of rows",
        "archive.npy.npz": "not one array",
        "cut.npy": "damaged",
        "claim.npy": "damaged",
        "text.npy": r"no .npy file \(it does not begin as one\)",
    }


def test_hostile_files_are_refused_in_one_line(tmp_path):
    for name, message in hostile(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            MemoryMapped(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        MemoryMapped(tmp_path / "none.npy")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(50))
    with pytest.raises(ValueError, match=r"damaged, or no \.parquet file"):
        Parquet(tmp_path / "bad.parquet")


def parquet(folder, rows=N, group=10, **columns):
    import pyarrow
    from pyarrow import parquet as writer

    table = pyarrow.table({"a": np.arange(rows), "b": np.arange(rows) * 0.5, **columns})
    writer.write_table(table, folder / "t.parquet", row_group_size=group)
    return folder / "t.parquet"


def test_parquet_rows(tmp_path):
    path = parquet(tmp_path, word=["w"] * N)
    where = torch.tensor([52, 0, 13, 13])
    source = Parquet(path, columns=["b", "a"])
    assert torch.equal(source.rows(where), torch.stack([where * 0.5, where.float()], 1))
    named = Parquet(path, columns=["b"], named=True).rows(where)
    assert list(named) == ["b"] and torch.equal(named["b"], where * 0.5)
    with pytest.raises(ValueError, match="column 'word' holds string, not numbers"):
        Parquet(path)
    with pytest.raises(ValueError, match=r"no column 'c'.*known: a, b"):
        Parquet(path, columns=["c"])


def test_bad_parquet_values_are_named_with_their_row(tmp_path):
    source = Parquet(parquet(tmp_path, c=[1.0] * 33 + [None] + [2.0] * 19), columns=["c"])
    assert source.rows(torch.tensor([3])).tolist() == [[1.0]]
    with pytest.raises(ValueError, match="row 34, column 'c': the value is missing"):
        source.rows(torch.tensor([31]))


def test_a_huge_row_group_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = parquet(tmp_path, group=40)
    monkeypatch.setattr("pgen.data.stored.MAX_GROUP_BYTES", 300)
    with pytest.raises(ValueError, match=r"a row group of 40 rows .* smaller row_group_size"):
        Parquet(path)


def test_the_order_of_parquet_visits_each_row_once_and_mixes_inside_windows(tmp_path):
    source = Parquet(parquet(tmp_path, rows=60, group=10), window_bytes=2 * 10 * 16)  # six groups, two in a window
    batches = Batches(source, batch_size=7, seed=1)
    order = torch.cat([batches.indices(step) for step in range(len(batches))])
    assert sorted(order.tolist()) == list(range(60))
    assert not torch.equal(order, order.sort().values)
    next_epoch = torch.cat([batches.indices(step) for step in range(len(batches), 2 * len(batches))])
    assert sorted(next_epoch.tolist()) == list(range(60)) and not torch.equal(order, next_epoch)
    again = Batches(source, batch_size=7, seed=1)
    assert torch.equal(again.indices(5), order[35:42])  # from anywhere, as a function of the step
    groups = [set((part // 10).tolist()) for part in order.split(20)]
    assert [len(found) for found in groups] == [2, 2, 2]


def test_only_the_row_groups_at_hand_are_in_memory(tmp_path):
    source = Parquet(parquet(tmp_path, rows=400, group=10), window_bytes=2 * 10 * 16)
    batches = Batches(source, batch_size=8, seed=0)
    for step in range(len(batches)):
        batches.rows(step)
        assert len(source._cache) <= 5


# --- the feed ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[(0, 1)] * 1 + [(i, 1) for i in range(1, 40)], [(17, 3), (20, 3), (23, 1), (2, 2), (3, 1)]])
def test_the_feed_gives_the_batches_of_the_same_seed(steps, monkeypatch):
    monkeypatch.setattr("pgen.data.stored.BLOCK_STEPS", 4)
    source = Rows({"x": X, "n": torch.arange(N)})
    feed, batches = Feed(source, 10, 7), Batches(N, 10, 7)
    for step, count in steps:
        feed.load(step, count)
        for s in range(step, step + count):
            place = feed.indices(s)
            assert torch.equal(feed.numbers[place], batches.indices(s))
            assert torch.equal(feed.resident["x"][place], X[batches.indices(s)])
            assert torch.equal(feed.resident["n"][place], batches.indices(s))
    feed.close()


def test_the_feed_is_bounded(monkeypatch):
    monkeypatch.setattr("pgen.data.stored.BLOCK_STEPS", 2)
    source = Rows()
    feed = Feed(source, 10, 0)
    feed.load(0)
    before = time.monotonic()
    while len(source.asked) < 1 + RING and time.monotonic() < before + 5:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(source.asked) == 1 + RING  # the first batch, for its shapes, and the ring
    feed.close()
    assert not [t for t in threading.enumerate() if t.name == "pgen-feed"]


def test_only_the_share_of_a_process_is_read():
    source = Rows()
    feed, batches = Feed(source, 10, 0, share=lambda n: slice(0, n // 2)), Batches(N, 10, 0)
    source.asked.clear()
    feed.load(5)
    asked = torch.cat(source.asked)
    assert torch.equal(feed.numbers[feed.indices(5)[:1]], batches.indices(5)[:1]) and len(batches.indices(5)) == 3
    assert asked[:11].tolist() == [
        *batches.indices(0)[:5].tolist(),
        *batches.indices(1)[:5].tolist(),
        int(batches.indices(2)[0]),
    ]
    feed.close()


class Quiet:
    """Minus the log-likelihood at the guide's mean: no noise, so that unrolled steps, which share a key, can be compared."""

    kind = "estimate"

    def __call__(self, model, guide, batch, scalars):
        z = pyro.poutine.trace(guide).get_trace(**batch).nodes["z"]["fn"].mean
        return -pyro.poutine.trace(pyro.condition(model, {"z": z})).get_trace(**batch).log_prob_sum() / len(batch["x"]), {}


# --- fit -----------------------------------------------------------------------------------------------------------------


def parameters_after(data, **options):
    model = vae()
    run = fit(model, data, **options)
    return torch.cat([state(model), torch.tensor(run.history["loss"])])


@pytest.mark.parametrize("tier", ["eager", "graph"])
def test_a_source_trains_to_the_bits_of_the_same_rows_in_memory(tier, tmp_path, monkeypatch):
    monkeypatch.setattr("pgen.data.stored.BLOCK_STEPS", 4)
    monkeypatch.setattr(VAE, "prime", lambda self, data: None)
    resident = parameters_after(X, compile=tier)
    assert torch.equal(resident, parameters_after(MemoryMapped(saved(tmp_path)), compile=tier))
    assert torch.equal(resident, parameters_after(Rows(), compile=tier))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_unrolled_compiled_steps_read_from_the_feed(tmp_path, monkeypatch):
    monkeypatch.setattr(VAE, "prime", lambda self, data: None)
    models = vae(), vae()
    fit(models[0], X, compile="graph", objective=Quiet())
    run = fit(models[1], MemoryMapped(saved(tmp_path)), compile="compiled", unroll=2, objective=Quiet())
    assert run.tier == "compiled"
    torch.testing.assert_close(state(models[1]), state(models[0]), rtol=1e-4, atol=1e-5)


def test_a_batch_of_all_rows_makes_the_source_resident(tmp_path):
    assert torch.equal(parameters_after(X, batch_size=N), parameters_after(MemoryMapped(saved(tmp_path)), batch_size=N))


def test_pairs_take_sources_of_dicts_and_tuples(tmp_path):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            b = pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)

    y = X.sum(1)
    files = saved(tmp_path), saved(tmp_path, "y.npy", y)
    results = []
    for data in ((X, y), MemoryMapped(files), MemoryMapped(dict(zip("xy", files)))):
        pair = pgen.Pair(model)  # b has a row of parameters for each datum: the row's own number must reach the guide
        fit(pair, data)
        results.append(pair)
    tables = [pair.state_dict() for pair in results]
    for name, tensor in tables[0].items():
        if "tables" in name:
            assert (tensor != tensor[0]).any() and torch.allclose(tensor, tables[1][name], atol=1e-6), name
    assert torch.equal(state(results[1]), state(results[2]))
    with pytest.raises(ValueError, match="`batch_size` is needed to fit a data source"):
        pgen.Pair(model).fit(MemoryMapped(files))


def test_context_comes_in_the_rows():
    c = torch.randn(N, 2)
    model = vae(context_dim=2)
    fit(model, Rows({"x": X, "context": c}))
    assert model.last_run.num_data == N
    with pytest.raises(ValueError, match="a data source gives it in its rows"):
        vae(context_dim=2).fit(Rows(), context=c)
    with pytest.raises(TypeError, match="`x` is a data source, which only fit reads"):
        model.log_prob(Rows())


def test_preprocessing_is_fitted_to_a_look():
    model = vae(preprocess=Standardize())
    fit(model, Rows(X * 3 + 1), steps=1)
    assert torch.allclose(model.preprocess.mean, (X * 3 + 1).mean(0))


def test_resume_is_exact_and_other_data_are_refused(tmp_path):
    path = saved(tmp_path)
    whole = parameters_after(MemoryMapped(path), steps=40)
    parameters_after(MemoryMapped(path), steps=23, checkpoint=tmp_path / "run")
    assert torch.equal(whole, parameters_after(MemoryMapped(path), steps=40, checkpoint=tmp_path / "run"))
    saved(tmp_path, array=X + 1)
    with pytest.raises(ValueError, match="holds a run with data = "):
        parameters_after(MemoryMapped(path), steps=50, checkpoint=tmp_path / "run")


def bad(row, value):
    x = torch.rand(20_000, D).round()
    x[row, 1] = value
    return x


@pytest.mark.parametrize("value, message", [(float("nan"), "data row 12345, column 1 is nan"), (3.0, "data row 12345 holds 3")])
def test_a_bad_row_in_the_middle_is_named(value, message):
    model = VAE((D,), 2, (5,), likelihood="bernoulli")
    with pytest.raises(ValueError, match=message):
        fit(model, Rows(bad(12_345, value)), steps=40, batch_size=500)
    assert not [t for t in threading.enumerate() if t.name == "pgen-feed"]


def test_what_a_source_raises_comes_through():
    class Broken(Rows):
        def rows(self, indices):
            if len(self.asked) > 6:
                raise OSError("the disk has gone")
            return super().rows(indices)

    with pytest.raises(OSError, match="the disk has gone"):
        fit(vae(), Broken(torch.randn(5000, D)), steps=2000)

    class Short(Rows):
        def rows(self, indices):
            return super().rows(indices[:-1]) if len(indices) > 1 else super().rows(indices)

    with pytest.raises(ValueError, match="was asked for 53 rows and gave 52"):
        fit(vae(), Short())


MEMORY = """
import json, sys, numpy as np, torch, pgen
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))
source = pgen.data.MemoryMapped(sys.argv[1])
model = pgen.models.VAE((64,), 2, (8,), likelihood="gaussian")
model.fit(source, steps=20, batch_size=512, progress=False, compile="eager")
before = anonymous()
model.fit(source, epochs=1, batch_size=512, progress=False, compile="eager")
print(json.dumps(anonymous() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_anonymous_memory_stays_flat(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (400_000, 64))  # 102 MB, all of it read
    array[:] = np.random.default_rng(0).standard_normal(64, dtype=np.float32)
    del array
    out = subprocess.run([sys.executable, "-c", MEMORY, tmp_path / "big.npy"], capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) < 60  # MB: rows on their way, not the data
