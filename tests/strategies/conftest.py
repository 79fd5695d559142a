import pytest
from helpers import unrelated_release

from lightning_dpgen.privacy import GaussianMechanism


@pytest.fixture
def released_stub(monkeypatch):
    """A release that ignores its rows: what is left in the public state cannot have come through the door."""
    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release())
