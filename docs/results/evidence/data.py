"""Write a folder of photographs as one .npz at a fixed size, and pick a sample: what the evidence was measured on.

Usage: python docs/results/evidence/data.py FOLDER OUT.npz --size 96

FOLDER holds train/CLASS/*.jpg and test/CLASS/*.jpg. Each image is scaled to the size by its shorter side and cut to its
middle square.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def square(path: Path, size: int) -> np.ndarray:
    """The middle of a photograph, [size, size, 3] uint8."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))


def split(folder: Path, classes: list[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, size, size, 3] and labels [N] of train/ or test/."""
    files = [(path, i) for i, name in enumerate(classes) for path in sorted((folder / name).iterdir())]
    return np.stack([square(path, size) for path, _ in files]), np.array([i for _, i in files])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=96)
    args = parser.parse_args()
    classes = sorted(path.name for path in (args.folder / "train").iterdir())
    x_train, y_train = split(args.folder / "train", classes, args.size)
    x_test, y_test = split(args.folder / "test", classes, args.size)
    np.savez(args.out, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=np.array(classes))


if __name__ == "__main__":
    main()
