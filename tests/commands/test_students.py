"""`pcdistill compare --students`: a comparison for each, one teacher for all, and their page."""

import pytest

from pcdistill.commands.compare import Plan
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
