"""The container of saved files: what goes in comes out, and nothing else comes out."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import sys

import pytest
import torch

from pgen import files

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool]
METADATA = {"family": "vae", "shape": [3, 5], "nested": {"a": None, "b": True, "c": 1.5, "d": "ü\n\"'"}}


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "decoder.weight": torch.randn(7, 5, generator=generator),
        "step": torch.tensor(12),
        "mask": torch.rand(11, generator=generator) > 0.5,
        "empty": torch.empty(0, 3),
        "bias": torch.randn(13, generator=generator, dtype=torch.float64),
    }


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.pgen"
    files.write(path, some_tensors(), METADATA)
    return path


def refused(path, match=None):
    """The one line with which every reader refuses a file."""
    messages = set()
    for reader in (files.read, files.read_metadata):
        with pytest.raises(ValueError, match=match) as caught:
            reader(path)
        messages.add(str(caught.value))
    message = messages.pop()
    assert not messages
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert len(message) - len(str(path)) < 120
    return message


# --- what goes in comes out ----------------------------------------------------------------------------------------------


def test_round_trip(saved):
    tensors, metadata = files.read(saved)
    want = some_tensors()
    assert metadata == METADATA == files.read_metadata(saved)
    assert set(tensors) == set(want)
    for name, tensor in want.items():
        assert tensors[name].dtype == tensor.dtype and tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_keeps_its_bytes(tmp_path, dtype):
    raw = torch.arange(48, dtype=torch.uint8) % (2 if dtype == torch.bool else 255)
    matrix = raw.view(dtype).reshape(2, 3, -1)
    files.write(tmp_path / "a", {"matrix": matrix, "scalar": matrix[1, 2, 0], "none": matrix[:0]}, {})
    tensors, _ = files.read(tmp_path / "a")
    for name, want in {"matrix": matrix, "scalar": matrix[1, 2, 0], "none": matrix[:0]}.items():
        assert tensors[name].dtype == dtype and tensors[name].shape == want.shape
        assert bytes(files.tensor_bytes(tensors[name])) == bytes(files.tensor_bytes(want))


def test_views_are_stored_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {
        "t": base.t(),
        "slice": base[1:, ::2],
        "expanded": base[0].expand(5, 4),
        "imag": torch.tensor([1 + 2j]).conj().imag,
    }
    files.write(tmp_path / "a", views, {})
    tensors, _ = files.read(tmp_path / "a")
    for name, view in views.items():
        assert torch.equal(tensors[name], view)
    tensors["slice"].zero_()
    assert tensors["t"][0, 1] == 4.0


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path):
    weight = torch.nn.Parameter(torch.randn(50, 40))
    files.write(tmp_path / "tied", {"a": weight, "b": weight, "c": weight.detach(), "part": weight[:2]}, {})
    files.write(tmp_path / "once", {"a": weight, "part": weight[:2]}, {})
    assert os.path.getsize(tmp_path / "tied") - os.path.getsize(tmp_path / "once") < 100
    tensors, _ = files.read(tmp_path / "tied")
    assert tensors["a"] is tensors["b"] is tensors["c"]
    assert tensors["part"].data_ptr() != tensors["a"].data_ptr()
    assert torch.equal(tensors["b"], weight) and not tensors["b"].requires_grad


def test_empty_tensors_are_not_tied(tmp_path):
    files.write(tmp_path / "a", {"x": torch.empty(0), "y": torch.empty(0)}, {})
    tensors, _ = files.read(tmp_path / "a")
    assert tensors["x"] is not tensors["y"]


def test_equal_files_for_equal_contents(tmp_path, saved):
    files.write(tmp_path / "again", some_tensors(), METADATA)
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_safetensors_reads_the_file(saved):
    from safetensors.torch import load_file

    tensors = load_file(saved)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in some_tensors().items())


def test_no_tensors_and_a_symbolic_link(tmp_path):
    files.write(tmp_path / "real", {}, {"a": 1})
    (tmp_path / "link").symlink_to(tmp_path / "real")
    files.write(tmp_path / "link", {}, {"a": 2})
    assert (tmp_path / "link").is_symlink()
    assert files.read(tmp_path / "real") == ({}, {"a": 2})


@pytest.mark.parametrize(
    ("tensors", "metadata", "match"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, {}, "`tensors` has 'a' as torch.strided torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, {}, "expected dense"),
        ({"a": torch.zeros(2, device="meta")}, {}, "on meta"),
        ({"__metadata__": torch.zeros(2)}, {}, "__metadata__"),
        ({"a": torch.zeros([1] * 17)}, {}, "cannot be saved: tensor 'a' has the bad shape"),
        ({str(i): torch.zeros(()) for i in range(10_001)}, {}, "10001 tensors are over the limit of 10000"),
        ({}, {"a": torch.zeros(2)}, "`metadata` should be plain JSON: .*Tensor"),
        ({}, {"a": float("nan")}, "`metadata` should be plain JSON"),
        ({}, {"a": "x" * 5_000_000}, "header of .* bytes is over the limit"),
        ({}, {"a": json.loads("[" * 100 + "]" * 100)}, "nested deeper than 64"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, tensors, metadata, match):
    with pytest.raises(ValueError, match=match) as caught:
        files.write(tmp_path / "a", tensors, metadata)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_number_is_not_a_tensor(tmp_path):
    with pytest.raises(TypeError, match="`tensors` has a float under 'a'"):
        files.write(tmp_path / "a", {"a": 1.0}, {})


# --- damage --------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_noticed(saved):
    good = saved.read_bytes()
    rng = random.Random(1)
    checksum = 0
    for position in [*range(8), *(rng.randrange(len(good)) for _ in range(150))]:
        bad = bytearray(good)
        bad[position] ^= 1 << rng.randrange(8)
        saved.write_bytes(bad)
        checksum += "does not match its checksum: damaged" in refused(saved)
    assert checksum > 100
    saved.write_bytes(good)
    files.read(saved)


def test_every_truncation_is_noticed(saved):
    good = saved.read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1]:
        saved.write_bytes(good[:length])
        refused(saved, "empty" if length == 0 else None)


def mutate(data, rng):
    """One of the usual edits of a fuzzer."""
    first, last = sorted(rng.randrange(len(data)) for _ in range(2))
    noise = rng.randbytes(rng.randrange(1, 64))
    edits = [
        data[:first] + data[last + 1 :],
        data[:first] + noise + data[first:],
        data[:first] + noise + data[first + len(noise) :],
        data[:last] + data[first : last + 1] + data[last:],
        data[:8] + data[8:].replace(b"0", b"9", rng.randrange(1, 9)),
        data + noise,
        rng.randbytes(8) + data[8:],
    ]
    return rng.choice([edit for edit in edits if edit != data])


def test_mutations_are_refused(saved):
    good = saved.read_bytes()
    rng = random.Random(2)
    for _ in range(300):
        saved.write_bytes(mutate(good, rng))
        refused(saved)


# --- hostile files with a right digest -----------------------------------------------------------------------------------


def sealed(header, data=b"", schema=1):
    """A file around any header, with the digest that belongs to it."""
    text = header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))
    start = '{"__metadata__":{"pgen":"{' + rf"\"schema\":{schema},\"sha256\":\""
    raw = (start + "0" * 64 + text).encode()
    raw = len(raw).to_bytes(8, "little") + raw
    digest = hashlib.sha256(raw + data).hexdigest().encode()
    at = 8 + len(start)
    return raw[:at] + digest + raw[at + 64 :] + data


def rest(tensors, ties="{}", metadata="{}", more=""):
    """What follows the digest in a header: valid unless an argument is not."""
    inner = json.dumps(f'","ties":{ties},"metadata":{metadata}{more}}}')[1:-1]
    return inner + '"}' + "".join(f",{json.dumps(name)}:{value}" for name, value in tensors) + "}"


def entry(shape, offsets, dtype="F32"):
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


A = ("a", entry([2], [0, 8]))


def test_the_handmade_file_is_valid_when_nothing_is_wrong(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(sealed(rest([A], '{"b":"a"}', '{"n":1}'), bytes(8)))
    tensors, metadata = files.read(path)
    assert torch.equal(tensors["a"], torch.zeros(2)) and tensors["b"] is tensors["a"] and metadata == {"n": 1}


HOSTILE = {
    "huge shape": (rest([("a", entry([10**12], [0, 4 * 10**12]))]), b"", "0 bytes of data where the header describes"),
    "lying offsets": (rest([("a", entry([10**12], [0, 8]))]), bytes(8), "data offsets"),
    "empty and huge": (rest([("a", entry([0, 2**60], [0, 0]))]), b"", "oversized shape"),
    "overflow": (rest([("a", entry([2**32, 2**32], [0, 0]))]), b"", "oversized shape"),
    "negative shape": (rest([("a", entry([-2, -1], [0, 8]))]), bytes(8), "bad shape"),
    "shape of floats": (rest([("a", entry([2.0], [0, 8]))]), bytes(8), "bad shape"),
    "shape of truths": (rest([("a", entry([True], [0, 4]))]), bytes(4), "bad shape"),
    "shape a word": (rest([("a", entry("2", [0, 8]))]), bytes(8), "bad shape"),
    "rank 17": (rest([("a", entry([1] * 17, [0, 4]))]), bytes(4), "bad shape"),
    "negative offsets": (rest([("a", entry([2], [-8, 0]))]), bytes(8), "data offsets"),
    "overlap": (rest([A, ("b", entry([2], [4, 12]))]), bytes(12), "tensor 'b' has data offsets"),
    "hole": (rest([A, ("b", entry([2], [12, 20]))]), bytes(20), "tensor 'b' has data offsets"),
    "same bytes twice": (rest([A, ("b", entry([2], [0, 8]))]), bytes(8), "tensor 'b' has data offsets"),
    "trailing bytes": (rest([A]), bytes(9), "9 bytes of data where the header describes 8"),
    "missing bytes": (rest([A]), bytes(7), "7 bytes of data where the header describes 8"),
    "dtype": (rest([("a", entry([2], [0, 8], "object"))]), bytes(8), "unknown dtype 'object'"),
    "dtype a list": (rest([("a", entry([2], [0, 8], ["F32"]))]), bytes(8), "unknown dtype"),
    "long name": (rest([("n" * 10**5, entry([2], [0, 9]))]), bytes(9), "data offsets"),
    "name of two lines": (rest([("a\nb", entry([2], [0, 9]))]), bytes(9), r"'a\\nb'"),
    "more keys": (rest([("a", '{"dtype":"F32","shape":[2],"data_offsets":[0,8],"stride":[0]}')]), bytes(8), "not described"),
    "no entry": (rest([("a", "3")]), b"", "not described"),
    "30 000 tensors": (rest([(str(i), entry([0], [0, 0])) for i in range(30_000)]), b"", "30000 tensors are over the limit"),
    "duplicate tensor": (rest([A, A]), bytes(8), "duplicate key"),
    "duplicate key": (rest([A], metadata='{"n":1,"n":2}'), bytes(8), "duplicate key"),
    "second digest": (rest([A], more=',"sha256":"0"'), bytes(8), "duplicate key"),
    "second metadata": (rest([A, ("__metadata__", "{}")]), bytes(8), "duplicate key"),
    "deep metadata": (rest([A], metadata='{"n":' + "[" * 10**5 + "]" * 10**5 + "}"), bytes(8), "nested deeper than 64"),
    "deep header": (rest([("a", "[" * 10**5 + "]" * 10**5)]), b"", "nested deeper than 64"),
    "unclosed string": (rest([("a", '"' + r"\"" * 10**6)]), b"", "not valid JSON"),
    "metadata a list": (rest([A], metadata="[1]"), bytes(8), "no valid pgen metadata"),
    "more metadata": (rest([A], more=',"code":"os.system"'), bytes(8), "no valid pgen metadata"),
    "NaN": (rest([A], metadata='{"n":NaN}'), bytes(8), "not valid JSON"),
    "huge number": (rest([A], metadata='{"n":' + "9" * 5000 + "}"), bytes(8), "not valid JSON"),
    "text after": (rest([A]) + "x", bytes(8), "not valid JSON"),
    "not ASCII": (rest([A]) + "é", bytes(8), "not valid JSON"),
    "no metadata": (rest([])[:-1] + ',"__metadata__":3}', b"", "duplicate key"),
    "tie to nothing": (rest([A], '{"b":"c"}'), bytes(8), "tensor 'b' is tied to 'c'"),
    "tie over a tensor": (rest([A], '{"a":"a"}'), bytes(8), "tensor 'a' is tied to 'a'"),
    "tie to a number": (rest([A], '{"b":3}'), bytes(8), "tensor 'b' is tied to 3"),
    "ties a list": (rest([A], "[]"), bytes(8), "no valid map of tied tensors"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, case):
    text, data, match = HOSTILE[case]
    path = tmp_path / "x"
    path.write_bytes(sealed(text, data))
    refused(path, match)


def test_a_truth_value_of_seven_is_refused(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(sealed(rest([("a", entry([2], [0, 2], "BOOL"))]), b"\x01\x07"))
    with pytest.raises(ValueError, match="neither true nor false"):
        files.read(path)


def test_schema_versions(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(sealed(rest([A]), bytes(8), schema=9))
    refused(path, r"schema version 9 is newer than this pgen reads \(1\)")
    path.write_bytes(sealed(rest([A]), bytes(8), schema=0))
    refused(path, "schema version 0 is unknown")


class Evil:
    def __reduce__(self):
        return os.system, ("touch marker",)


def foreign_files(folder):
    torch.save({"a": torch.zeros(3)}, folder / "torch")
    (folder / "pickle").write_bytes(pickle.dumps(Evil()))
    (folder / "text").write_text("hello, this is no model at all\n")
    (folder / "short").write_bytes(b"\x01\x02")
    (folder / "big header").write_bytes((5 * 2**20).to_bytes(8, "little") + bytes(6 * 2**20))
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, folder / "safetensors")
    return sorted(folder.iterdir())


def test_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = foreign_files(tmp_path)
    for path in paths:
        refused(path, "over the limit" if path.name == "big header" else "not a pgen file")
    assert not (tmp_path / "marker").exists()


def test_folders_pipes_and_missing_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path, "not a file")
    refused(tmp_path / "pipe", "not a file")
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "nothing")


def test_reading_executes_and_imports_nothing(saved):
    files.read(saved)
    events = []
    listening = [True]
    watched = ("exec", "compile", "import", "marshal.loads")
    sys.addaudithook(lambda e, _: events.append(e) if listening and (e.startswith("pickle") or e in watched) else None)
    files.read(saved)
    files.read_metadata(saved)
    listening.clear()
    assert events == []


# --- writing that fails --------------------------------------------------------------------------------------------------


class Full:
    """A file on a disk that is full after 100 bytes."""

    def __init__(self, file):
        self.file = file
        self.left = 100

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, part):
        if memoryview(part).nbytes > self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= memoryview(part).nbytes
        return self.file.write(part)


def test_a_full_disk_keeps_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()
    monkeypatch.setattr(files, "open", lambda *arguments: Full(open(*arguments)), raising=False)
    left, usage = [], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: (left.extend(os.listdir(folder)), usage(folder))[1])
    with pytest.raises(OSError, match=r"No space left on device \(\d+ bytes needed, \d+ bytes free\)") as caught:
        files.write(saved, {"a": torch.zeros(1000)}, {})
    monkeypatch.undo()
    message = str(caught.value)
    assert caught.value.errno == errno.ENOSPC and str(saved) in message and "\n" not in message
    needed = int(message.split("(")[1].split()[0])
    assert 4000 < needed < 4500
    assert left == [saved.name]  # the free bytes are those without the temporary file
    assert message.endswith("the old file is intact")
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


def test_a_file_size_limit_keeps_the_old_file(saved):
    old = saved.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write(saved, {"a": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == old and os.listdir(saved.parent) == [saved.name]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_kill_before_the_rename_keeps_the_old_file(saved, monkeypatch, call, error):
    def kill(*_):
        raise error

    monkeypatch.setattr(os, call, kill)
    with pytest.raises(error):
        files.write(saved, {"a": torch.ones(3)}, {})
    monkeypatch.undo()
    assert os.listdir(saved.parent) == [saved.name]
    assert files.read(saved)[1] == METADATA
    files.write(saved, {"a": torch.ones(3)}, {})
    assert files.read(saved)[1] == {}


def test_data_are_synced_before_the_rename_and_the_folder_after(saved, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    for name in real:
        monkeypatch.setattr(os, name, lambda *arguments, name=name: (calls.append(name), real[name](*arguments))[1])
    files.write(saved, {"a": torch.ones(3)}, {})
    assert calls == ["fsync", "replace", "fsync"]


def test_the_temporary_file_lies_beside_and_leftovers_are_swept(saved, monkeypatch):
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(os.fspath(a)), real(a, b)))
    files.write(saved, {}, {})
    assert os.path.dirname(seen[0]) == str(saved.parent) and seen[0].endswith(".tmp")
    (saved.parent / os.path.basename(seen[0])).write_bytes(b"half")
    (saved.parent / "mine.tmp").write_bytes(b"a user's own")
    files.sweep(saved.parent)
    assert sorted(os.listdir(saved.parent)) == ["mine.tmp", saved.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        files.write(tmp_path / "nowhere" / "a", {}, {})
