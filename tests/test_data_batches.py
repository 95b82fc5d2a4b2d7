"""Row order and keys are pure functions of (seed, epoch, position)."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgen.data import Batches, chunks, epoch_order, key, permute, step_keys

# --- keys ----------------------------------------------------------------------------------------------------------------


def test_keys_never_change():
    """Saved runs depend on these numbers; no release may change them."""
    assert key(0, "init") == 2020223635098297231
    assert step_keys(7, 0, 2) == [8435864847740512452, 8469014673097776601]


def splitmix(state):
    """SplitMix64's output for a state, in whole numbers of Python."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_step_keys_are_splitmix():
    golden = 0x9E3779B97F4A7C15
    assert splitmix(golden) == 0xE220A8397B1DCDAF  # the published first output of seed 0
    base = key(7, "steps")
    for start in (0, 5, 2**50):
        assert step_keys(7, start, 3) == [splitmix(base + (start + i + 1) * golden) % 2**63 for i in range(3)]


def test_keys_are_positive_and_tell_every_part_apart():
    parts = [(), (1,), ("1",), (1, 2), (2, 1), (12,), ("12",), ("1", 2), ("1, 2",), ("a", "b"), ("ab",), ("a, 'b",), (-1,)]
    keys = [key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_keys_take_integers_of_any_make_but_no_floats():
    assert key(torch.tensor(3), "a") == key(3, "a") == key(torch.tensor([3]).numpy()[0], "a")
    assert key(True) == key(1)
    with pytest.raises(TypeError, match="float"):
        key(1.0)


def test_keys_do_not_depend_on_the_process():
    """Not on the hash seed of the interpreter, above all."""
    code = "import pgen.data; print(pgen.data.key(3, 'x'), pgen.data.step_keys(3, 5, 2))"
    run = {"env": {"PYTHONHASHSEED": "1"}, "cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
    out = subprocess.run([sys.executable, "-c", code], check=True, **run)
    assert out.stdout.split("\n")[0] == f"{key(3, 'x')} {step_keys(3, 5, 2)}"


def test_step_keys_are_a_function_of_the_step():
    many = step_keys(11, 0, 1000)
    assert many[400:403] == step_keys(11, 400, 3)
    assert [step_keys(11, step, 1)[0] for step in range(5)] == many[:5]
    assert step_keys(11, 9, 0) == []
    far = step_keys(11, 2**40, 2)
    assert len({*many, *far, *step_keys(12, 0, 1000)}) == 2002
    assert all(isinstance(k, int) and 0 <= k < 2**63 for k in many)


def test_step_keys_look_uniform():
    """Each of 63 bits is set in half of the keys, within five standard errors (failure rate 4e-5)."""
    keys = torch.tensor(step_keys(0, 0, 20_000))
    bits = (keys[:, None] >> torch.arange(63)) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 5 * 0.5 / 20_000**0.5).all()


# --- orders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 16, 97, 1000, 65_537])
def test_permute_is_a_permutation(num_rows):
    for epoch in range(3):
        order = permute(torch.arange(num_rows), num_rows, seed=4, epoch=epoch)
        assert torch.equal(order.sort().values, torch.arange(num_rows))


def test_permute_of_a_million_rows_is_exact_and_has_no_pattern():
    n = 1_000_003
    order = permute(torch.arange(n), n, seed=0, epoch=1)
    assert torch.equal(order.sort().values, torch.arange(n))
    z = (order.double() - (n - 1) / 2) / (n * (n + 1) / 12) ** 0.5
    for lag in (1, 2, 1000, 1001):  # serial correlation, five standard errors
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / n**0.5
    assert abs(float((z * (torch.arange(n).double() - n / 2)).mean())) / (n / 12**0.5) < 5 / n**0.5
    assert abs(int((order == torch.arange(n)).sum()) - 1) < 7  # fixed points: Poisson(1)


def test_permute_needs_no_table():
    n = 10**10
    positions = torch.tensor([[0, 1, n - 1], [n // 2, 12_345, 10**9]])
    rows = permute(positions, n, seed=3, epoch=0)
    assert rows.shape == positions.shape and ((rows >= 0) & (rows < n)).all() and len(rows.unique()) == 6
    assert torch.equal(permute(positions[1], n, seed=3, epoch=0), rows[1])
    assert not torch.equal(permute(positions, n, seed=3, epoch=1), rows)


def test_epoch_order_is_a_function_of_seed_and_epoch_alone():
    state = torch.get_rng_state()
    order = epoch_order(101, seed=1, epoch=2)
    torch.rand(3)
    assert torch.equal(epoch_order(101, seed=1, epoch=2), order)
    assert torch.equal(order.sort().values, torch.arange(101))
    assert not torch.equal(epoch_order(101, seed=1, epoch=3), order)
    assert not torch.equal(epoch_order(101, seed=2, epoch=2), order)
    torch.set_rng_state(state)
    epoch_order(101, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_large_orders_go_without_a_table(monkeypatch):
    monkeypatch.setattr("pgen.data.batches._TABLE_ROWS", 50)
    order = epoch_order(101, seed=1, epoch=2)
    assert torch.equal(order, permute(torch.arange(101), 101, seed=1, epoch=2))
    batches = Batches(101, batch_size=7, seed=1)
    steps = range(2 * len(batches), 3 * len(batches))
    assert torch.equal(torch.cat([batches.indices(step) for step in steps]), order)
    assert batches._views == ()
    assert torch.equal(Batches(101, 7, seed=1, shuffle=False).indices(16), torch.tensor([7, 8, 9, 10, 11, 12, 13]))


# --- batches -------------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_row_once_and_keeps_the_ragged_end():
    batches = Batches(torch.zeros(23, 2), batch_size=5, seed=0)
    assert len(batches) == 5
    for epoch in range(3):
        parts = [batches.indices(epoch * 5 + position) for position in range(5)]
        assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
        order = torch.cat(parts)
        assert torch.equal(order, epoch_order(23, seed=0, epoch=epoch))


def test_any_step_can_be_asked_for_in_any_order():
    forward = Batches(23, batch_size=5, seed=9)
    seen = {step: forward.indices(step).clone() for step in range(20)}
    other = Batches(23, batch_size=5, seed=9)
    for step in (19, 0, 7, 8, 3, 19):
        assert torch.equal(other.indices(step), seen[step])
    assert [other.epoch(step) for step in (0, 4, 5, 19)] == [0, 0, 1, 3]
    assert [other.position(step) for step in (0, 4, 5, 19)] == [0, 4, 0, 4]


def test_without_shuffling_and_with_one_batch_rows_keep_their_order():
    for batches in (Batches(11, batch_size=11, seed=0), Batches(11, batch_size=50, seed=0)):
        assert len(batches) == 1 and torch.equal(batches.indices(3), torch.arange(11))
    batches = Batches(11, batch_size=4, seed=0, shuffle=False)
    assert torch.equal(torch.cat([batches.indices(step) for step in range(3, 6)]), torch.arange(11))


def test_rows_of_every_kind_of_data():
    x, y = torch.arange(22.0).reshape(11, 2), torch.arange(11)
    batches = Batches({"x": x, "y": y}, batch_size=4, seed=0)
    part = batches.rows(2)
    assert torch.equal(part["y"], batches.indices(2)) and torch.equal(part["x"], x[part["y"]])

    class Source:
        def __len__(self):
            return 11

        def rows(self, indices):
            return indices * 10

    batches = Batches(Source(), batch_size=4, seed=0)
    assert torch.equal(batches.rows(1), batches.indices(1) * 10)


def test_bad_arguments():
    with pytest.raises(ValueError, match="`batch_size` should be a positive integer, got 0"):
        Batches(torch.zeros(3), batch_size=0, seed=0)
    with pytest.raises(ValueError, match="`data` has no rows"):
        Batches(torch.zeros(0, 2), batch_size=3, seed=0)
    with pytest.raises(ValueError, match="give them the data"):
        Batches(3, batch_size=2, seed=0).rows(0)


def test_a_step_costs_little():
    """The fast path is a look-up: nothing is computed and no tensor made within an epoch."""
    batches = Batches(1000, batch_size=10, seed=0)
    assert batches.indices(7) is batches.indices(7)


def test_chunks_cover_all_rows_once():
    assert list(chunks(7, 3)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(itertools.chain.from_iterable(range(7)[part] for part in chunks(7, 100))) == list(range(7))
    assert list(chunks(0, 3)) == []
    with pytest.raises(ValueError, match="`size`"):
        chunks(7, 0)
