"""The commands of the README are typed here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "add-a-growth-method.md").read_text(encoding="utf-8")
COSTS = (ROOT / "docs" / "what-it-costs.md").read_text(encoding="utf-8")


def code_blocks(language: str = "", page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def workflow_commands(*pages: str) -> list[str]:
    blocks = [block for page in pages or (README, RUNNING, COSTS) for block in code_blocks(page=page)]
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in dict.fromkeys(lines) if line.startswith("python workflows/efficientscale.py")]


# In one process, because most of a plan's time is what Python imports.
PLANS = """
import contextlib, io, json, runpy, shlex, sys
found = {}
for command, root in json.loads(sys.argv[1]).items():
    sys.argv = [*shlex.split(command)[1:], "action=plan", f"paths.root={root}"]
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    found[command] = (code, out.getvalue())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int | str, str]]:
    """How the plan of each command ended, and what it printed."""
    roots = {command: str(tmp_path_factory.mktemp("plan") / "runs") for command in workflow_commands()}
    words = [sys.executable, "-c", PLANS, json.dumps(roots)]
    plans: dict[str, tuple[int | str, str]] = json.loads(subprocess.check_output(words, cwd=ROOT, text=True))
    return plans


def test_there_are_commands_to_test() -> None:
    assert len(workflow_commands()) >= 5
    assert "make run" in README
    assert "make test" in README


@pytest.mark.parametrize("command", workflow_commands())
def test_every_workflow_command_of_the_readme_has_a_plan(command: str, plans: dict[str, tuple[int | str, str]]) -> None:
    code, text = plans[command]
    assert code == 0, (code, text)
    assert "stages to run" in text


def test_the_page_on_costs_shows_what_its_commands_print(plans: dict[str, tuple[int | str, str]]) -> None:
    for command, shown in zip(workflow_commands(COSTS), code_blocks("text", COSTS), strict=False):
        printed = {line.rstrip() for line in plans[command][1].splitlines()}
        assert [line for line in shown.splitlines() if line not in printed] == []


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"\bmake ([a-z0-9-]+)", README))
    assert named <= set(targets)


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readme_is_read_in_two_minutes_and_has_the_same_commands_in_chinese() -> None:
    assert len(README.splitlines()) <= 120
    assert len(README.split()) <= 1200
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    commands = [
        [line.split("#")[0].strip() for line in page.splitlines() if line.startswith(("python ", "make "))]
        for page in (README, chinese)
    ]
    assert commands[0] == commands[1]
    assert README.count("\n## ") == chinese.count("\n## ")


def test_the_growth_method_of_the_docs_works_as_described(tmp_path: Path) -> None:
    """One function in one file and one YAML, in a copy of the project, is a growth that a plan knows."""
    for folder in ("platform", "conf", "workflows"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (method,) = (block for block in code_blocks("python", METHOD) if "def grow(" in block)
    (tmp_path / "platform/aquilamoe/growth/methods/halfway.py").write_text(method)
    fpi = (tmp_path / "conf/growth/fpi.yaml").read_text()
    (tmp_path / "conf/growth/halfway.yaml").write_text(fpi.replace("method: fpi", "method: halfway"))
    grow = f"""
import sys; sys.path.insert(0, {str(tmp_path / "platform")!r})
from pathlib import Path
import torch, yaml
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.model.transformer import Decoder
from aquilamoe.checkpoint.state_dict import load_model, save_model
values = yaml.safe_load(Path({str(tmp_path / "conf/model/dense_d64.yaml")!r}).read_text())
values |= {{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}}
source = ModelConfig(**values)
model = Decoder(source); model.initialize(0); save_model(model, Path({str(tmp_path / "source")!r}))
growth = yaml.safe_load(Path({str(tmp_path / "conf/growth/halfway.yaml")!r}).read_text())
growth = GrowthConfig(**growth | {{"noise": 0.0}})
target = source.model_copy(update={{"intermediate_size": 64}})
scale_up(Path({str(tmp_path / "source")!r}), Path({str(tmp_path / "target")!r}), target, growth, 0)
old = [layer.mlp.up_proj.weight for layer in model.model.layers]
new = load_model(Path({str(tmp_path / "target")!r})).model.layers[0].mlp.up_proj.weight
torch.testing.assert_close(new[:32], (old[0] + old[1]) / 2)
torch.testing.assert_close(new[32:], (old[0] + old[1]) / 2)
"""
    done = subprocess.run([sys.executable, "-c", grow], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
