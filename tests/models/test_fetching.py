"""Without a network: files that are here are used, others give one sentence with what can be done."""

import pytest

from pcdistill import models
from pcdistill.errors import NotFetched
from pcdistill.models import fetching

hub = pytest.importorskip("huggingface_hub.constants")


@pytest.fixture(autouse=True)
def forgotten():
    fetching.answers.cache_clear()
    yield
    fetching.answers.cache_clear()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")  # where nothing answers
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)


def test_the_hubs_client_is_offline_within_the_block_alone(offline):
    assert not hub.HF_HUB_OFFLINE
    with fetching.within_reach():
        assert hub.HF_HUB_OFFLINE
    assert not hub.HF_HUB_OFFLINE


def test_a_model_that_is_nowhere_is_one_sentence_without_a_try(offline, capfd):
    with pytest.raises(NotFetched) as caught:
        models.build_model("timm/resnet10t", num_classes=None, pretrained=True)
    assert str(caught.value).startswith('the files of "timm/resnet10t" are not on this machine, and 127.0.0.1:9 cannot')
    assert "Retry" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("role", "flags"),
    [
        ("teacher", "--teacher-pretrained False --teacher-epochs N"),
        ("student", "--student-pretrained False"),
        ("model", "(--weights FILE)"),
    ],
)
def test_the_sentence_says_what_can_be_done(role, flags):
    with pytest.raises(NotFetched) as caught, fetching.advising(role):
        raise NotFetched("no files")
    assert flags in str(caught.value)
    assert str(caught.value).startswith("no files; give ")


def test_an_error_that_is_no_silence_is_not_called_so():
    assert fetching.out_of_reach(OSError("absent is not a local folder")) is None
