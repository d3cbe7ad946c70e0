"""A disk that is full, failing or read-only from any call on: one sentence, no part left, and the command continues."""

import errno
import os
from collections import Counter

import pytest

from tests.faults.counts import record, some
from tests.faults.runs import command, differing, essence
from tests.faults.system import Points, injected

pytestmark = pytest.mark.faults
NAMES = {errno.ENOSPC: "disk full", errno.EROFS: "read-only", errno.EIO: "disk failing"}


@pytest.mark.parametrize("fault", NAMES, ids=NAMES.get)
@pytest.mark.parametrize(("name", "most"), [("train", 20), ("distill", 25), ("cache", 10), ("compare", 12)])
def test_an_error_of_the_system_from_any_call_on(name, most, fault, world, tmp_path):
    places, counts = world.places(name), Counter()
    step = max(1, len(places) // most)
    for number, at in enumerate(some([*places[::step], places[-1]])):
        out = tmp_path / str(at)
        with injected(Points(out, at, fault)):
            answer = command(*world.commands[name](out))
        where = (world.points[name][at - 1], answer.told)
        assert not list(tmp_path.rglob("*.part")), where
        if answer.code:
            assert os.strerror(fault) in answer.told, where
            counts["refused"] += 1
        else:  # what fails last is the folder's sync, which some file systems never can
            counts["worked"] += 1
        if number % 4 == 0 or not answer.code:
            again = command(*world.commands[name](out))
            assert again.code == 0, (where, again.told)
            assert not differing(essence(out), world.whole[name]), where
    record(f"{NAMES[fault]}, {name}", counts)
