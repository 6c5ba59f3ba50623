"""The layout of the package: which room may import which, and what no file may become."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.config import graph, plugins
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import code
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.store import Store

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "platform" / "aquilamoe"
CONF = REPOSITORY / "conf"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(REPOSITORY / "workflows").glob("*.py")])

# What every room may import: how numbers are written, files made durable, signals and errors handled, ancestors walked
# to.
GROUND = {"format", "files", "process", "ancestors"}
# A room, and the rooms that it may import besides itself and the ground. `growth/tool` and `training/ray` are rooms in
# rooms. Stages are loaded by their names: no room imports them.
MAY_IMPORT: dict[str, set[str]] = {
    "config": set(),
    "format": set(),
    "files": {"config"},
    "process": {"config"},
    "ancestors": set(),
    "model": {"config"},
    "checkpoint": {"config", "model"},
    "growth": {"config", "model", "checkpoint"},
    "data": {"config"},
    "pipeline": {"config"},
    "lineage": {"config", "pipeline", "checkpoint"},  # of checkpoint only the headers, without torch
    "training": {"config", "model", "checkpoint", "data"},
    "training/ray": {"config", "model", "checkpoint", "data", "training"},
    "evaluation": {"config", "model", "checkpoint", "data"},
    "estimates": {"config", "model", "checkpoint", "growth"},
    # One growth of one checkpoint: of data only how a tokenizer is opened, of the pipeline only recipes.
    "growth/tool": {"config", "model", "checkpoint", "growth", "data", "pipeline"},
}
ENGINES = {"config", "model", "checkpoint", "growth", "data", "training", "training/ray", "evaluation", "estimates"}
MAY_IMPORT["stages"] = ENGINES | {"pipeline", "lineage"}
MAY_IMPORT["ablation"] = {"config", "pipeline", "lineage", "checkpoint", "estimates", "training/ray"}
MAY_IMPORT["reports"] = MAY_IMPORT["ablation"] | {"ablation"}
MAY_IMPORT["tracking"] = MAY_IMPORT["reports"] | {"reports"}
# Of data only whether files are there, before a run.
MAY_IMPORT["cli"] = MAY_IMPORT["tracking"] | {"tracking", "growth/tool", "evaluation", "data", "__init__"}
MAY_IMPORT["api"] = {"config", "growth/tool", "lineage", "cli"}  # of cli only where configurations lie
MAY_IMPORT["__init__"] = {"api"}
MAY_IMPORT["workflows"] = {"cli"}
# A package of others, and the only places that may import it (of a directory: all its files).
ONLY_IN = {
    "hydra": ["aquilamoe/cli"],
    "omegaconf": ["aquilamoe/cli", "aquilamoe/api.py"],
    "ray": ["aquilamoe/training/ray", "aquilamoe/ablation/tuning.py"],
    "mlflow": ["aquilamoe/tracking"],
    "torch": [
        *(f"aquilamoe/{room}" for room in ("model", "checkpoint", "growth", "training", "stages", "evaluation")),
        *("aquilamoe/data/loader.py", "aquilamoe/estimates/dry_run_shapes.py"),
    ],
    "rich": ["aquilamoe/cli"],
    "lm_eval": ["aquilamoe/evaluation/harness.py"],
    "datasets": ["aquilamoe/evaluation/harness.py", "aquilamoe/data/hub.py"],
    "matplotlib": ["aquilamoe/reports"],
    "jinja2": ["aquilamoe/reports"],
    "transformers": [],
}
# What would make `action=plan`, `--help` and a cached run slow.
HEAVY = {
    "torch",
    "ray",
    "mlflow",
    "transformers",
    "tokenizers",
    "pyarrow",
    "grain",
    "matplotlib",
    "jinja2",
    "safetensors",
    "lm_eval",
}


@dataclass(frozen=True)
class Import:
    """`module` as imported in `path`, for type checkers alone or when the program runs."""

    path: Path
    line: int
    module: str
    typing_only: bool

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(REPOSITORY)}:{self.line} imports {self.module}"


def imports(path: Path, tree: ast.AST | None = None, typing_only: bool = False) -> Iterator[Import]:
    """All imports of a file, also those inside functions."""
    for node in ast.iter_child_nodes(tree or ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            # `from aquilamoe import cli` imports the room `aquilamoe.cli`, `from aquilamoe.growth import tool` another.
            above = {f"aquilamoe.{name.split('/')[0]}" for name in MAY_IMPORT if "/" in name} | {"aquilamoe"}
            names = [f".{alias.name}" for alias in node.names] if node.module in above else [""]
            yield from (Import(path, node.lineno, f"{node.module}{name}", typing_only) for name in names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(path, ast.Module(node.body, []), typing_only=True)
            yield from imports(path, ast.Module(node.orelse, []), typing_only)
        else:
            yield from imports(path, node, typing_only)


def room_of(parts: Sequence[str]) -> str:
    """The room of a module by its parts: `growth/tool` for ("growth", "tool", "plan")."""
    inner = "/".join(parts[:2])
    return inner if inner in MAY_IMPORT else parts[0]


def room(path: Path) -> str:
    if not path.is_relative_to(PACKAGE):
        return "workflows"
    return room_of(path.relative_to(PACKAGE).with_suffix("").parts)


ALL_IMPORTS = [found for path in SOURCES for found in imports(path)]


def test_the_source_root_is_no_package_and_so_does_not_hide_the_standard_librarys_platform() -> None:
    assert not (REPOSITORY / "platform" / "__init__.py").exists()


def test_every_room_is_on_the_map() -> None:
    assert {room(path) for path in SOURCES} == set(MAY_IMPORT)


def test_imports_go_only_in_the_directions_of_the_map() -> None:
    internal = [found for found in ALL_IMPORTS if found.module.startswith("aquilamoe.")]
    assert len(internal) > 100
    wrong = [
        found.where
        for found in internal
        if room_of(found.module.split(".")[1:]) not in {room(found.path), *GROUND, *MAY_IMPORT[room(found.path)]}
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    """Also not for type checkers, and not inside functions; scripts beside each other are files like others."""
    scripts = [path for folder in ("tools", "benchmarks") for path in (REPOSITORY / folder).glob("*.py")]
    files = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    files = {path: name.removesuffix(".__init__") for path, name in files.items()} | {
        path: path.stem for path in scripts
    }
    modules = set(files.values())
    graph = {name: {target for target in targets(path) if target in modules} for path, name in files.items()}
    assert sum(map(len, graph.values())) > 500
    TopologicalSorter(graph).prepare()  # CycleError names the files


def targets(path: Path) -> Iterator[str]:
    """Names of what a file imports, of modules and of what is in them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from whole
            if node.module != "aquilamoe":
                yield str(node.module)


def test_only_the_command_line_prints() -> None:
    """Except for the last line of a process, and one line on standard error while a cluster is waited for."""
    printing = {path for path in SOURCES if re.search(r"(?<![\w.])print\(", path.read_text(encoding="utf-8"))}
    inside = {path for path in printing if room(path) not in ("cli", "process")}
    assert inside == {PACKAGE / "training" / "ray" / "session.py"}


def test_no_two_classes_have_one_name() -> None:
    names: dict[str, list[str]] = {}
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            names.setdefault(node.name, []).append(str(path.relative_to(REPOSITORY)))
    # The API's Store is the store as notebooks see it: its users know no other.
    twice = {name: places for name, places in names.items() if len(places) > 1 and name != "Store"}
    assert twice == {}


def test_a_test_lies_in_the_folder_of_a_room() -> None:
    """Or of what is beside the package; at the top is what looks at all of it."""
    folders = {str(path.parent.relative_to(REPOSITORY / "tests")) for path in (REPOSITORY / "tests").rglob("*.py")}
    assert folders <= {*MAY_IMPORT, ".", "support", "tools", "benchmarks", "docs"}


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_of_others_is_imported_only_where_it_belongs(package: str) -> None:
    places = [(REPOSITORY if place == "workflows" else REPOSITORY / "platform") / place for place in ONLY_IN[package]]
    assert all(place.exists() for place in places)
    wrong = [
        found.where
        for found in ALL_IMPORTS
        if found.module.split(".")[0] == package
        and not found.typing_only
        and not any(found.path.is_relative_to(place) for place in places)
    ]
    assert wrong == []


def test_the_rules_would_notice_an_import_inside_a_function_and_one_for_type_checkers(tmp_path: Path) -> None:
    source = tmp_path / "x.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\nelse:\n    import ray\n"
        "def f():\n    with g():\n        from aquilamoe import stages; from aquilamoe.model import transformer\n"
        "class C:\n    import mlflow.entities as e\n"
    )
    assert [(found.module, found.typing_only) for found in imports(source)] == [
        ("typing", False),
        ("torch", True),
        ("ray", False),
        ("aquilamoe.stages", False),
        ("aquilamoe.model", False),
        ("mlflow.entities", False),
    ]


def test_importing_the_commands_and_every_stage_imports_nothing_heavy() -> None:
    stages = [f"aquilamoe.stages.{name}" for name in plugins.names("stages")]
    modules = (
        *(f"data.{name}" for name in ("corpus", "cleaning", "tokenizer", "tokens", "encoding", "vocabulary")),
        *(
            "growth.rules",
            "growth.scale_up",
            "growth.scale_out",
            "cli.grow",
            "growth.tool.grow",
            "growth.tool.held_out",
        ),
    )
    light = [f"aquilamoe.{module}" for module in modules]
    code = f"import sys, aquilamoe.cli.commands, {', '.join([*stages, *light])}; print(*sys.modules)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {module.partition(".")[0] for module in imported} & HEAVY == set()


def test_every_stage_module_has_the_face_that_the_pipeline_knows(compose: Callable[..., dict[str, Any]]) -> None:
    words = ("+experiment=from_checkpoint", "checkpoint=somewhere")
    kinds = {stage["kind"] for stages in (compose(), compose(*words)) for stage in stages["stages"].values()}
    assert set(plugins.names("stages")) == kinds
    for kind in kinds:
        stage = plugins.load("stages", kind)
        assert isinstance(stage.VERSION, int)
        assert isinstance(stage.RESUMES, bool)
        assert callable(stage.estimate)
        assert callable(stage.run)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


# A shrink is a call of its own, and no stage.
NO_EXPERIMENT = ("stage", "ablation", "shrink")
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in NO_EXPERIMENT)


@pytest.mark.parametrize("word", [f"{group}={option}" for group in GROUPS for option in options(group)])
def test_every_option_of_every_group_composes_to_a_valid_experiment(
    compose: Callable[..., dict[str, Any]], tmp_path: Path, word: str
) -> None:
    # Only experts can be split and only several sources mixed, and the default experiment has one dense model there.
    before = {
        "upcycling=split": ["+experiment=split"],
        "upcycling=mix": ["+experiment=mix", "stages.upcycle=null", "stages.control.inputs.source=dense"],
    }
    experiment = graph.parse(compose(*before.get(word, []), f"+{word}" if word.startswith("experiment=") else word))
    # The default experiment grows its own small model only, and the one that needs a checkpoint is planned elsewhere.
    if not word.startswith("model=") and word != "experiment=from_checkpoint":
        plan = planning.make(graph.build(experiment), Store(tmp_path), Speed(1e9))
        assert {planned.name for planned in plan} == set(experiment.stages)


@pytest.mark.parametrize("folder", ["growth"])
def test_every_method_has_an_option_of_its_name_and_every_option_a_method(
    compose: Callable[..., dict[str, Any]], folder: str
) -> None:
    methods = {compose(f"{folder}={option}")[folder]["method"] for option in options(folder)}
    assert methods == set(plugins.names(f"{folder}/methods"))
    assert set(plugins.names(f"{folder}/methods")) <= set(options(folder))


def test_the_code_that_recipes_name_has_its_digest() -> None:
    # A digest that is not right here makes the outputs of earlier versions unknown. If this code computes other bytes,
    # raise the VERSION of the stages that use it (and growth/tool/identity.py's); then copy the right digests.
    right = {}
    for files in code.NAMED.values():
        names = plugins.names("growth/methods") if "{}" in files[0] else [""]
        for paths in ([file.format(name) for file in files] for name in names):
            right[paths[0]] = code.digest(paths)
    assert dict(code.SHIPPED) == right


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_a_file_of_the_configuration_begins_with_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    assert text.startswith(("# ", "kind: ", "name: ")), f"{path}: begin with a comment that states what it is"


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_is_read_in_one_sitting_and_a_function_on_one_screen(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    long = [f"{node.name} ({lines(node)} lines)" for node in functions(path) if lines(node) > 60]
    assert long == []


def lines(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


MOST_POSITIONAL, MOST_PARAMETERS = 5, 8


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_call_is_read_without_counting_its_arguments(path: Path) -> None:
    """Functions take few arguments by position, dataclasses of many fields none."""
    long = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            positional = [each for each in node.args.args if each.arg not in ("self", "cls", "ctx")]
            if len(positional) > MOST_POSITIONAL or len(positional) + len(node.args.kwonlyargs) > MOST_PARAMETERS:
                long.append(f"{node.name}:{node.lineno}")
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(one) for one in node.decorator_list):
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
            if len(fields) > MOST_POSITIONAL and "kw_only=True" not in ast.unparse(node.decorator_list[0]):
                long.append(f"{node.name}:{node.lineno}")
    assert long == []


def test_three_names_are_not_assigned_on_one_line() -> None:
    """The names of what a function returns, which stand for one value, may be."""
    packed = [
        f"{path.relative_to(REPOSITORY)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple) and len(node.value.elts) >= 3
        if any(isinstance(target, ast.Tuple) for target in node.targets)
    ]
    assert packed == []


def test_no_file_is_named_after_its_lack_of_a_subject() -> None:
    names = {path.stem for path in SOURCES}
    assert names.isdisjoint({"utils", "util", "common", "base", "helpers", "misc", "core"})


def test_every_init_file_is_empty() -> None:
    """But the package's own, which has the public names."""
    assert [path for path in PACKAGE.rglob("__init__.py") if path.read_text()] == [PACKAGE / "__init__.py"]


def test_the_home_folder_is_found_in_one_place() -> None:
    callers = [path.relative_to(PACKAGE) for path in SOURCES if ".expanduser(" in path.read_text(encoding="utf-8")]
    assert callers == [Path("config/paths.py")]
