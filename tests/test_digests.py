"""Digests of recipes as they were when runs were begun with them: another digest would refuse to resume those runs."""

import pytest

from pcdistill.recipe import load_recipe, make_recipe, recipe_names, with_method

SHIPPED = {
    "cifar100": "39d8bbedbd46",
    "cifar100-resnet32x4-resnet8x4": "c719af75227c",
    "cifar100-resnet56-resnet20": "39d8bbedbd46",
    "coco": "63516ac557a8",
    "coco-fasterrcnn-r101-r18": "8cb70537d700",
    "coco-fasterrcnn-r101-r50": "5233dace140f",
    "coco-fasterrcnn-r50-mobilenetv2": "1f0cdfb3a273",
    "coco-fasterrcnn-r50-retinanet-r50-dfmsd": "8eb851010758",
    "coco-fcos-x101-retinanet-r50-dfmsd": "fd17dbc728fa",
    "coco-retinanet-r101-r50-dfmsd": "115481262572",
    "default": "f4d316d5ecba",
    "detection": "1aab1bc0d1c7",
    "digits": "4dfaab65e551",
    "digits-detection": "6e433670dee1",
    "imagenet-resnet34-resnet18": "2839b1a3a4a7",
    "patient": "6c16a6c18e5d",
}
DIGITS = {
    "none": "86ffcd6be3d7",
    "ce": "cf8716e6080c",
    "kd": "91a1bf389f80",
    "lskd": "7d326a069b6d",
    "eakd": "5ca9495de222",
    "pcd": "1067efa8a8ef",
    "pcd-released": "d10d3ab45bd6",
    "pld": "9f6187d0e200",
    "dkd": "78cd9fe804d8",
    "nkd": "4a5455124096",
    "mlkd": "220b2841f738",
    "mlkd-noaug": "f2e822878c68",
    "ctkd": "354cfff71756",
    "dist": "50f28caa636d",
    "ikl": "ff3e70dd3e7d",
    "ttm": "57758f6c520b",
    "wttm": "fc215e089736",
    "clkd": "109715bedea7",
    "ldrld": "0951d75d1147",
    "cskd": "2d7425bc86f1",
    "cskd-noaug": "ceaec2560f8d",
    "sdd": "416ad5296749",
    "rld": "fcfbf819107c",
    "rc": "81774a056358",
    "swap": "d4926b481464",
    "revision": "b4972bf7c81a",
    "fitnet": "4c441ab339c9",
    "at": "a253294453fa",
    "nst": "28ef6d61e942",
    "pkt": "e3032502e8c7",
    "rkd": "a7906f53f808",
    "sp": "0873b59d0092",
    "vid": "6fb40e835371",
    "ofd": "d54620a0055c",
    "crd": "162a335639b0",
    "reviewkd": "1af0aed72a68",
    "srrl": "a64ee982d1a9",
    "simkd": "bb594db09cb0",
}
DETECTION = {
    "none": "eba84f97247d",
    "kd": "33394317a560",
    "pcd": "ba5f0dde1c11",
    "pkd": "3d186bd4a675",
    "dfmsd": "bc38f715286e",
    "mgd": "b351692f3e24",
    "fgd": "dc56148294f6",
}


def test_every_shipped_recipe_is_listed():
    assert sorted(SHIPPED) == recipe_names()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_keeps_its_digest(name):
    assert load_recipe(name).digest() == SHIPPED[name]


@pytest.mark.parametrize("method", DIGITS)
def test_every_method_on_digits_keeps_its_digest(method):
    assert with_method(load_recipe("digits"), method, 1).digest() == DIGITS[method]


def test_entropy_weighting_changes_a_digest_only_where_it_is_on():
    without = load_recipe("digits", ["method=pcd"])
    assert load_recipe("digits", ["method=pcd", "losses.pcd.entropy_weighting=false"]) == without
    weighted = load_recipe("digits", ["method=pcd", "losses.pcd.entropy_weighting=true"])
    assert weighted.digest() == "621779732cd5"
    assert make_recipe(weighted.to_dict()) == weighted
    assert "entropy_weighting" not in without.to_yaml()


@pytest.mark.parametrize("method", DETECTION)
def test_methods_on_detection_keep_their_digests(method):
    assert with_method(load_recipe("digits-detection"), method, 1).digest() == DETECTION[method]


def test_keys_of_detection_that_came_later_count_only_where_they_are_set():
    plain = load_recipe("digits-detection")
    assert "pairing" not in plain.to_yaml()
    for change in ("pairing=teacher", "boxes=giou", "boxes_weight=2", "adapters=[mine.py:Mine]"):
        changed = load_recipe("digits-detection", [f"detection.{change}"])
        assert changed.digest() != plain.digest()
        assert make_recipe(changed.to_dict()) == changed
