"""Places of files: paths and URLs, and the folder that several are in."""

from pathlib import Path

import pytest

from pcdistill.remote import common_folder, files_at, within


@pytest.mark.parametrize("folder", ["memory:///a/b_3", "s3://bucket", "s3://bucket/x/y", "/a/b", "a"])
def test_the_folder_of_files_is_found_under_any_kind_of_url(folder):
    places = [f"{folder}/train/1.tar", f"{folder}/val/2.tar"]
    assert common_folder(places) == folder
    assert [within(place, folder) for place in places] == ["train/1.tar", "val/2.tar"]
    assert common_folder(places[:1]) == f"{folder}/train"


def test_files_may_have_no_folder_in_common():
    assert common_folder([Path("1.tar"), Path("2.tar")]) == ""
    assert common_folder([Path("a1/1.tar"), Path("a2/2.tar")]) == ""
    assert common_folder([Path("/1.tar"), Path("/2.tar")]) == "/"
    assert common_folder(["s3://bucket/ab/1", "s3://bucket/ac/2"]) == "s3://bucket"
    assert common_folder([]) == ""


def test_a_name_stands_for_a_file_a_glob_or_a_folder(tmp_path):
    files = [tmp_path / "a" / f"{n}.tar" for n in range(3)]
    files[0].parent.mkdir()
    for path in files:
        path.write_bytes(b"")
    (tmp_path / "a" / "x.txt").write_bytes(b"")
    assert files_at(tmp_path, ".tar") == files_at(f"file://{tmp_path}/a", ".tar") == files
    assert files_at(f"{tmp_path}/a/[12].tar", ".tar") == files[1:]
    assert files_at(files[1], ".tar") == [files[1]]
    assert files_at(tmp_path / "b", ".tar") == []
