"""How synthetic images look beside real ones: Fréchet distance, Inception score, precision and recall in learned features.

The features are a small network's that was trained on real records of the same kind: Inception knows photographs, not digits.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from lightning_dpgen._validate import fail
from lightning_dpgen.nn.classifiers import CNN, ImageShape


class FeatureNetwork(nn.Module):
    """The CNN of protocol ``common`` with 64 features before its head.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``, at least 8 × 8.
    """

    num_features = 64

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self.body = CNN(self.num_features, image_shape)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] to features ``[N, 64]``."""
        return F.relu(self.body(images))

    def logits(self, images: Tensor) -> Tensor:
        """Images to ``[N, num_classes]``."""
        found: Tensor = self.head(self(images))
        return found


def train_feature_network(
    images: Tensor, labels: Tensor, num_classes: int, updates: int = 1500, seed: int = 0, show_progress: bool = True
) -> FeatureNetwork:
    """Trains the network on real records, for evaluation alone.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        labels: ``[N]``.
        num_classes: Number of classes.
        updates: Steps of Adam (1e-3) on 128 images.
        seed: Of weights and batches; the global random state is as before afterwards.
        show_progress: Whether to show a progress bar.

    Privacy:
        Not private: train it on public records, or keep it as secret as they are. What it says of a release is evaluation.
    """
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        network = FeatureNetwork(num_classes, (images.shape[1], images.shape[2], images.shape[3])).to(images.device)
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in track(range(updates), "Feature network", transient=True, disable=not show_progress):
            index = torch.randint(len(images), (128,), device=images.device)
            optimizer.zero_grad()
            F.cross_entropy(network.logits(images[index]), labels[index]).backward()
            optimizer.step()
    return network.eval()


def save_feature_network(network: FeatureNetwork, path: str | Path) -> None:
    """Writes weights and shape as one safetensors file."""
    shape = ",".join(map(str, (network.num_classes, *network.image_shape)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, str(path), {"classes_and_shape": shape})


def load_feature_network(path: str | Path) -> FeatureNetwork:
    """The inverse of :func:`save_feature_network`.

    Raises:
        ValueError: If the file is not one.
    """
    try:
        with safe_open(str(path), "pt") as file:
            classes, *shape = map(int, (file.metadata() or {})["classes_and_shape"].split(","))
            network = FeatureNetwork(classes, (shape[0], shape[1], shape[2]))
            names = file.keys()
            network.load_state_dict({name: file.get_tensor(name) for name in names})
    except Exception as error:
        raise ValueError(
            f"{path} is no feature network ({type(error).__name__}: {error}). Write one with dpgen feature_network."
        ) from error
    return network.eval()


@torch.no_grad()
def fidelity(synthetic: Tensor, real: Tensor, network: FeatureNetwork, neighbours: int = 3, limit: int = 10_000) -> dict[str, float]:
    """Compares synthetic with real images in a network's features.

    Args:
        synthetic: ``[N, C, H, W]`` in [0, 1].
        real: Likewise; test records.
        network: Trained on records of this kind.
        neighbours: k of precision and recall.
        limit: Only so many of each are looked at, evenly spaced.

    Returns:
        ``fid`` (least is best), ``inception_score``, ``precision`` (the part of synthetic images within the real ones' reach),
        ``recall`` (the part of real images within the synthetic ones'). The Fréchet distance of few images is biased upwards.

    Privacy:
        Outside the guarantee: a function of real test records and, by the network, of the real training records that it was trained on.

    Raises:
        ValueError: For images of another shape than the network's, or too few.
    """
    device = next(network.parameters()).device
    chosen = []
    for name, images in (("synthetic images", synthetic), ("real images", real)):
        if tuple(images.shape[1:]) != network.image_shape:
            raise fail(name, tuple(images.shape[1:]), f"{network.image_shape} for this feature network")
        if len(images) <= neighbours:
            raise fail(f"the number of {name}", len(images), f"more than {neighbours}")
        chosen.append(images[torch.linspace(0, len(images) - 1, min(limit, len(images))).long()].to(device))
    features = [torch.cat([network(part) for part in images.split(500)]) for images in chosen]
    distance = FrechetInceptionDistance(_AsTheyAre(network.num_features)).to(device)
    for found, is_real in zip(features, (False, True), strict=True):
        distance.update(found, real=is_real)
    score = InceptionScore(_AsTheyAre(network.num_classes), splits=min(10, len(features[0]) // 10 or 1)).to(device)
    score.update(network.head(features[0]))
    precision, recall = precision_recall(features[0], features[1], neighbours)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the score shuffles the images before it splits them
        inception = float(score.compute()[0])
    return {"fid": float(distance.compute()), "inception_score": inception, "precision": precision, "recall": recall}


def precision_recall(synthetic: Tensor, real: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi, Karras, Laine, Lehtinen and Aila, NeurIPS 2019).

    Args:
        synthetic: Features ``[N, D]``.
        real: Features ``[M, D]``.
        neighbours: k: an image reaches as far as its k-th nearest neighbour of its own kind.

    Returns:
        The part of synthetic images in some real image's reach, and the part of real images in some synthetic image's.
    """
    return _reached(synthetic, real, neighbours), _reached(real, synthetic, neighbours)


def _reached(points: Tensor, centers: Tensor, neighbours: int) -> float:
    radii = torch.cat([torch.cdist(part, centers).kthvalue(neighbours + 1, dim=1).values for part in centers.split(500)])
    return float(torch.cat([(torch.cdist(part, centers) <= radii).any(1) for part in points.split(500)]).double().mean())


class _AsTheyAre(nn.Module):
    """In place of a network of torchmetrics' own: features and logits are made here, once."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
