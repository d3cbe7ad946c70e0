"""Charts: in the page's colours, with the figures behind them."""

import re

import pytest

from pcdistill.report import compare_rows
from pcdistill.report.plots import VARIABLES, cost_dots, learning_curves, method_curves, seed_dots, term_curves
from tests.report.runs import make_comparison, make_rows


def charts():
    rows = make_rows(130)
    return [
        learning_curves(rows, "top1", 3.0),
        term_curves(rows),
        method_curves({"kd": [make_rows(), make_rows(shift=1)], "pcd": [make_rows(3)]}, "top1"),
        method_curves({f"m{i}": [make_rows(shift=i)] for i in range(8)} | {"kd": [make_rows()]}, "top1"),
        seed_dots(compare_rows(make_comparison())),
        cost_dots(
            [{"student": "a", "method": "kd", "mean": 90.0, "ci95": 1.0, "parameters": 9e4, "macs": None}], "top1"
        ),
    ]


@pytest.mark.slow
def test_every_colour_is_the_pages_own():
    for chart in charts():
        for panel in chart.panels:
            assert re.findall(r"(?:fill|stroke): #[0-9a-f]+", panel) == []
            assert set(re.findall(r"var\((--[\w-]+)\)", panel)) <= set(VARIABLES.values())


@pytest.mark.slow
def test_every_chart_has_its_figures_as_a_table_and_not_too_many():
    for chart in charts():
        assert chart.rows
        assert len(chart.rows) <= 100
        assert all(len(row) == len(chart.head) for row in chart.rows)
    table = learning_curves(make_rows(4), "top1", None)
    assert table.head == ["epoch", "top-1, training", "top-1, validation", "loss, training", "loss, validation"]
    assert table.rows[0] == ["1", "68.00", "66.00", "502", "1"]


def test_without_anything_to_draw_there_is_no_chart():
    assert learning_curves([], "top1", None) is None
    assert term_curves([]) is None
    assert method_curves({}, "top1") is None
    assert seed_dots([]) is None
    assert cost_dots([], "top1") is None
    assert cost_dots([{"student": "a", "method": "kd", "mean": float("nan"), "parameters": 1}], "top1") is None
