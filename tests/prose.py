"""Prose out of Markdown: its sentences without code, tables and headings."""

import re

BULLET = re.compile(r"^\s*([-*]|\d+\.)\s+")


def paragraphs(text: str) -> list[str]:
    """Running text and the items of lists, each on one line."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    found: list[list[str]] = [[]]
    for line in text.splitlines():
        if BULLET.match(line):
            found.append([BULLET.sub("", line)])
        elif not line.strip() or line.lstrip().startswith(("|", "#")):
            found.append([])
        elif found[-1] or not line.startswith("    "):  # an indented block is code
            found[-1].append(line.strip())
    return [" ".join(lines) for lines in found if lines]


def sentences(text: str) -> list[str]:
    """Sentences end in a full stop, a question mark or an exclamation mark; inline code is one word."""
    found = []
    for paragraph in paragraphs(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "code", paragraph))
        found += re.split(r"(?<=[.!?])\s+", plain)
    return found


def length(sentence: str) -> int:
    """Its words: what holds a letter or a digit."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())
