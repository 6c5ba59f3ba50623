"""The wheel, installed where no repository is beside it: one program, with its configurations and studies."""

import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from aquilamoe.cli import program

ROOT = Path(__file__).resolve().parents[2]
OWN = "# @package _global_\nname: own\ndescription: An experiment of the working folder.\n"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The program of a venv that holds the wheel, and everything else from the environment of the tests."""
    folder = tmp_path_factory.mktemp("package")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("aquilamoe-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    (site / "others.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(here: Path, *words: str) -> subprocess.CompletedProcess[str]:
        # -P and no PYTHONPATH: nothing of a checkout is on the path before the wheel.
        command = [str(python), "-P", str(python.parent / "efficientscale"), *words]
        return subprocess.run(command, cwd=here, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)

    return run


@pytest.mark.process
def test_the_wheel_plans_the_experiments_that_travel_with_it_and_those_of_the_folder(
    installed: Run, tmp_path: Path
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "own.yaml").write_text(OWN)
    shipped = installed(tmp_path, "run", "+experiment=7b", "action=plan")
    assert (shipped.returncode, shipped.stderr) == (0, "")
    assert shipped.stdout.startswith("7b: ")
    own = installed(tmp_path, "experiment=own", "action=plan", f"paths.root={tmp_path / 'runs'}")
    assert (own.returncode, own.stderr) == (0, "")
    assert own.stdout.startswith("own: An experiment of the working folder.\n")
    assert not (tmp_path / "runs").exists()


def test_the_wheel_gives_advice_from_the_kept_studies(installed: Run, tmp_path: Path) -> None:
    words = ["action=advise", "source=0.45M", "source_tokens=3.6M", "target=1.6M", "budget=2M"]
    done = installed(tmp_path, "ablate", *words)
    assert (done.returncode, done.stderr) == (0, "")
    count = len(list((ROOT / "docs" / "studies").glob("*/summary.json")))
    assert done.stdout.endswith(f"{count} recorded studies read.\n")


def test_the_commands_are_those_of_the_workflows(installed: Run, tmp_path: Path) -> None:
    assert installed(tmp_path, "--version").stdout == "efficientscale 0.1.0\n"
    refused = installed(tmp_path, "groww")
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: groww: is not a command; did you mean 'grow'? (valid: ablate, grow, run)\n",
    )
    scripts = {path.stem: path.read_text() for path in (ROOT / "workflows").glob("*.py")}
    called = {name: text.splitlines()[-1].strip() for name, text in scripts.items()}
    assert called == {"efficientscale": "run_pipeline()", "grow": "grow()", "ablations": "ablate()"}
    assert {command.__name__ for command in program.COMMANDS.values()} == {"run_pipeline", "grow", "ablate"}
