"""The page of all error sentences is up to date, and its sentences are such as a reader can act on."""

import re
import sys
from pathlib import Path

import pytest

from pcdistill.errors import nearest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import list_errors  # noqa: E402  # the folder of scripts is no package


@pytest.fixture(scope="module")
def sentences():
    return {text for path in list_errors.SOURCE.rglob("*.py") for text in list_errors.sentences(path)}


def test_the_page_of_sentences_is_up_to_date():
    assert list_errors.PAGE.read_text(encoding="utf-8") == list_errors.page(), "run: python scripts/list_errors.py"


def test_the_page_finds_what_is_raised(sentences):
    assert "{out} is a file; --out must name a folder" in sentences
    assert any(text.startswith("{weak}; check that its weights are loaded") for text in sentences)  # by way of a name
    assert any("at least 2 classes are needed" in text for text in sentences)
    assert len(sentences) > 200


def test_a_sentence_is_one_line_that_does_not_scold(sentences):
    scolding = r"\n|[.! ]$|\b(please|invalid|illegal|oops)\b"
    assert [text for text in sentences if re.search(scolding, text, flags=re.IGNORECASE)] == []


def test_the_nearest_name_is_the_one_with_the_same_letters():
    assert nearest("pdc", ["pcd", "pkd", "dkd"]) == '; did you mean "pcd"?'
    assert nearest("zzz", ["pcd"]) == ""
