"""`pcdistill compare --students`: a comparison for each, one teacher for all, and their page."""

from pathlib import Path

import pytest

from pcdistill.commands.compare import Plan
from pcdistill.commands.machine import machine_result
from pcdistill.commands.pages import remake_pages
from pcdistill.commands.students import compare_students, student_recipes
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from tests.commands.test_pages import pages, small


def of(name):
    return small(student={"name": name})


def test_students_are_names_and_folders():
    found = student_recipes(" cifar/resnet8,mine.py:small", of)
    assert list(found) == ["cifar-resnet8", "small"]
    assert [one.student.name for one in found.values()] == ["cifar/resnet8", "mine.py:small"]
    with pytest.raises(InputError, match="would have the folder teacher, which is the teacher's"):
        student_recipes("x.py:teacher,b", of)
    for text, says in (("a", "two students"), ("a,a", "each once"), ("x.py:m,y.py:m", "both have the folder m")):
        with pytest.raises(InputError, match=says):
            student_recipes(text, of)
    with pytest.raises(InputError, match="weights are of one student"):
        student_recipes("a,b", lambda name: small(student={"name": name, "weights": "w.safetensors"}))


@pytest.mark.slow
def test_every_student_has_its_comparison_and_the_teacher_is_trained_once(tmp_path):
    students = student_recipes("cifar/resnet8,cifar/resnet14", of)
    plan = Plan(["none", "kd"], 1, jobs=1)
    told = {"console": Console(quiet=True), "command": "pcdistill compare --students a,b"}
    text = compare_students(small(), students, plan, tmp_path / "out", **told)
    assert "cifar/resnet14" in text
    assert [path.parent.name for path in (tmp_path / "out").rglob("teacher/teacher.safetensors")] == ["teacher"]
    before = pages(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The highest mean is cifar/resnet" in page
    assert compare_students(small(), students, plan, tmp_path / "out", **told) == text
    assert tmp_path / "out" / "report.html" in remake_pages(tmp_path / "out")
    assert pages(tmp_path / "out") == before
    with pytest.raises(InputError, match="unknown model|did you mean|resnet9"):
        compare_students(small(), student_recipes("cifar/resnet8,cifar/resnet9", of), plan, tmp_path / "b", **told)


@pytest.mark.parametrize("text", ["{", "[]", '{"folders": "a"}', '{"folders": ["../a"]}', '{"folders": ["/tmp/a"]}'])
def test_a_record_of_students_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "students.json").write_text(text)
    with pytest.raises(InputError, match=r"students\.json is damaged"):
        remake_pages(tmp_path)


@pytest.mark.slow
def test_another_plan_in_the_same_folder_has_a_page_of_its_own_runs(tmp_path):
    """Runs of the plan before stay where they are, and are in no page and in no JSON of the new one."""
    students = student_recipes("cifar/resnet8,cifar/resnet14", of)
    told = {"console": Console(quiet=True), "command": "pcdistill compare --students a,b"}
    out = tmp_path / "out"
    compare_students(small(), students, Plan(["none", "kd"], 1, jobs=1), out, **told)
    weighted = (out / "report.html").read_text()
    for plan in (Plan(["none", "kd"], 1, strengths=[2.0], jobs=1), Plan(["kd"], 1, jobs=1)):
        compare_students(small(), students, plan, out, **told)
        before = pages(out)
        assert before[out / "report.html"].decode() != weighted
        remake_pages(out)
        assert pages(out) == before
        found = machine_result("compare", out)
        assert {row["method"] for row in found["runs"]} == set(plan.methods)
        assert {row["student"] for row in found["runs"]} == {"cifar/resnet8", "cifar/resnet14"}
        assert all(Path(table).is_file() for table in found["tables"].values())
    (out / "students.json").write_text("{")
    with pytest.raises(InputError, match=r"students\.json is damaged"):
        remake_pages(out)
    (out / "cifar-resnet8" / "kd" / "seed-0" / "result.json").write_text('{"status": "do')
    with pytest.raises(InputError, match=r"kd.seed-0.result\.json is damaged; the command that made it trains"):
        remake_pages(out / "cifar-resnet8")
