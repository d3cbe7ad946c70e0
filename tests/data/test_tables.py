"""Tables of Hugging Face's datasets: their splits, classes and images, and what is refused of them."""

import json
from pathlib import Path

import pytest

from pcdistill.data.sources import open_source
from pcdistill.data.tables import read_table
from pcdistill.data.unlabelled import open_unlabelled
from pcdistill.errors import InputError
from tests.data.packing import configured, picture

datasets = pytest.importorskip("datasets")
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(numbers, labels=None, names=NAMES, **columns):
    numbers = list(numbers)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = {"image": datasets.Image(), "label": kind}
    content = {
        "image": [{"bytes": picture(n), "path": None} for n in numbers],
        "label": [n % 3 for n in numbers] if labels is None else labels,
    }
    for name, values in columns.items():
        content[name] = values
        features[name] = datasets.Value("string")
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def parquet(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, one in splits.items():
        one.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return folder


def refused(name) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(name))
    return str(caught.value)


def test_a_folder_of_parquet_files_has_its_splits_and_class_names(tmp_path):
    folder = parquet(tmp_path / "p", train=table(range(9)), validation=table(range(9, 12)), test=table(range(12, 18)))
    source = open_source(f"hf:{folder}")
    assert source.classes == NAMES
    assert source.train.labels.tolist() == [n % 3 for n in range(9)]
    assert [source.train.items.content(i) for i in range(9)] == [picture(n) for n in range(9)]
    assert [len(split.labels) for split in (source.val, source.test)] == [3, 6]
    assert "image of row 2 of hf:" in source.train.items.name(2)


def test_a_named_split_is_for_training_and_none_of_the_others(tmp_path):
    folder = parquet(tmp_path / "p", train=table(range(9)), validation=table(range(9, 12)), test=table(range(12, 18)))
    for split, sizes in {
        "train": (9, 3, 6),
        "train[:6]": (6, 3, 6),
        "train+validation": (12, None, 6),
        "test": (6, None, 3),
    }.items():
        source = open_source(f"hf:{folder}:{split}")
        found = [None if one is None else len(one.labels) for one in (source.train, source.val, source.test)]
        assert found == list(sizes), split
    assert open_source(f"hf:{folder}:train[:6]").train.items.content(5) == picture(5)


def test_saved_tables_image_folders_and_single_files_are_read(tmp_path):
    datasets.DatasetDict({"train": table(range(6)), "test": table(range(6, 9))}).save_to_disk(tmp_path / "saved")
    table(range(6)).save_to_disk(tmp_path / "one")
    table(range(6)).to_parquet(tmp_path / "file.parquet")
    for n in range(6):
        (tmp_path / "folder" / NAMES[n % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / NAMES[n % 3] / f"{n}.png").write_bytes(picture(n))
    for name in ("saved", "one", "file.parquet", "folder"):
        source = open_source(f"hf:{tmp_path / name}")
        assert source.classes == NAMES
        found = {source.train.items.content(i): int(label) for i, label in enumerate(source.train.labels)}
        assert found == {picture(n): n % 3 for n in range(6)}
    assert len(open_source(f"hf:{tmp_path / 'saved'}").test.labels) == 3


def test_one_set_has_one_fingerprint_however_it_is_kept(tmp_path):
    table(range(6)).save_to_disk(tmp_path / "one")
    table(range(6)).to_parquet(tmp_path / "file.parquet")
    table(range(1, 7)).to_parquet(tmp_path / "other.parquet")
    names = ("one", "file.parquet", "other.parquet")
    prints = [open_source(f"hf:{tmp_path / name}").train.items.fingerprint() for name in names]
    assert prints[0] == prints[1] != prints[2]


def test_labels_may_be_numbers_or_text_and_images_plain_bytes(tmp_path):
    table(range(6), names=None).to_parquet(tmp_path / "a.parquet")
    assert open_source(f"hf:{tmp_path}/a.parquet").classes == ["0", "1", "2"]
    content = {"img": [picture(n) for n in range(6)], "label": [NAMES[n % 3] for n in range(6)]}
    datasets.Dataset.from_dict(content).to_parquet(tmp_path / "b.parquet")
    source = open_source(f"hf:{tmp_path}/b.parquet")
    assert source.classes == NAMES
    assert source.train.items.content(4) == picture(4)


def test_a_test_split_whose_labels_are_kept_back_counts_as_none(tmp_path):
    held_back = table(range(3), labels=[-1] * 3)
    folder = parquet(tmp_path / "p", train=table(range(6)), validation=table(range(6, 9)), test=held_back)
    source = open_source(f"hf:{folder}")
    assert source.val is None
    assert "the split validation, as there is no test split" in source.origins["test"]


def test_what_is_no_such_table_is_refused(tmp_path):
    folder = parquet(tmp_path / "p", train=table(range(6)), test=table(range(3)))
    assert 'no "trian"; did you mean "train"' in refused(f"hf:{folder}:trian")
    assert "there is no such folder" in refused(f"hf:{tmp_path}/nothing")
    assert "there is no such folder" in refused("hf:pandas")
    assert "names no data" in refused("hf:")
    assert "data.download" in refused("hf:somebody/unheard-of")
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert "must be .parquet or .arrow" in refused(f"hf:{tmp_path}/x.csv")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "x.csv").write_text("a,b\n1,2\n")
    assert "of the format csv" in refused(f"hf:{tmp_path}/csv")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no more")
    assert "bad.parquet cannot be opened" in refused(f"hf:{tmp_path}/bad.parquet")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('was run')")
    assert "scripts are no longer supported" in refused(f"hf:{tmp_path}/script")
    datasets.DatasetDict({"first": table(range(6)), "second": table(range(3))}).save_to_disk(tmp_path / "two")
    assert "and no train; name the one to train on" in refused(f"hf:{tmp_path / 'two'}")
    assert len(open_source(f"hf:{tmp_path / 'two'}:first").train.labels) == 6


def test_a_configuration_is_named_and_a_wrong_or_missing_one_lists_them(tmp_path):
    folder = configured(tmp_path / "photos")
    assert len(open_source(f"hf:{folder}@large").train.labels) == 9
    assert len(open_source(f"hf:{folder}@small:train").train.labels) == 3
    there = f"hf:{folder} has the configurations small, large"
    assert refused(f"hf:{folder}") == f"{there}; name one: hf:{folder}@small"
    assert refused(f"hf:{folder}@lagre") == f'{there}, and no "lagre"; did you mean "large"?'
    assert "and no" in refused(f"hf:{folder}@small:trian")
    plain = parquet(tmp_path / "plain@2024", train=table(range(9)))
    assert len(open_source(f"hf:{plain}").train.labels) == 9
    assert f"hf:{plain} has the configurations default, and no" in refused(f"hf:{plain}@x")
    table(range(6)).save_to_disk(tmp_path / "one")
    assert "was written by save_to_disk, and has no configuration x" in refused(f"hf:{tmp_path / 'one'}@x")


def test_a_configuration_of_the_hub_is_handed_on(monkeypatch):
    def builder(place, config):
        raise ValueError(f"BuilderConfig '{config}' not found. Available: ['de', 'en']")

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda place: ["de", "en"])
    assert refused("hf:some/photos@e") == 'hf:some/photos has the configurations de, en, and no "e"; did you mean "en"?'


def test_columns_and_labels_that_are_wrong_are_refused_by_name(tmp_path):
    def kept(one):
        one.to_parquet(tmp_path / "x.parquet")
        return refused(f"hf:{tmp_path}/x.parquet")

    assert "no column of labels; of image" in kept(table(range(3)).remove_columns("label"))
    assert "no column of images; of label" in kept(table(range(3)).remove_columns("image"))
    assert "row 1 has no label" in kept(table(range(3), labels=[0, None, 2]))
    assert "row 1 of" in kept(table(range(3), labels=[0, -1, 2]))
    floats = datasets.Dataset.from_dict({"image": [picture(0)], "label": [0.5]})
    assert "must hold whole numbers or text, not double" in kept(floats)


def test_an_empty_cell_and_a_lost_file_are_told_by_row(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    content = {"image": [picture(0), None], "label": [0, 1]}
    datasets.Dataset.from_dict(content, features=features).to_parquet(tmp_path / "x.parquet")
    items = read_table(f"{tmp_path}/x.parquet", tmp_path).parts["train"].items
    with pytest.raises(InputError, match="image of row 1 of .*is empty"):
        items.content(1)
    for name in NAMES:
        (tmp_path / "folder" / name).mkdir(parents=True)
        (tmp_path / "folder" / name / "0.png").write_bytes(picture(0))
    items = read_table(f"{tmp_path}/folder", tmp_path).parts["train"].items
    (tmp_path / "folder" / NAMES[2] / "0.png").unlink()
    with pytest.raises(InputError, match="image of row 2 of .*cannot be read: .*No such file"):
        items.content(2)


def test_unlabelled_tables_need_no_labels(tmp_path):
    table(range(5)).remove_columns("label").to_parquet(tmp_path / "x.parquet")
    split = open_unlabelled(f"hf:{tmp_path}/x.parquet")
    assert len(split.items) == 5
    assert set(split.labels.tolist()) == {-100}


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"hf:x needs datasets.*pcdistill\[streams\]"):
        read_table("x", Path())


def test_nothing_in_a_saved_table_is_unpickled(tmp_path):
    """`state.json` is settings; one that names a type of its own is refused or has no effect."""
    table(range(6)).save_to_disk(tmp_path / "one")
    state = json.loads((tmp_path / "one" / "state.json").read_text())
    (tmp_path / "one" / "state.json").write_text(json.dumps({**state, "_format_type": "os.system"}))
    assert "cannot be opened" in refused(f"hf:{tmp_path / 'one'}")
