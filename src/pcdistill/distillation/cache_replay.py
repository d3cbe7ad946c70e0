"""A stored teacher in a run: which runs can take one, and training batches with its logits."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pcdistill.data.loader import Batch, Batches
from pcdistill.distillation.cache_store import TeacherCache, fingerprint, read_state
from pcdistill.distillation.objective import method_kind, views_of
from pcdistill.distillation.teacher import Teacher
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe


class CachedBatches(Batches):
    """Batches with their teacher logits out of a cache; after its epochs the stream begins anew.

    Args:
        batches: the stream that the cache was made of, this process's share.
        cache: checked against them.
        rank: this process.
        world_size: of so many.
    """

    def __init__(self, batches: Batches, cache: TeacherCache, *, rank: int = 0, world_size: int = 1) -> None:
        self.batches, self.cache = batches, cache
        self.rank, self.world_size = rank, world_size
        self.num_samples, self.signature = batches.num_samples, batches.signature

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        info = self.cache.info
        stored = epoch % info.epochs
        for number, batch in enumerate(self.batches.epoch(stored, start), start):
            places = number * info.rows + self._places(len(batch.images))
            logits = self.cache.logits(stored, places)
            yield replace(batch, teacher_logits=logits.to(batch.images.device, non_blocking=True))

    def _places(self, rows: int) -> Tensor:
        """Where this process's rows lie in the whole batch: a run of samples, in every view."""
        views, whole = self.cache.info.views, self.cache.info.rows
        own, size = rows // views, whole // views
        if own * self.world_size != size:
            raise InputError(
                f"the cache {self.cache.path} has batches of {size} images, this run has {own} x {self.world_size}"
            )
        first = torch.arange(self.rank * own, (self.rank + 1) * own)
        return torch.cat([first + view * size for view in range(views)])


def resolve_cache(recipe: Recipe) -> Recipe:
    """The recipe with its teacher.cache where that fits, and on the cache's stream of batches in any case.

    `{seed}` in the path stands for the run's seed. Methods that compare features, or another number of views than the
    cache holds, run the teacher itself.
    """
    teacher = recipe.teacher
    if teacher is None or teacher.cache is None:
        return recipe
    path = teacher.cache.replace("{seed}", str(recipe.train.seed))
    info = read_state(Path(path))["info"]
    fits = recipe.distils and views_of(recipe) == info["views"] and not _features(recipe)
    teacher = replace(teacher, cache=path if fits else None)
    return replace(recipe, teacher=teacher, data=replace(recipe.data, seed=info["seed"]))


def replayed(recipe: Recipe, teacher: Teacher, data: Any, accelerator: Accelerator) -> Any:
    """The data with the cache's logits in its training batches, after every check.

    Raises:
        InputError: a term compares features, or the cache is of another teacher or stream.
    """
    assert recipe.teacher is not None
    assert recipe.teacher.cache is not None
    if recipe.task != "classification":
        raise InputError("teacher.cache holds logits of classifiers; detection has none")
    for method in _features(recipe):
        raise InputError(f"{method} compares {method_kind(method)}; teacher.cache holds logits alone")
    cache = TeacherCache(recipe.teacher.cache)
    cache.check(
        teacher=fingerprint(teacher),
        stream=data.train.signature,
        classes=len(data.classes),
        views=views_of(recipe),
    )
    batches = CachedBatches(data.train, cache, rank=accelerator.process_index, world_size=accelerator.num_processes)
    return replace(data, train=batches)


def _features(recipe: Recipe) -> list[str]:
    """Methods of the recipe that compare more than logits."""
    return [t.method for i, t in enumerate(recipe.losses) if method_kind(t.method, f"losses.{i}") != "logits"]
