"""Making a teacher's cache: one pass of the teacher over some epochs of a run's own batches."""

import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor

from pcdistill.classification import task as prepare
from pcdistill.commands.big_teachers import check_big_teachers, in_turns, split_teacher
from pcdistill.commands.claim import claimed
from pcdistill.commands.folder import changes, differing, suggestion
from pcdistill.distillation.cache_files import CacheFolder, cache_folder
from pcdistill.distillation.cache_store import (
    MANIFEST,
    CacheInfo,
    CacheState,
    Layout,
    fingerprint,
    read_state,
)
from pcdistill.distillation.cache_writer import CacheWriter, Work, share
from pcdistill.distillation.objective import views_of
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.console import Console
from pcdistill.engine.placement import Placement, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.models.weights import check_file
from pcdistill.recipe import Recipe
from pcdistill.remote import place_of

Storage = Literal["float16", "int8"]


class _Alone:
    """A process's accelerator that tells of no other process: each has the whole stream, and computes whole batches.

    So every batch's logits are to the bit those of one process.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def make_cache(
    recipe: Recipe,
    out: Path | str,
    *,
    epochs: int,
    top_k: int | None = None,
    temperature: float = 4.0,
    storage: Storage = "float16",
    console: Console | None = None,
) -> CacheInfo:
    """Store the teacher's logits for `epochs` epochs of the recipe's training batches; continues what was begun.

    Any number of processes (`torchrun`) may make it; what comes out does not depend on their number.

    Args:
        recipe: data, teacher, views and seed; the student does not matter.
        out: the cache's folder, or a URL that fsspec opens.
        epochs: of augmentation to store; a training of more epochs repeats them.
        top_k: store only the k largest logits of each image and one value for the rest.
        temperature: at which that value keeps the rest's probability.
        storage: of a logit: float16, or int8, which rounds to 1/255 of a row's range.
        console: progress.

    Raises:
        InputError: no weights for the teacher, one at chance, another cache in the folder, or logits beyond float16.
    """
    place = place_of(out)
    with claimed(place, "cache", recipe) if isinstance(place, Path) else nullcontext():
        options: dict[str, Any] = {"top_k": top_k, "temperature": temperature, "storage": storage}
        return _make_cache(recipe, place, epochs, console or Console(quiet=True), **options)


def _make_cache(
    recipe: Recipe,
    place: Path | str,
    epochs: int,
    console: Console,
    *,
    top_k: int | None,
    temperature: float,
    storage: Storage,
) -> CacheInfo:
    """As :func:`make_cache`, in a folder that is held."""
    placement, accelerator = _placement(recipe)
    check_big_teachers(recipe, accelerator, console)
    folder = cache_folder(place)
    set_seed(recipe.train.seed)
    data = prepare.Classification().data(recipe, placement.accelerator)
    classes = len(data.classes)
    _check_form(classes, top_k, temperature, storage)
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    assert recipe.teacher is not None
    split = recipe.teacher.shard
    with in_turns(accelerator) if split else nullcontext():
        teacher = _teacher(recipe, data, placement)
        whole = fingerprint(teacher)
        facts = {"name": recipe.teacher.name, **prepare.Classification().info(teacher, data)}
        if split:
            split_teacher(teacher, accelerator, (data.in_channels, data.image_size), console)
    info = CacheInfo(
        teacher=whole,
        stream=data.train.signature,
        seed=prepare.stream_seed(recipe),
        epochs=epochs,
        batches=len(data.train),
        rows=len(next(data.train.epoch(0))),
        classes=classes,
        views=views_of(recipe),
        top_k=top_k,
        temperature=temperature,
        storage=storage,
    )
    writer, work = _begin(folder, info, recipe, accelerator, console)
    if not work and writer.state is not None and len(writer.known) == len(writer.layout):
        return info
    prepare.check_teacher(teacher, None, data.val, placement, num_classes=classes, allow=recipe.allow, console=console)
    if accelerator.is_main_process and writer.state is None:
        writer.save([], recipe.to_dict(), None)
    # A teacher that is split answers when all processes ask.
    known = {**facts, **_measured(teacher, data, placement)} if split or accelerator.is_main_process else None
    prepare.speed_up(teacher, recipe, placement, data)

    def logits(epoch: int, start: int) -> Iterator[Tensor]:
        for batch in data.train.epoch(epoch, start):
            placement.begin_step()
            with placement.accelerator.autocast():
                yield teacher(placement.frozen.images(batch.images)).float()

    console.start(1 - len(work) / len(writer.layout))
    writer.write(share(work, accelerator.process_index, accelerator.num_processes), logits)
    teacher.finish()
    if accelerator.is_main_process:
        writer.save(writer.complete(work), recipe.to_dict(), known)
    return info


def _check_form(classes: int, top_k: int | None, temperature: float, storage: Storage) -> None:
    """Raise InputError for a way to store logits that there is not."""
    if top_k is not None and not 1 <= top_k < classes:
        raise InputError(f"top_k must be from 1 to {classes - 1} for {classes} classes, got {top_k}")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a finite number above 0, got {temperature:g}")
    if storage not in ("float16", "int8"):
        raise InputError(f"storage must be float16 or int8, got {storage}")
    if top_k is not None and storage != "float16":
        raise InputError("storage int8 is of all logits; leave top_k out, or store its few logits in float16")


def _begin(
    folder: CacheFolder, info: CacheInfo, recipe: Recipe, accelerator: Accelerator, console: Console
) -> tuple[CacheWriter, Work]:
    """What the folder holds of this cache, and what is to be written. The first process looks, for all alike.

    Raises:
        InputError: it holds another cache.
    """
    if accelerator.is_main_process:
        folder.clear()
    accelerator.wait_for_everyone()
    state = read_state(folder) if MANIFEST in folder.sizes() else None
    if state is not None and state.info != info:
        raise InputError(
            f"{folder.place} holds another cache{differing(_differences(state, info, recipe))}; name another folder "
            f"(--out {_another(folder.place)}), or delete {folder.place}"
        )
    layout = Layout.of(info) if state is None else Layout(info, state.shard)
    writer = CacheWriter(folder, layout, state, console)
    found: list[Any] = [None]
    if accelerator.is_main_process:
        found = [writer.survey()]
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return writer, found[0]


def _another(place: Path | str) -> Path | str:
    return suggestion(place) if isinstance(place, Path) else f"{place}-2"


def _differences(state: CacheState, info: CacheInfo, recipe: Recipe) -> list[str]:
    """What makes another cache: keys of the recipe, where they were kept, or else the parts of its info."""
    old, now = asdict(state.info), asdict(info)
    keys = [] if state.recipe is None else changes(state.recipe, recipe.to_dict())
    named = [key for key in keys if key.split(".")[0] in ("data", "teacher") or key.startswith("train.seed")]
    own = [] if named else ["teacher", "stream"]
    own += ["seed", "epochs", "batches", "rows", "classes", "views", "top_k", "temperature", "storage"]
    for key in own:
        if old[key] != now[key]:
            of = {"teacher": "the teacher", "stream": "the batches"}.get(key)
            named.append(of or f"{key} {json.dumps(old[key])} -> {json.dumps(now[key])}")
    return named


def _measured(teacher: Teacher, data: Any, placement: Placement) -> dict[str, Any]:
    """The teacher's metrics by split, for a run that has the cache alone."""
    task, known = prepare.Classification(), {}
    for split, batches in (("val", data.val), ("test", data.test)):
        found = None if batches is None else task.evaluate(teacher, batches, data, placement)
        known[split] = found and {key: value for key, value in found.items() if key != "samples"}
    return known


def _placement(recipe: Recipe) -> tuple[Placement, Accelerator]:
    """Where the teacher runs, as if in one process, and what knows of the others; of a recipe that can have a cache."""
    if recipe.task != "classification":
        raise InputError("a cache holds logits of classifiers; detection has none")
    if recipe.teachers:
        raise InputError("a cache is of one teacher: make one for each of `teachers` (--teacher MODEL)")
    if recipe.teacher is None:
        raise InputError("a cache needs a teacher (--teacher MODEL --teacher-weights FILE)")
    if recipe.teacher.weights is not None:
        check_file(recipe.teacher.weights)
    accelerator = make_accelerator(recipe.train)
    alone = accelerator if accelerator.num_processes == 1 else cast(Accelerator, _Alone(accelerator))
    return make_placement(recipe.train, alone), accelerator


def _teacher(recipe: Recipe, data: Any, placement: Placement) -> Teacher:
    """The teacher, with weights for these classes."""
    config = recipe.teacher
    assert config is not None
    if config.weights is None and not prepare.knows_classes(config, data):
        raise InputError(f"the teacher {config.name} has no weights for these classes: give --teacher-weights FILE")
    teacher = prepare.build_teacher(config, data=data, allow=recipe.allow)
    return teacher if config.shard else teacher.to(placement.device)
