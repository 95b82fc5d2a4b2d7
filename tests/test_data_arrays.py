"""What users have becomes a batch; what is no batch is refused in one line."""

import warnings

import numpy as np
import pandas
import pytest
import torch

from pgen.data import Split, as_batch, check_finite, fingerprint, map_tensors, num_rows, rows, to_device


class Source:
    """Five rows that are read on demand."""

    def __init__(self, scale=1.0):
        self.scale = scale

    def __len__(self):
        return 5

    def rows(self, indices):
        return {"x": indices[:, None] * self.scale}


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# --- as_batch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        (np.ones((3, 2)), torch.float32),
        (np.ones((3, 2), np.float32), torch.float32),
        (np.ones((3, 2), np.float16), torch.float16),
        (np.ones((3, 2), ">f4"), torch.float32),
        (np.ones((3, 2), np.longdouble), torch.float32),
        (np.ones((3, 2), np.uint8), torch.int64),
        (np.ones((3, 2), ">i2"), torch.int64),
        (np.ones((3, 2), bool), torch.bool),
        ([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], torch.float32),
        ([[1, 2], [3, 4], [5, 6]], torch.int64),
        (pandas.DataFrame({"a": [1, 2, 3], "b": [0.5, 1.0, 2.0]}), torch.float32),
        (pandas.DataFrame({"a": [1, 2, 3], "b": [4, 5, 6]}), torch.int64),
        (pandas.DataFrame({"a": [1, 2, 3], "b": [True, False, True]}), torch.float32),
        (pandas.DataFrame({"a": pandas.array([1, 2, 3], "Int64"), "b": [0.5, 1.0, 2.0]}), torch.float32),
        (torch.ones(3, 2, dtype=torch.float64), torch.float64),
        (torch.ones(3, 2, dtype=torch.int32), torch.int32),
    ],
)
def test_dtypes(given, dtype):
    batch = as_batch(given)
    assert batch.dtype == dtype and batch.shape == (3, 2)
    if not isinstance(given, torch.Tensor):
        assert np.array_equal(batch.numpy(), np.asarray(given).astype(batch.numpy().dtype))


def test_dtype_applies_to_floats_alone():
    batch = as_batch((np.full(3, 0.1), np.arange(3), torch.ones(3)), dtype=torch.float64)
    assert [part.dtype for part in batch] == [torch.float64, torch.int64, torch.float64]
    assert float(batch[0][0]) == 0.1
    assert as_batch(np.ones(3), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_default_dtype_is_followed():
    torch.set_default_dtype(torch.float64)
    try:
        assert as_batch(np.ones(3)).dtype == torch.float64
        assert as_batch(np.ones(3, np.float32)).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_structures_are_kept():
    batch = as_batch({"x": np.ones((4, 2)), "rest": (pandas.Series([1, 2, 3, 4]), [True, False, True, True])})
    assert list(batch) == ["x", "rest"] and isinstance(batch["rest"], tuple)
    assert batch["rest"][0].dtype == torch.int64 and batch["rest"][1].dtype == torch.bool
    source = Source()
    assert as_batch(source) is source


def test_read_only_and_reversed_arrays():
    frozen = np.arange(6.0, dtype=np.float32)
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(as_batch(frozen), torch.arange(6.0))
    assert torch.equal(as_batch(np.arange(6.0)[::-1]), torch.arange(6.0).flip(0))


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ((np.ones(3), np.ones(4)), ValueError, r"differ in length along axis 0: data\[0\] 3, data\[1\] 4"),
        ({"x": np.ones(3), "y": np.ones(4)}, ValueError, r"data\['x'\] 3, data\['y'\] 4"),
        ((), ValueError, "`data` is an empty collection"),
        (np.ones((0, 2)), ValueError, "`data` has no rows"),
        (3.0, ValueError, "`data` is one number"),
        (torch.tensor(3.0), ValueError, "`data` is one number"),
        ([[1, 2], [3]], ValueError, "`data` is ragged"),
        ([torch.ones(2), torch.ones(2)], TypeError, "list of tensors; stack them"),
        (["a", "b"], TypeError, "`data` should hold numbers, got list of <U1"),
        (np.array([{}, {}]), TypeError, "got ndarray of object$"),
        (np.ones(3, complex), TypeError, "real numbers, got complex128"),
        (None, TypeError, "got NoneType"),
        ("x.csv", TypeError, "got str; read files with pgen.data.load"),
        (Split(torch.ones(2), torch.ones(2), torch.ones(2)), TypeError, "got Split; give one part of the split"),
        (pandas.DataFrame({"a": [1, 2], "age": ["4", "x"]}), TypeError, "column 'age' is '4', not a number in row 0"),
        (pandas.Series([1, None, 3], dtype=object), TypeError, "`data` is missing in row 1"),
        ({"x": pandas.DataFrame({"a": [1, pandas.NA]}, dtype=object)}, TypeError, "column 'a' is missing in row 1"),
    ],
)
def test_what_is_no_batch(given, error, match):
    with pytest.raises(error, match=match) as caught:
        as_batch(given)
    one_line(caught)


# --- rows, maps, devices -------------------------------------------------------------------------------------------------


def test_rows_and_maps():
    x, y = torch.arange(10.0).reshape(5, 2), torch.arange(5)
    batch = {"x": x, "more": (y,)}
    assert num_rows(batch) == num_rows((y, x)) == num_rows(x) == num_rows(Source()) == 5
    some = rows(batch, torch.tensor([4, 0]))
    assert torch.equal(some["x"], x[[4, 0]]) and torch.equal(some["more"][0], torch.tensor([4, 0]))
    view = rows(x, slice(1, 3))
    assert torch.equal(view, x[1:3]) and view.data_ptr() == x[1].data_ptr()
    assert torch.equal(rows(Source(2.0), slice(3, 9))["x"], torch.tensor([[6.0], [8.0]]))
    doubled = map_tensors(lambda t: 2 * t, {"x": x, "k": 3})
    assert torch.equal(doubled["x"], 2 * x) and doubled["k"] == 3
    assert to_device((x,), "meta")[0].is_meta


def test_a_batch_without_tensors_has_no_length():
    with pytest.raises(ValueError, match="holds no tensor"):
        num_rows({"k": 3})


# --- finite --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    x = torch.zeros(1000, 5)
    x[777, 3] = value
    with pytest.raises(ValueError, match=f"^data row 777, column 3 is {value}; drop or fill such rows first$"):
        check_finite(x)
    x[900] = value
    with pytest.raises(ValueError, match=r"^x row 777, column 3 is .*; 2 of 1000 rows are not finite; drop"):
        check_finite(x, "x")


def test_places_of_other_shapes():
    image = torch.zeros(4, 2, 3)
    image[3, 1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"^data\['image'\] row 3, column \(1, 2\) is nan"):
        check_finite({"label": torch.arange(4), "image": image})
    with pytest.raises(ValueError, match=r"^data\[1\] row 2 is inf"):
        check_finite((torch.ones(4), torch.tensor([0.0, 0.0, float("inf"), 0.0])))
    with pytest.raises(ValueError, match="row 0, column 0 is nan; 2 of 2"):  # infinities that cancel
        check_finite(torch.tensor([[float("nan"), 1.0], [float("inf"), -float("inf")]]))


def test_finite_data_pass_even_where_their_sum_overflows():
    check_finite(torch.full((100,), 3e38))
    check_finite(torch.full((100,), 60_000.0, dtype=torch.float16))
    check_finite((torch.arange(3), torch.tensor([True]), torch.ones(0, 2)))
    check_finite(Source())


# --- fingerprint ---------------------------------------------------------------------------------------------------------


def test_fingerprints_tell_data_apart():
    x = torch.arange(12.0).reshape(3, 4)
    changed = x.clone()
    changed[2, 3] += 1e-6
    batches = [x, changed, x.reshape(4, 3), x.double(), (x,), (x, x), {"x": x}, {"y": x}, {"x": x, "k": 3}, {"x": x, "k": 4}]
    prints = [fingerprint(batch) for batch in [*batches, Source(), Source(2.0), x.flip(0), x.bfloat16()]]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 64 for p in prints)


def test_fingerprints_depend_on_values_alone():
    x = torch.arange(12.0).reshape(3, 4)
    assert fingerprint(x) == fingerprint(x.clone()) == fingerprint(x.t().contiguous().t())
    assert fingerprint(Source()) == fingerprint(Source())
