"""Distillation in Hugging Face's Trainer: a student of transformers learns from a teacher of timm."""

import tempfile

from start import EPOCHS, accuracy, digits, network, trained
from torch.utils.data import default_collate
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import pcdistill


def collate(samples: list) -> dict:
    """A batch as models of transformers name it."""
    return dict(zip(("pixel_values", "labels"), default_collate(samples), strict=True))


# distillation: begin
class Progress(TrainerCallback):
    """Tells the losses where training is."""

    def on_step_begin(self, args, state, control, model, **others):
        model.set_progress(state.epoch or 0.0, args.num_train_epochs)


# distillation: end


def main(folder: str) -> float:
    """Top-1 of the student."""
    train, held_out = digits()
    teacher = trained(network(32), train)
    shape = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16, 16, 24], "depths": [1] * 4}
    student = ResNetForImageClassification(ResNetConfig(**shape, layer_type="basic", num_labels=10))
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        learning_rate=3e-3,
        per_device_train_batch_size=64,
        remove_unused_columns=False,
        label_names=["labels"],
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    # distillation: begin
    distiller = pcdistill.Distiller(student, teacher, "pcd", example=collate([train[i] for i in range(8)]))
    trainer = Trainer(
        distiller,
        arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[Progress()],
    )
    trainer.train()
    student.save_pretrained(folder)
    # distillation: end
    return accuracy(ResNetForImageClassification.from_pretrained(folder), held_out)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(f"student: {main(temporary):.1f} % top-1")
