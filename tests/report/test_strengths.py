"""Comparisons at equal strength: which strength is taken, by what, and how it is shown."""

import json
import re
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from pcdistill.report import comparison_text, write_compare_report
from pcdistill.report.strengths import at_best, best_strengths, by_strength, has_strengths, strength_cells


def result(method: str, seed: int, val: float, test: float | None, strength: float | None = None, **keys: Any) -> dict:
    at = {"epoch": 1, "val": {"top1": val}, "test": None if test is None else {"top1": test}}
    found = {"method": method, "seed": seed, "status": "done", "metric": "top1", "kept": "best", "best": at, "last": at}
    return {**found, "teacher": None, "student": None, **({} if strength is None else {"strength": strength}), **keys}


def some() -> list[dict]:
    """KD is best on validation at 4, and on the test set at 1."""
    rows = [result("none", seed, 50.0 + seed, 50.0 + seed) for seed in range(3)]
    for seed in range(3):
        rows += [result("kd", seed, 60.0 + seed, 69.0 + seed, 1.0), result("kd", seed, 65.0 + seed, 64.0 + seed, 4.0)]
        rows += [result("pcd", seed, 66.0 + seed, 66.5 + seed, 1.0), result("pcd", seed, 61.0 + seed, 70.0 + seed, 4.0)]
    return rows


def test_validation_chooses_the_strength_and_the_test_set_does_not():
    assert best_strengths(some()) == {"kd": 4.0, "pcd": 1.0}


def test_the_comparison_is_of_each_at_its_best_and_of_those_without_a_strength():
    found = {(r["method"], r.get("strength")) for r in at_best(some())}
    assert found == {("none", None), ("kd", 4.0), ("pcd", 1.0)}


def test_the_table_has_every_method_at_every_strength_and_a_star():
    head, *rows = strength_cells(some())
    assert head == ["method", "strength 1", "strength 4"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["kd"][0].startswith("70.00 ±")
    assert not cells["kd"][0].endswith("*")
    assert cells["kd"][1].startswith("65.00 ±")
    assert cells["kd"][1].endswith("*")
    assert cells["pcd"][0].endswith("*")
    assert "none" not in cells


def test_the_verdict_stands_first_and_is_of_the_chosen_strengths():
    text = comparison_text(some())
    assert text.index("Verdict") < text.index("| method") < text.index("At equal strength")
    (row,) = [line for line in text[: text.index("At equal strength")].splitlines() if line.startswith("| kd ")]
    assert "65.00" in row


def test_without_strengths_nothing_changes():
    rows = [result(m, s, 60.0 + s, 61.0 + s + (m == "kd")) for m in ("none", "kd") for s in range(3)]
    assert not has_strengths(rows)
    assert at_best(rows) == rows
    assert "strength" not in comparison_text(rows)


def test_a_strength_at_which_no_run_finished_is_passed_over():
    stopped = [result("kd", s, 0.0, 0.0, 4.0) | {"status": "stopped", "best": None, "last": None} for s in range(2)]
    rows = [*stopped, *(result("kd", s, 40.0 + s, 41.0 + s, 1.0) for s in range(2))]
    assert best_strengths(rows) == {"kd": 1.0}
    assert by_strength(rows)["kd"][4.0].n == 0
    assert comparison_text(rows)


@pytest.mark.parametrize("strength", [4.0, None])
def test_a_method_of_which_no_run_finished_stays_in_the_table_with_its_reasons(strength, tmp_path):
    gone = {"status": "stopped", "best": None, "last": None, "notes": ["the loss is not finite"]}
    rows = [result("kd", s, 0.0, 0.0, strength) | gone for s in range(2)]
    rows += [result("pcd", s, 40.0 + s, 41.0 + s, 4.0) for s in range(2)]
    for found in (rows, rows[:2]):  # with another method that finished, and alone
        text = comparison_text(found)
        assert "kd, seed 1: stopped: the loss is not finite" in text
        assert re.search(r"\| kd +\| +0/2 \|", text)
        write_compare_report(tmp_path, found, {}, "")
        assert "the loss is not finite" in (tmp_path / "report.html").read_text()
    assert "No paired test: no run of kd gave a value." in comparison_text(rows)
    assert "there is no kd among the methods" in comparison_text([*rows[2:], result("none", 0, 1.0, 1.0)])


@given(st.permutations(range(15)))
def test_the_order_of_the_runs_does_not_matter(order):
    rows = some()
    shuffled = [rows[i] for i in order if i < len(rows)]
    assert best_strengths(shuffled) == best_strengths(rows)
    assert sorted(map(json.dumps, at_best(shuffled))) == sorted(map(json.dumps, at_best(rows)))


def test_the_page_the_table_and_the_csv_show_the_strengths(tmp_path):
    page, table, csv = write_compare_report(tmp_path, some(), {}, "pcdistill compare")
    text = page.read_text()
    assert "At equal strength" in text
    assert "accuracy against strength, by method" in text
    assert "each method at its best strength" in text
    assert "strength 4" in table.read_text()
    lines = csv.read_text().splitlines()
    assert "strength" in lines[0].split(",")
    assert len(lines) == 1 + 15


def test_a_single_seed_has_no_interval():
    rows = [result("kd", 0, 60.0, 61.0, 1.0), result("kd", 0, 62.0, 63.0, 4.0)]
    assert strength_cells(rows)[1] == ["kd", "61.00", "63.00 *"]


@pytest.mark.parametrize("value", [True, "4", None, [4]])
def test_what_is_no_number_is_no_strength(value):
    assert not has_strengths([result("kd", 0, 60.0, 61.0, None) | {"strength": value}])
