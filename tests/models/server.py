"""A stand-in for a model server of the KServe v2 protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

FP32 = {"name": "x", "datatype": "FP32", "shape": [-1, 3, 4, 4]}


class Server:
    """A stand-in for a model server whose model is the mean of each channel."""

    def __init__(self) -> None:
        self.model = {
            "name": "net",
            "versions": ["1"],
            "inputs": [FP32],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        }
        self.failures: list[int] = []  # statuses of the next answers
        self.answer = None  # in place of the right one
        self.requests: list[dict] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(outer.model)

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, **asked})
                self.reply(outer.infer(asked) if outer.answer is None else outer.answer)

            def reply(self, value):
                status = outer.failures.pop(0) if outer.failures else 200
                text = json.dumps(value if status == 200 else {"error": f"no\nluck {status}"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v2/models/net"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def logits(self, images):
        return images.mean(dim=(2, 3))

    def infer(self, asked):
        (one,) = asked["inputs"]
        images = torch.tensor(one["data"]).reshape(one["shape"])
        logits = self.logits(images)
        return output(list(logits.shape), logits.flatten().tolist())

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def output(shape, data, datatype="FP32", name="y"):
    return {"outputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}]}
