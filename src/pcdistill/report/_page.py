"""Filling in the page templates; everything that is not marked safe is escaped."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The template with its values; an undefined name is an error, not an empty string."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(version=package_version(), **values)


def package_version() -> str:
    """The installed version, or nothing when the package runs from its source."""
    try:
        return version("pcdistill")
    except PackageNotFoundError:
        return ""
