r"""Baselines: what a score-function term expects of its signal. They take variance away and add no bias."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

__all__ = ["DecayingAverage", "leave_one_out"]


class DecayingAverage(nn.Module):
    r"""A running mean of the signals of the steps before, for ``ELBO(baseline=DecayingAverage())``.

    .. math:: b_{t+1} = b_t + \max\Bigl(1 - \gamma, \frac{1}{t + 1}\Bigr) (\bar{s}_t - b_t)

    At first it is the plain mean of what was seen, then the average that forgets. One number serves the latents inside the
    data plate, another those outside; they are buffers, carried from step to step inside the captured graph.

    Args:
        decay: :math:`\gamma`, in (0, 1): about 1 / (1 - decay) steps are remembered.

    References:
        Mnih and Gregor (2014), Neural variational inference and learning in belief networks, arXiv:1402.0030, section 2.3.
    """

    local: Tensor
    shared: Tensor
    seen: Tensor

    def __init__(self, decay: float = 0.9) -> None:
        super().__init__()
        if not isinstance(decay, (int, float)) or not 0 < decay < 1:
            raise ValueError(f"`decay` should be in (0, 1), such as 0.9, got {decay!r}")
        self.decay = decay
        for name in ("local", "shared", "seen"):
            self.register_buffer(name, torch.zeros(()))

    def extra_repr(self) -> str:
        """The decay."""
        return f"decay={self.decay}"

    def update(self, signals: dict[str, Tensor]) -> None:
        """Take in the signals of a step; those that are not finite change nothing."""
        rate = (1 / (self.seen + 1)).clamp(min=1 - self.decay)
        for name, signal in signals.items():
            average, mean = cast(Tensor, getattr(self, name)), signal.detach().mean()
            average.copy_(torch.where(torch.isfinite(mean), average + rate * (mean - average), average))
        self.seen.add_(1.0)


def leave_one_out(signal: Tensor) -> Tensor:
    r"""For each particle along axis 0 the mean signal of the others.

    References:
        Kool, van Hoof, Welling (2019), Buy 4 REINFORCE samples, get a baseline for free!, DeepRLStructPred at ICLR.
    """
    return (signal.sum(0) - signal) / (len(signal) - 1)
