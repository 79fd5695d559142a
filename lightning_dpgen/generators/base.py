"""What every private generator is to the rest of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_dpgen._compat import pl
from lightning_dpgen.privacy.mechanism import GaussianMechanism
from lightning_dpgen.strategies.loaders import look_at_records
from lightning_dpgen.strategies.private import PrivateTraining

USERS_START = "images or parameters given by the user; what they cost, if they are of private records, is not covered by this claim"


class PrivateGenerator(pl.LightningModule):
    """A LightningModule that learns to generate labelled images under differential privacy.

    A subclass fills in :meth:`build`, :meth:`sample` and ``training_step``. One that makes its own releases states them in
    ``configure_privacy(records, steps, batch_size) -> PrivacyPlan``: N, the number of trainer steps and the loader's batch size.
    Without it the strategy does DP-SGD on what the attribute ``private_modules`` names.

    Args:
        num_classes: Number of classes; taken from the data module's declaration if not given.
        image_shape: ``(C, H, W)``; likewise.

    Attributes:
        mechanism: The one way out for what is computed from records; set by the strategy before ``on_fit_start`` in modules with
            ``configure_privacy``.
        prior: Public images ``[N, C, H, W]`` and labels ``[N]`` that a fit is to start from; set by the callback ``Prior``.
        started_from: What they are, in words for the certificate; ``None`` for a random start.

    Privacy:
        ``num_classes`` and ``image_shape`` are declared by a person, never read from the records. What a subclass saves with
        ``save_hyperparameters`` is published in its releases.
    """

    mechanism: GaussianMechanism
    prior: tuple[Tensor, Tensor] | None = None
    started_from: str | None = None

    def __init__(self, num_classes: int | None = None, image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes or 0
        self.image_shape = (0, 0, 0) if image_shape is None else (image_shape[0], image_shape[1], image_shape[2])

    @property
    def is_built(self) -> bool:
        """Whether classes and shape are known and the parameters exist."""
        return self.num_classes > 0 and self.image_shape[0] > 0

    def build(self) -> None:
        """Creates the parameters from ``num_classes`` and ``image_shape``."""
        raise NotImplementedError

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Synthetic images for ``labels``.

        Args:
            labels: Class indices ``[N]``.
            generator: Source of randomness, for generators that have any.

        Returns:
            ``[N, C, H, W]`` in [0, 1].

        Privacy:
            Post-processing of what was released.
        """
        raise NotImplementedError

    def release_labels(self) -> Tensor:
        """The labels ``[N]`` of the set that a release publishes: 1,000 a class, unless a subclass says otherwise."""
        return torch.arange(self.num_classes).repeat_interleave(1000)

    def public_state(self) -> dict[str, Tensor]:
        """The parameters and buffers that may be published."""
        raise NotImplementedError

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`public_state`: what a release's generator is restored from. A fit that follows says so."""
        self.started_from = USERS_START
        vars(self)["fit_mark"] = None
        self.take_public_state(state)

    def take_public_state(self, state: dict[str, Tensor]) -> None:
        """What :meth:`load_public_state` does."""
        raise NotImplementedError

    def start_from(self, images: Tensor, labels: Tensor) -> None:
        """Starts from public images, before the first release, in place of a random start; once the parameters exist.

        Args:
            images: ``[N, C, H, W]`` in [0, 1].
            labels: ``[N]``.

        Privacy:
            The images must be public: a release's, whose cost the callback ``Prior`` sees counted, or of other records. The
            certificate says that it does not cover what they cost.

        Raises:
            ValueError: If this generator cannot.
        """
        if self.images_to_start_from() is None:
            raise ValueError(f"{type(self).__name__} as it is set up here cannot start from images.")
        self.started_from = USERS_START
        self.take_start(images, labels)

    def take_start(self, images: Tensor, labels: Tensor) -> None:
        """What :meth:`start_from` does."""
        raise NotImplementedError

    def images_to_start_from(self) -> int | None:
        """How many images of each class :meth:`start_from` needs at least; ``None`` if this generator cannot start from images."""
        return None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the checkpoint says of its weights until :meth:`load_state_dict` has them."""
        vars(self)["_coming"] = checkpoint["state_dict"], checkpoint.get("privacy")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in torch. The weights then belong to the fit and the ledger that their checkpoint names, and no other trainer certifies them.

        Raises:
            RuntimeError: If they do not fit; the module may then hold a part of them, and is neither certified nor trained on.
        """
        of, privacy = vars(self).pop("_coming", (None, None))
        vars(self)["fit_mark"] = None
        try:
            keys = super().load_state_dict(state_dict, strict, assign)
        except RuntimeError:
            vars(self)["trained_under"] = "unknown (a checkpoint was loaded in part)"
            raise
        if of is state_dict and privacy is not None:
            mine = {"fit_mark": privacy.get("fit_mark"), "is_mid_fit": not privacy.get("ended", False)}
            vars(self).update(trained_under=privacy["run"], **mine)
            self.started_from = privacy.get("started_from")
        return keys

    def check_all_labels(self) -> None:
        """Reads every record once, before the first lot.

        Privacy:
            A label out of range would break the run off in the first lot that holds its record, at a moment that tells of it.

        Raises:
            ValueError: If a label is none of the classes.
        """
        transfer = self.trainer.strategy.batch_to_device
        loader: Any = self.trainer.train_dataloader
        look_at_records(loader, lambda batch: check_labels(transfer(batch)[1], self.num_classes), chunk=256)

    def knobs(self) -> dict[str, dict[str, Any]]:
        """Every setting that shaped the result, with where its value came from: ``{name: {"value": …, "origin": …}}``."""
        return {}

    def setup(self, stage: str) -> None:
        """Checks the strategy, takes classes and shape from the data module, builds the parameters.

        Raises:
            ValueError: If the strategy is not private, or classes and shape are not known or contradict the data.
        """
        if stage == "fit" and not isinstance(self.trainer.strategy, PrivateTraining):
            raise ValueError(
                f"{type(self).__name__} trains on private records and needs the private strategy; the Trainer has "
                f"{type(self.trainer.strategy).__name__}. Add this argument:\n\n"
                "    Trainer(strategy=lightning_dpgen.DPStrategy(epsilon=10, delta=1e-5), …)\n"
            )
        data = getattr(self.trainer, "datamodule", None)
        declared = (getattr(data, "num_classes", None), getattr(data, "image_shape", None))
        if not self.is_built:
            classes, shape = self.num_classes or declared[0], declared[1] if self.image_shape[0] == 0 else self.image_shape
            if not classes or shape is None:
                raise ValueError(
                    f"{type(self).__name__} does not know its classes and image shape: use one of lightning_dpgen.data's data modules, "
                    "or give num_classes=… and image_shape=(C, H, W)."
                )
            self.num_classes, self.image_shape = int(classes), (int(shape[0]), int(shape[1]), int(shape[2]))
            self._hparams.update(num_classes=self.num_classes, image_shape=self.image_shape)
            self.build()
        for name, mine, theirs in zip(("num_classes", "image_shape"), (self.num_classes, self.image_shape), declared, strict=True):
            if theirs is not None and mine != (tuple(theirs) if isinstance(theirs, (tuple, list)) else theirs):
                raise ValueError(f"{type(self).__name__} has {name}={mine}, the data module declares {theirs}. Make them equal.")
        if stage == "fit" and self.prior is not None:
            self._check_prior(*self.prior)

    def _check_prior(self, images: Tensor, labels: Tensor) -> None:
        needed, name = self.images_to_start_from(), type(self).__name__
        if needed is None:
            raise ValueError(f"{name} cannot start from images: leave the prior out.")
        found = torch.bincount(labels, minlength=self.num_classes).tolist()
        if tuple(images.shape[1:]) != self.image_shape or len(found) > self.num_classes or min(found) < needed:
            raise ValueError(
                f"the images to start from are {tuple(images.shape[1:])}, {found} of the classes; {name} needs {self.image_shape}, "
                f"{needed} or more of each of its {self.num_classes} classes."
            )


class AveragedGenerator(PrivateGenerator):
    """A generator network ``(latent, labels) -> images`` whose published weights are the average over its steps.

    A subclass's ``build`` sets ``generator`` and ``average``, a copy of it; :meth:`latents` draws what the network starts from.
    """

    generator: nn.Module
    average: nn.Module

    def latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``[count, latent numbers]``, where the network is."""
        raise NotImplementedError

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Moves the average towards the weights as they are now."""
        for mean, now in zip(self.average.state_dict().values(), self.generator.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - decay)
            else:
                mean.copy_(now)

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of the averaged generator, a latent of its own for each label."""
        latent = self.latents(len(labels), generator)
        self.average.eval()
        with torch.no_grad():
            parts = zip(latent.split(1000), labels.to(latent.device).split(1000), strict=True)
            return torch.cat([self.average(z, y) for z, y in parts]).float().clamp(0, 1)

    def public_state(self) -> dict[str, Tensor]:
        """The averaged generator, and nothing else."""
        return dict(self.average.state_dict())

    def take_public_state(self, state: dict[str, Tensor]) -> None:
        """What :meth:`load_public_state` does."""
        self.average.load_state_dict(state)
        self.generator.load_state_dict(state)


@contextmanager
def looking_at(generator: PrivateGenerator) -> Iterator[None]:
    """Around sampling: no gradient is kept, and mode flags and the public random state are as before afterwards."""
    modes = [(child, child.training) for child in generator.modules()]
    with torch.random.fork_rng(), torch.no_grad():
        try:
            yield
        finally:
            for child, training in modes:
                child.training = training


def as_generator(module: pl.LightningModule, user: object) -> PrivateGenerator:
    """``module`` if it is a generator.

    Raises:
        ValueError: If it is not; names the callback that needs one.
    """
    if not isinstance(module, PrivateGenerator):
        raise ValueError(f"{type(user).__name__} needs a PrivateGenerator; {type(module).__name__} is not one. Remove the callback.")
    return module


def check_batch(images: Tensor, labels: Tensor, num_classes: int, image_shape: tuple[int, int, int]) -> None:
    """Raises, for the owner and before training, unless images are floats in [0, 1] of the declared shape and labels are classes."""
    if images.shape[1:] != torch.Size(image_shape) or labels.shape != images.shape[:1]:
        found = f"images {tuple(images.shape)} and labels {tuple(labels.shape)}"
        raise ValueError(f"the loader gives {found}; declared are images {image_shape}, and each has one label.")
    if len(images) == 0:
        return
    if not images.is_floating_point() or labels.is_floating_point():
        raise ValueError(f"images are {images.dtype} and labels {labels.dtype}: give images as floats in [0, 1] and whole-number labels.")
    if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
        raise ValueError("images must be finite and in [0, 1]. Divide by their public maximum (255 for bytes), not by one of the records.")
    check_labels(labels, num_classes)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises, for the owner and before training, unless labels are classes."""
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        raise ValueError(f"labels must run from 0 to {num_classes - 1} for the {num_classes} declared classes; some do not.")


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Images ``[N, C, H, W]`` in [0, 1] as uint8 ``[N, H, W]`` (one channel) or ``[N, H, W, C]``."""
    pixels = (images * 255).round().to(torch.uint8)
    array: NDArray[np.uint8] = (pixels[:, 0] if pixels.shape[1] == 1 else pixels.permute(0, 2, 3, 1)).numpy()
    return array
