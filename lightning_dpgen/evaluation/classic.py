"""scikit-learn's classifiers on pixels: ten of the twelve that GS-WGAN reports, at cheaper settings, so that averages do not compare."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier, GradientBoostingClassifier, RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from lightning_dpgen.evaluation.tstr import TSTRTable

log = logging.getLogger(__name__)

CLASSIC_PROTOCOL = "classic"
CLASSIC: dict[str, Callable[[int], Any]] = {
    "LogisticRegression": lambda seed: LogisticRegression(max_iter=200, random_state=seed),
    "RandomForest": lambda seed: RandomForestClassifier(n_estimators=100, random_state=seed),
    "GaussianNB": lambda seed: GaussianNB(),
    "LinearSVC": lambda seed: LinearSVC(max_iter=300, tol=1e-3, random_state=seed),
    "DecisionTree": lambda seed: DecisionTreeClassifier(max_depth=10, random_state=seed),
    "LDA": lambda seed: LinearDiscriminantAnalysis(),
    "AdaBoost": lambda seed: AdaBoostClassifier(n_estimators=50, random_state=seed),
    "Bagging": lambda seed: BaggingClassifier(max_samples=0.1, n_estimators=20, random_state=seed),
    "GradientBoosting": lambda seed: GradientBoostingClassifier(subsample=0.1, n_estimators=50, max_features="sqrt", random_state=seed),
    "MLPClassifier": lambda seed: MLPClassifier(max_iter=30, random_state=seed),
}
"""By name, called with a seed."""


def classic(
    synthetic: tuple[Tensor, Tensor],
    real_test: tuple[Tensor, Tensor],
    num_classes: int,
    seeds: Sequence[int] = (0,),
    classifiers: Sequence[str] | None = None,
    show_progress: bool = True,
) -> TSTRTable:
    """Trains scikit-learn's classifiers on synthetic pixels and tests them on real ones.

    Args:
        synthetic: Images ``[N, C, H, W]`` in [0, 1] and labels ``[N]``.
        real_test: Likewise, real test records.
        num_classes: Number of classes.
        seeds: One training for each.
        classifiers: Names in :data:`CLASSIC`; all if not given.
        show_progress: Whether to show a progress bar.

    Privacy:
        Reads real test records: evaluation, outside the guarantee.

    Raises:
        ValueError: For an unknown classifier, or images of different shapes. With too few images LDA is left out, and said so.
    """
    names = list(classifiers or CLASSIC)
    unknown = sorted(set(names) - set(CLASSIC))
    if unknown:
        raise ValueError(f"there is no classifier {', '.join(unknown)}; there are {', '.join(CLASSIC)}.")
    if synthetic[0].shape[1:] != real_test[0].shape[1:]:
        raise ValueError(f"synthetic images are {tuple(synthetic[0].shape[1:])}, real ones {tuple(real_test[0].shape[1:])}.")
    if len(synthetic[0]) <= num_classes and "LDA" in names:
        log.warning("LDA needs more images than classes, and there are %d: it is left out.", len(synthetic[0]))
        names.remove("LDA")
    images, labels = _arrays(synthetic)
    test_images, test_labels = _arrays(real_test)
    table = TSTRTable(CLASSIC_PROTOCOL, len(images))
    for name in track(names, "Classifiers", transient=True, disable=not show_progress):
        table.accuracy[name], by_class = [], []
        for seed in seeds:
            model = CLASSIC[name](seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                warnings.simplefilter("ignore", UserWarning)  # LDA's of collinear pixels
                model.fit(images, labels)
            right = model.predict(test_images) == test_labels
            table.accuracy[name].append(float(right.mean() * 100))
            by_class.append([_percent(right[test_labels == label]) for label in range(num_classes)])
        table.per_class[name] = [statistics.fmean(values) for values in zip(*by_class, strict=True)]
    return table


def _arrays(records: tuple[Tensor, Tensor]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return records[0].flatten(1).numpy(), records[1].numpy()


def _percent(right: NDArray[np.bool_]) -> float:
    return float(right.mean() * 100) if len(right) else 0.0
