"""The handwritten digits that come with the package, so that a first run needs no download."""

from functools import cache
from pathlib import Path

import numpy as np

DIGITS = Path(__file__).with_name("digits.npz")


@cache
def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images [1797, 8, 8] of ink in 0..16 and the digit [1797] of each, both uint8; not to be written to.

    Source:
        The test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning
        Repository (1998), CC BY 4.0; images, labels and order are those of scikit-learn's `load_digits`.
    """
    with np.load(DIGITS, allow_pickle=False) as found:
        arrays = found["images"], found["labels"]
    for array in arrays:
        array.setflags(write=False)
    return arrays
