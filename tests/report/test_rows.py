import copy
import csv
import json
import math
import os
import re
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from scipy import stats

from pcdistill.report import compare_rows, format_table, write_compare_report, write_model_card, write_run_report
from pcdistill.stats import verdicts

EVIL = "<script>alert('$x^{2}$')</script>&\"|"
VOID = {"meta", "img", "br", "link", "input", "hr"}
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360000002000001e221bc330000000049454e44ae426082"
)


def scores(top1, top5=99.0, loss=0.25):
    return {"top1": top1, "top5": top5, "loss": loss}


def make_result(method="pcd", seed=0, best=91.0, last=90.5, **changes):
    teacher = {"name": "cifar/resnet20", "parameters": 272_474, "macs": 40_800_000}
    result = {
        "status": "done",
        "task": "classification",
        "method": method,
        "seed": seed,
        "data": "digits",
        "metric": "top1",
        "teacher": None if method == "none" else {**teacher, "val": scores(97.0), "test": scores(96.5)},
        "student": {"name": "cifar/resnet8", "parameters": 78_042, "macs": 12_100_000},
        "best": {"epoch": 3, "val": scores(best + 1), "test": scores(best)},
        "last": {"epoch": 4, "val": scores(last + 1), "test": scores(last)},
        "kept": "best",
        "epochs": 4,
        "seconds": 12.5,
        "images_per_second": 800.0,
        "notes": [],
    }
    return {**result, **changes}


def stopped(method="pcd", seed=0):
    notes = ["the loss is not finite in epoch 2"]
    return make_result(method, seed, status="stopped", notes=notes) | {"best": None, "last": None}


def make_rows(epochs=4, shift=0.0):
    return [
        {
            "epoch": e,
            "lr": 0.1 / e,
            "train/ce": 2.0 / e,
            "train/pcd": 500.0 / e**4,
            "train/loss": 2.0 / e + 500.0 / e**4,
            "train/top1": 60.0 + 8 * e,
            "val/loss": 1.0 / e,
            "val/top1": 58.0 + 8 * e + shift,
            "seconds": 1.5,
            "images_per_second": 800.0,
        }
        for e in range(1, epochs + 1)
    ]


def make_run(path, result=None, rows=None, recipe=None, environment=None):
    """A run's folder; a part that is False is left out."""
    path.mkdir(parents=True, exist_ok=True)
    defaults = {
        "result": make_result(),
        "recipe": {"task": "classification", "method": "pcd", "data": {"name": "digits"}, "train": {"epochs": 4}},
        "environment": {"command": "pcdistill distill --data digits", "commit": "abc1234", "versions": {"torch": "2"}},
        "rows": make_rows(),
    }
    given = {"result": result, "recipe": recipe, "environment": environment, "rows": rows}
    parts = {key: defaults[key] if value is None else value for key, value in given.items()}
    if parts["result"] is not False:
        (path / "result.json").write_text(json.dumps(parts["result"]))
    if parts["environment"] is not False:
        (path / "environment.json").write_text(json.dumps(parts["environment"]))
    if parts["recipe"] is not False:
        (path / "recipe.yaml").write_text(yaml.safe_dump(parts["recipe"]))
    if parts["rows"] is not False:
        with open(path / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in parts["rows"] for key in row)))
            writer.writeheader()
            writer.writerows(parts["rows"])
    return path


class Page(HTMLParser):
    """Checks that tags are balanced and collects text, ids and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(path):
    text = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = Page(text)
    assert "http" not in text
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    return page


def make_comparison():
    """Four methods, three seeds, one stopped run."""
    best = {"none": [88.0, 88.5, 88.2], "kd": [90.0, 90.4, 90.1], "pcd": [91.0, 91.1, 91.5], "dkd": [90.5, 90.2]}
    results = [make_result(m, s, v, v - 0.5 - 0.1 * s) for m, values in best.items() for s, v in enumerate(values)]
    return [*results, stopped("dkd", 2)]


def curves_of(results):
    return {(r["method"], r["seed"]): make_rows(2 if r["status"] != "done" else 4, r["seed"]) for r in results}


# One run


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
    assert page.tags.count("svg") == 2


def test_every_term_of_the_loss_has_a_curve_with_its_name(tmp_path):
    page = page_of(write_run_report(make_run(tmp_path)))
    terms = page.text[page.text.index("Loss terms") : page.text.index("How it was made")]
    for name in ("total loss", "ce", "pcd", "learning rate"):
        assert name in terms


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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(write_run_report(make_run(tmp_path, rows=rows)))
    assert "not finite numbers, in: train/ce, train/loss, train/pcd" in page.text
    assert "averaged weights" in page.text


def test_nan_in_the_result_is_a_dash(tmp_path):
    result = make_result()
    result["last"]["test"] = scores(math.nan)
    text = page_of(write_run_report(make_run(tmp_path, result=result))).text
    assert "nan" not in text.lower()
    assert "–" in text


def test_without_a_test_set_there_are_no_test_columns(tmp_path):
    result = make_result(notes=["no test set"])
    for who in ("teacher", "best", "last"):
        result[who]["test"] = None
    text = page_of(write_run_report(make_run(tmp_path, result=result))).text
    assert "no test set" in text
    assert "91.00" not in text
    assert "92.00" in text


def test_a_student_trained_alone_has_no_teacher(tmp_path):
    text = page_of(write_run_report(make_run(tmp_path, result=make_result("none")))).text
    assert "cifar/resnet8, trained alone" in text
    assert "resnet20" not in text


def test_a_detector_shows_ap_classes_and_pictures(tmp_path):
    at = {"map": 41.25, "map_50": 60.0, "map_75": 44.0, "per_class": {"cat <b>": 50.5, "dog": 32.0}}
    result = make_result(task="detection", metric="map")
    for who in ("teacher", "best", "last"):
        result[who].update(val=at, test=None)
    rows = [{"epoch": e, "train/loss": 3.0 / e, "val/map": 10.0 * e} for e in (1, 2, 3)]
    run = make_run(tmp_path, result=result, rows=rows)
    (run / "pictures").mkdir()
    for i in range(26):
        (run / "pictures" / f"{i:02d}_teacher&student.png").write_bytes(PNG)
    page = page_of(write_run_report(run))
    assert "AP (%)" in page.text
    assert "41.25" in page.text
    assert "cat <b>" in page.text
    assert page.tags.count("img") == 24
    assert "2 more in pictures/" in page.text
    assert "00 teacher&student" in page.text


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


# A comparison


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
    assert "last - kd" in format_table(compare_rows(results))
    assert "best - kd" in format_table(compare_rows(make_comparison()))


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
    assert page.tags.count("svg") == 2
    assert "dkd, seed 2: stopped" in page.text
    assert len(lines) == len(results) == 12
    pcd = [float(line["best/test/top1"]) for line in lines if line["method"] == "pcd"]
    assert pcd == [91.0, 91.1, 91.5]
    assert next(line for line in lines if line["status"] == "stopped")["best/test/top1"] == ""
    row = compare_rows(results)[-1]
    assert f"{row.best.mean:.2f} ± {row.best.ci95:.2f}" in page.text
    assert f"{row.best.mean:.2f} ± {row.best.ci95:.2f}" in text


def test_a_comparison_written_twice_is_the_same_bytes(tmp_path):
    results = make_comparison()
    first = [p.read_bytes() for p in write_compare_report(tmp_path / "a", results, curves_of(results), "x")]
    second = [p.read_bytes() for p in write_compare_report(tmp_path / "b", results[::-1], curves_of(results), "x")]
    assert first == second


@pytest.mark.parametrize("methods", [1, 2, 14])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_method_and_many_and_a_single_seed_draw_without_warnings(tmp_path, methods, seeds):
    names = ["kd", "pcd", "none", *(f"method_{i}" for i in range(11))][:methods]
    results = [make_result(name, s, 90.0 + i + s) for i, name in enumerate(names) for s in range(seeds)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = page_of(write_compare_report(tmp_path, results, curves_of(results), "")[0])
    assert page.tags.count("svg") == 2


def test_a_comparison_in_which_nothing_finished_and_one_without_runs_have_pages(tmp_path):
    page = page_of(write_compare_report(tmp_path / "a", [stopped("kd"), stopped("pcd")], {}, "")[0])
    assert "2 of 2 runs gave no value" in page.text
    assert "svg" not in page.tags
    assert "No runs" in page_of(write_compare_report(tmp_path / "b", [], {}, "")[0]).text


# The verdict

SHORT = {"kd": [90.0, 90.4, 90.1], "pcd": [92.0, 92.3, 92.2], "near": [90.02, 90.38, 90.11], "wide": [95.0, 60.0, 99.0]}


def make_short(methods=SHORT):
    return [make_result(m, s, v, v) for m, values in methods.items() for s, v in enumerate(values)]


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
    assert page.index("pcd against kd better by 2.00 points (1.75 to 2.25)") < page.index("minus kd")


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


def test_without_a_pair_there_is_no_verdict(tmp_path):
    results = [make_result("none", 0), make_result("pcd", 0)]
    assert "Verdict" not in format_table(compare_rows(results))
    assert "Verdict" not in page_of(write_compare_report(tmp_path, results, {}, "")[0]).text


def test_a_single_seed_allows_no_verdict_and_its_table_is_one():
    text = format_table(compare_rows([make_result("kd", 0), make_result("pcd", 0)]))
    assert "pcd against kd: cannot tell: one seed shows nothing of the spread between seeds." in text
    rule = next(line for line in text.splitlines() if line.startswith("| ---"))
    assert all(re.fullmatch(r" -{2,}:? ", cell) for cell in rule.strip("|").split("|"))


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


def test_a_bar_that_leaves_the_frame_ends_in_an_arrow_with_its_width(tmp_path):
    results = make_short({"kd": [60.0, 70.0], "pcd": [64.0, 64.2]})
    page = page_of(write_compare_report(tmp_path, results, {}, "")[0])
    assert "± 63.5, 2 seeds" in page.text
    assert "± 1.27, 2 seeds" not in page.text


# The model card


def card(run):
    text = write_model_card(run)
    _, front, body = re.split(r"^---\n", text, maxsplit=2, flags=re.MULTILINE)
    return yaml.safe_load(front), body


def test_the_card_says_what_made_the_student(tmp_path):
    front, body = card(make_run(tmp_path))
    assert front["library_name"] == "pcdistill"
    assert {"pcdistill", "knowledge-distillation", "pcd"} <= set(front["tags"])
    result = front["model-index"][0]["results"][0]
    assert result["dataset"]["split"] == "test"
    assert {"type": "accuracy", "name": "top-1 (%)", "value": 91.0} in result["metrics"]
    for part in (
        "cifar/resnet8",
        "cifar/resnet20",
        "digits",
        "abc1234",
        "pcdistill distill --data digits",
        "method: pcd",
    ):
        assert part in body
    for value in ("91.00", "90.50", "92.00", "91.50"):
        assert value in body
    assert "student, best epoch (3), in this file" in body


def test_the_card_of_a_student_trained_alone_and_of_an_unfinished_run(tmp_path):
    front, body = card(make_run(tmp_path / "alone", result=make_result("none")))
    assert "trained alone" in body
    assert "knowledge-distillation" not in front["tags"]
    front, body = card(make_run(tmp_path / "cut", result=False))
    assert "not finished" in body
    assert "model-index" not in front


def test_text_that_would_break_the_card_cannot(tmp_path):
    environment = {"command": "a\n```\n# not a heading\n```", "commit": "x"}
    front, body = card(make_run(tmp_path, result=make_result("---\n<b>", notes=["<script>"]), environment=environment))
    assert front["tags"][-1] == "--- <b>"
    assert "<script>" not in body
    assert "````\na\n```\n" in body


def test_the_cards_three_lines_load_the_student(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from pcdistill import models

    student = models.build_model("cifar/resnet8", num_classes=10, in_channels=1).eval()
    metadata = {"model": "cifar/resnet8", "classes": [str(i) for i in range(10)], "mean": [0.3], "std": [0.4]}
    models.save_weights(student, tmp_path / "student.safetensors", metadata)
    code = re.search(r"```python\n(.*?)```", write_model_card(make_run(tmp_path)), re.DOTALL).group(1)
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    scope = {"images": images}
    exec(code, scope)
    torch.testing.assert_close(scope["logits"], student(images))
    assert "mean [0.3] and std [0.4]" in code


# The module itself


def test_reports_need_no_torch():
    code = "import sys; from pcdistill import report; print({'torch', 'matplotlib.pyplot'} & set(sys.modules))"
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("set()", 0), done.stderr
