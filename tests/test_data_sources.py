"""Readers: what a file holds comes out; what is wrong with it is said in one line."""

import gzip
import io
import pickle
import random
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from pgen.data import digits, idx_folder, load


def refused(path, match, error=ValueError, **options):
    with pytest.raises(error, match=match) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) - len(str(path)) < 300
    return message


# --- digits --------------------------------------------------------------------------------------------------------------


def test_digits_in_file_order():
    x = digits()
    assert [part.shape for part in (x.train, x.validation, x.test)] == [(1000, 8, 8), (350, 8, 8), (447, 8, 8)]
    assert x.train.dtype == torch.float32 and float(x.train.max()) == 1.0 and float(x.train.min()) == 0.0
    assert x.labels.train[:5].tolist() == [0, 1, 2, 3, 4] and len(x.labels.test) == 447
    assert x.train[0, 0].mul(16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]  # the first image of the collection
    assert repr(x) == "Split(train (1000, 8, 8), validation (350, 8, 8), test (447, 8, 8), float32, with labels)"


def test_digits_as_levels_and_binary():
    grey, binary = digits(integers=True), digits(binarize=True)
    assert grey.train.dtype == torch.int64 and int(grey.train.max()) == 16
    assert torch.equal(binary.test, (grey.test >= 8).float())
    assert torch.equal(digits().test * 16, grey.test.float())


def test_digits_at_random():
    x, whole = digits(integers=True, split="random"), load("digits")
    parts = (x.train, x.validation, x.test)
    assert [len(part) for part in parts] == [1149, 288, 360]
    assert torch.equal(torch.cat(parts).sum(0), (whole.data * 16).sum(0).long())
    assert sorted(torch.cat([x.labels.train, x.labels.validation, x.labels.test]).tolist()) == sorted(whole.labels.tolist())
    assert whole.data.shape == (1797, 8, 8) and repr(whole) == "Loaded(digits: (1797, 8, 8), with labels)"


def test_digits_arguments():
    with pytest.raises(ValueError, match="`split` is 'files', which is unknown; did you mean 'file'"):
        digits(split="files")
    with pytest.raises(ValueError, match="both set; choose one"):
        digits(binarize=True, integers=True)


# --- names and endings ---------------------------------------------------------------------------------------------------


def test_names_that_are_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused("digit", r"no file or data set 'digit'; did you mean 'digits'\? \(known: digits\)", FileNotFoundError)
    refused("table.csv", "no file or data set 'table.csv'$", FileNotFoundError)
    refused(tmp_path / "x.npy", "no file or data set", FileNotFoundError)
    refused("digits", "`columns` is given", columns=["a"])
    (tmp_path / "model.pkl").write_bytes(pickle.dumps([1]))
    refused(tmp_path / "model.pkl", r"unknown kind of file; expected \.npy, .*-ubyte\.gz or a folder of images")


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.csv", "a.csv.gz", "a.parquet", "a-ubyte", "a-ubyte.gz"])
def test_empty_and_wrong_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert refused(path, "the file is empty") == f"{path}: the file is empty"
    path.write_bytes(b"\x80\x04K\x01.\xff\xfe" * 3)  # the start of a pickle
    refused(path, "damaged, or no|not an IDX file|pickled objects")
    path.write_bytes(b"\xbf\x00neither" * 9)
    refused(path, r"damaged, or no .* file \(it does not begin as one" if ".np" in name else "damaged|IDX")


# --- arrays --------------------------------------------------------------------------------------------------------------


def test_npy(tmp_path):
    path = tmp_path / "x.npy"
    values = np.arange(30.0).reshape(5, 3, 2)
    np.save(path, values)
    loaded = load(str(path))
    assert torch.equal(loaded.data, torch.from_numpy(values).float())
    assert (loaded.columns, loaded.labels, loaded.name) == (None, None, "x.npy")
    np.save(path, np.asfortranarray(values).astype(">i4"))
    assert torch.equal(load(path).data, torch.from_numpy(values).long())
    np.save(path, np.ones((0, 3)))
    refused(path, "`data` has no rows")
    np.save(path, np.array(["a"]))
    refused(path, "`data` should hold numbers")
    refused(path, "this kind of file has no named columns", columns=["a"])


def test_npz(tmp_path):
    path = tmp_path / "x.npz"
    x, y = np.ones((4, 2)), np.arange(4)
    np.savez(path, x)
    assert load(path).data.shape == (4, 2)
    np.savez_compressed(path, x=x, y=y)
    loaded = load(path)
    assert set(loaded.data) == {"x", "y"} and loaded.data["y"].dtype == torch.int64
    assert repr(loaded) == "Loaded(x.npz: {'x': (4, 2), 'y': (4,)})"
    assert torch.equal(load(path, columns=["y"]).data, torch.arange(4))
    refused(path, r"no array 'z'.*\(known: x, y\)", columns=["z"])
    np.savez(path, train=x, test=x[:3])
    refused(path, r"data\['train'\] 4, data\['test'\] 3; choose arrays by `columns`")


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize("save", [np.save, np.savez])
def test_pickled_objects_are_never_loaded(tmp_path, save):
    path = tmp_path / ("x.npy" if save is np.save else "x.npz")
    save(path, np.array([Evil()], dtype=object), allow_pickle=True)
    refused(path, "holds pickled objects, which are never loaded")


def test_an_array_that_claims_more_than_its_file_holds(tmp_path):
    path = tmp_path / "x.npy"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**9,)})
    path.write_bytes(header.getvalue() + bytes(64))
    tracemalloc.start()
    refused(path, r"damaged, or no \.npy file")
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


# --- CSV -----------------------------------------------------------------------------------------------------------------


def csv_file(folder, text):
    path = folder / "t.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_with_and_without_a_header(tmp_path):
    want = torch.tensor([[1.5, 2.0, -3.0], [4.0, 5e2, 6.0]])
    loaded = load(csv_file(tmp_path, "age, height,w\n1.5,2,-3\n4,5e2,6\n"))
    assert torch.equal(loaded.data, want) and loaded.columns == ("age", "height", "w")
    assert repr(loaded) == "Loaded(t.csv: (2, 3), columns age, height, w)"
    loaded = load(csv_file(tmp_path, "1.5,2,-3\r\n\r\n4,5e2,6"))
    assert torch.equal(loaded.data, want) and loaded.columns is None
    loaded = load(csv_file(tmp_path, '\ufeff"a,b","c\nd",e\n"1.5",2,-3\n\n4,5e2,6\n'))
    assert torch.equal(loaded.data, want) and loaded.columns == ("a,b", "c\nd", "e")


def test_csv_compressed(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n3,4\n"))
    assert torch.equal(load(path).data, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    path.write_bytes(path.read_bytes()[:-12])
    refused(path, r"damaged, or no \.csv file")


def test_csv_columns(tmp_path):
    path = csv_file(tmp_path, "name,age,height\nann,3,4\nbob,5,6\n")
    loaded = load(path, columns=("height", "age"))
    assert torch.equal(loaded.data, torch.tensor([[4.0, 3.0], [6.0, 5.0]])) and loaded.columns == ("height", "age")
    refused(path, r"no column 'hight'; did you mean 'height'\? \(known: name, age, height\)", columns=["hight"])
    refused(path, "row 1 .*'ann' is not a number", columns=["age", "name"])
    refused(csv_file(tmp_path, "1,2\n"), "the table has no header", columns=["a"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("id,age\n1,2\n3,4\n5,abc\n", r"row 3 \(line 4\), column 'age': 'abc' is not a number; choose columns by `columns`"),
        ("id,age\n1,2\n\n3,abc\n", r"row 2 \(line 4\), column 'age'"),
        ("1,2\n3,abc\n", r"row 2 \(line 2\), column 1: 'abc' is not a number"),
        ("id,age\n1,2\n3,\n", r"row 2 \(line 3\), column 'age': the value is missing \(''\); drop or fill"),
        ("id,age\n1,2\n?,4\n", r"row 2 \(line 3\), column 'id': the value is missing \('\?'\)"),
        ("id,age\n1,NaN\n", r"row 1 \(line 2\), column 'age': the value is missing \('NaN'\)"),
        ("1,NA\n3,4\n", r"row 1 \(line 1\), column 1: the value is missing"),
        ("id,age\n1,-inf\n", r"row 1 \(line 2\), column 'age': '-inf' is not finite"),
        ("id,age\ninf,-inf\n", r"column 'id': 'inf' is not finite"),
        ("id,age\n1,2\n3\n", r"row 2 \(line 3\) has 1 cells, expected 2"),
        ("id,age\n1,2,3\n", r"row 1 \(line 2\) has 3 cells, expected 2"),
        ("id,age\n", "the table has a header but no rows"),
        ("\n\n", "the file has no rows"),
        ('id,age\n1,"2\n', r"damaged, or no \.csv file \(unexpected end of data\)"),
        ("id,age\n1," + "9x" * 200 + "\n", r"is not a number"),
    ],
)
def test_csv_errors_name_the_cell(tmp_path, text, match):
    refused(csv_file(tmp_path, text), match)


def test_csv_ragged_rows_are_refused_even_outside_the_chosen_columns(tmp_path):
    refused(csv_file(tmp_path, "a,b,c\n1,2\n"), "has 2 cells, expected 3", columns=["a"])


def test_csv_of_other_bytes(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"a,b\n1,\xff\xfe\n")
    refused(path, r"damaged, or no \.csv file \('utf-8' codec")
    path.write_bytes(b"a,b\n1,2\0\n")
    refused(path, "damaged, or no|is not a number")


def test_csv_large_finite_values_pass(tmp_path):
    """Each is a number, though not their sum."""
    assert load(csv_file(tmp_path, "1e308,1e308\n")).data.shape == (1, 2)


# --- Parquet -------------------------------------------------------------------------------------------------------------


def parquet_file(folder, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


def test_parquet(tmp_path):
    path = parquet_file(tmp_path, a=[1, 2, 3], b=[0.5, 1.5, 2.5], c=[True, False, True], name=["x", "y", "z"])
    loaded = load(path, columns=["b", "a", "c"])
    assert torch.equal(loaded.data, torch.tensor([[0.5, 1.0, 1.0], [1.5, 2.0, 0.0], [2.5, 3.0, 1.0]]))
    assert loaded.columns == ("b", "a", "c")
    refused(path, "column 'name' holds string, not numbers; choose numeric columns")
    refused(path, "no column 'd'", columns=["d"])
    refused(parquet_file(tmp_path, a=[1, None, 3]), "row 2, column 'a': the value is missing")
    refused(parquet_file(tmp_path, a=[1.0, 2.0, float("nan")]), "row 3, column 'a': nan is not finite")
    refused(parquet_file(tmp_path, a=np.zeros(0)), "the table has no rows")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(tmp_path / "t.parquet", r"needs pyarrow: pip install 'pgen\[parquet\]'", ImportError)


# --- IDX -----------------------------------------------------------------------------------------------------------------


def idx(values, code=0x08, dtype=">u1"):
    return bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(dtype).tobytes()


def test_idx_types(tmp_path):
    path = tmp_path / "x-ubyte"
    images = np.arange(24).reshape(4, 3, 2) * 10
    path.write_bytes(idx(images))
    assert torch.equal(load(path).data, torch.from_numpy(images).float() / 255)
    path.write_bytes(idx(np.arange(5)))
    assert torch.equal(load(path).data, torch.arange(5))
    path.write_bytes(idx(images - 100, 0x0B, ">i2"))
    assert torch.equal(load(path).data, torch.from_numpy(images - 100))
    path.write_bytes(idx(images, 0x0D, ">f4"))
    assert torch.equal(load(path).data, torch.from_numpy(images).float())
    refused(path, "no named columns", columns=["a"])


def test_idx_damage(tmp_path):
    path, good = tmp_path / "x-ubyte", idx(np.arange(24).reshape(4, 3, 2))
    path.write_bytes(good[:-1])
    refused(path, r"damaged: fewer bytes than its header says \(shape \(4, 3, 2\)\)")
    path.write_bytes(good + b"x")
    refused(path, "damaged: more bytes than its header says")
    path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 2**32 - 1))
    refused(path, "fewer bytes than its header says")
    path.write_bytes(good[:7])
    refused(path, "damaged, or no IDX file")
    path.write_bytes(b"\0\0\x07\x03" + good[4:])
    refused(path, "not an IDX file")
    packed = tmp_path / "x-ubyte.gz"
    packed.write_bytes(gzip.compress(good)[:-9])
    refused(packed, "damaged, or no IDX file")


def mnist_like(folder, train=30, test=7, labels=30):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(train * 6).reshape(train, 3, 2) % 256)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(labels) % 10))
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx(np.full((test, 3, 2), 255)))
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(test) % 10)))
    return folder


def test_idx_folder(tmp_path):
    x = idx_folder(mnist_like(tmp_path), num_validation=10)
    assert [part.shape for part in (x.train, x.validation, x.test)] == [(20, 3, 2), (10, 3, 2), (7, 3, 2)]
    assert x.labels.validation.tolist() == list(range(10)) and x.labels.test.tolist() == list(range(7))
    assert float(x.test.min()) == 1.0 and torch.allclose(x.validation[0, 0, 0] * 255, torch.tensor(120.0))
    refused(tmp_path, "no .png or .jpg image in this folder; use pgen.data.idx_folder for IDX files")


def test_idx_folder_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`num_validation` is 30, but .* has 30 training images"):
        idx_folder(mnist_like(tmp_path), num_validation=30)
    with pytest.raises(ValueError, match="30 train images but 29 labels"):
        idx_folder(mnist_like(tmp_path, labels=29), num_validation=10)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file t10k-images-idx\*-ubyte"):
        idx_folder(tmp_path)


# --- images --------------------------------------------------------------------------------------------------------------


def image_file(path, mode, size=(5, 4), value=51):
    Image.new(mode, size, value).save(path)


def test_images_in_the_order_of_their_names(tmp_path):
    for i, name in enumerate(["b.png", "a.PNG", "c.png"]):
        image_file(tmp_path / name, "L", value=51 * (i + 1))
    (tmp_path / "notes.txt").write_text("not an image")
    data = load(tmp_path).data
    assert data.shape == (3, 4, 5) and data.dtype == torch.float32
    assert torch.allclose(data[:, 0, 0], torch.tensor([0.4, 0.2, 0.6]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "LA", "CMYK"])
def test_image_modes(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (5, 4)).save(path)
    assert load(tmp_path).data.shape == ((1, 4, 5) if mode in ("1", "LA") else (1, 4, 5, 3))


def test_transparent_palettes_pass_without_a_warning(tmp_path):
    image = Image.new("P", (5, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 51])
    image.save(tmp_path / "x.png", transparency=b"\0\5")
    assert torch.allclose(load(tmp_path).data[0, 3, 2], torch.tensor([1.0, 0.0, 0.2]))


def test_image_errors(tmp_path):
    refused(tmp_path, "no .png or .jpg image in this folder$")
    image_file(tmp_path / "a.png", "L")
    refused(tmp_path, "no named columns", columns=["a"])
    image_file(tmp_path / "b.png", "L", size=(5, 3))
    assert refused(tmp_path, r"shape \(3, 5\), where a.png has \(4, 5\); all should be alike").startswith(
        str(tmp_path / "b.png")
    )
    image_file(tmp_path / "b.png", "RGB")
    refused(tmp_path, r"b.png: shape \(4, 5, 3\), where a.png has \(4, 5\)")
    image_file(tmp_path / "b.png", "I;16")
    refused(tmp_path, "b.png: mode I;16 has more than 8 bits")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    refused(tmp_path, "b.png: damaged, or no image file")


def test_an_image_bomb_is_refused(tmp_path, monkeypatch):
    image_file(tmp_path / "a.png", "L")
    for limit in (15, 5):  # a warning of Pillow's above the limit, its error above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(tmp_path, "a.png: too large")


# --- damage --------------------------------------------------------------------------------------------------------------


def some_files(folder):
    np.save(folder / "a.npy", np.arange(60.0).reshape(20, 3))
    np.savez_compressed(folder / "b.npz", x=np.arange(60.0).reshape(20, 3), y=np.arange(20))
    (folder / "c.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 50))
    (folder / "d.csv").write_bytes(b"a,b\n" + b"1,2\n" * 50)
    parquet_file(folder, a=list(range(50)), b=[0.5] * 50)
    (folder / "e-ubyte").write_bytes(idx(np.arange(120).reshape(5, 6, 4)))
    (folder / "f").mkdir()
    image_file(folder / "f" / "x.png", "RGB", value=(1, 2, 3))
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_damaged_files_give_one_line_or_data(tmp_path):
    """Nothing but a ValueError of one line, whatever bytes are changed, cut or added."""
    rng, outcomes = random.Random(0), {True: 0, False: 0}
    for path in some_files(tmp_path):
        good = path.read_bytes()
        for _ in range(60):
            bad = bytearray(good[: rng.randrange(1, len(good))] if rng.random() < 0.3 else good)
            for _ in range(rng.randrange(1, 4)):
                at = rng.randrange(len(bad))
                bad[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(1, 4))
            path.write_bytes(bad)
            try:
                load(path.parent if path.suffix == ".png" else path)
                outcomes[True] += 1
            except ValueError as error:
                outcomes[False] += 1
                assert "\n" not in str(error) and str(error).startswith(str(path)), repr(error)
        path.write_bytes(good)
    assert outcomes[False] > 200
