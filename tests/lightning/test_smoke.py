from pathlib import Path
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from ema_dist.lightning import EMAWeightAveraging
from tests.support.layouts import IGNORE_INITIAL_WEIGHTS_WARNING
from tests.support.lightning_runs import *
pytestmark = IGNORE_INITIAL_WEIGHTS_WARNING

@lightning_layouts()
def test_resume(layout: str, tmp_path: Path) -> None:
    results = []
    for epochs, ckpt in ((4, None), (2, None), (4, True)):
        ema = EMAWeightAveraging(decay=0.9)
        folder = tmp_path / f"{epochs}{ckpt}"
        saver = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{epoch}")
        trainer = make_trainer(layout, ema, saver, folder=folder, max_epochs=epochs)
        fit(trainer, make_module(layout), ckpt_path=str(tmp_path / "2None" / "epoch=1.ckpt") if ckpt else None)
        results.append((ema.ema.full_state_dict(), ema.ema.steps, trainer.callback_metrics["val_loss"]))
    print([r[1:] for r in results])
    assert results[0][1] == results[2][1]
    for n, t in results[0][0].items():
        assert torch.equal(t, results[2][0][n]), n
