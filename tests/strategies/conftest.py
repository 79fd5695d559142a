import pytest
import torch

from lightning_dpgen.privacy import GaussianMechanism


@pytest.fixture
def released_stub(monkeypatch):
    """A release that ignores its rows: what is left in the public state cannot have come through the door."""

    def stub(self, name, contribution):
        from lightning_dpgen.privacy.clipping import clipped_sum, tensors_of

        shapes = tensors_of(contribution if not isinstance(contribution, dict) else clipped_sum(contribution, 1.0))
        self.ledger.charge(self.plan.release_event(name, self.noise_multiplier))
        generator = torch.Generator().manual_seed(len(self.ledger))
        return {key: torch.randn(value.shape, generator=generator) for key, value in shapes.items()}

    monkeypatch.setattr(GaussianMechanism, "release", stub)
