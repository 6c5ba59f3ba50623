"""A checkpoint from elsewhere as the beginning of a pipeline: what it is, what is made of it, what it cost before."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outside
from aquilamoe.ablation.controls import controls
from aquilamoe.checkpoint import digests
from aquilamoe.cli import commands
from aquilamoe.config import graph
from aquilamoe.config.ablation import ControlsConfig
from aquilamoe.config.messages import UserError
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Store
from aquilamoe.stages import checkpoint as stage

pytestmark = pytest.mark.process

Compose = Callable[..., dict[str, Any]]
UNTRACKED = "tracking.enabled=false"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outside.write_checkpoint(tmp_path_factory.mktemp("hub") / "small")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return outside.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def plan(compose: Compose, corpus: dict[str, str], tmp_path: Path) -> Callable[..., dict[str, Planned]]:
    """The plan of the experiment from a checkpoint, by stage."""

    def planned(checkpoint: Path, *more: str) -> dict[str, Planned]:
        experiment = graph.parse(compose(*outside.words(checkpoint, corpus, tmp_path / "runs"), *more))
        found = planning.make(graph.build(experiment), Store.of(experiment.paths), Speed(1e9))
        return {each.name: each for each in found}

    return planned


@pytest.fixture(scope="module")
def finished(
    source: Path, corpus: dict[str, str], compose: Compose, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """The store of the whole experiment, run once, and the words of the command."""
    root = tmp_path_factory.mktemp("finished") / "runs"
    words = [*outside.words(source, corpus, root), UNTRACKED]
    commands.execute(compose(*words), "")
    return root, words


def output(root: Path, name: str) -> Path:
    (found,) = (root / "stages").glob(f"{name}-*")
    return found


def record(root: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((output(root, name) / "record.json").read_text()))


def test_its_recipe_is_its_files_wherever_they_are(
    plan: Callable[..., dict[str, Planned]], source: Path, tmp_path: Path
) -> None:
    here, there = plan(source), plan(outside.copied(source, tmp_path / "moved"))
    assert {name: each.fingerprint for name, each in here.items()} == {n: e.fingerprint for n, e in there.items()}
    assert str(source) not in json.dumps(here["prepare"].recipe)


def test_changed_weights_make_another_stage_and_others_of_all_that_read_it(
    plan: Callable[..., dict[str, Planned]], source: Path, tmp_path: Path
) -> None:
    changed = outside.copied(source, tmp_path / "changed")
    path = changed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    before, after = plan(source), plan(changed)
    different = {name for name in before if before[name].fingerprint != after[name].fingerprint}
    assert different == set(before) - {"corpus"}


def test_a_file_that_has_not_changed_is_not_read_again(
    plan: Callable[..., dict[str, Planned]], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(source)["prepare"].fingerprint

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(digests, "sha256", refuse)
    assert plan(source)["prepare"].fingerprint == first


def test_a_damaged_note_of_digests_only_costs_time(
    plan: Callable[..., dict[str, Planned]], source: Path, tmp_path: Path
) -> None:
    first = plan(source)["prepare"].fingerprint
    for text in ("{", "[]", json.dumps({str(source): {"files": 1}}), json.dumps({str(source): 3})):
        (tmp_path / "runs" / stage.KNOWN).write_text(text)
        assert plan(source)["prepare"].fingerprint == first


def test_sizes_are_multiples_of_the_checkpoints(plan: Callable[..., dict[str, Planned]], source: Path) -> None:
    model = plan(source)["scale_up"].node.model
    assert model is not None
    assert (model.hidden_size, model.intermediate_size, model.num_hidden_layers) == (48, 80, 2)
    assert model.num_attention_heads == 12
    with pytest.raises(UserError, match=r"num_hidden_layers: x1\.3 of 2, the source's, is 2\.6, no whole number"):
        plan(source, "stages.scale_up.model.num_hidden_layers=x1.3")
    with pytest.raises(UserError, match=r"num_experts: x2 of 0, the source's, is no size"):
        plan(source, "stages.scale_out.model.num_experts=x2")


def test_the_control_trains_the_checkpoint_itself_to_the_same_flops(
    plan: Callable[..., dict[str, Planned]], source: Path
) -> None:
    nodes = {name: each.node for name, each in plan(source, "stages.prepare.flops=1e21").items()}
    control, moe = nodes["control"], nodes["moe"]
    a_batch = control.flops / control.tokens * 128
    assert control.stage.inputs["source"] == "prepare"
    assert 0 <= moe.lineage_flops - control.lineage_flops < a_batch


def test_nothing_trained_from_scratch_stands_beside_what_was_spent_elsewhere(
    plan: Callable[..., dict[str, Planned]], source: Path
) -> None:
    nodes = {name: each.node for name, each in plan(source).items()}
    assert {each.kind for each in controls(nodes, "dense", ControlsConfig())} == {
        "continued_prepare_flops",
        "continued_prepare_tokens",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint=null"], "stages.prepare.path: no checkpoint is named; set it to a directory"),
        (["checkpoint=/nowhere/at/all"], "stages.prepare.path: /nowhere/at/all: no such directory"),
        (["checkpoint=hf://one"], "'hf://one' is no address of the hub; write hf://ORG/NAME"),
        (["stages.prepare.tokens_seen=-1"], "stages.prepare.tokens_seen: -1 is refused"),
        (["stages.tokenizer.inputs.checkpoint=dense"], "is a cycle"),
        (["stages.tokenizer.inputs={corpus: corpus, checkpoint: null}"], "vocab_size null takes the size of"),
        (
            ["stages.tokenizer.inputs={corpus: corpus, checkpoint: null}", "stages.tokenizer.vocab_size=320"],
            "has the ids of tokenizer 'tokenizer', 'prepare' those of 'prepare'",
        ),
        (["stages.control.optimizer_state=keep"], "'prepare' is a checkpoint stage and has no moments to keep"),
    ],
)
def test_a_mistake_is_one_line(
    plan: Callable[..., dict[str, Planned]], source: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as refusal:
        plan(source, *words)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_that_training_cannot_compute_is_refused_in_a_line_that_names_growing(
    plan: Callable[..., dict[str, Planned]], source: Path, tmp_path: Path
) -> None:
    scaled = outside.copied(source, tmp_path / "scaled")
    config = json.loads((scaled / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e5}
    (scaled / "config.json").write_text(json.dumps(config | {"rope_scaling": rope, "rope_parameters": rope}))
    with pytest.raises(UserError, match=r"is grown and upcycled \(efficientscale grow\), but not computed") as refusal:
        plan(scaled)
    assert "\n" not in str(refusal.value)


def test_it_takes_the_place_of_a_stage_that_trains_on_the_command_line(
    compose: Compose, source: Path, tmp_path: Path
) -> None:
    words = [
        f"++stages.prepare={{kind: checkpoint, path: '{source}'}}",
        "++stages.tokenizer.inputs.checkpoint=prepare",
        "stages.tokenizer.vocab_size=null",
        "stages.control.optimizer_state=reset",
        "stages.scale_up.model={hidden_size: x2, intermediate_size: x2, num_hidden_layers: 4, num_attention_heads: 12}",
        *(f"stages.{name}.sequence_length=32" for name in ("dense", "moe", "control", "evaluate")),
        f"paths.root={tmp_path}",
    ]
    experiment = graph.parse(compose(*words))
    node = graph.build(experiment)["prepare"]
    assert node.is_external
    assert node.stage.inputs == {}


def test_what_is_stated_of_it_and_what_is_unknown_is_printed_instead_of_zero(
    compose: Compose, corpus: dict[str, str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = outside.words(source, corpus, tmp_path / "runs")
    commands.execute(compose(*words, "action=plan"), "")
    unknown = capsys.readouterr().out
    assert "unknown + " in unknown
    commands.execute(
        compose(*words, "action=plan", "stages.prepare.tokens_seen=2_000_000_000_000", "stages.prepare.flops=1.6e21"),
        "",
    )
    known = capsys.readouterr().out
    assert "unknown" not in known
    assert "2T" in known
    assert "1.6e21 + " in known


def test_the_store_is_complete_without_the_original(
    finished: tuple[Path, list[str]], compose: Compose, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, words = finished
    source.rename(source.with_name("away"))
    try:
        experiment = graph.parse(compose(*words))
        planned = planning.make(graph.build(experiment), Store.of(experiment.paths), Speed(1e9))
    finally:
        source.with_name("away").rename(source)
    assert {each.state for each in planned} == {"cached"}
    prepared = output(root, "prepare") / "model"
    assert {path.name for path in prepared.iterdir()} == {path.name for path in source.iterdir()}
    assert all((prepared / path.name).read_bytes() == path.read_bytes() for path in source.iterdir())


def test_the_export_opens_in_transformers_as_the_checkpoint_did(finished: tuple[Path, list[str]], source: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    exported = output(finished[0], "export") / "model"
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(exported)
    text = "the garden of her mother. 天下大势"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.chat_template == before.chat_template == outside.TEMPLATE
    own, copied = GenerationConfig.from_pretrained(source), GenerationConfig.from_pretrained(exported)
    assert own.to_dict() == copied.to_dict()
    model = AutoModelForCausalLM.from_pretrained(exported).eval()
    config = model.config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.num_local_experts == 4
    assert torch.isfinite(model(torch.tensor([after(text)["input_ids"]])).logits).all()
    assert (exported / "LICENSE").is_file()


@pytest.mark.parametrize("stage_name", ["scale_up", "dense", "scale_out", "moe", "control"])
def test_every_checkpoint_of_its_line_has_its_tokenizer_template_and_special_tokens(
    finished: tuple[Path, list[str]], source: Path, stage_name: str
) -> None:
    made = output(finished[0], stage_name) / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (made / name).read_bytes() == (source / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, made))
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "vocab_size"):
        assert after.get(key, after["rope_parameters"].get(key)) == before.get(key, before["rope_parameters"].get(key))


def test_the_corpus_is_tokenised_by_it_and_documents_end_with_its_end(
    finished: tuple[Path, list[str]], source: Path
) -> None:
    from tokenizers import Tokenizer

    from aquilamoe.data.tokens import TokenFile, read_record, token_prefix

    tokens = output(finished[0], "tokens")
    noted = read_record(tokens)
    assert (noted.vocab_size, noted.eos_token_id) == (outside.VOCABULARY, 1)
    file = TokenFile(token_prefix(tokens, "train", "en"))
    first = file.tokens_n[: file.lengths_d[0]].tolist()
    text = json.loads(Path(finished[1][2].partition("=")[2]).read_text().splitlines()[1])["text"]
    expected = Tokenizer.from_file(str(source / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert first == [*expected, 1]


def test_growing_it_keeps_its_function_and_training_begins_where_it_was(finished: tuple[Path, list[str]]) -> None:
    root = finished[0]
    certificate = record(root, "scale_up")["metrics"]
    assert certificate["preserving"]
    assert certificate["passed"]
    dense, control = (record(root, name)["metrics"] for name in ("dense", "control"))
    assert dense["loss_start"] == pytest.approx(control["loss_start"], abs=2e-2)  # the grown one is rounded to bfloat16


def test_lineage_and_report_state_that_what_is_behind_it_is_unknown(
    finished: tuple[Path, list[str]], compose: Compose, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, words = finished
    commands.execute(compose(*words, "action=lineage", "checkpoint=export", f"source={source}"), "")
    lineage = capsys.readouterr().out
    assert "unknown, before it came here" in lineage
    assert "unknown + " in lineage
    page = (root / "reports" / "from_checkpoint" / "index.html").read_text()
    assert "A checkpoint from elsewhere" in page
    assert "unknown + " in page


@pytest.mark.parametrize("name", ["prepare", "scale_up"])
def test_it_and_what_was_made_of_it_are_rebuilt_with_the_same_bytes(
    finished: tuple[Path, list[str]], compose: Compose, source: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.execute(compose(*finished[1], "action=rebuild", f"checkpoint={name}", f"source={source}"), "")
    assert "identical: " in capsys.readouterr().out


def test_the_dry_run_rehearses_it(
    compose: Compose, corpus: dict[str, str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.execute(compose(*outside.words(source, corpus, tmp_path), "action=dryrun", UNTRACKED), "")
    assert "All 11 stages ran" in capsys.readouterr().out


def test_a_run_killed_while_it_takes_the_checkpoint_and_while_it_trains_ends_with_the_bytes_of_one_that_was_not(
    finished: tuple[Path, list[str]],
    command: Callable[..., "subprocess.CompletedProcess[str]"],
    ambush: Callable[[str, str], dict[str, str]],
    tmp_path: Path,
) -> None:
    root, words = finished
    words = [*words, f"paths.root={tmp_path / 'runs'}", "until=moe"]
    for point in (r"prepare-\w+\.partial/model/tokenizer\.json$", r"dense-\w+\.partial/checkpoints/.*step-0*4\b"):
        killed = command(*words, cwd=tmp_path, **ambush(point, "kill"))
        assert killed.returncode == -signal.SIGKILL, (point, killed.stderr)
    completed = command(*words, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    assert record(tmp_path / "runs", "dense")["resumed"]
    for name in ("prepare", "tokenizer", "tokens", "scale_up", "dense", "scale_out", "moe"):
        assert digests_of(tmp_path / "runs", name) == digests_of(root, name), name


def digests_of(root: Path, name: str) -> dict[str, str]:
    """SHA-256 of every file of a stage, but the curves, which have times in them."""
    files = record(root, name)["files"].items()
    return {file: each["sha256"] for file, each in files if file != "metrics.jsonl"}
