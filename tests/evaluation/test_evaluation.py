"""What checkpoints write and score, held to transformers on the exported directory and to sums by hand."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.cli import evaluate
from aquilamoe.config import graph
from aquilamoe.config.evaluation import GenerationConfig
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.data.corpus import read_documents, split_file
from aquilamoe.data.loader import validation_batches
from aquilamoe.estimates.duration import Speed
from aquilamoe.evaluation.cloze import CHOICES, write_tasks
from aquilamoe.evaluation.generation import Generator, continuations
from aquilamoe.evaluation.samples import page
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.stage import Input
from aquilamoe.pipeline.store import Store
from aquilamoe.stages._routing import expert_cosines

transformers.utils.logging.disable_progress_bar()

GREEDY = GenerationConfig(max_new_tokens=12)
PROMPTS = {"en": ["the mother of", "walked home"], "zh": ["天下大势"]}
FLAT = ["the mother of", "walked home", "天下大势"]


@dataclass
class Made:
    """A small pipeline that has run: a dense model, its upcycling, both exported and evaluated."""

    experiment: ExperimentConfig
    nodes: Mapping[str, Node]
    store: Store
    done: Mapping[str, Input]

    def model(self, stage: str) -> Path:
        return self.done[stage].directory / "model"

    def arguments(self, **changes: Any) -> tuple[ExperimentConfig, Mapping[str, Node], Store]:
        return self.experiment.model_copy(update=changes), self.nodes, self.store


@pytest.fixture(scope="module")
def made(compose: Callable[..., dict[str, Any]], tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Made:
    values = compose(*tiny)
    stages = values["stages"]
    kept = {name: stages[name] for name in ("corpus", "tokenizer", "tokens", "prepare", "scale_out", "evaluate")}
    kept["scale_out"]["inputs"] = {"source": "prepare", "tokens": "tokens"}
    kept["evaluate"]["inputs"] = {"tokens": "tokens", "prepare": "prepare", "scale_out": "scale_out"}
    kept["evaluate"] |= {"prompts": PROMPTS, "generation": GREEDY.model_dump()}
    for name in ("prepare", "scale_out"):
        kept[f"export_{name}"] = {**stages["export"], "inputs": {"source": name}}
    values |= {"stages": kept, "report": {"chain": ["prepare", "scale_out"], "control": None}}
    experiment = graph.parse(values)
    nodes, store = graph.build(experiment), Store(tmp_path_factory.mktemp("runs"))
    with store.lock():
        done = runner.run(planning.make(nodes, store, Speed(1e9)), store, experiment.cluster, [])
    return Made(experiment, nodes, store, done)


@pytest.fixture(scope="module", params=["prepare", "scale_out"])
def stage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def theirs(made: Made, stage: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(made.model(f"export_{stage}"), dtype=torch.float32)


@torch.no_grad()
def loss_of(model: Any, batches: list[np.ndarray]) -> float:
    rows = torch.from_numpy(np.concatenate(batches))
    logits = model(rows[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def test_transformers_finds_in_the_exported_directory_the_losses_that_the_evaluation_recorded(
    made: Made, stage: str, theirs: Any
) -> None:
    tokens, metrics = made.done["tokens"].directory, made.done["evaluate"].metrics
    for language in PROMPTS:
        batches = list(validation_batches(tokens, language, 32, None, 8))
        assert loss_of(theirs, batches) == pytest.approx(metrics[f"{stage}/{language}/nats_per_token"], abs=1e-5)


def test_a_part_of_the_split_is_evaluated_as_if_it_were_all(made: Made, stage: str, theirs: Any) -> None:
    evaluate = made.experiment.stages["evaluate"].model_copy(update={"validation_tokens": 100, "prompts": {}})
    nodes = graph.build(made.experiment.model_copy(update={"stages": {**made.experiment.stages, "evaluate": evaluate}}))
    plan = planning.make(nodes, made.store, Speed(1e9))
    assert {planned.name for planned in plan if planned.is_computed} <= {"evaluate"}
    metrics = runner.run(plan, made.store, made.experiment.cluster, [])["evaluate"].metrics
    for language in PROMPTS:
        batches = list(validation_batches(made.done["tokens"].directory, language, 32, 100, 8))
        assert sum(len(batch) for batch in batches) == 100 // 32
        assert loss_of(theirs, batches) == pytest.approx(metrics[f"{stage}/{language}/nats_per_token"], abs=1e-5)


def test_transformers_chooses_the_experts_that_the_evaluation_counted(made: Made) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made.model("export_scale_out"), dtype=torch.float32)
    evaluation = made.done["evaluate"]
    (role, table), *others = json.loads((evaluation.directory / "routing.json").read_text()).items()
    assert (role, others) == ("scale_out", []), "a dense checkpoint has no routers"
    distances = []
    for language in PROMPTS:
        rows = torch.from_numpy(
            np.concatenate(list(validation_batches(made.done["tokens"].directory, language, 32, None, 8)))
        )
        with torch.no_grad():
            logits = model(rows[:, :-1], output_router_logits=True).router_logits
        assert len(logits) == len(table["layers"]) == 2
        found = table["languages"][language]
        for layer_ne, load, entropy in zip(logits, found["load"], found["entropy"], strict=True):
            chosen = layer_ne.topk(2).indices.flatten()
            torch.testing.assert_close(
                torch.tensor(load), chosen.bincount(minlength=4) / len(chosen), atol=2e-6, rtol=0
            )
            probabilities = layer_ne.softmax(-1)
            assert entropy == pytest.approx(-(probabilities * probabilities.log()).sum(-1).mean().item(), abs=1e-5)
        distances.append(torch.tensor(table["languages"][language]["load"]))
    expected = (distances[0] - distances[1]).abs().sum(1).mean().item() / 2
    assert evaluation.metrics["scale_out/language_distance"] == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
    assert evaluation.metrics["scale_out/expert_cosine"] == pytest.approx(1, abs=1e-5), "copies are alike"


def test_cosines_between_experts_are_those_of_all_their_weights(made: Made) -> None:
    mlp: Any = load_model(made.model("scale_out")).model.layers[0].mlp
    with torch.no_grad():
        for weights in mlp.experts.parameters():
            weights[1] = -2 * weights[0]
            weights[2] = torch.randn(weights[2].shape, generator=torch.Generator().manual_seed(0))
    flat = torch.cat([weights.detach().flatten(1) for weights in mlp.experts.parameters()], 1)
    expected = torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(expert_cosines(mlp), expected, atol=1e-6, rtol=0)
    assert expected[0, 1] == pytest.approx(-1)


def test_transformers_continues_a_prompt_with_the_same_tokens(made: Made, stage: str, theirs: Any) -> None:
    writer = Generator.open(made.model(f"export_{stage}"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(made.model(f"export_{stage}"))
    for prompt in FLAT:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        assert ids["input_ids"][0].tolist() == writer.encode(prompt)
        whole = theirs.generate(**ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
        new = whole[ids["input_ids"].shape[1] :].tolist()
        (ours,) = continuations(writer.model, [writer.encode(prompt)], GREEDY, writer.eos_token_id)
        assert ours == [token for token in new if token != writer.eos_token_id]


def test_an_evaluation_leaves_samples_of_every_checkpoint_in_its_record(made: Made) -> None:
    output = made.done["evaluate"]
    assert "samples.md" in output.record["files"]
    text = (output.directory / "samples.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## {language}: {prompt}" for language, each in PROMPTS.items() for prompt in each
    ]
    written = Generator.open(made.model("prepare")).continue_texts(FLAT, GREEDY)
    assert page(PROMPTS, {"prepare": written}, GREEDY).splitlines()[8] in text
    assert text.count("| scale_out |") == len(FLAT)


def test_a_sample_cannot_break_the_table_that_it_is_in() -> None:
    text = page({"en": ["a|b\n# c"]}, {"x": ["one | two\n\n| three <b> `"], "y": [""]}, GREEDY)
    assert "## en: a\\|b \\# c" in text
    assert "| x | one \\| two \\| three \\<b> \\` |" in text
    assert "| y | (nothing) |" in text


def test_prompts_together_are_continued_as_each_alone(made: Made, stage: str) -> None:
    writer = Generator.open(made.model(stage))
    assert writer.continue_texts(FLAT, GREEDY) == [writer.continue_texts([each], GREEDY)[0] for each in FLAT]


def test_drawn_text_follows_its_seed(made: Made) -> None:
    writer = Generator.open(made.model("prepare"))
    drawn = [
        writer.continue_texts(FLAT, GenerationConfig(max_new_tokens=20, temperature=1.0, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_text_longer_than_the_model_sees_goes_on_from_its_last_tokens(made: Made) -> None:
    writer = Generator.open(made.model("prepare"))
    window = writer.model.config.max_position_embeddings
    long = [index % 290 for index in range(3 * window)]
    settings = GenerationConfig(max_new_tokens=1)
    assert continuations(writer.model, [long], settings, None) == continuations(
        writer.model, [long[-window:]], settings, None
    )


def test_a_text_that_ends_is_not_continued_further(made: Made) -> None:
    writer = Generator.open(made.model("prepare"))
    (free,) = continuations(writer.model, [[5]], GREEDY, None)
    (ended,) = continuations(writer.model, [[5]], GREEDY, free[3])
    assert ended == free[: free.index(free[3])]


def test_an_empty_prompt_begins_a_text(made: Made) -> None:
    writer = Generator.open(made.model("prepare"))
    assert writer.encode("") == [writer.eos_token_id]
    assert len(writer.continue_texts([""], GREEDY)) == 1


def test_generate_prints_each_prompt_with_its_continuation(made: Made) -> None:
    lines: list[str] = []
    evaluate.generate(*made.arguments(action="generate", checkpoint="prepare", generation=GREEDY), lines.append)
    texts = Generator.open(made.model("prepare")).continue_texts(FLAT, GREEDY)
    assert lines[0] == f"{made.done['prepare'].directory.name}, greedy, 12 tokens at most"
    assert lines[1:] == [f"\n{prompt}│{text}" for prompt, text in zip(FLAT, texts, strict=True)]


def test_a_checkpoint_is_any_directory_that_transformers_opens(made: Made, tmp_path: Path) -> None:
    directory = made.model("export_scale_out")
    elsewhere = tmp_path / "mine"
    elsewhere.symlink_to(directory)
    _, found = evaluate.checkpoint(*made.arguments(checkpoint=str(elsewhere)))
    assert found == elsewhere
    label, found = evaluate.checkpoint(*made.arguments(checkpoint=made.done["scale_out"].record["fingerprint"][:6]))
    assert (label, found) == (made.done["scale_out"].directory.name, made.model("scale_out"))


@pytest.mark.parametrize(
    ("checkpoint", "line"),
    [
        (None, "checkpoint: action=generate needs one; give a stage"),
        ("tokens", "checkpoint: tokens-.* is a tokenize stage and has no checkpoint; give a stage"),
        ("prepar", "checkpoint: prepar: no such output; .*did you mean 'prepare'"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_line(made: Made, checkpoint: str | None, line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        evaluate.checkpoint(*made.arguments(action="generate", checkpoint=checkpoint))
    assert "\n" not in str(caught.value)


def test_without_lm_eval_an_evaluation_names_what_to_install(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'aquilamoe\[evaluation\]'"):
        evaluate.evaluate(*made.arguments(action="evaluate", checkpoint="prepare"))


def test_the_tasks_of_a_corpus_are_its_held_out_text_and_their_true_ending_is_among_the_choices(
    made: Made, tmp_path: Path
) -> None:
    corpus = made.done["corpus"].directory
    assert sorted(write_tasks(corpus, tmp_path, 10)) == ["bits_en", "bits_zh", "cloze_en", "cloze_zh"]
    for language in PROMPTS:
        texts = [
            " ".join(text.split())
            for each in read_documents(split_file(corpus, "validation", language))
            for text in each
        ]
        items = [json.loads(line) for line in (tmp_path / f"cloze_{language}.jsonl").read_text().splitlines()]
        assert len(items) == 10
        assert len({item["answer"] for item in items}) > 1
        for item in items:
            assert len(item["endings"]) == CHOICES
            true = item["context"] + item["endings"][item["answer"]]
            assert any(true in text for text in texts)
            assert 240 <= len(item["context"].encode()) <= 300


def test_the_tasks_of_a_corpus_are_the_same_every_time(made: Made, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_tasks(made.done["corpus"].directory, tmp_path / folder, 5)
    data = [(tmp_path / folder / "cloze_en.jsonl").read_bytes() for folder in ("a", "b")]
    assert data[0] == data[1]


def test_lm_eval_gets_the_likelihoods_that_sums_by_hand_give(made: Made) -> None:
    pytest.importorskip("lm_eval", reason="the extra `evaluation` is not installed")
    changes = {"evaluation": made.experiment.evaluation.model_copy(update={"items": 8})}
    label, rows, path = evaluate.evaluate(*made.arguments(action="evaluate", checkpoint="prepare", **changes))
    assert label == made.done["prepare"].directory.name
    figures = {(task, metric): value for task, metric, value, _ in rows}
    assert {items for *_, items in rows} == {8}
    assert set(json.loads(path.read_text())["results"]) == {"bits_en", "bits_zh", "cloze_en", "cloze_zh"}
    writer = Generator.open(made.model("prepare"))
    (folder,) = (made.store.root / "evaluations" / "tasks").iterdir()
    items = [json.loads(line) for line in (folder / "cloze_en.jsonl").read_text().splitlines()]
    right = [np.argmax([_log(writer, q["context"], end) for end in q["endings"]]) == q["answer"] for q in items]
    assert figures["cloze_en", "acc"] == pytest.approx(np.mean(right))


@torch.no_grad()
def _log(writer: Generator, context: str, ending: str) -> float:
    window = writer.model.config.max_position_embeddings
    row, size = (
        writer.encode(context + ending)[-window - 1 :],
        len(writer.encode(context + ending)) - len(writer.encode(context)),
    )
    logs = writer.model(torch.tensor([row[:-1]]))[0][0].log_softmax(-1)
    return float(sum(logs[at - 1, row[at]] for at in range(len(row) - size, len(row))))
