"""The example scripts, run as a reader would."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_gan_whose_discriminator_alone_sees_records(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("dp_gan", EXAMPLES / "dp_gan.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    trainer = script.main(epochs=2, folder=str(tmp_path))
    lots = 2 * trainer.num_training_batches
    assert len(trainer.strategy.ledger) == lots  # the generator's steps cost nothing
    assert trainer.global_step == 2 * lots
    assert trainer.strategy.epsilon_spent() <= 10
    assert (tmp_path / "samples.png").stat().st_size > 1000
    assert "epsilon = " in capsys.readouterr().out
