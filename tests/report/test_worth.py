"""The first sentence of a run's page, and its costs."""

import json

import pytest

from pcdistill.report import write_run_report
from pcdistill.report._folder import read_run
from pcdistill.report.worth import cost_cells, ratio
from tests.report.runs import make_answers, make_result, make_run, page_of, stopped


def page(path):
    return page_of(write_run_report(path)).text


@pytest.mark.slow
def test_without_a_baseline_the_page_says_how_to_ask(tmp_path):
    text = page(make_run(tmp_path))
    first = "The student reaches 91.00 % test top-1, 5.50 points below its teacher, with 1/3.49 of its parameters."
    assert text.index(first) < text.index("Result")
    assert "only the same student trained alone can say. Ask for it: pcdistill distill --data digits --baseline" in text


@pytest.mark.slow
def test_a_run_of_a_comparison_points_to_its_page(tmp_path):
    run = make_run(tmp_path, environment={"command": "pcdistill compare --data digits"})
    assert "says the page of the comparison" in page(run)
    assert "--baseline" not in page(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "first"),
    [
        (0, "Whether the teacher helped cannot be told: with it the student has 91.00 % test top-1, trained alone"),
        (1, "The teacher helped, on these images: with it"),
    ],
)
def test_with_a_baseline_the_verdict_stands_first(tmp_path, alone, first):
    run = make_run(make_answers(tmp_path / "run", 200))
    beside = make_run(run / "alone", result=make_result("none", best=91.0 - alone))
    make_answers(beside, 200, teacher=False)
    if alone:  # wrong on many more of the same images
        import numpy as np

        stored = dict(np.load(beside / "answers.npz"))
        stored["student"] = np.where(np.arange(200) % 2 == 0, (stored["target"] + 1) % 4, stored["target"])
        np.savez_compressed(beside / "answers.npz", **stored)
    text = page(run)
    assert text.index(first) < text.index("Result")
    assert "One seed" in text or "one seed each" in text
    assert "pcdistill compare --methods none,kd,pcd --seeds 5" in text
    assert "student alone" in text


@pytest.mark.slow
def test_a_baseline_without_answers_or_unfinished_is_no_proof(tmp_path):
    run = make_run(tmp_path / "run")
    make_run(run / "alone", result=make_result("none", best=90.0))
    text = page(run)
    assert "With it the student has 91.00 % test top-1, trained alone 90.00 %: +1.00 points." in text
    assert "helped" not in text
    make_run(run / "alone", result=stopped("none"))
    assert "Ask for it" in page(run)


@pytest.mark.slow
def test_a_student_alone_and_a_stopped_run(tmp_path):
    assert "Trained without a teacher, the student reaches 91.00 % test top-1." in page(
        make_run(tmp_path / "a", result=make_result("none"))
    )
    assert "reaches" not in page(make_run(tmp_path / "b", result=stopped()))


def test_costs_of_both_with_file_sizes_and_latency(tmp_path):
    run = make_run(tmp_path)
    (run / "student.safetensors").write_bytes(b"x" * 320_000)
    rows = {row[0]: row[1:] for row in cost_cells(read_run(run))}
    assert rows["parameters"] == ["78\xa0k", "272\xa0k", "1/3.49"]
    assert rows["weights file"][:2] == ["320\xa0kB", "1.09\xa0MB"]  # the teacher's: 4 bytes a parameter
    assert "latency of an image (ms)" not in rows
    assert "pcdistill bench" in page(run)
    bench = {
        "rows": [{"who": w, "model": w, "program": "eager", "p50_ms": t} for w, t in (("student", 2), ("teacher", 8))]
    }
    (run / "bench.json").write_text(json.dumps({**bench, "batch_size": 64, "image_size": 32}))
    rows = {row[0]: row[1:] for row in cost_cells(read_run(run))}
    assert rows["latency of an image (ms)"] == ["2", "8", "1/4"]


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(1, 4, "1/4"), (3, 4, "0.75"), (4, 2, "2.00"), (None, 1, None), (0, 1, None)]
)
def test_ratios(part, whole, text):
    assert ratio(part, whole) == text
