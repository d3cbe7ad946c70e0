"""Results, curves and folders of runs as commands leave them, and a page taken apart."""

import csv
import json
from html.parser import HTMLParser

import numpy as np
import yaml

EVIL = "<script>alert('$x^{2}$')</script>&\"|"


VOID = {"meta", "img", "br", "link", "input", "hr"}


def scores(top1, top5=99.0, loss=0.25):
    return {"top1": top1, "top5": top5, "loss": loss}


def make_result(method="pcd", seed=0, best=91.0, last=90.5, **changes):
    teacher = {"name": "cifar/resnet20", "parameters": 272_474, "macs": 40_800_000}
    result = {
        "status": "done",
        "task": "classification",
        "method": method,
        "seed": seed,
        "data": "digits",
        "metric": "top1",
        "teacher": None if method == "none" else {**teacher, "val": scores(97.0), "test": scores(96.5)},
        "student": {"name": "cifar/resnet8", "parameters": 78_042, "macs": 12_100_000},
        "best": {"epoch": 3, "val": scores(best + 1), "test": scores(best)},
        "last": {"epoch": 4, "val": scores(last + 1), "test": scores(last)},
        "kept": "best",
        "epochs": 4,
        "seconds": 12.5,
        "images_per_second": 800.0,
        "notes": [],
    }
    return {**result, **changes}


def stopped(method="pcd", seed=0):
    notes = ["the loss is not finite in epoch 2"]
    return make_result(method, seed, status="stopped", notes=notes) | {"best": None, "last": None}


def make_rows(epochs=4, shift=0.0):
    return [
        {
            "epoch": e,
            "lr": 0.1 / e,
            "train/ce": 2.0 / e,
            "train/pcd": 500.0 / e**4,
            "train/loss": 2.0 / e + 500.0 / e**4,
            "train/top1": 60.0 + 8 * e,
            "val/loss": 1.0 / e,
            "val/top1": 58.0 + 8 * e + shift,
            "seconds": 1.5,
            "images_per_second": 800.0,
        }
        for e in range(1, epochs + 1)
    ]


def make_run(path, result=None, rows=None, recipe=None, environment=None):
    """A run's folder; a part that is False is left out."""
    path.mkdir(parents=True, exist_ok=True)
    defaults = {
        "result": make_result(),
        "recipe": {"task": "classification", "method": "pcd", "data": {"name": "digits"}, "train": {"epochs": 4}},
        "environment": {"command": "pcdistill distill --data digits", "commit": "abc1234", "versions": {"torch": "2"}},
        "rows": make_rows(),
    }
    given = {"result": result, "recipe": recipe, "environment": environment, "rows": rows}
    parts = {key: defaults[key] if value is None else value for key, value in given.items()}
    if parts["result"] is not False:
        (path / "result.json").write_text(json.dumps(parts["result"]))
    if parts["environment"] is not False:
        (path / "environment.json").write_text(json.dumps(parts["environment"]))
    if parts["recipe"] is not False:
        (path / "recipe.yaml").write_text(yaml.safe_dump(parts["recipe"]))
    if parts["rows"] is not False:
        with open(path / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in parts["rows"] for key in row)))
            writer.writeheader()
            writer.writerows(parts["rows"])
    return path


class Page(HTMLParser):
    """Checks that tags are balanced and collects text, ids and addresses."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "data"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text
    assert all(address.startswith(("#", "data:image/")) for address in page.addresses)
    assert len(page.ids) == len(set(page.ids))
    return page


def make_comparison():
    """Four methods, three seeds, one stopped run."""
    best = {"none": [88.0, 88.5, 88.2], "kd": [90.0, 90.4, 90.1], "pcd": [91.0, 91.1, 91.5], "dkd": [90.5, 90.2]}
    results = [make_result(m, s, v, v - 0.5 - 0.1 * s) for m, values in best.items() for s, v in enumerate(values)]
    return [*results, stopped("dkd", 2)]


def curves_of(results):
    return {(r["method"], r["seed"]): make_rows(2 if r["status"] != "done" else 4, r["seed"]) for r in results}


SHORT = {"kd": [90.0, 90.4, 90.1], "pcd": [92.0, 92.3, 92.2], "near": [90.02, 90.38, 90.11], "wide": [95.0, 60.0, 99.0]}


def make_short(methods=SHORT):
    return [make_result(m, s, v, v) for m, values in methods.items() for s, v in enumerate(values)]


CLASSES = ["cat", "dog", "very-long-class-name_with no break", "<b>&"]


def make_answers(path, n=40, *, classes=CLASSES, teacher=True, seed=0, side=96):
    """answers.npz of n images: the student errs on a fifth of them, the teacher on a tenth."""
    rng = np.random.default_rng(seed)
    k = len(classes)
    target = np.arange(n) % k
    arrays = {"target": target, "classes": np.array(classes), "split": np.array("test")}
    for who, wrong in (("student", 5), ("teacher", 10)):
        if who == "student" or teacher:
            arrays[who] = np.where(np.arange(n) % wrong == seed % wrong, (target + 1) % k, target)
            arrays[f"{who}_p"] = rng.uniform(0.5, 1, n).astype(np.float32)
    wrong = np.flatnonzero(arrays["student"] != target)[:3]
    arrays |= {"shown": wrong, "names": np.array([f"{classes[0]}/img {i}.png" for i in wrong])}
    arrays |= {f"thumb_{i}": rng.integers(0, 255, (side, side, 3), dtype=np.uint8) for i in range(len(wrong))}
    path.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path / "answers.npz", **arrays)
    return path


def make_samples(path, *, teacher=True, masks=True):
    rng = np.random.default_rng(0)
    arrays = {"classes": np.array(["cat", "dog", "a_b$c"]), "class_boxes": np.array([5, 3, 0])}
    for i, (height, width) in enumerate([(40, 60), (64, 48)]):
        arrays[f"image_{i}"] = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        found = {
            "truth": ([[5, 5, 30, 30]], [1], None),
            "teacher": ([[6, 6, 30, 30], [1, 1, 9, 9]], [1, 3], [0.9, 0.31]),
            "student": ([[6, 6, 30, 30], [1, 1, 9, 9]], [2, 1], [0.4, 0.2]),
        }
        for who, (boxes, labels, scores) in found.items():
            if who == "teacher" and not teacher:
                continue
            arrays[f"{who}_{i}_boxes"] = np.array(boxes, dtype=np.float32)
            arrays[f"{who}_{i}_labels"] = np.array(labels, dtype=np.float32)
            if scores is not None:
                arrays[f"{who}_{i}_scores"] = np.array(scores, dtype=np.float32)
        if masks:
            arrays[f"extent_{i}"] = np.array([64.0, 64.0])
            for stride in (8, 16):
                arrays[f"mask_{i}_{stride}"] = (rng.uniform(size=(64 // stride, 64 // stride)) < 0.5).astype(np.uint8)
                arrays[f"channels_{i}_{stride}"] = np.array([1, 0, 1, 1], dtype=np.uint8)
    path.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path / "samples.npz", **arrays)
    return path
