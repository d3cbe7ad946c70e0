"""Evaluating a run: the test split, or validation where there is none, and with how many images."""

import json

import pytest

from pcdistill.cli import main
from pcdistill.commands.evaluate import evaluate_model, evaluation_recipe, evaluation_text
from pcdistill.errors import InputError
from tests.commands.folders import class_folders, finished_run


def test_without_a_test_split_validation_stands_for_it_and_is_named(tmp_path, capsys):
    data = class_folders(tmp_path / "Meine Bilder") / "train"
    finished_run(tmp_path / "run", "cifar/resnet8", data, image_size=16)
    main(["evaluate", str(tmp_path / "run")])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["split"], found["samples"]) == ("val", 4)
    assert "of 4 validation images (the data have no test split" in printed.err
    main(["evaluate", str(tmp_path / "run"), "--json"])
    assert capsys.readouterr().err == ""
    recipe = evaluation_recipe(tmp_path / "run", {})
    with pytest.raises(InputError, match="has no test split; it has val, train"):
        evaluate_model(recipe, None, split="test")


def test_a_sentence_says_how_many_images_a_percentage_is_of():
    found = {"model": "m", "split": "test", "samples": 1234, "top1": 50.0, "top5": 90.0}
    assert evaluation_text(found) == "m: top-1 50.00 %, top-5 90.00 % of 1,234 test images"
