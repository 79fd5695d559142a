"""What the subcommands of ``dpgen`` other than ``fit`` do."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from lightning_dpgen import generators
from lightning_dpgen._validate import fail, one_of, positive_int
from lightning_dpgen.data import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule
from lightning_dpgen.data.base import PrivateDataModule
from lightning_dpgen.evaluation.classic import CLASSIC_PROTOCOL, classic
from lightning_dpgen.evaluation.fidelity import fidelity, load_feature_network, save_feature_network, train_feature_network
from lightning_dpgen.evaluation.picture import draw_tables
from lightning_dpgen.evaluation.protocols import PROTOCOLS
from lightning_dpgen.evaluation.tstr import class_accuracy, print_table, tstr
from lightning_dpgen.generators.mixture_ppca import CLUSTER_SUMS, mixture_plan, mixture_size
from lightning_dpgen.privacy.accounting import calibrate_noise_multiplier, epsilon
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.plan import PoissonSampling, PrivacyPlan, Relation, Release
from lightning_dpgen.release.folder import load_release
from lightning_dpgen.release.verify import verify_release


def verify(release: str) -> None:
    """Recomputes ε from a release's events and checks every file's digest.

    Args:
        release: The release folder.
    """
    certificate = verify_release(release)
    claimed = certificate["claim"]
    Console().print(
        f"{release} holds: epsilon = {claimed['epsilon']:.4f} at delta = {claimed['delta']:g} ({claimed['relation']}, by "
        f"{claimed['accountant']}, from the {claimed['basis']}); replace-one {certificate['replace_one']['epsilon']:.4f}; RDP "
        f"{certificate['second_accountant']['epsilon']:.4f}. {len(certificate['files'])} files match their digests.\n"
        "This checks that the folder is consistent with itself, not that the run was honest.",
        highlight=False,
        soft_wrap=True,
    )


def calibrate(
    records: int,
    batch_size: int | None = None,
    steps: list[int] | int | None = None,
    epsilon: list[float] | float | None = None,
    noise_multiplier: list[float] | float | None = None,
    delta: float = 1e-5,
    method: Literal["lots", "mixture"] = "lots",
    num_classes: int = 10,
    image_shape: list[int] | None = None,
) -> None:
    """Prints ε and noise as a table: of Poisson lots with one release each (DP-SGD, private set), or of a mixture. Reads no data.

    Args:
        records: Number of records N.
        batch_size: Expected lot size.
        steps: Number of lots, or several numbers: [100,1000].
        epsilon: Budgets to calibrate the noise for: 10 or [1,3,10]. Give these or noise_multiplier.
        noise_multiplier: Noise ÷ clip norm to compute ε for, one or several.
        delta: δ.
        method: lots, or mixture for the releases and the size of MixturePPCA, which follow from N, classes and image shape.
        num_classes: Of a mixture.
        image_shape: Of a mixture: [channels, height, width]; [1, 28, 28] if not given.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: give one of the two.")

    def noises(plan: PrivacyPlan) -> list[float]:
        if noise_multiplier is not None:
            return noise_multiplier if isinstance(noise_multiplier, list) else [noise_multiplier]
        budgets = epsilon if isinstance(epsilon, list) else [epsilon or 0.0]
        return [calibrate_noise_multiplier(plan, PrivacyBudget(budget, delta)) for budget in budgets]

    if method == "mixture":
        if not (batch_size is steps is None):
            given = ", ".join(f"{n}={v}" for n, v in (("batch_size", batch_size), ("steps", steps)) if v is not None)
            raise ValueError(f"{given}: a mixture reads all records once a release. Leave it out.")
        pixels = math.prod(positive_int("image_shape", side) for side in image_shape or [1, 28, 28])
        plan = mixture_plan(records, pixels)
        for noise in noises(plan):
            _print_mixture(plan, noise, delta, num_classes, pixels)
        return
    if batch_size is None or steps is None:
        raise ValueError(f"batch_size={batch_size}, steps={steps}: give both for Poisson lots, or --method mixture.")
    table = Table(title=f"{records} records, expected lot {batch_size} (q = {batch_size / records:.5f}), delta = {delta:g}")
    for heading in ("steps", "noise multiplier", "epsilon (PLD, zero-out)", "replace-one", "second accountant (RDP)", "noise / lot"):
        table.add_column(heading, justify="right")
    for count in steps if isinstance(steps, list) else [steps]:
        plan = PrivacyPlan(PoissonSampling(records, batch_size), (Release("gradient_sum", 1.0, positive_int("steps", count)),))
        for noise in noises(plan):
            table.add_row(*_calibration_row(plan, count, noise, delta, batch_size))
    Console().print(table)


def _print_mixture(plan: PrivacyPlan, noise: float, delta: float, num_classes: int, pixels: int) -> None:
    """One budget's releases and the size that follows."""
    figure, replace_one = epsilon(plan.events(noise), delta), plan.epsilon(noise, delta, Relation.REPLACE_ONE)
    size = mixture_size(plan.sampling.records, num_classes, pixels, noise * plan.release(CLUSTER_SUMS).relative_noise)
    Console().print(
        f"Mixture of {plan.sampling.records} records, {num_classes} classes, {pixels} numbers an image: {size.clusters} clusters a class "
        f"in {size.dimensions} dimensions.\nEpsilon {figure.value:.4f} at delta {delta:g} (zero-out; replace-one {replace_one:.4f}; by "
        f"RDP {figure.rdp:.4f}).",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    for heading in ("release", "times", "% of budget", "multiplier", "clip norm", "noise std"):
        table.add_column(heading, justify="left" if heading == "release" else "right")
    whole = sum(release.count / release.relative_noise**2 for release in plan.releases)
    for release in plan.releases:
        event, share = plan.release_event(release.name, noise), release.count / release.relative_noise**2 / whole
        row = (f"{100 * share:.1f}", f"{noise * release.relative_noise:.4f}", f"{release.clip_norm:.2f}", f"{event.noise_std:.2f}")
        table.add_row(release.name, str(release.count), *row)
    Console().print(table)


def _calibration_row(plan: PrivacyPlan, steps: int, noise: float, delta: float, batch_size: int) -> list[str]:
    figure = epsilon(plan.events(noise), delta)
    by_rdp_alone = "" if figure.accountant == "PLD" else f" ({figure.accountant})"
    replace_one = plan.epsilon(noise, delta, Relation.REPLACE_ONE)
    return [
        str(steps),
        f"{noise:.6g}",
        f"{figure.value:.4f}{by_rdp_alone}",
        f"{replace_one:.4f}",
        f"{figure.rdp:.4f}",
        f"{noise / batch_size:.2e} C",
    ]


DATA: dict[str, type[PrivateDataModule]] = {
    "mnist": MNISTDataModule,
    "fashion_mnist": FashionMNISTDataModule,
    "digits": DigitsDataModule,
}


def evaluate(
    release: str,
    data: str,
    root: str = "data",
    protocol: list[str] | str = "quick",
    seeds: int = 3,
    feature_network: str | None = None,
    output: str | None = None,
) -> None:
    """Trains classifiers on a release and tests them on real test records (outside the guarantee).

    Args:
        release: The release folder.
        data: Which real test records: mnist, fashion_mnist or digits. For your own images use the callback TSTREvaluation.
        root: Their folder.
        protocol: quick, common, published or classic (scikit-learn's), or several: [quick,classic].
        seeds: Trainings of each classifier.
        feature_network: File that dpgen feature_network wrote; adds Fréchet distance, Inception score, precision and recall.
        output: Folder for tables (JSON, CSV) and picture; <release>-evaluation if not given.
    """
    protocols = protocol if isinstance(protocol, list) else [protocol]
    for name in protocols:
        one_of("protocol", name, (*PROTOCOLS, CLASSIC_PROTOCOL))
    network = None if feature_network is None else load_feature_network(feature_network)
    loaded = load_release(release)
    module = _data_module(data, root)
    names = loaded.class_names
    if len(names) != module.num_classes:
        raise ValueError(f"{release} has {len(names)} classes, {data} has {module.num_classes}: it is not a release of {data}.")
    folder = Path(output or f"{str(release).rstrip('/')}-evaluation")
    synthetic, real, trainings = loaded.dataset().tensors(), module.real_test(), range(positive_int("seeds", seeds))
    if network is not None:
        found = fidelity(synthetic[0], real[0], network)
        _print_fidelity(found)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fidelity.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    tables = []
    for name in protocols:
        run = classic if name == CLASSIC_PROTOCOL else partial(tstr, protocol=name)
        table = run(synthetic, real, len(names), seeds=trainings)
        print_table(table)
        tables.append(table)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"tstr-{name}.json").write_text(json.dumps(table.to_dict(), indent=2) + "\n", encoding="utf-8")
        with open(folder / f"tstr-{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["classifier", "mean", "std", "seeds", *names])
            for one in table.accuracy:
                writer.writerow([one, table.mean(one), table.std(one), seeds, *table.per_class[one]])
    draw_tables(tables, names, folder / "tstr.png")
    Console().print(f"Written: {folder}", highlight=False, soft_wrap=True)


def feature_network(data: str, output: str, root: str = "data", updates: int = 1500, seed: int = 0) -> None:
    """Trains the small network in whose features evaluate compares images, on real training records (not private; for evaluation).

    Args:
        data: mnist, fashion_mnist or digits.
        output: A new .safetensors file.
        root: The records' folder.
        updates: Steps of Adam on 128 images.
        seed: Of weights and batches.
    """
    if Path(output).exists():
        raise FileExistsError(f"{output} exists; give another path.")
    module = _data_module(data, root)
    module.setup("fit")
    assert module.train_records is not None
    images, labels = module.train_records.tensors()
    network = train_feature_network(images, labels, module.num_classes, positive_int("updates", updates), seed)
    save_feature_network(network, output)
    percent, _ = class_accuracy(torch.nn.Sequential(network, network.head), *module.real_test(), module.num_classes)
    Console().print(f"Written: {output}; it classifies {percent:.2f} % of the real test records.", soft_wrap=True)


def _data_module(data: str, root: str) -> PrivateDataModule:
    """The data module of this name, which may also be written as its class is: FashionMNIST."""
    name = {"fashionmnist": "fashion_mnist"}.get(data.lower(), data.lower())
    if name not in DATA:
        raise fail("data", data, "one of " + ", ".join(DATA))
    kind = DATA[name]
    return kind() if kind is DigitsDataModule else kind(root=root)  # type: ignore[call-arg]


def _print_fidelity(found: dict[str, float]) -> None:
    table = Table(title="Synthetic beside real test images, in learned features")
    for name in found:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{value:.3f}" for value in found.values()))
    Console().print(table)


def generate(release: str, output: str, per_class: int = 100, seed: int = 0, format: Literal["npz", "imagefolder"] = "imagefolder") -> None:
    """Samples a release's generator: free post-processing, as often as you like.

    Args:
        release: The release folder.
        output: A new folder (imagefolder: one folder a class), or a new .npz file.
        per_class: Images a class.
        seed: Seed of the sampling.
        format: imagefolder or npz.
    """
    loaded = load_release(release)
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"{target} exists; give another path.")
    stated = loaded.certificate["generator"]
    kind = getattr(generators, stated["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, generators.PrivateGenerator)):
        raise fail("release", release, f"made by one of this package's generators, not by {stated['class']}")
    generator = kind(**stated["arguments"])
    try:
        generator.load_public_state(loaded.parameters)
    except RuntimeError as error:
        raise ValueError(
            f"{release} holds a generator network of its maker's own, which {stated['class']}({stated['arguments']}) does not build. In "
            "Python, build the module with that network and call load_public_state(load_release(…).parameters)."
        ) from error
    labels = torch.arange(generator.num_classes).repeat_interleave(positive_int("per_class", per_class))
    with generators.looking_at(generator):
        images = generator.sample(labels, torch.Generator().manual_seed(seed))
    pixels = generators.to_bytes(images)
    distinct = len({image.tobytes() for image in pixels})
    if format == "npz":
        import numpy as np

        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(target.with_suffix(".npz"), images=pixels, labels=labels.numpy())
        target = target.with_suffix(".npz")
    else:
        for number, (label, image) in enumerate(zip(labels.tolist(), pixels, strict=True)):
            folder = target / loaded.class_names[label].replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number:06d}.png")
    copies = f", {distinct} of them distinct: the release is a set of learned images, not a source of new ones" * (distinct < len(labels))
    Console().print(f"{len(labels)} images written: {target}{copies}", highlight=False, soft_wrap=True)
