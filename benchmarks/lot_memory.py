"""Peak memory of one private matching step for lots of 256 and 4,096, data excluded. Prints a Markdown table.

Each lot runs in a process of its own; the figure is the peak resident size less that before the step, with the lot's images
already in memory.
"""

from __future__ import annotations

import resource
import subprocess
import sys

import torch

from lightning_dpgen.generators import PrivateSetGeneration
from lightning_dpgen.privacy.clipping import clipped_gradient_sum


def step(lot: int) -> None:
    torch.set_num_threads(1)
    module = PrivateSetGeneration(num_classes=10, image_shape=(1, 28, 28), schedule_overrides={"layers": "all"})
    images, labels = torch.rand(lot, 1, 28, 28), torch.randint(0, 10, (lot,))
    parameters = module.matched_parameters()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clipped_gradient_sum(module._record_loss, parameters, (images, labels), 0.1, chunk_size=64)
    print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    peaks = {}
    for lot in (256, 4096):
        output = subprocess.run([sys.executable, __file__, str(lot)], capture_output=True, text=True, check=True).stdout
        before, after = map(int, output.split())
        peaks[lot] = (before / 1024, after / 1024)
    print("| lot | before, MiB | peak, MiB | the step, MiB |\n|---|---|---|---|")
    for lot, (before, after) in peaks.items():
        print(f"| {lot} | {before:.0f} | {after:.0f} | {after - before:.0f} |")
    steps = [after - before for before, after in peaks.values()]
    print(f"\nThe step on a lot of 4,096 takes {steps[1] / steps[0]:.2f} x the memory of one on 256.")


if __name__ == "__main__":
    step(int(sys.argv[1])) if len(sys.argv) > 1 else main()
