"""Every block of code in README.md, CONTRIBUTING.md and docs/ does what it is shown to do.

An indented block is shell, and so is a fence that names no language. Commands are run as they stand, with what the
reader fills in (`PLACES`) and with shorter trainings (`shortened`). What is not run is in `NOT_RUN`, with the reason;
it is still resolved, as `--print-config` does, or read to its last flag.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import tyro
import yaml
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy

from pcdistill import cli, models
from pcdistill.recipe import make_recipe
from tests.blocks import DOCUMENTS, ROOT, Block, blocks_of, commands_of
from tests.commands.folders import class_folders
from tests.data.packing import shard

LANGUAGES = {"shell", "python", "yaml", "text", "formula"}
# What stands in capitals is the reader's to fill in: by a pattern, in the order of this list.
PLACES = [
    (r"\bRECIPE \.\.\.", "RECIPE --teacher NAME --teacher-weights FILE"),
    (r"report FOLDER", "report runs/NAME"),
    (r"coco:FOLDER", "'coco:Meine Kisten'"),
    (r"(customs\.py) COMPARISON\.\.\.", r"\1 a b"),
    (r"\bFOLDER\b", "'Meine Fotos'"),
    (r"--unlabelled MORE", "--unlabelled 'Ohne Namen'"),
    (r"--student-weights FILE", "--student-weights start.safetensors"),
    (r"--teacher-weights FILE", "--teacher-weights teacher.safetensors"),
    (r"\bRUN\b", "runs/NAME"),
    (r"\bRECIPE\b", "digits"),
    (r"timm/NAME", "timm/test_resnet"),
    (r"--teacher NAME", "--teacher cifar/resnet8"),
]
# What is not run: a pattern of the command, and why. The first line that fits counts.
NOT_RUN = [
    (r"^(pip|uv|apt-get|make|conda|docker|hf|ray) ", "installs, or is a target of the Makefile, which .ci/run makes"),
    (r"^pcdistill push ", "needs the hub; tests/commands/test_push.py has a stand-in"),
    (r"^pcdistill (tune|demo)( |$)", "minutes; tests/commands/test_tune.py and test_demo.py run short ones"),
    (r"^pcdistill bench ", "seconds for each figure; tests/commands/test_bench.py runs short ones"),
    (r"-pretrained True", "needs the hub"),
    (r" cifar100( |$)", "needs CIFAR-100"),
    (r" imagenet-", "needs ImageNet"),
    (r" --cluster ", "needs a cluster; tests/commands/test_cluster.py makes one"),
    (r"--students ", "minutes; tests/commands/test_students.py runs a short one"),
    (r"compare patient ", "as the distillation before it; tests/test_beyond.py"),
    (r"(teacher-\d|docs/results/beyond/)", "a record of hours, of which one command needs the other"),
    (r"(digits-detection|coco:.*--teacher|bccd\.yaml)", "minutes; tests/detection trains detectors"),
    (r"^python scripts/new_method\.py", "writes into the clone; tests/scripts/test_new_method.py runs it in a copy"),
    (r"^python scripts/faults_table\.py", "writes the counts of the fault injection into its document"),
    (r"^python benchmarks/", "minutes, or runs of hours; the benchmarks' results say when they were made"),
    (r"^python docs/results/evidence/", "works on photographs that are not in the clone"),
    (r"^bash docs/results/detr/run\.sh", "hours"),
    (r"^moto_server ", "a server of another project; tests/test_remote.py has fsspec's memory in its place"),
]
LAUNCHERS = {"accelerate", "sbatch", "srun", "torchrun"}  # need several GPUs or a cluster
RECORDS = "docs/results/"  # commands there are records of hours: resolved, never run
TRAINED = ("train", "distill", "compare", "tune", "cache")


def filled_in(text: str) -> str:
    for pattern, place in PLACES:
        text = re.sub(pattern, place, text)
    return text


def reason(document: str, command: list[str]) -> str | None:
    """Why a command is not run, or None."""
    line = " ".join(command) + " "
    if command[0] in LAUNCHERS:
        return "needs several GPUs or a cluster"
    why = next((why for pattern, why in NOT_RUN if re.search(pattern, line)), None)
    return why or ("a record of hours" if document.startswith(RECORDS) else None)


def shortened(argv: list[str]) -> list[str]:
    """The same command on few images for one epoch, on small networks, with two of its methods and those in files."""
    if argv[0] not in TRAINED:
        return argv
    argv = [re.sub(r"^timm/.*", "timm/test_resnet", word) for word in argv]
    short = ["--epochs", "1", "--limit", "48", "--batch-size", "16", "--allow", "weak-teacher", "--device", "cpu"]
    if {"Meine Fotos", "photos", "wds:shards"} & set(argv):
        short += ["--image-size", "32", "--workers", "0", "--teacher-pretrained", "False"]
        short += [] if "--student-weights" in argv else ["--student-pretrained", "False"]
    if argv[0] in ("distill", "compare") and "--teacher-weights" not in argv:
        short += ["--teacher-epochs", "1"]
    if argv[0] == "compare":
        methods = argv[argv.index("--methods") + 1].split(",") if "--methods" in argv else ["none", "kd"]
        kept = [name for number, name in enumerate(methods) if number < 2 or ":" in name]
        short += ["--methods", ",".join(kept), "--seeds", "1", "--jobs", "1"]
        short += ["--equal-strength", "4"] if "--equal-strength" in argv else []
    return [*argv, *short]


def parsed(argv: list[str]):
    """The command as `pcdistill` reads it, to the last flag."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.extras.subcommand_cli_from_dict(cli.COMMANDS, prog="pcdistill", args=argv, config=config)


def of_pcdistill(command: list[str]) -> list[str] | None:
    """The words after `pcdistill`, also where another program starts it as a module."""
    if command[0] == "pcdistill":
        return command[1:]
    if "-m" in command and command[command.index("-m") + 1 :][:1] == ["pcdistill"]:
        return command[command.index("-m") + 2 :]
    return None


def boxes(folder: Path) -> None:
    """Ten images with a box each, as COCO has them and, in data.yaml beside the folder, as YOLO has them."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    kinds = ("Kiste", "Ball", "großes Rad")
    names = [f"kiste {i}.png" for i in range(10)]
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (90, 20 * i, 90)).save(folder / "images" / name)
        (folder / "labels" / f"kiste {i}.txt").write_text(f"{i % 3} 0.375 0.416667 0.5 0.5\n", encoding="utf-8")
    tree = {"train": f"{folder.name}/images", "val": f"{folder.name}/images", "names": list(kinds)}
    (folder.parent / "data.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    found = {
        "images": [{"id": i, "file_name": name, "width": 40, "height": 30} for i, name in enumerate(names)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1 + i % 3, "bbox": [5, 5, 20, 15], "area": 300, "iscrowd": 0}
            for i in range(len(names))
        ],
        "categories": [{"id": 1 + i, "name": name} for i, name in enumerate(kinds)],
    }
    (folder / "train.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where the reader stands: the clone's files, photographs, and what else `PLACES` names, but for a run."""
    folder = tmp_path_factory.mktemp("where the reader stands")
    for name in ("docs", "benchmarks", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    class_folders(folder / "Meine Fotos", per_class=20)
    for name, shade in (("apple", 60), ("pear", 180)):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(1, 13):
            Image.new("RGB", (40, 36), (shade, 20 * i, 90)).save(folder / "photos" / name / f"{i}.jpg")
    shutil.copytree(folder / "photos" / "pear", folder / "Ohne Namen")
    shutil.copy(folder / "photos" / "pear" / "1.jpg", folder / "one.jpg")
    boxes(folder / "Meine Kisten")
    for split, first, size in (("train", 0, 30), ("val", 30, 12)):
        shard(folder / "shards" / f"photos-{split}-0000.tar", range(first, first + size))
    own_loss = next(block for block in blocks_of("docs/adding-a-method.md") if block.language == "python")
    (folder / "my_losses.py").write_text(own_loss.text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def furnished(place):
    """The same place with a run, a teacher's weights and a student's, made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run = ["distill", "--data", "digits", "--teacher", "cifar/resnet8", "--student", "cifar/resnet8"]
        cli.main([*shortened(run), "--out", "runs/NAME", "--quiet"])
    shutil.copy(place / "runs/NAME/teacher/teacher.safetensors", place / "teacher.safetensors")
    student = models.build_model("timm/test_resnet", num_classes=3, image_size=32)
    models.save_weights(student, place / "start.safetensors", {"model": "timm/test_resnet"})
    return place


def shell(document: str) -> str:
    return filled_in("".join(block.text for block in blocks_of(document) if block.language == "shell"))


def with_commands() -> list[str]:
    return [document for document in DOCUMENTS if any(b.language == "shell" for b in blocks_of(document))]


def test_every_block_says_what_it_is():
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    assert len(blocks) > 70
    odd = {(block.document, block.line, block.language) for block in blocks if block.language not in LANGUAGES}
    assert not odd


@pytest.mark.slow
@pytest.mark.parametrize("document", with_commands())
def test_every_command_is_read_to_its_last_flag(document, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    commands = commands_of(shell(document), place)
    assert commands
    for command in commands:
        argv = of_pcdistill(command)
        if argv is None:
            assert reason(document, command), f"{document}: {command}: no test runs it, and no reason is given"
            assert command[0] != "python" or (place / command[1]).is_file(), command
        elif argv[:1] == ["demo"] or argv[0] not in TRAINED:
            parsed(argv)
        else:
            cli.main([*argv, "--print-config"])
            assert make_recipe(yaml.safe_load(capsys.readouterr().out)), command


def kind(argv: list[str]) -> frozenset[str]:
    """What two commands have in common that do the same but for numbers and names: it is enough to run one of them."""
    return frozenset(word for word in argv if word in ("digits", argv[0]) or word.startswith("--")) - {"--margin"}


@pytest.fixture(scope="session")
def ran() -> set[frozenset[str]]:
    """Kinds of commands that ran in this session."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("document", [name for name in with_commands() if not name.startswith(RECORDS)])
def test_every_command_runs(document, furnished, ran, monkeypatch, capsys):
    monkeypatch.chdir(furnished)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in commands_of(shell(document), furnished):
        argv = of_pcdistill(command)
        if argv is None or reason(document, command) or kind(argv) in ran:
            continue
        ran.add(kind(argv))
        try:
            cli.main(shortened(argv))
        except SystemExit as stopped:
            pytest.fail(f"{document}: {command}: exit code {stopped.code}: {capsys.readouterr().err[-2000:]}")


def test_no_reason_is_without_a_command(place):
    """A line of NOT_RUN that fits nothing is a lie about what is not run."""
    lines = [" ".join(command) + " " for name in with_commands() for command in commands_of(shell(name), place)]
    idle = [pattern for pattern, _ in NOT_RUN if not any(re.search(pattern, line) for line in lines)]
    assert not idle


@pytest.mark.parametrize("block", [b for d in DOCUMENTS for b in blocks_of(d) if b.language == "yaml"], ids=str)
def test_every_recipe_is_one(block: Block, place, monkeypatch):
    monkeypatch.chdir(place)
    tree = {"data": {"name": "digits"}, "method": "mine", **yaml.safe_load(block.text)}
    assert make_recipe(tree)


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 8))


def batches(boxed: bool):
    """Two batches of eight images: with classes, or with boxes as torchvision's detectors take them."""
    images = torch.rand(8, 3, 64, 64)
    target = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1 + i % 2])} for i in range(8)]
    return [(list(images), target)] * 2 if boxed else [(images, torch.arange(8))] * 2


def names_of_the_text(document: str) -> dict:
    """What the document's Python takes for given."""
    if document == "docs/detection.md":
        from pcdistill.detection.detectors.build import build_detector

        loader = batches(boxed=True)
        big, small = (build_detector("fasterrcnn/tiny4", num_classes=2, image_size=64) for _ in range(2))
        return {"big": big, "small": small, "loader": loader, "val_loader": loader}
    loader = batches(boxed=False)
    given = {"big": net(8), "small": net(4), "train_loader": loader, "val_loader": loader, "test_loader": loader}
    logits = {"student_logits": torch.randn(8, 8), "teacher_logits": torch.randn(8, 8), "target": torch.arange(8)}
    return {**given, **logits, "cross_entropy": cross_entropy, "my_program": net(8)}


# own-trainer.md is run by tests/classification/test_own_trainer.py; adding-a-method.md's loss is a file of `place`.
OF_PYTHON = [d for d in DOCUMENTS if any(b.language == "python" for b in blocks_of(d))]
ELSEWHERE = {"docs/own-trainer.md", "docs/adding-a-method.md"}


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted(set(OF_PYTHON) - ELSEWHERE))
def test_python_runs(document, tmp_path, monkeypatch):
    import pcdistill

    monkeypatch.chdir(tmp_path)
    distill = pcdistill.distill

    def short(**options):
        return distill(**{**options, "epochs": 1, "allow": ["weak-teacher"], "train_options": {"device": "cpu"}})

    monkeypatch.setattr(pcdistill, "distill", short)
    scope = {"pcdistill": pcdistill, **names_of_the_text(document)}
    for block in blocks_of(document):
        if block.language == "python":
            exec(compile(block.text, f"{document}:{block.line}", "exec"), scope)
    if document == "docs/teachers.md":  # it defines a teacher, and trains nothing
        assert scope["predict"](torch.rand(2, 3, 64, 64)).shape == (2, 8)
    else:
        assert len(scope["history"]) == 1
