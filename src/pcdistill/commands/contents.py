"""Whether finished runs that a comparison or a search takes over were made of the contents that are there now."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from pcdistill.commands.folder import settle_contents
from pcdistill.commands.session import open_data
from pcdistill.commands.tasks import task_of
from pcdistill.commands.teachers import cached_facts, comes_from_cache, teacher_folder
from pcdistill.engine.fingerprint import Contents, settle, student_contents, teacher_contents
from pcdistill.engine.placement import make_accelerator
from pcdistill.files import home_followed
from pcdistill.recipe import Recipe


class PresentContents:
    """Fingerprints of recipes as they would run now; data and models that recipes share are looked at once."""

    def __init__(self) -> None:
        self._data: dict[str, Any] = {}
        self._models: dict[str, tuple[Any, Contents]] = {}

    def of(self, recipe: Recipe) -> Contents:
        """Data, student at its start, and those teachers whose weights are there.

        Raises:
            InputError: they cannot be opened.
        """
        task = task_of(recipe)
        key = repr((recipe.task, replace(recipe.data, seed=None), recipe.distils))
        if key not in self._data:
            self._data[key] = open_data(task, recipe, make_accelerator(recipe.train))
        data = self._data[key]
        own = f"{key} {recipe.student!r} {recipe.train.seed} {recipe.allow}"
        if own not in self._models:
            set_seed(recipe.train.seed)
            built = task.student(recipe, data)
            self._models[own] = built, student_contents(built)
        student, found = self._models[own]
        contents = {**data.contents, **found}
        for number, config in enumerate(recipe.all_teachers if recipe.distils else ()):
            if comes_from_cache(config):
                contents[f"{teacher_folder(number)}.cache"] = cached_facts(config)["fingerprint"]
                continue
            if config.weights is not None and not home_followed(config.weights).is_file():
                continue  # taken away since: who still needs them says so
            config = replace(config, cache=None)
            name = f"{key} {config!r} {recipe.allow} {number}"
            if name not in self._models:
                teacher = task.teacher(config, student, data, recipe.allow)
                self._models[name] = None, teacher_contents(teacher, teacher_folder(number))
            contents |= self._models[name][1]
        return contents

    def settle(self, out: Path, recipe: Recipe, summary: dict[str, Any]) -> None:
        """Refuse the finished run in a folder if it was made of other contents; an old one, which says none, passes.

        Raises:
            InputError: saying what changed.
        """
        if isinstance(summary.get("contents"), dict):
            settle_contents(out, self.of(recipe))

    def settle_study(self, out: Path, study: Any, recipe: Recipe) -> None:
        """The same of a search, whose contents are kept when it begins.

        Raises:
            InputError: saying what changed.
        """
        found = self.of(recipe)
        settle(out, found, study.user_attrs.get("contents"))
        if study.user_attrs.get("contents") != found:
            study.set_user_attr("contents", found)
