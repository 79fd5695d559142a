"""Per-record gradients against the plain mean-loss gradient of the same network, one run, ratios.

ConvNet of width 32, lot of 256 images of 28 x 28. Peers: Opacus's hooks, and ``vmap(grad)`` over the whole lot at once.
Prints a Markdown table.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import torch
from opacus.grad_sample import GradSampleHooks
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dpgen.nn.classifiers import ConvNet
from lightning_dpgen.privacy.clipping import clipped_gradient_sum, clipped_sum, per_record_gradients

LOT, CLIP, REPEATS = 256, 0.1, 9


def main() -> None:
    torch.manual_seed(0)
    network = ConvNet(10, (1, 28, 28), width=32)
    images, labels = torch.rand(LOT, 1, 28, 28), torch.randint(0, 10, (LOT,))
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    hooked = copy.deepcopy(network)
    GradSampleHooks(hooked, loss_reduction="mean")

    def loss(values: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(network, values, (image[None],)), label[None])

    def plain() -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()

    def ours() -> None:
        clipped_gradient_sum(loss, parameters, (images, labels), CLIP)

    def at_once() -> None:
        clipped_sum(per_record_gradients(loss, parameters, (images, labels)), CLIP)

    def opacus_hooks() -> None:
        F.cross_entropy(hooked(images), labels).backward()
        clipped_sum({name: value.grad_sample for name, value in hooked.named_parameters()}, CLIP)
        for value in hooked.parameters():
            value.grad_sample = value.grad = None

    cases: dict[str, Callable[[], None]] = {
        "plain mean-loss gradient": plain,
        "clipped_gradient_sum (chunks of 64)": ours,
        "Opacus hooks": opacus_hooks,
        "vmap(grad), whole lot": at_once,
    }
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(REPEATS + 1):  # interleaved, so that a busy machine slows all alike; the first round warms up
            for name, case in cases.items():
                start = time.perf_counter()
                case()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        base = medians["plain mean-loss gradient"]
        print(f"\n{threads} thread(s), torch {torch.__version__}\n\n| | ms a lot | ratio |\n|---|---|---|")
        for name, median in medians.items():
            print(f"| {name} | {median * 1e3:.0f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
