r"""Exact sums over the discrete latents of a guide.

A site of the guide that asks for it, ``infer={"enumerate": "parallel"}``, takes each value of its support in turn, and what
depends on it is weighted by its probability: no draw, no score function. The programs run once for all values but the first
in one batched run, so they are written for one value, as always.

(Discrete latents that the guide leaves out are summed inside the model; see ``pgen.enumeration``.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_map

from ..programs import DATA_PLATE, Traces, vectorize

__all__ = ["Branch", "over_branches"]


class Branch(Messenger):
    """Runs a guide at one joint value of the discrete sites that ask to be enumerated.

    Args:
        number: Which of the joint values: a number or a 0-dim tensor.
        sizes: Values of each site, by name; filled in by the run at the first joint value.
    """

    def __init__(self, number: int | Tensor, sizes: dict[str, int]) -> None:
        super().__init__()
        self.sizes = sizes
        self._left = number

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["is_observed"] or msg["infer"].get("enumerate") not in ("parallel", "sequential"):
            return
        if not getattr(fn, "has_enumerate_support", False):
            raise ValueError(f"guide site {msg['name']!r} asks to be enumerated, and {type(fn).__name__} cannot be")
        support = fn.enumerate_support(expand=False)
        size = self.sizes[msg["name"]] = len(support)
        at, self._left = self._left % size, self._left // size
        value = support[at] if isinstance(at, int) else support.index_select(0, at.reshape(1))[0]
        msg["value"], msg["done"] = value.expand(fn.batch_shape + fn.event_shape), True

    def weights(self, traces: Traces) -> tuple[Tensor | None, Tensor | None]:
        r"""Weights of this branch: of what lies in the data plate ``(B,)``, and of what lies outside ``()``.

        Outside, a sum over a site inside the plate is a mean over branches: nothing there depends on it.
        """
        shared, local, share = [], [], 1.0
        for name, size in self.sizes.items():
            term = traces.scores[name]
            log_q = term.fn.log_prob(term.value)
            if any(plate != DATA_PLATE for plate, _ in term.plates):
                raise ValueError(
                    f'guide site {name!r} lies in a plate inside or beside "{DATA_PLATE}", where it cannot be enumerated: '
                    f"leave it out of the guide, and it is summed in the model"
                )
            if term.local:
                local.append(log_q.reshape(-1))
                share /= size
            else:
                shared.append(log_q)
        if not self.sizes:
            return None, None
        outside = sum(shared).exp() if shared else torch.ones((), dtype=local[0].dtype, device=local[0].device)
        return sum(local + shared).exp(), outside * share  # type: ignore[union-attr]


def over_branches(run: Callable[[Branch], dict[str, Any]]) -> dict[str, Any]:
    """``run`` at every joint value of the enumerated sites; tensors get a leading axis of branches, unless there are none."""
    sizes: dict[str, int] = {}
    with Branch(0, sizes) as branch:
        first = run(branch)
    total = math.prod(sizes.values())
    if total == 1:
        return first

    def other(number: Tensor) -> dict[str, Any]:
        with Branch(number, sizes) as branch:
            return run(branch)

    rest = vectorize(other, total - 1, torch.arange(1, total))
    return tree_map(lambda a, b: torch.cat([a[None], b]), first, rest)
