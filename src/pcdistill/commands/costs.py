"""What a training costs, from constants that were measured: time, disk, and where a teacher's cache pays.

Arithmetic alone, without torch. Its assumptions are the sentences of :func:`assumptions`.
"""

from dataclasses import dataclass
from typing import Any

INSIDE_GBIT = 200.0  # between the cards of one node: PCI Express 4.0 x16
LIVE, FULL, TOP_K, ALONE = "live teacher", "cache, all logits", "cache, top-k", "student alone"
DECODING, TEACHER, STUDENT, NETWORK = "decoding", "teacher", "student", "network"


@dataclass(frozen=True)
class Measured:
    """Constants of a pair of models; times are seconds of one training image on one device, or one worker.

    Attributes:
        read: decoding and augmenting, by one worker process, or by the trainer itself for images in memory.
        teacher: its forward pass; 0 without a teacher.
        step: forward pass, loss, backward pass and update of the student, the teacher's logits at hand.
        evaluate: the student's forward pass and the metric.
        store: putting the logits of an image into a cache of all.
        load: taking them out.
        top_k_store: as `store`, of a cache of the K largest.
        top_k_load: as `load`.
        row_bytes: of an image in a cache of all logits; 0 where there can be no cache.
        top_k_bytes: of an image in a cache of the K largest; 0 where it would not be smaller.
        parameters: of the student, whose gradients processes exchange.
    """

    read: float
    step: float
    teacher: float = 0.0
    evaluate: float = 0.0
    store: float = 0.0
    load: float = 0.0
    top_k_store: float = 0.0
    top_k_load: float = 0.0
    row_bytes: int = 0
    top_k_bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True)
class Scale:
    """How much is trained, on what.

    Attributes:
        images: of an epoch.
        val_images: that are evaluated after it.
        epochs: of the training.
        batch: images of a step, over all processes.
        nodes: machines.
        gpus: devices of each; a CPU counts as one.
        workers: processes of each device that decode; 0: the trainer does it between steps.
        cores: that decoding and training share; 0: they do not share any.
        link_gbit: between two nodes, in gigabits a second.
    """

    images: int
    epochs: int
    batch: int
    val_images: int = 0
    nodes: int = 1
    gpus: int = 1
    workers: int = 1
    cores: int = 0
    link_gbit: float = 100.0

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Prices:
    """What makes a time and a size comparable: dollars. They name a cloud's usual order, nobody's offer.

    Attributes:
        device_hour: of one device.
        terabyte_month: of storage.
        months: that a cache is kept.
    """

    device_hour: float = 2.5
    terabyte_month: float = 23.0
    months: float = 1.0


@dataclass(frozen=True)
class Way:
    """One way to have a teacher's logits.

    Attributes:
        name: LIVE, FULL, TOP_K or ALONE.
        parts: seconds of an epoch of training, if nothing else took time: decoding, teacher, student, network.
        epoch: seconds of an epoch, validation included.
        build: seconds that the cache takes before, once.
        total: seconds of the whole training, the cache's making included.
        disk: bytes of the cache.
        bound: the part that the speed depends on.
        pays_from: times that a stored epoch must be trained on before the cache costs less than a live teacher, prices
            included; None where it never does, and for what is no cache.
    """

    name: str
    parts: dict[str, float]
    epoch: float
    build: float
    total: float
    disk: int
    bound: str
    pays_from: float | None = None


def ways(one: Measured, at: Scale, prices: Prices | None = None) -> list[Way]:
    """Every way that there is for a pair, the live teacher first.

    Args:
        one: the constants.
        at: the scale.
        prices: None compares seconds alone.
    """
    if one.teacher == 0:
        return [_way(ALONE, one, at)]
    live = _way(LIVE, one, at)
    found = [live]
    for name, size in ((FULL, one.row_bytes), (TOP_K, one.top_k_bytes)):
        if size:
            found.append(_cached(name, size, live, (one, at), prices))
    return [*found, _way(ALONE, one, at)]


def _way(name: str, one: Measured, at: Scale) -> Way:
    """A way without a cache, or with one that is there already."""
    share = at.images / at.processes
    teacher = {LIVE: one.teacher, FULL: one.load, TOP_K: one.top_k_load, ALONE: 0.0}[name]
    parts = {
        DECODING: _reading(share * one.read, at),
        TEACHER: share * teacher,
        STUDENT: share * one.step,
        NETWORK: at.images / at.batch * exchange(one.parameters, at),
    }
    validation = _joined(
        _reading(at.val_images / at.processes * one.read, at), at.val_images / at.processes * one.evaluate, at
    )
    seconds = _joined(parts[DECODING], max(parts[TEACHER] + parts[STUDENT], parts[NETWORK]), at)
    epoch = seconds + validation
    return Way(name, parts, epoch, 0.0, epoch * at.epochs, 0, _bound(parts, at))


def _cached(name: str, row: int, live: Way, of: tuple[Measured, Scale], prices: Prices | None) -> Way:
    """A cache of every epoch, its making included."""
    one, at = of
    way = _way(name, one, at)
    share = at.images / at.processes
    store = one.store if name == FULL else one.top_k_store
    build = at.epochs * _joined(_reading(share * one.read, at), share * (one.teacher + store), at)
    disk = at.epochs * at.images * row
    cost, saved = build, at.epochs * (live.epoch - way.epoch)
    if prices is not None:
        hour = prices.device_hour * at.processes / 3600
        cost, saved = build * hour + disk / 1e12 * prices.terabyte_month * prices.months, saved * hour
    pays_from = cost / saved if saved > 1e-3 * cost else None
    return Way(name, way.parts, way.epoch, build, build + way.total, disk, way.bound, pays_from)


def _reading(seconds: float, at: Scale) -> float:
    """Seconds until all is decoded, of seconds that one worker would take."""
    if at.cores:
        return seconds / (at.cores if at.workers else 1)
    return seconds / max(at.workers, 1)


def _joined(reading: float, computing: float, at: Scale) -> float:
    """Seconds of both: side by side where workers have cores of their own, else one after the other."""
    return reading + computing if at.cores or not at.workers else max(reading, computing)


def _bound(parts: dict[str, float], at: Scale) -> str:
    """The part that the speed depends on most."""
    computing = parts[TEACHER] + parts[STUDENT]
    if parts[NETWORK] > computing and parts[NETWORK] >= parts[DECODING]:
        return NETWORK
    if at.workers and not at.cores and parts[DECODING] > computing:
        return DECODING
    own = {key: parts[key] for key in (DECODING, TEACHER, STUDENT) if key != DECODING or at.cores or not at.workers}
    return max(own, key=lambda key: own[key])


def exchange(parameters: int, at: Scale) -> float:
    """Seconds of an all-reduce of float32 gradients in a ring: 2 (P - 1) / P times their bytes, over the slowest link.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """
    count = at.processes
    if count == 1:
        return 0.0
    gbit = at.link_gbit if at.nodes > 1 else INSIDE_GBIT
    return 2 * (count - 1) / count * 4 * parameters / (gbit * 1e9 / 8)


def workers_needed(one: Measured, way: Way, at: Scale) -> int:
    """Worker processes for each device with which decoding does not hold up a way."""
    computing = max(way.parts[TEACHER] + way.parts[STUDENT], way.parts[NETWORK])
    return max(1, -int(-at.images / at.processes * one.read // computing)) if computing > 0 else 1


def assumptions(at: Scale, prices: Prices | None = None) -> list[str]:
    """What was assumed, a sentence each."""
    found = []
    if at.processes > 1:
        link = f"{at.link_gbit:g} Gbit/s between nodes" if at.nodes > 1 else f"{INSIDE_GBIT:g} Gbit/s between devices"
        found += [
            f"Speed grows with the number of devices: an image costs each of the {at.processes} what it costs here.",
            f"A step has {at.batch} images in all, {at.batch / at.processes:g} on each device.",
            f"Gradients are exchanged in float32, in a ring, at {link}, while the backward pass runs.",
        ]
    if not at.workers:
        found.append("Images are read between steps, not ahead.")
    elif at.cores:
        found.append("Decoding and models share the cores: their times add up.")
    else:
        found.append(f"Each device has {at.workers} worker processes with cores of their own.")
    found.append("A cache holds every epoch. Its making is counted, and so is validation, but neither test nor pages.")
    if prices is not None:
        found.append(
            f"A device costs {prices.device_hour:g} dollars an hour, a terabyte {prices.terabyte_month:g} a month; a "
            f"cache is kept for {prices.months:g}."
        )
    return found


def as_dict(way: Way) -> dict[str, Any]:
    """A way for machines."""
    return {
        "way": way.name,
        "epoch_seconds": way.epoch,
        "build_seconds": way.build,
        "total_seconds": way.total,
        "disk_bytes": way.disk,
        "bound": way.bound,
        "parts_seconds": way.parts,
        "pays_from": way.pays_from,
    }
