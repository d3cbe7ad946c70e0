"""Whose a folder is: ours, a user's, or another process's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pcdistill
from pcdistill.commands.claim import CALLED, MARK, check_folder, claimed
from pcdistill.engine.checkpoint import save_checkpoint
from pcdistill.errors import InputError, PcdistillError
from pcdistill.recipe import load_recipe

SRC = str(Path(pcdistill.__file__).parents[1])
HOLD = """
import os, sys, time
from pathlib import Path
from pcdistill.commands.claim import claimed
with claimed(Path(sys.argv[1]), "run"):
    child = os.fork()  # as a loader's worker
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


RESULT = json.dumps({"digest": "abc", "status": "done"})
ENVIRONMENT = json.dumps({"command": "pcdistill train", "versions": {"pcdistill": "0.1.0"}})
RECIPE = load_recipe("digits")
OLD = {  # folders that versions without a mark left, by what they hold
    "run": [
        {"result.json": RESULT},
        {"recipe.yaml": "a", "environment.json": ENVIRONMENT},
        {"recipe.yaml": "a", "environment.json": ENVIRONMENT, "README.md": "a card", "notes.txt": "a user's"},
        {"recipe.yaml": RECIPE.to_yaml()},
        {"recipe.yaml": RECIPE.to_yaml(), "teacher/result.json": RESULT},
        {"teacher/result.json": RESULT},
        {"teacher/recipe.yaml": "a", "teacher-2/environment.json": ENVIRONMENT},
        {".last.pt.123.part": "half"},
    ],
    "comparison": [
        {"kd/seed-0/result.json": RESULT, "teacher/result.json": RESULT},
        {"kd/seed-0/result.json": RESULT, "report.html": "", "table.md": "", "results.csv": "", "pictures/1.png": ""},
        {"kd/strength-4/seed-1/environment.json": ENVIRONMENT, "none/seed-0/result.json": RESULT},
    ],
    "cache": [{"cache.json": '{"format": "pcdistill-cache-1"}', "epoch-0000.bin": ""}],
    "search": [{"study.log": '{"op_code": 0, "worker_id": "x", "study_name": "tune", "directions": [2]}\n', "a": ""}],
}
FOREIGN = [
    {"README.md": "mine"},
    {"recipe.yaml": "student: {name: cifar/resnet8}\n"},
    {"recipe.yaml": RECIPE.to_yaml(), "README.md": "mine"},  # --print-config > recipe.yaml, in a project
    {"README.md": "mine", "runs/kd/result.json": RESULT},
    {"README.md": "mine", "teacher/result.json": RESULT},
    {"result.json": '{"accuracy": 1}'},
    {"last.pt": "another program's"},
    {"report.html": "mine"},
    {"results.csv": "mine", "kd/data.txt": "mine"},
    {"environment.json": '{"versions": {}}'},
    {"cache.json": "{}"},
    {"study.log": "mine"},
    {".git/config": "mine"},
    {MARK: "something else"},
]


@pytest.mark.parametrize(("kind", "files"), [(kind, files) for kind, cases in OLD.items() for files in cases])
def test_folders_of_versions_without_a_mark_are_ours_and_lose_nothing(kind, files, tmp_path):
    write(tmp_path / "out", files)
    before = tree(tmp_path / "out")
    with claimed(tmp_path / "out", kind, RECIPE):
        assert (tmp_path / "out" / MARK).read_text() == f"{kind}\n"
    after = tree(tmp_path / "out")
    assert {name: text for name, text in after.items() if name != MARK} == before


def test_a_checkpoint_makes_a_run(tmp_path):
    save_checkpoint(tmp_path / "last.pt", {"epoch": 1})
    check_folder(tmp_path, "run")
    torch.save({"epoch": 1}, tmp_path / "last.pt")
    with pytest.raises(InputError, match="pcdistill did not write"):
        check_folder(tmp_path, "run")


@pytest.mark.parametrize("files", FOREIGN, ids=lambda files: " ".join(files))
@pytest.mark.parametrize("kind", CALLED)
def test_a_users_folder_is_refused_before_anything_is_written(kind, files, tmp_path):
    write(tmp_path / "out", files)
    before = tree(tmp_path)
    with (
        pytest.raises(
            InputError, match=r"files that pcdistill did not write .*; name another folder \(--out .*out-2\)"
        ),
        claimed(tmp_path / "out", kind, RECIPE),
    ):
        pytest.fail("it was taken")
    assert tree(tmp_path) == before


names = st.sampled_from(["README.md", "recipe.yaml", "result.json", "last.pt", "data/a.txt", "notes", "report.html"])


@settings(max_examples=60, deadline=None)
@given(files=st.dictionaries(names, st.text(max_size=20), min_size=1, max_size=4), kind=st.sampled_from([*CALLED]))
def test_whatever_a_user_has_is_refused_and_stays(files, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    before = tree(folder)
    with pytest.raises(InputError), claimed(folder, kind, RECIPE):
        pytest.fail("it was taken")
    assert tree(folder) == before


def test_one_kind_is_not_another(tmp_path):
    with claimed(tmp_path, "comparison"):
        (tmp_path / "table.md").write_text("")
    with pytest.raises(InputError, match="holds a comparison, not the run of one student; name another folder"):
        check_folder(tmp_path, "run")
    with claimed(tmp_path, "comparison"):
        pass


def test_what_is_left_empty_is_taken_away_and_what_was_there_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "a" / "b", "run"):
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    (tmp_path / "there").mkdir()
    with claimed(tmp_path / "there" / "b", "run"):
        (tmp_path / "there" / "b" / "kept").write_text("")
    with claimed(tmp_path / "there" / "c", "run"):
        pass
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["b"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("file", "is a file; --out must name a folder"),
        ("file/below", "cannot be a folder: Not a directory"),
        ("loop", "cannot be a folder: Too many levels of symbolic links"),
        ("loop/below", "cannot be a folder: Too many levels"),
        ("nowhere", "is a link to nothing"),
        ("x" * 300, "cannot be a folder: File name too long"),
        ("a\0b", "holds a NUL character"),
    ],
    ids=["file", "below a file", "loop", "below a loop", "dangling", "long", "NUL"],
)
def test_what_cannot_be_a_folder(name, says, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=says), claimed(tmp_path / name, "run"):
        pytest.fail("it was taken")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with (
        claimed(tmp_path / "link", "run"),
        pytest.raises(PcdistillError, match="another process is at work"),
        claimed(tmp_path / "real", "run"),
    ):
        pytest.fail("it was taken twice")


def test_a_mark_that_a_kill_left_empty_is_ours(tmp_path):
    write(tmp_path, {MARK: "", "half": ""})
    with claimed(tmp_path, "run"):
        assert (tmp_path / MARK).read_text() == "run\n"


def test_only_the_first_of_several_processes_of_a_run_holds_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with claimed(tmp_path / "out", "run"):
        assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text(RESULT)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(tmp_path / MARK))

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "open", refuse)
    with claimed(tmp_path, "run"):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    with pytest.raises(PermissionError), claimed(tmp_path, "run"):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
@pytest.mark.slow
def test_of_two_processes_the_second_is_told_so_and_a_kill_leaves_no_lock(tmp_path):
    out, env = tmp_path / "out", {**os.environ, "PYTHONPATH": SRC}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        try:
            with pytest.raises(PcdistillError, match=r"another process is at work in .*out-2"), claimed(out, "run"):
                pytest.fail("it was taken twice")
            assert (out / MARK).exists()
            process.kill()
            process.wait()
            with claimed(out, "run"):  # though the worker of the killed one lives
                os.kill(child, 0)
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)
