"""Classes, confusions and images of a run's answers, against counts made by loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pcdistill.report import write_run_report
from pcdistill.report.answers import Answers, class_table, confusions_of, interesting, paired, read_answers
from tests.report.runs import CLASSES, make_answers, make_run, page_of


@st.composite
def answers(draw, most_classes=20):
    k = draw(st.integers(1, most_classes))
    n = draw(st.integers(1, 40))
    label = st.lists(st.integers(0, k - 1), min_size=n, max_size=n).map(np.array)
    p = st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n).map(lambda v: np.array(v, dtype=np.float32))
    teacher = draw(st.booleans())
    parts = [draw(label), draw(label), draw(p), *((draw(label), draw(p)) if teacher else (None, None))]
    return Answers([f"c{i}" for i in range(k)], "test", *parts)


@given(answers())
def test_classes_are_counted_as_by_hand_and_the_worst_stands_first(found):
    table = class_table(found)
    for name, images, share, *_ in table["per_class"]:
        of = [i for i in range(len(found)) if found.classes[found.target[i]] == name]
        right = sum(found.student[i] == found.target[i] for i in of)
        assert (images, share) == (f"{len(of):,}", f"{100 * right / len(of):.1f}")
    shares = [float(row[2]) for row in table["per_class"]]
    assert shares == sorted(shares)
    assert sum(int(row[1]) for row in table["per_class"]) == len(found)


@given(answers())
def test_confusions_are_the_errors(found):
    shown = confusions_of(found)
    errors = int((found.student != found.target).sum())
    if shown is None:
        assert errors == 0
        return
    listed = sum(int(row[1]) for row in shown["rows"])
    assert listed == errors or len(shown["rows"]) == 12
    if shown["matrix"] is not None:
        assert sum(n for _, cells in shown["matrix"] for n, _, right in cells if not right) == errors
        assert sum(n for _, cells in shown["matrix"] for n, _, _ in cells) == len(found)


@given(answers())
def test_the_images_shown_are_those_that_the_teacher_would_have_got_right(found):
    rows = interesting(found, most=100)
    teacher = found.target if found.teacher is None else found.teacher
    assert sorted(rows) == [
        i for i in range(len(found)) if found.student[i] != found.target[i] and teacher[i] == found.target[i]
    ]


@pytest.mark.slow
@given(answers(), st.randoms())
def test_two_students_are_compared_by_mcnemars_test(a, random):
    other = np.array([random.choice([x, y]) for x, y in zip(a.student, a.target, strict=True)])
    b = Answers(a.classes, a.split, a.target, other, a.student_p)
    kind, text = paired(a, b)
    only_a = sum((a.student == a.target) & (b.student != a.target))
    only_b = sum((a.student != a.target) & (b.student == a.target))
    p = binomtest(int(only_a), int(only_a + only_b)).pvalue if only_a + only_b else 1.0
    assert kind == ("alike" if p >= 0.05 else "better" if only_a > only_b else "worse")
    if only_a + only_b:
        assert f"p = {p:.2g})" in text
    assert paired(a, Answers(a.classes, "val", a.target, other, a.student_p)) == ("", "")


def test_a_page_shows_classes_confusions_and_images(tmp_path):
    page = page_of(write_run_report(make_run(make_answers(tmp_path / "run"))))
    for text in (
        "Hardest for the student:",
        "Of 40 test images",
        "What the student takes for what",
        "What the student gets wrong and the teacher right",
        "4 of 40 test images; the other way round 0; both wrong 4.",
        "img 0.png",
    ):
        assert text in page.text
    assert all(name in page.text for name in CLASSES)
    assert page.tags.count("img") == 3


def test_many_classes_are_folded_and_no_matrix(tmp_path):
    classes = [f"class {i}" for i in range(33)]
    page = page_of(write_run_report(make_run(make_answers(tmp_path, 330, classes=classes))))
    assert "All 33 classes" in page.text
    assert "true ↓ answer →" not in page.text
    assert "rarer ones are not listed" in page.text


def test_a_student_without_a_teacher_shows_what_it_gets_wrong(tmp_path):
    found = read_answers(make_answers(tmp_path, teacher=False))
    assert class_table(found)["per_class_head"] == ["class", "images", "student (%)"]
    assert "What the student gets wrong" in page_of(write_run_report(make_run(tmp_path))).text


def test_damaged_answers_are_left_out(tmp_path):
    run = make_run(tmp_path)
    for content in (b"", b"PK\x03\x04", b"nonsense"):
        (run / "answers.npz").write_bytes(content)
        assert read_answers(run) is None
    assert "Classes" not in page_of(write_run_report(run)).text
