"""Weights that fit or are refused, and what a file knows of itself."""

import argparse
import io
import json
import os
import pickle
import warnings
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from pcdistill import models
from pcdistill.errors import InputError


def tiny(num_classes=3, width=4):
    return nn.Sequential(
        OrderedDict(body=nn.Linear(2, width), norm=nn.BatchNorm1d(width), fc=nn.Linear(width, num_classes))
    )


class Tied(nn.Module):
    """Two names for one weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


def same_weights(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state", "student", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_is_found_under_its_key_and_prefix(tmp_path, key, prefix):
    source, model = tiny(), tiny()
    state = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save(
        state if key is None else {"epoch": 3, "args": argparse.Namespace(lr=0.1), key: state}, tmp_path / "w.pt"
    )
    report = models.load_weights(model, tmp_path / "w.pt")
    assert same_weights(model, source)
    assert (report.key, report.fits, report.loaded) == (key, True, len(state))


def test_the_report_says_what_else_the_checkpoint_held(tmp_path):
    state = tiny().state_dict()
    torch.save({"ema": state, "model": state}, tmp_path / "w.pt")
    report = models.load_weights(tiny(), tmp_path / "w.pt")
    assert str(report) == f'{len(state)} tensors loaded from {tmp_path / "w.pt"}, "model"; not used: ema'


def test_wrapped_models_and_averages_load_and_save_like_the_plain_one(tmp_path):
    source = tiny()
    models.save_weights(torch.compile(source, backend="eager"), tmp_path / "w.safetensors")
    model = tiny()
    models.load_weights(nn.DataParallel(model), tmp_path / "w.safetensors")
    assert same_weights(model, source)
    torch.save(torch.optim.swa_utils.AveragedModel(source).state_dict(), tmp_path / "w.pt")
    models.load_weights(model := tiny(), tmp_path / "w.pt")
    assert same_weights(model, source)


def test_a_submodule_that_is_called_module_keeps_its_name(tmp_path):
    def make():
        return nn.ModuleDict({"module": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})

    source, model = make(), make()
    models.save_weights(source, tmp_path / "w.safetensors")
    models.load_weights(model, tmp_path / "w.safetensors")
    assert same_weights(model, source)


def mismatched(tmp_path):
    state = tiny(num_classes=5).state_dict()
    del state["body.bias"]
    state["extra"] = torch.ones(1)
    torch.save(state, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_keys_that_do_not_fit_are_listed_and_refused(tmp_path):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        models.load_weights(model, mismatched(tmp_path))
    message = str(caught.value)
    assert "1 missing (body.bias), 1 unexpected (extra), 2 of another shape (fc.weight [5, 4] in the file" in message
    assert "[3, 4] in the model" in message
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_keys_that_do_not_fit_can_be_allowed(tmp_path):
    path, model = mismatched(tmp_path), tiny()
    head = model.fc.weight.clone()
    report = models.load_weights(model, path, allow_mismatch=True)
    assert (report.missing, report.unexpected) == (("body.bias",), ("extra",))
    assert torch.equal(model.body.weight, torch.load(path)["body.weight"])
    assert torch.equal(model.fc.weight, head)
    assert "1 missing (body.bias)" in str(report)


def test_weights_of_another_model_are_refused_even_when_mismatches_are_allowed(tmp_path):
    torch.save({"norm.num_batches_tracked": torch.tensor(3), "conv.weight": torch.ones(1)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="holds no parameter of this model, Sequential"):
        models.load_weights(tiny(), tmp_path / "w.pt", allow_mismatch=True)


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save({"body.weight": torch.ones(4, 2)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"7 missing \(body.bias, norm.weight, norm.bias, ...\)"):
        models.load_weights(tiny(), tmp_path / "w.pt")


def test_old_checkpoints_without_batch_counters_fit(tmp_path):
    state = {k: v for k, v in tiny().state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "w.pt")
    assert models.load_weights(tiny(), tmp_path / "w.pt").fits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_found_in_every_precision(dtype, value, tmp_path):
    good = {"weight": torch.ones(3, 2).to(dtype), "bias": torch.zeros(3)}
    torch.save(good, tmp_path / "good.pt")
    models.load_weights(nn.Linear(2, 3), tmp_path / "good.pt")
    bad = torch.ones(3, 2)
    bad[1, 1] = value
    torch.save({**good, "weight": bad.to(dtype)}, tmp_path / "bad.pt")
    with pytest.raises(InputError, match="not finite: weight"):
        models.load_weights(nn.Linear(2, 3), tmp_path / "bad.pt")


def test_parameters_that_are_not_finite_are_refused(tmp_path):
    state = tiny().state_dict()
    state["fc.bias"][0] = torch.nan
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"not finite: fc.bias"):
        models.load_weights(tiny(), tmp_path / "w.pt")


class Evil:
    """Would make a folder if a pickle of it were executed."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_pickled_code_is_refused_and_never_executed(tmp_path, form):
    trap, path = tmp_path / "executed", tmp_path / "w.pt"
    content = {"state_dict": {**tiny().state_dict(), "extra": Evil(trap)}}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = (
        "nothing in it was executed" if form == "plain" else r"holds pickled code \(.*mkdir\), which was not executed"
    )
    with pytest.raises(InputError, match=message) as caught:
        models.load_weights(tiny(), path, allow_mismatch=True)
    assert "weights_only" not in str(caught.value)
    assert not trap.exists()
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())
    assert trap.exists()  # the trap was real


def damaged():
    whole = io.BytesIO()
    torch.save(tiny().state_dict(), whole)
    return {
        "half.pt": whole.getvalue()[: len(whole.getvalue()) // 2],
        "empty.pt": b"",
        "text.pt": b"not a checkpoint",
        "empty.safetensors": b"",
        "text.safetensors": b"not a checkpoint, but long enough for a header",
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, name):
    (tmp_path / name).write_bytes(damaged()[name])
    with pytest.raises(InputError) as caught:
        models.load_weights(tiny(), tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_other_wrong_files_are_refused(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # newer versions of torch call it deprecated
        torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "program.pt"))
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    for name, message in {
        "program.pt": "is a TorchScript program",
        "other.pt": "holds no state dict, neither as a whole nor under one of state_dict, model",
        "tensor.pt": "holds no state dict",
        "absent.pt": "does not exist",
        ".": "weights must be a file, got the folder",
    }.items():
        with pytest.raises(InputError, match=message):
            models.load_weights(tiny(), tmp_path / name)


def test_saved_weights_carry_what_they_know(tmp_path):
    path = tmp_path / "new" / "w.safetensors"
    known = {
        "classes": ["cat", "dög"],
        "mean": [0.5],
        "std": [0.2],
        "image_size": 8,
        "top1": 91.5,
        "recipe": {"a": [1]},
    }
    source = models.build_model("cifar/resnet8", num_classes=2, in_channels=1)
    models.save_weights(source, path, known)
    assert models.read_metadata(path) == known
    assert models.read_classes(path) == ["cat", "dög"]
    model = models.build_model("cifar/resnet8", num_classes=None, in_channels=1, weights=path)
    assert same_weights(model, source)
    assert models.class_names(model) == ["cat", "dög"]
    assert models.input_stats(model) == ((0.5,), (0.2,), 8)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_weights_of_a_foreign_file_bring_no_statistics(tmp_path):
    model = timm.create_model("resnet10t")
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata={"made": "elsewhere"})
    assert models.read_metadata(tmp_path / "w.safetensors") == {"made": "elsewhere"}
    assert models.read_classes(tmp_path / "w.safetensors") is None
    models.load_weights(model, tmp_path / "w.safetensors")
    assert models.input_stats(model) is None
    assert models.class_names(model) is None


def test_tied_weights_survive_and_are_not_missed(tmp_path):
    source, model = Tied(), Tied()
    models.save_weights(source, tmp_path / "w.safetensors")
    models.load_weights(model, tmp_path / "w.safetensors")
    assert same_weights(model, source)
    assert model.first.weight is model.second.weight
    save_file({"first.weight": source.first.weight.detach()}, tmp_path / "once.safetensors")
    assert models.load_weights(Tied(), tmp_path / "once.safetensors").fits


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    models.save_weights(tiny(), path, {"epoch": 1})

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        models.save_weights(tiny(), path, {"epoch": 2})
    assert models.read_metadata(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_metadata_is_json_inside_safetensors(tmp_path):
    with pytest.raises(TypeError):
        models.save_weights(tiny(), tmp_path / "w.safetensors", {"model": tiny()})
    models.save_weights(tiny(), tmp_path / "w.safetensors")
    assert models.read_metadata(tmp_path / "w.safetensors") == {}
    header = (tmp_path / "w.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]["format"] == "pt"


def test_the_same_model_gives_the_same_bytes_and_the_mode_follows_the_umask(tmp_path):
    metadata = {"classes": ["a", "b"], "mean": [0.5], "std": [0.2], "model": "x", "digest": "d"}
    for number in range(8):
        shuffled = dict(sorted(metadata.items(), key=lambda pair: hash((pair[0], number))))
        models.save_weights(tiny(), tmp_path / f"{number}.safetensors", shuffled)
    torch.manual_seed(0)
    model = tiny()
    old = os.umask(0o027)
    try:
        for number in range(8):
            models.save_weights(model, tmp_path / f"{number}.safetensors", metadata)
    finally:
        os.umask(old)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    assert len({path.read_bytes() for path in files}) == 1
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert models.read_metadata(files[0]) == metadata


@pytest.mark.slow
def test_any_changed_byte_of_weights_of_ours_is_refused(tmp_path):
    path, model = tmp_path / "w.safetensors", tiny()
    models.save_weights(model, path, {"classes": ["a", "b", "c"]})
    whole = path.read_bytes()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(InputError):
            models.load_weights(model, path)
        if place % 5 == 0:
            path.write_bytes(whole[:place])
            with pytest.raises(InputError):
                models.load_weights(model, path)
            with pytest.raises(InputError):
                models.read_metadata(path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_a_changed_byte_of_a_foreign_torch_file_is_refused_or_changes_nothing(tmp_path):
    path, model, source = tmp_path / "w.pt", tiny(), tiny()
    torch.save(source.state_dict(), path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            models.load_weights(model, path)
        except InputError:
            refused += 1
        else:
            assert same_weights(model, source)
    assert refused > 100


def test_a_file_whose_marks_are_all_damaged_is_no_foreign_file(tmp_path):
    """One bit each of the seal's first letters, of the metadata's key and of the weights; found by the fuzzed bytes."""
    models.save_weights(tiny(), tmp_path / "w.safetensors", {"classes": ["a", "b"]})
    raw = bytearray((tmp_path / "w.safetensors").read_bytes())
    for mark in (b"blake2b:", b'"pcdistill"', b'"checksum"'):
        raw[raw.index(mark) + 2] ^= 1
    raw[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="is damaged: its checksum is not the one that was written"):
        models.load_weights(tiny(), tmp_path / "w.safetensors")


def test_foreign_files_without_checksums_load(tmp_path):
    source = tiny()
    save_file(source.state_dict(), tmp_path / "w.safetensors", metadata={"checksum": "own", "format": "pt"})
    models.load_weights(model := tiny(), tmp_path / "w.safetensors")
    assert same_weights(model, source)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(source.state_dict(), tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    models.load_weights(model := tiny(), tmp_path / "w.pt")
    assert same_weights(model, source)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [("norm.running_mean", torch.nan, "buffers that are not finite"), ("norm.running_var", -1.0, "variances below 0")],
)
def test_buffers_that_no_model_has_are_refused(tmp_path, key, value, says):
    state = tiny().state_dict()
    state[key][0] = value
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=f"{says}: {key}"):
        models.load_weights(tiny(), tmp_path / "w.safetensors")


def test_a_buffer_may_be_infinite_where_the_models_own_is(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    models.save_weights(Masked(), tmp_path / "w.safetensors")
    assert models.load_weights(Masked(), tmp_path / "w.safetensors").fits
