"""The SLURM script of the documents, as far as it can be tried without a cluster."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from pcdistill import cli

SCRIPT = Path(__file__).parents[1] / "examples" / "slurm" / "distil.sbatch"
STANDS_IN = '#!/bin/sh\nprintf "%s\\n" "$@" > "$SAID"\n'


@pytest.fixture
def started(tmp_path):
    """The arguments that the script gives to srun, by programs that stand in for SLURM's."""
    for name, text in (("srun", STANDS_IN), ("scontrol", "#!/bin/sh\necho node7\necho node8\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "DATA": "Meine Daten",
        **{"SLURM_SUBMIT_DIR": "/work dir", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"},
        **{"SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "17"},
    }
    subprocess.run(["bash", str(SCRIPT)], env=env, check=True, timeout=60)
    return (tmp_path / "said").read_text().splitlines()


def test_the_script_starts_a_process_for_every_gpu_of_every_node(started):
    launcher = started[: started.index("-m")]
    assert launcher == shlex.split(
        "torchrun --nnodes 2 --nproc_per_node 4 --rdzv_backend c10d --rdzv_endpoint node7:29500 --rdzv_id 17"
    )
    wanted = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--requeue"} <= set(wanted)


def test_its_command_resolves(started, capsys):
    command = started[started.index("-m") :]
    assert command[:3] == ["-m", "pcdistill", "distill"]
    assert command[-4:] == ["--data", "Meine Daten", "--out", "/work dir/runs/resnet18"]
    cli.main([*command[2:], "--print-config"])
    assert "name: Meine Daten" in capsys.readouterr().out
