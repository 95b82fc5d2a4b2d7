r"""Sequences as arrays: padding those of unequal length, windows of long ones, and the mu-law of telephony."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..contracts import check_positive

__all__ = ["mu_law", "mu_law_inverse", "pad", "windows"]


def pad(sequences: Sequence[Any], length: int | None = None) -> dict[str, Tensor]:
    """Sequences of unequal length as one array, with zeros behind their ends, and their lengths.

    Args:
        sequences: Each ``(T_i, *element)``, with equal elements.
        length: T of the result; by default the longest there is.

    Returns:
        ``{"x": (N, T, *element), "lengths": (N,)}``, as sequence families take it.

    Raises:
        ValueError: If there is no sequence, one is empty or longer than ``length``, or elements differ in shape.

    Example:
        >>> pad([[1.0, 2.0, 3.0], [4.0]])["x"]
        tensor([[1., 2., 3.],
                [4., 0., 0.]])
    """
    check_positive("length", length, allow_none=True)
    parts = [torch.as_tensor(sequence) for sequence in sequences]
    if not parts:
        raise ValueError("`sequences` is empty; give at least one sequence")
    lengths = torch.tensor([len(part) if part.dim() else 0 for part in parts])
    longest = int(lengths.max()) if length is None else int(length)
    for i, part in enumerate(parts):
        if not 0 < int(lengths[i]) <= longest:
            raise ValueError(
                f"sequence {i} has length {int(lengths[i])}, expected 1 to {longest}; drop it or cut it with windows"
            )
        if part.shape[1:] != parts[0].shape[1:]:
            raise ValueError(
                f"sequence {i} has elements of shape {tuple(part.shape[1:])}, the first {tuple(parts[0].shape[1:])}"
            )
    dtype = reduce(torch.promote_types, [part.dtype for part in parts])
    x = parts[0].new_zeros((len(parts), longest, *parts[0].shape[1:]), dtype=dtype)
    for row, part in zip(x, parts):
        row[: len(part)] = part
    return {"x": x, "lengths": lengths}


def windows(x: Any, length: int, stride: int | None = None) -> Tensor:
    """Pieces of one long sequence: those that begin at 0, ``stride``, 2 ``stride``, ... and lie within it.

    Args:
        x: ``(T, *element)``.
        length: Of each piece.
        stride: Between their beginnings; by default ``length``, so that every symbol is in one piece, but for a short rest.

    Returns:
        ``(N, length, *element)``, a view of x where x is a tensor.

    Example:
        >>> windows(torch.arange(7), 3, 2)
        tensor([[0, 1, 2],
                [2, 3, 4],
                [4, 5, 6]])
    """
    check_positive("length", length)
    check_positive("stride", stride, allow_none=True)
    x = torch.as_tensor(x)
    if x.dim() == 0 or len(x) < length:
        raise ValueError(f"`x` should be a sequence of at least length={length}, got shape {tuple(x.shape)}")
    return x.unfold(0, int(length), int(stride or length)).movedim(-1, 1)


def mu_law(x: Any, levels: int = 256) -> Tensor:
    r"""Audio in [-1, 1] as classes 0, ..., levels - 1, finer near zero.

    .. math:: \left\lfloor \tfrac{\mathrm{levels}}{2} \bigl(1 + \operatorname{sign}(x) \ln(1 + \mu |x|) / \ln(1 + \mu)\bigr)
        \right\rfloor, \qquad \mu = \mathrm{levels} - 1

    References:
        ITU-T Recommendation G.711 (1988); van den Oord et al. (2016), WaveNet, arXiv:1609.03499, section 2.2.

    Example:
        >>> mu_law(torch.tensor([-1.0, -0.01, 0.0, 0.01, 1.0]))
        tensor([  0,  98, 128, 157, 255])
    """
    _check_levels(levels)
    x = torch.as_tensor(x)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    if not bool((x.abs() <= 1).all()):
        worst = float(x.abs().max())
        raise ValueError(f"`x` should lie in [-1, 1], got {worst:g}; divide it by its largest value (int16 by 32768)")
    mu = levels - 1
    companded = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return (levels / 2 * (1 + companded)).floor().clamp(0, levels - 1).long()


def mu_law_inverse(classes: Any, levels: int = 256) -> Tensor:
    """Audio at the middle of each class; see ``mu_law``.

    Example:
        >>> mu_law(mu_law_inverse(torch.arange(256))).equal(torch.arange(256))
        True
    """
    _check_levels(levels)
    y = 2 * (torch.as_tensor(classes).to(torch.get_default_dtype()) + 0.5) / levels - 1
    return y.sign() * torch.expm1(y.abs() * math.log(levels)) / (levels - 1)


def _check_levels(levels: int) -> None:
    check_positive("levels", levels)
    if levels < 2:
        raise ValueError(f"`levels` should be 2 or more, got {levels}")
