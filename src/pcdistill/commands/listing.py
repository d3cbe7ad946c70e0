"""`pcdistill list`: names that can be used. Only models, detectors and options need torch."""

from pcdistill.methods import METHODS
from pcdistill.recipe import ALONE, RECIPES, recipe_names


def listed(what: str) -> list[tuple[str, str]]:
    """Name and one line of text, for each of the "methods", "recipes", "data", "models" or "detectors"."""
    if what == "methods":
        rows = [(ALONE, "the student alone")]
        return rows + [(name, f"{m.summary} [{m.kind}; {m.source}]") for name, m in METHODS.items()]
    if what == "recipes":
        return [(name, _first_comment(name)) for name in recipe_names()]
    if what == "data":
        from pcdistill.data import DATASETS

        return list(DATASETS.items())
    from pcdistill.commands.tasks import TASKS

    task = "detection" if what == "detectors" else "classification"
    return [(name, "") for name in TASKS[task]().model_names()]


def options_listed(method: str) -> list[tuple[str, str]]:
    """Name and meaning of every option of a method's loss.

    Raises:
        InputError: there is no such method.
    """
    from pcdistill.distillation.objective import method_options

    return [
        (o.name, f"{o.type}, default {o.default}: {o.about}") if o.default else (o.name, f"{o.type}: {o.about}")
        for o in method_options(method)
    ]


def _first_comment(name: str) -> str:
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
