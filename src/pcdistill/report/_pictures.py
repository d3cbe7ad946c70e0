"""The pictures of a folder, as a page holds them."""

import base64
from pathlib import Path
from typing import Any

MOST_PICTURES = 24


def pictures_of(folder: Path) -> dict[str, Any]:
    """Name and base64 data of `pictures/*.png` in a folder, in order, the first of many."""
    found = sorted((folder / "pictures").glob("*.png"))
    pictures = [
        {"name": path.stem.replace("_", " "), "data": base64.b64encode(path.read_bytes()).decode()}
        for path in found[:MOST_PICTURES]
    ]
    more = len(found) - len(pictures)
    return {"pictures": pictures, "picture_notes": [f"{more} more in pictures/."] if more > 0 else []}
