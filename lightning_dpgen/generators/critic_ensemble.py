"""Critics of disjoint shards: K of them, trained at once and asked one by one.

What GS-WGAN and later teacher methods share: the shards, two kinds of critics with the same two verbs (``improve`` on
records, ``answer`` for generated images). Everything here is **private**; answers leave by ``mechanism.release_answers``, which
clips and adds up GS-WGAN's rows as it would those of another aggregation (binned votes, signs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

IMAGES_AT_ONCE = {"cpu": 128, "cuda": 4096}
"""Images that all critics of a chunk look at together in training: what a cache holds, what fills a GPU."""
RECORDS_AT_ONCE = 16_384
"""Records that potentials look at together."""
QUESTIONS_AT_ONCE = 64
"""Questions that are answered together."""


@dataclass(frozen=True)
class Shards:
    """Records and which shard each is in.

    Args:
        images: ``[N, …]``, on the device that trains.
        labels: ``[N]``.
        table: Record indices ``[K, n]``, filled up with -1.

    Privacy:
        Private. The table is drawn once (:func:`lightning_dpgen.privacy.assign_shards`).
    """

    images: Tensor
    labels: Tensor
    table: Tensor

    def minibatch(self, size: int) -> tuple[Tensor, Tensor]:
        """Different records of every shard, drawn afresh: images ``[K, size, …]`` and labels ``[K, size]``."""
        order = torch.rand(self.table.shape, device=self.table.device).masked_fill_(self.table < 0, -1.0)
        index = self.table.gather(1, order.topk(size, dim=1).indices)
        return self.images[index], self.labels[index]

    def by_class(self, num_classes: int) -> Tensor:
        """Record indices ``[K, num_classes, r]``, filled up with -1; r is the largest class of any shard."""
        labels = torch.where(self.table < 0, -1, self.labels[self.table.clamp_min(0)])
        rank = torch.stack([(labels == c).cumsum(1) for c in range(num_classes)], 1).gather(1, labels.clamp_min(0)[:, None])[:, 0] - 1
        shard, place = torch.nonzero(labels >= 0, as_tuple=True)
        table = torch.full((len(labels), num_classes, int(rank.max()) + 1), -1, device=labels.device)
        table[shard, labels[shard, place], rank[shard, place]] = self.table[shard, place]
        return table


def fingerprints(images: Tensor, labels: Tensor) -> Tensor:
    """A 64-bit mark of each record's bits, ``[N]``, by which a later fit knows that it has the same records in the same order.

    Args:
        images: ``[N, …]``.
        labels: ``[N]``.

    Privacy:
        Private, kept in the private checkpoint beside the assignment.
    """
    bits = images.float().contiguous().view(torch.int32).flatten(1)
    odd = torch.randint(-(2**62), 2**62, (bits.shape[1] + 1,), generator=torch.Generator().manual_seed(0)).to(bits.device) * 2 + 1
    sums = [(part.long() * odd[:-1]).sum(1) for part in bits.split(1000)]  # wraps around: a multilinear hash modulo 2^64
    return torch.cat(sums) + labels * odd[-1]


class CriticEnsemble(nn.Module):
    """K networks of one architecture, their parameters stacked ``[K, …]``, trained as Wasserstein critics with gradient penalty.

    Each starts at the same public initial weights and learns from its own shard alone: the loss is a sum over critics, Adam
    works number by number, and nothing (no norm, no scale, no skipped step) is shared.

    Args:
        critic: A network ``(images [N, C, H, W], labels [N]) -> [N]`` without buffers. It is asked about one image at a time, so
            that an answer cannot depend on what else its critic was asked.
        count: K.
        rate: Adam's learning rate (betas 0.5, 0.9).
        gradient_penalty: Weight of (‖∇f‖ - 1)² between real and fake (Gulrajani et al., NeurIPS 2017).
        drift_penalty: Weight of f² on real images (Karras et al., ICLR 2018).

    Privacy:
        Private: never in a public state. Which critics answer has no influence on how any of them is trained.

    Raises:
        ValueError: If the critic has buffers.
    """

    def __init__(self, critic: nn.Module, count: int, rate: float, gradient_penalty: float, drift_penalty: float) -> None:
        super().__init__()
        named = dict(critic.named_parameters())
        if any(True for _ in critic.buffers()):
            raise ValueError(
                f"critic {type(critic).__name__} has buffers ({', '.join(name for name, _ in critic.named_buffers())}): a critic keeps no "
                "state beside its weights. Replace BatchNorm by GroupNorm or LayerNorm, spectral_norm by nn.critics.UnfoldedConv."
            )
        self.count, self.rate = count, rate
        self.gradient_penalty, self.drift_penalty = gradient_penalty, drift_penalty
        self._names = list(named)
        self._in_a_list = [critic.requires_grad_(False)]  # so that it is no submodule: its own weights are the common start only
        self.stacked = nn.ParameterList(value.detach().expand(count, *value.shape).clone() for value in named.values())
        self.restore: dict[str, Any] | None = None
        self._optimizer: torch.optim.Adam | None = None

    @property
    def optimizer(self) -> torch.optim.Adam:
        """All critics' Adam, made when the weights are where they will be trained; continues the state in ``restore``."""
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.stacked, self.rate, betas=(0.5, 0.9))
        if self.restore is not None:
            self._optimizer.load_state_dict(self.restore)
            self.restore = None
        return self._optimizer

    @property
    def _template(self) -> nn.Module:
        return self._in_a_list[0]

    def scores(self, parameters: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """``[k, …]`` parameters, images ``[k, b, C, H, W]`` and labels ``[k, b]`` to ``[k, b]``."""

        def one(weights: list[Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return cast(Tensor, functional_call(self._template, dict(zip(self._names, weights, strict=True)), (images, labels)))

        return cast(Tensor, vmap(one, randomness="different")(parameters, images, labels))

    def improve(self, real: Tensor, fake: Tensor, labels: Tensor) -> None:
        """One Adam step of every critic.

        Args:
            real: ``[K, b, C, H, W]``, a minibatch of each critic's shard.
            fake: ``[K, b, C, H, W]``, generated for the same labels.
            labels: ``[K, b]``.

        Privacy:
            Critic k's step is a function of its own weights, ``real[k]``, ``fake[k]`` and ``labels[k]``.
        """
        self._template.train()
        size = max(1, IMAGES_AT_ONCE.get(real.device.type, 4096) // real.shape[1])
        for parameter in self.stacked:
            parameter.grad = torch.empty_like(parameter)
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            weights = [parameter[part].detach().requires_grad_() for parameter in self.stacked]
            loss = self._loss(weights, real[part], fake[part], labels[part])
            for parameter, gradient in zip(self.stacked, torch.autograd.grad(loss, weights), strict=True):
                cast(Tensor, parameter.grad)[part] = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self, weights: list[Tensor], real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
        share = torch.rand((*labels.shape, 1, 1, 1), device=real.device, dtype=real.dtype)
        between = (share * real + (1 - share) * fake).requires_grad_()
        slope = torch.autograd.grad(self.scores(weights, between, labels).sum(), between, create_graph=True)[0]
        steepness = slope.flatten(2).norm(dim=2)
        on_real, on_fake = self.scores(weights, torch.cat([real, fake], 1), torch.cat([labels, labels], 1)).chunk(2, dim=1)
        each = on_fake - on_real + self.gradient_penalty * (steepness - 1).square() + self.drift_penalty * on_real.square()
        return each.mean(1).sum()

    def answer(self, images: Tensor, labels: Tensor, sample: Tensor, critic: Tensor) -> Tensor:
        """The gradient of the asked critics' loss, -f, with respect to the images they are asked about.

        Args:
            images: ``[B, C, H, W]``, generated.
            labels: ``[B]``.
            sample: ``[P]``: of each question, which image.
            critic: ``[P]``: which critic; in order where all are asked about all.

        Returns:
            ``[P, C, H, W]``.

        Privacy:
            Row p is a function of ``images[sample[p]]`` and of critic ``critic[p]``. Questions go in batches of one fixed shape, so
            that who else was asked does not choose the kernels, and with them the rounding, of a device. Writes no state.
        """
        self._template.eval()
        rows = images.new_zeros((len(sample), *images.shape[1:]))
        questions = torch.arange(len(sample), device=images.device)
        everybody = len(sample) == self.count * len(images)
        questions = questions.view(self.count, -1) if everybody else questions[:, None]
        size = max(1, QUESTIONS_AT_ONCE // max(1, questions.shape[1]))
        for table in questions.split(size) if len(sample) else ():
            filled = torch.cat([table, questions[:1].expand(size - len(table), -1)])
            asked = images[sample[filled]].requires_grad_()
            weights = [parameter.detach()[critic[filled[:, 0]]] for parameter in self.stacked]
            with torch.enable_grad():
                scores = vmap(self.scores, in_dims=(None, 1, 1))(weights, asked[:, :, None], labels[sample[filled]][:, :, None])
                gradient = torch.autograd.grad(-scores.sum(), asked)[0]
            rows[table.flatten()] = gradient[: len(table)].flatten(0, 1)
        return rows


class PotentialCritics(nn.Module):
    """K Kantorovich potentials: for each shard and class the exact critic of the Wasserstein-1 distance, smoothed by entropy.

    Where a network is trained towards the supremum over 1-Lipschitz functions, a shard of a few hundred records and a batch
    have it in closed form: f(x) = softmin over records y of ‖x - y‖ - g(y), with g from Sinkhorn's iterations between the
    class's records in the shard and its generated images (Cuturi, NeurIPS 2013). It is 1-Lipschitz by construction, always
    fits the generator as it is now, and has no weights to train or to keep.

    Args:
        sharpness: The entropy's weight, in units of distance.
        iterations: Sinkhorn's iterations.

    Privacy:
        An answer is a function of the public batch and of the records of one class in one shard (up to rounding in float64); it has
        norm at most 1.
    """

    def __init__(self, sharpness: float, iterations: int) -> None:
        super().__init__()
        self.sharpness, self.iterations = sharpness, iterations

    def answer(self, points: Tensor, sample: Tensor, critic: Tensor, records: Tensor, table: Tensor) -> Tensor:
        """The gradient of the asked potentials, per point.

        Args:
            points: Generated images as points ``[classes, b, d]``.
            sample: ``[P]``: of each question, which point, counted through.
            critic: ``[P]``: which shard.
            records: All records as points ``[N, d]``.
            table: :meth:`Shards.by_class` of the shards.

        Returns:
            ``[P, d]``; zeros where the shard has no record of the class.
        """
        classes, of_class, size = points.shape
        rows = points.new_zeros((len(sample), size))
        groups, group = (critic * classes + sample // of_class).unique(return_inverse=True)
        at_once = max(1, RECORDS_AT_ONCE // table.shape[2])
        for start in range(0, len(groups), at_once):
            part = groups[start : start + at_once]
            index = table[part // classes, part % classes]
            answers = self.directions(points[part % classes], records[index.clamp_min(0)], index >= 0)
            chosen = (group >= start) & (group < start + at_once)
            rows[chosen] = answers[group[chosen] - start, sample[chosen] % of_class].to(rows.dtype)
        return rows

    def directions(self, points: Tensor, others: Tensor, present: Tensor) -> Tensor:
        """∇f at each point, for g groups at once.

        Args:
            points: ``[g, b, d]``.
            others: ``[g, r, d]``: what they are transported to, each with the same mass.
            present: ``[g, r]``: which of the others there are.

        Returns:
            ``[g, b, d]``: the mean over the others, as the plan sends there, of the unit vector away from each.
        """
        with torch.autocast(points.device.type, enabled=False), torch.no_grad():
            # In float64, since the widths of these tensors follow the largest class of any shard, and rounding follows the widths.
            # What is only there to fill up must not be multiplied, not even by 0: it may be NaN.
            points, others = points.double(), others.double().masked_fill(~present[:, :, None], 0.0)
            squares = points.square().sum(2)[:, None] + others.square().sum(2)[:, :, None] - 2 * others @ points.transpose(1, 2)
            distance = squares.clamp_min(1e-6).sqrt()
            cost = (distance / self.sharpness).masked_fill(~present[:, :, None], torch.inf)
            mass = (points.shape[1] / present.sum(1).clamp_min(1)).log()[:, None]
            here = points.new_zeros(points.shape[:2])
            there = points.new_zeros(present.shape)
            for _ in range(self.iterations):
                there = (mass - torch.logsumexp(here[:, None] - cost, 2)).masked_fill(~present, 0.0)
                here = -torch.logsumexp(there[:, :, None] - cost, 1)
                here = here.masked_fill(~present.any(1)[:, None], 0.0)
            plan = torch.softmax(there[:, :, None] - cost, 1) / distance
            plan = plan.masked_fill(~present[:, :, None], 0.0)
            return points * plan.sum(1)[:, :, None] - plan.transpose(1, 2) @ others
