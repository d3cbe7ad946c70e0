"""`pcdistill plan`: measures a few steps here, and says what a training will cost, here and at another scale."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from pcdistill import report
from pcdistill.commands.bench import cpu
from pcdistill.commands.big_teachers import warn_of_precision
from pcdistill.commands.costs import (
    ALONE,
    DECODING,
    NETWORK,
    STUDENT,
    TEACHER,
    TOP_K,
    Measured,
    Scale,
    Way,
    as_dict,
    assumptions,
    ways,
    workers_needed,
)
from pcdistill.commands.session import bare_model, open_data
from pcdistill.commands.tasks import task_of
from pcdistill.commands.teachers import training_of
from pcdistill.data.readers import MemoryReader
from pcdistill.data.workers import choose_workers
from pcdistill.distillation.cache_store import CacheInfo
from pcdistill.distillation.objective import method_kind, short_name, views_of
from pcdistill.distillation.teacher import TeacherEnsemble
from pcdistill.engine.console import Console, duration
from pcdistill.engine.loop import Metric, Trainer
from pcdistill.engine.placement import PRECISIONS, make_accelerator, make_placement
from pcdistill.errors import InputError
from pcdistill.recipe import LOADERS, Recipe

SECONDS = 1.0  # that each thing is measured for, after a warm-up
FEWEST, MOST = 3, 200  # repetitions
CPU_SPEED = 20e9  # multiply-adds a second and thread, for the size of the batch that is measured
NAMED = {DECODING: "decoding", TEACHER: "the teacher", STUDENT: "the student", NETWORK: "the network"}
LARGEST, MANY = 100, 200  # logits of a top-k cache, and classes beyond which it is smaller


@dataclass(frozen=True)
class Wanted:
    """The scale that is asked for.

    Attributes:
        images: of an epoch; None: as many as there are.
        nodes: machines.
        gpus: devices of each.
        link_gbit: between two nodes.
        top_k: logits of an image in a top-k cache; None: 100 of more than 200.
        seconds: that each thing is measured for.
    """

    images: int | None = None
    nodes: int = 1
    gpus: int = 1
    link_gbit: float = 100.0
    top_k: int | None = None
    seconds: float = SECONDS

    @property
    def elsewhere(self) -> bool:
        """Whether another scale than this machine's is asked for."""
        return self.images is not None or self.nodes * self.gpus > 1


@dataclass
class Found:
    """What was measured.

    Attributes:
        one: the constants.
        rows: what is shown of them: name, seconds of an image.
        here: this machine's scale.
        memory: bytes at the peak.
        batch: images in a step that was measured.
        top_k: logits of a top-k cache.
        seconds: that the measuring took.
        machine: device, threads, precision.
        notes: sentences.
    """

    one: Measured
    rows: list[tuple[str, float]]
    here: Scale
    memory: int
    batch: int
    top_k: int
    seconds: float
    machine: str
    notes: list[str] = field(default_factory=list)


def plan(recipe: Recipe, wanted: Wanted, console: Console | None = None) -> dict[str, Any]:
    """Measure a few steps of a recipe, and tell what it costs.

    Returns:
        "text", and for machines "measured", "here", "scaled" (None unless another scale is asked for), "assumptions".

    Raises:
        InputError: wrong input, or several processes.
    """
    _check(recipe, wanted)
    found = _Measuring(_without_caches(recipe), wanted, console or Console(quiet=True)).found()
    scales = [found.here]
    if wanted.elsewhere:
        scales.append(
            replace(
                found.here,
                images=wanted.images or found.here.images,
                nodes=wanted.nodes,
                gpus=wanted.gpus,
                link_gbit=wanted.link_gbit,
            )
        )
    sides = [(at, ways(found.one, at)) for at in scales]
    return {
        "text": _text(recipe, found, sides),
        "measured": {
            "machine": found.machine,
            "seconds_of_an_image": dict(found.rows),
            "row_bytes": found.one.row_bytes,
            "top_k": found.top_k or None,
            "top_k_row_bytes": found.one.top_k_bytes,
            "parameters": found.one.parameters,
            "batch": found.batch,
            "peak_memory_mib": found.memory / 2**20,
        },
        "here": _side(*sides[0]),
        "scaled": _side(*sides[1]) if wanted.elsewhere else None,
        "notes": found.notes,
    }


def _check(recipe: Recipe, wanted: Wanted) -> None:
    if recipe.data.name == LOADERS:
        raise InputError("plan reads the data by its name; a run's own loaders cannot be planned")
    counts = {"--data-size": wanted.images, "--nodes": wanted.nodes, "--gpus": wanted.gpus, "--top-k": wanted.top_k}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
    if not 0 < wanted.link_gbit < float("inf"):
        raise InputError(f"--link must be a finite number above 0, got {wanted.link_gbit:g}")


def _without_caches(recipe: Recipe) -> Recipe:
    """The recipe with the teachers themselves: their times are asked for."""
    if not recipe.all_teachers:
        return recipe
    return recipe.with_teachers([replace(teacher, cache=None) for teacher in recipe.all_teachers])


class _Measuring:
    """Builds a recipe's parts, and times each on its own."""

    def __init__(self, recipe: Recipe, wanted: Wanted, console: Console) -> None:
        self.recipe, self.wanted, self.task = recipe, wanted, task_of(recipe)
        self.started = time.perf_counter()
        self.accelerator = make_accelerator(recipe.train)
        if self.accelerator.num_processes > 1:
            raise InputError("plan measures in one process; start it without a launcher, and give --nodes and --gpus")
        self.device = self.accelerator.device
        warn_of_precision(self.accelerator, console)
        set_seed(recipe.train.seed)
        reading_here = replace(recipe, data=replace(recipe.data, workers=0))
        self.data = open_data(self.task, reading_here, self.accelerator)
        self.task.check(recipe, self.data)
        classes = self.task.outputs(self.data)
        if wanted.top_k is not None and wanted.top_k >= classes:
            raise InputError(f"--top-k must be below the {classes} classes, got {wanted.top_k}")
        self.student = self.task.student(recipe, self.data).to(self.device)
        self.placement = make_placement(self.task.train_config(recipe), self.accelerator, self.student)
        self.parameters = sum(p.numel() for p in self.student.parameters() if p.requires_grad)
        self.notes: list[str] = []

    def found(self) -> Found:
        """All of it."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        read, batch = self._read()
        whole = len(batch)
        rows_of = whole / self._labelled(whole)  # views and unlabelled images that come with one image of the epoch
        batch = part_of(batch, self._affordable(whole), views_of(self.recipe))
        first = self._trained_first(batch)
        teacher = self._teacher()
        distiller = self.task.distiller(self.recipe, self.student, teacher, self.data, self.placement)
        taught, logits = self._teacher_pass(distiller, batch)
        step = self._step(distiller, batch if logits is None else replace(batch, teacher_logits=logits))
        if logits is None:
            step = max(step - taught, 0.0)
        memory = _peak(self.device)
        if len(batch) < whole:
            with self.placement.outside_steps():
                saved = _saved_bytes(distiller, batch.to(self.placement), self.accelerator)
            memory += int(saved * (whole / len(batch) - 1))
        caches, top_k = self._cache(logits, rows_of)
        evaluated = self._evaluate(distiller.get_submodule("student"), len(batch))
        one = Measured(
            read=read * rows_of,
            teacher=taught * rows_of,
            step=step * rows_of,
            evaluate=evaluated,
            parameters=self.parameters,
            **caches,
        )
        if len(batch) < whole:
            self.notes.append(f"Measured with {len(batch)} of {whole} images in a step, to take seconds.")
        here = self._here()
        return Found(
            one,
            self._rows(one, first, here),
            here,
            memory,
            len(batch),
            top_k,
            time.perf_counter() - self.started,
            self._machine(),
            self.notes,
        )

    def _labelled(self, whole: int) -> int:
        """Images with labels in a batch of `whole`, each counted once."""
        return min(whole, self.recipe.data.batch_size // self.recipe.train.accumulate)

    def _images(self) -> int:
        """Of an epoch."""
        return len(self.data.train) * self._labelled(self.data.train.num_samples or self.recipe.data.batch_size)

    def _read(self) -> tuple[float, Any]:
        """Seconds that this process takes to read an image, and a batch."""
        times: list[float] = []
        batches = self.data.train.epoch(0)
        while len(times) < 2 or (sum(times) < self.wanted.seconds and len(times) < MOST):
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                batches = self.data.train.epoch(0)
                continue
            times.append(time.perf_counter() - started)
            held = batch
        return statistics.median(times[1:]) / len(held), held

    def _affordable(self, whole: int) -> int:
        """Images of a step that takes about a second on a CPU; all on a GPU."""
        if self.device.type != "cpu":
            return whole
        least = 4 * views_of(self.recipe)
        if self.recipe.task == "detection":
            return min(whole, least)
        macs = 3 * self.task.info(self.student, self.data)["macs"]
        for config in self.recipe.all_teachers if self.recipe.distils else ():
            with torch.random.fork_rng(devices=[]):
                macs += self.task.info(bare_model(self.recipe, config, self.task, self.data), self.data)["macs"]
        return min(whole, max(least, int(CPU_SPEED * torch.get_num_threads() * self.wanted.seconds / max(macs, 1))))

    def _trained_first(self, batch: Any) -> float | None:
        """Seconds of an image in a step of a teacher that is trained first; None where none is."""
        seconds = 0.0
        for number, config in enumerate(self.recipe.all_teachers if self.recipe.distils else ()):
            if config.epochs == 0:
                continue
            recipe = training_of(self.recipe, number, self.task, self.data)
            if recipe is None:
                continue
            model = bare_model(self.recipe, config, self.task, self.data).to(self.device)
            alone = self.task.distiller(recipe, model, None, self.data, self.placement)
            took = self._step(alone, batch)
            seconds += took
            total = duration(took * config.epochs * self._images())
            self.notes.append(
                f"{config.name} is trained first, {config.epochs} epochs: about {total} here, not counted."
            )
        return seconds or None

    def _teacher(self) -> Any:
        """The teacher, or several as one; weights that are not there yet decide nothing about its time."""
        if not self.recipe.distils:
            return None
        members = []
        for config in self.recipe.all_teachers:
            known = config.weights is not None or (config.pretrained and self.task.knows_classes(config, self.data))
            config = config if known else replace(config, pretrained=False)
            members.append(self.task.teacher(config, self.student, self.data, self.recipe.allow).to(self.device))
        if len(members) == 1:
            return members[0]
        weights = [config.weight for config in self.recipe.all_teachers]
        return TeacherEnsemble(members, weights, self.recipe.teachers_combine)

    def _teacher_pass(self, distiller: nn.Module, batch: Any) -> tuple[float, Tensor | None]:
        """Seconds of an image, and the logits where the losses compare nothing else."""
        teacher: Any = getattr(distiller, "teacher", None)
        if teacher is None:
            return 0.0, None
        placed = batch.to(self.placement.frozen)
        if self.recipe.task == "detection":
            adapter: Any = distiller.adapter
            with torch.no_grad(), self.accelerator.autocast():
                prepared = adapter.student_pass(placed.images, placed.targets).batch
            call: Callable[[], Any] = lambda: teacher.observe(prepared)  # noqa: E731
        else:
            call = lambda: teacher(placed.images)  # noqa: E731

        @torch.no_grad()
        def once() -> Any:
            self.placement.begin_step()
            with self.accelerator.autocast():
                return call()

        seconds = self._time(once) / len(batch)
        kinds = {method_kind(term.method, f"losses.{i}") for i, term in enumerate(self.recipe.losses)}
        alike = self.recipe.task == "classification" and kinds <= {"logits"}
        return seconds, once().float() if alike else None

    def _step(self, distiller: nn.Module, batch: Any) -> float:
        """Seconds of an image in a step, by the loop that trains."""
        held = _Held(batch, self.wanted.seconds, self.device)
        trainer = Trainer(
            distiller,
            held,
            lambda model: {"plan": 0.0},
            # Weights that stay near their start cannot diverge.
            optim=replace(self.recipe.optim, lr=1e-6, schedule="constant", warmup_epochs=0.0),
            train=replace(self.task.train_config(self.recipe), epochs=1, accumulate=1),
            placement=self.placement,
            metric=Metric("plan"),
        )
        trainer.fit()
        return held.median / len(batch)

    def _evaluate(self, student: nn.Module, count: int) -> float:
        """Seconds of an image in validation."""
        batch = part_of(next(iter(self.data.val.epoch(0))), count)
        held = _Held(batch, self.wanted.seconds / 2, self.device)
        self.task.evaluate(student, held, self.data, self.placement)
        return held.median / len(batch)

    def _time(self, call: Callable[[], Any]) -> float:
        """Median seconds of a call."""
        return _median_time(call, self.wanted.seconds, self.device)

    def _cache(self, logits: Tensor | None, rows_of: float) -> tuple[dict[str, Any], int]:
        """What Measured takes of caches, and the K of one of the K largest logits; 0 where it would not be smaller."""
        if logits is None:
            return {}, 0
        classes = logits.shape[1]
        times = len(self.recipe.all_teachers) * rows_of  # caches, and rows for an image in each
        top_k = self.wanted.top_k or (LARGEST if classes > MANY else 0)
        full, few = (_info(len(logits), classes, k) for k in (None, top_k or None))
        smaller = few.row.itemsize < full.row.itemsize
        found: dict[str, Any] = {}
        for info, prefix in ((full, ""), (few, "top_k_"))[: 1 + smaller]:
            store, load = self._through_a_file(info, logits)
            found |= {f"{prefix}store": times * store, f"{prefix}load": times * load}
            found[f"{prefix or 'row_'}bytes"] = round(times * info.row.itemsize)
        return found, top_k if smaller else 0

    def _through_a_file(self, info: CacheInfo, logits: Tensor) -> tuple[float, float]:
        """Seconds to store an image's logits, and to load them."""
        places = np.arange(len(logits))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.bin"

            def store() -> None:
                with open(file, "wb") as stream:
                    stream.write(info.encode(logits).tobytes())
                    stream.flush()
                    os.fsync(stream.fileno())

            def load() -> Tensor:
                return info.decode(np.memmap(file, info.row, "r")[places]).to(self.device)

            stored, loaded = (_median_time(call, self.wanted.seconds / 4, self.device) for call in (store, load))
        return stored / len(logits), loaded / len(logits)

    def _here(self) -> Scale:
        """This machine's scale."""
        recipe, images = self.recipe, self._images()
        workers = choose_workers(recipe.data.workers, images, 1) if _reads_files(self.data.train) else 0
        return Scale(
            images=images,
            epochs=recipe.train.epochs,
            batch=min(recipe.data.batch_size, images),
            val_images=getattr(self.data.val, "num_samples", None) or 0,
            workers=workers,
            cores=len(os.sched_getaffinity(0)) if self.device.type == "cpu" and hasattr(os, "sched_getaffinity") else 0,
        )

    def _rows(self, one: Measured, first: float | None, here: Scale) -> list[tuple[str, float]]:
        reading = "decoding, one worker" if here.workers else "reading, in the trainer"
        rows = [(reading, one.read)]
        if one.teacher:
            rows.append(("teacher, forward pass", one.teacher))
        if first is not None:
            rows.append(("teacher, step of its own training", first))
        rows += [("student, step", one.step), ("student, validation", one.evaluate)]
        if one.row_bytes:
            rows += [("cache, writing", one.store), ("cache, reading", one.load)]
        return rows

    def _machine(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu()
        threads = torch.get_num_threads()
        return f"{name}, {threads} thread{'s' if threads > 1 else ''}, {PRECISIONS[self.accelerator.mixed_precision]}"


def _reads_files(batches: Any) -> bool:
    """Whether worker processes can read the images of batches."""
    batches = getattr(batches, "labelled", batches)  # of batches with unlabelled images
    if hasattr(batches, "reader"):
        return not isinstance(batches.reader, MemoryReader)
    return not getattr(getattr(batches, "split", None), "in_memory", True)


class _Held:
    """One batch again and again, until some seconds are over; how long each step took."""

    num_samples = None

    def __init__(self, batch: Any, seconds: float, device: torch.device) -> None:
        self.batch, self.seconds, self.device = batch, seconds, device
        self.times: list[float] = []

    def __len__(self) -> int:
        return MOST

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        for _ in range(MOST):
            started = time.perf_counter()
            yield self.batch
            _wait(self.device)
            self.times.append(time.perf_counter() - started)
            if len(self.times) > FEWEST and sum(self.times[1:]) > self.seconds:
                return

    @property
    def median(self) -> float:
        """Seconds of a step; the first, which warms up and compiles, is left out."""
        return statistics.median(self.times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_time(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Median seconds of a call, after one that warms up."""
    call()
    times: list[float] = []
    while len(times) < FEWEST or (sum(times) < seconds and len(times) < MOST):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _info(rows: int, classes: int, top_k: int | None) -> CacheInfo:
    """A cache of one batch."""
    return CacheInfo("", "", 0, epochs=1, batches=1, rows=rows, classes=classes, views=1, top_k=top_k)


def part_of(batch: Any, count: int, views: int = 1) -> Any:
    """The first images of a batch, about `count` over all views; of labelled and unlabelled ones an equal share."""
    if count >= len(batch):
        return batch
    size = len(batch) // views
    if isinstance(batch.images, list):
        return replace(batch, images=batch.images[:count], targets=batch.targets[:count])
    labelled = size if batch.labelled is None else len(batch.labelled) // views
    share = count / len(batch)
    first, others = max(2, round(labelled * share)), round((size - labelled) * share)
    own = torch.cat([torch.arange(first), labelled + torch.arange(others)])
    rows = torch.cat([own + view * size for view in range(views)]).to(batch.images.device)
    known = torch.cat([torch.arange(first) + view * len(own) for view in range(views)]).to(batch.images.device)
    return replace(
        batch,
        images=batch.images[rows],
        target=batch.target[rows],
        index=None if batch.index is None else batch.index[own.to(batch.index.device)],
        labelled=None if batch.labelled is None else known,
    )


def _saved_bytes(distiller: nn.Module, batch: Any, accelerator: Any) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), accelerator.autocast():
        distiller(batch)
    own = {p.untyped_storage().data_ptr() for p in distiller.parameters()}
    return sum(size for place, size in seen.items() if place not in own)


def _peak(device: torch.device) -> int:
    """Bytes at this process's peak: of the GPU's memory, or of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# What is said


def _side(at: Scale, found: list[Way]) -> dict[str, Any]:
    scale = {key: getattr(at, key) for key in ("images", "epochs", "batch", "nodes", "gpus", "workers", "link_gbit")}
    return {**scale, "ways": [as_dict(way) for way in found], "assumptions": assumptions(at)}


def _text(recipe: Recipe, found: Found, sides: list[tuple[Scale, list[Way]]]) -> str:
    """Words and tables."""
    teachers = " + ".join(teacher.name for teacher in recipe.all_teachers) if recipe.distils else "no teacher"
    lines = [f"{short_name(recipe.method)}: {teachers} to {recipe.student.name}, {recipe.data.name}"]
    lines += [f"measured on {found.machine}, in {found.seconds:.0f} s", ""]
    cells = [["", "ms an image", "images/s"]]
    cells += [[name, f"{1000 * took:.3g}", _speed(took)] for name, took in found.rows]
    lines += [*report.aligned(cells), "", *found.notes, f"Peak memory: {found.memory / 2**20:,.0f} MiB.", ""]
    for at, found_ways in sides:
        lines += [*_side_lines(recipe, found, at, found_ways), ""]
    return "\n".join(lines).rstrip()


def _side_lines(recipe: Recipe, found: Found, at: Scale, found_ways: list[Way]) -> list[str]:
    nodes = "1 node" if at.nodes == 1 else f"{at.nodes} nodes"
    devices = "this machine" if at.processes == 1 else f"{nodes} of {at.gpus} such device{'s' if at.gpus > 1 else ''}"
    head = f"{at.images:,} images, {at.epochs} epochs, {devices}"
    cells = [["", "an epoch", "in all", "of it the cache", "its size", "bound by"]]
    for way in found_ways:
        cached = way.disk > 0
        name = f"{way.name} ({found.top_k})" if way.name == TOP_K else way.name
        build, size = (duration(way.build), size_text(way.disk)) if cached else ("", "")
        cells.append([name, _long(way.epoch), _long(way.total), build, size, way.bound])
    return [head, "", *report.aligned(cells), "", *_advice(recipe, found, at, found_ways), *assumptions(at)]


def _advice(recipe: Recipe, found: Found, at: Scale, found_ways: list[Way]) -> list[str]:
    """What bounds the speed, what would help, and where a cache pays."""
    way = found_ways[0]
    total = sum(way.parts.values())
    lines = [
        f"What bounds the speed is the {way.bound}: {100 * way.parts[way.bound] / total:.0f} % of the work's time."
    ]
    if way.bound == DECODING and at.workers:
        needed = workers_needed(found.one, way, at)
        lines.append(f"With {needed} workers a device decoding would keep up (--workers).")
    elif way.bound == NETWORK:
        lines.append("Larger batches exchange gradients less often (--batch-size, --set train.accumulate=N).")
    if way.name == ALONE:
        return lines
    cached = next((one for one in found_ways if one.disk), None)
    if cached is None:
        why = "detection" if recipe.task == "detection" else recipe.method
        return [*lines, f"A cache holds logits alone, so {why} runs the teacher itself."]
    if cached.pays_from is None:
        return [*lines, "A cache would save no time: something else than the teacher is waited for."]
    return [
        *lines,
        f"A cache takes less time once each stored epoch is trained on more than {cached.pays_from:.2f} times: by "
        f"{int(cached.pays_from) + 1} students, or by one in {int(cached.pays_from) + 1} rounds of the stored epochs.",
    ]


def _speed(seconds: float) -> str:
    return f"{1 / seconds:,.0f}" if seconds > 0 else ""


def _long(seconds: float) -> str:
    """A duration; days beyond two of them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    return duration(seconds) if seconds < 2 * 86400 else f"{seconds / 86400:,.1f} days"


def size_text(count: float) -> str:
    """1.5e9 -> "1.5 GB"."""
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
