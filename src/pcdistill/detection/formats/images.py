"""Image files of a detection set: where they are, and how large; only headers are read."""

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from pcdistill.data.files import EXTENSIONS, is_image
from pcdistill.errors import InputError

Size = tuple[int, int]
ORIENTATION = 0x0112  # EXIF's tag: 5 to 8 exchange width and height


@dataclass(frozen=True)
class ImageSize:
    """Width and height of an image file, as stored and as a person sees it, and the EXIF orientation (1: as stored)."""

    stored: Size
    seen: Size
    orientation: int


class ImageFinder:
    """Finds the files that annotations name, however the tool that wrote them spelled the names.

    Args:
        folders: where to look, the likeliest first.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = list(dict.fromkeys(folders))
        self.respelled = 0  # names that were found only after a change
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path | None:
        """The file, or None. A name that is not there as it stands is tried with backslashes as slashes,
        percent-decoded, without its folders, and in another case.
        """
        for n, spelled in enumerate(_spellings(name)):
            for folder in self.folders:
                found = self._in(folder, spelled)
                if found is not None:
                    self.respelled += n > 0
                    return found
        last = Path(_spellings(name)[-1]).name.lower()
        for folder in self.folders:
            same = [entry for entry in self._names(folder) if entry.lower() == last]
            if len(same) == 1:
                self.respelled += 1
                return folder / same[0]
        return None

    def of_stem(self, stem: str) -> list[Path]:
        """The image files with this name and any extension, in the first folder that has one."""
        for folder in self.folders:
            place = (folder / stem).parent
            last = Path(stem).name
            found = [place / f"{last}{end}" for end in self._stems(place).get(last, ())]
            if found:
                return found
        return []

    def _in(self, folder: Path, name: str) -> Path | None:
        path = folder / name
        return path if path.name in self._names(path.parent) else None

    def _names(self, folder: Path) -> dict[str, str]:
        """The files of a folder, which is listed once: sets have a hundred thousand images."""
        if folder not in self._listed:
            try:
                with os.scandir(folder) as entries:
                    self._listed[folder] = {entry.name: os.path.splitext(entry.name)[0] for entry in entries}
            except (OSError, ValueError):  # not there, or no name of a folder at all
                self._listed[folder] = {}
        return self._listed[folder]

    def _stems(self, folder: Path) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, stem in self._names(folder).items():
            end = name[len(stem) :]
            if end.lower() in EXTENSIONS:
                found.setdefault(stem, []).append(end)
        return found


def _spellings(name: str) -> list[str]:
    """A name and its likely meanings, without repetitions."""
    slashed = name.replace("\\", "/")
    decoded = unquote(slashed).replace("\\", "/")
    local = decoded.rpartition("?d=")[2]  # Label Studio's local files
    lasts = [text.rpartition("/")[2] for text in (slashed, decoded)]
    return [text for text in dict.fromkeys([name, slashed, decoded, local, *lasts]) if text.strip("/.")] or [name]


def images_in(folder: Path) -> list[Path]:
    """Every image file of a folder and those in it, sorted; hidden ones are passed over."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in files if is_image(name)]
    return sorted(found)


def seen_in(folder: Path, *patterns: str) -> list[Path]:
    """What a folder's glob patterns find, sorted; hidden files are passed over, such as those that macOS leaves."""
    return sorted({path for one in patterns for path in folder.glob(one) if not path.name.startswith(".")})


def check_found(where: Path, paths: Sequence[Path | None], names: Sequence[str]) -> list[Path]:
    """The paths, of which none may be missing.

    Raises:
        InputError: how many are missing, and the first one's name.
    """
    missing = [name for path, name in zip(paths, names, strict=True) if path is None]
    if missing:
        first = missing[0] if missing[0].isprintable() and len(missing[0]) < 200 else repr(missing[0][:80])
        hint = "; it is an address: download the images first" if "://" in first else ""
        raise InputError(f"{where}: {len(missing)} of its {len(paths)} images are missing, the first is {first}{hint}")
    return [path for path in paths if path is not None]


def read_sizes(where: Path, paths: Sequence[Path]) -> list[ImageSize]:
    """The sizes of image files, from their headers.

    Raises:
        InputError: naming the first that is no image.
    """
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_read_size, paths))
    for path, size in zip(paths, found, strict=True):
        if size is None:
            raise InputError(f"{where}: {path} cannot be read as an image")
    return [size for size in found if size is not None]


def _read_size(path: Path) -> ImageSize | None:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or device would never end
            return None
        with Image.open(path) as picture:
            width, height = picture.size
            exif = picture.getexif() if picture.format != "PNG" or "exif" in picture.info else {}
            turned = exif.get(ORIENTATION, 1)
    except Exception:  # Pillow's readers raise many kinds for damaged headers
        return None
    if turned not in range(1, 9):
        turned = 1
    turned_size = (height, width) if turned >= 5 else (width, height)
    if picture.format == "TIFF":  # whose header Pillow turns by itself
        return ImageSize(turned_size, (width, height), turned)
    return ImageSize((width, height), turned_size, turned)


def oriented(boxes: np.ndarray, size: ImageSize) -> np.ndarray:
    """Boxes [M, 4] xyxy on the stored pixels, moved to where a person sees them."""
    width, height = size.stored
    x0, y0, x1, y1 = boxes.T
    if size.orientation in (2, 3, 7, 8):  # mirrored left and right before what follows
        x0, x1 = width - x1, width - x0
    if size.orientation in (3, 4, 6, 7):
        y0, y1 = height - y1, height - y0
    return np.stack([y0, x0, y1, x1] if size.orientation >= 5 else [x0, y0, x1, y1], axis=1)
