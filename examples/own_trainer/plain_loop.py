"""Distillation in a plain loop, by feature maps: FitNets has a regressor that is trained along."""

import torch
from start import EPOCHS, accuracy, digits, network, trained
from torch.utils.data import DataLoader

import pcdistill


def main() -> float:
    """Top-1 of the student."""
    train, held_out = digits()
    teacher, student = trained(network(32), train), network(8)
    loader = DataLoader(train, 64, shuffle=True)
    # distillation: begin
    distiller = pcdistill.Distiller(student, teacher, "fitnet", example=next(iter(loader)))
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for number, batch in enumerate(loader):
            distiller.set_progress(epoch + number / len(loader), EPOCHS)
            distiller(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    distiller.close()
    # distillation: end
    return accuracy(student, held_out)


if __name__ == "__main__":
    print(f"student: {main():.1f} % top-1")
