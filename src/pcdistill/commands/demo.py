"""`pcdistill demo`: the comparison that needs nothing but the package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pcdistill.commands.compare import Plan, compare
from pcdistill.engine.console import Console
from pcdistill.recipe import load_recipe

METHODS_OF = {"classification": ["none", "kd", "pcd"], "detection": ["none", "kd", "pcd", "dfmsd"]}
SEEDS_OF = {"classification": 5, "detection": 3}
RECIPE_OF = {"classification": "digits", "detection": "digits-detection"}


def demo(
    task: str,
    seeds: int | None,
    out: Path,
    *,
    overrides: Sequence[str],
    jobs: int | Literal["auto"],
    threads: int | None,
    console: Console,
    command: str | None,
) -> str:
    """Compare on real digits, or on digits with boxes; the table as text.

    Args:
        task: "classification" or "detection".
        seeds: of each method; None takes the task's own number.
        out: folder of the comparison.
        overrides: `KEY=VALUE` of the demo's recipe.
        jobs: runs at a time.
        threads: of each run.
        console: progress.
        command: what the user typed.
    """
    recipe = load_recipe(RECIPE_OF[task], overrides)
    plan = Plan(METHODS_OF[task], seeds or SEEDS_OF[task], jobs=jobs, threads=threads)
    return compare(recipe, plan, out, console=console, command=command)
