"""The families: one file each, read top to bottom."""

from ..base import FAMILIES as REGISTRY
from .autoencoder import Autoencoder
from .boltzmann import RBM
from .causal_transformer import CausalTransformer
from .classifier import GenerativeClassifier
from .diffusion import Diffusion
from .energy import EnergyBased, EnergySum
from .flow import Flow
from .flow_matching import FlowMatching
from .gan import GAN
from .gaussian import Gaussian
from .glow import Glow
from .hidden_markov import HiddenMarkov
from .kernel_density import KernelDensity
from .linear import FactorAnalysis, ProbabilisticPCA
from .made import MADE
from .maximum_entropy import MaximumEntropy
from .mixture import GaussianMixture, Mixture, MixtureOf
from .pixel_cnn import PixelCNN
from .pixel_rnn import PixelRNN
from .vae import VAE
from .wavenet import WaveNet

__all__ = [
    "GAN",
    "MADE",
    "RBM",
    "REGISTRY",
    "VAE",
    "Autoencoder",
    "CausalTransformer",
    "Diffusion",
    "EnergyBased",
    "EnergySum",
    "FactorAnalysis",
    "Flow",
    "FlowMatching",
    "Gaussian",
    "GaussianMixture",
    "GenerativeClassifier",
    "Glow",
    "HiddenMarkov",
    "KernelDensity",
    "MaximumEntropy",
    "Mixture",
    "MixtureOf",
    "PixelCNN",
    "PixelRNN",
    "ProbabilisticPCA",
    "WaveNet",
]
