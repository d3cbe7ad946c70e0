"""Making a teacher's cache: one pass of the teacher over some epochs of a run's own batches."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from accelerate.utils import set_seed
from torch import Tensor

from pcdistill.classification import task as prepare
from pcdistill.commands.claim import claimed
from pcdistill.commands.folder import changes, differing, suggestion
from pcdistill.distillation.cache_store import (
    FORMAT,
    LARGEST,
    CacheInfo,
    CacheState,
    epoch_file,
    fingerprint,
    read_state,
)
from pcdistill.distillation.objective import views_of
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.checkpoint import atomic_write
from pcdistill.engine.console import Console
from pcdistill.engine.placement import Placement, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.files import clear_parts, file_checksum, sealed_json
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
    with claimed(out, "cache", recipe):
        options: dict[str, Any] = {"top_k": top_k, "temperature": temperature}
        return _make_cache(recipe, out, epochs, console or Console(quiet=True), **options)


def _make_cache(
    recipe: Recipe, out: Path, epochs: int, console: Console, *, top_k: int | None, temperature: float
) -> CacheInfo:
    """As :func:`make_cache`, in a folder that is held."""
    placement = _placement(recipe)
    set_seed(recipe.train.seed)
    data = prepare.Classification().data(recipe, placement.accelerator)
    classes = len(data.classes)
    if top_k is not None and not 1 <= top_k < classes:
        raise InputError(f"top_k must be from 1 to {classes - 1} for {classes} classes, got {top_k}")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a finite number above 0, got {temperature:g}")
    teacher = _teacher(recipe, data, placement)
    info = CacheInfo(
        teacher=fingerprint(teacher),
        stream=data.train.signature,
        seed=prepare.stream_seed(recipe),
        epochs=epochs,
        batches=len(data.train),
        rows=len(next(data.train.epoch(0))),
        classes=classes,
        views=views_of(recipe),
        top_k=top_k,
        temperature=temperature,
    )
    writer = _Writer(out, info, recipe, console)
    if writer.is_done:
        return info
    prepare.check_teacher(teacher, None, data.val, placement, num_classes=classes, allow=recipe.allow, console=console)
    writer.begin()
    writer.teacher = _known(teacher, recipe, data, placement)
    prepare.speed_up(teacher, recipe, placement, data)

    def logits(epoch: int, start: int) -> Iterator[Tensor]:
        for batch in data.train.epoch(epoch, start):
            with placement.accelerator.autocast():
                yield teacher(placement.frozen.images(batch.images)).float()

    writer.finish(logits)
    return info


def _known(teacher: Teacher, recipe: Recipe, data: Any, placement: Placement) -> dict[str, Any]:
    """What a run that has the cache alone says of the teacher: name, size, and its metrics by split."""
    assert recipe.teacher is not None
    task = prepare.Classification()
    known: dict[str, Any] = {"name": recipe.teacher.name, **task.info(teacher, data)}
    for split, batches in (("val", data.val), ("test", data.test)):
        found = None if batches is None else task.evaluate(teacher, batches, data, placement)
        known[split] = found and {key: value for key, value in found.items() if key != "samples"}
    return known


def _placement(recipe: Recipe) -> Placement:
    """Where the teacher runs, for a recipe that can have a cache."""
    if recipe.task != "classification":
        raise InputError("a cache holds logits of classifiers; detection has none")
    if recipe.teachers:
        raise InputError("a cache is of one teacher: make one for each of `teachers` (--teacher MODEL)")
    if recipe.teacher is None:
        raise InputError("a cache needs a teacher (--teacher MODEL --teacher-weights FILE)")
    if recipe.teacher.weights is not None:
        check_file(recipe.teacher.weights)
    accelerator = make_accelerator(recipe.train)
    if accelerator.num_processes > 1:
        raise InputError(
            "a cache is made by one process; start it without a launcher (any number of them can replay it)"
        )
    return make_placement(recipe.train, accelerator)


def _teacher(recipe: Recipe, data: Any, placement: Placement) -> Teacher:
    """The teacher, with weights for these classes."""
    config = recipe.teacher
    assert config is not None
    if config.weights is None and not prepare.knows_classes(config, data):
        raise InputError(f"the teacher {config.name} has no weights for these classes: give --teacher-weights FILE")
    return prepare.build_teacher(config, data=data, allow=recipe.allow).to(placement.device)


class _Writer:
    """Writes a cache's folder, from where an earlier build was stopped.

    Attributes:
        checksums: of the finished epochs.
        rows: that are safe in the epoch under way.
        teacher: what stands in the cache of it, for runs that do without.
    """

    def __init__(self, out: Path, info: CacheInfo, recipe: Recipe, console: Console) -> None:
        self.out, self.info, self.recipe, self.console = out, info, recipe.to_dict(), console
        self.teacher: dict[str, Any] | None = None
        self.checksums: list[str] = []
        self.rows = 0
        clear_parts(out)
        if not (out / "cache.json").exists():
            return
        state = read_state(out)
        if state.info != info:
            raise InputError(
                f"{out} holds another cache{differing(self._differences(state))}; name another folder (--out "
                f"{suggestion(out)}), or delete {out}"
            )
        self.checksums, self.rows = state.checksums, state.rows

    @property
    def is_done(self) -> bool:
        """Whether every epoch is written, and its file is there as long as it must be."""
        return len(self.checksums) == self.info.epochs and not self._missing()

    def begin(self) -> None:
        """Write what the cache is of, where nothing is written yet."""
        if not (self.out / "cache.json").exists():
            self._save()

    def _missing(self) -> list[int]:
        """Epochs that were written and whose files are gone or cut."""
        size = self.info.batches * self.info.rows * self.info.row.itemsize
        files = [epoch_file(self.out, epoch) for epoch in range(len(self.checksums))]
        return [i for i, file in enumerate(files) if not file.is_file() or file.stat().st_size != size]

    def _differences(self, state: CacheState) -> list[str]:
        """What makes another cache: keys of the recipe, where they were kept, or else the parts of its info."""
        old, now = asdict(state.info), asdict(self.info)
        keys = [] if state.recipe is None else changes(state.recipe, self.recipe)
        named = [key for key in keys if key.split(".")[0] in ("data", "teacher") or key.startswith("train.seed")]
        own = [] if named else ["teacher", "stream"]
        own += ["seed", "epochs", "batches", "rows", "classes", "views", "top_k", "temperature"]
        for key in own:
            if old[key] != now[key]:
                of = {"teacher": "the teacher", "stream": "the batches"}.get(key)
                named.append(of or f"{key} {json.dumps(old[key])} -> {json.dumps(now[key])}")
        return named

    def finish(self, logits: Callable[[int, int], Iterator[Tensor]]) -> None:
        """Write the epochs that are missing; `logits(epoch, start)` gives an epoch's [N, C] from batch `start` on."""
        info = self.info
        self.console.start((len(self.checksums) + self.rows / (info.rows * info.batches)) / info.epochs)
        for epoch in self._missing():
            self._write(epoch, 0, logits)
            if file_checksum(epoch_file(self.out, epoch)) != self.checksums[epoch]:
                raise InputError(
                    f"epoch {epoch + 1} of the cache {self.out} was lost, and comes out otherwise now; delete "
                    f"{self.out}, and make the cache again"
                )
        for epoch in range(len(self.checksums), info.epochs):
            file = epoch_file(self.out, epoch)
            self._write(epoch, self.rows // info.rows if file.exists() else 0, logits)
            self.checksums.append(file_checksum(file))
            self.rows = 0
            self._save()
            self.console.epoch(epoch, info.epochs, f"{file.stat().st_size / 1e6:.1f} MB")

    def _write(self, epoch: int, first: int, logits: Callable[[int, int], Iterator[Tensor]]) -> None:
        """An epoch's file from batch `first` on; of a file that cannot be written only what can be continued stays."""
        file, size = epoch_file(self.out, epoch), self.info.rows * self.info.row.itemsize
        try:
            with open(file, "r+b" if first else "wb") as stream:
                stream.truncate(first * size)
                stream.seek(0, os.SEEK_END)
                self._append(stream, epoch, first, logits(epoch, first))
        except OSError as error:
            with suppress(OSError):
                safe = self.rows * self.info.row.itemsize if epoch == len(self.checksums) else 0
                os.truncate(file, safe)
                if safe == 0:
                    file.unlink()
            raise OSError(error.errno, error.strerror, str(file)) from error

    def _append(self, stream: BinaryIO, epoch: int, first: int, batches: Iterator[Tensor]) -> None:
        info, saved = self.info, time.monotonic()
        for number, logits in enumerate(batches, first):
            if not bool((logits.abs() <= LARGEST).all()):
                raise InputError(
                    f"the teacher's logits are NaN or beyond float16's {LARGEST:.0f} in epoch {epoch + 1}, batch "
                    f"{number + 1}; such a teacher cannot be cached"
                )
            stream.write(info.encode(logits).tobytes())
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._flush(stream)
                self.rows = (number + 1) * info.rows
                self._save()
                saved = time.monotonic()
            self.console.step(epoch, info.epochs, number + 1, info.batches)
        self._flush(stream)

    def _flush(self, stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())

    def _save(self) -> None:
        state = {"format": FORMAT, "info": asdict(self.info), "checksums": self.checksums, "rows": self.rows}
        state["recipe"], state["teacher"] = self.recipe, self.teacher
        atomic_write(self.out / "cache.json", sealed_json(state, indent=1))
