"""Data: sources that read it, batches that order it, transforms that prepare it, targets that know their own density."""

from . import toy
from .arrays import as_batch, check_finite, fingerprint, map_tensors, num_rows, rows, to_device
from .batches import Batches, chunks, epoch_order, key, permute, step_keys
from .contexts import ContextColumns
from .flow_sets import FLOW_SETS, flow_set
from .sequences import mu_law, mu_law_inverse, pad, windows
from .sources import Loaded, Split, digits, idx_folder, load
from .stored import MemoryMapped, Parquet
from .tables import Table, column_names, table
from .transforms import Compose, Dequantize, Logit, Standardize, Transform, from_settings

__all__ = [
    "FLOW_SETS",
    "Batches",
    "Compose",
    "ContextColumns",
    "Dequantize",
    "Loaded",
    "Logit",
    "MemoryMapped",
    "Parquet",
    "Split",
    "Standardize",
    "Table",
    "Transform",
    "as_batch",
    "check_finite",
    "chunks",
    "column_names",
    "digits",
    "epoch_order",
    "fingerprint",
    "flow_set",
    "from_settings",
    "idx_folder",
    "key",
    "load",
    "map_tensors",
    "mu_law",
    "mu_law_inverse",
    "num_rows",
    "pad",
    "permute",
    "rows",
    "step_keys",
    "table",
    "to_device",
    "toy",
    "windows",
]
