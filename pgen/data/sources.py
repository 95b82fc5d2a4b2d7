r"""Where data come from: the handwritten digits that are always at hand, files, folders."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contracts import Batch, check_choice, check_positive, nearest
from .arrays import as_batch
from .readers import read_file, read_idx

__all__ = ["Loaded", "Split", "digits", "idx_folder", "load"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Training, validation and test data, and their labels where there are any.

    Attributes:
        train: Data to fit.
        validation: Data to choose by.
        test: Data to report.
        labels: The class of each datum, int64, split alike; None without classes.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    labels: Split | None = None

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in ("train", "validation", "test"))
        dtype = str(self.train.dtype).removeprefix("torch.")
        return f"Split({parts}, {dtype}{', with labels' if self.labels else ''})"


@dataclass(frozen=True, eq=False, repr=False)
class Loaded:
    """What a file holds.

    Attributes:
        data: One tensor, or a dict of tensors of equal length.
        columns: The names of a table's columns; None where there are none.
        labels: The class of each datum, int64; None where the source has none.
        name: The file's name without folder, or the data set's.
    """

    data: Batch
    columns: tuple[str, ...] | None
    labels: Tensor | None
    name: str

    def __repr__(self) -> str:
        if isinstance(self.data, Tensor):
            shape: Any = tuple(self.data.shape)
        else:
            shape = {name: tuple(part.shape) for name, part in self.data.items()} if isinstance(self.data, dict) else "tuple"
        columns = f", columns {', '.join(self.columns)}" if self.columns else ""
        return f"Loaded({self.name}: {shape}{columns}{', with labels' if self.labels is not None else ''})"


def digits(binarize: bool = False, integers: bool = False, split: str = "file") -> Split:
    """The 1797 handwritten digits, 8 x 8, that come with scikit-learn.

    Args:
        binarize: Give 1.0 where the grey level is at least 8, else 0.0.
        integers: Give the grey levels themselves, int64 from 0 to 16 (17 levels). By default they are divided by 16.
        split: ``"file"``: 1000, 350 and 447 rows in the order of the file. ``"random"``: 1149, 288 and 360 rows by
            ``train_test_split(test_size=0.2, random_state=0)``, done twice.

    Returns:
        Images ``(N, 8, 8)``, float32 in [0, 1] unless ``integers``, with labels 0 to 9.

    References:
        Alpaydin and Kaynak (1998), Optical recognition of handwritten digits, doi:10.24432/C50P49.

    Example:
        >>> digits(binarize=True)
        Split(train (1000, 8, 8), validation (350, 8, 8), test (447, 8, 8), float32, with labels)
    """
    check_choice("split", split, ("file", "random"))
    if binarize and integers:
        raise ValueError("`binarize` and `integers` are both set; choose one")
    grey, labels = _digits()
    if binarize:
        images = (grey >= 8).float()
    else:
        images = grey if integers else grey.float() / 16
    train, validation, test = _digits_split(split)
    return Split(images[train], images[validation], images[test], Split(labels[train], labels[validation], labels[test]))


def idx_folder(folder: str | os.PathLike[str], num_validation: int = 10_000) -> Split:
    """Images and labels of a folder in the layout of MNIST: ``train-images-idx3-ubyte``, ``t10k-labels-idx1-ubyte.gz``, ...

    Args:
        folder: Holds the four files, compressed or not.
        num_validation: How many of the last training rows are held out for validation.

    Returns:
        Images ``(N, height, width)``, float32 in [0, 1], with labels.

    Raises:
        FileNotFoundError: If one of the four files is missing.
        ValueError: If a file is damaged, or images and labels differ in number.
    """
    check_positive("num_validation", num_validation)
    parts = ("train", "t10k")
    images, labels = ({part: read_idx(_idx_path(Path(folder), part, kind)) for part in parts} for kind in ("images", "labels"))
    for part in images:
        if len(images[part]) != len(labels[part]):
            raise ValueError(f"{folder}: {len(images[part])} {part} images but {len(labels[part])} labels")
    cut = len(images["train"]) - num_validation
    if cut < 1:
        raise ValueError(f"`num_validation` is {num_validation}, but {folder} has {len(images['train'])} training images")
    return Split(
        images["train"][:cut], images["train"][cut:], images["t10k"],
        labels=Split(labels["train"][:cut], labels["train"][cut:], labels["t10k"]),
    )  # fmt: skip


def load(source: str | os.PathLike[str], columns: Sequence[str] | None = None) -> Loaded:
    """Read data: a data set by name, a file by its ending, or a folder of images.

    ====================================  ==========================================================================
    ``"digits"``                          all rows of `digits`, float32 in [0, 1], with labels
    ``.npy``, ``.npz``                    the array; several arrays as a dict; pickled objects are refused
    ``.csv``, ``.csv.gz``                 numbers, ``(rows, columns)``; a first line with words is a header
    ``.parquet``                          numeric columns (needs pyarrow)
    ``-ubyte``, ``-ubyte.gz``             IDX; images of bytes become float32 in [0, 1]
    a folder                              its .png and .jpg images, by name: ``(N, H, W)`` or ``(N, H, W, 3)`` in [0, 1]
    ====================================  ==========================================================================

    Floats become torch's default dtype and integers int64. Rows in messages about tables are counted from 1, below the header.

    Args:
        source: The name, file or folder.
        columns: Names of the columns of a table, or of the arrays of an ``.npz``, to keep, in this order; all by default.

    Raises:
        FileNotFoundError: If there is neither such a file nor such a data set.
        ValueError: If the file cannot be read as data, in one line that says where and why.
    """
    path = Path(source)
    if not path.exists():
        return _load_named(str(source), columns)
    data, names = read_file(path, columns)
    try:
        return Loaded(as_batch(data), names, None, path.name)
    except (ValueError, TypeError) as error:
        hint = "; choose arrays by `columns`" if isinstance(data, dict) else ""
        raise ValueError(f"{path}: {error}{hint}") from None


# --- by name -------------------------------------------------------------------------------------------------------------


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.from_numpy(bunch.images).long(), torch.from_numpy(bunch.target).long()


def _digits_split(split: str) -> list[Tensor]:
    order = torch.arange(1797)
    if split == "file":
        return list(order.split([1000, 350, 447]))
    from sklearn.model_selection import train_test_split

    rest, test = train_test_split(order.numpy(), test_size=0.2, random_state=0)
    train, validation = train_test_split(rest, test_size=0.2, random_state=0)
    return [torch.from_numpy(part) for part in (train, validation, test)]


def _all_digits() -> Loaded:
    grey, labels = _digits()
    return Loaded(grey.float() / 16, None, labels, "digits")


_NAMED: dict[str, Callable[[], Loaded]] = {"digits": _all_digits}


def _load_named(name: str, columns: Sequence[str] | None) -> Loaded:
    if name not in _NAMED:
        is_file = bool(Path(name).suffix) or os.sep in name
        raise FileNotFoundError(f"there is no file or data set {name!r}{'' if is_file else nearest(name, _NAMED)}")
    if columns is not None:
        raise ValueError(f"`columns` is given, but the data set {name!r} has no named columns")
    return _NAMED[name]()


def _idx_path(folder: Path, part: str, kind: str) -> Path:
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(f"{part}-{kind}") and path.name.removesuffix(".gz").endswith("ubyte"):
            return path
    raise FileNotFoundError(f"{folder}: no file {part}-{kind}-idx*-ubyte or the same with .gz")
