"""Plain values out of files: what YAML and JSON may hold, and how far they are followed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pcdistill.errors import InputError
from pcdistill.plain import (
    checked_json,
    parse_json,
    parse_yaml,
    read_text,
    shown,
    structure_faults,
    value_faults,
    write_yaml,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.text(), below),
    max_leaves=8,
)


@pytest.mark.slow
@given(PLAIN)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(write_yaml(value), "text") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2e0", 2.0),
        ("-1E+2", -100.0),
        ("'1e-3'", "1e-3"),
        ("2024-01-01", "2024-01-01"),
        ("2024-13-45", "2024-13-45"),
        ("&x {a: 1}", {"a": 1}),
        ("{a: &x {b: 1}, c: {<<: *x, b: 2}, d: *x}", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}),
    ],
)
def test_numbers_and_dates_are_as_in_yaml_1_2(text, value):
    found = parse_yaml(text, "text")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [*a]", r"f.yaml, line 1: not valid YAML: \*a stands within itself"),
        ("a: " + "[" * 2000, "nested deeper than 40 levels"),
        ("a: 1\na: 2", "f.yaml, line 2: not valid YAML: the key 'a' stands twice"),
        ("3: 1", "the key '3' must be text; put it in quotes"),
        ("[1]: 2", "a key must be text"),
        ("a: " + "9" * 5000, "the whole number is too large"),
        ("a: !!int ''", "a value does not fit the tag in front of it"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!timestamp 2024-01-01", "could not determine a constructor"),
        ("\x07", "special characters are not allowed"),
    ],
)
def test_what_is_no_plain_tree_is_refused_with_its_line(text, says):
    with pytest.raises(InputError, match=says) as error:
        parse_yaml(text, "f.yaml")
    assert "\n" not in str(error.value)


def test_aliases_are_counted_as_often_as_they_stand():
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    with pytest.raises(InputError, match="line 6: not valid YAML: more than 100000 values"):
        parse_yaml("\n".join(lines), "f.yaml")
    assert len(parse_yaml("\n".join(lines[:4]), "f.yaml")["a3"]) == 9


@pytest.mark.parametrize("text", ["[" * 5000, '{"a": ' * 5000, "", "{", "9" * 9999, "\ud800"])
def test_json_that_is_none_is_refused(text):
    for read in (parse_json, lambda text, where: checked_json(text, TypeAdapter(dict[str, int]), where)):
        with pytest.raises(InputError, match="result.json"):
            read(text, "result.json")


def test_files_and_json_are_read_as_a_type(tmp_path):
    file, form = tmp_path / "a.json", TypeAdapter(dict[str, int])
    assert checked_json('{"a": 1}', form, "a.json") == {"a": 1}
    with pytest.raises(InputError, match=r"a\.json: a: input should be a valid integer, got \[\]"):
        checked_json('{"a": []}', form, "a.json")
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-be"):
        file.write_bytes("{}".encode(encoding))
        assert read_text(file, most=6) == "{}"
    with pytest.raises(InputError, match="has more than 0 MB"):
        read_text(file, most=3)
    file.write_bytes(b"\xff{")
    with pytest.raises(InputError, match="is not a text file in UTF-8"):
        read_text(file)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_text(tmp_path / "none")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path)


def test_faults_of_a_tree_are_found_without_following_it_for_ever():
    itself: list = []
    itself += [itself] * 10
    assert "holds itself" in next(structure_faults({"a": itself}))[1]
    found = dict(structure_faults({"a": {1: 2}, "b": [10**30], "c": "\0", "d": 1.5, "e": None}))
    assert set(found) == {"a", "b.0", "c"}
    assert dict(value_faults({"x": [1, math.nan], "y": b"", "z": [True, "a", None, 2.5]}, "k")).keys() == {
        "k.x.1",
        "k.y",
    }


def test_every_scalar_of_yaml_can_be_read_as_text():
    text = "no: [1, 2e0, ~, 2020-01-01, !!int 3, !x y]\n1: <<"
    assert parse_yaml(text, "f", as_text=True) == {"no": ["1", "2e0", "~", "2020-01-01", "3", "y"], "1": "<<"}
    for wrong in ("a: &a [*a]", "a: 1\na: 2", "[" * 50 + "]" * 50):
        with pytest.raises(InputError, match="not valid YAML"):
            parse_yaml(wrong, "f", as_text=True)


def test_shown_values_are_short():
    assert shown("few") == "'few'"
    assert shown(10**5000) == "a value of type int"
    assert len(shown("x" * 10**6)) < 100
    deep: list = []
    deep.append(deep)
    assert len(shown(deep)) < 100
