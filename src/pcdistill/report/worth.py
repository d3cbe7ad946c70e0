"""What a run was worth: whether the teacher helped, and what student and teacher cost."""

from pathlib import Path
from typing import Any

from pcdistill.report._folder import Run, name_of, read_run, trained_alone
from pcdistill.report._format import MISSING, SPLITS, count, number, short_metric, shown
from pcdistill.report.answers import paired, read_answers
from pcdistill.report.rows import value_at
from pcdistill.report.speed import read_speed

BASELINE_FOLDER = "alone"  # in a run's folder: the same student without a teacher (--baseline)
WEIGHTS = ("student.safetensors", "teacher.safetensors")
FIRST_WORDS = {
    "better": "The teacher helped, on these images: ",
    "worse": "The teacher did harm, on these images: ",
    "alike": "Whether the teacher helped cannot be told: ",
}


def baseline_of(run: Run) -> Run | None:
    """The same student trained alone, beside the run; None where that was not asked for, or is not done."""
    if trained_alone(run) or not (run.path / BASELINE_FOLDER / "result.json").is_file():
        return None
    found = read_run(run.path / BASELINE_FOLDER)
    return found if found.result.get("status") == "done" else None


def verdict_of_run(run: Run, alone: Run | None, metric: str) -> list[str]:
    """Sentences, the answer first; none for a run without a result."""
    if run.result.get("status") != "done":
        return []
    split, value = reached(run, metric)
    if value is None:
        return []
    what = f"{SPLITS[split]} {short_metric(metric)}"
    if trained_alone(run):
        return [f"Trained without a teacher, the student reaches {shown(value, metric)} % {what}."]
    if alone is not None and (other := reached(alone, metric, split)[1]) is not None:
        return _against(run, alone, what, value - other, (shown(value, metric), shown(other, metric)))
    said = f"The student reaches {shown(value, metric)} % {what}"
    of_teacher = number(_dict(_dict(run.result.get("teacher")).get(split)).get(metric))
    if of_teacher is not None:
        gap = value - of_teacher
        side = "above" if gap > 0 else "below"
        said += f", {abs(gap):.2f} points {side} its teacher" if abs(gap) >= 0.005 else ", as its teacher does"
    if (share := _share(run, "parameters")) is not None:
        said += f", with {share} of its parameters"
    return [f"{said}.", _how_to_ask(run)]


def header_of(run: Run, alone: Run | None, metric: str) -> list[tuple[str, str, str]]:
    """The figures that a reader came for: name, value, what it is."""
    split, value = reached(run, metric)
    where = f"{SPLITS[split]} {short_metric(metric)}"
    items = []
    if value is not None:
        items.append(("student", f"{shown(value, metric)} %", f"{where}, {_kept(run)} epoch"))
    if alone is not None and (other := reached(alone, metric, split)[1]) is not None:
        gap = "" if value is None else f"; with the teacher {_signed(value - other)}"
        items.append(("student alone", f"{shown(other, metric)} %", where + gap))
    of_teacher = number(_dict(_dict(run.result.get("teacher")).get(split)).get(metric))
    if of_teacher is not None and not trained_alone(run):
        gap = "" if value is None else f"; student {_signed(value - of_teacher)}"
        items.append(("teacher", f"{shown(of_teacher, metric)} %", where + gap))
    if (share := _share(run, "parameters")) is not None:
        items.append(("student's size", share, "of the teacher's parameters"))
    return items


def cost_cells(run: Run) -> list[list[str]]:
    """Head and lines: parameters, MACs, file and latency of student and teacher; [] where nothing is known."""
    models = {"student": _dict(run.result.get("student"))}
    if not trained_alone(run):
        models["teacher"] = _dict(run.result.get("teacher"))
    lines: list[tuple[str, dict[str, float | None], Any]] = [
        ("parameters", {who: number(model.get("parameters")) for who, model in models.items()}, count),
        ("MACs of an image", {who: number(model.get("macs")) for who, model in models.items()}, count),
        ("weights file", {who: _file_size(run, who, model) for who, model in models.items()}, _size),
        ("latency of an image (ms)", {who: _latency(run, who) for who in models}, _milliseconds),
    ]
    known = [(name, values, text) for name, values, text in lines if any(values.values())]
    if not known:
        return []
    head = ["", *(f"{who} {name_of(run, who) or ''}".strip() for who in models)]
    rows = []
    for name, values, text in known:
        cells = [name, *(MISSING if values[who] is None else text(values[who]) for who in models)]
        if len(models) > 1:
            cells.append(ratio(values["student"], values["teacher"]) or MISSING)
        rows.append(cells)
    return [[*head, *(["student / teacher"] if len(models) > 1 else [])], *rows]


def cost_notes(run: Run) -> list[str]:
    """What the cost is of, and how to have what is missing."""
    notes = []
    if not trained_alone(run) and _weights_of_teacher(run) is None:
        notes.append("The teacher's file is not in this folder: its size is that of its parameters in float32.")
    if _latency(run, "student") is None:
        notes.append("Latency is not measured yet: pcdistill bench RUN does it, with this folder as RUN.")
    else:
        notes.append("Latency is the eager model's median; the table of speeds below has the rest.")
    return notes


def reached(run: Run, metric: str, split: str | None = None) -> tuple[str, float | None]:
    """The kept epoch's value and its split: the test set where there is one."""
    split = split or ("test" if value_at(run.result, _kept(run), "test", metric) is not None else "val")
    return split, value_at(run.result, _kept(run), split, metric)


def ratio(part: float | None, whole: float | None) -> str | None:
    """ "1/28" or "0.64" of two costs."""
    if not part or not whole:
        return None
    share = part / whole
    return f"1/{1 / share:.3g}" if share <= 0.5 else f"{share:.2f}"


def _against(run: Run, alone: Run, what: str, gap: float, values: tuple[str, str]) -> list[str]:
    """With and without the teacher, and what one seed each allows to say."""
    mine, other = read_answers(run.path), read_answers(alone.path)
    kind, text = paired(mine, other) if mine is not None and other is not None else ("", "")
    with_it, without = values
    said = f"with it the student has {with_it} % {what}, trained alone {without} %: {_signed(gap)} points."
    first = FIRST_WORDS.get(kind, "")
    method = str(run.result.get("method") or "")
    more = (
        "These are one seed each, and another seed may turn a small difference around. To test it over seeds: "
        f"pcdistill compare --methods {','.join(dict.fromkeys(['none', 'kd', method]))} --seeds 5, with the options of "
        "this run."
    )
    return [(first + said) if first else said[0].upper() + said[1:], *([text] if text else []), more]


def _how_to_ask(run: Run) -> str:
    command = str(run.environment.get("command") or "")
    if command.startswith("pcdistill compare") or command.startswith("pcdistill demo"):
        return "Whether the teacher helped says the page of the comparison that this run is part of."
    asked = f"{command} --baseline" if command.startswith("pcdistill distill") else "pcdistill distill ... --baseline"
    return f"Whether the teacher helped, only the same student trained alone can say. Ask for it: {asked}"


def _share(run: Run, key: str) -> str | None:
    if trained_alone(run):
        return None
    return ratio(*(number(_dict(run.result.get(who)).get(key)) for who in ("student", "teacher")))


def _latency(run: Run, who: str) -> float | None:
    """Median of the eager model at batch 1, of bench.json."""
    rows = (read_speed(run.path) or {}).get("rows", [])
    found = [row for row in rows if isinstance(row, dict) and (row.get("who"), row.get("program")) == (who, "eager")]
    return number(found[0].get("p50_ms")) if found else None


def _file_size(run: Run, who: str, model: dict[str, Any]) -> float | None:
    path = run.path / WEIGHTS[0] if who == "student" else _weights_of_teacher(run)
    if path is not None and path.is_file():
        return float(path.stat().st_size)
    parameters = number(model.get("parameters"))
    return None if parameters is None else 4 * parameters


def _weights_of_teacher(run: Run) -> Path | None:
    """The file of a teacher that was trained in the run's folder."""
    found = (run.path / "teacher" / name for name in WEIGHTS)
    return next((path for path in found if path.is_file()), None)


def _size(value: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g}\u00a0{unit}"
    return f"{value:.0f}\u00a0B"


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\u2212") if abs(value) >= 0.005 else "0.00"


def _kept(run: Run) -> str:
    return str(run.result.get("kept") or "best")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
