"""The page, the table and the CSV file of a comparison: they agree, and say what stopped."""

import csv

import pytest

from pcdistill.report import compare_rows, format_table, write_compare_report
from tests.report.runs import (
    curves_of,
    make_comparison,
    make_result,
    make_short,
    page_of,
    stopped,
)


def test_the_three_files_of_a_comparison_agree(tmp_path):
    results = make_comparison()
    command = "pcdistill compare --methods none,kd,dkd,pcd --seeds 3"
    page_path, table, csv_path = write_compare_report(tmp_path, results, curves_of(results), command)
    page, text = page_of(page_path), table.read_text()
    with open(csv_path, newline="") as file:
        lines = list(csv.DictReader(file))
    assert format_table(compare_rows(results)) in text
    assert command in text
    assert command in page.text
    assert page.tags.count("svg") == 4
    assert "dkd, seed 2: stopped" in page.text
    assert len(lines) == len(results) == 12
    pcd = [float(line["best/test/top1"]) for line in lines if line["method"] == "pcd"]
    assert pcd == [91.0, 91.1, 91.5]
    assert next(line for line in lines if line["status"] == "stopped")["best/test/top1"] == ""
    row = compare_rows(results)[-1]
    assert f"{row.best.mean:.2f} ± {row.best.ci95:.2f}" in page.text
    assert f"{row.best.mean:.2f} ± {row.best.ci95:.2f}" in text


@pytest.mark.slow
def test_a_comparison_written_twice_is_the_same_bytes(tmp_path):
    results = make_comparison()
    first = [p.read_bytes() for p in write_compare_report(tmp_path / "a", results, curves_of(results), "x")]
    second = [p.read_bytes() for p in write_compare_report(tmp_path / "b", results[::-1], curves_of(results), "x")]
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("methods", [1, 2, 14])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_method_and_many_and_a_single_seed_draw_without_warnings(tmp_path, methods, seeds):
    names = ["kd", "pcd", "none", *(f"method_{i}" for i in range(11))][:methods]
    results = [make_result(name, s, 90.0 + i + s) for i, name in enumerate(names) for s in range(seeds)]
    page = page_of(write_compare_report(tmp_path, results, curves_of(results), "")[0])
    assert page.tags.count("svg") == 2 + (2 if methods <= 6 else methods)  # seeds, and curves


def test_a_comparison_in_which_nothing_finished_and_one_without_runs_have_pages(tmp_path):
    page = page_of(write_compare_report(tmp_path / "a", [stopped("kd"), stopped("pcd")], {}, "")[0])
    assert "2 of 2 runs gave no value" in page.text
    assert "svg" not in page.tags
    assert "No runs" in page_of(write_compare_report(tmp_path / "b", [], {}, "")[0]).text


def test_the_verdict_stands_first_in_text_and_page_and_what_is_better_first_in_it(tmp_path):
    page_path, table, _ = write_compare_report(tmp_path, make_short(), {}, "x")
    text, page = format_table(compare_rows(make_short())), page_of(page_path).text
    said = [line for line in text.splitlines() if " against kd: " in line]
    assert said[:2] == [
        "- pcd against kd: better by 2.00 points (1.75 to 2.25).",
        "- near against kd: no difference greater than 0.5 points, tested as such.",
    ]
    assert said[2].startswith("- wide against kd: cannot tell: with 3 seeds a difference under ")
    assert text.startswith("Verdict, test top-1 of the best epoch:\n\n- pcd against kd")
    assert text in table.read_text()
    assert page.index("pcd against kd better by 2.00 points (1.75 to 2.25)") < page.index("against kd p")


def test_without_a_pair_there_is_no_verdict(tmp_path):
    results = [make_result("none", 0), make_result("pcd", 0)]
    assert "Verdict" not in format_table(compare_rows(results))
    assert "Verdict" not in page_of(write_compare_report(tmp_path, results, {}, "")[0]).text


def test_equal_seeds_do_not_look_like_certainty(tmp_path):
    results = make_short({"kd": [60.0, 60.0, 60.0], "pcd": [61.0, 61.0, 61.0]})
    text = format_table(compare_rows(results))
    page = page_of(write_compare_report(tmp_path, results, {}, "")[0]).text
    for shown in (text, page):
        assert "60.00 (3 equal)" in shown
        assert "+1.00 (3 equal)" in shown
        assert "± 0.00" not in shown
        assert "The next seed may still give another" in shown
    assert "equal" not in format_table(compare_rows(make_comparison())).lower().replace("at equal seeds", "")


def test_a_bar_that_leaves_the_frame_ends_in_an_arrow_with_its_width(tmp_path):
    results = make_short({"kd": [60.0, 70.0], "pcd": [64.0, 64.2]})
    page = page_of(write_compare_report(tmp_path, results, {}, "")[0])
    assert "± 63.5, 2 seeds" in page.text
    assert "± 1.27, 2 seeds" not in page.text
