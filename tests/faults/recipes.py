"""Recipes, overrides and command lines with mistakes in them."""

import copy
import dataclasses
import datetime
import math
import typing
from typing import Any

import yaml
from hypothesis import strategies as st

from pcdistill import cli
from pcdistill.methods import METHODS
from pcdistill.recipe import Recipe, TermConfig, load_recipe

BASES = ("digits", "cifar100-resnet56-resnet20", "digits-detection", "patient")
NUMBERS = (
    *(0, 1, 2, -1, 3.5, 0.0, -0.0, 1e-3, 1e300, -1e300, 10**9, 2**31, 2**32, 5_000_000_000, 2**63 - 1, 2**63, 10**30),
    *(10**4000, math.nan, math.inf, -math.inf, True, False),
)
WORDS = (
    *("", " ", "3", "2e0", "1e-3", "nan", "inf", "-1", "true", "yes", "null", "~", "0x1F", "1_000", "1:30"),
    *("2024-13-45", "digits", "kd", "pcd", "none", "cifar/resnet8", "file.py:Loss", "a/b.npz", "x" * 5000),
    *("\0", "ä€漢😀", "\n", "{seed}"),
)
OPTIONS = ("temperature", "stages", "alpha", "beta", "power", "gamma", "colour", "num_classes", "weights")
NASTY = (  # texts that are no plain tree
    "train: &a [*a]",
    "train: &a {seed: *a}",
    "&a {method: *a}",
    "losses: " + "[" * 2000,
    "train: " + "{a: " * 2000 + "1" + "}" * 2000,
    "a0: &a0 [x, x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
    "train: !!python/object/apply:os.system ['false']",
    "train: !!python/name:os.system",
    "data: {name: !!binary aGVsbG8=}",
    "data: {limit: !!int ''}",
    "train: {seed: !!bool maybe}",
    "train: {seed: !!set {a, b}}",
    "data: {name: 2024-01-01}",
    "data: {name: 2024-13-45}",
    "train: {seed: " + "9" * 5000 + "}",
    "train: {seed: 0x" + "f" * 5000 + "}",
    "1: 2",
    "? [1, 2]\n: 3",
    "no: 1",
    "train: {epochs: 1, epochs: 2}",
    "--- {}\n--- {}",
    "%YAML 9.9\n---\n{}",
    "\x07",
    "\ufeffmethod: kd",
    "<<: 3",
    "<<: [1]",
    "train: {<<: *none}",
    "base: [digits]",
    "base: 5",
    "base: " + "x" * 5000,
    "base: mine.yaml",
    "base: ../../../../etc/passwd",
    "method:",
    "methods: {mine: }",
    "methods: {mine: }\nmethod: mine",
    "losses: 5",
    "losses: {}",
    "losses: [{method: kd, options: }]",
    "losses: [{method: }]",
    "losses: [[]]",
    "teachers: 5",
    "teachers: [5]",
    "teacher: {mean: [0.5]}",
    "- 1",
    "",
    "5",
)


def dotted_keys() -> list[str]:
    """Every key of the schema, groups included."""
    found = []
    for one in dataclasses.fields(Recipe):
        found.append(one.name)
        made = one.default_factory() if one.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(made):
            found += [f"{one.name}.{inner.name}" for inner in dataclasses.fields(made)]
    return found


def values() -> st.SearchStrategy[Any]:
    """Values of all types that YAML and Python know, most of them wrong wherever they are put."""
    leaves = st.one_of(
        st.none(),
        st.sampled_from(NUMBERS),
        st.sampled_from(WORDS),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.just(datetime.date(2024, 1, 1)),
        st.binary(max_size=4),
    )
    keys = st.one_of(st.text(max_size=4), st.sampled_from(OPTIONS), st.integers(0, 3), st.none(), st.booleans())
    return st.recursive(
        leaves,
        lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(keys, below, max_size=3)),
        max_leaves=6,
    )


def terms() -> st.SearchStrategy[Any]:
    """Terms of `losses` and `methods`, with options that may not fit."""
    keys = st.sampled_from([*(one.name for one in dataclasses.fields(TermConfig) if one.name != "method"), *OPTIONS])
    return st.builds(
        lambda method, more: {"method": method, **more},
        st.one_of(st.sampled_from(sorted(METHODS)), values()),
        st.dictionaries(keys, values(), max_size=3),
    )


@st.composite
def trees(draw: Any) -> dict[Any, Any]:
    """Shipped recipes in which some places were replaced, removed, renamed or added."""
    tree: dict[Any, Any] = copy.deepcopy(load_recipe(draw(st.sampled_from(BASES))).to_dict())
    for _ in range(draw(st.integers(1, 4))):
        at: Any = tree
        while True:
            places = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not places:
                break
            place = draw(st.sampled_from(places))
            if isinstance(at[place], dict | list) and at[place] and draw(st.booleans()):
                at = at[place]
                continue
            kind = draw(st.sampled_from(("replace", "replace", "term", "remove", "rename", "add")))
            if kind == "replace":
                at[place] = draw(values())
            elif kind == "term":
                at[place] = draw(st.one_of(terms(), st.lists(terms(), max_size=2)))
            elif kind == "remove":
                del at[place]
            elif isinstance(at, dict):
                key = draw(st.one_of(values().filter(_hashable), st.sampled_from(dotted_keys())))
                at[key] = at.pop(place) if kind == "rename" else draw(values())
            break
    return tree


def documents() -> st.SearchStrategy[str]:
    """Texts of recipe files."""
    return st.one_of(
        st.sampled_from(NASTY),
        trees().map(_dumped),
        st.dictionaries(st.sampled_from(dotted_keys()), values(), max_size=4).map(_dumped),
        st.text(max_size=60),
    )


def overrides() -> st.SearchStrategy[list[str]]:
    """Lists of `KEY=VALUE`."""
    term_keys = st.builds(
        "losses.{}.{}".format,
        st.sampled_from(("0", "1", "9", "9" * 5000, "ce", "dist", "kd", "²", "-1")),
        st.sampled_from(("weight", "method", "strength", "temperature_to", "entropy_weighting", "options", *OPTIONS)),
    )
    keys = st.one_of(
        st.sampled_from(dotted_keys()),
        term_keys,
        st.sampled_from(("teachers.0.weight", "methods.mine", "a" + ".a" * 2000, "", ".", "a.", "data.name.x")),
        st.text(max_size=6),
    )
    texts = st.one_of(
        values().map(_dumped).map(str.strip),
        st.sampled_from(WORDS),
        st.sampled_from([text.partition(":")[2] for text in NASTY]),
        st.text(max_size=8),
    )
    return st.lists(st.builds("{}={}".format, keys, texts) | st.text(max_size=6), min_size=1, max_size=3)


@st.composite
def command_lines(draw: Any) -> list[str]:
    """Arguments of the commands that resolve a recipe, with --print-config: nothing is trained."""
    name = draw(st.sampled_from(("train", "distill", "compare", "tune", "cache")))
    command = cli.COMMANDS[name]
    flags = {
        one.name: str(typing.get_type_hints(command)[one.name])
        for one in dataclasses.fields(command)
        if one.name not in ("recipe", "print_config", "quiet", "download", "out")
    }
    given: list[str] = []
    for flag in draw(st.lists(st.sampled_from([*flags, "nothing"]), max_size=3)):
        given.append(f"--{flag.replace('_', '-')}")
        if flag == "set":
            given.append(draw(overrides())[0])
            continue
        fitting = [str(v) for v in NUMBERS if type(v).__name__ in flags.get(flag, "")] or list(WORDS)
        if draw(st.integers(0, 3)):
            given.append(draw(st.sampled_from(fitting)))
        elif draw(st.integers(0, 2)):
            given.append(draw(st.sampled_from(WORDS) | st.text(max_size=5)))
    recipe = draw(st.sampled_from(("", "digits", "digits", "cifar100", "digit", "x.yaml", "x" * 300)))
    return [name, *([recipe] if recipe else []), *given, "--print-config"]


def _dumped(value: Any) -> str:
    try:
        return yaml.dump(value)
    except (ValueError, yaml.YAMLError):  # text that YAML has no form for
        return "1" * 5000


def _hashable(value: Any) -> bool:
    return isinstance(value, str | int | float | None)
