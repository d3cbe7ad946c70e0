"""Making and replaying a teacher's cache: one pass of the teacher over some epochs of a run's own batches."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from pcdistill.classification import task as prepare
from pcdistill.distill.cache_store import (
    FORMAT,
    LARGEST,
    CachedBatches,
    CacheInfo,
    TeacherCache,
    checksum,
    epoch_file,
    fingerprint,
    read_state,
)
from pcdistill.distill.objective import method_kind, views_of
from pcdistill.distill.teacher import Teacher, TeacherEnsemble, members_of
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console
from pcdistill.engine.placement import Placement, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.models.weights import check_file
from pcdistill.recipe import Recipe

SAVE_SECONDS = 20.0  # between two points that a killed build continues from


def make_cache(
    recipe: Recipe,
    out: Path,
    *,
    epochs: int,
    top_k: int | None = None,
    temperature: float = 4.0,
    console: Console | None = None,
) -> CacheInfo:
    """Store the teacher's logits for `epochs` epochs of the recipe's training batches; continues what was begun.

    Args:
        recipe: data, teacher, views and seed; the student does not matter.
        out: the cache's folder.
        epochs: of augmentation to store; a training of more epochs repeats them.
        top_k: store only the k largest logits of each image and one value for the rest.
        temperature: at which that value keeps the rest's probability.
        console: progress.

    Raises:
        InputError: no weights for the teacher, one at chance, another cache in the folder, or logits beyond float16.
    """
    console = console or Console(quiet=True)
    config = recipe.teacher
    if recipe.task != "classification":
        raise InputError("a cache holds logits of classifiers; detection has none")
    if recipe.teachers:
        raise InputError("a cache is of one teacher: make one for each of `teachers` (--teacher MODEL)")
    if config is None:
        raise InputError("a cache needs a teacher (--teacher MODEL --teacher-weights FILE)")
    accelerator = make_accelerator(recipe.train)
    if accelerator.num_processes > 1:
        raise InputError(
            "a cache is made by one process; start it without a launcher (any number of them can replay it)"
        )
    placement = make_placement(recipe.train, accelerator)
    if config.weights is not None:
        check_file(config.weights)
    set_seed(recipe.train.seed)
    data = prepare.Classification().data(recipe, accelerator)
    classes = len(data.classes)
    if top_k is not None and not 1 <= top_k < classes:
        raise InputError(f"top_k must be from 1 to {classes - 1} for {classes} classes, got {top_k}")
    if config.weights is None and not prepare.knows_classes(config, data):
        raise InputError(f"the teacher {config.name} has no weights for these classes: give --teacher-weights FILE")
    teacher = prepare.build_teacher(config, data=data, allow=recipe.allow).to(accelerator.device)
    prepare.check_teacher(teacher, None, data.val, placement, num_classes=classes, allow=recipe.allow, console=console)
    views = views_of(recipe)
    rows = len(next(iter(data.train.epoch(0))).images)
    seed = prepare.stream_seed(recipe)
    info = CacheInfo(
        fingerprint(teacher),
        data.train.signature,
        seed,
        epochs,
        len(data.train),
        rows,
        classes,
        views,
        top_k,
        temperature,
    )
    checksums, written = _claim(out, info)
    prepare.speed_up(teacher, recipe, placement, data)
    console.start((len(checksums) + written / (rows * info.batches)) / epochs)
    for epoch in range(len(checksums), epochs):
        _write_epoch(out, info, epoch, checksums, written, teacher, data.train, placement, console)
        written = 0
    return info


def _claim(out: Path, info: CacheInfo) -> tuple[list[str], int]:
    """Checksums of the finished epochs, and the rows that are safe in the one under way."""
    if not (out / "cache.json").exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"{out} is in use and is not a cache; name another --out")
        _save_state(out, info, [], 0)
        return [], 0
    state = read_state(out)
    if state["info"] != json.loads(json.dumps(asdict(info))):
        different = [key for key, value in asdict(info).items() if state["info"].get(key) != value]
        raise InputError(f"{out} holds another cache ({', '.join(different)} differ); name another --out, or delete it")
    return state["checksums"], state["rows"]


def _save_state(out: Path, info: CacheInfo, checksums: list[str], rows: int) -> None:
    state = {"format": FORMAT, "info": asdict(info), "checksums": checksums, "rows": rows}
    atomic_write(out / "cache.json", json.dumps(state, indent=1) + "\n")


def _write_epoch(
    out: Path,
    info: CacheInfo,
    epoch: int,
    checksums: list[str],
    written: int,
    teacher: Teacher,
    batches: Any,
    placement: Placement,
    console: Console,
) -> None:
    """Append the rows of an epoch from row `written` on, then its checksum."""
    file = epoch_file(out, epoch)
    if not file.exists():
        written = 0
    first = written // info.rows
    with open(file, "r+b" if written else "wb") as stream:
        stream.truncate(first * info.rows * info.row.itemsize)
        stream.seek(0, os.SEEK_END)
        saved = time.monotonic()
        for number, batch in enumerate(batches.epoch(epoch, first), first):
            images = placement.frozen.images(batch.images)
            with placement.accelerator.autocast():
                logits = teacher(images).float()
            if not bool((logits.abs() <= LARGEST).all()):
                raise InputError(
                    f"the teacher's logits are NaN or beyond float16's {LARGEST:.0f} in epoch {epoch + 1}, batch "
                    f"{number + 1}; such a teacher cannot be cached"
                )
            stream.write(info.encode(logits).tobytes())
            if time.monotonic() - saved >= SAVE_SECONDS:
                stream.flush()
                os.fsync(stream.fileno())
                _save_state(out, info, checksums, (number + 1) * info.rows)
                saved = time.monotonic()
            console.step(epoch, info.epochs, number + 1, info.batches)
        stream.flush()
        os.fsync(stream.fileno())
    checksums.append(checksum(file))
    _save_state(out, info, checksums, 0)
    console.epoch(epoch, info.epochs, f"{file.stat().st_size / 1e6:.1f} MB")


def fit_cache(recipe: Recipe) -> Recipe:
    """A comparison's recipe with its teacher.cache where it fits, and on the cache's stream of batches in any case.

    `{seed}` in the path stands for the run's seed. Methods that compare features, or another number of views than the
    cache holds, run the teacher itself.
    """
    paths = [t.cache and t.cache.replace("{seed}", str(recipe.train.seed)) for t in recipe.all_teachers]
    first = next((path for path in paths if path), None)
    if first is None:
        return recipe
    info = read_state(Path(first))["info"]
    fits = recipe.distils and views_of(recipe) == info["views"] and not _features(recipe)
    teachers = [
        replace(teacher, cache=path if fits else None) for teacher, path in zip(recipe.all_teachers, paths, strict=True)
    ]
    return replace(recipe.with_teachers(teachers), data=replace(recipe.data, seed=info["seed"]))


def _features(recipe: Recipe) -> list[str]:
    """Methods of the recipe that compare more than logits."""
    return [t.method for i, t in enumerate(recipe.losses) if method_kind(t.method, f"losses.{i}") != "logits"]


def replayed(recipe: Recipe, teacher: Teacher | TeacherEnsemble, data: Any, accelerator: Accelerator) -> Any:
    """The data with the logits of the teachers' caches in its training batches, after every check.

    Raises:
        InputError: a term compares features, only some teachers have a cache, or one is of another teacher or stream.
    """
    if recipe.task != "classification":
        raise InputError("teacher.cache holds logits of classifiers; detection has none")
    for method in _features(recipe):
        raise InputError(f"{method} compares {method_kind(method)}; teacher.cache holds logits alone")
    caches = []
    for config, member in zip(recipe.all_teachers, members_of(teacher), strict=True):
        if config.cache is None:
            raise InputError(f"teachers: {config.name} has no cache and another has; give one to each, or to none")
        cache = TeacherCache(config.cache)
        cache.check(
            teacher=fingerprint(member),
            stream=data.train.signature,
            classes=len(data.classes),
            views=views_of(recipe),
        )
        caches.append(cache)
    batches = CachedBatches(
        data.train,
        caches,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        together=teacher.together if isinstance(teacher, TeacherEnsemble) else None,
    )
    return replace(data, train=batches)
