"""What a private run refuses, each with a sentence that says what to do instead."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_dpgen._compat import pl


def check_trainer(trainer: Any, capped: bool) -> None:
    """Refuses Trainer arguments that would change what is released.

    Args:
        trainer: The trainer that fits.
        capped: Whether a target ε was given.

    Raises:
        ValueError: Names the argument and what to do instead.
    """
    refusals = []
    if trainer.gradient_clip_val is not None:
        refusals.append(
            f"gradient_clip_val={trainer.gradient_clip_val} clips the noisy sum, not each record. Remove it; use DPStrategy(clip_norm=…)."
        )
    if trainer.accumulate_grad_batches != 1:
        refusals.append(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches} mixes lots. Remove it and give the DataLoader the "
            "larger batch_size."
        )
    if str(trainer.precision) in ("16-mixed", "bf16-mixed", "16-true", "bf16-true", "transformer-engine-float16"):
        refusals.append(f"precision={trainer.precision!r} would round clipped sums before the noise. Use '32-true'.")
    if trainer.overfit_batches:
        refusals.append(f"overfit_batches={trainer.overfit_batches} fixes the lots. Remove it; use limit_train_batches.")
    if capped and trainer.max_steps == -1 and (trainer.max_epochs is None or trainer.max_epochs == -1):
        refusals.append(
            "neither max_steps nor max_epochs is set, so there is no number of releases to fit into epsilon. Set one (max_time "
            "may stop earlier), or give DPStrategy(noise_multiplier=…) for a run without a claim."
        )
    finders = [c for c in trainer.callbacks if type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder")]
    for finder in finders:
        refusals.append(f"{type(finder).__name__} trains on records outside the budget. Choose its value on public data.")
    accumulators = [c for c in trainer.callbacks if isinstance(c, pl.callbacks.GradientAccumulationScheduler)]
    if accumulators:
        refusals.append("GradientAccumulationScheduler mixes lots. Remove it and use a larger batch_size.")
    if refusals:
        raise ValueError("DPStrategy cannot run with this Trainer:\n- " + "\n- ".join(refusals))


def check_user_module(module: pl.LightningModule) -> None:
    """Refuses modules whose gradient has no row for each record.

    Raises:
        ValueError: Names the layer or attribute and what to do instead.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} uses manual optimization, where it is not known which optimizer sees records. Use automatic optimization, "
            "or give the module configure_privacy() and call self.mechanism.release() yourself."
        )
    own = [n for n, p in module.named_parameters(recurse=False) if p.requires_grad]
    if own:
        raise ValueError(
            f"{name} holds the parameters {', '.join(own)} itself, outside a layer, so no hook can see their per-record gradient. "
            "Move them into an nn.Module of their own."
        )
    for path, layer in module.named_modules():
        if isinstance(layer, (_BatchNorm, nn.SyncBatchNorm)):
            raise ValueError(
                f"{name}.{path} is {type(layer).__name__}: it mixes the records of a lot and keeps statistics of them. Replace it "
                "by nn.GroupNorm(min(32, channels), channels), or use opacus.validators.ModuleValidator.fix on the network."
            )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{name} has no trainable parameter.")


def check_optimizers(optimizers: list[Any], module: pl.LightningModule) -> None:
    """Refuses optimizers that do not step on one gradient per lot.

    Raises:
        ValueError: Says which optimizer and what to use.
    """
    if len(optimizers) != 1:
        raise ValueError(f"{type(module).__name__} has {len(optimizers)} optimizers; a module without configure_privacy() must have one.")
    kind = type(getattr(optimizers[0], "optimizer", optimizers[0])).__name__
    if kind == "LBFGS":
        raise ValueError("LBFGS evaluates the loss several times a step, each a release. Use SGD or Adam.")


def planned_steps(trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """How many lots the trainer will run at most; ``None`` if nothing limits it."""
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        return None
    trainer.fit_loop.setup_data()
    if not module.automatic_optimization and trainer.max_epochs not in (None, -1):
        lots = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        return max(int(steps), lots) if trainer.max_steps == -1 else min(trainer.max_steps, lots)
    return int(steps)
