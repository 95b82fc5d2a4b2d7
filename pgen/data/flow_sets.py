r"""The five tables on which the literature compares flows, brought by the user, and the settings published for them.

Papamakarios, Pavlakou and Murray (2017), arXiv:1705.07057, section 4.2, prepare POWER, GAS, HEPMASS, MINIBOONE and BSDS300
(code: gpapamak/maf; data: zenodo 1161203). Nothing is downloaded here. Their scripts give standardised training, validation and
test arrays: write each set once to one file, ``numpy.savez("power.npz", train=..., validation=..., test=...)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .arrays import check_finite
from .sources import Split

__all__ = ["FLOW_SETS", "flow_set"]

FLOW_SETS: dict[str, dict[str, Any]] = {
    "power": {"columns": 6, "rows": 1_615_917, "hidden": 256, "bins": 8, "dropout": 0.0, "batch_size": 512},
    "gas": {"columns": 8, "rows": 852_174, "hidden": 256, "bins": 8, "dropout": 0.1, "batch_size": 512},
    "hepmass": {"columns": 21, "rows": 315_123, "hidden": 256, "bins": 8, "dropout": 0.2, "batch_size": 512},
    "miniboone": {"columns": 43, "rows": 29_556, "hidden": 64, "bins": 4, "dropout": 0.2, "batch_size": 64},
    "bsds300": {"columns": 63, "rows": 1_000_000, "hidden": 512, "bins": 8, "dropout": 0.2, "batch_size": 512},
}
"""Columns, training rows, and the settings of RQ-NSF (AR) as published for each set (jrmcornish/cif, ``config/tabular.py``;
Durkan et al. 2019, arXiv:1906.04032): 10 maps, 400 000 steps at 5e-4 and a cosine to 0 (MINIBOONE 250 000 at 3e-4),
tail bound 3."""


def flow_set(name: str, path: str | Path) -> Split:
    """One of the five tables from a file of yours.

    Args:
        name: ``"power"``, ``"gas"``, ``"hepmass"``, ``"miniboone"`` or ``"bsds300"``.
        path: The npz file with arrays ``train``, ``validation`` and ``test``, float, ``(rows, columns)``.

    Raises:
        FileNotFoundError: If there is no such file; it says what to bring.
        ValueError: If arrays are missing or have another number of columns.
    """
    if name not in FLOW_SETS:
        raise ValueError(f"`name` should be one of {', '.join(FLOW_SETS)}, got {name!r}")
    columns, path = FLOW_SETS[name]["columns"], Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: prepare {name.upper()} with the scripts of gpapamak/maf (data: zenodo 1161203) and write "
            f"numpy.savez({path.name!r}, train=..., validation=..., test=...), {columns} columns each"
        )
    with np.load(path, allow_pickle=False) as arrays:
        missing = [part for part in ("train", "validation", "test") if part not in arrays]
        if missing:
            raise ValueError(f"{path} has no array {missing[0]!r} (it has {', '.join(arrays) or 'none'})")
        parts = [torch.from_numpy(np.asarray(arrays[part], np.float32)) for part in ("train", "validation", "test")]
    for part, x in zip(("train", "validation", "test"), parts):
        if x.dim() != 2 or x.shape[1] != columns:
            raise ValueError(f"array {part!r} of {path} should have shape (rows, {columns}), got {tuple(x.shape)}")
        check_finite(x, part)
    train, validation, test = parts
    return Split(train, validation, test)
