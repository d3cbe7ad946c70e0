"""Boxes on a page: where they and their labels are, what is left out, and folders that leave nothing to show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pcdistill.report import write_compare_report, write_run_report
from pcdistill.report.boxes import COLORS, boxes_of_classes, compare_boxes, labelled, run_boxes
from tests.report.runs import make_comparison, make_result, make_run, make_samples, page_of


def titles(figures, row=0):
    return [cell["title"] for cell in figures["rows"][row]["cells"]]


def corners(box):
    return [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]]


def test_boxes_stand_in_their_cells_and_weak_ones_are_left_out(tmp_path):
    figures = run_boxes(make_samples(tmp_path / "run", masks=False))
    assert titles(figures) == ["truth", "teacher", "student"]
    cells = figures["rows"][0]["cells"]
    assert [len(cell["boxes"]) for cell in cells] == [1, 2, 1]  # the student's second has a score of 0.2
    assert corners(figures["rows"][1]["cells"][0]["boxes"][0]) == [5, 5, 30, 30]
    assert [box["name"] for box in cells[1]["boxes"]] == ["cat 0.90", "a_b$c 0.31"]
    assert [box["name"] for box in cells[2]["boxes"]] == ["dog 0.40"]
    assert len(figures["sources"]) == 2  # every image once, whatever the number of models


def test_masks_lie_on_the_part_of_the_image_that_they_are_about(tmp_path):
    figures = run_boxes(make_samples(tmp_path / "run"))
    assert len(figures["rows"]) == 4
    masked = figures["rows"][2]
    assert [cell["title"] for cell in masked["cells"]] == ["stride 8", "stride 16"]
    overlay = masked["cells"][0]["overlay"]
    assert (overlay["width"], overlay["height"]) == (64, 64)  # the padded batch, of which the image is a part
    assert (masked["cells"][0]["width"], masked["cells"][0]["height"]) == (60, 40)
    assert "25 % of the channels masked" in masked["cells"][0]["said"]


def test_a_comparison_has_a_cell_for_every_method_with_samples(tmp_path):
    runs = {
        "none": make_samples(tmp_path / "none", teacher=False, masks=False),
        "kd": make_samples(tmp_path / "kd", masks=False),
        "gone": tmp_path / "gone",
    }
    assert titles(compare_boxes(runs)) == ["truth", "teacher", "none", "kd"]
    page = page_of(write_compare_report(tmp_path / "out", make_comparison(), {}, "", drawn=runs)[0])
    assert "On images" in page.text
    assert page.tags.count("image") == 2


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 cut off"])
def test_without_readable_samples_there_are_no_boxes(tmp_path, content):
    if content is not None:
        (tmp_path / "samples.npz").write_bytes(content)
    assert run_boxes(tmp_path) is None
    assert compare_boxes({"kd": tmp_path}) is None
    assert boxes_of_classes(tmp_path) == {}


def test_a_model_that_finds_nothing_or_left_nothing_is_named_in_words(tmp_path):
    run = make_samples(tmp_path / "run", teacher=False)
    arrays = dict(np.load(run / "samples.npz"))
    arrays["student_0_boxes"] = np.zeros((0, 4), dtype=np.float32)
    arrays["student_0_labels"] = arrays["student_0_scores"] = np.zeros(0, dtype=np.float32)
    arrays["student_1_scores"] = np.array([0.1, 0.2], dtype=np.float32)
    np.savez_compressed(run / "samples.npz", **arrays)
    result = make_result("none", task="detection", metric="map")
    text = page_of(write_run_report(make_run(run, result=result))).text
    assert "nothing found with a score of 0.3 or more" in text
    assert "its best score is 0.20" in text
    assert "teacher left no boxes on these images" in text


def test_per_class_ap_stands_beside_the_number_of_boxes(tmp_path):
    run = make_samples(tmp_path / "run")
    result = make_result(task="detection", metric="map")
    for who, values in (("best", [50.5, 32.0, None]), ("teacher", [61.0, 40.0, None])):
        classes = dict(zip(["cat", "dog", "a_b$c"], values, strict=True))
        result[who].update(val={"map": 41.25, "per_class": classes}, test=None)
    text = page_of(write_run_report(make_run(run, result=result))).text
    assert "dog 3 32.00 40.00 cat 5 50.50 61.00 a_b$c 0 – –" in text


@given(
    boxes=st.lists(st.tuples(*[st.floats(0, 100)] * 4, st.text("ab", min_size=1, max_size=30)), max_size=15),
    width=st.integers(10, 200),
    height=st.integers(10, 200),
)
def test_labels_keep_within_the_image_and_clear_of_each_other(boxes, width, height):
    given_boxes = [
        (
            (min(a, c) * width / 100, min(b, d) * height / 100, max(a, c) * width / 100, max(b, d) * height / 100),
            "#000",
            n,
        )
        for a, b, c, d, n in boxes
    ]
    found = labelled(given_boxes, width, height, font=8)
    assert len(found) == len(boxes)
    placed = [box for box in found if box["name"]]
    for i, one in enumerate(placed):
        assert one["label_x"] >= 0
        assert one["label_y"] >= 0
        assert one["label_y"] + one["label_height"] <= height + 0.02
        for other in placed[:i]:
            apart = (
                one["label_x"] >= other["label_x"] + other["label_width"] - 0.02
                or other["label_x"] >= one["label_x"] + one["label_width"] - 0.02
                or one["label_y"] >= other["label_y"] + other["label_height"] - 0.02
                or other["label_y"] >= one["label_y"] + one["label_height"] - 0.02
            )
            assert apart


@pytest.mark.parametrize("color", COLORS)
def test_white_text_can_be_read_on_every_colour(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    assert 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05) >= 4.5  # WCAG 2.1, 1.4.3
