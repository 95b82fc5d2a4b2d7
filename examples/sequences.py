"""A text written by rule, learned symbol by symbol. Run ``python examples/sequences.py``.

The text is sums, ``3+8=11 9+0=9 ...``: two digits drawn at random, the rest follows. A WaveNet learns it in seconds; since the
rule is known, so is the entropy that no model can go below. Then: what comes next after a prefix, and completions, checked.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import Tensor

import pgen

ALPHABET = "0123456789+= "


def sums(count: int, seed: int) -> list[str]:
    """So many sums of two random digits."""
    digits = np.random.default_rng(seed).integers(0, 10, (count, 2))
    return [f"{a}+{b}={a + b} " for a, b in digits.tolist()]


def codes(text: str) -> Tensor:
    """A text as numbers 0, 1, ... of its characters."""
    return torch.tensor([ALPHABET.index(character) for character in text])


def entropy(length: float) -> float:
    """Bits a character of the rule: two digits are free in a sum of this mean length."""
    return 2 * math.log2(10) / length


def main(steps: int = 1200, progress: bool = True) -> tuple[float, float]:
    """Bits a character on held-out text, and the share of completed sums that are right."""
    train, test = "".join(sums(4000, seed=1)), "".join(sums(1000, seed=2))
    wavenet = pgen.models.WaveNet((48,), num_classes=len(ALPHABET), channels=32, dilations=(1, 2, 4))
    run = wavenet.fit(pgen.data.windows(codes(train), 48, 6), steps=steps, compile="graph", progress=progress)
    print(run)

    # A window begins in the middle of a sum: its first characters cost more than the rule's entropy.
    bits = wavenet.log_prob(pgen.data.windows(codes(test), 48)).bits_per_dim
    print(f"{bits:.3f} bits a character on held-out text; the rule has {entropy(len(test) / 1000):.3f}")

    after = wavenet.next(codes("1+1=2 3+4=")[None]).probs[0]
    print("after 3+4= comes", ", ".join(f"{ALPHABET[i]} ({float(after[i]):.2f})" for i in after.topk(3).indices.tolist()))

    asked = [(f"{a}+{b}=", f"{a + b} ") for a in range(10) for b in range(10)]
    done = wavenet.complete(torch.stack([codes(sum_) for sum_, _ in asked]), 7, seed=5)
    texts = ["".join(ALPHABET[i] for i in row.tolist()) for row in done]
    right = sum(text.startswith(sum_ + answer) for text, (sum_, answer) in zip(texts, asked)) / len(asked)
    print(f"{right:.0%} of all sums completed right, such as {', '.join(t.split(' ')[0] for t in texts[::31])}")

    whole = wavenet.complete(codes("2+2=")[None], 48, seed=5)[0]
    print("".join(ALPHABET[i] for i in whole.tolist()))
    return bits, right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    main(parser.parse_args().steps)
