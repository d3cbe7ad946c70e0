"""Runs on a cluster of Ray: the results of one machine, a node that dies, and what is refused before training."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import pcdistill
from pcdistill.cli import main
from pcdistill.commands.claim import MARK, claimed, wait_until_free
from pcdistill.commands.jobs import At, Job, Progress, Share, run_jobs
from pcdistill.engine.console import Console
from pcdistill.errors import InputError
from pcdistill.recipe import load_recipe, make_recipe

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

from ray.cluster_utils import Cluster as LocalCluster  # noqa: E402

from pcdistill.commands import cluster as module  # noqa: E402
from pcdistill.commands import cluster_nodes  # noqa: E402
from pcdistill.commands.cluster import connected  # noqa: E402
from pcdistill.commands.cluster_nodes import Place, Wanted  # noqa: E402

SRC = str(Path(pcdistill.__file__).parents[1])
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
SOON = {  # a node is found dead in two seconds
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", SRC)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else whatever tests run beside these takes the processor
        head = {**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
        made = LocalCluster(initialize_head=True, head_node_args=head)
        made.add_node(**NODE)
        yield made
        made.shutdown()


MODELS = """
from torch import nn

def big(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))

def small(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


def recipe(seed: int = 0, epochs: int = 1, limit: int = 200, **keys):
    base = load_recipe("digits").to_dict()
    train = {**base["train"], "epochs": epochs, "seed": seed}
    data = {**base["data"], "limit": limit, "batch_size": 50}
    return make_recipe({**base, "method": "none", "losses": [], "teacher": None, "data": data, "train": train, **keys})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "last.pt", weights_only=True)["student"]
    assert isinstance(state, dict)
    return state


class Told(Console):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []
        self.drawn: list[dict[str, tuple[float, str]]] = []

    def _write(self, line: str) -> None:
        self.lines.append(line)

    def overall(self, fraction, text, going=None):
        self.drawn.append(dict(going or {}))


def on_cluster(cluster, todo: list[Job], out: Path, console: Console | None = None, gpus: float | None = None):
    with connected(Wanted(cluster.address, threads=1, gpus=gpus), "cpu", out) as pool:
        return {job.name: outcome for job, outcome in pool.run(todo, console=console or Told())}


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# Without a cluster


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (Wanted("nowhere"), "must be auto or HOST:PORT"),
        (Wanted("ray://127.0.0.1:1"), "must be auto or HOST:PORT"),
        (Wanted("127.0.0.1:1"), "nothing answers there"),
        (Wanted("auto", gpus=1.5), "must be 0, or from 0.001 to 1"),
        (Wanted("auto", gpus=-1), "must be 0, or from 0.001 to 1"),
        (Wanted("auto", gpus=float("nan")), "must be 0, or from 0.001 to 1"),
        (Wanted("auto", threads=0), "--threads must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_ray_is_asked(wanted, said, tmp_path):
    with pytest.raises(InputError, match=said), connected(wanted, "cpu", tmp_path):
        pass


@pytest.mark.parametrize("command", ["compare", "tune"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cluster", "auto", "--jobs", "2"], "--jobs is of one machine"),
        (["--gpus-per-run", "0.5"], "name one with --cluster"),
    ],
)
def test_flags_that_exclude_each_other_are_one_sentence(command, flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, "digits", *flags, "--out", str(tmp_path / "out")])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["compare", "tune"])
def test_without_ray_its_extra_is_named(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match="2"):
        main([command, "digits", "--cluster", "auto", "--out", str(tmp_path / "out")])
    assert "pip install 'pcdistill[cluster]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_lock_of_a_process_that_ends_is_waited_for(tmp_path):
    assert wait_until_free(tmp_path / "none", 0)
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom pcdistill.commands.claim import claimed\n"
        "with claimed(Path(sys.argv[1]), 'run'):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    argv, env = [sys.executable, "-c", hold, str(tmp_path / "out")], {**os.environ, "PYTHONPATH": SRC}
    with subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert not wait_until_free(tmp_path / "out", 0.1)
        timer = threading.Timer(0.5, process.kill)
        timer.start()
        assert wait_until_free(tmp_path / "out", 60)
        timer.join()
    with claimed(tmp_path / "out", "run"):
        assert (tmp_path / "out" / MARK).exists()


@pytest.mark.parametrize("text", ["epoch 1/3", "", "one, two, three"])
def test_a_node_is_named_by_itself_whatever_the_text_of_its_progress(text):
    run, console = module._Run(Job("a", recipe(), Path("a"))), Told()
    tasks = object.__new__(module._Tasks)
    tasks.shown, tasks.going = Progress(console, 1), {None: run}
    tasks._hear("a", 0, At(0.5, text, "192.0.2.7"))
    assert (run.node, run.reached) == ("192.0.2.7", 0.5)
    assert console.drawn[-1]["a"] == (0.5, f"{text}, 192.0.2.7")


def test_a_node_that_came_later_and_does_not_see_the_disk_says_so(tmp_path):
    place = Place(1, 0, tmp_path, tmp_path / "token")
    outcome = module._there(Job("a", recipe(), tmp_path / "a"), 0, place, None)
    assert outcome.status == "failed"
    assert f"does not see {tmp_path}; name an --out on a disk that all nodes share" in outcome.text


# With one


@pytest.mark.slow
def test_a_cluster_that_cannot_carry_out_the_runs_is_refused_before_training(cluster, tmp_path, monkeypatch):
    address = cluster.address
    for wanted, said in ((Wanted(address, threads=64), "64 CPUs"), (Wanted(address, gpus=1), "1 GPU")):
        said = f"no node of the Ray cluster has .*{said}"
        with pytest.raises(InputError, match=said), connected(wanted, "cpu", tmp_path):
            pass
    other = functools.partial(Place, version="9.9")
    monkeypatch.setattr(cluster_nodes, "Place", other)
    with (
        pytest.raises(InputError, match=f"has pcdistill {pcdistill.__version__}, this machine 9.9"),
        connected(Wanted(address), "cpu", tmp_path),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(ray, "__version__", "1.0")  # of the command; the cluster's is another process
    with (
        pytest.raises(InputError, match=r"other versions \(.*Ray: 1.0.*\); install the same Ray"),
        connected(Wanted(address), "cpu", tmp_path),
    ):
        pass
    assert not ray.is_initialized()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_search_on_a_cluster_tries_and_finds_what_it_does_on_one_machine(cluster, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODELS)
    models = ["--teacher", f"{tmp_path / 'mine.py'}:big", "--student", f"{tmp_path / 'mine.py'}:small"]
    size = ["--teacher-epochs", "4", "--epochs", "4", "--limit", "400", "--trials", "3", "--final-seeds", "2"]
    keys = ["--methods", "kd,dist", "--threads", "1", "--set", "optim.warmup_epochs=0"]
    printed = {}
    for name, where in (("there", ["--cluster", cluster.address]), ("here", ["--jobs", "1"])):
        main(["tune", "digits", *models, *size, *keys, *where, "--out", str(tmp_path / name)])
        printed[name] = capsys.readouterr().out
    assert printed["there"].replace(str(tmp_path / "there"), str(tmp_path / "here")) == printed["here"]
    there, here = ((tmp_path / name / "trials.csv").read_text() for name in ("there", "here"))
    assert there == here
    teacher = json.loads((tmp_path / "there" / "teacher" / "result.json").read_text())
    assert teacher["file"] == "teacher.safetensors"


@pytest.mark.slow
def test_several_students_on_a_cluster_have_the_tables_of_one_machine(cluster, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(MODELS + MODELS.replace("def ", "def smaller_").replace("8", "4"))
    students = ",".join(f"{tmp_path / 'mine.py'}:{name}" for name in ("small", "smaller_small"))
    argv = ["compare", "digits", "--teacher", f"{tmp_path / 'mine.py'}:big", "--students", students]
    argv += ["--methods", "none,kd", "--seeds", "2", "--teacher-epochs", "3", "--epochs", "2", "--limit", "300"]
    printed = {}
    for name, where in (("there", ["--cluster", cluster.address]), ("here", ["--jobs", "1"])):
        main([*argv, "--threads", "1", *where, "--out", str(tmp_path / name)])
        printed[name] = capsys.readouterr().out
    assert "better" in printed["there"] or "cannot tell" in printed["there"] or "worse" in printed["there"]
    assert printed["there"].replace(str(tmp_path / "there"), str(tmp_path / "here")) == printed["here"]
    files = [path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("last.pt")]
    assert len(files) == 1 + 2 * 2 * 2
    for file in files:
        assert equal(tmp_path / "here" / file.parent, tmp_path / "there" / file.parent)
    for folder in ("small", "smaller_small"):
        tables = [(tmp_path / name / folder / "table.md").read_text().rsplit("```", 2)[0] for name in printed]
        assert tables[0] == tables[1]  # below is the command


MEETING = """
import os, pathlib, time
from torch import nn

HERE = pathlib.Path(__file__).parent

def model(num_classes):
    seen = HERE / f"{os.getpid()}.seen"
    seen.write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    until = time.monotonic() + 100
    while len(list(HERE.glob("*.seen"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""


@pytest.mark.slow
def test_two_runs_of_half_a_gpu_share_one_that_ray_names(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")  # the node's one GPU, which no card stands behind
    node = cluster.add_node(**{**NODE, "num_cpus": 2}, num_gpus=1)
    monkeypatch.undo()
    (tmp_path / "meeting.py").write_text(MEETING)
    one = {"student": {"name": f"{tmp_path / 'meeting.py'}:model"}}
    try:
        for wanted in (Wanted(cluster.address, gpus=0.5, threads=3), Wanted(cluster.address, gpus=1, threads=3)):
            said = r"has 3 CPUs and .* for a run \(they have .*2 CPUs and 1 GPU"
            with pytest.raises(InputError, match=said), connected(wanted, "cpu", tmp_path):
                pass
        todo = [Job(f"seed {seed}", recipe(seed, **one), tmp_path / str(seed)) for seed in range(2)]
        found = on_cluster(cluster, todo, tmp_path, gpus=0.5)
        assert {outcome.status for outcome in found.values()} == {"done"}, found
        seen = list(tmp_path.glob("*.seen"))
        assert [path.read_text() for path in seen] == ["5", "5"]  # both at a time, else a third file would be awaited
        for path in seen:
            path.write_text("")
        none = on_cluster(cluster, [Job("none", recipe(**one), tmp_path / "none")], tmp_path, gpus=0)
        assert none["none"].status == "done", none
        (last,) = set(tmp_path.glob("*.seen")) - set(seen)
        assert last.read_text() == ""
    finally:
        cluster.remove_node(node)


@pytest.mark.slow
def test_a_node_without_the_shared_disk_is_named_before_training(cluster, tmp_path):
    """The node is begun where another disk, an empty one, lies over the folder, as where NFS was not mounted."""
    hidden = [
        "unshare",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        'mount -t tmpfs none "$0" && exec "$@"',
        str(tmp_path),
    ]
    if shutil.which("unshare") is None or subprocess.run([*hidden, "true"], check=False).returncode:
        pytest.skip("this system lets no user mount")
    start = ["start", "--block", "--address", cluster.address, "--num-cpus", "1", "--object-store-memory", "80000000"]
    argv = [*hidden, sys.executable, "-m", "ray.scripts.scripts", *start]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as node:
        try:
            ray.init(cluster.address, log_to_driver=False, namespace="pcdistill")
            until = time.monotonic() + 60
            while sum(one["Resources"].get("CPU", 0) for one in ray.nodes() if one["Alive"]) < 2:
                assert time.monotonic() < until
                time.sleep(0.2)
            ray.shutdown()
            said = f"node [0-9.]+ does not see {tmp_path}; name an --out on a disk that all nodes share"
            with pytest.raises(InputError, match=said), connected(Wanted(cluster.address), "cpu", tmp_path / "out"):
                pass
        finally:
            node.terminate()


@pytest.mark.slow
def test_when_the_head_dies_the_command_ends_with_a_sentence_and_continues_elsewhere(cluster, tmp_path):
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    dying = LocalCluster(initialize_head=True, head_node_args=head)
    try:
        dying.add_node(**NODE)
        out = tmp_path / "out"
        size = ["--methods", "none", "--seeds", "1", "--epochs", "12", "--limit", "300", "--threads", "1"]
        argv = [sys.executable, "-m", "pcdistill", "compare", "digits", *size, "--out", str(out)]
        env, pipes = {**os.environ, "PYTHONPATH": SRC}, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [*argv, "--cluster", dying.address]
        with subprocess.Popen(command, env=env, text=True, **pipes) as process:
            while not list(out.rglob("metrics.csv")) and process.poll() is None:
                time.sleep(0.1)
            dying.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
            killed = time.monotonic()
            stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 1
        last = stderr.splitlines()[-1]
        assert last.startswith("pcdistill: the Ray cluster does not answer any more (")
        assert last.endswith("; the same command continues, on another cluster too")
        assert stdout == ""
        assert not any(word in stderr for word in ("Traceback", "GCS", "will terminate"))
        assert time.monotonic() - killed < 60
        main([*argv[3:], "--cluster", cluster.address])  # the run on the other node may live for some seconds still
        main([*argv[3:-1], str(tmp_path / "here"), "--jobs", "1"])
    finally:
        dying.shutdown()
    assert equal(tmp_path / "here" / "none" / "seed-0", out / "none" / "seed-0")
    tables = [(folder / "table.md").read_text().split("```")[0] for folder in (out, tmp_path / "here")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_an_interrupted_comparison_leaves_checkpoints_and_free_folders(cluster, tmp_path):
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "pcdistill", "compare", "digits", "--methods", "none", "--seeds", "2"]
    argv += ["--epochs", "200", "--limit", "200", "--cluster", cluster.address, "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": SRC}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(out.rglob("metrics.csv")) and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command continues" in stderr
    assert stdout == ""
    (checkpoint,) = out.rglob("last.pt")
    assert 0 < torch.load(checkpoint, weights_only=True)["epoch"] < 200
    assert wait_until_free(checkpoint.parent, 0)


@pytest.mark.slow
def test_runs_give_the_bits_of_one_machine_and_others_their_sentences(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where relative paths begin on the nodes too
    wrong = recipe(student={"name": "cifar/resnet8", "kwargs": {"no_such": 1}})
    crash = tmp_path / "crash.py"
    crash.write_text("import os, signal\ndef model(**kwargs):\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    dies = recipe(student={"name": f"{crash}:model"})
    monkeypatch.setattr(module, "DEATHS", 1)
    todo = [Job("wrong", wrong, Path("there/wrong")), Job("dies", dies, Path("there/dies"))]
    todo += [Job(f"seed {seed}", recipe(seed), Path(f"there/{seed}")) for seed in range(2)]
    console = Told()
    found = on_cluster(cluster, todo, Path("there"), console)
    assert [found[job.name].status for job in todo] == ["failed", "failed", "done", "done"]
    assert "no_such" in found["wrong"].text
    assert "its process died, 2 times without progress" in found["dies"].text
    (told,) = [line for line in console.lines if "goes on" in line]  # wrong input is not tried again
    assert "dies: its process died; it goes on from its last checkpoint" in told
    assert not any("waiting" in line for line in console.lines)
    assert any("epoch 1/1" in text for going in console.drawn for _, text in going.values())
    here = [Job(f"seed {seed}", recipe(seed), tmp_path / "here" / str(seed)) for seed in range(2)]
    for job, outcome in run_jobs(here, [Share(1)], console=Console(quiet=True)):
        same = ("best", "last", "digest", "contents", "threads")
        assert {key: outcome.summary[key] for key in same} == {key: found[job.name].summary[key] for key in same}
        assert equal(job.out, tmp_path / "there" / job.out.name)


@pytest.mark.slow
def test_a_run_whose_node_is_killed_goes_on_elsewhere_from_its_checkpoint(cluster, tmp_path):
    dying = cluster.add_node(**NODE, resources={"dying": 1})
    todo = [Job(f"seed {seed}", recipe(seed, epochs=12, limit=300), tmp_path / "there" / str(seed)) for seed in (0, 1)]

    def kill() -> None:
        """When both runs have done an epoch, so that one of them is on the node."""
        while len(list(tmp_path.glob("there/*/metrics.csv"))) < 2:
            time.sleep(0.1)
        cluster.remove_node(dying, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    console = Told()
    found = on_cluster(cluster, todo, tmp_path / "there", console)
    killer.join()
    assert {outcome.status for outcome in found.values()} == {"done"}, found
    (told,) = [line for line in console.lines if "it goes on from its last checkpoint" in line]
    assert "its node died" in told
    died = tmp_path / "there" / told.split("seed ")[1][0]
    sessions = json.loads((died / "environment.json").read_text())
    assert len(sessions["continued"]) == 1
    whole = recipe(int(died.name), epochs=12, limit=300)
    list(run_jobs([Job("whole", whole, tmp_path / "here")], [Share(1)], console=Console(quiet=True)))
    assert equal(tmp_path / "here", died)
