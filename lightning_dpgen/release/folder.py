"""The folder that may be published: written here, read back here."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_dpgen._compat import pl
from lightning_dpgen.data.base import ImageRecords
from lightning_dpgen.generators.base import PrivateGenerator, looking_at, to_bytes
from lightning_dpgen.release.card import make_card
from lightning_dpgen.release.certificate import make_certificate
from lightning_dpgen.release.preview import first_of_each_class, save_grid

IMAGES, GENERATOR, CERTIFICATE, CARD, PREVIEW = "images.npz", "generator.safetensors", "privacy.json", "README.md", "preview.png"


@dataclass(frozen=True)
class SanitizedRelease:
    """Synthetic images with the certificate of the privacy that they cost.

    Args:
        images: uint8 ``[N, H, W]`` or ``[N, H, W, C]``.
        labels: int64 ``[N]``.
        certificate: As in ``privacy.json``.
        parameters: The generator's public parameters.

    Privacy:
        Everything in it is post-processing of what passed ``mechanism.release``, or a public constant.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    certificate: dict[str, Any]
    parameters: dict[str, Tensor]

    def __repr__(self) -> str:
        """One line; the certificate and the arrays are long."""
        generator = self.certificate["generator"]["class"]
        return f"SanitizedRelease({len(self.images)} images of {len(self.class_names)} classes by {generator}, epsilon={self.epsilon:.4f})"

    @classmethod
    def from_trainer(cls, trainer: pl.Trainer, labels: Tensor | None = None) -> SanitizedRelease:
        """The release of a finished run.

        Args:
            trainer: A trainer whose ``fit`` of a generator under ``DPStrategy`` has ended.
            labels: Which labels to sample ``[N]``, chosen without a look at the records; the generator's own choice if not given.

        Raises:
            NotCertifiable: If no (ε, δ) can be claimed for the run.
        """
        certificate = make_certificate(trainer, 0)
        generator = trainer.lightning_module
        assert isinstance(generator, PrivateGenerator)
        labels = generator.release_labels() if labels is None else labels
        with looking_at(generator):
            images = generator.sample(labels.to(generator.device)).cpu()
        certificate["images"] = len(labels)
        parameters = {name: value.detach().cpu().clone().contiguous() for name, value in generator.public_state().items()}
        return cls(to_bytes(images), labels.cpu().numpy().astype(np.int64), certificate, parameters)

    @property
    def epsilon(self) -> float:
        """The claimed ε."""
        return float(self.certificate["claim"]["epsilon"])

    @property
    def class_names(self) -> list[str]:
        """A name for each label."""
        return list(self.certificate["published_without_noise"]["classes"])

    def dataset(self) -> ImageRecords:
        """The images as a torch data set of ``([C, H, W] in [0, 1], label)``."""
        images = torch.from_numpy(self.images)
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return ImageRecords(images.contiguous(), torch.from_numpy(self.labels))

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Writes the folder, whole or not at all.

        Args:
            path: The folder.
            overwrite: Whether an earlier release there is replaced. Anything else there is never touched.

        Raises:
            FileExistsError: If something is there that may not be replaced.
        """
        target = check_target(path, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            folder = Path(temporary) / "release"
            folder.mkdir()
            self._write(folder)
            check_target(path, overwrite)
            if target.exists():  # set aside, and gone with the temporary folder once the new one is in its place
                os.replace(target, Path(temporary) / "earlier")
            os.replace(folder, target)
        return target

    def _write(self, folder: Path) -> None:
        np.savez_compressed(folder / IMAGES, images=self.images, labels=self.labels)
        save_file(self.parameters, folder / GENERATOR)
        (folder / GENERATOR).chmod((folder / IMAGES).stat().st_mode)  # safetensors makes files that their owner alone may read
        (folder / CARD).write_text(make_card(self.certificate), encoding="utf-8")
        images, labels = self.dataset().tensors()
        per_class = min(10, int(torch.bincount(labels).max()))
        save_grid(images[first_of_each_class(labels, per_class)], folder / PREVIEW, columns=per_class)
        files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
        text = json.dumps({**self.certificate, "files": files}, indent=2, ensure_ascii=False)
        (folder / CERTIFICATE).write_text(text + "\n", encoding="utf-8")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_target(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder to write to, if it may be written.

    Raises:
        FileExistsError: If something is there that may not be replaced.
    """
    target = Path(path)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    if not (target.is_dir() and (target / CERTIFICATE).exists()):
        raise FileExistsError(f"{target} exists and is not a release; it is left as it is. Give another path.")
    if not overwrite:
        raise FileExistsError(f"{target} holds an earlier release. Give another path, or overwrite=True to replace it.")
    others = sorted({entry.name for entry in target.iterdir()} - {IMAGES, GENERATOR, CERTIFICATE, CARD, PREVIEW})
    if others:
        raise FileExistsError(f"{target} holds {', '.join(others[:4])} beside an earlier release; it is left as it is. Give another path.")
    return target


def load_release(path: str | os.PathLike[str]) -> SanitizedRelease:
    """Reads a release folder after verifying it.

    Args:
        path: The folder.

    Raises:
        InvalidRelease: If a file is missing, edited or unlisted, or the certificate does not hold.
    """
    from lightning_dpgen.release.verify import verify_release

    certificate = verify_release(path)
    with np.load(Path(path) / IMAGES, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    return SanitizedRelease(images, labels, certificate, load_file(Path(path) / GENERATOR))
