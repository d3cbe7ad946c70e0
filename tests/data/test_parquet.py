"""Parquet files read where they lie: which images they give, what is read of them, and what is refused."""

import pickle
import shutil
import threading

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcdistill import cli
from pcdistill.data.copies import LIMIT
from pcdistill.data.sources import open_source
from pcdistill.data.tables import read_table
from pcdistill.data.unlabelled import open_unlabelled
from pcdistill.errors import InputError
from tests.data.packing import configured, grouped, parquet, picture

fsspec = pytest.importorskip("fsspec")
datasets = pytest.importorskip("datasets")
ONCE = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class CountedFile(AbstractBufferedFile):
    """A file that notes what is fetched of it, which fsspec's caches may make more than is asked for."""

    def __init__(self, fs, path: str, content: bytes, read: list[tuple[str, int]], **options) -> None:
        super().__init__(fs, path, "rb", size=len(content), **options)
        self.held, self.noted = content, read

    def _fetch_range(self, start, end):
        found = self.held[start:end]
        self.noted.append((self.path, len(found)))
        return found


@pytest.fixture(autouse=True)
def own_root(tmp_path, monkeypatch):
    monkeypatch.setenv("PCDISTILL_DATA", str(tmp_path / "root"))
    monkeypatch.setattr("pcdistill.data.parquet.FEWEST", 1)


@pytest.fixture
def elsewhere(monkeypatch):
    """Puts files under memory://there; gives what is read of them, as path and bytes."""
    system, read, opens = fsspec.filesystem("memory"), [], MemoryFileSystem._open

    def counted(self, path, mode="rb", **options):
        file = opens(self, path, mode, **options)
        return CountedFile(self, path, file.getvalue(), read, **options) if mode == "rb" else file

    def put(folder):
        for path in folder.rglob("*.parquet"):
            system.pipe_file(f"/there/{path.relative_to(folder)}", path.read_bytes())
        return read

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    yield put
    if system.exists("/there"):
        system.rm("/there", recursive=True)


def three(folder):
    """Splits of 14, 3 and 5 images in uneven row groups."""
    parquet(folder / "data" / "train-00000-of-00002.parquet", grouped([4, 1, 3]))
    parquet(folder / "data" / "train-00001-of-00002.parquet", grouped([6], 8))
    parquet(folder / "data" / "validation-00000-of-00001.parquet", grouped([1, 2], 14))
    parquet(folder / "data" / "test-00000-of-00001.parquet", grouped([5], 17))
    return folder


def contents(split):
    return [split.items.content(i) for i in range(len(split.items))]


def refused(name, **options) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(name), **options)
    return str(caught.value)


def test_a_folder_a_glob_and_a_url_have_the_same_images_splits_and_classes(tmp_path, elsewhere, monkeypatch):
    folder = three(tmp_path / "d")
    elsewhere(folder)
    url = URL
    monkeypatch.chdir(tmp_path)
    prints = set()
    for name in ("d/data/*.parquet", f"file://{folder}", "d/data/t*.parquet", url, f"{url}/data/*", f"{url}:train"):
        source = open_source(f"hf:{name}")
        assert source.classes == ["a", "b", "c"]
        assert contents(source.train) == [picture(n) for n in range(14)]
        assert source.train.labels.tolist() == [n % 3 for n in range(14)]
        assert contents(source.test) == [picture(n) for n in range(17, 22)]
        assert (source.val is None) == ("t*" in name)
        prints.add(source.train.items.fingerprint())
    assert len(prints) == 1
    assert open_source(f"hf:{url}/data/train-00001*").train.items.fingerprint() not in prints
    assert "row 5 (row group 2) of memory://" in source.train.items.name(5)
    assert source.origins["train"] == "the split train, of 2 parquet files"


def test_a_folder_is_read_so_where_it_is_asked_for(tmp_path):
    folder = three(tmp_path / "d")
    source = open_source(f"hf:{folder}", streamed=True)
    assert source.train.items.kind == "parquet files"
    assert contents(source.val) == [picture(n) for n in range(14, 17)]
    assert open_source(f"hf:{folder}/data/test-00000-of-00001.parquet", streamed=True).train.labels.tolist() == [
        n % 3 for n in range(17, 22)
    ]
    split = open_unlabelled(f"hf:{folder}", streamed=True)
    assert (len(split.items), set(split.labels.tolist())) == (14, {-100})


URL = "memory://there"
NAMED = {
    "train-00000-of-00002.parquet": "train",
    "data/photos-train-00000-of-00002.parquet": "train",
    "unsupervised-00000-of-00001.parquet": "unsupervised",
    "dev/x.parquet": "validation",
    "a.eval.parquet": "test",
    "x/testing_3.parquet": "test",
    "contest.parquet": "train",
}


def test_splits_are_named_as_datasets_names_them(tmp_path):
    for name, split in NAMED.items():
        folder = tmp_path / split
        shutil.rmtree(folder, ignore_errors=True)
        parquet(folder / "d" / name, grouped([3]))
        parquet(folder / "d" / "other-00000-of-00001.parquet", grouped([1]))
        said = refused(f"hf:file://{folder}:nothing")
        assert set(said.partition(" the splits ")[2].partition(", and no")[0].split(", ")) == {split, "other"}, name


@ONCE
@given(
    sizes=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=3),
    fewest=st.integers(1, 9),
    cut=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_any_slice_of_any_row_groups_has_its_rows_once(tmp_path, monkeypatch, sizes, fewest, cut):
    monkeypatch.setattr("pcdistill.data.parquet.FEWEST", fewest)
    folder = tmp_path / "d"
    shutil.rmtree(folder, ignore_errors=True)
    total = 0
    for i, groups in enumerate(sizes):
        parquet(folder / f"{i}.parquet", grouped(groups, total))
        total += sum(groups)
    low, high = sorted(cut)
    expected = list(range(total))[low:high]
    name = f"hf:{folder}/*.parquet:train[{low}:{high}]"
    if not expected or low >= total:
        with pytest.raises(InputError):
            read_table(name[3:], tmp_path / "root")
        return
    if high > total:
        return  # `datasets` refuses it
    part = read_table(name[3:], tmp_path / "root").parts["train"]
    assert contents(part) == [picture(n) for n in expected]
    assert part.labels.tolist() == [n % 3 for n in expected]
    assert (np.diff(part.items.groups) >= 0).all()
    for group in np.unique(part.items.groups):
        rows = np.flatnonzero(part.items.groups == group)
        assert len({part.items.name(int(i)).partition(") of ")[2] for i in rows}) == 1


def test_of_a_file_no_more_is_read_than_footer_labels_and_the_row_groups_asked_for(tmp_path, elsewhere):
    side, groups = 64, 16
    for i in range(2):
        parquet(tmp_path / "d" / f"{i}.parquet", grouped([5] * groups, i * 5 * groups), side=side)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "d").iterdir())]
    read, url = elsewhere(tmp_path / "d"), URL
    items = open_source(f"hf:{url}").train.items
    index = sum(size for _, size in read)
    assert index < 2 * 2**16 + 0.01 * sum(sizes)  # Arrow looks for a footer in the last 64 KiB
    open_source(f"hf:{url}")
    assert sum(size for _, size in read) == index  # kept
    read.clear()
    assert items.content(27) == picture(27, side)
    first = sum(size for _, size in read)
    assert {path for path, _ in read} == {"/there/0.parquet"}
    assert first < 1.2 * sizes[0] / groups + 2**16  # and the footer
    read.clear()
    again = pickle.loads(pickle.dumps(items))  # as another process has them
    assert [again.content(i) for i in range(25, 30)] == [picture(i, side) for i in range(25, 30)]
    assert not read


def test_the_files_of_a_batch_are_fetched_side_by_side(tmp_path, elsewhere, monkeypatch):
    folder = three(tmp_path / "d")
    elsewhere(folder)
    items = open_source(f"hf:{URL}").train.items
    both, opens = threading.Barrier(2, timeout=30), MemoryFileSystem._open

    def together(self, path, mode="rb", **options):
        both.wait()  # returns when both files are being opened
        return opens(self, path, mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", together)
    items.prepare([0, 13])
    monkeypatch.setattr(MemoryFileSystem, "_open", None)
    assert [items.content(i) for i in (0, 3, 13)] == [picture(i) for i in (0, 3, 13)]


def test_a_file_that_has_changed_is_read_anew(tmp_path):
    path = parquet(tmp_path / "d" / "x.parquet", grouped([3, 3]))
    assert contents(open_source(f"hf:{path}", streamed=True).train) == [picture(n) for n in range(6)]
    parquet(path, grouped([3, 3], 7))
    assert contents(open_source(f"hf:{path}", streamed=True).train) == [picture(n) for n in range(7, 13)]


@ONCE
@given(share=st.floats(0, 0.999))
def test_a_file_that_is_cut_off_anywhere_is_refused_by_name(tmp_path, share):
    content = parquet(tmp_path / "w.parquet", grouped([3, 2])).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: int(share * len(content))])
    said = refused(f"hf:{tmp_path}/cut.parquet", streamed=True)
    assert "cut.parquet cannot be read" in said
    assert "\n" not in said


def test_a_damaged_row_group_is_told_by_file_and_number(tmp_path):
    from pyarrow.parquet import ParquetFile

    path = parquet(tmp_path / "x.parquet", grouped([3, 3, 3]))
    with ParquetFile(path) as table:
        chunk = table.metadata.row_group(1).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + 40] = b"\xff" * 40
    path.write_bytes(content)
    items = open_source(f"hf:{path}", streamed=True).train.items
    assert items.content(2) == picture(2)
    for row in (3, 5):
        with pytest.raises(InputError, match=r"row group 1 of .*x\.parquet cannot be read: .*; the file is damaged"):
            items.content(row)
    assert items.content(6) == picture(6)


def test_a_file_that_is_another_under_a_run_is_told(tmp_path):
    path = parquet(tmp_path / "x.parquet", grouped([3, 3]))
    items = open_source(f"hf:{path}", streamed=True).train.items
    parquet(path, grouped([4]))
    with pytest.raises(InputError, match="row group 0 of .* has 4 rows, and had 3 before"):
        items.content(0)
    with pytest.raises(InputError, match="has lost its row group 1"):
        items.content(4)
    path.unlink()
    with pytest.raises(InputError, match=r"x\.parquet cannot be read"):
        items.content(4)


def test_files_of_a_set_must_agree(tmp_path):
    parquet(tmp_path / "a" / "0.parquet", grouped([3]))
    parquet(tmp_path / "a" / "1.parquet", grouped([3]), ("a", "b", "d"))
    assert "1.parquet has other class names than" in refused(f"hf:{tmp_path}/a/*.parquet")
    parquet(tmp_path / "b" / "0.parquet", grouped([3]))
    datasets.Dataset.from_dict({"img": [picture(0)], "label": [0]}).to_parquet(tmp_path / "b" / "1.parquet")
    assert "1.parquet has other columns than" in refused(f"hf:{tmp_path}/b/*.parquet")


def test_what_is_no_such_file_is_refused(tmp_path, elsewhere):
    elsewhere(three(tmp_path / "d"))
    url = URL
    assert "there is no memory://there/x*" in refused(f"hf:{url}/x*")
    assert 'no "trian"; did you mean "train"' in refused(f"hf:{url}:trian")
    assert "train[:3x]" in refused(f"hf:{url}:train[:3x]")
    assert "Protocol not known: nosuch" in refused("hf:nosuch://x")
    (tmp_path / "d" / "x.csv").write_text("a,b\n")
    assert "x.csv is no .parquet file" in refused(f"hf:{tmp_path}/d/*.csv")
    (tmp_path / "d" / "bad.parquet").write_bytes(b"PAR1 no more")
    assert "bad.parquet cannot be read" in refused(f"hf:{tmp_path}/d/bad.parquet", streamed=True)
    table = datasets.Dataset.from_dict({"image": [picture(0)], "label": [0.5]})
    table.to_parquet(tmp_path / "f.parquet")
    assert "must hold whole numbers or text, not double" in refused(f"hf:{tmp_path}/f.parquet", streamed=True)
    table.remove_columns("label").to_parquet(tmp_path / "f.parquet")
    assert "no column of labels; of image" in refused(f"hf:{tmp_path}/f.parquet", streamed=True)
    table.remove_columns("image").to_parquet(tmp_path / "f.parquet")
    assert "no column of images; of label" in refused(f"hf:{tmp_path}/f.parquet", streamed=True)


def test_a_cell_without_bytes_is_empty_and_no_path_is_followed(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    (tmp_path / "own.png").write_bytes(picture(1))
    schema = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}).arrow_schema
    images = [{"bytes": picture(0), "path": None}, {"bytes": None, "path": str(tmp_path / "own.png")}, None]
    write_table(pyarrow.table({"image": images, "label": [0, 1, 2]}, schema=schema), tmp_path / "x.parquet")
    items = open_source(f"hf:{tmp_path}/x.parquet", streamed=True).train.items
    assert items.content(0) == picture(0)
    for row in (1, 2):
        with pytest.raises(InputError, match=rf"image of row {row} \(row group 0\) of .* is empty"):
            items.content(row)


def test_labels_may_be_text_and_images_plain_bytes(tmp_path):
    content = {"img": [picture(n) for n in range(6)], "label": ["xyz"[n % 3] for n in range(6)]}
    datasets.Dataset.from_dict(content).to_parquet(tmp_path / "b.parquet")
    source = open_source(f"hf:{tmp_path}/b.parquet", streamed=True)
    assert source.classes == ["x", "y", "z"]
    assert source.train.items.content(4) == picture(4)


def test_a_page_that_is_not_what_was_written_is_refused(tmp_path):
    from pyarrow.parquet import read_table, write_table

    held = read_table(parquet(tmp_path / "x.parquet", grouped([6])))
    path = tmp_path / "y.parquet"
    write_table(held, path, write_page_checksum=True, compression="none", use_dictionary=False)
    content, image = bytearray(path.read_bytes()), picture(3)
    at = content.index(image) + len(image) // 2
    content[at] ^= 1
    path.write_bytes(content)
    items = open_source(f"hf:{path}", streamed=True).train.items
    with pytest.raises(InputError, match=r"row group 0 of .*y.parquet cannot be read: .*; the file is damaged"):
        items.content(3)


def test_row_groups_that_the_disk_may_not_hold_together_are_refused_with_a_hint(tmp_path, monkeypatch):
    parquet(tmp_path / "x.parquet", grouped([10, 50]))
    monkeypatch.setenv(LIMIT, str(10_000 / 2**30))
    said = refused(f"hf:{tmp_path}/x.parquet", streamed=True)
    assert "row group 1 of" in said
    assert f"{LIMIT} allows" in said
    assert "row_group_size" in said


class Hub:
    """A builder of `datasets`, as the hub would give it for parquet files."""

    __module__ = "datasets.packaged_modules.parquet.parquet"

    def __init__(self, files, features=None):
        self.config = type("Config", (), {"data_files": files})()
        self.info = type("Info", (), {"features": features})()


def test_the_hubs_parquet_files_are_read_from_there(tmp_path, elsewhere, monkeypatch):
    folder = three(tmp_path / "d")
    parquet(folder / "data" / "train-00000-of-00002.parquet", grouped([4, 1, 3]), None)
    parquet(folder / "data" / "train-00001-of-00002.parquet", grouped([6], 8), None)
    elsewhere(folder)
    url = URL
    asked = []
    files = {"train": [f"{url}/data/train-0000{i}-of-00002.parquet" for i in range(2)]}
    named = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})

    def builder(*what):
        asked.append((what, datasets.config.HF_HUB_OFFLINE))
        return Hub(files, named)

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    source = open_source("hf:some/photos@small:train[2:12]", streamed=True)
    assert [what for what, _ in asked] == [("some/photos", "small")]
    assert source.classes == ["x", "y", "z"]
    assert contents(source.train) == [picture(n) for n in range(2, 12)]
    monkeypatch.setattr(Hub, "__module__", "datasets.packaged_modules.csv.csv")
    assert "of the format csv; data.streamed reads parquet alone" in refused("hf:some/photos", streamed=True)


def test_a_configuration_is_read_where_it_lies_too(tmp_path):
    folder = configured(tmp_path / "d")
    assert open_source(f"hf:{folder}@large", streamed=True).train.items.kind == "parquet files"
    assert len(open_source(f"hf:{folder}@large:train[:5]", streamed=True).train.labels) == 5
    assert "has the configurations small, large; name one: hf:" in refused(f"hf:{folder}", streamed=True)


@pytest.mark.slow
def test_the_flag_reaches_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = three(tmp_path / "d")
    cli.main(["check-data", f"hf:{folder}", "--streamed", "True", "--samples", "3"])
    said = capsys.readouterr().out
    assert "classes by parquet files, 3 classes" in said
    assert "from the split train, of 2 parquet files" in said
    cli.main(["distill", f"hf:{folder}", "--streamed", "True", "--print-config"])
    assert "streamed: true" in capsys.readouterr().out
