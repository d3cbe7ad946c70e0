"""Files that are cut off or have a flipped bit: refused in a sentence, made again, or of no consequence."""

import json
import random
import shutil
from collections import Counter

import pytest

from tests.faults.counts import record, some
from tests.faults.runs import command, essence, timeless

pytestmark = pytest.mark.faults
RESULTS = ("student.safetensors", "result.json", "teacher/teacher.safetensors")  # what a run is for


def damages(raw: bytes, seed: int) -> dict[str, bytes]:
    """The bytes cut in three ways, and with a bit flipped in three places."""
    draw, found = random.Random(seed), {"empty": b"", "half": raw[: len(raw) // 2], "cut": raw[:-1]}
    for i in range(3 if raw else 0):
        place = draw.randrange(len(raw))
        found[f"bit {i}"] = raw[:place] + bytes([raw[place] ^ 1 << draw.randrange(8)]) + raw[place + 1 :]
    return found


def files_of(folder):
    return sorted(
        path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "pictures" not in path.parts
    )


def results_of(folder):
    """What a run is for: its weights' bytes, and its result without times; None where it cannot be read."""
    found = {name: (folder / name).read_bytes() for name in RESULTS}
    try:
        found["result.json"] = timeless(json.loads(found["result.json"]))
    except ValueError:
        found["result.json"] = None
    return found


@pytest.mark.parametrize("unfinished", [False, True], ids=["finished", "unfinished"])
def test_every_file_of_a_run(unfinished, world, tmp_path):
    """Of a finished run the command gives the stored result; of one without its result, it goes on."""
    wanted, counts = results_of(world.made("distill").folders["distill"]), Counter()
    cases = [(file, how) for file in files_of(world.folders["distill"]) for how in damages(b"12345", 0)]
    for number, (file, how) in enumerate(some(cases)):
        out = tmp_path / str(number)
        shutil.copytree(world.folders["distill"], out)
        raw = (out / file).read_bytes()
        if unfinished and file.as_posix() != "result.json":
            (out / "result.json").unlink()
        (out / file).write_bytes(damages(raw, number).get(how, b""))
        answer = command(*world.commands["distill"](out))
        if answer.code:
            counts["refused"] += 1
        else:
            found = results_of(out)
            changed = [name for name in RESULTS if found[name] != wanted[name]]
            counts["lost" if changed else "worked"] += 1
            assert not changed, (file, how, changed)
        shutil.rmtree(out)
    record(f"damaged files of {'an unfinished' if unfinished else 'a finished'} run", counts)


def test_every_file_of_a_cache_and_of_the_inputs(world, tmp_path):
    """A run with a teacher cache, an .npz file and a weights file, each damaged in turn."""
    whole, counts = world.made("replay").whole["replay"], Counter()
    inputs = [*(world.root / "cache" / file for file in files_of(world.root / "cache")), world.root / "data.npz"]
    inputs.append(world.root / "train" / "student.safetensors")
    cases = [(path, how) for path in inputs for how in damages(b"12345", 0)]
    for number, (path, how) in enumerate(some(cases)):
        out, raw = tmp_path / str(number), path.read_bytes()
        path.write_bytes(damages(raw, number).get(how, b""))
        try:
            answer = command(*world.commands["replay"](out))
        finally:
            path.write_bytes(raw)
        if answer.code:
            counts["refused"] += 1
            continue
        found = essence(out)
        changed = found["student.safetensors"] != whole["student.safetensors"]
        counts["lost" if changed else "worked"] += 1
        assert not changed, (path.name, how)
    record("damaged files of a cache and data", counts)
