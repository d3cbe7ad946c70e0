"""What the examples begin with: scikit-learn's digits, and a teacher that knows them."""

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

EPOCHS = 4


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Images [1, 16, 16] and labels: 1,437 to train on, 360 to evaluate on."""
    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, scale_factor=2)
    target = torch.tensor(labels)
    return TensorDataset(images[:1437], target[:1437]), TensorDataset(images[1437:], target[1437:])


def network(width: int) -> nn.Module:
    """A small ResNet of timm: its four stages have from `width` to 3 x `width` channels."""
    torch.manual_seed(0)
    channels = (width, 2 * width, 2 * width, 3 * width)
    return timm.create_model("test_resnet", in_chans=1, num_classes=10, channels=channels)


def accuracy(model: nn.Module, held_out: TensorDataset) -> float:
    """Top-1 in percent."""
    images, target = held_out.tensors
    with torch.no_grad():
        output = model.eval()(images)
    logits = getattr(output, "logits", output)  # models of transformers give an object
    return 100 * float((logits.argmax(1) == target).float().mean())


def trained(model: nn.Module, train: TensorDataset, epochs: int = EPOCHS) -> nn.Module:
    """The model after training alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, target in DataLoader(train, 64, shuffle=True, generator=torch.Generator().manual_seed(0)):
            F.cross_entropy(model.train()(images), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
