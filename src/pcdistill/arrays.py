"""Arrays out of .npz files, which are not trusted: nothing in them is executed, and damage is told in a sentence."""

import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pcdistill.errors import InputError

# What numpy, zipfile and zlib raise on files that are cut, damaged, encrypted or none of theirs.
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, KeyError, SyntaxError, RuntimeError),
    *(OverflowError, AttributeError, tokenize.TokenError),
)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; nothing in it is executed.

    Raises:
        InputError: it is not there, damaged, or holds Python objects.
    """
    if not path.is_file():
        raise InputError(f"the file {path} does not exist")
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise InputError(f"{path} is one array (.npy) under the name of an .npz file; numpy.savez makes those")
            return {key: _array(found, key, path) for key in found.files}
    except InputError:
        raise
    except _UNREADABLE as error:
        reason = "it is no archive of arrays" if "pickle" in str(error) else str(error) or type(error).__name__
        raise InputError(f"{path} is not a readable .npz file: {reason}") from None
    except MemoryError:
        raise InputError(f"{path} holds arrays that are larger than the memory") from None


def _array(found: Any, key: str, path: Path) -> np.ndarray:
    try:
        array = found[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise InputError(
            f"{path}: {key} holds Python objects, which are not loaded; save it as an array of numbers or text "
            "(numpy.asarray(names, dtype=str))"
        ) from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {key} is no array; numpy.savez makes such files")
    return array
