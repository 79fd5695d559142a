"""A GAN of two optimizers in which only the discriminator sees records: DP-SGD on the discriminator makes the generator private.

    python examples/dp_gan.py

Trains on scikit-learn's digits, which need no download, and writes samples to ``runs/dp_gan/samples.png``.
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import softplus

from lightning_dpgen import DigitsDataModule, DPStrategy
from lightning_dpgen.release.preview import save_grid


class DPGAN(pl.LightningModule):
    private_modules = "discriminator"  # what sees records; its optimizer steps on clipped, noisy gradients

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent = latent
        self.generator = nn.Sequential(nn.Linear(latent, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        real = batch[0]
        generator_step, discriminator_step = self.optimizers()

        # A record and the fake beside it are one contribution: as many fakes as records, one backward pass, one step.
        fake = self.generator(torch.randn(len(real), self.latent, device=self.device)).detach()
        loss = (softplus(-self.discriminator(real)) + softplus(self.discriminator(fake))).mean()
        discriminator_step.zero_grad()
        self.manual_backward(loss)
        discriminator_step.step()

        # The generator sees latents and the released discriminator only.
        self.toggle_optimizer(generator_step)
        loss = softplus(-self.discriminator(self.generator(torch.randn(64, self.latent, device=self.device)))).mean()
        generator_step.zero_grad()
        self.manual_backward(loss)
        generator_step.step()
        self.untoggle_optimizer(generator_step)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(m.parameters(), lr=1e-3, betas=(0.5, 0.9)) for m in (self.generator, self.discriminator)]


def main(epochs: int = 60, folder: str = "runs/dp_gan") -> pl.Trainer:
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, strategy=DPStrategy(epsilon=10, delta=1e-5))
    model = DPGAN()
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=128))
    with torch.no_grad():
        save_grid(model.generator(torch.randn(50, model.latent)), Path(folder, "samples.png"), columns=10)
    print(f"epsilon = {trainer.callback_metrics['privacy/epsilon']:.2f}; samples in {folder}/samples.png")
    return trainer


if __name__ == "__main__":
    main()
