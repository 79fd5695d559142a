"""What a private run refuses, each with a sentence that says what to do instead."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lightning_dpgen._compat import pl
from lightning_dpgen.privacy.plan import PrivacyPlan


def check_trainer(trainer: Any) -> None:
    """Refuses Trainer arguments that would change what is released.

    Args:
        trainer: The trainer that fits.

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
    if str(trainer.precision) not in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        refusals.append(
            f"precision={trainer.precision!r}: float16 scales the loss, so that clipping would bound scaled rows. Use 'bf16-mixed' or "
            "'32-true'."
        )
    if trainer.overfit_batches:
        refusals.append(f"overfit_batches={trainer.overfit_batches} fixes the lots. Remove it; use limit_train_batches.")
    finders = [c for c in trainer.callbacks if isinstance(c, (pl.callbacks.LearningRateFinder, pl.callbacks.BatchSizeFinder))]
    for finder in finders:
        refusals.append(f"{type(finder).__name__} trains on records outside the budget. Choose its value on public data.")
    accumulators = [c for c in trainer.callbacks if isinstance(c, pl.callbacks.GradientAccumulationScheduler)]
    if accumulators:
        refusals.append("GradientAccumulationScheduler mixes lots. Remove it and use a larger batch_size.")
    for owner in (trainer.lightning_module, getattr(trainer, "datamodule", None)):
        hook = getattr(owner, "on_before_batch_transfer", None)
        if getattr(hook, "__func__", hook) not in (None, pl.LightningModule.on_before_batch_transfer):
            refusals.append(
                f"{type(owner).__name__}.on_before_batch_transfer runs outside the strategy, where what it does to records is neither "
                "checked nor kept from the public random state. Move it to on_after_batch_transfer."
            )
    if refusals:
        raise ValueError("DPStrategy cannot run with this Trainer:\n- " + "\n- ".join(refusals))


def private_roots(module: pl.LightningModule, given: str | list[str] | None) -> tuple[str, ...]:
    """Paths of the submodules that see records; ``("",)`` for the whole module.

    Raises:
        ValueError: In manual optimization without a name, and for a path that the module has not.
    """
    named = given if given is not None else getattr(module, "private_modules", None)
    if named is None:
        if not module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} uses manual optimization, where it is not known which networks see records. Name them, "
                "DPStrategy(private_modules='discriminator'), or give the module configure_privacy() and call "
                "self.mechanism.release() yourself."
            )
        return ("",)
    roots = (named,) if isinstance(named, str) else tuple(named)
    known = dict(module.named_modules())
    missing = [root for root in roots if root not in known]
    if missing or not roots:
        children = ", ".join(name for name, _ in module.named_children())
        raise ValueError(f"private_modules={named!r}: {type(module).__name__} has no submodule {missing or 'named'}. It has {children}.")
    return roots


def check_module(module: pl.LightningModule, roots: tuple[str, ...], grad_sample: str, physical: int | None) -> None:
    """Refuses modules whose gradient has no row for each record.

    Raises:
        ValueError: Names the layer or argument and what to do instead.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        if physical is not None:
            raise ValueError(
                f"physical_batch_size={physical} with manual optimization: {name} backpropagates by itself, on a whole lot. Use a smaller "
                "batch_size, grad_sample='ghost', or automatic optimization."
            )
        if grad_sample == "functional":
            raise ValueError(f"grad_sample='functional' with manual optimization: {name} backpropagates by itself. Use 'hooks' or 'ghost'.")
    for path, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and any(r in ("", path) or path.startswith(r + ".") for r in roots):
            raise ValueError(
                f"{name}.{path} is {type(layer).__name__}: it mixes the records of a lot and keeps statistics of them. Replace it "
                "by nn.GroupNorm(min(32, channels), channels), or use opacus.validators.ModuleValidator.fix on the network."
            )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"{name} has no trainable parameter.")


def private_optimizer(optimizers: list[Any], module: pl.LightningModule, roots: tuple[str, ...]) -> torch.optim.Optimizer:
    """The one optimizer that steps what sees records.

    Raises:
        ValueError: If there is none or several, or one also steps other parameters; says what to do.
    """
    names = {id(p): n for n, p in module.named_parameters()}
    under = {id(p) for n, p in module.named_parameters() if any(r == "" or n.startswith(r + ".") for r in roots)}
    found = []
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        outside = [names.get(id(p), "not the module's own") for p in held if id(p) not in under and p.requires_grad]
        if len(outside) == len(held):
            continue
        if outside and "" not in roots:
            raise ValueError(
                f"a {type(optimizer).__name__} steps parameters of {', '.join(roots)} and others ({', '.join(outside[:4])}). Give "
                "the networks "
                "that see records an optimizer of their own, or name the others in private_modules too."
            )
        found.append(optimizer)
    if len(found) != 1 or (module.automatic_optimization and len(optimizers) != 1):
        raise ValueError(
            f"{type(module).__name__} has {len(optimizers)} optimizers, {len(found)} of them for parameters that see records; it "
            "must be one. "
            "Name what sees records in DPStrategy(private_modules=…) and give all of it to one optimizer."
        )
    kind = type(found[0]).__name__
    if kind == "LBFGS":
        raise ValueError("LBFGS evaluates the loss several times a step, each a release. Use SGD or Adam.")
    return cast(torch.optim.Optimizer, found[0])


def monitored(trainer: Any, schedulers: list[Any]) -> list[tuple[str, str]]:
    """Who chooses something by which logged number, ``privacy/epsilon`` apart."""
    watchers = (pl.callbacks.EarlyStopping, pl.callbacks.ModelCheckpoint)
    pairs = [(type(c).__name__, c.monitor) for c in trainer.callbacks if isinstance(c, watchers) and c.monitor]
    for config in schedulers:
        if config.reduce_on_plateau:
            pairs.append((type(config.scheduler).__name__, config.monitor))
        elif isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            pairs.append((type(config.scheduler).__name__, "what its step() is given"))
    return [(user, str(key)) for user, key in pairs if key != "privacy/epsilon"]


def planned_steps(trainer: pl.Trainer, module: pl.LightningModule) -> int | None:
    """How many lots the trainer will run at most; ``None`` if nothing limits it."""
    steps = trainer.estimated_stepping_batches
    trainer.fit_loop.setup_data()
    if math.isinf(steps):
        return None
    if not module.automatic_optimization and trainer.max_epochs not in (None, -1):
        lots = int(trainer.num_training_batches) * int(trainer.max_epochs or 0)
        return max(int(steps), lots) if trainer.max_steps == -1 else min(trainer.max_steps, lots)
    return int(steps)


def set_passes(trainer: pl.Trainer, plan: PrivacyPlan, done: int) -> int:
    """Makes the trainer run one epoch for each release of a plan of full passes; returns how many.

    Args:
        trainer: The trainer that fits.
        plan: Its releases are made in the plan's order.
        done: How many of them lie behind.

    Raises:
        ValueError: If the user's limits leave out a pass or a part of one.
    """
    passes = sum(release.count for release in plan.releases)
    name = type(trainer.lightning_module).__name__
    limits = {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
    for argument, limit in limits.items():
        if limit not in (None, -1) and limit < passes:
            raise ValueError(
                f"{argument}={limit}: {name} reads all records once for each of its {passes} releases, an epoch and a step each. Leave "
                f"{argument} out, which gives it {passes} epochs."
            )
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise ValueError(f"the training data is a {type(loader).__name__}; a private run needs exactly one DataLoader.")
    if trainer.num_training_batches != len(loader):
        raise ValueError(
            f"limit_train_batches={trainer.limit_train_batches}: {name} must read all records in every pass, and would read "
            f"{trainer.num_training_batches} of {len(loader)} chunks. Leave it out (fast_dev_run too)."
        )
    trainer.fit_loop.max_epochs = trainer.current_epoch + passes - min(done, passes) if trainer.global_step else passes
    return passes
