"""Run by test_pcd.py in a process of its own: Triton's interpreter is chosen when triton is imported."""

import pytest
import torch

from pcdistill.losses.pcd import pcd_loss
from tests.ops.cases import INTERPRETED, check

for case in INTERPRETED:
    check("triton", case)

for refused, reason in ((torch.zeros(2, 10, dtype=torch.float64), "float32"), (torch.zeros(1, 20000), "16384")):
    with pytest.raises(ValueError, match=reason):
        pcd_loss(refused, refused, backend="triton")
print(f"{len(INTERPRETED)} cases agree")
