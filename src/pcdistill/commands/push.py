"""`pcdistill push`: a run's student on the Hugging Face hub; and `load_student`, which takes it from there."""

from pathlib import Path
from typing import Any

from pcdistill.commands.student import WEIGHTS, Student, open_student
from pcdistill.errors import InputError, PcdistillError, first_line
from pcdistill.extras import need
from pcdistill.models.weights import run_weights

MODEL = "model.safetensors"  # what timm and transformers look for on the hub
FILES = (  # of a run's folder; no checkpoints, no teacher
    WEIGHTS,
    MODEL,
    "README.md",
    "recipe.yaml",
    "config.json",
    "preprocessor_config.json",
    "result.json",
    "metrics.csv",
    "bench.json",
    "report.html",
    "export/*.onnx",
    "export/*.json",
)
NEEDED = ("recipe.yaml", WEIGHTS, "config.json")


def push(run: Path, repo: str, *, private: bool = False) -> str:
    """Upload a run's student with its card, recipe and results.

    Args:
        run: the run's folder.
        repo: USER/NAME; it is made if it is not there.
        private: make it so that nobody else sees it.

    Returns:
        Where it is.

    Raises:
        InputError: no finished run, a name that the hub does not take, or no permission.
        PcdistillError: the hub cannot be reached.
    """
    student = open_student(run)
    hub = _hub(f"push to {repo}")
    api = hub.HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        operations = [
            hub.CommitOperationAdd(path.relative_to(run).as_posix(), str(path))
            for pattern in FILES
            for path in sorted(run.glob(pattern))
        ]
        weights = run_weights(run)
        if weights.name != WEIGHTS:  # a teacher's run: whoever loads it from the hub takes it for a student
            operations.append(hub.CommitOperationAdd(WEIGHTS, str(weights)))
        if student.name.startswith("timm/") and not (run / MODEL).exists():
            operations.append(hub.CommitOperationAdd(MODEL, str(weights)))
        message = f"{student.name}, by pcdistill"
        found = api.create_commit(repo, operations, commit_message=message, num_threads=1)
    except Exception as error:  # the client's own, its HTTP library's, and those of the system
        raise _told(error, repo, hub) from error
    return f"pushed {len(operations)} files: {found.repo_url}"


def load_student(path_or_repo: str | Path) -> Student:
    """A trained student, ready to use: `.model` in eval mode, `.classes`, and `.read(path)` for its images.

    Args:
        path_or_repo: a run's folder; or the name of one on the Hugging Face hub, USER/NAME, optionally with @REVISION.

    Raises:
        InputError: neither exists, or it holds no student of pcdistill.
        PcdistillError: the hub cannot be reached.
    """
    if Path(path_or_repo).is_dir():
        return open_student(Path(path_or_repo))
    repo, _, revision = str(path_or_repo).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "~", "/")):
        raise InputError(f"{path_or_repo} is neither a run's folder nor a name on the hub (USER/NAME)")
    hub = _hub(f"load {repo}")
    try:
        folder = hub.snapshot_download(repo, revision=revision or None, allow_patterns=list(NEEDED))
    except Exception as error:
        raise _told(error, repo, hub) from error
    return open_student(Path(folder))


def _hub(what: str) -> Any:
    need("huggingface_hub", what=what)
    import huggingface_hub

    return huggingface_hub


def _told(error: Exception, repo: str, hub: Any) -> PcdistillError:
    """What went wrong, in a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        who = "your token does not allow it" if hub.get_token() else "there is no token"
        return InputError(f"the hub refuses {repo}: {who}; log in with: hf auth login (or set HF_TOKEN)")
    if status == 404:
        return InputError(f"the hub has no {repo}, or does not show it to you; hf auth login says who you are")
    if isinstance(error, HFValidationError):
        return InputError(f'"{repo}" is no name on the hub: {first_line(error)}')
    if isinstance(error, OfflineModeIsEnabled):
        return PcdistillError(f"the hub was not asked for {repo}: HF_HUB_OFFLINE is set")
    if isinstance(error, HfHubHTTPError):
        return PcdistillError(f"the hub answered {status} for {repo}: {first_line(error)}")
    return PcdistillError(f"the hub cannot be reached for {repo}: {first_line(error)}")
