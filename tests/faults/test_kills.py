"""Kills at every call that writes, and at seeded moments: what is continued ends as what nothing disturbed."""

import random
import time
from collections import Counter

import pytest

from tests.faults.counts import record, some
from tests.faults.runs import command, differing, essence
from tests.faults.system import Points, in_child, injected

pytestmark = pytest.mark.faults
KILLED = -9


def killed(argv, out, at):
    def go():
        with injected(Points(out, at)):
            return command(*argv).code

    return in_child(go)[0]


def continued(world, name, out, counts):
    """Repeat the command, and count whether all is there."""
    code, answer = in_child(lambda: command(*world.commands[name](out)))
    assert code == 0, answer
    assert answer.code == 0, answer.told
    lost = differing(essence(out), world.whole[name])
    counts["lost" if lost else "worked"] += 1
    assert not lost, lost


@pytest.mark.parametrize(("name", "most"), [("train", 45), ("distill", 60), ("cache", 20), ("replay", 25)])
def test_a_kill_at_every_call_that_writes(name, most, world, tmp_path):
    places, counts = world.places(name), Counter()
    step = max(1, len(places) // most)
    for at in some([*places[::step], places[-1]]):
        out = tmp_path / str(at)
        code = killed(world.commands[name](out), out, at)
        # Pages hold times, whose length may make a write more or less: the very last call need not be there.
        assert code == KILLED or (code == 0 and at == places[-1]), (at, world.points[name][at - 1])
        continued(world, name, out, counts)
    record(f"kills at writes, {name}", counts)


def test_a_kill_upon_a_kill(world, tmp_path):
    """The command is killed at one call, and its continuation at another."""
    places, counts, draw = world.places("distill"), Counter(), random.Random(1)
    for case in some(list(range(12))):
        out = tmp_path / str(case)
        for _ in range(3):
            code = killed(world.commands["distill"](out), out, draw.choice(places[: len(places) // 2]))
            assert code in (0, KILLED)
        continued(world, "distill", out, counts)
    record("three kills, one run", counts)


def test_a_kill_at_a_seeded_moment(world, tmp_path):
    """The time of a whole run is measured first; the kills fall anywhere into it."""
    world.made("distill")
    begun = time.monotonic()
    assert in_child(lambda: command(*world.commands["distill"](tmp_path / "whole")).code) == (0, 0)
    whole, draw, counts = time.monotonic() - begun, random.Random(0), Counter()
    for case in some(list(range(20))):
        out = tmp_path / str(case)
        code, _ = in_child(lambda out=out: command(*world.commands["distill"](out)).code, after=whole * draw.random())
        assert code in (0, KILLED)
        continued(world, "distill", out, counts)
    record("kills at moments", counts)
