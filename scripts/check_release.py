"""Build wheel and sdist, look into them, and try the wheel in an empty environment of every Python at hand.

    python scripts/check_release.py             # 3.11, 3.12 and 3.13, as far as they are installed
    python scripts/check_release.py --lowest    # one environment of the lowest versions that pyproject.toml allows

It needs uv, or pip and the package build. Versions are those of constraints.txt, unless --lowest or --newest is given.
"""

import argparse
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
TINY = (
    *("distill", "--data", "digits", "--teacher", "cifar/resnet8", "--teacher-epochs", "1"),
    *("--student", "cifar/resnet8", "--set", "student.kwargs.widths=[4,4,8,16]", "--set", "data.limit=256"),
    *("--method", "pcd", "--epochs", "1", "--device", "cpu", "--allow", "weak-teacher"),
)
LEFT = ("student.safetensors", "result.json", "report.html", "README.md", "metrics.csv")  # by the tiny distillation
# What the lowest versions have failed at before: a vision transformer, ONNX, boxes, a search.
LOWEST_EXTRAS = "all"
TRIED = """
import torch
from pcdistill import models
import pcdistill.detection.metrics as metrics
from pcdistill.detection.detectors.build import build_detector
for name in ("timm/vit_tiny_patch16_224", "timm/mobilenetv3_small_050", "torchvision/resnet18"):
    model = models.build_model(name, num_classes=3, image_size=224).eval()
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 3), name
metrics.coco_tool()
build_detector("torchvision/ssdlite320_mobilenet_v3_large", num_classes=2)
"""


class CheckFailed(Exception):
    """Something in the release is not as it should be."""


def say(text: str) -> None:
    print(f"release: {text}", flush=True)


def done(*argv: str | Path, cwd: Path = ROOT, code: int = 0, env: Mapping[str, str] | None = None) -> str:
    """Run a command and give back what it printed.

    Raises:
        CheckFailed: another exit code.
    """
    found = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": "", **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode != code:
        raise CheckFailed(
            f"{' '.join(map(str, argv))}: exit code {found.returncode}, not {code}\n{found.stdout}{found.stderr}"
        )
    return found.stdout + found.stderr


def build(out: Path) -> tuple[Path, Path]:
    """Wheel and sdist; the wheel is made from the sdist, as an index would."""
    uv = shutil.which("uv")
    done(*([uv, "build", "--quiet", "--out-dir", out] if uv else [sys.executable, "-m", "build", "--outdir", out]))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def committed() -> set[str]:
    return set(done("git", "ls-files").splitlines())


def check_sdist(sdist: Path) -> None:
    """All that is committed is in it, but for what is of the clone alone: files and folders that begin with a dot."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in committed() if not any(part.startswith(".") for part in name.split("/"))} - inside
    if missing:
        raise CheckFailed(f"{sdist.name} lacks {len(missing)} committed files: {', '.join(sorted(missing)[:5])}")
    say(f"{sdist.name}: {len(inside)} files, all that are committed")


def check_wheel(wheel: Path) -> None:
    """It holds the package with its data and nothing else, and its text has no link that a package page breaks."""
    wanted = {
        name.removeprefix("src/")
        for name in committed()
        if name.startswith("src/pcdistill/") and not name.endswith(".gitignore")
    }
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    if inside != wanted:
        raise CheckFailed(f"{wheel.name}: lacks {sorted(wanted - inside)}, and has {sorted(inside - wanted)} beside it")
    relative = re.findall(r"\]\((?!\w+:)[^)]*\)", metadata)
    if relative:
        raise CheckFailed(f"{wheel.name}: links of its text lead nowhere on a package page: {relative}")
    say(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 1e6:.2f} MB")


def interpreters() -> dict[str, Path]:
    """The Pythons that are installed, by version: on the PATH, and pyenv's."""
    found: dict[str, Path] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in PYTHONS:
        candidates = [path / "bin" / "python" for path in sorted(pyenv.glob(f"{version}.*"))]
        on_path = shutil.which(f"python{version}")
        for candidate in [*([Path(on_path)] if on_path else []), *candidates]:
            asked = "import sys; print('%d.%d' % sys.version_info[:2])"
            told = subprocess.run([candidate, "-c", asked], capture_output=True, text=True, check=False)
            if told.stdout.strip() == version:
                found[version] = candidate
                break
    return found


def environment(python: Path, folder: Path, wanted: str, options: Sequence[str | Path]) -> Path:
    """A new environment with the requirement installed; its folder of commands."""
    uv = shutil.which("uv")
    if uv:
        done(uv, "venv", "--quiet", "--python", python, folder)
        done(uv, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *options, wanted)
    else:
        done(python, "-m", "venv", folder)
        done(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *options, wanted)
    return folder / "bin"


def check_core(commands: Path, work: Path) -> None:
    """The command, a tiny distillation, and the sentence for an extra that is not there."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    pcdistill = commands / "pcdistill"
    if version not in done(pcdistill, "--version", cwd=work):
        raise CheckFailed(f"pcdistill --version does not say {version}")
    if "pcd" not in done(pcdistill, "list", "methods", cwd=work):
        raise CheckFailed("pcdistill list methods does not list pcd")
    out = work / "run"
    done(pcdistill, *TINY, "--out", out, cwd=work)
    missing = [name for name in LEFT if not (out / name).is_file() or not (out / name).stat().st_size]
    if missing:
        raise CheckFailed(f"the run left no {', '.join(missing)}")
    umask = os.umask(0)
    os.umask(umask)
    closed = [name for name in LEFT if stat.S_IMODE((out / name).stat().st_mode) != 0o666 & ~umask]
    if closed:
        raise CheckFailed(f"the mode of {', '.join(closed)} does not follow the umask")


def check_missing_extras(commands: Path, work: Path) -> None:
    """What the core does not bring is asked for in one sentence, before anything is trained."""
    pcdistill = commands / "pcdistill"
    asks = {
        "tensorboard": (*TINY, "--set", "train.trackers=[tensorboard]", "--out", work / "asked"),
        "detection": ("demo", "--task", "detection", "--out", work / "boxes"),
        "tune": ("tune", "digits", "--trials", "2", "--out", work / "tuned"),
        "export": ("export", work / "run", "--to", "onnx"),
    }
    for extra, argv in asks.items():
        told = done(pcdistill, *argv, cwd=work, code=2)
        if f"pip install 'pcdistill[{extra}]'" not in " ".join(told.split()) or "Traceback" in told:
            raise CheckFailed(f"pcdistill {argv[0]} without the extra {extra} says: {told}")


def try_wheel(wheel: Path, python: Path, folder: Path, options: Sequence[str | Path]) -> None:
    """An empty environment with the wheel alone does the main job."""
    begun = time.perf_counter()
    commands = environment(python, folder / "env", str(wheel), options)
    check_core(commands, folder)
    check_missing_extras(commands, folder)
    say(f"{python}: installed and distilled in {time.perf_counter() - begun:.0f} s")


def try_lowest(wheel: Path, python: Path, folder: Path) -> None:
    """The lowest versions that are declared do the main job, and what once failed with lower ones."""
    begun = time.perf_counter()
    wanted = f"pcdistill[{LOWEST_EXTRAS}] @ {wheel.as_uri()}"
    commands = environment(python, folder / "env", wanted, ["--resolution", "lowest-direct"])
    check_core(commands, folder)
    done(commands / "python", "-c", TRIED, cwd=folder)
    done(commands / "pcdistill", "export", folder / "run", "--to", "onnx", cwd=folder)
    say(f"lowest versions on {python}: did it in {time.perf_counter() - begun:.0f} s")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lowest", action="store_true", help="try the lowest versions that are allowed; needs uv")
    parser.add_argument("--newest", action="store_true", help="try the newest versions, not those of constraints.txt")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="try this one alone; may be repeated")
    return parser.parse_args()


def check(args: argparse.Namespace, work: Path) -> None:
    """Everything that was asked for.

    Raises:
        CheckFailed: what is wrong.
    """
    wheel, sdist = build(work / "dist")
    check_sdist(sdist)
    check_wheel(wheel)
    pythons = {v: path for v, path in interpreters().items() if not args.python or v in args.python}
    if not pythons:
        raise CheckFailed(f"no Python of {', '.join(args.python or PYTHONS)} is installed")
    if args.lowest:
        if shutil.which("uv") is None:
            raise CheckFailed("--lowest needs uv: pip install uv")
        version = min(pythons, key=PYTHONS.index)
        (work / "lowest").mkdir()
        try_lowest(wheel, pythons[version], work / "lowest")
        return
    for version, python in pythons.items():
        (work / version).mkdir()
        try_wheel(wheel, python, work / version, [] if args.newest else ["--constraint", ROOT / "constraints.txt"])
    for version in set(args.python or PYTHONS) - pythons.keys():
        say(f"Python {version} is not installed here, and was not tried")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="pcdistill-release-") as folder:
        try:
            check(arguments(), Path(folder))
        except CheckFailed as problem:
            say(str(problem))
            return 1
    say("all is well")
    return 0


if __name__ == "__main__":
    sys.exit(main())
