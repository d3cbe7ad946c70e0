"""Where a cluster's head is: what is none is told within seconds, before anything is trained."""

import signal
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from pcdistill.cli import main
from pcdistill.errors import InputError

ray = pytest.importorskip("ray")

from pcdistill.commands import cluster_head as module  # noqa: E402

SETTINGS = b"\0\0\0\4\0\0\0\0\0"


@contextmanager
def listening(answer: bytes):
    """HOST:PORT where something says these bytes to whoever comes, and then no more."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError), server.accept()[0] as one:  # it may go without listening to the end
                one.recv(4096)
                one.sendall(answer)
                while one.recv(4096):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """A machine that belongs to no cluster, whatever else goes on here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr(module, "_as_ray_finds", lambda address: None if address == "auto" else address)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.3)


@pytest.mark.parametrize(
    "address", ["nowhere", "ray://127.0.0.1:1", "", ":", "a:", ":1", "a:b", "local", "a:123456", "http://a:1"]
)
@pytest.mark.parametrize("named", [True, False])
def test_what_is_no_address_is_refused(address, named, monkeypatch):
    if named and address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        address = "auto"
    said = "auto (RAY_ADDRESS is" if address == "auto" else "must be auto or HOST:PORT"
    with pytest.raises(InputError, match="must be auto or HOST:PORT") as found:
        module.find_head(address)
    assert said in str(found.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "nohost.invalid:1", "[::1]:1", "x" * 80 + ":1"])
def test_where_nothing_listens_is_told(address, monkeypatch):
    with pytest.raises(InputError, match="nothing answers there .*`ray status` .* names its head"):
        module.find_head(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match=r"--cluster auto \(RAY_ADDRESS is .*nothing answers there"):
        module.find_head("auto")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "nothing answers there (timed out)"),
        (b"\0\0\0", "nothing answers there (timed out)"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "no head of a Ray cluster"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no head of a Ray cluster"),
        (b"\0" * 30, "no head of a Ray cluster"),
    ],
)
def test_what_listens_and_is_no_head_is_told_within_seconds(answer, said):
    begun = time.monotonic()
    with listening(answer) as address, pytest.raises(InputError) as found:
        module.find_head(address)
    assert said in str(found.value)
    assert time.monotonic() - begun < 5


def test_a_server_of_grpc_passes_and_one_behind_tls_is_left_to_ray(monkeypatch):
    with listening(SETTINGS + b"more") as address:
        assert module.find_head(address) == address
    monkeypatch.setenv("RAY_USE_TLS", "1")
    with listening(b"") as address:
        assert module.find_head(address) == address


def test_a_machine_without_a_cluster_is_told_so(monkeypatch):
    for named in (None, "", "auto"):
        if named is not None:
            monkeypatch.setenv("RAY_ADDRESS", named)
        with pytest.raises(InputError, match="belongs to no Ray cluster; start one with `ray start --head`"):
            module.find_head("auto")


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_a_command_ends_before_its_teacher_is_trained(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "digits", "--methods", "kd", "--cluster", "auto", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_ray_itself_waits_for_ends_with_a_sentence(monkeypatch):
    """A server of gRPC that is no head, or a head that takes nobody in."""
    monkeypatch.setattr(module, "JOIN_SECONDS", 0.2)
    monkeypatch.setattr(module, "find_head", lambda address: address)
    monkeypatch.setattr(ray, "init", lambda *_, **__: time.sleep(30))
    old = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)]
    with pytest.raises(InputError, match=r"takes this process in \(no answer within 0.2 s\)"), module.joined("a:1"):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGTERM)] == old
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_other_versions_are_named_in_one_line():
    text = "Version mismatch: The cluster has:\n    Ray: 2.44.0\n    Python: 3.11.2\nThis process:\n Ray: 2.60.0"
    found = module._why(RuntimeError(text))
    assert "Ray: 2.44.0 Python: 3.11.2 This process: Ray: 2.60.0" in found
    assert "\n" not in found
    assert "install the same Ray" in found
