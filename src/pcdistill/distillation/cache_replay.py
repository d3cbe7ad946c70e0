"""A stored teacher in a run: which runs can take one, and training batches with its logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pcdistill.data.loader import Batch, Batches
from pcdistill.distillation.cache_store import TeacherCache, fingerprint, read_state
from pcdistill.distillation.objective import method_kind, views_of
from pcdistill.distillation.teacher import Teacher, TeacherEnsemble, members_of
from pcdistill.errors import InputError
from pcdistill.recipe import Recipe


class CachedBatches(Batches):
    """Batches with their teacher logits out of a cache; after its epochs the stream begins anew.

    Args:
        batches: the stream that the cache was made of, this process's share.
        cache: checked against them; of several teachers one for each, the shortest decides when the stream begins anew.
        rank: this process.
        world_size: of so many.
        together: one teacher's logits from those of several.
    """

    def __init__(
        self,
        batches: Batches,
        cache: TeacherCache | Sequence[TeacherCache],
        *,
        rank: int = 0,
        world_size: int = 1,
        together: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        self.caches = [cache] if isinstance(cache, TeacherCache) else list(cache)
        self.batches, self.cache, self.together = batches, self.caches[0], together
        self.epochs = min(one.info.epochs for one in self.caches)
        self.rank, self.world_size = rank, world_size
        self.num_samples, self.signature = batches.num_samples, batches.signature

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        stored = epoch % self.epochs
        for cache in self.caches:
            cache.ahead(stored, start)
        for number, batch in enumerate(self.batches.epoch(stored, start), start):
            places = number * self.cache.info.rows + self._places(batch)
            found = [cache.logits(stored, places) for cache in self.caches]
            logits = found[0] if self.together is None else self.together(found)
            yield replace(batch, teacher_logits=logits.to(batch.images.device, non_blocking=True))

    def _places(self, batch: Batch) -> Tensor:
        """Where this process's rows lie in the whole batch: a run of labelled samples and one of others, by view."""
        views, whole = self.cache.info.views, self.cache.info.rows
        own, size = len(batch) // views, whole // views
        if own * self.world_size != size:
            raise InputError(
                f"the cache {self.cache.path} has batches of {size} images, this run has {own} x {self.world_size}"
            )
        labelled = own if batch.labelled is None else len(batch.labelled) // views
        others = own - labelled
        first = self.rank * labelled + torch.arange(labelled)
        second = self.world_size * labelled + self.rank * others + torch.arange(others)
        return torch.cat([torch.cat([first, second]) + view * size for view in range(views)])


def resolve_cache(recipe: Recipe) -> Recipe:
    """The recipe with its teacher.cache where that fits, and on the cache's stream of batches in any case.

    `{seed}` in the path stands for the run's seed. Methods that compare features, or another number of views than the
    cache holds, run the teacher itself.
    """
    paths = [teacher.cache for teacher in recipe.with_caches_of_seed().all_teachers]
    first = next((path for path in paths if path), None)
    if first is None:
        return recipe
    info = read_state(first).info
    fits = recipe.distils and views_of(recipe) == info.views and not _features(recipe)
    teachers = [
        replace(teacher, cache=path if fits else None) for teacher, path in zip(recipe.all_teachers, paths, strict=True)
    ]
    return replace(recipe.with_teachers(teachers), data=replace(recipe.data, seed=info.seed))


def replayed(recipe: Recipe, teacher: Teacher | TeacherEnsemble | None, data: Any, accelerator: Accelerator) -> Any:
    """The data with the logits of the teachers' caches in its training batches, after every check.

    Without a teacher the cache alone stands for it.

    Raises:
        InputError: a term compares features, only some teachers have a cache, or one is of another teacher or stream.
    """
    if recipe.task != "classification":
        raise InputError("teacher.cache holds logits of classifiers; detection has none")
    for method in _features(recipe):
        raise InputError(f"{method} compares {method_kind(method)}; teacher.cache holds logits alone")
    caches = []
    members = [None] if teacher is None else members_of(teacher)
    for config, member in zip(recipe.all_teachers, members, strict=True):
        if config.cache is None:
            raise InputError(f"teachers: {config.name} has no cache and another has; give one to each, or to none")
        cache = TeacherCache(config.cache)
        cache.check(
            teacher=None if member is None else fingerprint(member),
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


def _features(recipe: Recipe) -> list[str]:
    """Methods of the recipe that compare more than logits."""
    return [t.method for i, t in enumerate(recipe.losses) if method_kind(t.method, f"losses.{i}") != "logits"]
