"""Worker processes stay over passes, passes may overlap, and what they give never depends on them."""

import os
import signal

import pytest
import torch

from pcdistill.data.workers import FEW, Workers, choose_workers
from pcdistill.errors import InputError, PcdistillError


def process(job):
    """Which process did the job."""
    return job, os.getpid()


def double(job):
    if job == 13:
        raise InputError("the image number 13 cannot be read")
    return torch.tensor([job, 2 * job])


def die(job):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_results_come_in_order(count):
    workers = Workers(count)
    number = workers.add(double)
    assert [found.tolist() for found in workers.run(number, range(9))] == [[i, 2 * i] for i in range(9)]
    assert list(workers.run(number, [])) == []


def test_processes_stay_over_passes_and_tasks():
    workers = Workers(2)
    numbers = [workers.add(task) for task in (process, process)]
    seen = [{pid for _, pid in workers.run(number, range(8))} for number in (*numbers, *numbers)]
    assert all(found == seen[0] for found in seen)
    assert len(seen[0]) == 2
    assert os.getpid() not in seen[0]


def test_a_pass_that_is_left_gives_nothing_to_the_next():
    workers = Workers(2)
    number = workers.add(process)
    began = workers.run(number, range(100, 200))
    first = next(began)
    began.close()
    again = list(workers.run(number, range(6)))
    assert [job for job, _ in again] == list(range(6))
    assert first[1] in {pid for _, pid in again}


@pytest.mark.parametrize("count", [0, 1])
def test_passes_may_overlap(count):
    workers = Workers(count)
    number = workers.add(double)
    pairs = zip(workers.run(number, range(5)), workers.run(number, range(20, 25)), strict=True)
    assert [(int(a[0]), int(b[0])) for a, b in pairs] == [(i, 20 + i) for i in range(5)]


def test_a_task_that_is_added_later_is_known():
    workers = Workers(1)
    first = workers.add(double)
    assert len(list(workers.run(first, range(3)))) == 3
    began = workers.run(first, range(8))
    next(began)
    second = workers.add(process)
    assert [job for job, _ in workers.run(second, range(3))] == [0, 1, 2]
    assert len(list(began)) == 7
    assert [job for job, _ in workers.run(second, range(3))] == [0, 1, 2]


@pytest.mark.parametrize("count", [0, 1])
def test_an_input_error_keeps_its_sentence(count):
    workers = Workers(count)
    number = workers.add(double)
    with pytest.raises(InputError, match=r"^the image number 13 cannot be read$"):
        list(workers.run(number, [1, 13]))
    assert len(list(workers.run(number, [1, 2]))) == 2


@pytest.mark.slow  # torch waits 5 s for the dead
def test_a_process_that_is_killed_is_told_in_one_sentence():
    workers = Workers(1)
    with pytest.raises(
        PcdistillError, match="a process that reads images has ended .*set data.workers lower"
    ) as caught:
        list(workers.run(workers.add(die), [1]))
    assert "\n" not in str(caught.value)
    assert len(list(workers.run(workers.add(double), [1, 2]))) == 2


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    for count in (0, 1):
        workers = Workers(count)
        list(workers.run(workers.add(double), range(3)))
    assert torch.equal(state, torch.get_rng_state())


def test_few_images_take_no_processes_and_ranks_share_the_cores():
    assert choose_workers(None, FEW - 1, 1) == 0
    assert choose_workers(None, FEW, 10_000) == 0
    assert 1 <= choose_workers(None, FEW, 1) <= 8
    assert choose_workers(3, 1, 4) == 3
    with pytest.raises(InputError, match="data.workers must be 0 or more, got -1"):
        choose_workers(-1, 10, 1)
