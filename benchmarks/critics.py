"""Warm-up of GS-WGAN's critics: all at once as stacked networks, against one after the other.

    python benchmarks/critics.py [--critics 100] [--steps 100] [--device cpu]

The same networks, minibatches of 16 images of 28 x 28, gradient penalty and Adam. Prints one row a network.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_dpgen.generators.critic_ensemble import CriticEnsemble
from lightning_dpgen.nn.critics import ConvCritic, MLPCritic

BATCH, SHAPE, CLASSES = 16, (1, 28, 28), 10
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP 784-128-64": lambda: MLPCritic(CLASSES, SHAPE),
    "conv 16-32-64": lambda: ConvCritic(CLASSES, SHAPE, width=16),
}


def step_alone(network: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor, labels: Tensor) -> None:
    """One step of one critic by plain autograd, with the ensemble's loss."""
    share = torch.rand((len(real), 1, 1, 1), device=real.device)
    between = (share * real + (1 - share) * fake).requires_grad_()
    slope = torch.autograd.grad(network(between, labels).sum(), between, create_graph=True)[0].flatten(1).norm(dim=1)
    on_real = network(real, labels)
    loss = (network(fake, labels) - on_real + 10.0 * (slope - 1).square() + 1e-3 * on_real.square()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def timed(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Milliseconds a step, after one to warm up."""
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3


def main() -> None:
    """Times both ways."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--critics", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device, count = torch.device(arguments.device), arguments.critics
    torch.manual_seed(0)
    real, fake = (torch.rand(count, BATCH, *SHAPE, device=device) for _ in range(2))
    labels = torch.randint(CLASSES, (count, BATCH), device=device)
    print(f"{count} critics, {arguments.steps} steps, {device}, {torch.get_num_threads()} threads")
    print("| critic | one by one, ms a step of all | stacked | ratio |\n|---|---|---|---|")
    for name, make in NETWORKS.items():
        network = make()
        stacked = CriticEnsemble(copy.deepcopy(network), count, 1e-3, 10.0, 1e-3).to(device)
        alone = [copy.deepcopy(network).to(device) for _ in range(count)]
        optimizers = [torch.optim.Adam(one.parameters(), 1e-3, betas=(0.5, 0.9)) for one in alone]

        def each(alone: list[nn.Module] = alone, optimizers: list[torch.optim.Adam] = optimizers) -> None:
            for k in range(count):
                step_alone(alone[k], optimizers[k], real[k], fake[k], labels[k])

        def together(stacked: CriticEnsemble = stacked) -> None:
            stacked.improve(real, fake, labels)

        slow, fast = timed(each, arguments.steps, device), timed(together, arguments.steps, device)
        print(f"| {name} | {slow:.1f} | {fast:.1f} | {slow / fast:.2f} |", flush=True)


if __name__ == "__main__":
    main()
