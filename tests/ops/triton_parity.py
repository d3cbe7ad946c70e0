"""Run by test_pcd_backends.py in a process of its own: Triton's interpreter is chosen when triton is imported."""

from tests.ops.cases import INTERPRETED, check

for case in INTERPRETED:
    check("triton", case)
print(f"{len(INTERPRETED)} cases agree")
