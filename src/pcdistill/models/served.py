"""A teacher behind an HTTP endpoint of the KServe v2 inference protocol, as Triton, KServe and MLServer have it.

Source: https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

import torch
from torch import Tensor

from pcdistill.errors import InputError, PcdistillError, first_line, nearest
from pcdistill.models.outside import OutsideModel

TRIES = 4
PAUSE = 0.5  # seconds before the second try; each further pause is twice as long
TIMEOUT = 60.0  # seconds that a try may take
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may find gone
FLOATS = {
    "FP16": torch.float32,  # in JSON they are decimal numbers: float32 holds each exactly
    "BF16": torch.float32,
    "FP32": torch.float32,
    "FP64": torch.float64,
}


class ServedModel(OutsideModel):
    """The logits that a model server gives.

    Its identity is what the server says of the model: name, versions, inputs and outputs. The host is not in it, and
    neither are the weights: another model under the same name and version passes for the same.

    Args:
        url: `http://HOST/v2/models/NAME`, or with `/versions/VERSION` behind it.
        num_classes: K.
        options: `input` and `output`, the names of the tensors where the model has several; `timeout` in seconds.

    Raises:
        InputError: an unknown option, or a model that does not read images or give logits.
        PcdistillError: the server cannot be reached.
    """

    def __init__(self, url: str, num_classes: int, options: Mapping[str, Any]) -> None:
        known = ("input", "output", "timeout")
        for key in options:
            if key not in known:
                raise InputError(
                    f'teacher.kwargs: an endpoint has no option "{key}"{nearest(key, known)}; it has {", ".join(known)}'
                )
        self.url = url.rstrip("/")
        timeout = options.get("timeout", TIMEOUT)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise InputError(f"teacher.kwargs.timeout must be seconds above 0, got {timeout!r}")
        self.timeout = float(timeout)
        said = _exchange(self.url, None, self.timeout)
        self.input = _chosen(said, "input", options, self.url)
        self.output = _chosen(said, "output", options, self.url)
        pinned = "/versions/" in self.url
        told = {key: said.get(key) for key in ("name", "inputs", "outputs", *(() if pinned else ("versions",)))}
        told["asked"] = [self.input["name"], self.output["name"], self.url.rpartition("/versions/")[2] * pinned]
        super().__init__(url, num_classes, json.dumps(told, sort_keys=True).encode())

    def ask(self, images: Tensor) -> Tensor:
        """One request for all images, in JSON.

        Raises:
            InputError: an answer that is not of the protocol.
            PcdistillError: the server fails or cannot be reached, after some tries.
        """
        tensor = {
            "name": self.input["name"],
            "shape": list(images.shape),
            "datatype": self.input["datatype"],
            "data": images.flatten().tolist(),
        }
        asked = {"inputs": [tensor], "outputs": [{"name": self.output["name"]}]}
        answer = _exchange(f"{self.url}/infer", json.dumps(asked).encode(), self.timeout)
        outputs = [one for one in _tensors(answer, "outputs") if one.get("name") == self.output["name"]]
        if len(outputs) != 1:
            raise InputError(f'the answer of {self.url} does not hold the output "{self.output["name"]}" once')
        return self._tensor(outputs[0])

    def _tensor(self, output: Mapping[str, Any]) -> Tensor:
        datatype, shape = output.get("datatype"), output.get("shape")
        if datatype not in FLOATS:
            raise InputError(f"{self.url} gave logits as {datatype}; they must be one of {', '.join(FLOATS)}")
        try:
            values = torch.tensor(output["data"], dtype=FLOATS[datatype])
            return values.reshape([int(side) for side in shape or ()])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{self.url} gave an output whose data are not numbers of its shape {shape}: {first_line(error)}"
            ) from error


def _tensors(said: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """The entries of "inputs" or "outputs" that are mappings."""
    found = said.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _chosen(said: Mapping[str, Any], what: str, options: Mapping[str, Any], url: str) -> dict[str, Any]:
    """The input or the output to use: the one that the options name, or the only one."""
    found = {str(one.get("name")): one for one in _tensors(said, f"{what}s")}
    names = ", ".join(found) or "none"
    wanted = options.get(what)
    if wanted is None and len(found) != 1:
        raise InputError(f"{url} has the {what}s {names}; name one in teacher.kwargs.{what}")
    if wanted is not None and wanted not in found:
        raise InputError(f"teacher.kwargs.{what}: {url} has no {what} {wanted!r}; it has {names}")
    chosen = found[wanted] if wanted is not None else next(iter(found.values()))
    if chosen.get("datatype") not in FLOATS:
        verb = "reads images" if what == "input" else "gives logits"
        raise InputError(f"{url} {verb} as {chosen.get('datatype')}; it must be one of {', '.join(FLOATS)}")
    return chosen


def _exchange(url: str, body: bytes | None, timeout: float) -> dict[str, Any]:
    """A JSON object from a server; what may pass by itself is tried again, after pauses that grow.

    Raises:
        PcdistillError: the server refuses, fails or cannot be reached.
        InputError: what comes is no JSON object.
    """
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    said = ""
    for number in range(TRIES):
        if number:
            time.sleep(PAUSE * 2 ** (number - 1))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:  # the scheme is checked
                return _parsed(answer.read(), url)
        except urllib.error.HTTPError as error:
            said = f"HTTP status {error.code} {_reason(error)}".strip()
            if error.code not in PASSING:
                raise PcdistillError(f"the teacher's endpoint {url} refuses: {said}") from error
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            said = first_line(getattr(error, "reason", None) or error)
    raise PcdistillError(f"the teacher's endpoint {url} failed {TRIES} times: {said}")


def _parsed(text: bytes, url: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{url} gave no JSON object, but {text[:40]!r}; it must speak the KServe v2 protocol")
    return found


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words: the protocol's "error", or the status's name."""
    try:
        said = json.loads(error.read(10_000))
    except (OSError, ValueError, HTTPException):
        said = None
    found = said.get("error") if isinstance(said, dict) else None
    return " ".join(str(found or error.reason).split())[:200]
