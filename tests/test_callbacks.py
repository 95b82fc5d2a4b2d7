"""What callbacks leave behind."""

import pytest
import torch

import pgen
from pgen.training import TensorBoard


def test_tensorboard_holds_every_metric(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x = (torch.arange(150) % 3 == 0).float().reshape(50, 3)
    vae = pgen.models.VAE((3,), 2, (5,))
    run = vae.fit(x, validation=x[:9], steps=12, batch_size=25, progress=False, callbacks=[TensorBoard(tmp_path)])
    written = EventAccumulator(str(tmp_path))
    written.Reload()
    assert {"loss", "grad_norm", "lr", "validation_bound"} <= set(written.Tags()["scalars"])
    assert written.Scalars("loss")[-1].step == 12
    assert written.Scalars("validation_bound")[-1].value == pytest.approx(run.validation["bound"][-1], rel=1e-5)
