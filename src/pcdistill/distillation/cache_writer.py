"""Writing a cache: each of several processes its own files, from wherever any earlier ones were stopped."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from pcdistill.distillation.cache_files import CacheFolder
from pcdistill.distillation.cache_store import (
    FORMATS,
    LARGEST,
    MANIFEST,
    CacheState,
    Layout,
    finished,
    side_file,
    written,
)
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.files import sealed_json

SAVE_SECONDS = 20.0  # between two points that a killed build continues from
LOOK_SECONDS = 0.5  # between two looks at what other processes have written
Work = list[tuple[int, int]]  # files to write, by number, and the rows of each that are there already
Logits = Callable[[int, int], Iterator[Tensor]]


class CacheWriter:
    """The files of a cache that one process writes, and its manifest.

    A file under way has a small one beside it, which says how many of its rows are safe. Both a kill and a crash of the
    machine leave what it says; the next build goes on there, with any number of processes.

    Args:
        folder: of the cache.
        layout: of its files.
        state: what its manifest held before; None: there was none.
        console: progress.
    """

    def __init__(self, folder: CacheFolder, layout: Layout, state: CacheState | None, console: Console) -> None:
        self.folder, self.layout, self.console = folder, layout, console
        self.known = [] if state is None else state.checksums
        self.state = state
        self._open: tuple[int, int, Iterator[Tensor]] | None = None

    def survey(self) -> Work:
        """What is still to be written. What stands beside finished or missing files is deleted."""
        sizes, key, work = self.folder.sizes(), self.layout.key(), []
        done = {} if self.state is None else finished(self.folder, self.state, sizes)
        for number in range(len(self.layout)):
            name = self.layout.name(number)
            beside, rows = side_file(name), 0
            if number not in done:
                if beside in sizes:
                    rows, checksum = written(self.folder, name, key)
                    rows = 0 if checksum is not None else rows
                elif self.state is not None and number == len(self.known):
                    rows = self.state.rows  # of a build by an earlier version
                safe = sizes.get(name, 0) // self.layout.info.row.itemsize
                rows = rows if rows <= safe else 0
                work.append((number, rows))
            if beside in sizes and (rows == 0 if number not in done else number < len(self.known)):
                self.folder.remove(beside)
        return work

    def write(self, work: Work, logits: Logits) -> None:
        """Write files; `logits(epoch, start)` gives an epoch's [N, C] from batch `start` on.

        Raises:
            InputError: logits that are not finite or beyond float16, or a lost file that comes out otherwise now.
        """
        for number, rows in work:
            self._write(number, rows // self.layout.info.rows, logits)

    def complete(self, work: Sequence[tuple[int, int]]) -> list[str]:
        """Every file's checksum, as soon as all processes have written theirs."""
        waiting = {number for number, _ in work}
        while True:
            sizes, key = self.folder.sizes(), self.layout.key()
            for number in list(waiting):
                name = self.layout.name(number)
                if side_file(name) in sizes and written(self.folder, name, key)[1] is not None:
                    waiting.discard(number)
            if not waiting:
                break
            time.sleep(LOOK_SECONDS)
        found = finished(self.folder, self._state(self.known, None, None))
        return [found[number] for number in range(len(self.layout))]

    def save(self, checksums: Sequence[str], recipe: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> None:
        """Write the manifest. Once it tells of all files, what stood beside them goes."""
        state = self._state(checksums, recipe, teacher)
        tree = asdict(state)
        if state.info.storage == "float16":
            del tree["info"]["storage"]
        if state.shard is None:
            del tree["shard"]
        self.folder.put(MANIFEST, sealed_json(tree, indent=1))
        if len(checksums) == len(self.layout):
            sizes = self.folder.sizes()
            for number in range(len(self.layout)):
                if (beside := side_file(self.layout.name(number))) in sizes:
                    self.folder.remove(beside)

    def _state(
        self, checksums: Sequence[str], recipe: Mapping[str, Any] | None, teacher: Mapping[str, Any] | None
    ) -> CacheState:
        info, shard = self.layout.info, self.layout.shard
        plain = shard is None and info.storage == "float16"
        made_by, known = None if recipe is None else dict(recipe), None if teacher is None else dict(teacher)
        return CacheState(FORMATS[0] if plain else FORMATS[1], info, list(checksums), 0, made_by, known, shard)

    def _write(self, number: int, done: int, logits: Logits) -> None:
        """A file, of which `done` batches are there."""
        info, name = self.layout.info, self.layout.name(number)
        epoch, first, last = self.layout.batches(number)
        start, saved = first + done, time.monotonic()
        batches = self._batches(epoch, start, logits)
        with self.folder.grow(name, done * info.rows * info.row.itemsize) as stream:
            for batch in range(start, last):
                found = next(batches)
                if not bool((found.abs() <= LARGEST).all()):
                    raise InputError(
                        f"the teacher's logits are NaN or beyond float16's {LARGEST:.0f} in epoch {epoch + 1}, batch "
                        f"{batch + 1}; such a teacher cannot be cached"
                    )
                if info.storage == "float16" and (coarse := coarseness(found)):
                    raise InputError(
                        f"the teacher's logits lie near each other and far from 0, so float16 would change them by up "
                        f"to {coarse:.2g} in epoch {epoch + 1}, batch {batch + 1}; take --storage int8"
                        + (", without --top-k" if info.top_k is not None else "")
                    )
                stream.write(info.encode(found).tobytes())
                if time.monotonic() - saved >= SAVE_SECONDS and stream.sync():
                    self._note(name, (batch + 1 - first) * info.rows, None)
                    saved = time.monotonic()
                self.console.step(epoch, info.epochs, batch + 1, info.batches)
        self._open = (epoch, last, batches) if last < info.batches else None
        checksum = self.folder.checksum(name)
        if number < len(self.known) and checksum != self.known[number]:
            raise InputError(
                f"epoch {epoch + 1} of the cache {self.folder.place} was lost, and comes out otherwise now; delete "
                f"{self.folder.place}, and make the cache again"
            )
        self._note(name, (last - first) * info.rows, checksum)
        if last == info.batches:
            size = info.batches * info.rows * info.row.itemsize
            self.console.epoch(epoch, info.epochs, f"{size / 1e6:.1f} MB")

    def _batches(self, epoch: int, start: int, logits: Logits) -> Iterator[Tensor]:
        """An epoch's logits from a batch on; those that are being read go on where they are."""
        if self._open is not None and self._open[:2] == (epoch, start):
            return self._open[2]
        return logits(epoch, start)

    def _note(self, name: str, rows: int, checksum: str | None) -> None:
        told = {"of": self.layout.key(), "rows": rows, "whole": checksum}
        self.folder.put(side_file(name), sealed_json(told, indent=1))


def coarseness(logits: Tensor) -> float:
    """By how much float16 changes logits [N, C] where that is too much to learn from, else 0.

    Too much is more than 0.1, and than a fiftieth of what a row's logits differ by: the softmax is blind to what all
    of a row have in common, and float16 is not.
    """
    z = logits.detach().float()
    change = (z.half().float() - z).abs().amax(1)
    worst = change.where(change > (z.amax(1) - z.amin(1)) / 50, 0).max()
    return float(worst) if worst > 0.1 else 0.0


def share(work: Work, rank: int, processes: int) -> Work:
    """One process's part of the work: neighbouring files, so that an epoch's batches are read on without a break."""
    return work[len(work) * rank // processes : len(work) * (rank + 1) // processes]
