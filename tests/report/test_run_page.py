"""The page of one run: what it shows, and that damage or hostile text breaks nothing."""

import math

import pytest

from pcdistill.report import write_compare_report, write_run_report
from tests.report.runs import EVIL, make_result, make_rows, make_run, page_of, scores, stopped


@pytest.mark.slow
def test_a_finished_run_shows_teacher_best_and_last_on_validation_and_test(tmp_path):
    path = write_run_report(make_run(tmp_path / "run"))
    page = page_of(path)
    assert path == tmp_path / "run" / "report.html"
    assert "pcd: cifar/resnet20 → cifar/resnet8" in page.text
    for cell in ("97.00", "96.50", "92.00", "91.00", "91.50", "90.50"):
        assert cell in page.text
    assert "student, best epoch (3), kept" in page.text
    assert "student, last epoch (4)" in page.text
    assert "pcdistill distill --data digits" in page.text
    assert "abc1234" in page.text
    assert "chosen without the test set" in page.text
    assert page.tags.count("svg") == 6  # two panels of curves, four of terms


def test_every_term_of_the_loss_has_a_curve_with_its_name(tmp_path):
    page = page_of(write_run_report(make_run(tmp_path)))
    terms = page.text[page.text.index("Loss terms") : page.text.index("How it was made")]
    for name in ("total loss", "ce", "pcd", "learning rate"):
        assert name in terms


@pytest.mark.slow
def test_the_page_is_the_same_bytes_when_it_is_written_again(tmp_path):
    run = make_run(tmp_path)
    assert write_run_report(run).read_bytes() == write_run_report(run).read_bytes()


def test_a_killed_run_without_result_gets_its_page(tmp_path):
    page = page_of(write_run_report(make_run(tmp_path, result=False, rows=make_rows(2))))
    assert "not finished" in page.text
    assert "2 of 4" in page.text
    assert "its record ends after epoch 2" in page.text
    assert "result.json is not in the folder" in page.text
    assert "Best on validation so far: 74.00 % top-1, in epoch 2" in page.text


def test_every_session_of_a_run_is_a_line_in_words(tmp_path):
    later = {"started": "2026-11-26T10:00:00Z", "versions": {"torch": "2.16.0"}, "gpu": None}
    run = make_run(tmp_path, environment={"cpu": "x86_64", "continued": [later, {"threads": 4}]})
    text = page_of(write_run_report(run)).text
    assert "continued started 2026-11-26T10:00:00Z, versions torch 2.16.0, gpu –" in text
    assert "continued threads 4" in text
    assert "[{" not in text


def test_a_diverged_run_says_why(tmp_path):
    page = page_of(write_run_report(make_run(tmp_path, result=stopped(), rows=make_rows(1))))
    assert "the loss is not finite in epoch 2" in page.text
    assert "stopped" in page.text


def test_an_empty_folder_gets_a_page_that_names_what_is_missing(tmp_path):
    page = page_of(write_run_report(tmp_path))
    for name in ("recipe.yaml", "environment.json", "result.json", "metrics.csv"):
        assert f"{name} is not in the folder" in page.text


def test_files_cut_off_in_the_middle_are_named(tmp_path):
    run = make_run(tmp_path)
    (run / "result.json").write_text('{"status": "do')
    (run / "recipe.yaml").write_text("a: [1, {")
    (run / "environment.json").write_bytes(b"\xff\xfe{")
    (run / "metrics.csv").write_text("epoch,val/top1\n1,50\n2,")
    text = page_of(write_run_report(run)).text
    assert "result.json is not valid JSON" in text
    assert "recipe.yaml is not valid YAML" in text
    assert "environment.json could not be read" in text
    assert "50.00 % top-1, in epoch 1" in text


def test_empty_missing_and_infinite_cells_break_no_chart(tmp_path):
    rows = make_rows()
    rows[1]["val/top1"], rows[2]["train/loss"], rows[3]["train/pcd"] = "", math.nan, math.inf
    rows[2]["train/ce"] = "oops"
    for row in rows:
        del row["train/top1"]
    rows[3]["val_ema/top1"] = 80.0
    page = page_of(write_run_report(make_run(tmp_path, rows=rows)))
    assert "not finite numbers, in: train/ce, train/loss, train/pcd" in page.text
    assert "averaged weights" in page.text


@pytest.mark.slow
def test_nan_in_the_result_is_a_dash(tmp_path):
    result = make_result()
    result["last"]["test"] = scores(math.nan)
    text = page_of(write_run_report(make_run(tmp_path, result=result))).text
    assert "nan" not in text.lower()
    assert "–" in text


@pytest.mark.slow
def test_without_a_test_set_there_are_no_test_columns(tmp_path):
    result = make_result(notes=["no test set"])
    for who in ("teacher", "best", "last"):
        result[who]["test"] = None
    text = page_of(write_run_report(make_run(tmp_path, result=result))).text
    assert "no test set" in text
    assert "91.00" not in text
    assert "92.00" in text


@pytest.mark.slow
def test_a_student_trained_alone_has_no_teacher(tmp_path):
    text = page_of(write_run_report(make_run(tmp_path, result=make_result("none")))).text
    assert "cifar/resnet8, trained alone" in text
    assert "resnet20" not in text


def test_a_detector_shows_ap_and_classes(tmp_path):
    at = {"map": 41.25, "map_50": 60.0, "map_75": 44.0, "per_class": {"cat <b>": 50.5, "dog": 32.0}}
    result = make_result(task="detection", metric="map")
    for who in ("teacher", "best", "last"):
        result[who].update(val=at, test=None)
    rows = [{"epoch": e, "train/loss": 3.0 / e, "val/map": 10.0 * e} for e in (1, 2, 3)]
    page = page_of(write_run_report(make_run(tmp_path, result=result, rows=rows)))
    assert "AP (%)" in page.text
    assert "41.25" in page.text
    assert "cat <b>" in page.text


@pytest.mark.slow
def test_everything_that_a_user_named_is_escaped(tmp_path):
    result = make_result(EVIL, data=EVIL, notes=[EVIL], status=EVIL, kept="best")
    result["student"]["name"] = result["teacher"]["name"] = EVIL
    result["best"]["test"] = {"top1": 90.0, EVIL: 1.0, "per_class": {EVIL: 1.0}}
    rows = [{**row, f"train/{EVIL}": 1.0} for row in make_rows()]
    run = make_run(
        tmp_path / "x", result=result, rows=rows, recipe={EVIL: EVIL}, environment={EVIL: EVIL, "command": EVIL}
    )
    page = page_of(write_run_report(run))
    assert "script" not in page.tags
    assert EVIL in page.text
    results = [dict(result, seed=0), dict(result, seed=1, status="done"), make_result("kd", 1)]
    page = page_of(write_compare_report(tmp_path / "c", results, {(EVIL, 1): rows}, EVIL)[0])
    assert "script" not in page.tags
    assert "<script>alert" in page.text
