"""A teacher behind the KServe v2 protocol: right answers pass, failures are tried again, wrong ones named."""

import pytest
import torch

from pcdistill.distillation.cache_store import fingerprint
from pcdistill.distillation.teacher import Teacher
from pcdistill.errors import InputError, PcdistillError
from pcdistill.models import served
from pcdistill.models.served import ServedModel
from tests.models.server import FP32, Server, output


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(served, "PAUSE", 0.001)
    found = Server()
    yield found
    found.close()


def test_images_arrive_to_the_bit_and_logits_come_back(server):
    images = torch.randn(5, 3, 4, 4)
    assert torch.equal(ServedModel(server.url, 3, {})(images), images.mean(dim=(2, 3)))
    (request,) = server.requests
    assert request["path"].endswith("/v2/models/net/infer")
    assert request["inputs"][0]["name"] == "x"
    assert request["outputs"] == [{"name": "y"}]


def test_nested_data_pass_too(server):
    model = ServedModel(server.url, 3, {})
    server.answer = output([2, 3], [[1.0, 2, 3], [4, 5, 6]], "FP16")
    assert model(torch.zeros(2, 3, 4, 4)).tolist() == [[1.0, 2, 3], [4, 5, 6]]


def test_what_passes_by_itself_is_tried_again(server):
    model = ServedModel(server.url, 3, {})
    server.failures = [503, 500, 429]
    assert model(torch.zeros(1, 3, 4, 4)).tolist() == [[0.0] * 3]
    assert len(server.requests) == 4
    server.failures = [503] * 4
    with pytest.raises(PcdistillError, match="failed 4 times: HTTP status 503 no luck 503"):
        model(torch.zeros(1, 3, 4, 4))


def test_a_refusal_is_told_at_once_in_the_servers_words(server):
    model = ServedModel(server.url, 3, {})
    server.failures = [400]
    with pytest.raises(PcdistillError, match="refuses: HTTP status 400 no luck 400"):
        model(torch.zeros(1, 3, 4, 4))
    assert len(server.requests) == 1


def test_a_server_that_is_not_there_is_named(server):
    url = server.url.replace(str(server.http.server_port), "1")
    with pytest.raises(PcdistillError, match=r"endpoint http://127.0.0.1:1/v2/models/net failed 4 times: .*refused"):
        ServedModel(url, 3, {})


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (output([2, 4], [0.0] * 8), r"gave the shape \[2, 4\], not logits \[2, 3\]"),
        (output([6], [0.0] * 6), r"gave the shape \[6\]"),
        (output([2, 3], [0] * 6, "INT64"), "gave logits as INT64"),
        (output([2, 3], [0.0] * 5), r"not numbers of its shape \[2, 3\]"),
        (output([2, 3], ["a"] * 6), "not numbers of its shape"),
        (output([2, 3], None), "not numbers of its shape"),
        (output("ab", [0.0] * 6), "not numbers of its shape"),
        (output([2, 3], [float("nan")] * 6), "NaN or infinite logits"),
        (output([2, 3], [0.0] * 6, name="z"), 'does not hold the output "y" once'),
        ([1], "gave no JSON object"),
        ({}, 'does not hold the output "y" once'),
    ],
)
def test_a_wrong_answer_is_named(server, answer, sentence):
    model = ServedModel(server.url, 3, {})
    server.answer = answer
    with pytest.raises(InputError, match=sentence):
        model(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        ({}, {"inputs": "x"}, 'no option "inputs"; did you mean "input"'),
        ({}, {"timeout": 0}, "timeout must be seconds above 0, got 0"),
        ({}, {"input": "z"}, "has no input 'z'; it has x"),
        ({"inputs": [FP32, {**FP32, "name": "mask"}]}, {}, "has the inputs x, mask; name one"),
        ({"outputs": []}, {}, "has the outputs none; name one"),
        ({"inputs": [{**FP32, "datatype": "UINT8"}]}, {}, "reads images as UINT8"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_it_is_asked(server, change, options, sentence):
    server.model.update(change)
    with pytest.raises(InputError, match=sentence):
        ServedModel(server.url, 3, options)
    assert server.requests == []


def test_the_fingerprint_is_of_what_the_server_says_of_the_model(server):
    def found(url=server.url):
        return fingerprint(Teacher(ServedModel(url, 3, {})))

    first = found()
    assert found(server.url.replace("127.0.0.1", "localhost")) == first
    pinned = found(server.url + "/versions/1")
    server.model["versions"] = ["1", "2"]
    assert found() != first
    assert found(server.url + "/versions/1") == pinned
