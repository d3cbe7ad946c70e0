"""What a run gets on a node, and the nodes that cannot carry one out."""

import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch

import pcdistill
from pcdistill.commands.jobs import Terminated, sigterm_as_interrupt
from pcdistill.errors import InputError
from pcdistill.files import PART

pytest.importorskip("ray")

from pcdistill.commands import cluster_nodes as module
from pcdistill.commands.cluster_nodes import Place, Wanted


@pytest.mark.parametrize(
    ("place", "resources", "expected"),
    [
        ((1, 0), {"CPU": 8.0}, 8),
        ((3, 0), {"CPU": 8.0}, 2),
        ((1, 0.5), {"CPU": 8.0, "GPU": 2.0}, 4),
        ((1, 0.4), {"CPU": 8.0, "GPU": 2.0}, 4),
        ((1, 0.1), {"CPU": 99.0, "GPU": 1.0}, 10),
        ((1, 1 / 93), {"CPU": 99.0, "GPU": 1.0}, 93),  # whose inverse is a little less than 93
        ((4, 0.5), {"CPU": 8.0, "GPU": 2.0}, 2),
        ((1, 1), {"CPU": 8.0, "GPU": 3.0}, 3),
        ((1, 1), {"CPU": 8.0}, 0),
        ((1, 0), {}, 0),
    ],
)
def test_a_node_takes_the_runs_that_fit(place, resources, expected):
    assert Place(*place, Path(), Path()).fits(resources) == expected


@pytest.mark.parametrize(
    ("wanted", "device", "expected"),
    [
        (Wanted("auto"), "cpu", (1, 0)),
        (Wanted("auto"), "auto", (4, 1)),
        (Wanted("auto", gpus=0.5), "auto", (2, 0.5)),
        (Wanted("auto", threads=3), "cuda", (3, 1)),
        (Wanted("auto", gpus=0), "auto", (1, 0)),
    ],
)
def test_a_run_gets_its_part_of_a_node(wanted, device, expected, tmp_path):
    nodes = [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0, "GPU": 8.0}]
    place = module.place_of(wanted, device, nodes, tmp_path / "not" / "there")
    assert (place.threads, place.gpus) == expected
    assert place.token.parent == tmp_path
    assert PART.fullmatch(place.token.name)["pid"] == str(os.getpid())


@pytest.mark.parametrize(
    ("wanted", "device", "said"),
    [
        (Wanted("auto", threads=9), "cpu", "has 9 CPUs for a run (they have 1 CPU, 8 CPUs and 2 GPUs); lower"),
        (Wanted("auto", threads=8, gpus=1), "cpu", None),
        (Wanted("auto", threads=9, gpus=0.5), "auto", "has 9 CPUs and 0.5 GPUs for a run"),
    ],
)
def test_a_run_that_fits_no_node_is_refused_with_what_the_nodes_have(wanted, device, said, tmp_path):
    nodes = [{"CPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}]
    if said is None:
        assert module.place_of(wanted, device, nodes, tmp_path).threads == 8
        return
    with pytest.raises(InputError, match=re.escape(said)):
        module.place_of(wanted, device, nodes, tmp_path)
    with pytest.raises(InputError, match="has 1 CPU and 1 GPU for a run"):
        module.place_of(Wanted("auto"), "cuda", [{"CPU": 4.0}], tmp_path)


ANSWER = {"version": "1", "torch": "2", "folder": True, "token": True}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({}, None),
        ({"version": None}, "node n has no pcdistill; install version 1 "),
        ({"version": "2"}, "node n has pcdistill 2, this machine 1; install the same version everywhere"),
        ({"torch": None}, "node n has no torch; install version 2 "),
        ({"torch": "2.1"}, "node n has torch 2.1, this machine 2; install the same version everywhere"),
        ({"token": False}, "node n does not see /shared; name an --out on a disk that all nodes share"),
        ({"folder": False}, "node n does not see /folder; start the command in a folder that all nodes share"),
    ],
)
def test_a_node_that_cannot_carry_out_a_run_says_why(answer, said):
    place = Place(1, 0, Path("/folder"), Path("/shared/token"), "1", "2")
    found = module.fault_of("n", {**ANSWER, **answer}, place)
    assert found == said or found.startswith(said)


def test_a_node_looks_for_the_file_that_was_just_written(tmp_path):
    look, token = module.looker(), tmp_path / "token"
    here = {"version": pcdistill.__version__, "torch": torch.__version__.split("+")[0], "folder": True, "token": False}
    assert look(str(token), str(tmp_path)) == here
    token.write_text("of another disk")
    assert look(str(token), str(tmp_path)) == here
    token.write_text("token")
    assert look(str(token), str(tmp_path / "none")) == {**here, "folder": False, "token": True}


@pytest.fixture
def answering(monkeypatch):
    """A cluster with a node of 4 CPUs, whose head answers while the event is set."""
    answers = threading.Event()
    answers.set()

    def nodes():
        answers.wait()
        return [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 9.0}}]

    monkeypatch.setattr(module.ray, "nodes", nodes)
    yield answers
    answers.set()


@pytest.mark.slow
def test_a_head_that_answers_is_not_lost(answering, monkeypatch):
    monkeypatch.setattr(module, "LOST_SECONDS", 1)
    nodes = module.Nodes(Place(1, 0, Path(), Path()))
    with nodes.watched():
        time.sleep(2.5)
    assert (nodes.lost, nodes.rooms) == (False, [4])
    assert not any(thread.is_alive() for thread in nodes._threads)


@pytest.mark.slow
def test_a_head_that_does_not_answer_is_lost_and_the_main_thread_is_told(answering, monkeypatch):
    monkeypatch.setattr(module, "LOST_SECONDS", 1)
    nodes = module.Nodes(Place(1, 0, Path(), Path()))
    answering.clear()
    with pytest.raises(Terminated), sigterm_as_interrupt(), nodes.watched():
        time.sleep(30)
    assert nodes.lost
