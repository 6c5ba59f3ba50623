from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from rich.text import Text

from aquilamoe.cli.console import console
from aquilamoe.cli.tables import make_table
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.schema import (
    ClusterConfig,
    Config,
    ExperimentConfig,
    ModelConfig,
    PathsConfig,
    PretrainStage,
    ScheduleConfig,
    TrackingConfig,
    UpcyclingConfig,
)

Compose = Callable[..., dict[str, Any]]
Change = tuple[str, Any]
ACTIONS = "clean, dryrun, evaluate, generate, lineage, list, plan, rebuild, report, run, status, stop, verify, why"


@pytest.fixture
def refusal(compose: Compose) -> Callable[..., str]:
    """The line that answers the default experiment with some values replaced, `("stages.prepare.seed", -1)`."""

    def refused(*changes: Change) -> str:
        values = compose()
        for path, value in changes:
            *parents, last = path.split(".")
            place = values
            for parent in parents:
                place = place[parent]
            place[last] = value
        with pytest.raises(UserError) as caught:
            graph.build(graph.parse(values))
        return str(caught.value)

    return refused


def keys(model: type[Config]) -> str:
    return ", ".join(sorted(model.model_fields))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            ("trackin", {}),
            f"trackin: unknown key; did you mean 'tracking'? (valid: {keys(ExperimentConfig)})",
        ),
        *(
            (
                ("tracking.uri", uri),
                f"tracking.uri: '{uri}' is not the address of a server or database ({scheme}; use http://HOST:PORT, "
                "sqlite:///FILE, or null for a database in paths.root",
            )
            for uri, scheme in (
                ("file:///runs/mlruns", "valid: databricks, http, https, mssql, mysql, postgresql, sqlite)"),
                (
                    "htpp://h",
                    "did you mean 'http'? (valid: databricks, http, https, mssql, mysql, postgresql, sqlite))",
                ),
                ("runs/mlruns", "valid: databricks, http, https, mssql, mysql, postgresql, sqlite)"),
            )
        ),
        (
            ("upcycling.noize", 0.1),
            f"upcycling.noize: unknown key; did you mean 'noise'? (valid: {keys(UpcyclingConfig)})",
        ),
        (
            ("stages.prepare.learning_rat", 1e-3),
            f"stages.prepare.learning_rat: unknown key; did you mean 'learning_rate'? (valid: {keys(PretrainStage)})",
        ),
        (
            ("stages.prepare.schedule.warmup", 1),
            "stages.prepare.schedule.warmup: unknown key; did you mean 'warmup_tokens'? "
            f"(valid: {keys(ScheduleConfig)})",
        ),
        (
            ("stages.export.compression", 1),
            "stages.export.compression: unknown key; valid: dtype, inputs, kind",
        ),
        (
            ("seed", "abc"),
            "seed: 'abc' is refused: input should be a valid integer, unable to parse string as an integer "
            "(Seed of initialisation, growth and data order, of every stage)",
        ),
        (
            ("stages.prepare.total_tokens", 1.5),
            "stages.prepare.total_tokens: 1.5 is refused: input should be a valid integer, got a number with a "
            "fractional part (Budget; null with equal_flops [tokens])",
        ),
        (
            ("stages.prepare.optimizer", "adamw"),
            "stages.prepare.optimizer: 'adamw' is refused: input should be a valid dictionary or instance of "
            "OptimizerConfig (Optimizer; a null key is as in the group optimizer)",
        ),
        (
            ("stages.prepare", 3),
            "stages.prepare: 3 is refused: input should be a valid dictionary or object to extract fields from (Graph "
            "of stages, by name; a null stage is left out of the default experiment)",
        ),
        (
            ("stages", [1]),
            "stages: [1] is refused: input should be a valid dictionary (Graph of stages, by name; a null stage is "
            "left out of the default experiment)",
        ),
        (
            ("cluster.workers", 0),
            "cluster.workers: 0 is refused: input should be greater than 0 (Data-parallel training processes "
            "[processes])",
        ),
        (("cluster.workers", True), "cluster.workers: true is not a number; give it one"),
        (
            ("stages.prepare.learning_rate", float("inf")),
            "stages.prepare.learning_rate: inf is refused: input should be a finite number (Peak learning rate "
            "[dimensionless])",
        ),
        (
            ("action", "paln"),
            f"action: 'paln' is not a choice; did you mean 'plan'? (valid: {ACTIONS}) (What the command does; --help "
            "describes each action)",
        ),
        (
            ("stages.export.dtype", "int8"),
            "stages.export.dtype: 'int8' is not a choice; valid: bfloat16, float16, float32 (Data type of the exported "
            "weights)",
        ),
        (
            ("stages.prepare.kind", "pretrian"),
            "stages.prepare.kind: 'pretrian' is not a choice; did you mean 'pretrain'? "
            "(valid: checkpoint, corpus, evaluate, export, pretrain, scale_out, scale_up, tokenize, tokenizer)",
        ),
        (
            ("stages.new", {}),
            "stages.new.kind: required but not set; "
            "valid: checkpoint, corpus, evaluate, export, pretrain, scale_out, scale_up, tokenize, tokenizer",
        ),
        (
            ("stages.new", {"kind": "export", "inputs": {"source": "moe"}}),
            "stages.new.dtype: required but not set; give it a value, e.g. +stages.new.dtype=VALUE (Data type of the "
            "exported weights)",
        ),
        (
            ("optimizer.betas", [0.9]),
            "optimizer.betas.1: required but not set; give it a value, e.g. +optimizer.betas.1=VALUE (AdamW: decay "
            "rates of the two moments [fractions])",
        ),
        (
            ("optimizer.betas", [0.9, 2]),
            "optimizer.betas.1: 2 is refused: input should be less than or equal to 1 (AdamW: decay rates of the two "
            "moments [fractions])",
        ),
        (
            ("stages.a/b", {"kind": "corpus"}),
            "stages.a/b: 'a/b' is refused: string should match pattern '^[A-Za-z0-9][A-Za-z0-9_.-]*$' (Graph of "
            "stages, by name; a null stage is left out of the default experiment)\n"
            "stages.a/b.inputs: required but not set; give it a value, e.g. +stages.a/b.inputs=VALUE (Stages that it "
            "reads, by role; null takes one of the template away)\n"
            "stages.a/b.sources: required but not set; give it a value, e.g. +stages.a/b.sources=VALUE (Parts of the "
            "corpus, by language)",
        ),
        (
            ("stages.scale_up.model.hiden_size", 256),
            f"stages.scale_up.model.hiden_size: unknown key; did you mean 'hidden_size'? (valid: {keys(ModelConfig)})",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_place_its_value_and_the_valid_names(
    refusal: Callable[..., str], change: Change, line: str
) -> None:
    assert refusal(change) == line


def test_a_misspelt_key_is_named_before_the_key_that_is_missing_for_it(refusal: Callable[..., str]) -> None:
    first, second = refusal(("report", {"chian": [], "control": None})).splitlines()
    assert first == "report.chian: unknown key; did you mean 'chain'? (valid: chain, control)"
    assert second.startswith("report.chain: required but not set")


def test_all_problems_are_named_at_once_a_line_each(refusal: Callable[..., str]) -> None:
    lines = refusal(("seed", -1), ("cluster.workers", "x"), ("paths.root", None)).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["seed", "cluster.workers", "paths.root"]


def test_of_many_problems_the_first_are_named_and_the_others_counted(refusal: Callable[..., str]) -> None:
    wrong = [(f"stages.prepare.{key}", "x") for key in ("seed", "batch_tokens", "sequence_length", "learning_rate")]
    lines = refusal(("seed", -1), ("cluster.workers", "x"), *wrong).splitlines()
    assert len(lines) == 4
    assert lines[-1] == "and 3 more problems; correct these first"


@pytest.mark.parametrize(
    ("key", "offered"),
    [
        ("hidden_size", "'model.hidden_size' or 'stages.prepare.model.hidden_size'"),
        ("stages.dense.hidden_size", "'model.hidden_size' or "),
        ("max_grad_norm", "'optimizer.max_grad_norm' or "),
    ],
)
def test_a_key_at_the_wrong_place_is_offered_where_it_is_one(
    refusal: Callable[..., str], key: str, offered: str
) -> None:
    assert refusal((key, 128)).startswith(f"{key}: unknown key; did you mean {offered}")


def test_a_mistake_in_a_shared_group_counts_once_however_many_stages_refer_to_it(refusal: Callable[..., str]) -> None:
    optimizer = {
        "name": "adamw",
        "betas": [0.9, 0.95],
        "momentum": 0.95,
        "eps": -1,
        "weight_decay": 0,
        "max_grad_norm": 1,
    }
    stages = [(f"stages.{name}.optimizer", optimizer) for name in ("prepare", "dense", "moe", "control")]
    line = refusal(("optimizer", optimizer), *stages)
    assert line.startswith("optimizer.eps: -1 is refused: input should be greater than 0 (")
    assert line.count("\n") == 0


def test_a_long_value_is_cut_to_keep_the_line_readable(refusal: Callable[..., str]) -> None:
    assert len(refusal(("seed", list(range(1000))))) < 200


def test_a_refused_value_and_a_missing_key_print_what_the_key_means(refusal: Callable[..., str]) -> None:
    owners: dict[str, type[BaseModel]] = {
        "cluster.mfu": ClusterConfig,
        "tracking.enabled": TrackingConfig,
        "paths.root": PathsConfig,
    }
    for key, model in owners.items():
        name = key.rpartition(".")[2]
        assert refusal((key, [[]])).endswith(f" ({model.model_fields[name].description})")
    assert refusal(("json", "perhaps")).endswith(f" ({ExperimentConfig.model_fields['as_json'].description})")


def test_nearest_offers_a_name_only_if_one_is_near() -> None:
    assert nearest("fip", ["fpi", "aki"]) == "did you mean 'fpi'? (valid: aki, fpi)"
    assert nearest("zzz", ["fpi", "aki"]) == "valid: aki, fpi"
    assert nearest("zzz", []) == "there is none"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "stages.dense.learning_rat=1",
            "error: stages.dense.learning_rat: unknown key; did you mean 'learning_rate'? "
            f"(valid: {keys(PretrainStage)})",
        ),
        (
            "+stages.dense.learning_rat=1",
            "error: stages.dense.learning_rat: unknown key; did you mean 'learning_rate'? "
            f"(valid: {keys(PretrainStage)})",
        ),
        (
            "upcycling=copi",
            "error: upcycling=copi: there is no conf/upcycling/copi.yaml; did you mean 'copy'? (valid: ",
        ),
        ("experiment=7a", "error: experiment=7a: there is no conf/experiment/7a.yaml; did you mean '7b'? (valid: "),
        ("+experiment=7a", "error: experiment=7a: there is no conf/experiment/7a.yaml; did you mean '7b'? (valid: "),
        ("stages.prepare.total_tokens=100", "error: stages.prepare: total_tokens 100 is smaller than one batch "),
        ("seed", "error: seed: is not a setting; write KEY=VALUE"),
    ],
)
def test_a_mistake_ends_the_command_with_one_line_and_status_1_before_anything_is_written(
    command: Callable[..., Any], tmp_path: Path, word: str, line: str
) -> None:
    completed = command(word, cwd=tmp_path)
    assert completed.returncode == 1
    assert completed.stdout == ""
    assert completed.stderr.startswith(line)
    assert completed.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


NAMES = ["\x1b[2J\x1b[31mred", "a\rb", "line\nforged: line", "\x9b31m", "\u202egnp.exe", "\ud800", "\x07\x08\x7f"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_a_terminal_would_obey_is_escaped_in_every_message(name: str) -> None:
    line = str(UserError(f"model.safetensors: tensor '{name}' is missing; copy 你好 é 👩‍🔬 again"))
    assert line.isascii() or {c for c in line if not c.isascii()} <= set("你好é👩‍🔬")
    assert not set(line) & set(name) - {character for character in name if character.isprintable()}
    assert line.endswith("' is missing; copy 你好 é 👩‍🔬 again")
    assert str(UserError(line)) == line


def test_a_name_as_long_as_its_file_does_not_fill_the_terminal() -> None:
    line = str(UserError(f"model.safetensors: tensor '{'x' * 10**6}' is missing; copy it again"))
    assert len(line) < 5000
    assert line.endswith("' is missing; copy it again")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_a_terminal_would_obey_is_escaped_in_lines_and_tables(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = console()
    table = make_table("tensor", "shape")
    table.add_row(name, "2 x 3")
    table.add_row(Text(name), "4")
    out.print(table)
    out.print(f"  grow  {name}")
    shown = capfd.readouterr().out
    assert [c for c in shown if c != "\n" and not c.isprintable()] == []
    assert "\u202e" not in shown
