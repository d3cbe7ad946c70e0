"""The bench: every figure is positive and stored, what cannot run is said, and a card that was edited stays."""

import json

import pytest
import yaml

from pcdistill import report
from pcdistill.commands.bench import Bench, bench
from pcdistill.errors import InputError
from tests.commands.folders import finished_run
from tests.report.runs import make_run, page_of

QUICK = {"batch_size": 4, "seconds": 0.01}


def with_teacher(run):
    """A run whose recipe names a teacher."""
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree.pop("losses", None)
    tree.update(method="kd", teacher={"name": "cifar/resnet14", "epochs": 1})
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))


def test_a_runs_teacher_and_student_are_measured_and_shown(tmp_path):
    finished_run(tmp_path, "cifar/resnet8")
    with_teacher(tmp_path)
    (tmp_path / "README.md").write_text(report.write_model_card(tmp_path), encoding="utf-8")
    said = []
    table = bench(str(tmp_path), Bench(**QUICK, programs=("eager",)), said.append)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [(row["who"], row["model"]) for row in found["rows"]] == [
        ("teacher", "cifar/resnet14"),
        ("student", "cifar/resnet8"),
    ]
    for row in found["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["images_per_second"] > 0
    assert found["image_size"] == 8
    assert "8 x 8 pixels" in table
    assert "images/s at batch 4" in page_of(tmp_path / "report.html").text
    assert "## Speed" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_that_was_edited_stays(tmp_path):
    finished_run(tmp_path, "cifar/resnet8")
    (tmp_path / "README.md").write_text("mine")
    bench(str(tmp_path), Bench(**QUICK, programs=("eager",)), print)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.slow
def test_onnx_and_int8_are_measured_and_a_detectors_gaps_are_told(tmp_path):
    pytest.importorskip("onnxruntime")
    finished_run(tmp_path / "a", "cifar/resnet8")
    bench(str(tmp_path / "a"), Bench(**QUICK, programs=("onnx", "int8")), print)
    rows = json.loads((tmp_path / "a" / "bench.json").read_text())["rows"]
    assert [row["program"] for row in rows] == ["onnx", "int8"]
    finished_run(tmp_path / "b", "fcos/tiny", "digits-detection", task="detection", image_size=96)
    table = bench(str(tmp_path / "b"), Bench(**QUICK), print)
    found = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert [row["program"] for row in found["rows"]] == ["eager", "onnx"]
    assert "compiled: not measured: detectors branch" in table
    assert "int8: not measured: only classifiers are quantised" in table


def test_a_model_by_name_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = bench("cifar/resnet8", Bench(**QUICK, programs=("eager",)), print)
    assert "model cifar/resnet8" in table
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "plan", "sentence"),
    [
        ("cifar/resnet8", Bench(programs=("onx",)), '--programs: unknown "onx"'),
        ("cifar/resnet8", Bench(batch_size=0), "--batch-size must be 1 or more"),
        ("cifar/resnet8", Bench(image_size=0), "--image-size must be 1 or more, got 0"),
        ("cifar/resnet9", Bench(), 'unknown model "cifar/resnet9"; did you mean'),
        (".", Bench(), "is not a run's folder"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(what, plan, sentence):
    with pytest.raises(InputError, match=sentence):
        bench(what, plan, print)


@pytest.mark.slow
def test_a_damaged_bench_is_no_bench(tmp_path):
    run = make_run(tmp_path)
    (run / "bench.json").write_text('{"rows": ')
    assert report.read_speed(run) is None
    report.write_run_report(run)
    assert "Speed" not in page_of(run / "report.html").text
