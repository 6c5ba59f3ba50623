"""`--help KEY` describes keys by the texts of their fields, with the values that the command line composes."""

from pathlib import Path

import pytest

from aquilamoe.cli import hydra_cli, key_help
from aquilamoe.cli.program import ABLATIONS, GROW, PIPELINE
from aquilamoe.cli.words import Program
from aquilamoe.config.messages import UserError
from aquilamoe.config.reference import keys


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> "Printed":
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return Printed(capsys)


class Printed:
    """What a command line prints, instead of running anything."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, program: Program, *words: str) -> str:
        assert hydra_cli.composed(program, words) == []
        return self.capsys.readouterr().out


def test_a_key_is_described_with_the_value_that_is_in_force(printed: Printed) -> None:
    assert printed(PIPELINE, "--help", "cluster.workers", "cluster=ray") == (
        "cluster.workers = 2  (integer)\n    Data-parallel training processes [processes]\n"
    )


def test_a_group_is_described_with_all_of_its_keys_and_a_stage_with_those_of_its_kind(printed: Printed) -> None:
    topics = ("optimizer", "stages.tokenizer", "stages.moe.router")
    text = printed(PIPELINE, "--help", *topics, "stages.moe.router.z_loss_coeff=0.5")
    assert [line.partition(" ")[0] for line in text.splitlines() if not line.startswith(" ")] == [
        "optimizer",
        *(f"optimizer.{key}" for key in ("name", "betas", "momentum", "eps", "weight_decay", "max_grad_norm", "roles")),
        "optimizer.groups",
        "optimizer.learning_rate_scale",
        "",
        "stages.tokenizer",
        *(f"stages.tokenizer.{key}" for key in ("kind", "inputs", "vocab_size", "path", "sha256")),
        "",
        "stages.moe.router",
        *(
            f"stages.moe.router.{key}"
            for key in ("balance_loss_coeff", "balance_scope", "z_loss_coeff", "bias_update_rate")
        ),
    ]
    assert "stages.moe.router.z_loss_coeff = 0.5  (number)\n" in text


def test_sizes_that_a_growth_may_change_are_described_as_those_of_a_model(printed: Printed) -> None:
    text = printed(GROW, "--help", "model.hidden_size", "model.hidden_size=96", "upcycling.layers")
    assert text.startswith("model.hidden_size = 96  (integer)\n    Width of the residual stream [channels]\n")
    assert "upcycling.layers = null" in text


def test_names_that_a_user_chooses_are_keys_too(printed: Printed) -> None:
    topics = ("ablation.axes.method.baseline", "stages.corpus.sources.en.path")
    text = printed(ABLATIONS, "--help", "ablation=scale_up", *topics)
    assert text.startswith("ablation.axes.method.baseline = fpi  (text)\n")
    assert "stages.corpus.sources.en.path = package://embedded/en_austen.parquet" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("clustr",), "--help clustr: unknown key 'clustr'; did you mean 'cluster'? (valid: action, "),
        (
            ("cluster.worker",),
            "--help cluster.worker: unknown key 'worker'; did you mean 'workers'? (valid: ",
        ),
        (("seed.x",), "--help seed.x: seed has no keys below it; use --help seed"),
    ],
)
def test_a_key_that_is_not_there_is_refused_with_the_nearest_one(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as caught:
        hydra_cli.composed(PIPELINE, ["--help", *words])
    assert str(caught.value).startswith(line)


def test_a_password_is_not_shown(printed: Printed) -> None:
    text = printed(PIPELINE, "--help", "tracking.uri", "tracking.uri=https://me:s3cret-word@host/x")
    assert "s3cret" not in text


def test_every_key_of_a_program_is_in_its_overview(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for program in (PIPELINE, GROW, ABLATIONS):
        text = key_help.overview(program.schema)
        names = [line.split()[0] for line in text.splitlines()[1:] if line.startswith("  ") and line[2] != " "]
        assert names == [key.name for key in keys(program.schema)]
        assert max(map(len, text.splitlines()[1:])) <= 80
