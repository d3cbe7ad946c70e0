"""Distillation of an existing LightningModule by a callback: the module knows nothing of it, and stays as it is."""

import tempfile
from typing import Any

import lightning
import torch
from start import EPOCHS, accuracy, digits, network, trained
from torch.nn import functional as F
from torch.utils.data import DataLoader

import pcdistill


class Classifier(lightning.LightningModule):
    """A module as many have it, with its network under `model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = network(8)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        images, target = batch
        return F.cross_entropy(self.model(images), target)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


# distillation: begin
class Distil(lightning.Callback):
    """Trains `module.model` by distillation, in place of the module's own training step."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, trainer, module, stage):
        def step(batch, batch_idx):
            distiller.set_progress(trainer.current_epoch + batch_idx / trainer.num_training_batches, trainer.max_epochs)
            return distiller(batch)["loss"]

        if stage == "fit":
            self.distiller = distiller = pcdistill.Distiller(module.model, **self.options)
            module.training_step = step
            module.distillation = distiller.objective  # what the losses learn: trained, moved and saved with the module

    def teardown(self, trainer, module, stage):
        if stage == "fit":
            self.distiller.close()
            del module.training_step, module.distillation


# distillation: end


def main(folder: str) -> float:
    """Top-1 of the student."""
    train, held_out = digits()
    teacher, module = trained(network(32), train), Classifier()
    loader = DataLoader(train, 64, shuffle=True)
    distil = Distil(teacher=teacher, method="reviewkd", example=next(iter(loader)))
    trainer = lightning.Trainer(max_epochs=EPOCHS, callbacks=[distil], default_root_dir=folder, logger=False)
    trainer.fit(module, loader)
    return accuracy(module.model, held_out)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(f"student: {main(temporary):.1f} % top-1")
