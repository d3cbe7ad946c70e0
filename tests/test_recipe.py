"""Recipes: every shipped file resolves, overrides reach every key, and mistakes are named with file, key and remedy."""

import contextlib
import math

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pcdistill.detection.detectors.build import build_detector
from pcdistill.detection.task import check_detection_losses
from pcdistill.distillation.objective import build_objective, check_losses, fitted_terms
from pcdistill.errors import InputError
from pcdistill.methods import METHODS
from pcdistill.recipe import (
    RECIPES,
    load_recipe,
    make_recipe,
    method_terms,
    recipe_names,
    scaled_milestones,
    with_method,
)


def test_every_shipped_recipe_resolves_and_survives_a_round_trip():
    files = sorted(RECIPES.rglob("*.yaml"))
    assert len(files) == len(recipe_names()) > 3
    for file in files:
        recipe = load_recipe(file)
        assert make_recipe(recipe.to_dict()) == recipe
        head = file.read_text().splitlines()[:5]
        assert [line.split(":")[0] for line in head[1:]] == ["# Run", "# Try", "# Cost", "# Expect"], file.name


@pytest.mark.slow
def test_the_detectors_of_every_shipped_recipe_can_be_built():
    found = 0
    for name in recipe_names():
        recipe = load_recipe(name)
        if recipe.task != "detection":
            continue
        for config in (recipe.student, recipe.teacher):
            with torch.device("meta"):
                build_detector(config.name, num_classes=80, kwargs=config.kwargs)
            found += 1
    assert found > 10


def test_in_detection_the_detectors_own_losses_stand_for_cross_entropy():
    assert [t["method"] for t in method_terms("none", {}, task="detection")] == ["detector"]
    kd = method_terms("kd", {}, task="detection")
    assert [(t["method"], t["weight"]) for t in kd] == [("detector", 1.0), ("kd", 0.9)]
    assert method_terms("pkd", {}, task="detection") == method_terms("pkd", {})
    assert [t.method for t in with_method(load_recipe("digits-detection"), "dist", 0).losses] == ["detector", "dist"]


def test_options_of_detection_change_no_digest_of_a_classifier():
    plain = load_recipe("digits")
    one, other = (make_recipe({**plain.to_dict(), "detection": {"top_k": k}}) for k in (5, 6))
    assert one.digest() == other.digest() == plain.digest()
    one, other = (load_recipe("digits-detection", [f"detection.top_k={k}"]) for k in (5, 6))
    assert one.digest() != other.digest()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_resolves_by_name(name):
    recipe = load_recipe("digits", [f"method={name}"])
    assert [term.method for term in recipe.losses] == [term["method"] for term in METHODS[name].terms]


def test_none_is_cross_entropy_alone():
    assert [t.method for t in with_method(load_recipe("digits"), "none", 3).losses] == ["ce"]


def test_a_recipe_may_define_a_method_of_its_own():
    recipe = with_method(load_recipe("cifar100-resnet56-resnet20"), "kd-9", 0)
    assert [(t.method, t.weight) for t in recipe.losses] == [("ce", 1.0), ("kd", 9.0)]


def test_base_lies_below_and_flags_and_sets_lie_above():
    recipe = load_recipe(
        "cifar100-resnet32x4-resnet8x4",
        ["losses.pcd.stages=5", "losses.0.weight=0.5", "optim.lr=1e-2"],
        values={"train.epochs": 3, "student.name": None},
    )
    assert recipe.optim.milestones == (1.88, 2.25, 2.62)  # at the same shares of three epochs as of 240
    assert recipe.student.name == "cifar/resnet8x4"
    assert (recipe.train.epochs, recipe.optim.lr) == (3, 0.01)
    assert recipe.losses[0].weight == 0.5
    assert recipe.losses[1].options == {"temperature": 4.0, "stages": 5}


def test_the_digest_changes_with_results_and_not_with_bookkeeping():
    recipe = load_recipe("digits")
    assert load_recipe("digits", ["optim.lr=0.06"]).digest() != recipe.digest()
    assert load_recipe("digits", ["losses.dist.inter_weight=2"]).digest() != recipe.digest()
    assert load_recipe("digits", ["train.checkpoint_seconds=1"]).digest() == recipe.digest()


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.lrr=1"], 'unknown key "optim.lrr"; did you mean "lr"'),
        (["trian.epochs=1"], 'unknown key "trian"; did you mean "train"'),
        (["losses.dits.inter_weight=1"], 'no such term; did you mean "dist"'),
        (["method=pdc"], 'unknown method "pdc"; did you mean "pcd"'),
        (["optim.lr=-1"], "optim.lr: input should be greater than 0, got -1"),
        (["train.epochs=few"], "train.epochs: .*valid integer.*'few'"),
        (["train.epochs"], "must be KEY=VALUE, got 'train.epochs'"),
        (["optim.name=sdg"], "optim.name: input should be 'sgd' or 'adamw', got 'sdg'"),
        (["losses=[{weight: 1}]"], 'losses.0: a term must be a mapping with "method"'),
        (["losses=[{method: kdd}]"], 'losses.0.method: unknown method "kdd"; did you mean "kd"'),
        (["data.batch_size=[1"], "not valid YAML"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_named_in_one_sentence(overrides, says):
    with pytest.raises(InputError, match=says) as error:
        load_recipe("digits", overrides)
    assert "\n" not in str(error.value)


def test_files_are_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train: {epoch: 3}\n")
    with pytest.raises(InputError, match=r'mine.yaml: unknown key "train.epoch"; did you mean "epochs"'):
        load_recipe(file)
    file.write_text("train: [")
    with pytest.raises(InputError, match=r"mine.yaml, line [12]: not valid YAML"):
        load_recipe(file)
    file.write_text("- 1\n")
    with pytest.raises(InputError, match=r"mine.yaml: a recipe must be a mapping"):
        load_recipe(file)
    with pytest.raises(InputError, match="does not exist"):
        load_recipe(tmp_path / "no.yaml")
    with pytest.raises(InputError, match='unknown recipe "digit"; did you mean "digits"'):
        load_recipe("digit")


@pytest.mark.parametrize("name", ["default", "digits"])
def test_the_names_of_a_default_recipe_pull_equally_hard(name):
    recipe = load_recipe(name)
    assert {"kd", "pcd", recipe.method} <= set(recipe.methods)
    assert recipe.strength == 4.0
    for method in recipe.methods:
        (labels, own) = with_method(recipe, method, 0).losses
        assert (labels.method, labels.weight, labels.strength) == ("ce", 1.0, None)
        assert (own.method, own.weight, own.strength, own.warmup_epochs) == (method, 1.0, 4.0, 0.0)


def test_bases_lie_below_each_other_but_never_below_themselves(tmp_path):
    file, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    file.write_text("base: cifar100-resnet56-resnet20\ntrain: {epochs: 3}\n")
    other.write_text("base: mine.yaml\noptim: {lr: 0.01}\n")
    recipe = load_recipe(other)
    assert (recipe.optim.lr, recipe.train.epochs, recipe.teacher.name) == (0.01, 3, "cifar/resnet56")
    assert recipe.optim.milestones == (150, 180, 210)
    file.write_text("base: other.yaml\n")
    with pytest.raises(InputError, match="is its own base"):
        load_recipe(other)


def test_nothing_in_a_recipe_is_executed(tmp_path):
    file = tmp_path / "evil.yaml"
    file.write_text("train: !!python/object/apply:os.system ['touch pwned']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(file)


def test_all_mistakes_of_a_recipe_are_told_at_once(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "train: {epoch: 3, seed: -1}\noptim: {lr: 0}\nlosses: [{method: kdd}, {weight: 1}]\nmethods: {own: 3}\n"
    )
    with pytest.raises(InputError) as error:
        load_recipe(file, ["data=3", "data.limit=1", "losses.kd.weight=1", "colour"])
    assert str(error.value).splitlines() == [
        "Found 10 errors in mine.yaml:",
        "  --set: must be KEY=VALUE, got 'colour'",
        "  --set data.limit: data is not a group of keys",
        "  methods.own: must be a list of terms, got 3",
        '  --set losses.kd.weight: no such term; did you mean "kdd"?',
        '  losses.0.method: unknown method "kdd"; did you mean "kd"?',
        """  losses.1: a term must be a mapping with "method", got {'weight': 1}""",
        "  --set data: data must be a group of keys, got 3",
        "  optim.lr: input should be greater than 0, got 0",
        "  train.seed: input should be greater than or equal to 0, got -1",
        '  unknown key "train.epoch"; did you mean "epochs"?',
    ]
    file.write_text("method: pdc\ntrain: {epochs: 0}\n")
    with pytest.raises(InputError, match='Found 2 errors in mine.yaml:\n  method: unknown method "pdc".*\n  train.epo'):
        load_recipe(file, ["losses.pdc.weight=2"])


def test_a_zoos_name_alone_makes_the_teacher_pretrained_however_it_is_given(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("teacher: {name: timm/resnet18}\n")
    ways = [
        load_recipe(None, values={"teacher.name": "timm/resnet18"}),
        load_recipe(None, ["teacher.name=timm/resnet18"]),
        load_recipe(file),
    ]
    assert all(recipe == ways[0] for recipe in ways)
    assert ways[0].teacher.pretrained
    for other in ("teacher.weights=w.pt", "teacher.pretrained=false", "teacher.name=cifar/resnet20"):
        assert not load_recipe(file, [other]).teacher.pretrained
    assert not load_recipe(None, ["student.name=timm/resnet18"]).student.pretrained


def test_a_recipe_distils_with_a_teacher_and_a_method():
    assert load_recipe("digits").distils
    assert not load_recipe("digits", ["method=none"]).distils
    assert not load_recipe("digits", ["teacher=null"]).distils


def test_the_names_of_models_that_came_as_modules_change_no_digest():
    one = make_recipe({"data": {"name": "loaders"}, "teacher": None})
    named = {"student": {"name": "Small"}, "teacher": {"name": "Big"}}
    assert make_recipe({"data": {"name": "loaders"}, **named}).digest() == one.digest()
    begun = {"data": {"name": "loaders", "views": 1}, "optim": {"lr": 0.05}, "train": {"epochs": 30, "seed": 0}}
    assert make_recipe(begun).digest() == "355b86028ba7"  # as runs have it that were begun before


@pytest.mark.slow
@given(st.text(max_size=12), st.text(max_size=12))
def test_no_override_escapes_as_another_error(key, value):
    with contextlib.suppress(InputError):
        load_recipe("digits", [f"{key}={value}"])


def test_terms_are_copies():
    terms = method_terms("kd", {})
    terms[0]["weight"] = 99
    assert method_terms("kd", {})[0]["weight"] != 99


def test_a_model_that_is_named_does_not_inherit_the_arguments_of_the_recipes_model():
    narrow = load_recipe("digits").student
    assert narrow.kwargs
    assert load_recipe("digits", values={"student.name": narrow.name}).student.kwargs == {}
    other = load_recipe("digits", values={"student.name": "cifar/resnet14", "teacher.name": "cifar/resnet32"})
    assert other.student.kwargs == {}
    assert (other.teacher.name, other.teacher.epochs) == ("cifar/resnet32", load_recipe("digits").teacher.epochs)
    assert load_recipe("digits", ["student.name=cifar/resnet14"]).student.kwargs == {}


def test_several_teachers_stand_for_the_one_of_the_base_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\nteachers: [{name: timm/resnet18, weight: 3}, {name: cifar/resnet20, epochs: 2}]\n")
    recipe = load_recipe(file)
    assert recipe.teacher is None
    assert [teacher.pretrained for teacher in recipe.all_teachers] == [True, False]
    assert recipe.distils
    assert make_recipe(recipe.to_dict()) == recipe
    assert with_method(recipe, "dist", 1).all_teachers == recipe.all_teachers
    assert load_recipe(file, ["teachers_combine=logits"]).digest() != recipe.digest()
    one = load_recipe(file, values={"teacher.name": "cifar/resnet14"})
    assert (one.teachers, one.teacher.name) == ((), "cifar/resnet14")
    with pytest.raises(InputError, match=r"teacher\.epochs: this recipe has several teachers; set it in each"):
        load_recipe(file, ["teacher.epochs=3"])
    with pytest.raises(InputError, match=r'unknown key "teachers.0.weigth"; did you mean "weight"'):
        load_recipe(None, ["teachers=[{weigth: 1}]"])


def test_keys_that_came_later_are_written_only_where_they_are_set():
    plain = load_recipe("digits").to_dict()
    assert not {"teachers", "teachers_combine"} & set(plain)
    assert not {"unlabelled", "unlabelled_batch", "streamed"} & set(plain["data"])
    assert "head" not in plain["student"]
    assert "weight" not in plain["teacher"]
    changed = load_recipe("digits", ["data.unlabelled=rest", "student.head=teacher"])
    assert make_recipe(changed.to_dict()) == changed
    assert changed.digest() != load_recipe("digits").digest()


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"method": None}, "recipe: method: input should be a valid string, got None"),
        ({"methods": {"mine": None}}, r"methods\.mine: must be a list of terms, got None"),
        ({"methods": {"..": [{"method": "ce"}]}}, r"methods\.\.\.: must be a name for a folder of its own"),
        ({"methods": {"kd/hot": [{"method": "kd"}]}}, r"methods\.kd/hot: must be a name for a folder of its own"),
        ({"methods": {"teacher": [{"method": "kd"}]}}, r"methods\.teacher: must be a name for a folder of its own"),
        ({"methods": 0}, "methods: must map names to lists of terms, got 0"),
        ({"losses": 5}, "losses: input should be a valid tuple, got 5"),
        ({"losses": {}}, "losses: input should be a valid tuple, got {}"),
        ({"losses": [{"method": "kd", "options": None}]}, r"losses\.0\.options: .*dictionary, got None"),
        ({"losses": [{"method": "kd", "options": {"weight": 2}}]}, r"losses\.0\.options\.weight: is a key of the term"),
        ({"losses": [{"method": "kd", "x": 1, "options": {"x": 2}}]}, r"losses\.0\.options\.x: is given twice"),
        ({"losses": [{"method": "kd", "temperature": math.nan}]}, r"losses\.0\.temperature: must be a finite number"),
        (
            {"losses": [{"method": "kd", "entropy_weighting": "x"}]},
            "entropy_weighting: input should be true, false or a number",
        ),
        ({"student": {"kwargs": {"a": {1, 2}}}}, r"student\.kwargs\.a: must be a number, text, true"),
        ({"optim": {"milestones": [1, "a"]}}, r"optim\.milestones\.1: input should be a number from 0, got 'a'"),
        ({"train": {"epochs": True}}, r"train\.epochs: input should be a number, got True"),
        ({"train": {"seed": 5_000_000_000}}, r"train\.seed: input should be less than or equal to 4294967295"),
        ({"data": {"image_size": 10**9}}, r"data\.image_size: .*less than or equal to 16384"),
        ({"data": {"name": 5}}, r"data\.name: input should be a valid string, got 5; put it in quotes"),
        ({"data": {"name": ""}}, r"data\.name: string should have at least 1 character"),
        ({"teacher": {"mean": [0.5]}}, r"teacher\.mean: mean and std must be given together"),
        ({"teachers": [{"std": [0.5]}, {}]}, r"teachers\.0\.std: mean and std must be given together"),
        ({"teacher": {"mean": [0.5, 0.5], "std": [1]}}, r"teacher\.std: must have as many numbers as mean, 2"),
        ({"teacher": {"mean": [math.inf], "std": [1]}}, r"teacher\.mean\.0: input should be a finite number"),
        ({"optim": {"nesterov": True, "momentum": 0}}, r"optim\.nesterov: needs optim\.momentum above 0"),
        ({5: 1}, "the key 5 must be text"),
    ],
    ids=str,
)
def test_values_of_other_types_are_refused_by_key(tree, says):
    with pytest.raises(InputError, match=says) as error:
        make_recipe(tree)
    assert "\n" not in str(error.value)


def test_a_tree_that_holds_itself_is_refused():
    tree: dict = {"student": {"kwargs": {}}}
    tree["student"]["kwargs"]["again"] = tree
    with pytest.raises(InputError, match="recipe: it has more than 40 levels or 100000 values, or holds itself"):
        make_recipe(tree)
    with pytest.raises(InputError, match="must be a mapping"):
        make_recipe([1])


@pytest.mark.parametrize("number", ["2e0", "2", "2.0", "'2e0'"])
def test_a_number_is_one_in_a_losses_options_as_in_any_key(number):
    recipe = load_recipe("digits", [f"losses.dist.temperature={number}", f"optim.lr={number}"])
    check_losses(recipe, 10)
    assert recipe.optim.lr == 2.0


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["optim.milestones=[3]"], "--set optim.milestones: has no effect unless optim.schedule is multistep"),
        (["optim.gamma=0.2"], "--set optim.gamma: has no effect unless"),
        (["optim.name=adamw", "optim.momentum=0.8"], "--set optim.momentum: has no effect on adamw"),
        (["optim.name=adamw", "optim.nesterov=true"], "--set optim.nesterov: has no effect on adamw"),
        (["data.unlabelled_batch=8"], "--set data.unlabelled_batch: has no effect without data.unlabelled"),
        (
            ["data.streamed=true"],
            "--set data.streamed: has no effect unless data.name or",
        ),
        (["method=none", "data.unlabelled=rest"], "--set data.unlabelled: images without labels have no effect"),
        (["method=none", "student.head=teacher"], "--set student.head: there is no teacher whose head"),
        (["teachers_combine=logits"], "--set teachers_combine: has no effect on one teacher"),
        (["teacher.weight=2"], "--set teacher.weight: has no effect on one teacher"),
        (["detection.top_k=5"], "--set detection.top_k: has no effect unless task is detection"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_key_without_effect_is_refused(overrides, says, tmp_path):
    with pytest.raises(InputError, match=says):
        load_recipe("digits", overrides)
    file = tmp_path / "mine.yaml"  # a run's own recipe has every key, and stays readable
    recipe = make_recipe({**load_recipe("digits").to_dict(), "optim": {"milestones": [3], "schedule": "cosine"}})
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    file.write_text("optim: {milestones: [3]}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: optim\.milestones: has no effect"):
        load_recipe(file)


def test_what_the_user_typed_is_named():
    with pytest.raises(InputError, match=r"^--lr: input should be greater than 0, got -1\.0$"):
        load_recipe("default", values={"optim.lr": -1.0}, words={"optim.lr": "--lr"})
    with pytest.raises(InputError, match=r"^--set losses\.dist\.temperature: must be a finite number, got nan$"):
        load_recipe("digits", ["losses.dist.temperature=.nan"])
    with pytest.raises(InputError, match=r"^--set optim\.lr: input should be greater than 0, got -1$"):
        load_recipe("digits", ["optim.lr=-1"])


# Weights and milestones of what the command line names


@pytest.mark.parametrize(
    ("student", "pretrained"),
    [
        ("fasterrcnn/resnet18", True),
        ("retinanet/timm/resnet18", True),
        ("torchvision/fcos_resnet50_fpn", True),
        ("hf/PekingU/rtdetr_r18vd", True),
        ("fasterrcnn/tiny8", False),
        ("hf/rt_detr", False),
        ("mine.py:detector", False),
    ],
)
def test_a_detector_that_is_named_comes_with_the_weights_that_there_are(student, pretrained):
    values = {"teacher.name": student, "student.name": student, "data.name": "coco:D"}
    recipe = load_recipe("detection", values=values)
    assert (recipe.student.pretrained, recipe.teacher.pretrained) == (pretrained, pretrained)
    assert make_recipe({"task": "detection", "student": {"name": student}}).student.pretrained is pretrained
    told = load_recipe("detection", values={**values, "student.pretrained": False})
    assert not told.student.pretrained
    weighted = load_recipe("detection", values={**values, "student.weights": "mine.pt", "teacher.weights": "mine.pt"})
    assert (weighted.student.pretrained, weighted.teacher.pretrained) == (False, False)


@pytest.mark.parametrize("said", [True, False])
def test_what_a_recipe_says_of_weights_stays_for_a_model_that_has_such(said, tmp_path):
    path = tmp_path / "mine.yaml"
    tree = {"student": {"name": "timm/resnet18", "pretrained": said}, "teacher": {"name": "cifar/resnet20"}}
    path.write_text(yaml.safe_dump(tree))
    assert load_recipe(path, values={"student.name": "timm/resnet34"}).student.pretrained is said
    assert not load_recipe(path, values={"student.name": "cifar/resnet8"}).student.pretrained
    assert load_recipe(path, values={"teacher.name": "timm/resnet50"}).teacher.pretrained  # nothing was said of one
    assert not load_recipe(path, ["student.name=timm/resnet34"], values={"student.weights": "a.pt"}).student.pretrained


@given(st.lists(st.integers(1, 300), max_size=4), st.integers(1, 400), st.integers(1, 400))
def test_milestones_keep_their_share_of_the_training(milestones, old, new):
    moved = scaled_milestones(milestones, old, new)
    assert moved == pytest.approx([m * new / old for m in milestones], abs=0.006)
    assert all(isinstance(m, int) or m != int(m) for m in moved)
    assert scaled_milestones(milestones, old, old) == milestones


def test_another_length_moves_the_milestones_unless_they_are_given():
    assert load_recipe("detection", values={"train.epochs": 24}).optim.milestones == (16, 22)
    assert load_recipe("detection", ["train.epochs=3"]).optim.milestones == (2, 2.75)
    assert load_recipe("detection", ["optim.milestones=[1]"], values={"train.epochs": 3}).optim.milestones == (1,)
    assert load_recipe("detection", values={"train.epochs": 12}) == load_recipe("detection")


NAMED = [(name, method) for name in recipe_names() for method in load_recipe(name).methods]


@pytest.mark.parametrize(("name", "method"), NAMED)
def test_the_methods_that_shipped_recipes_name_fit_any_number_of_classes(name, method):
    """One class of boxes is common, and nobody asked for an S or a d that it does not allow."""
    recipe = with_method(load_recipe(name), method, 0)
    for classes in (1, 2, 3, 4, 80):
        if recipe.task == "detection":
            check_detection_losses(recipe, classes)
        elif classes > 1 and (method, classes) != ("ldrld", 2):  # which needs three
            check_losses(recipe, classes)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 100])
def test_the_default_stages_are_those_that_the_classes_allow(classes):
    recipe = with_method(load_recipe("coco"), "pcd", 0)
    objective = build_objective(fitted_terms(recipe), num_classes=classes)
    stages = min(3, classes // 2)
    assert objective.terms[1].loss.stages == stages
    said = f"pcd: S is {stages}, not 3: logits of {classes} classes allow no more"
    assert objective.notes == ([] if stages == 3 else [said])
    asked = load_recipe("coco", ["losses=[{method: detector}, {method: pcd, stages: 2}]"])
    assert fitted_terms(asked) == asked.losses


def test_feature_methods_on_data_of_ones_own_pull_as_hard_as_the_labels():
    recipe = load_recipe("detection")
    pyramids = [name for name, method in METHODS.items() if method.kind == "pyramids" and name != "detector"]
    assert pyramids
    for name in pyramids:
        assert with_method(recipe, name, 0).strength == 1.0


def test_keys_of_big_teachers_are_told_where_they_mean_nothing():
    for values, says in {
        ("teacher", "batch_size", 0): "teacher.batch_size: input should be greater than or equal to 1, got 0",
        ("teacher", "precision", "int4"): "teacher.precision",
    }.items():
        group, key, value = values
        with pytest.raises(InputError, match=says):
            make_recipe({group: {key: value}})
    for key, value in {"precision": "bfloat16", "batch_size": 4, "shard": True}.items():
        with pytest.raises(InputError, match=rf"teacher.{key}: is of classifiers, and the task is detection"):
            make_recipe({"task": "detection", "method": "none", "teacher": {key: value}})
        with pytest.raises(InputError, match=rf"teacher.{key}: has no effect on a module that is passed in"):
            make_recipe({"data": {"name": "loaders"}, "teacher": {key: value}})
        served = {"teacher": {"name": "http://localhost/v2/models/big", key: value}}
        if key == "batch_size":
            make_recipe(served)
        else:
            with pytest.raises(InputError, match=rf"teacher.{key}: has no effect on http://.*weights are elsewhere"):
                make_recipe(served)
    with pytest.raises(InputError, match=r"teachers.1.shard: is of one teacher, and there are several"):
        make_recipe({"teachers": [{"name": "cifar/resnet8"}, {"name": "cifar/resnet8", "shard": True}]})


def test_only_the_precision_of_a_big_teacher_makes_another_run():
    plain = make_recipe({"method": "kd"})
    assert make_recipe({"method": "kd", "teacher": {"batch_size": 4, "shard": True}}).digest() == plain.digest()
    assert make_recipe({"method": "kd", "teacher": {"precision": "float32"}}).digest() == plain.digest()
    assert make_recipe({"method": "kd", "teacher": {"precision": "bfloat16"}}).digest() != plain.digest()
