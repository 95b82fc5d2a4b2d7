r"""Generative adversarial network: draws without a density, taught by a critic.

.. math:: z \sim \mathcal{N}(0, I), \qquad x = G(z, c), \qquad
    \min_G \max_T \; \mathbb{E}\, g_1(T(x, c)) + \mathbb{E}\, g_2(T(G(z, c), c))

The model is the program that draws x; the guide is the critic T, the variational function of the divergence that the game
minimises. There is no log p(x): G's images fill a set of measure zero wherever z has fewer numbers than x.

Goodfellow et al. (2014), Generative adversarial nets, arXiv:1406.2661; Nowozin, Cseke and Tomioka (2016), f-GAN,
arXiv:1606.00709; Lin et al. (2018), PacGAN, arXiv:1712.04086.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..base import GenerativeModel, _evaluating
from ..contracts import Batch, Measure, NotAvailable, Score, Seed, as_sizes, check_choice, check_positive
from ..data.batches import key
from ..data.transforms import Standardize, Transform
from ..evaluation.annealing import AIS, anneal
from ..nn.adversaries import ARCHITECTURES, OUTPUTS, Critic, Generator, spectral_norm
from ..objectives.adversarial import Adversarial
from ..objectives.schedules import Linear
from ..programs import isolated, keyed_rng
from ..training.fit import Training
from ..training.optim import Adam

__all__ = ["GAN"]


SCALES = 0.1, 10.0
"""Root mean squares of data between which a linear generator, whose first draws are of order one, is at home."""
BATCH = 128
"""Data a step, unless told otherwise, down to a multiple of the pack."""


class GAN(GenerativeModel):
    r"""Generator and critic, trained against each other.

    ``fit(x)`` plays `pgen.objectives.Adversarial`: unless told otherwise non-saturating with R1 that falls from .1 to .001, for
    10 000 steps of Adam (1e-3, betas .5 and .999) whose rate falls to zero; the model then holds the moving average of the
    parameters (``ema=0.99``). Each player may have an optimizer of its own, ``optimizer={"critic": ..., "generator": ...}``.

    Shapes: x ``(N, *event_shape)``, context ``(N, context_dim)``, z ``(N, latent_dim)``.

    Args:
        event_shape: Shape of one datum.
        latent_dim: Size of z.
        hidden: Of dense networks the sizes of the hidden layers; of images the number of channels at the full size, which
            doubles at each halving, or the channels at each size from the smallest on. None for the architecture's own.
        architecture: ``"dense"``, ``"dcgan"`` or ``"residual"`` (images ``(H, W)`` or ``(C, H, W)``).
        output: What the generator ends in: ``"linear"``, ``"tanh"`` (data in [-1, 1]) or ``"sigmoid"`` (data in [0, 1]).
        batch_norm: Whether the generator normalises over the batch; None for the architecture's own.
        spectral_norm: Whether the critic's weights have norm one (Miyato et al. 2018), in place where the critic is your own.
        pack: Data that the critic judges together: a pack of draws that are all alike gives itself away (PacGAN).
            ``batch_size`` is a multiple of it.
        context_dim: Size of the vector that both are conditioned on, which the critic projects (Miyato and Koyama 2018).
        generator: A module of your own in place of the architecture's: ``generator(z)``, with ``context_dim``
            ``generator(z, context)``, to ``(N, *event_shape)``.
        critic: The same: ``critic(x)`` or ``critic(x, context)`` to ``(N / pack,)`` or ``(N / pack, 1)``; a pack comes side by
            side along the first axis of a datum, ``(N / pack, pack * n, ...)``.
        preprocess: Invertible preprocessing of x.
        seed: Keys the initial weights.

    Example:
        >>> gan = GAN((8, 8), latent_dim=16, architecture="dcgan", output="tanh")
        >>> gan.sample(2).shape
        torch.Size([2, 8, 8])
    """

    family = "gan"
    has_density = has_posterior = False
    refuses_one_context = True
    default_steps = 10_000

    def __init__(
        self,
        event_shape: Sequence[int],
        latent_dim: int = 16,
        hidden: int | Sequence[int] | None = None,
        *,
        architecture: str = "dense",
        output: str = "linear",
        batch_norm: bool | None = None,
        spectral_norm: bool = False,
        pack: int = 1,
        context_dim: int = 0,
        generator: nn.Module | None = None,
        critic: nn.Module | None = None,
        preprocess: Transform | None = None,
        seed: Seed = 0,
    ) -> None:
        super().__init__(event_shape, preprocess=preprocess, context_dim=context_dim)
        check_positive("latent_dim", latent_dim)
        check_positive("pack", pack)
        check_choice("architecture", architecture, tuple(ARCHITECTURES))
        check_choice("output", output, tuple(OUTPUTS))
        kind = ARCHITECTURES[architecture]
        self.latent_dim, self.architecture, self.output, self.pack = latent_dim, architecture, output, int(pack)
        self.hidden = kind.hidden if hidden is None else as_sizes("hidden", hidden, least=1)
        self.batch_norm = kind.batch_norm if batch_norm is None else batch_norm
        self.spectral_norm, self.own = spectral_norm, generator is not None or critic is not None
        _check_own({"generator": generator, "critic": critic}, architecture, output, hidden, batch_norm)
        with self.initial_weights(seed):
            self.generator = self._generator() if generator is None else generator
            self.critic = self._critic(critic)

    def _generator(self) -> nn.Module:
        make = ARCHITECTURES[self.architecture].generator
        body = make(self.latent_dim + self.context_dim, self.event_shape, self.hidden, self.batch_norm)
        return Generator(body, self.event_shape, self.output)

    def _critic(self, critic: nn.Module | None) -> nn.Module:
        if critic is None:
            features = ARCHITECTURES[self.architecture].critic(self.event_shape, self.pack, self.hidden)
            critic = Critic(*features, self.context_dim * self.pack)
        return spectral_norm(critic) if self.spectral_norm else critic

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        names = ("latent_dim", "architecture", "output", "batch_norm", "spectral_norm", "pack", "context_dim")
        plain = {n: getattr(self, n) for n in names}
        return {"event_shape": list(self.event_shape), "hidden": list(self.hidden), **plain}

    @classmethod
    def suggest(cls, x: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        """Tables are standardised; images in [0, 1] or [-1, 1] end in a sigmoid or a tanh, with convolutions where they fit."""
        if x.dim() == 2:
            return {"preprocess": Standardize()}
        low, high = float(x.min()), float(x.max())
        found: dict[str, Any] = {"output": "sigmoid"} if low >= 0 and high <= 1 else {"output": "tanh"}
        found = found if low >= -1 and high <= 1 else {"preprocess": Standardize()}
        fits = x.dim() <= 4 and all(side % 2 == 0 and side >= 8 for side in x.shape[-2:])
        return found | ({"architecture": "dcgan"} if fits else {})

    # -- the two programs ---------------------------------------------------------------------------------------------

    def model(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """x = G(z, c), as many as there are rows in ``x`` or ``context``; it looks at no value of x."""
        zero = self._reference().new_zeros(self.latent_dim)
        with self.plate(x, context):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            made = self.generator(z, *self._given(context))
            return pyro.sample("x", dist.Delta(made, event_dim=len(self.event_shape)))

    def made(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """What ``model`` returns, of the same random numbers, in plain torch."""
        like = self._reference()
        size = len(x) if x is not None else len(cast(Tensor, context))
        z = torch.randn(size, self.latent_dim, dtype=like.dtype, device=like.device)
        return self.generator(z, *self._given(context))

    def loss(self, objective: Any, batch: Batch, scalars: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one batch. Pyro's handlers are left out, but for networks of your own, which may need them."""
        if self.own:
            return super().loss(objective, batch, scalars)
        return objective(self.made, self.guide, self.prepare(batch), scalars)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """The critic's number for each pack of ``pack`` data in a row, ``(N / pack,)``; the first fill up the last pack."""
        assert x is not None
        x, *contexts = (self._packed(t) for t in (x, *self._given(context)))
        return self.critic(x, *contexts).reshape(-1)

    def whole_packs(self, count: int) -> bool:
        """Whether as many data are packs that the critic judges each by itself, so that others may stand in the same batch."""
        return not self.own and not self.spectral_norm and count % self.pack == 0

    def _reference(self) -> Tensor:
        """A tensor of the generator's type and device; of the critic's where the generator has no parameters."""
        return next(self.generator.parameters(), next(self.parameters()))

    def _given(self, context: Tensor | None) -> list[Tensor]:
        return [] if context is None else [context]

    def _packed(self, t: Tensor) -> Tensor:
        """Packs side by side along the first axis of a datum."""
        if self.pack == 1:
            return t
        if len(t) % self.pack:
            t = t[torch.arange(-(-len(t) // self.pack) * self.pack, device=t.device) % len(t)]
        return t.reshape(-1, self.pack * t.shape[1], *t.shape[2:])

    # -- fitting ------------------------------------------------------------------------------------------------------

    def default_objective(self) -> Adversarial:
        """The non-saturating game; R1 keeps it from turning in circles at first, and lets the critic be sharp at last."""
        return Adversarial(r1=Linear(0.1, 0.001))

    def _default_optimizer(self, settings: Training) -> tuple[Adam, Training]:
        if settings.stop == "converged" or settings.average is not None:
            return Adam(1e-3, betas=(0.5, 0.999)), settings  # the loop says why a game cannot have them
        rate, ema = settings.schedule or "linear", settings.ema or 0.99
        return Adam(1e-3, betas=(0.5, 0.999)), replace(settings, schedule=rate, ema=ema)

    def _default_batch(self, num_data: int) -> int:
        return max(min(BATCH, num_data) // self.pack, 1) * self.pack

    def _begun(self, objective: Any, *args: Any) -> Any:
        if not hasattr(objective, "players"):
            what = type(objective).__name__
            raise ValueError(f"`objective` of a GAN should be a game such as Adversarial(), got {what}, which needs a density")
        return super()._begun(objective, *args)

    def _strict(self, batch: Batch, num_data: int, whole: Batch | None = None) -> None:
        """Both networks fit the data, and a batch is one that they can learn from."""
        batch = cast(dict[str, Any], batch)
        rows, shape = len(batch["x"]), tuple(batch["x"].shape)
        if rows % self.pack:
            raise ValueError(f"`batch_size` should be a multiple of pack={self.pack}, got {rows}")
        if rows == 1:
            what = "batch normalisation over" if self._normalises() else "the spread of draws in"
            more = "give more than one datum" if num_data == 1 else "give `batch_size` 2 or more"
            raise ValueError(f"{what} a batch of one leaves nothing: {more}")
        self._check_scale(batch["x"] if whole is None else cast(dict[str, Any], whole)["x"])
        given = self._given(batch.get("context"))
        with _told("generator", f"z of shape ({rows}, {self.latent_dim})", given):
            made = self.model(**batch)
        if tuple(made.shape) != shape:
            raise ValueError(f"the generator should make data of shape {shape[1:]}, got {tuple(made.shape[1:])}")
        packs = [self._packed(t) for t in (made, *given)]
        with _told("critic", f"x of shape {tuple(packs[0].shape)}", packs[1:]):
            numbers = self.critic(*packs)
        if numbers.numel() != rows // self.pack:
            raise ValueError(
                f"the critic should give one number a pack, {rows // self.pack} for {rows} data, got {tuple(numbers.shape)}"
            )

    def _normalises(self) -> bool:
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())

    def _check_support(self, batch: Batch, numbers: Tensor | None = None) -> Callable[[Batch, Tensor], None] | None:
        """Data must lie where the generator can reach them."""
        self._check_range(batch)
        return None if numbers is None else lambda rows, _: self._check_range(rows)

    def _check_scale(self, x: Tensor) -> None:
        """Warn of units that a linear generator reaches late or never."""
        linear = isinstance(self.generator, Generator) and isinstance(self.generator.output, nn.Identity)
        size = float(x.double().square().mean().sqrt())
        if not linear or self.preprocess is not None or SCALES[0] <= size <= SCALES[1]:
            return
        warnings.warn(
            f"x lies in [{float(x.min()):.3g}, {float(x.max()):.3g}], and a generator's draws begin at order one: take "
            "preprocess=Standardize(), or scale the data",
            stacklevel=2,
        )

    def _check_range(self, batch: Batch) -> None:
        made = self.generator
        last = made.output if isinstance(made, Generator) else made[-1] if isinstance(made, nn.Sequential) else None
        if not isinstance(last, (nn.Tanh, nn.Sigmoid)):
            return
        x = cast(dict[str, Any], self.prepare(batch))["x"]
        low, high, tanh = float(x.min()), float(x.max()), isinstance(last, nn.Tanh)
        bottom, reach = (-1 if tanh else 0), f"{'tanh' if tanh else 'sigmoid'}, which reaches no further than"
        if low < bottom or high > 1:
            cure = "x / 127.5 - 1" if tanh else "x / 255"
            raise ValueError(
                f"x lies in [{low:.3g}, {high:.3g}], but the generator ends in {reach} [{bottom}, 1]: scale the data (levels "
                f"up to 255: {cure}), or take output='linear' with preprocess=Standardize()"
            )

    # -- questions ----------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """G(z, c) in the units of the data, ``(N, *event_shape)``, at latents ``(N, latent_dim)``."""
        with torch.no_grad(), _evaluating(self):
            made = self.generator(z, *self._given(context))
            return made if self.preprocess is None else self.preprocess.inverse(made)

    def criticise(self, x: Any, context: Any = None) -> Tensor:
        """The critic's number for each pack of ``pack`` data in a row, ``(N / pack,)``."""
        batch = self._batch("x", x, context)
        with torch.no_grad(), _evaluating(self):
            return self.guide(**cast(dict[str, Any], self.prepare(batch)))

    def noisy_log_prob(
        self,
        x: Any,
        context: Any = None,
        *,
        scale: float,
        seed: Seed = 0,
        compile: str = "auto",
        progress: bool = True,
        **options: Any,
    ) -> Score:
        r"""Log-density of *another* model, the generator's draws blurred: :math:`\int p(z)\, N(x; G(z), s^2 I)\, dz`.

        By annealed importance sampling, a lower bound in expectation. It is no density of the GAN, which has none: the answer
        follows the scale s that was chosen, a generator that remembers its training data scores well, and one whose images are
        sharp but a pixel to the side scores worse than a blurred mean. Compare it between generators under one s, not with
        families that have a ``log_prob``.

        Args:
            x: Data, shape ``(N, *event_shape)``.
            context: Context of each datum.
            scale: Standard deviation s of the blur, in the units of the generator's output (preprocessed data).
            seed: Keys the chains.
            compile: The tier, as in ``VAE.log_prob``.
            progress: Whether to show a bar on what takes more than two seconds.
            **options: Fields of ``pgen.evaluation.AIS``: ``num_temps``, ``num_chains``, ``leapfrog``...

        Returns:
            A Score of kind ``lower_bound``, of the blurred model, in nats and in the units of the data. It says so when it is
            printed, and ``pgen.compare`` refuses it beside scores of other laws.

        References:
            Wu, Burda, Salakhutdinov and Grosse (2017), arXiv:1611.04273, section 3; Theis, van den Oord and Bethge (2016), A
            note on the evaluation of generative models, arXiv:1511.01844.
        """
        check_positive("scale", scale, integer=False)
        settings = cast(AIS, AIS.of("ais", options))
        batch = self._batch("x", x, context)

        def blurred(x: Tensor | None = None, context: Tensor | None = None) -> None:
            zero = self._reference().new_zeros(self.latent_dim)
            with self.plate(x, context):
                z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
                made = self.generator(z, *self._given(context))
                pyro.sample("x", dist.Normal(made, scale).to_event(len(self.event_shape)), obs=x)

        asked = self._asked(seed, compile, progress)
        with isolated(self.home), _evaluating(self), torch.no_grad():
            with keyed_rng(key(asked["seed"], "noisy_log_prob"), batch["x"].device):  # preprocessing may draw
                prepared, change = self._prepared(batch)
            found = anneal(blurred, lambda **_: None, prepared, settings, **asked)
        value, measure = found.value + (0.0 if change is None else change.double()), self._measure(batch)
        note = f"of draws blurred by s = {scale:g}, not of the GAN"
        return Score(value, "lower_bound", self._event_size(batch), found.error, settings.num_chains, measure, note)

    def _measure(self, batch: Batch) -> Measure:
        """Of blurred draws: a density, but of the whole numbers that preprocessing blurs as well, a mass."""
        return "mass" if self.preprocess is not None and self.preprocess.kind == "lower_bound" else "density"

    def _check_savable(self) -> None:
        if self.own:
            raise ValueError(
                "a file cannot rebuild networks of your own: save their tensors, safetensors.torch.save_model(gan, path), and "
                "load them into a GAN that you make in the same way"
            )

    def _refuse(self, question: str, instead: str) -> NoReturn:
        raise NotAvailable(f"a GAN has no {question}: its draws come without a density or an encoder; {instead}")

    def log_prob(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: the draws have no density."""
        self._refuse(
            "log_prob",
            "pgen.models.Flow, VAE, Gaussian, MADE and others have one; noisy_log_prob(x, scale=...) is that of blurred draws",
        )

    def bdmc(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no likelihood to bound."""
        self._refuse("likelihood to bound", "pgen.models.VAE has one")

    def likelihood_regret(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no likelihood."""
        self._refuse("likelihood", "pgen.models.VAE has one")

    def draw(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no posterior."""
        self._refuse("posterior", "pgen.models.VAE has one")

    def posterior(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no posterior."""
        self._refuse("posterior", "pgen.models.VAE has one")

    def predict(
        self, data: Any, num_samples: int = 100, seed: Seed = 0, context: Any = None, *, compile: str = "auto",
        progress: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Draws of x, given the context of each datum where there is one: ``{"x": (S, N, *event_shape)}``."""
        return self._generated(data, num_samples, seed, context, compile=compile, progress=progress)

    def encode(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no encoder."""
        self._refuse("encoder", "pgen.models.VAE has one")

    def reconstruct(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not available: there is no encoder."""
        self._refuse("encoder", "pgen.models.VAE has one")


def _check_own(
    networks: dict[str, Any], architecture: str, output: str, hidden: int | Sequence[int] | None, batch_norm: bool | None
) -> None:
    """Networks of one's own are modules, with parameters, and leave nothing for the options of what they stand in for."""
    for name, own in networks.items():
        if own is not None and not isinstance(own, nn.Module):
            hint = "; `architecture` names one of pgen's" if isinstance(own, str) else ""
            what = repr(own) if isinstance(own, str) else f"a {type(own).__name__}"
            raise TypeError(f"`{name}` should be a torch.nn.Module, got {what}{hint}")
    generator, critic = networks.values()
    moot = {"output": output != "linear", "batch_norm": batch_norm is not None} if generator is not None else {}
    if generator is not None and critic is not None:
        moot |= {"architecture": architecture != "dense", "hidden": hidden is not None}
        if not any(True for own in (generator, critic) for _ in own.parameters()):
            raise ValueError("neither `generator` nor `critic` has parameters, so there is nothing to fit")
    for name in (name for name, given in moot.items() if given):
        raise ValueError(f"`{name}` does not go with networks of your own, which settle it themselves: leave it out")


@contextmanager
def _told(name: str, given: str, contexts: list[Tensor]) -> Iterator[None]:
    """Where a network does not take what it is given, say which, and what that was, in a line."""
    try:
        yield
    except (RuntimeError, TypeError, IndexError) as error:
        beside = f" and a context of shape {tuple(contexts[0].shape)}" if contexts else ""
        raise ValueError(f"the {name} should take {given}{beside}: {' '.join(str(error).split())[:200]}") from error
