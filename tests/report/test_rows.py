"""Rows of a comparison: counts, means, intervals, paired tests and verdicts as scipy has them."""

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

from pcdistill.report import compare_rows, format_table
from pcdistill.stats import verdicts
from tests.report.runs import (
    SHORT,
    make_comparison,
    make_result,
    make_short,
    scores,
    stopped,
)


def test_rows_come_teacher_none_kd_then_by_name():
    rows = compare_rows(make_comparison()[::-1])
    assert [row.name for row in rows] == ["teacher: cifar/resnet20", "none", "kd", "dkd", "pcd"]
    assert [row.kind for row in rows] == ["teacher", *["method"] * 4]


def test_means_intervals_and_paired_tests_are_scipys():
    rows = {row.name: row for row in compare_rows(make_comparison())}
    pcd, kd = [91.0, 91.1, 91.5], [90.0, 90.4, 90.1]
    low, high = stats.t.interval(0.95, 2, loc=sum(pcd) / 3, scale=stats.sem(pcd))
    assert rows["pcd"].best.mean - rows["pcd"].best.ci95 == pytest.approx(low)
    assert rows["pcd"].best.mean + rows["pcd"].best.ci95 == pytest.approx(high)
    assert rows["pcd"].best_difference.p == pytest.approx(stats.ttest_rel(pcd, kd).pvalue)
    assert rows["pcd"].best_difference.n == 3
    assert rows["pcd"].last.mean == pytest.approx(91.2 - 0.6)
    assert math.isnan(rows["kd"].best_difference.p)


def test_pairs_are_formed_by_seed_not_by_position():
    results = [make_result("kd", s, 90.0 + s) for s in range(4)] + [make_result("pcd", s, 91.0 + s) for s in (3, 1)]
    pcd = next(row for row in compare_rows(results) if row.name == "pcd")
    assert pcd.best_difference.n == 2
    assert pcd.best_difference.mean == pytest.approx(1.0)


def test_holms_correction_counts_the_methods_compared():
    rows = {row.name: row for row in compare_rows(make_comparison())}
    smallest = min((rows[name].best_difference.p, name) for name in ("none", "dkd", "pcd"))
    assert rows[smallest[1]].best_p_holm == pytest.approx(3 * smallest[0])
    assert "p (Holm)" in format_table(list(rows.values()))
    assert "p (Holm)" not in format_table(compare_rows([r for r in make_comparison() if r["method"] in ("kd", "pcd")]))


def test_stopped_runs_are_counted_and_shown():
    rows = compare_rows(make_comparison())
    dkd = next(row for row in rows if row.name == "dkd")
    assert (dkd.runs, dkd.finished) == (3, 2)
    assert dkd.best.n == 2
    text = format_table(rows)
    assert "2/3" in text
    assert "dkd, seed 2: stopped: the loss is not finite in epoch 2" in text
    assert "1 of 12 runs gave no value" in text


def test_a_method_of_which_every_run_stopped_keeps_its_row():
    rows = compare_rows([make_result("kd", 0), make_result("kd", 1, 92.0), stopped("pcd", 0), stopped("pcd", 1)])
    line = next(line for line in format_table(rows).splitlines() if line.startswith("| pcd"))
    assert "0/2" in line
    assert "–" in line
    assert "nan" not in format_table(rows)


def test_a_done_run_without_a_finite_metric_is_a_failure_not_a_number():
    broken = make_result("pcd", 1)
    broken["last"]["test"] = scores(math.nan)
    row = compare_rows([make_result("pcd", 0), broken])[-1]
    assert (row.split, row.finished, row.runs) == ("test", 1, 2)
    assert row.best_values == {0: 91.0}
    assert "pcd, seed 1: no number: top1 on test is not a finite number" in format_table([row])


def test_test_and_validation_are_never_mixed():
    without = make_result("pcd", 0)
    without["best"]["test"] = without["last"]["test"] = None
    rows = compare_rows([make_result("kd", 0), without])
    assert {row.split for row in rows} == {"val"}
    assert next(row for row in rows if row.name == "kd").best.mean == 92.0
    assert "too high" in format_table(rows)


def test_one_teacher_is_one_value_and_several_are_summarised():
    rows = compare_rows(make_comparison())
    assert (rows[0].best.n, rows[0].best.mean) == (1, 96.5)
    results = copy.deepcopy(make_comparison())
    for result in results:
        if result["teacher"]:
            result["teacher"]["test"]["top1"] = 96.0 + result["seed"]
    assert (compare_rows(results)[0].best.n, compare_rows(results)[0].best.mean) == (3, 97.0)


def test_no_kd_means_no_test_and_says_so():
    text = format_table(compare_rows([make_result("none", 0), make_result("pcd", 0)]))
    assert "No paired test" in text
    assert "| p" not in text.splitlines()[0].replace("| pcd", "")


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="pcd, seed 0 twice"):
        compare_rows([make_result(), make_result()])
    with pytest.raises(ValueError, match="one metric, got map, top1"):
        compare_rows([make_result(), make_result("kd", metric="map")])
    assert compare_rows([]) == []
    assert format_table([]) == "no runs"


def test_the_tables_columns_are_aligned_and_it_says_what_its_figures_are():
    results = [dict(r, method="a|b" if r["method"] == "dkd" else r["method"]) for r in make_comparison()]
    lines = format_table(compare_rows(results)).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({len(line) for line in table}) == 1
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert any("95 % confidence interval" in line and "n = 2 to 3" in line for line in lines)
    assert any("highest top-1 on validation, chosen without the test set" in line for line in lines)


def test_the_difference_in_the_table_is_that_of_the_kept_epoch():
    results = [dict(r, kept="last") for r in make_comparison()]
    assert "equal seeds at the last epoch" in format_table(compare_rows(results))
    assert "equal seeds at the best epoch" in format_table(compare_rows(make_comparison()))


def test_the_verdicts_are_those_of_the_statistics_with_their_correction_and_margin():
    rows = {row.name: row for row in compare_rows(make_short(), margin=3.0)}
    expected = verdicts({m: (SHORT[m], SHORT["kd"]) for m in ("near", "pcd", "wide")}, margin=3.0)
    assert {name: rows[name].best_verdict for name in expected} == expected
    assert rows["pcd"].best_verdict.within_margin
    assert rows["kd"].best_verdict is None
    assert "No difference greater than 3 points" in format_table(list(rows.values()))


def test_the_verdict_is_on_the_kept_epoch():
    results = [dict(r, kept="last") for r in make_comparison()]
    text = format_table(compare_rows(results))
    assert text.startswith("Verdict, test top-1 of the last epoch:")


def test_a_single_seed_allows_no_verdict_and_its_table_is_one():
    text = format_table(compare_rows([make_result("kd", 0), make_result("pcd", 0)]))
    assert "pcd against kd: cannot tell: one seed shows nothing of the spread between seeds." in text
    rule = next(line for line in text.splitlines() if line.startswith("| ---"))
    assert all(re.fullmatch(r" -{2,}:? ", cell) for cell in rule.strip("|").split("|"))


def test_a_small_interval_keeps_its_first_digit():
    text = format_table(compare_rows(make_short({"kd": [60.0, 60.001, 60.0], "pcd": [61.0, 61.0, 61.001]})))
    assert "60.00 ± 0.001" in text


def test_an_interval_of_few_seeds_that_passes_what_the_metric_can_be_says_so():
    text = format_table(compare_rows(make_short({"kd": [60.0, 70.0], "pcd": [5.0, 95.0], "none": [60.0, 61.0]})))
    assert "65.00 ± 63.53 (past 0 and 100)" not in text
    assert "65.00 ± 63.53 (past 100)" in text
    assert "(past 0 and 100)" in text
    assert "60.50 ± 6.35 " in text
    assert "two or three seeds leave the spread all but unknown" in text
    many = make_short({"kd": [99.0, 99.5, 98.0, 100.0], "pcd": [99.0, 99.5, 98.5, 100.0]})
    assert "past" not in format_table(compare_rows(many))


@pytest.mark.slow
def test_reports_need_no_torch():
    code = "import sys; from pcdistill import report; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr
