"""Teachers that are trained first: what may go beside them, with how many threads, and how a failure ends all."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from pcdistill.commands import compare as compare_module
from pcdistill.commands.compare import Plan, compare
from pcdistill.commands.first_teachers import check_weights, in_order, one_spelling, teacher_threads
from pcdistill.commands.jobs import Job, Machine, Outcome
from pcdistill.engine.console import Console
from pcdistill.errors import InputError, PcdistillError, TrainingStopped
from pcdistill.recipe import Recipe, load_recipe, with_method


def small(**keys):
    values = {"train.epochs": 1, "teacher.epochs": 4, "data.limit": 300, "data.batch_size": 50, **keys}
    return load_recipe("digits", values=values)


def test_a_folder_has_one_spelling(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a")
    for text in ("b", "./b", "../a/b", str(tmp_path / "a" / "b")):
        assert one_spelling(Path(text)) == Path("b")
    assert one_spelling(Path("../c")) == (tmp_path / "c").resolve()


@pytest.mark.slow
def test_a_comparison_goes_on_under_another_spelling_and_without_its_teachers_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = replace(small(**{"teacher.epochs": 1}), allow=("weak-teacher",))
    plan, told = Plan(["kd"], 1, jobs=1), {"console": Console(quiet=True)}
    first = compare(recipe, plan, Path("out"), **told)
    assert compare(recipe, plan, tmp_path / "out", **told) == first
    for file in (*Path("out/teacher").glob("*.safetensors"), *Path("out/teacher").glob("*.pt")):
        file.unlink()
    assert compare(recipe, plan, Path("out"), **told) == first
    with pytest.raises(InputError, match="weights file out/teacher/teacher.safetensors does not exist"):
        compare(recipe, replace(plan, seeds=2), Path("out"), **told)


@pytest.mark.slow
def test_a_student_alone_stays_what_it_is_when_methods_come_and_go(tmp_path):
    recipe = replace(small(**{"teacher.epochs": 1, "data.limit": 60}), allow=("weak-teacher",))
    made = []
    for methods in (["none"], ["none", "kd"], ["none"]):
        compare(recipe, Plan(methods, 1, jobs=1), tmp_path / "out", console=Console(quiet=True))
        made.append((tmp_path / "out" / "none" / "seed-0" / "last.pt").stat().st_mtime_ns)
        assert (tmp_path / "out" / "teacher").exists() == (len(made) > 1)
    assert len(set(made)) == 1
    without = replace(recipe, teacher=replace(recipe.teacher, epochs=0))  # a teacher that cannot be had
    compare(without, Plan(["none"], 1, jobs=1), tmp_path / "b", console=Console(quiet=True))


def test_what_a_comparison_leaves_out_is_said_before_anything_is_trained(tmp_path, capsys):
    """A term without a teacher, and losses that stand in the recipe itself."""
    alone = replace(small(), teacher=None)
    with pytest.raises(InputError, match="kd: the terms kd need a teacher; name one, or use method none"):
        compare(alone, Plan(["none", "kd"], 1, jobs=1), tmp_path / "a", console=Console(quiet=True))
    assert not list((tmp_path / "a").glob("*/seed-*"))
    losses = [{"method": "ce", "weight": 0.5}, {"method": "kd", "weight": 3.0, "temperature": 1.5}]
    own = small(**{"method": "kd", "losses": losses, "data.limit": 60})
    compare(own, Plan(["none"], 1, jobs=1), tmp_path / "b", console=Console(quiet=True))
    assert "the recipe's own losses are left out: kd is compared as its name stands for it" in capsys.readouterr().err
    compare(small(**{"method": "kd", "data.limit": 60}), Plan(["none"], 1, jobs=1), tmp_path / "c", console=Console())
    assert "own losses" not in capsys.readouterr().err


def job(name: str, method: str, role: str = "student") -> Job:
    return Job(name, with_method(small(), method, 0), Path(name), role=role)


TEACHERS = [job("teacher", "none", "teacher"), job("teacher-2", "none", "teacher")]
STUDENTS = [job(*pair) for pair in (("a", "none"), ("b", "kd"), ("c", "none"), ("d", "kd"), ("e", "none"))]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, "teacher teacher-2 a c e - -"),
        ({2: "teacher", 3: "teacher-2"}, "teacher teacher-2 a b c d e"),
        ({1: "teacher"}, "teacher teacher-2 a c e - -"),
        ({2: "teacher", 6: "teacher-2"}, "teacher teacher-2 a c e - b d"),
    ],
)
def test_what_needs_a_teacher_waits_for_all_of_them(ends, expected):
    """`ends`: before the job at this place is asked for, this teacher ends."""
    ended: dict[str, Outcome] = {}
    found = []
    order = in_order(TEACHERS, STUDENTS, ended)
    for place in range(len(expected.split())):
        if place in ends:
            ended[ends[place]] = Outcome("done")
        one = next(order)
        found.append("-" if one is None else one.name)
    assert " ".join(found) == expected


def test_the_order_ends_after_the_teachers_where_nothing_waits_for_them():
    ended: dict[str, Outcome] = {}
    order = in_order(TEACHERS, [STUDENTS[0]], ended)
    assert [next(order) for _ in range(4)] == [*TEACHERS, STUDENTS[0], None]
    ended["teacher"] = Outcome("done")
    assert next(order) is None
    ended["teacher-2"] = Outcome("done")
    assert list(order) == []


@pytest.mark.parametrize("asked", [1, 4])  # by then all students alone are under way
@pytest.mark.parametrize(
    ("status", "error"), [("stopped", TrainingStopped), ("failed", InputError), ("refused", PcdistillError)]
)
def test_a_teacher_that_ends_without_weights_ends_all(status, error, asked):
    ended: dict[str, Outcome] = {}
    order = in_order(TEACHERS, [STUDENTS[0]], ended)
    for _ in range(asked):
        next(order)
    ended["teacher"] = Outcome(status, "why it did")
    with pytest.raises(error, match="why it did"):
        next(order)


@dataclass(frozen=True)
class Beside:
    jobs: object = "auto"
    threads: int | None = None
    pool: None = None


@pytest.mark.parametrize(
    ("cores", "alone", "taught", "plan", "threads"),
    [
        (2, 5, 10, Beside(), 1),
        (16, 5, 10, Beside(), 11),  # fifteen places of one thread
        (16, 0, 10, Beside(), None),
        (16, 1, 3, Beside(), 12),  # four places of four threads
        (16, 5, 10, Beside(jobs=1), None),
        (4, 5, 10, Beside(jobs=8), 1),
        (8, 5, 10, Beside(jobs=2, threads=3), 5),
    ],
)
def test_a_teacher_gets_the_threads_that_students_beside_it_leave(monkeypatch, cores, alone, taught, plan, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    runs: list[Recipe] = [with_method(small(), "none", 0)] * alone + [with_method(small(), "kd", 0)] * taught
    assert teacher_threads(runs, plan, "cpu") == threads


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("methods", "jobs", "first"),
    [
        (["kd", "none"], 2, ["teacher", "none, seed 0"]),
        (["kd", "none"], 1, ["kd, seed 0", "none, seed 0"]),
        (["kd", "dist"], 2, ["kd, seed 0", "dist, seed 0"]),
    ],
)
def test_the_teacher_goes_beside_students_only_where_there_is_room_and_one_that_needs_none(
    methods, jobs, first, tmp_path, monkeypatch
):
    """Else it is trained before, in this process."""
    before = []

    def run(self, jobs, **_):
        found = iter(jobs)
        raise Asked([next(found).name for _ in range(2)])

    monkeypatch.setattr(Machine, "run", run)
    monkeypatch.setattr(compare_module, "train_teacher", lambda job, *_: before.append(job.name))
    monkeypatch.setattr(compare_module, "rehearse", lambda *_: [])
    with pytest.raises(Asked) as asked:
        compare(small(), Plan(methods, 1, jobs=jobs), tmp_path / "c", console=Console(quiet=True))
    assert asked.value.args[0] == first
    assert before == ([] if first[0] == "teacher" else ["teacher"])


@pytest.mark.slow
def test_beside_students_a_teacher_gives_what_it_gives_before_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    plan = {"seeds": 1, "threads": 1}
    compare(small(), Plan(["kd", "none"], jobs=2, **plan), tmp_path / "beside", console=Console(quiet=True))
    torch.set_num_threads(1)
    compare(small(), Plan(["kd", "none"], jobs=1, **plan), tmp_path / "before", console=Console(quiet=True))
    for run in ("teacher", "kd/seed-0", "none/seed-0"):
        one, other = (json.loads((tmp_path / way / run / "result.json").read_text()) for way in ("beside", "before"))
        assert one["last"] == other["last"]
        assert one["threads"] == 1


def test_a_teachers_file_that_is_not_there_is_known_before_a_student_alone_is_trained(tmp_path):
    missing = small(**{"teacher.weights": str(tmp_path / "no.pt")})
    with pytest.raises(InputError, match="no.pt does not exist"):
        compare(missing, Plan(["none", "kd"], 1, jobs=2), tmp_path / "c", console=Console(quiet=True))
    assert not (tmp_path / "c" / "none").exists()


def test_a_job_that_goes_on_is_not_asked_for_its_files(tmp_path):
    one = replace(job("b", "kd"), out=tmp_path, recipe=with_method(small(**{"teacher.weights": "no.pt"}), "kd", 0))
    with pytest.raises(InputError, match="no.pt does not exist"):
        check_weights([one], [])
    (tmp_path / "last.pt").touch()
    check_weights([one], [])


def test_a_student_alone_is_not_asked_for_a_teachers_file(tmp_path):
    alone = with_method(small(**{"teacher.weights": "no.pt"}), "none", 0)
    check_weights([replace(job("a", "none"), out=tmp_path, recipe=alone)], [])


def test_runs_that_are_left_have_the_threads_that_all_had(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    compare(small(), Plan(["none"], 1, jobs=1, threads=1), tmp_path, console=Console(quiet=True))

    def run(self, jobs, **_):
        raise Asked([place.threads for place in self.places], [one.name for one in jobs])

    monkeypatch.setattr(Machine, "run", run)
    with pytest.raises(Asked) as asked:
        compare(small(), Plan(["none"], 2), tmp_path, console=Console(quiet=True))
    assert asked.value.args == ([1, 1], ["none, seed 1"])


@pytest.mark.slow
def test_a_comparison_ends_with_its_teacher_and_goes_on(tmp_path):
    wrong = small(**{"optim.lr": 1e30, "optim.clip_norm": None, "optim.warmup_epochs": 0.0, "train.epochs": 60})
    with pytest.raises(TrainingStopped, match="not finite"):
        compare(wrong, Plan(["kd", "none"], 1, jobs=2, threads=1), tmp_path / "c", console=Console(quiet=True))
    assert not (tmp_path / "c" / "kd").exists()
    with pytest.raises(TrainingStopped, match="not finite"):
        compare(wrong, Plan(["kd", "none"], 1, jobs=2, threads=1), tmp_path / "c", console=Console(quiet=True))
