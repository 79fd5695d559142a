"""Every engine, chunked or not, against the loop over records; what an engine cannot do is refused by name."""

from __future__ import annotations

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from helpers import Mlp, Module, fit, flat, oracle
from opacus.layers import DPLSTM
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_dpgen.nn.classifiers import CLASSIFIERS

ENGINES = [
    {"grad_sample": "hooks"},
    {"grad_sample": "hooks", "physical_batch_size": 3},
    {"grad_sample": "ghost"},
    {"grad_sample": "ghost", "physical_batch_size": 3},
    {"grad_sample": "functional"},
    {"grad_sample": "functional", "physical_batch_size": 3},
    {"physical_batch_size": 1},
]


def named(options) -> str:
    return "-".join(str(value) for value in options.values())


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 6, padding_idx=padding)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, tokens):
        return self.head(self.norm(self.two(torch.tanh(self.one(self.words(tokens))))))


def convolutional() -> Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2, dilation=2, padding="same"),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    return Module(net)


def images(count: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 2, 8, 8, generator=generator), torch.randint(5, (count,), generator=generator))


def tokens(count: int = 7) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(12, (count, 4), generator=generator), torch.randint(5, (count, 4), generator=generator))


def sequence_loss(net, batch):
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def tied(padding: int | None = None) -> Module:
    torch.manual_seed(0)
    return Module(Tied(padding), sequence_loss)


def released(folder, module, records, clip_norm, **options) -> torch.Tensor:
    start = flat(module)
    fit(folder, module, records, len(records), clip_norm=clip_norm, **options)
    return (start - flat(module)) * len(records)


@pytest.mark.parametrize("options", ENGINES, ids=named)
@pytest.mark.parametrize(("build", "records"), [(convolutional, images), (tied, tokens)])
@pytest.mark.parametrize("clip_norm", [0.05, 5.0])
def test_every_engine_is_the_loop_over_records(tmp_path, options, build, records, clip_norm):
    expected = oracle(build(), records(), clip_norm)
    found = released(tmp_path, build(), records(), clip_norm, **options)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert found.norm() <= 7 * clip_norm * (1 + 1e-4)


@pytest.mark.parametrize("options", ENGINES, ids=named)
def test_a_padding_index_is_right_or_refused(tmp_path, options):
    # Opacus 1.6 gives the padding row a gradient that training without privacy does not.
    module, start = tied(0), flat(tied(0))
    try:
        found = released(tmp_path, module, tokens(), 0.05, **options)
    except RuntimeError as error:
        assert "net.words.weight" in str(error)
        assert torch.equal(flat(module), start)
        return
    torch.testing.assert_close(found, oracle(tied(0), tokens(), 0.05), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", ENGINES, ids=named)
def test_a_sum_over_records_is_told_from_a_mean(tmp_path, options):
    def build():
        module = convolutional()
        module.loss = lambda net, batch: F.cross_entropy(net(batch[0]), batch[1], reduction="sum")
        return module

    torch.testing.assert_close(released(tmp_path, build(), images(), 0.5, **options), oracle(build(), images(), 0.5), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", ENGINES, ids=named)
def test_a_record_of_nan_counts_as_nothing(tmp_path, options):
    records = images()
    clean = oracle(convolutional(), [records[i] for i in range(6)], 0.5)
    records.tensors[0][6] = float("nan")
    found = released(tmp_path, convolutional(), records, 0.5, **options)
    torch.testing.assert_close(found, clean, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", ENGINES, ids=named)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_keeps_the_bound(tmp_path, options, precision):
    # Rows may be rounded; their clipped sum may not: 7 equal rows would show a rise of one part in 256 above 7 C.
    image, label = images()[0]
    records = TensorDataset(image[None].repeat(7, 1, 1, 1), label[None].repeat(7))
    module = convolutional()
    seen = []
    module.configure_gradient_clipping = lambda *args, **kwargs: None
    from lightning_dpgen.privacy import mechanism

    original = mechanism.GaussianMechanism.release

    def spy(self, name, contribution):
        total = original(self, name, contribution)
        seen.append(torch.cat([value.flatten() for value in total.values()]))
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism.GaussianMechanism, "release", spy)
        fit(tmp_path, module, records, 7, clip_norm=0.01, trainer_options={"precision": precision}, **options)
    assert seen[0].dtype == torch.float32
    assert float(seen[0].norm()) == pytest.approx(0.07, rel=1e-4)


@pytest.mark.parametrize("grad_sample", ["hooks", "ghost", "functional"])
def test_memory_is_bounded_by_the_physical_batch(tmp_path, grad_sample):
    sizes = []

    class Watch(Mlp):
        def training_step(self, batch, batch_idx):
            sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    records = TensorDataset(torch.rand(50, 1, 8, 8), torch.zeros(50, dtype=torch.int64))
    fit(tmp_path, Watch(), records, 25, trainer_options={"max_steps": 4}, grad_sample=grad_sample, physical_batch_size=4)
    assert max(sizes) <= 4


@pytest.mark.parametrize("grad_sample", ["hooks", "functional"])
def test_what_a_lot_logs_is_the_mean_over_its_records(tmp_path, digit_records, grad_sample):
    torch.manual_seed(0)
    with torch.no_grad():
        module = Mlp()
        expected = float(F.cross_entropy(module.net(digit_records.tensors[0]), digit_records.tensors[1]))
    run = fit(tmp_path, Mlp(), digit_records, 64, grad_sample=grad_sample, trainer_options={"max_steps": -1, "max_epochs": 1})
    assert float(run.callback_metrics["loss"]) == pytest.approx(expected, rel=1e-4)


class Sequence(nn.Module):
    """A layer between tensors ``[B, T, E]``, which it takes in its own order."""

    def __init__(self, layer, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.batch_first, self.head = layer, batch_first, nn.Linear(6, 3)

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        out = out[0] if isinstance(out, tuple) else out
        return self.head(out if self.batch_first else out.transpose(0, 1))


LAYERS = {
    "LSTM": partial(nn.LSTM, 6, 6),
    "GRU": partial(nn.GRU, 6, 6),
    "RNN": partial(nn.RNN, 6, 6),
    "DPLSTM": partial(DPLSTM, 6, 6),
    "MultiheadAttention": partial(nn.MultiheadAttention, 6, 2),
    "TransformerEncoderLayer": partial(nn.TransformerEncoderLayer, 6, 2, 8, dropout=0.0),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("options", [ENGINES[0], ENGINES[2], ENGINES[4], ENGINES[6]], ids=named)
def test_recurrent_and_attention_layers_equal_the_loop_or_are_refused(tmp_path, layer, batch_first, options):
    generator = torch.Generator().manual_seed(2)
    records = TensorDataset(torch.randn(6, 6, 6, generator=generator), torch.randint(3, (6, 6), generator=generator))

    def build():
        torch.manual_seed(0)
        return Module(Sequence(LAYERS[layer](batch_first=batch_first), batch_first), sequence_loss)

    module = build()
    start = flat(module)
    try:
        found = released(tmp_path, module, records, 0.05, **options)
    except (RuntimeError, ValueError) as error:
        assert len(str(error)) > 40
        assert torch.equal(flat(module), start)
        assert options != ENGINES[6]  # each record alone works for every layer
        return
    torch.testing.assert_close(found, oracle(build(), records, 0.05), atol=1e-5, rtol=1e-3)


def test_copies_of_a_record_within_a_step_are_refused_or_added_before_clipping(tmp_path):
    records = TensorDataset(torch.rand(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64))

    class Copies(Mlp):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0].repeat_interleave(8, 0)).pow(2).mean() * 1e3

    for options in ENGINES:
        module = Copies()
        start = flat(module)
        try:
            fit(tmp_path, module, records, 1, clip_norm=0.1, **options)
        except RuntimeError as error:
            assert "32 gradient rows for a lot of 4" in str(error) or "rows" in str(error)
        assert (start - flat(module)).norm() <= 0.1 * (1 + 1e-5)


@pytest.mark.parametrize("options", ENGINES, ids=named)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_forward_pass_that_is_never_backpropagated_is_right_or_refused(tmp_path, digit_records, options, order):
    class Extra(Mlp):
        def training_step(self, batch, batch_idx):
            if order == "before":
                self.net(torch.randn(len(batch[0]), 64))
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            if order == "after":
                self.net(torch.randn(len(batch[0]), 64))
            return loss

    module = Extra()
    start, expected = flat(module), oracle(Mlp_without_log(), digit_records, 0.05)
    try:
        fit(tmp_path, module, digit_records, 64, clip_norm=0.05, **options)
    except RuntimeError as error:
        assert len(str(error)) > 40
        assert torch.equal(flat(module), start)
        return
    torch.testing.assert_close((start - flat(module)) * 64, expected, atol=2e-5, rtol=1e-3)


class Mlp_without_log(Mlp):
    def log(self, *args, **kwargs):
        pass


def test_a_callback_that_calls_the_module_leaves_nothing_behind(tmp_path, digit_records):
    class Looks(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            module.net(batch[0])

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            module.net(batch[0])
            self.held = sum(len(vars(m).get("activations", [])) for m in module.modules())

    looks = Looks()
    run = fit(tmp_path, Mlp(), digit_records, 8, trainer_options={"max_steps": 20, "callbacks": [looks]}, noise_multiplier=1.0)
    assert run.global_step == 20
    assert looks.held <= 4  # those of this lot's own two calls in two layers


def test_what_each_engine_cannot_do_is_refused_with_the_way_out(tmp_path, digit_records):
    class Own(Mlp):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.scale * self.net(batch[0]), batch[1])

    class ByHand(Mlp):
        def training_step(self, batch, batch_idx):
            hidden = F.linear(batch[0].flatten(1), self.net[1].weight)
            return F.cross_entropy(self.net(batch[0]), batch[1]) + hidden.pow(2).mean(1).mean()

    for grad_sample in ("hooks", "ghost"):
        with pytest.raises(ValueError, match="holds the parameters scale itself.*functional"):
            fit(tmp_path, Own(), digit_records, 16, grad_sample=grad_sample)
        with pytest.raises(RuntimeError, match=r"net\.1\.weight do not add up.*functional"):
            fit(tmp_path, ByHand(), digit_records, 16, grad_sample=grad_sample)
    for kind in (Own, ByHand):
        for options in ({"grad_sample": "functional"}, {"physical_batch_size": 1}):
            module, start = kind(), flat(kind())
            fit(tmp_path, module, digit_records, 64, clip_norm=0.05, **options)
            torch.testing.assert_close((start - flat(module)) * 64, oracle(kind(), digit_records, 0.05), atol=2e-5, rtol=1e-3)

    class Item(Mlp):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return loss * (1.0 if loss.item() > 0 else 2.0)

    with pytest.raises(RuntimeError, match="cannot be vectorised.*hooks"):
        fit(tmp_path, Item(), digit_records, 16, grad_sample="functional")


@pytest.mark.parametrize("options", ENGINES, ids=named)
@pytest.mark.parametrize("far", [1e4, 1e6])
def test_a_record_whose_steps_cancel_stays_within_the_clip_norm(tmp_path, options, far):
    """Two large, nearly opposite steps: a norm computed as a difference of products in float32 would come out as nothing."""
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        u, v = torch.randn(2, 5, generator=generator)
        record = TensorDataset(torch.stack([far * u, far * u + far**0.5 * v])[None])
        module = Module(nn.Linear(5, 1, bias=False), lambda net, batch: (net(batch[0])[..., 0] * torch.tensor([1.0, -1.0])).sum(1).mean())
        assert released(tmp_path, module, record, 1.0, **options).norm() <= 1 + 1e-6


def test_functional_takes_layers_in_any_mode(tmp_path, digit_records):
    module = Mlp().eval()
    start, expected = flat(module), oracle(Mlp_without_log(), digit_records, 0.05)
    fit(tmp_path, module, digit_records, 64, clip_norm=0.05, grad_sample="functional")
    torch.testing.assert_close((start - flat(module)) * 64, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("options", [o for o in ENGINES if o.get("grad_sample") != "functional"], ids=named)
def test_gradient_checkpointing_is_the_loop_over_records(tmp_path, options, reentrant):
    class Recomputes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = convolutional().net

        def forward(self, x):
            return checkpoint(self.net[1:], self.net[0](x), use_reentrant=reentrant)

    found = released(tmp_path, Module(Recomputes()), images(), 0.05, **options)
    torch.testing.assert_close(found, oracle(convolutional(), images(), 0.05), atol=1e-5, rtol=1e-3)


def test_gradient_checkpointing_under_vmap_is_refused_with_the_way_out(tmp_path):
    module = Module(convolutional().net, lambda net, batch: F.cross_entropy(checkpoint(net, batch[0], use_reentrant=False), batch[1]))
    with pytest.raises(RuntimeError, match=r"gradient checkpointing.*grad_sample='hooks'"):
        fit(tmp_path, module, images(), 7, grad_sample="functional")


@pytest.mark.parametrize("options", ENGINES, ids=named)
def test_a_bias_that_a_norm_takes_out_is_no_mistake(tmp_path, options):
    """Its gradient is zero but for rounding, which no two ways to compute it share."""

    def build():
        torch.manual_seed(0)
        return Module(CLASSIFIERS["ConvNet32"](5, (2, 8, 8)))

    expected = oracle(build(), images(), 0.05)
    torch.testing.assert_close(released(tmp_path, build(), images(), 0.05, **options), expected, atol=1e-5, rtol=1e-3)
