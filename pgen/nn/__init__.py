"""Networks without probability: dense ones; ``pgen.nn.denoisers``; generators and critics in ``pgen.nn.adversaries``."""

from .dense import ACTIVATIONS, MLP, MaskedMLP, flatten, waves

__all__ = ["ACTIVATIONS", "MLP", "MaskedMLP", "flatten", "waves"]
