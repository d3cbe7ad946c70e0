"""What pyproject.toml cannot say: the package page's text is README.md without its relative links.

They lead nowhere on a package page. Files of the source distribution are named by their path instead.
"""

import re
from pathlib import Path

from setuptools import setup


def plain(match: re.Match[str]) -> str:
    text, target = match.groups()
    return text if text == target else f"{text} (`{target}`)"


readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
setup(
    long_description=re.sub(r"\[([^\]]*)\]\((?!\w+:)([^)]+)\)", plain, readme),
    long_description_content_type="text/markdown",
)
