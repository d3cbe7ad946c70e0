"""A function as the teacher: called with images, its logits checked, its file's content part of the fingerprint."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pcdistill.distillation.cache_store import fingerprint
from pcdistill.distillation.teacher import Teacher
from pcdistill.engine.fingerprint import teacher_contents
from pcdistill.errors import InputError, PcdistillError
from pcdistill.models.outside import CalledModel, OutsideModel

GOOD = "def predict(images, scale=1.0):\n    return images.mean(dim=(2, 3)) * scale\n"


def called(folder, text=GOOD, function="predict", classes=3, **kwargs):
    file = folder / "mine.py"
    file.write_text(text)
    return CalledModel(f"{file}:{function}", classes, kwargs)


def test_the_function_gets_the_batch_in_float32_and_its_logits_come_back(tmp_path):
    model = called(tmp_path, scale=2.0)
    images = torch.rand(4, 3, 5, 5)
    assert torch.equal(model(images.to(memory_format=torch.channels_last)), images.mean(dim=(2, 3)) * 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images.bfloat16()).dtype == torch.float32
    assert torch.equal(Teacher(model, class_map=[2, 0])(images), (images.mean(dim=(2, 3)) * 2)[:, [2, 0]])


def test_a_file_in_the_users_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    beside = called(tmp_path)
    model = CalledModel("~/mine.py:predict", 3, {})
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(model(images), beside(images))
    assert torch.equal(model.identity, beside.identity)


def test_an_answer_in_memory_that_is_written_again_stays_as_it_was(tmp_path):
    model = called(
        tmp_path, "import torch\nkept = torch.zeros(2, 3)\ndef predict(images):\n    kept.add_(1)\n    return kept\n"
    )
    first, second = model(torch.rand(2, 3, 4, 4)), model(torch.rand(2, 3, 4, 4))
    assert first.tolist() == [[1.0] * 3] * 2
    assert second.tolist() == [[2.0] * 3] * 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("return images.mean(dim=(2, 3)).tolist()", r"gave list, not a tensor of logits \[2, 3\]"),
        ("return {'scores': images}", "gave dict, not a tensor"),
        ("return images", r"gave the shape \[2, 3, 4, 4\], not logits \[2, 3\]"),
        ("return images.mean(dim=(2, 3))[:1]", r"gave the shape \[1, 3\]"),
        ("return images.mean(dim=(2, 3)).long()", r"as torch.int64; they must be floating-point"),
        ("return images.mean(dim=(2, 3)) * float('nan')", "NaN or infinite logits, first for image 0"),
    ],
)
def test_another_answer_is_refused_in_a_sentence_that_names_it(tmp_path, text, sentence):
    model = called(tmp_path, f"def predict(images):\n    {text}\n")
    with pytest.raises(InputError, match=sentence):
        model(torch.rand(2, 3, 4, 4))


class Fixed(OutsideModel):
    def __init__(self, answer: torch.Tensor) -> None:
        super().__init__("fixed", 3, b"")
        self.answer = answer

    def ask(self, images):
        return self.answer


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64]),
)
def test_only_floating_logits_of_the_right_shape_pass(shape, dtype):
    model = Fixed(torch.zeros(shape, dtype=dtype))
    images = torch.zeros(2, 1, 2, 2)
    if shape == [2, 3] and dtype.is_floating_point:
        assert model(images).dtype == torch.float32
    else:
        with pytest.raises(InputError, match="the teacher fixed gave"):
            model(images)


def test_images_that_are_not_finite_are_not_the_teachers_fault(tmp_path):
    assert called(tmp_path)(torch.full((1, 3, 2, 2), float("nan"))).isnan().all()


def test_a_function_that_fails_is_named_with_its_line(tmp_path):
    model = called(tmp_path, "def predict(images):\n    raise ConnectionError('nobody there')\n")
    with pytest.raises(PcdistillError, match=r"mine.py, line 2: ConnectionError: nobody there"):
        model(torch.rand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("class predict: ...\n", "is a class; teacher.call needs"),
        ("import torch\npredict = torch.nn.Flatten()\n", "is a module; write a function that returns it"),
        ("def predicts(images): ...\n", 'has no function or class "predict"; did you mean "predicts"'),
    ],
)
def test_what_is_no_function_is_refused_before_it_is_called(tmp_path, text, sentence):
    with pytest.raises(InputError, match=sentence):
        called(tmp_path, text)


def test_the_fingerprint_is_of_content_function_and_arguments_and_not_of_the_path(tmp_path):
    (tmp_path / "other").mkdir()
    first, moved = Teacher(called(tmp_path)), Teacher(called(tmp_path / "other"))
    assert fingerprint(first) == fingerprint(moved)
    assert teacher_contents(first) == teacher_contents(moved)
    changed = [
        called(tmp_path, GOOD + "# a comment\n"),
        called(tmp_path, scale=2.0),
        called(tmp_path, GOOD + "also = predict\n", "also"),
    ]
    assert len({fingerprint(Teacher(one)) for one in changed} | {fingerprint(first)}) == 4
    assert teacher_contents(first) != teacher_contents(Teacher(changed[0]))
