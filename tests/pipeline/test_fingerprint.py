import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aquilamoe.config import graph, plugins
from aquilamoe.config.messages import UserError
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import code
from aquilamoe.pipeline import fingerprint as identity
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.fingerprint import differences, fingerprint, recipe
from aquilamoe.pipeline.stage import module
from aquilamoe.pipeline.store import Store
from stage_records import stage_record

Compose = Callable[..., dict[str, Any]]
CONF = Path(__file__).parents[2] / "conf"

PRETRAIN = recipe(
    "pretrain", 1, {"learning_rate": 1e-3, "optimizer": {"name": "adamw"}}, {"tokens": "aa", "source": "bb"}
)


@pytest.fixture
def fingerprints(compose: Compose, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Fingerprint of every stage of an experiment, by name."""

    def of(*overrides: str, values: dict[str, Any] | None = None) -> dict[str, str]:
        nodes = graph.build(graph.parse(values or compose(*overrides)))
        return {planned.name: planned.fingerprint for planned in planning.make(nodes, Store(tmp_path), Speed(1e9))}

    return of


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping) and value:
        for key, child in value.items():
            yield from leaves(child, (*path, key))
    else:
        yield path, value


def replaced(value: Mapping[str, Any], path: tuple[str, ...], new: Any) -> dict[str, Any]:
    first, *rest = path
    return {**value, first: replaced(value[first], tuple(rest), new) if rest else new}


RESOURCES = [
    ("cluster.workers=4",),
    ("cluster.cpus_per_worker=7",),
    ("cluster.gpus_per_worker=1", "cluster.gpu_memory_bytes=80_000_000_000"),
    ("cluster.address=auto",),
    ("cluster.max_failures=9",),
    ("cluster.micro_batch_tokens=128",),
    ("cluster.checkpoint_every_tokens=128",),
    ("cluster.compile=true",),
    ("cluster.flops_per_s=1e15",),
    ("paths.root=elsewhere",),
    ("tracking.uri=http://mlflow:5000",),
    ("tracking.enabled=false",),
    ("action=plan",),
    ("name=another", "description=x"),
    ("report.chain=[prepare]", "report.control=null"),
    *((f"cluster={path.stem}",) for path in sorted((CONF / "cluster").glob("*.yaml"))),
]


@pytest.mark.parametrize("words", RESOURCES, ids=" ".join)
def test_resources_do_not_affect_identity(fingerprints: Callable[..., dict[str, str]], words: tuple[str, ...]) -> None:
    assert fingerprints(*words) == fingerprints()


def test_every_field_of_every_stage_affects_its_identity(compose: Compose) -> None:
    for node in graph.build(graph.parse(compose())).values():
        config = node.stage.model_dump(mode="json")
        inputs = {role: f"fingerprint of {name}" for role, name in node.stage.inputs.items()}
        original = fingerprint(recipe(node.stage.kind, 1, config, inputs))
        fields = [(path, value) for path, value in leaves(config) if path[0] not in ("kind", "inputs")]
        changed = [
            fingerprint(recipe(node.stage.kind, 1, replaced(config, path, [value, "another"]), inputs))
            for path, value in fields
        ]
        assert len({original, *changed}) == 1 + len(fields)


def test_the_name_of_a_stage_is_no_part_of_its_identity(
    compose: Compose, fingerprints: Callable[..., dict[str, str]]
) -> None:
    values = compose()
    new_name = {name: f"the-{name}" for name in values["stages"]}
    for stage in values["stages"].values():
        stage["inputs"] = {role: new_name[source] for role, source in stage["inputs"].items()}
    values["stages"] = {new_name[name]: stage for name, stage in values["stages"].items()}
    values["stages"]["the-control"]["equal_flops"] = "the-moe"
    values["report"] = {"chain": ["the-moe"], "control": None}
    assert fingerprints(values=values) == {new_name[name]: digest for name, digest in fingerprints().items()}


def test_the_version_of_a_stages_code_affects_the_identity_of_all_that_comes_after(
    fingerprints: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprints()

    def with_new_scale_up(kind: str) -> Any:
        stage = module(kind)
        version = stage.VERSION + (kind == "scale_up")
        return SimpleNamespace(VERSION=version, RESUMES=stage.RESUMES, estimate=stage.estimate)

    monkeypatch.setattr(planning, "module", with_new_scale_up)
    after = fingerprints()
    assert {name for name in before if before[name] != after[name]} == {
        *("scale_up", "dense", "scale_out", "moe", "evaluate", "export")
    }


def test_inputs_and_their_roles_affect_identity() -> None:
    assert fingerprint(recipe("export", 1, {}, {"source": "a"})) != fingerprint(
        recipe("export", 1, {}, {"source": "b"})
    )
    assert fingerprint(recipe("evaluate", 1, {}, {"moe": "a", "dense": "b"})) != fingerprint(
        recipe("evaluate", 1, {}, {"moe": "b", "dense": "a"})
    )


def test_the_kind_affects_identity() -> None:
    assert fingerprint(recipe("export", 1, {}, {})) != fingerprint(recipe("corpus", 1, {}, {}))


def test_the_order_of_keys_does_not_affect_identity() -> None:
    assert fingerprint(recipe("pretrain", 1, {"a": 1, "b": {"c": 2, "d": 3}}, {"x": "1", "y": "2"})) == fingerprint(
        recipe("pretrain", 1, {"b": {"d": 3, "c": 2}, "a": 1}, {"y": "2", "x": "1"})
    )


def test_a_number_has_one_identity_however_it_is_written(fingerprints: Callable[..., dict[str, str]]) -> None:
    assert fingerprints("stages.prepare.learning_rate=3e-3") == fingerprints("stages.prepare.learning_rate=0.003")
    assert fingerprints("stages.prepare.total_tokens=1_638_400") == fingerprints(
        "stages.prepare.total_tokens=1638400.0"
    )


def test_an_experiment_has_the_fingerprints_that_it_had_in_earlier_versions_of_the_platform() -> None:
    # Change this only together with the VERSION of a stage: otherwise every store in use computes everything again.
    assert fingerprint(PRETRAIN) == "22082e821471"


def test_a_fingerprint_is_12_hexadecimal_digits() -> None:
    assert len(fingerprint(PRETRAIN)) == 12
    assert set(fingerprint(PRETRAIN)) <= set("0123456789abcdef")


def test_differences_name_the_field_the_old_and_the_new_value() -> None:
    new = recipe(
        "pretrain", 1, {"learning_rate": 2e-3, "optimizer": {"name": "adamw"}}, {"tokens": "aa", "source": "bb"}
    )
    assert differences(PRETRAIN, new) == ["learning_rate 0.001 -> 0.002"]


def test_differences_reach_into_groups_and_put_own_fields_before_inputs() -> None:
    new = recipe(
        "pretrain", 2, {"learning_rate": 1e-3, "optimizer": {"name": "muon"}}, {"tokens": "cc", "source": "bb"}
    )
    assert differences(PRETRAIN, new) == ["optimizer.name adamw -> muon", "version 1 -> 2", "inputs.tokens aa -> cc"]


def test_a_field_that_came_or_went_is_absent_on_the_other_side() -> None:
    old = recipe("corpus", 1, {"sources": {"en": 1}}, {})
    assert differences(old, recipe("corpus", 1, {"sources": {"zh": 1}}, {})) == [
        "sources.en 1 -> (absent)",
        "sources.zh (absent) -> 1",
    ]


def test_equal_recipes_have_no_differences() -> None:
    assert differences(PRETRAIN, dict(PRETRAIN)) == []
    assert identity.flatten({"a": {"b": {}, "c": [1, {"d": 2}]}, "e": None}) == {
        "a.b": {},
        "a.c": [1, {"d": 2}],
        "e": None,
    }


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the code that recipes name, in which recipes look for it."""
    root = tmp_path / "package"
    for files in code.NAMED.values():
        for path in plugins.PACKAGE_ROOT.glob(files[0].replace("{}", "*")):
            files_beside = [plugins.PACKAGE_ROOT / file for file in files if "{}" not in file]
            for each in (path, *files_beside):
                target = root / each.relative_to(plugins.PACKAGE_ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(each, target)
    shutil.copytree(plugins.PACKAGE_ROOT / "stages", root / "stages")
    monkeypatch.setattr(plugins, "PACKAGE_ROOT", root)
    return root


def edit(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_the_code_of_a_growth_method_is_part_of_the_identity_of_its_growth_and_of_no_other(
    package: Path, fingerprints: Callable[..., dict[str, str]]
) -> None:
    words = {method: f"growth={method}" for method in ("aki", "aki_pro", "fpi")}
    before = {method: fingerprints(word) for method, word in words.items()}
    method = package / "growth" / "methods" / "aki.py"
    edit(method, ("    spaces = [", "    # A comment.\n    spaces = ["), ('"""Grow one tensor', '"""Put it again'))
    assert {method: fingerprints(word) for method, word in words.items()} == before
    edit(method, ("new_rows=upper_layer[role]", "new_rows=upper_layer[role + '']"))  # a helper, which `aki_pro` takes
    after = {method: fingerprints(word) for method, word in words.items()}
    assert after["fpi"] == before["fpi"]
    for method_name in ("aki", "aki_pro"):
        changed = {stage for stage, digest in after[method_name].items() if digest != before[method_name][stage]}
        assert changed == {"scale_up", "dense", "scale_out", "moe", "evaluate", "export"}
    edit(method, ("new_rows=upper_layer[role + '']", "new_rows=upper_layer[role]"))
    assert {method: fingerprints(word) for method, word in words.items()} == before


@pytest.mark.parametrize(
    ("file", "old", "new", "first", "shown"),
    [
        (
            "growth/methods/aki_pro.py",
            "return num_layers == 1",
            "return num_layers == 2",
            "scale_up",
            "growth method aki_pro",
        ),
        (
            "config/depth.py",
            "layer * num_sources //",
            "layer * num_sources // 1 //",
            "scale_up",
            "growth depth interpolate",
        ),
        ("growth/expert_diversity.py", "size, drawn =", "drawn, size =", "scale_out", "upcycling method copy"),
        ("training/schedules.py", "return 1.0", "return 2.0", "prepare", "schedule name wsd"),
    ],
)
def test_what_is_changed_in_named_code_is_shown_by_the_plan(
    package: Path,
    compose: Compose,
    tmp_path: Path,
    file: str,
    old: str,
    new: str,
    first: str,
    shown: str,
) -> None:
    def plan() -> dict[str, planning.Planned]:
        nodes = graph.build(graph.parse(compose()))
        return {planned.name: planned for planned in planning.make(nodes, store, Speed(1e9))}

    store = Store(tmp_path)
    for planned in plan().values():
        partial = store.partial(planned.name, planned.fingerprint)
        partial.mkdir(parents=True)
        about = {"stage": planned.name, "kind": planned.node.stage.kind, "fingerprint": planned.fingerprint}
        store.publish(partial, stage_record(**about, recipe=planned.recipe))
    assert {planned.state for planned in plan().values()} == {"cached"}
    edit(package / file, (old, new))
    assert plan()[first].reason == f"code of {shown} changed"
    edit(package / file, (new, old))
    assert plan()[first].state == "cached"


def test_code_that_is_not_python_is_one_line(package: Path, fingerprints: Callable[..., dict[str, str]]) -> None:
    path = package / "growth" / "methods" / "fpi.py"
    path.write_text("def grow(:\n")
    with pytest.raises(UserError, match=rf"^{path}: is not Python \(line 1: .*\); correct it$"):
        fingerprints("growth=fpi")


def test_a_method_of_ones_own_is_known_by_its_code_from_the_start(package: Path) -> None:
    shutil.copy(package / "growth" / "methods" / "fpi.py", package / "growth" / "methods" / "mine.py")
    assert code.of({"growth": {"method": "fpi", "depth": [0, 0, 1]}}) == {}
    assert set(code.of({"growth": {"method": "mine", "depth": "stack"}})) == {"growth.method"}
    assert differences(
        recipe("scale_up", 1, {"growth": {"method": "fpi"}}, {}),
        recipe("scale_up", 1, {"growth": {"method": "mine"}}, {}, {"growth.method": "0"}),
    ) == ["growth.method fpi -> mine"]
