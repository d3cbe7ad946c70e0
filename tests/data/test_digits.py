"""The digits in the package are scikit-learn's, in their order."""

import numpy as np
import pytest

from pcdistill.data.digits import handwritten_digits


@pytest.mark.slow
def test_images_labels_and_order_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, labels = handwritten_digits()
    assert images.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(images, load_digits().images)
    np.testing.assert_array_equal(labels, load_digits().target)
