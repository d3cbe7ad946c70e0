"""Every benchmark in turn, its table in benchmarks/results: what `make bench` runs.

python benchmarks/run_all.py [--device cpu]

A benchmark whose table was made at this very commit is not run again: started anew after a stop, it continues.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from _bench import commit

HERE = Path(__file__).parent
RESULTS = HERE / "results"
BENCHMARKS = ("ops_on_step", "loss", "step", "cache", "pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    began_at = commit()
    for name in BENCHMARKS:
        out = RESULTS / f"{name}--{args.device}.json"
        if finished(out, began_at):
            print(f"{name}: measured at this commit already, in {out.relative_to(HERE)}")
            continue
        command = [sys.executable, f"bench_{name}.py", "--device", args.device, "--json", str(out.relative_to(HERE))]
        subprocess.run(command, cwd=HERE, check=True)


def finished(out: Path, at: str) -> bool:
    """Whether the result was made at this commit; changed files, which no commit names, are measured anew."""
    if not out.exists() or at.endswith("-dirty"):
        return False
    made_at = str(json.loads(out.read_text())["machine"]["commit"])
    return made_at.removesuffix("-dirty") == at


if __name__ == "__main__":
    main()
