"""Two processes in one folder, and two that are one run."""

import os
from collections import Counter

import pytest

from pcdistill.commands import claim
from tests.engine.test_together import launch
from tests.faults.counts import record, some
from tests.faults.runs import command, differing, essence
from tests.faults.system import in_child

pytestmark = pytest.mark.faults
KINDS = {"train": "run", "distill": "run", "cache": "cache", "compare": "comparison"}


def second(argv):
    """The command in a process that knows of the first by the system's lock alone."""
    claim._held.clear()
    return command(*argv)


def test_the_second_process_in_a_folder_is_told_so(world, tmp_path):
    counts = Counter()
    for name, kind in some(list(KINDS.items())):
        out = tmp_path / name
        argv = world.commands[name](out)
        with claim.claimed(out, kind):
            before = sorted(os.listdir(out))
            code, answer = in_child(lambda argv=argv: second(argv))
            assert code == 0, answer
            assert answer.code == 1
            assert "another process is at work" in answer.told
            assert sorted(os.listdir(out)) == before
        counts["refused"] += 1
        world.made(name)
        assert command(*argv).code == 0
        assert not differing(essence(out), world.whole[name])
        counts["worked"] += 1
    record("two processes, one folder", counts)


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("loader raises", "the disk of this process has gone"),
        ("student raises", "the student of this process fails"),
        ("label", "the student has 4 outputs, so that labels are 0 to 3"),
    ],
)
def test_a_rank_that_fails_ends_both(case, says, tmp_path):
    left, printed, seconds = launch([case], tmp_path)
    found = left[case]
    told = " ".join([printed, *(one["error"] for one in found if one is not None and "error" in one)])
    assert says in told
    assert all(one is None or "error" in one for one in found)
    assert seconds < 120
    record(f"two ranks, {case}", Counter(refused=1))
