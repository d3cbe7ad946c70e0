"""Files that lie elsewhere: whatever fsspec opens, such as s3://, gs:// or memory://."""

import re
from collections.abc import Iterable
from glob import glob, has_magic
from itertools import takewhile
from pathlib import Path
from typing import Any

from pcdistill.errors import InputError
from pcdistill.extras import need
from pcdistill.files import home_followed

# Two letters or more: one is a drive of Windows. A Path keeps but one of the slashes.
URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,3}(?=[^/])")


def place_of(name: str | Path) -> Path | str:
    """A local path, ~ followed, or the URL of what lies elsewhere; `file:///folder` is local.

    Args:
        name: as the user gave it, also as a Path, which takes a URL's second slash away.
    """
    text = str(name)
    match = URL.match(text)
    if match is None:
        return home_followed(name)
    scheme, rest = match[1], text[match.end() :]
    return Path("/", rest) if scheme in ("file", "local") else f"{scheme}://{rest}"


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        InputError: fsspec or what it needs for this kind of URL is not installed, or it does not know the kind.
    """
    need("fsspec", what=url)
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        told = " ".join(str(error).split())
        raise InputError(f"{url} needs a package that is not installed: {told}") from None
    except ValueError as error:
        told = " ".join(str(error).split())
        raise InputError(f"{url} cannot be opened: {told}; it must begin as fsspec knows it, such as s3://") from None
    return system, str(path).rstrip("/")


def files_at(name: str | Path, ending: str) -> list[Path | str]:
    """The files that a name stands for: one, what a glob finds, or those of a folder, however deep, with an ending.

    Args:
        name: a path or a URL.
        ending: as ".tar".

    Returns:
        Paths, or URLs of what lies elsewhere, in order; none where there is nothing.

    Raises:
        InputError: as `file_system`.
        OSError: the place cannot be looked at; or ValueError or RuntimeError, as file systems have it.
    """
    place = place_of(name)
    if isinstance(place, Path):
        if has_magic(str(place)):
            return [Path(one) for one in sorted(glob(str(place), recursive=True))]
        if place.is_dir():
            return [*sorted(place.rglob(f"*{ending}"))]
        return [place] if place.is_file() else []
    system, path = file_system(place)
    if has_magic(path):
        paths = sorted(system.glob(path))
    elif system.isdir(path):
        paths = sorted(one for one in system.find(path) if one.endswith(ending))
    else:
        paths = [path] if system.exists(path) else []
    return [str(system.unstrip_protocol(one)) for one in paths]


def common_folder(places: Iterable[Path | str]) -> str:
    """The folder that all files are in, without a slash at its end; "" for the one that is worked in.

    Args:
        places: paths and URLs of files; a URL's slashes are left as they are.
    """
    parts = [_text(place).split("/")[:-1] for place in places]
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))]
    return "/" if common == [""] else "/".join(common)


def within(place: Path | str, folder: str) -> str:
    """A file's name within a folder of `common_folder`."""
    return _text(place)[len(folder) :].lstrip("/")


def _text(place: Path | str) -> str:
    return place.as_posix() if isinstance(place, Path) else place


def said(error: Exception) -> str:
    """An error of a file system in one line."""
    return " ".join(str(error).split()) or type(error).__name__
