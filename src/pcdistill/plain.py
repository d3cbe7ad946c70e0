"""Plain values out of files: YAML and JSON, read within limits, and checked against a type before they are used.

Nothing in such a file is executed. One that holds itself, or that grows without end when its aliases are followed, is
refused while it is read.
"""

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError, from_json

from pcdistill.errors import InputError

T = TypeVar("T")
MOST_BYTES = 10_000_000  # of a file that people or programs write settings into
MOST_DATA = 2**34  # bytes of a file that describes data
MOST_VALUES = 100_000  # of a YAML document, its aliases followed
DEEPEST = 40  # levels of nesting
CHUNK = 1 << 20  # bytes
LARGEST = 2**63  # whole numbers are below it, as in a tensor
_TAG = "tag:yaml.org,2002:"
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


def _no_truth(value: Any) -> Any:
    """Python takes true for 1; a person who wrote it meant something else."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "input should be a number")
    return value


NUMBER = BeforeValidator(_no_truth)  # of types that take no true or false


def either(words: str) -> WrapValidator:
    """For a type with alternatives: one sentence in place of what is wrong with each of them."""

    def check(value: Any, types: ValidatorFunctionWrapHandler) -> Any:
        try:
            return types(value)
        except ValidationError as error:
            raise PydanticCustomError("either", "input should be {words}", {"words": words}) from error

    return WrapValidator(check)


def shown(value: Any) -> str:
    """A value as Python writes it, shortened: it may be of any size, or hold itself."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, for one
        return f"a value of type {type(value).__name__}"


def one_line(text: str) -> str:
    """The text with line breaks and other characters that cannot be printed as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def read_text(path: Path, *, most: int = MOST_BYTES) -> str:
    """A text file in UTF-8 or UTF-16, with or without a byte-order mark.

    Args:
        path: the file.
        most: bytes; a file with more of them is refused.

    Raises:
        InputError: it cannot be read, or is far larger than such a file is.
    """
    try:
        raw = bytearray()
        with open(path, "rb") as file:  # in parts, for a pipe has no length, and a device no end
            while len(raw) <= most and (part := file.read(CHUNK)):
                raw += part
        if len(raw) > most:
            raise InputError(f"{path} has more than {most // 1_000_000} MB; this is no such file")
        return raw.decode(json.detect_encoding(raw))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def parse_yaml(text: str, where: str, *, as_text: bool = False) -> Any:
    """One YAML document. Numbers are read as in YAML 1.2 (1e-3 is one), dates as text; keys are text, each once.

    Args:
        text: the document.
        where: what to name in messages.
        as_text: read every scalar and key as the text that it is written with: `no` and `1` are text.

    Raises:
        InputError: naming `where` and the line.
    """
    try:
        return (_TextLoader if as_text else _Loader)(text).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "context", None) or str(error).split("\n")[0]
        raise InputError(f"{where}{line}: not valid YAML: {one_line(problem)}") from None
    except (ValueError, KeyError, IndexError):
        raise InputError(f"{where}: not valid YAML: a value does not fit the tag in front of it") from None


def write_yaml(value: Any) -> str:
    """A document from which :func:`parse_yaml` reads the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def parse_json(text: str | bytes, where: str) -> Any:
    """One JSON document, NaN and infinities allowed.

    Raises:
        InputError: naming `where`.
    """
    try:
        return from_json(text)
    except (ValueError, TypeError) as error:  # the latter of text with surrogates
        raise InputError(f"{where} is not valid JSON: {error}") from None


def checked_json(text: str, form: TypeAdapter[T], where: str) -> T:
    """One JSON document as a type.

    Raises:
        InputError: naming `where` and the first key that does not fit.
    """
    try:
        return form.validate_json(text)
    except (ValidationError, TypeError) as error:  # the latter of text with surrogates
        if isinstance(error, TypeError):
            raise InputError(f"{where} is not valid JSON: {error}") from None
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        at = f"{where}: {key}" if key else where
        raise InputError(f"{at}: {first['msg'].lower()}, got {shown(first['input'])}") from None


def structure_faults(tree: Any) -> Iterator[tuple[str, str]]:
    """Where a tree of values can be no settings, as (dotted key, sentence); the first ends it where there may be more
    without end.
    """
    left = MOST_VALUES

    def look(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        nonlocal left
        left -= 1
        if left < 0 or len(path) > DEEPEST:
            raise _Endless
        if isinstance(value, Mapping):
            for key, below in value.items():
                if not isinstance(key, str):
                    yield ".".join(path), f"the key {shown(key)} must be text; put it in quotes"
                else:
                    yield from look(below, (*path, key))
        elif isinstance(value, list | tuple):
            for i, below in enumerate(value):
                yield from look(below, (*path, str(i)))
        elif isinstance(value, int) and not -LARGEST < value < LARGEST:
            yield ".".join(path), "the whole number is too large (64 bits are the most)"
        elif isinstance(value, str) and "\0" in value:
            yield ".".join(path), f"text must hold no NUL character, got {shown(value)}"

    try:
        yield from look(tree, ())
    except _Endless:
        yield "", f"it has more than {DEEPEST} levels or {MOST_VALUES} values, or holds itself"


def value_faults(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Values that a recipe cannot hold: all but finite numbers, text, true, false, null, and lists and groups of them.

    Args:
        value: of sound structure (see :func:`structure_faults`).
        key: its dotted key.
    """
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from value_faults(below, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, below in enumerate(value):
            yield from value_faults(below, f"{key}.{i}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield key, f"must be a finite number, got {value}"
    elif not isinstance(value, str | int | None):
        yield key, f"must be a number, text, true, false, null, or a list or group of them, got {shown(value)}"


class _Endless(Exception):
    """A tree that holds itself, or is too large."""


class _Loader(yaml.SafeLoader):
    """Plain tags alone, YAML 1.2's numbers, no dates; limits on nesting, size and whole numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.values = 0
        self.sizes: dict[int, int] = {}  # of the nodes that are complete, aliases followed

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            node = self.anchors.get(event.anchor)
            if node is not None and id(node) not in self.sizes:
                raise _refusal(f"*{event.anchor} stands within itself", event.start_mark)
            self._count(self.sizes.get(id(node), 0), event.start_mark)
            return super().compose_node(parent, index)
        first: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, before = first.start_mark, self.values
        self._count(1, mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refusal(f"nested deeper than {DEEPEST} levels", mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        self.sizes[id(node)] = self.values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if key.tag != f"{_TAG}str":
                named = f"the key {shown(key.value)}" if isinstance(key, yaml.ScalarNode) else "a key"
                raise _refusal(f"{named} must be text; put it in quotes", key.start_mark)
            if key.value in seen:
                raise _refusal(f"the key {shown(key.value)} stands twice", key.start_mark)
            seen.add(key.value)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        found: int = super().construct_yaml_int(node) if len(node.value) < 100 else LARGEST
        if not -LARGEST < found < LARGEST:
            raise _refusal("the whole number is too large (64 bits are the most)", node.start_mark)
        return found

    def _count(self, more: int, mark: Any) -> None:
        self.values += more
        if self.values > MOST_VALUES:
            raise _refusal(f"more than {MOST_VALUES} values", mark)


class _TextLoader(_Loader):
    """Every scalar is text, whatever tag stands before it."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that the loader would take for a number."""


def _refusal(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _make_rules() -> None:
    """Tags and resolvers of loader and dumper."""
    _Loader.yaml_constructors = {
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in _PLAIN
    }
    _Loader.add_constructor(f"{_TAG}int", _Loader.construct_yaml_int)
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in rules if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _TextLoader.yaml_implicit_resolvers, _TextLoader.yaml_constructors = {}, {}
    number = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")
    for one in (_Loader, _Dumper):
        one.add_implicit_resolver(f"{_TAG}float", number, list("-+.0123456789"))


_make_rules()
