r"""Readers of files, one for each ending. Nothing that a file brings is executed; what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import math
import struct
import tokenize
import warnings
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from ..contracts import nearest

__all__ = [
    "choose", "is_missing", "is_number", "open_npy", "open_parquet", "parquet_column", "read_file", "read_idx", "reading_csv",
    "refused",
]  # fmt: skip

_MISSING = {"", "?", "-", "na", "n/a", "nan", "null", "none"}
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_RATIO = 1100  # no gzip file holds more than about 1032 times its size
_IMAGES = {".png", ".jpg", ".jpeg"}
_DAMAGE = (
    ValueError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    csv.Error,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


_NUMPY = b"\x93NUMPY", b"PK", b"\x80"
"""How arrays, archives of them, and pickled objects begin."""

# --- by ending -----------------------------------------------------------------------------------------------------------

_Read = tuple[Any, tuple[str, ...] | None]
_Reader = Callable[[Path, Sequence[str] | None], _Read]


def read_file(path: Path, columns: Sequence[str] | None) -> _Read:
    """The array of a file, or its arrays by name, and the names of its columns if it is a table with a header."""
    if path.is_dir():
        return _read_images(path, columns)
    name = path.name.lower()
    for ending, reader in _READERS.items():
        if name.endswith(ending):
            if not path.is_file():
                raise ValueError(f"{path}: not a file")
            if path.stat().st_size == 0:
                raise ValueError(f"{path}: the file is empty")
            return reader(path, columns)
    raise ValueError(f"{path}: unknown kind of file; expected {', '.join(_READERS)} or a folder of images")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what libraries raise about damaged files into one line."""
    try:
        yield
    except _Refused as refusal:
        raise ValueError(f"{path}: {refusal}") from None
    except PermissionError:
        raise
    except _DAMAGE as error:
        if kind.startswith(".np") and not _starts(path, *_NUMPY):
            raise ValueError(f"{path}: damaged, or no {kind} file (it does not begin as one)") from None
        if kind.startswith(".np") and "object" in str(error).lower():
            raise ValueError(f"{path}: holds pickled objects, which are never loaded; save plain arrays of numbers") from None
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        raise ValueError(f"{path}: damaged, or no {kind} file ({reason})") from None


def _starts(path: Path, *beginnings: bytes) -> bool:
    """Whether a file begins so: NumPy takes whatever it does not know for pickled objects."""
    with path.open("rb") as file:
        return file.read(max(map(len, beginnings))).startswith(beginnings)


class _Refused(ValueError):
    """A reason of our own for refusing a file, in one line and without the path."""


def refused(reason: str) -> NoReturn:
    """Refuse a file for a reason in one line, without the path."""
    raise _Refused(reason)


def _refuse_columns(columns: Sequence[str] | None) -> None:
    if columns is not None:
        raise _Refused("`columns` is given, but this kind of file has no named columns")


def _read_npy(path: Path, columns: Sequence[str] | None) -> _Read:
    with _reading(path, ".npy"):
        _refuse_columns(columns)
        # A memory map checks the claimed size against the file before anything is allocated.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)), None


def open_npy(path: Path) -> np.memmap[Any, Any]:
    """The array of numbers of a ``.npy`` file as a read-only memory map."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with _reading(path, ".npy"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.ndim == 0:
            raise _Refused("not one array with an axis of rows; expected a .npy file")
        if array.dtype.kind not in "iufb":
            raise _Refused(f"holds {array.dtype}; expected real numbers")
    return array


def _read_npz(path: Path, columns: Sequence[str] | None) -> _Read:
    with _reading(path, ".npz"), open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
        names = list(archive.files)
        wanted = names if columns is None else [names[i] for i in choose(names, columns, "array")]
        arrays = {name: archive[name] for name in wanted}
    return (next(iter(arrays.values())) if len(arrays) == 1 else arrays), None


def read_idx(path: Path) -> Tensor:
    """The array of an IDX file; images of bytes as fractions of 255, all else as it is."""
    with _reading(path, "IDX"), _open(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_DTYPES or not 1 <= head[3] <= 8:
            raise _Refused("not an IDX file")
        shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
        dtype = np.dtype(_IDX_DTYPES[head[2]])
        size = math.prod(shape) * dtype.itemsize
        raw = file.read(size + 1) if size <= _GZIP_RATIO * path.stat().st_size else b""
        if len(raw) != size:
            raise _Refused(f"damaged: {'more' if len(raw) > size else 'fewer'} bytes than its header says (shape {shape})")
    values = np.frombuffer(raw, dtype).reshape(shape)
    if len(shape) > 1 and dtype.itemsize == 1:
        return torch.from_numpy(values.astype(np.float32) / np.float32(255))
    return torch.from_numpy(values.astype(np.int64 if dtype.kind in "iu" else np.float32))


def _read_images_or_labels(path: Path, columns: Sequence[str] | None) -> _Read:
    with _reading(path, "IDX"):
        _refuse_columns(columns)
    return read_idx(path), None


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")


def choose(names: Sequence[str], wanted: Sequence[str] | None, what: str = "column") -> list[int]:
    """Where the wanted names are."""
    if wanted is None:
        return list(range(len(names)))
    for name in wanted:
        if name not in names:
            raise _Refused(f"no {what} {name!r}{nearest(name, names)}")
    return [list(names).index(name) for name in wanted]


# --- tables --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading_csv(path: Path) -> Iterator[tuple[list[str], bool, Iterator[tuple[int, list[str]]]]]:
    """Names of the columns (their numbers without a header), whether there is a header, and rows with their lines."""
    with _reading(path, ".csv"), _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text, strict=True)
        first = next((cells for cells in lines if cells), None)
        if first is None:
            raise _Refused("the file has no rows")
        header = any(not is_number(cell) and not is_missing(cell) for cell in first)
        names = [cell.strip() for cell in first] if header else [str(i) for i in range(len(first))]
        own = [] if header else [(lines.line_num, first)]
        yield names, header, itertools.chain(own, ((lines.line_num, cells) for cells in lines if cells))


def _read_csv(path: Path, columns: Sequence[str] | None) -> _Read:
    with reading_csv(path) as (names, header, rows):
        if not header and columns is not None:
            raise _Refused("`columns` is given, but the table has no header")
        table = _Table(names, choose(names, columns), header)
        for line, cells in rows:
            table.add(cells, line)
        return table.array(), tuple(names[i] for i in table.chosen) if header else None


class _Table:
    """The numbers of a CSV file, row by row; whatever is none is named with its row and column."""

    def __init__(self, names: list[str], chosen: list[int], header: bool) -> None:
        self.names, self.chosen, self.header = names, chosen, header
        self.all = chosen == list(range(len(names)))
        self.values = array("d")
        self.count = 0

    def add(self, cells: list[str], line: int) -> None:
        self.count += 1
        if len(cells) != len(self.names):
            raise _Refused(f"row {self.count} (line {line}) has {len(cells)} cells, expected {len(self.names)}")
        chosen = cells if self.all else [cells[i] for i in self.chosen]
        try:
            numbers = [float(cell) for cell in chosen]
        except ValueError:
            numbers = [math.nan]
        if not math.isfinite(sum(numbers)):  # finite only where every term is, short of an overflow
            self._explain(cells, line)
        self.values.extend(numbers)

    def _explain(self, cells: list[str], line: int) -> None:
        for i in self.chosen:
            cell = cells[i]
            name = repr(self.names[i]) if self.header else str(i)
            place = f"row {self.count} (line {line}), column {name}"
            if is_missing(cell):
                raise _Refused(f"{place}: the value is missing ({cell!r}); drop or fill such rows, or pgen.data.table")
            if not is_number(cell):
                raise _Refused(f"{place}: {cell[:30]!r} is not a number; choose columns by `columns`, or pgen.data.table")
            if not math.isfinite(float(cell)):
                raise _Refused(f"{place}: {cell!r} is not finite")

    def array(self) -> np.ndarray:
        if not self.count:
            raise _Refused("the table has a header but no rows")
        return np.frombuffer(self.values, dtype=np.float64).reshape(self.count, len(self.chosen))


def is_missing(cell: str) -> bool:
    """Whether a cell says that there is no value."""
    return cell.strip().lower() in _MISSING


def is_number(cell: str) -> bool:
    """Whether a cell holds a number, finite or not."""
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, columns: Sequence[str] | None) -> _Read:
    file, names = open_parquet(path, columns)
    with file, _reading(path, ".parquet"):
        table = file.read(columns=names)
    return np.column_stack([parquet_column(path, name, table.column(name)) for name in names]), tuple(names)


def open_parquet(path: Path, columns: Sequence[str] | None) -> tuple[Any, list[str]]:
    """A Parquet file with rows, open, and the names of its chosen columns, all of numbers."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("reading .parquet files needs pyarrow: pip install 'pgen[parquet]'") from None
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with _reading(path, ".parquet"):
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        names = list(file.schema_arrow.names)
        wanted = [names[i] for i in choose(names, columns)]
        if not file.metadata.num_rows:
            raise _Refused("the table has no rows")
        for name in wanted:
            kind = file.schema_arrow.field(name).type
            if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind) or pyarrow.types.is_boolean(kind)):
                raise _Refused(f"column {name!r} holds {kind}, not numbers; choose numeric columns by `columns`")
    return file, wanted


def parquet_column(path: Path, name: str, column: Any, first: int = 0) -> np.ndarray:
    """The numbers of a column, float64; rows in messages are counted from 1 at the row ``first``."""
    with _reading(path, ".parquet"):
        if column.null_count:
            row = first + column.is_null().to_pylist().index(True) + 1
            raise _Refused(f"row {row}, column {name!r}: the value is missing; drop or fill such rows first")
        values = column.to_numpy().astype(np.float64)
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise _Refused(f"row {first + row + 1}, column {name!r}: {values[row]} is not finite")
    return values


# --- images --------------------------------------------------------------------------------------------------------------


def _read_images(folder: Path, columns: Sequence[str] | None) -> _Read:
    with _reading(folder, "image folder"):
        _refuse_columns(columns)
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGES)
        if not paths:
            idx = any(path.name.removesuffix(".gz").endswith("-ubyte") for path in folder.iterdir())
            raise _Refused("no .png or .jpg image in this folder" + ("; use pgen.data.idx_folder for IDX files" if idx else ""))
    first = _read_image(paths[0])
    images = np.empty((len(paths), *first.shape), dtype=np.float32)
    for i, path in enumerate(paths):
        image = first if i == 0 else _read_image(path)
        if image.shape != first.shape:
            raise ValueError(f"{path}: shape {image.shape}, where {paths[0].name} has {first.shape}; all should be alike")
        images[i] = image
    images /= np.float32(255)
    return images, None


def _read_image(path: Path) -> np.ndarray:
    """Bytes ``(H, W)`` of a grey image, ``(H, W, 3)`` of a coloured one; transparency is dropped."""
    from PIL import Image

    with _reading(path, "image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if image.mode[0] in "IF":
                    raise _Refused(f"mode {image.mode} has more than 8 bits; save it with 8 bits a channel")
                plain = image.convert("RGBA") if image.mode == "P" else image
                return np.asarray(plain.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _Refused(f"too large: {error}") from None


_READERS: dict[str, _Reader] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".parquet": _read_parquet,
    "-ubyte": _read_images_or_labels,
    "-ubyte.gz": _read_images_or_labels,
}
