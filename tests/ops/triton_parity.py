"""Run by test_pcd.py in a process of its own: Triton's interpreter is chosen when triton is imported."""

import sys

import pytest
import torch

from pcdistill.losses.pcd import pcd_loss
from pcdistill.ops import pcd_tiled, pcd_triton
from tests.ops.cases import INTERPRETED, TILED, check

tiled = sys.argv[1:] == ["tiled"]
cases = TILED if tiled else INTERPRETED
if tiled:
    pcd_triton.MOST_HELD = 1
for i, case in enumerate(cases):
    # What is kept of a row between two sampled ranks: enough, or by turns too little, so that the row is read again.
    plan = pcd_tiled.Plan(select=32, tile=16, sample=64 if case.c >= 64 else 16, kept=64 if i % 3 else 1)
    pcd_tiled.plan = lambda classes, plan=plan: plan
    check("triton", case)

for refused, reason in ((torch.zeros(2, 10, dtype=torch.float64), "float32"), (torch.zeros(1, 1 << 21), "1048576")):
    with pytest.raises(ValueError, match=reason):
        pcd_loss(refused, refused, backend="triton")
print(f"{len(cases)} cases agree")
