r"""The container of saved models and checkpoints: one safetensors file, one JSON string in its header, one SHA-256.

The digest covers every byte of the file but its own 64 characters, and is checked before anything else is parsed: a
flipped bit, a cut and an edit are all noticed. It says that a file is *intact*, not that its author is trusted; the header
is therefore checked against fixed bounds before a tensor is allocated, and nothing in a file is ever executed.

A file is written beside its target, synced to disk and renamed over it: a reader sees the old file or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["SCHEMA", "read", "read_metadata", "sweep", "tensor_bytes", "write"]

SCHEMA = 1
"""Version of the container that this pgen writes, and the newest one that it reads."""

_MAX_HEADER = 4 * 2**20  # bytes
_MAX_TENSORS = 10_000
_MAX_RANK = 16
_MAX_DEPTH = 64  # nested brackets of any JSON in the file
_MAX_EXTENT = 2**48  # bytes of a tensor, its empty axes counted as one
_CHUNK = 2**20  # bytes hashed at a time

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

# Every pgen file begins, after the eight bytes of its header's length, with this text.
_MAGIC = re.compile(rb'\{"__metadata__":\{"pgen":"\{\\"schema\\":(\d{1,9}),\\"sha256\\":\\"([0-9a-f]{64})\\",')
_NO_DIGEST = "0" * 64
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # linear time, an unclosed string included
_LEFTOVER = re.compile(r".+\.\d+\.[0-9a-f]{8}\.tmp")


@dataclass(frozen=True)
class _Entry:
    """One stored tensor, as the header describes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Contents:
    """A checked header: stored tensors in file order, further names of stored tensors, the caller's metadata."""

    entries: dict[str, _Entry]
    ties: dict[str, str]
    metadata: dict[str, Any]


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    r"""Save tensors and metadata as one file that replaces ``path`` in one instant.

    The same view under several names (tied parameters) is stored once and tied again by `read`. Other views of a shared
    storage, slices say, are stored by value. Dtypes, 0-d and empty tensors are kept; devices and gradients are not.

    Args:
        path: The file to write; its folder must exist.
        tensors: Dense tensors of a floating (float16, bfloat16, float32, float64), integer or boolean dtype, by name.
        metadata: Plain JSON: dicts with string keys, lists, strings, finite numbers, booleans, None. Tuples come back as lists.

    Raises:
        ValueError: If the tensors or the metadata cannot be stored.
        OSError: If the file cannot be written, with its path, the bytes needed and the bytes free. An old file stays as it was.
    """
    path = Path(os.path.realpath(path))
    entries, ties = _untie(tensors)
    header = _header(entries, ties, metadata)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write_all(file, header, [tensors[name] for name in entries])
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)  # before the free bytes are counted
        needed = 8 + len(header) + sum(entry.num_bytes for entry in entries.values())
        raise OSError(error.errno, _write_failure(path, error, needed)) from error
    finally:
        _discard(temporary)
    _sync_folder(path.parent)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load a file that `write` made: its tensors, on the CPU, and its metadata.

    Raises:
        ValueError: If the file is damaged, hostile or not pgen's, in one line that says which.
        OSError: If the file cannot be opened.
    """
    with _opened(path) as (file, contents):
        tensors = {name: _load(file, name, entry) for name, entry in contents.entries.items()}
    tensors |= {name: tensors[of] for name, of in contents.ties.items()}
    return tensors, contents.metadata


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file that `write` made, checked like `read` (digest included) but with no tensor allocated."""
    with _opened(path) as (_, contents):
        return contents.metadata


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in ``folder``. Call it only where no one else is writing."""
    for path in Path(folder).iterdir():
        if _LEFTOVER.fullmatch(path.name):
            path.unlink(missing_ok=True)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values of a dense tensor as bytes in row-major order, without a copy where it already lies so on the CPU."""
    dense = tensor.detach().cpu().contiguous().resolve_neg()
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


# --- writing -------------------------------------------------------------------------------------------------------------


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, _Entry], dict[str, str]]:
    """What to store, widest dtype first so that all data stay aligned, and the other names of what is stored."""
    first: dict[tuple[Any, ...], str] = {}
    entries, ties = {}, {}
    for name, tensor in tensors.items():
        entry = _entry(name, tensor)
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())
        of = first.setdefault(view if entry.num_bytes else (name,), name)
        if of == name:
            entries[name] = entry
        else:
            ties[name] = of
    return dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize)), ties


def _entry(name: str, tensor: Tensor) -> _Entry:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"`tensors` has the name {name!r}; expected a string other than '__metadata__'")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`tensors` has a {type(tensor).__name__} under {name!r}; expected a tensor")
    if tensor.layout != torch.strided or tensor.dtype not in _CODES or tensor.is_meta:
        raise ValueError(
            f"`tensors` has {name!r} as {tensor.layout} {tensor.dtype} on {tensor.device}; expected dense {', '.join(_DTYPES)}"
        )
    return _Entry(tensor.dtype, tuple(tensor.shape))


def _header(entries: dict[str, _Entry], ties: dict[str, str], metadata: Mapping[str, Any]) -> bytes:
    """The header's text with a digest of zeros, checked by the reader's own rules."""
    try:
        inner = _dump({"schema": SCHEMA, "sha256": _NO_DIGEST, "ties": ties, "metadata": dict(metadata)})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`metadata` should be plain JSON: {error}") from None
    header: dict[str, Any] = {"__metadata__": {"pgen": inner}}
    start = 0
    for name, entry in entries.items():
        end = start + entry.num_bytes
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = _dump(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    try:
        _check_length(len(text))
        _parse(text, start)
    except ValueError as error:
        raise ValueError(f"cannot be saved: {error}") from None
    return text


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def _write_all(file: io.BufferedWriter, header: bytes, tensors: list[Tensor]) -> None:
    digest = hashlib.sha256()
    start: list[bytes | memoryview] = [len(header).to_bytes(8, "little"), header]
    for part in itertools.chain(start, map(tensor_bytes, tensors)):
        digest.update(part)
        file.write(part)
    match = _MAGIC.match(header)
    assert match is not None
    file.seek(8 + match.start(2))
    file.write(digest.hexdigest().encode("ascii"))
    file.flush()
    os.fsync(file.fileno())


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # the folder itself may be missing
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_failure(path: Path, error: OSError, needed: int) -> str:
    if not path.parent.is_dir():
        return f"cannot write {path}: the folder {path.parent} does not exist"
    free = shutil.disk_usage(path.parent).free
    intact = "; the old file is intact" if path.exists() else ""
    return f"cannot write {path}: {error.strerror or error} ({needed} bytes needed, {free} bytes free){intact}"


# --- reading -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[io.BufferedReader, _Contents]]:
    """The file, placed at its first tensor, and its header: both checked. Errors carry the path."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a file")
    with open(path, "rb") as file:
        try:
            header, data_size = _check_bytes(file)
            contents = _parse(header, data_size)
            file.seek(8 + len(header))
            yield file, contents
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _check_bytes(file: io.BufferedReader) -> tuple[bytes, int]:
    """The header's text and the number of bytes after it, once the digest of the whole file is found right."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size == 0:
        raise ValueError("not a pgen file: it is empty")
    if len(start) < 8 or length > size - 8:
        raise ValueError("not a pgen file, or one cut short")
    _check_length(length)
    header = file.read(length)
    match = _MAGIC.match(header)
    if match is None:
        raise ValueError("not a pgen file")
    _check_schema(int(match[1]))
    first, last = match.span(2)
    digest = hashlib.sha256(start + header[:first] + _NO_DIGEST.encode("ascii") + header[last:])
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode("ascii") != match[2]:
        raise ValueError("does not match its checksum: damaged")
    return header, size - 8 - length


def _check_length(length: int) -> None:
    if length > _MAX_HEADER:
        raise ValueError(f"header of {length} bytes is over the limit of {_MAX_HEADER}")


def _check_schema(schema: int) -> None:
    if schema > SCHEMA:
        raise ValueError(f"schema version {schema} is newer than this pgen reads ({SCHEMA})")
    if schema < 1:
        raise ValueError(f"schema version {schema} is unknown; this pgen reads {SCHEMA}")


def _parse(header: bytes, data_size: int) -> _Contents:
    """Check everything that the header says against the bounds and the bytes that follow it."""
    entries = _json(header)
    outer = entries.pop("__metadata__", None)
    if not isinstance(outer, dict) or set(outer) != {"pgen"} or not isinstance(outer["pgen"], str):
        raise ValueError("header has no pgen metadata")
    inner = _json(outer["pgen"])
    if set(inner) != {"schema", "sha256", "ties", "metadata"} or not isinstance(inner["metadata"], dict):
        raise ValueError("header has no valid pgen metadata")
    if len(entries) > _MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors are over the limit of {_MAX_TENSORS}")
    checked, end = {}, 0
    for name, value in entries.items():
        checked[name] = _parse_entry(name, value, end)
        end += checked[name].num_bytes
    if end != data_size:
        raise ValueError(f"{data_size} bytes of data where the header describes {end}")
    return _Contents(checked, _parse_ties(inner["ties"], checked), inner["metadata"])


def _json(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object of bounded depth without duplicate keys and without NaN or infinity."""
    try:
        text = text.decode("ascii") if isinstance(text, bytes) else text
        brackets = re.findall(r"[\[\]{}]", _STRING.sub("", text))
        depth = max(itertools.accumulate(1 if bracket in "[{" else -1 for bracket in brackets), default=0)
        if depth <= _MAX_DEPTH:
            value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except _DuplicateError:
        raise ValueError("header has a duplicate key") from None
    except (ValueError, RecursionError):
        raise ValueError("header is not valid JSON") from None
    if depth > _MAX_DEPTH:
        raise ValueError(f"header is nested deeper than {_MAX_DEPTH} levels")
    if not isinstance(value, dict):
        raise ValueError("header is not a JSON object")
    return value


class _DuplicateError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DuplicateError
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse_entry(name: str, value: Any, start: int) -> _Entry:
    """One tensor's description; its data must begin at ``start``, so that they neither overlap nor leave a hole."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {_short(name)} is not described by dtype, shape and data_offsets")
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_RANK:
        raise ValueError(f"tensor {_short(name)} has the bad shape {_short(shape)}")
    entry = _Entry(_DTYPES[dtype], tuple(shape))
    if math.prod(max(1, size) for size in shape) * entry.dtype.itemsize > _MAX_EXTENT:
        raise ValueError(f"tensor {_short(name)} has the oversized shape {_short(shape)}")
    offsets = value["data_offsets"]
    if not _are_counts(offsets) or offsets != [start, start + entry.num_bytes]:
        raise ValueError(f"tensor {_short(name)} has data offsets {_short(offsets)} that do not fit")
    return entry


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _parse_ties(ties: Any, entries: dict[str, _Entry]) -> dict[str, str]:
    if not isinstance(ties, dict) or len(ties) > _MAX_TENSORS:
        raise ValueError("header has no valid map of tied tensors")
    for name, of in ties.items():
        if name in entries or not isinstance(of, str) or of not in entries:
            raise ValueError(f"tensor {_short(name)} is tied to {_short(of)}, which does not fit")
    return ties


def _load(file: io.BufferedReader, name: str, entry: _Entry) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    raw = tensor.reshape(-1).view(torch.uint8)
    if raw.numel() and file.readinto(raw.numpy().data) != len(raw):
        raise ValueError("changed while it was read")
    if entry.dtype == torch.bool and (raw > 1).any():
        raise ValueError(f"tensor {_short(name)} has bytes that are neither true nor false")
    return tensor


def _short(value: Any) -> str:
    """At most 30 printable characters of anything, for a message of one line."""
    text = ascii(value)
    return text if len(text) <= 30 else text[:27] + "..."
