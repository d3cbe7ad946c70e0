"""CIFAR's archives: fetched with a checksum, installed whole or not at all, read without running a pickle."""

import functools
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest

from pcdistill.data import download
from pcdistill.data.download import CIFAR, fetch, mirror_urls, read_cifar
from pcdistill.errors import InputError, PcdistillError

CONTENT = b"some bytes" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def batch_file(labels, key=b"fine_labels", size=3072):
    """A pickle as the original files hold it, of images whose pixels tell their number."""
    data = np.arange(len(labels), dtype=np.uint8)[:, None].repeat(size, 1)
    return pickle.dumps({b"data": data, key: labels, b"filenames": [b"x.png"]}, protocol=2)


def cifar100_files(train=6, test=3):
    return {
        "meta": pickle.dumps({b"fine_label_names": [f"class {i}".encode() for i in range(100)]}, protocol=2),
        "train": batch_file([i % 100 for i in range(train)]),
        "test": batch_file([99 - i for i in range(test)]),
    }


def lay_out(root, files, folder="cifar-100-python"):
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root


def archive(files, folder="cifar-100-python"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def server(tmp_path):
    """A web server of a folder on this machine: (folder, URL)."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


class TestFetch:
    def test_takes_the_first_url_with_the_right_checksum(self, server, tmp_path):
        folder, url = server
        (folder / "wrong").write_bytes(CONTENT[:-1])
        (folder / "right").write_bytes(CONTENT)
        path = tmp_path / "deep" / "file"
        fetch([f"{url}/missing", f"{url}/wrong", f"{url}/right"], path, SHA256)
        assert path.read_bytes() == CONTENT
        assert [found.name for found in path.parent.iterdir()] == ["file"]

    def test_leaves_nothing_and_says_why_when_no_url_has_it(self, server, tmp_path):
        folder, url = server
        (folder / "wrong").write_bytes(b"")
        with pytest.raises(PcdistillError) as failure:
            fetch([f"{url}/missing", f"{url}/wrong", "http://127.0.0.1:1/x"], tmp_path / "new" / "file", SHA256)
        message = str(failure.value)
        assert "missing: HTTP Error 404" in message
        assert "wrong: wrong checksum" in message
        assert "refused" in message
        assert "PCDISTILL_MIRRORS" in message
        assert not list((tmp_path / "new").iterdir())

    def test_does_not_touch_a_good_file_when_it_fails(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with pytest.raises(PcdistillError):
            fetch([(tmp_path / "none").as_uri()], path, SHA256)
        assert path.read_bytes() == b"old"

    def test_mirrors_of_the_user_come_first(self, monkeypatch):
        monkeypatch.setenv("PCDISTILL_MIRRORS", "http://a/x/, http://b")
        assert mirror_urls("c.tar.gz")[:2] == ["http://a/x/c.tar.gz", "http://b/c.tar.gz"]
        assert len(mirror_urls("c.tar.gz")) == 2 + len(download.SOURCES)


class TestDownload:
    @pytest.fixture
    def mirror(self, server, monkeypatch):
        """The server as the only source, with an archive of a few images, whose checksum is the expected one."""
        folder, url = server
        content = archive(cifar100_files())
        (folder / "cifar-100-python.tar.gz").write_bytes(content)
        small = replace(CIFAR["cifar100"], sha256=hashlib.sha256(content).hexdigest())
        monkeypatch.setitem(CIFAR, "cifar100", small)
        monkeypatch.setattr(download, "SOURCES", ())
        monkeypatch.setenv("PCDISTILL_MIRRORS", url)
        return folder

    def test_installs_torchvisions_layout_once(self, mirror, tmp_path):
        root = tmp_path / "data"
        first = read_cifar("cifar100", root, download=True)
        assert (root / "cifar-100-python" / "train").is_file()
        (mirror / "cifar-100-python.tar.gz").unlink()
        second = read_cifar("cifar100", root, download=True)
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.filterwarnings("ignore:Python 3.14:DeprecationWarning")
    def test_installs_with_the_first_releases_of_python_3_11(self, mirror, tmp_path, monkeypatch):
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
        plain = tarfile.TarFile.extractall
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda self, path: plain(self, path))  # it knew no filter
        read_cifar("cifar100", tmp_path / "data", download=True)
        assert (tmp_path / "data" / "cifar-100-python" / "train").is_file()

    def test_processes_that_start_together_all_find_it(self, mirror, tmp_path):
        found, root = [], tmp_path / "data"
        threads = [
            threading.Thread(target=lambda: found.append(read_cifar("cifar100", root, download=True))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4

    def test_a_wrong_archive_is_not_installed(self, mirror, tmp_path):
        (mirror / "cifar-100-python.tar.gz").write_bytes(archive(cifar100_files(train=7)))
        root = tmp_path / "data"
        with pytest.raises(PcdistillError, match="wrong checksum"):
            read_cifar("cifar100", root, download=True)
        assert not (root / "cifar-100-python").exists()

    def test_an_archive_that_was_put_there_by_hand_is_used(self, mirror, tmp_path):
        root = tmp_path / "data"
        root.mkdir()
        (mirror / "cifar-100-python.tar.gz").rename(root / "cifar-100-python.tar.gz")
        assert len(read_cifar("cifar100", root, download=True)[1]) == 6

    def test_nothing_is_fetched_unasked(self, mirror, tmp_path):
        with pytest.raises(InputError, match=r"cifar100 is not in .*no folder cifar-100-python.*allow the download"):
            read_cifar("cifar100", tmp_path / "data")


class TestRead:
    def test_cifar100(self, tmp_path):
        classes, x_train, y_train, x_test, y_test = read_cifar("cifar100", lay_out(tmp_path, cifar100_files()))
        assert classes[:2] == ["class 0", "class 1"]
        assert len(classes) == 100
        assert x_train.shape == (6, 3, 32, 32)
        assert x_train.dtype == np.uint8
        assert (x_train[4] == 4).all()
        assert y_train.tolist() == [0, 1, 2, 3, 4, 5]
        assert (x_test.shape[0], y_test.tolist()) == (3, [99, 98, 97])

    def test_cifar10_joins_its_five_files_in_order(self, tmp_path):
        files = {f"data_batch_{i}": batch_file([i] * i, b"labels") for i in range(1, 6)}
        files["test_batch"] = batch_file([0], b"labels")
        files["batches.meta"] = pickle.dumps({"label_names": list("abcdefghij")})
        root = lay_out(tmp_path, files, "cifar-10-batches-py")
        classes, _, y_train, _, _ = read_cifar("cifar10", root)
        assert "".join(classes) == "abcdefghij"
        assert y_train.tolist() == [1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5]

    def test_the_original_files_text_keys_and_layout_are_those_of_torchvision(self):
        from torchvision.datasets import CIFAR10, CIFAR100

        for name, kind in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
            ours = CIFAR[name]
            assert ours.folder == kind.base_folder
            assert ours.archive == kind.filename
            assert [*ours.train, ours.test] == [file for file, _ in kind.train_list + kind.test_list]
            assert (ours.meta, ours.classes.decode()) == (kind.meta["filename"], kind.meta["key"])

    @pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path, protocol):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        files = cifar100_files()
        files["train"] = pickle.dumps({b"data": Evil(), b"fine_labels": [0]}, protocol=protocol)
        with pytest.raises(InputError, match=r"train cannot be read: it holds \w+\.open, which is not data"):
            read_cifar("cifar100", lay_out(tmp_path, files))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("train", None, r"train is missing; delete the folder cifar-100-python"),
            ("train", b"", "train cannot be read"),
            ("train", batch_file([1, 2])[:-100], "train cannot be read"),
            ("train", batch_file([1, 100]), "train does not hold images of 32 x 32 with labels below 100"),
            ("train", batch_file([1, 2], size=30), "train does not hold images of 32 x 32"),
            ("test", batch_file([1, 2], key=b"labels"), "test has no fine_labels"),
            ("meta", pickle.dumps([1]), "meta cannot be read"),
        ],
    )
    def test_a_damaged_file_is_named(self, tmp_path, name, content, message):
        files = cifar100_files()
        files[name] = content
        root = lay_out(tmp_path, {key: value for key, value in files.items() if value is not None})
        with pytest.raises(InputError, match=message):
            read_cifar("cifar100", root)
