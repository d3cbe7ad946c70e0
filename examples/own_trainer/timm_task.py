"""Distillation as a task of timm: timm's own loop calls it, and its checkpoints are as ever."""

import torch
from start import EPOCHS, accuracy, digits, network, trained
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import nn
from torch.utils.data import DataLoader

import pcdistill


# distillation: begin
class DistillationTask(ClassificationTask):
    """Any method of pcdistill, beside timm's own tasks."""

    def __init__(self, student, teacher, method, example, **options):
        super().__init__(pcdistill.Distiller(student, teacher, method, example=example), nn.Identity(), **options)

    def forward(self, input, target):
        found = self.trainable_module((input, target))
        return {**found, "output": found["logits"]}

    def get_eval_model(self, module=None, ema=False):
        return unwrap_model(module or self.get_trainable_module(ema)).student

    def get_task_state(self, module=None, ema=False):
        return {"losses": unwrap_model(module or self.get_trainable_module(ema)).objective.state_dict()}


# distillation: end


def main() -> float:
    """Top-1 of the student."""
    train, held_out = digits()
    teacher, student = trained(network(32), train), network(8)
    loader = DataLoader(train, 64, shuffle=True)
    task = DistillationTask(student, teacher, "fitnet", next(iter(loader)))
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for _ in range(EPOCHS):
        task.train()
        for images, target in loader:
            task(images, target)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    state = task.get_checkpoint_state()  # what timm's CheckpointSaver writes: "state_dict" is the student's
    again = network(8)
    again.load_state_dict(state["state_dict"])
    return accuracy(again, held_out)


if __name__ == "__main__":
    print(f"student: {main():.1f} % top-1")
