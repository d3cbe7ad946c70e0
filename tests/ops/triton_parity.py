"""Run by test_pcd_backends.py in a process of its own: Triton's interpreter is chosen when triton is imported."""

import torch

from pcdistill.losses.pcd import pcd_loss
from tests.ops.cases import INTERPRETED, check

for case in INTERPRETED:
    check("triton", case)

for refused, reason in ((torch.zeros(2, 10, dtype=torch.float64), "float32"), (torch.zeros(1, 20000), "16384")):
    try:
        pcd_loss(refused, refused, backend="triton")
    except ValueError as error:
        assert reason in str(error), error
    else:
        raise AssertionError(f"took {refused.dtype} logits of shape {refused.shape}")
print(f"{len(INTERPRETED)} cases agree")
