r"""Distributions over arrays from distributions over vectors."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist

__all__ = ["with_event_shape"]


def with_event_shape(fn: dist.TorchDistribution, event_shape: Sequence[int]) -> dist.TorchDistribution:
    """A distribution over vectors (or arrays) as one over arrays of as many numbers; the density is the same.

    Example:
        >>> import torch
        >>> with_event_shape(dist.Normal(torch.zeros(6), 1.0).to_event(1), (2, 3)).event_shape
        torch.Size([2, 3])
    """
    if tuple(fn.event_shape) == tuple(event_shape):
        return fn
    return dist.TransformedDistribution(fn, dist.transforms.ReshapeTransform(tuple(fn.event_shape), tuple(event_shape)))
