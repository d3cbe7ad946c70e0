"""What tune may try, and its trials: the same ones after a kill, poor ones given up; here with a made-up training."""

import csv
import json
import math
import os
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from optuna.trial import TrialState

from pcdistill.commands.jobs import Outcome
from pcdistill.commands.search import Search, Space, described, open_study
from pcdistill.engine.console import Console
from pcdistill.errors import InputError, PcdistillError
from pcdistill.recipe import load_recipe, make_recipe
from tests.faults import throw
from tests.faults.counts import share
from tests.faults.files import damaged, mutated

METHODS = ["kd", "dist", "wttm", "pcd", "ldrld"]
EPOCHS = 6  # rungs after 2 and 4
RECIPE = load_recipe("digits", values={"train.epochs": EPOCHS})


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test here outlives a failure of power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def make_search(out, *, methods=METHODS, trials=12, seconds=None, recipe=RECIPE, stream=None):
    space = Space(recipe, methods, 10)
    console = Console(quiet=stream is None, stream=stream)
    study = open_study(out, recipe, methods)
    return Search(study, space, recipe, out=out, metric="top1", trials=trials, seconds=seconds, console=console)


def score(recipe):
    """Made up: best at KD, strength 8 and a rate of 0.02."""
    far = abs(math.log(recipe.strength / 8)) + abs(math.log(recipe.optim.lr / 0.02)) + (recipe.method != "kd")
    return 90 - 10 * far


def rows_of(recipe):
    return [{"epoch": e, "val/top1": score(recipe) * e / EPOCHS} for e in range(1, EPOCHS + 1)]


def train(search, job, *, epochs=EPOCHS):
    """Up to so many epochs; the outcome, or None where that is not the end."""
    rows = rows_of(job.recipe)
    for row in rows[:epochs]:
        if not search.judge(job, row):
            return Outcome("abandoned")
    return Outcome("done", summary={"history": rows}) if epochs == EPOCHS else None


def play(search, *, number=None):
    """Carry out trials, all or so many; what they set, in order."""
    found = []
    for job in search.jobs():
        search.take(job, train(search, job))
        found.append(job.recipe)
        if len(found) == number:
            break
    return found


def test_a_method_begins_with_its_own_options_at_one_strength():
    space = Space(RECIPE, METHODS, 10)
    assert space.first("kd") == {"method": "kd", "strength": 4.0, "kd.temperature": 4.0, "rate": 0.05}
    assert space.first("pcd")["pcd.stages"] == 3
    assert space.first("wttm")["wttm.power"] == 0.2
    recipe = space.recipe({**space.first("pcd"), "pcd.stages": 2, "rate": 0.0123456}, RECIPE)
    assert recipe.optim.lr == 0.0123
    assert (recipe.method, recipe.strength) == ("pcd", 4.0)
    assert [term.options for term in recipe.losses] == [{}, {"temperature": 4.0, "stages": 2}]
    assert described(space.first("kd")) == "kd, strength 4, temperature 4, rate 0.05"


def test_a_method_that_stands_for_the_labels_has_no_strength():
    space = Space(RECIPE, ["none", "pld"], 10)
    assert space.first("none") == {"method": "none", "rate": 0.05}
    assert space.first("pld") == {"method": "pld", "rate": 0.05, "pld.temperature": 1.0}
    assert space.recipe(space.first("pld"), RECIPE).strength is None


def test_stages_are_as_many_as_the_classes_allow(tmp_path):
    assert Space(RECIPE, ["pcd"], 4).first("pcd")["pcd.stages"] == 2
    found = play(make_search(tmp_path, methods=["pcd"], trials=20))
    stages = {recipe.losses[1].options["stages"] for recipe in found}
    assert stages <= {1, 2, 3, 4, 5}
    assert len(stages) > 1


def test_settings_stay_in_their_bounds(tmp_path):
    found = play(make_search(tmp_path, trials=30))
    assert [recipe.method for recipe in found[:5]] == METHODS
    assert all(0.5 <= recipe.strength <= 32 for recipe in found)
    assert all(0.0125 <= recipe.optim.lr <= 0.2 for recipe in found)
    assert {make_recipe(recipe.to_dict()).digest() for recipe in found} == {recipe.digest() for recipe in found}


def test_one_seed_gives_the_same_trials_and_another_gives_others(tmp_path):
    found = play(make_search(tmp_path / "one"))
    assert play(make_search(tmp_path / "two")) == found
    other = replace(RECIPE, train=replace(RECIPE.train, seed=1))
    others = play(make_search(tmp_path / "three", recipe=other))
    assert [recipe.optim.lr for recipe in others[5:]] != [recipe.optim.lr for recipe in found[5:]]


def test_a_killed_search_goes_on_with_the_trial_under_way_and_finds_the_same(tmp_path):
    whole = make_search(tmp_path / "whole", trials=16)
    expected = play(whole)
    first = make_search(tmp_path / "killed", trials=16)
    play(first, number=12)
    job = next(first.jobs())
    assert train(first, job, epochs=1) is None  # and nobody hears of it again
    second = make_search(tmp_path / "killed", trials=16)
    again = play(second)
    assert again[0] == job.recipe
    assert again == expected[12:]
    assert second.best().params == whole.best().params
    assert [trial.state for trial in second.study.trials] == [trial.state for trial in whole.study.trials]


def test_a_greater_number_of_trials_goes_on(tmp_path):
    assert len(play(make_search(tmp_path, trials=3))) == 3
    assert play(make_search(tmp_path, trials=3)) == []
    assert len(play(make_search(tmp_path, trials=7))) == 4


def test_poor_trials_are_given_up_early_and_the_best_is_near_the_best(tmp_path):
    search = make_search(tmp_path, trials=30)
    play(search)
    pruned = search.study.get_trials(states=(TrialState.PRUNED,))
    ended = search.study.get_trials(states=(TrialState.COMPLETE,))
    assert len(pruned) > 10
    assert {trial.last_step for trial in pruned} <= {2, 4}
    assert max(trial.value for trial in ended) == search.best().value > 80
    search.write_table()
    with open(tmp_path / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [trial.state.name.lower() for trial in search.study.trials]
    assert float(rows[search.best().number]["val/top1"]) == search.best().value


def test_time_that_is_over_leaves_a_trial_to_be_continued(tmp_path):
    search = make_search(tmp_path, seconds=1000)
    jobs = search.jobs()
    job = next(jobs)
    assert search.judge(job, {"epoch": 1, "val/top1": 50.0})
    search.limit = 0.0
    assert not search.judge(job, {"epoch": 2, "val/top1": 60.0})
    search.take(job, Outcome("abandoned"))
    assert list(jobs) == []
    with pytest.raises(InputError, match="no trial was trained to its end"):
        search.best()
    assert list(make_search(tmp_path, seconds=1e-9).jobs()) == []
    assert next(make_search(tmp_path, seconds=1000).jobs()) == job


def test_a_failed_trial_is_counted_and_checkpoints_go_when_a_trial_is_over(tmp_path, capsys):
    search = make_search(tmp_path, trials=3)
    jobs = search.jobs()
    first = next(jobs)
    first.out.mkdir(parents=True)
    (first.out / "last.pt").write_text("")
    search.take(first, Outcome("failed", "no such luck"))
    assert (first.out / "last.pt").exists()  # it may be another's: the folder may be what the trial failed for
    second = next(jobs)
    second.out.mkdir(parents=True)
    (second.out / "last.pt").write_text("")
    search.take(second, Outcome("stopped", "the loss is not finite"))
    assert not (second.out / "last.pt").exists()
    play(search)
    assert [trial.state.name for trial in search.study.trials[:3]] == ["FAIL", "PRUNED", "COMPLETE"]
    said = capsys.readouterr().err
    assert "trial 0: kd, strength 4, temperature 4, rate 0.05: no such luck" in said
    assert "[2/3] trial 1" in said


def test_half_a_line_of_a_killed_process_is_taken_away(tmp_path):
    play(make_search(tmp_path, trials=2))
    with open(tmp_path / "study.log", "ab") as file:
        file.write(b'{"op_code": 6, "wor')
    assert len(play(make_search(tmp_path, trials=3))) == 1


def test_the_folder_of_another_search_is_refused(tmp_path):
    make_search(tmp_path / "out")
    with pytest.raises(InputError, match=r"recipe or other methods \(--methods \S+ -> kd\); .*--out \S+/out-2\)"):
        make_search(tmp_path / "out", methods=["kd"])


def test_a_trial_that_the_system_refuses_is_not_over(tmp_path):
    search = make_search(tmp_path, trials=2)
    job = next(search.jobs())
    with pytest.raises(PcdistillError, match="trial 0: no space left"):
        search.take(job, Outcome("refused", "no space left"))
    assert search.study.trials[0].state.name == "RUNNING"


def test_opening_a_search_again_writes_nothing(tmp_path):
    play(make_search(tmp_path, trials=2))
    before = (tmp_path / "study.log").read_bytes()
    assert play(make_search(tmp_path, trials=2)) == []
    assert (tmp_path / "study.log").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("count", [40, pytest.param(share(1000), marks=pytest.mark.faults)])
def test_a_damaged_search_is_refused_or_read(tmp_path, count):
    sound = make_search(tmp_path / "sound", trials=4)
    play(sound, number=3)
    next(sound.jobs())
    lines = [json.loads(line) for line in (tmp_path / "sound" / "study.log").read_text().splitlines()]

    def check(changed, tally):
        raw, lines = changed
        out = tmp_path / "damaged"
        out.mkdir(exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (out / "study.log").write_bytes(text.encode() if raw is None else raw)

        def go_on():
            search = make_search(out, trials=4)
            search.write_table()
            search.best_described()

        tally.judge(go_on)

    whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
    broken = st.builds(lambda raw: (raw, lines), st.composite(lambda draw: damaged(draw, whole))())
    throw(st.one_of(st.tuples(st.none(), mutated(lines)), broken), check, count)
