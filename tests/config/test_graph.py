from collections.abc import Callable
from typing import Any

import pytest

from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import PretrainStage

Compose = Callable[..., dict[str, Any]]
Build = Callable[..., dict[str, Node]]

NO_CONTROL = ("stages.control=null", "stages.evaluate.inputs.control=null", "report.control=null")


@pytest.fixture
def build(compose: Compose) -> Build:
    return lambda *overrides: graph.build(graph.parse(compose(*overrides)))


@pytest.fixture
def refusal(build: Build) -> Callable[..., str]:
    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            build(*overrides)
        return str(caught.value)

    return refused


def test_every_stage_comes_after_the_stages_that_it_reads(build: Build) -> None:
    nodes = build()
    order = list(nodes)
    assert all(order.index(source) < order.index(name) for name, node in nodes.items() for source in reads(node))


def test_the_order_does_not_depend_on_where_a_stage_stands_in_the_file(compose: Compose) -> None:
    values = compose()
    values["stages"] = dict(reversed(values["stages"].items()))
    nodes = graph.build(graph.parse(values))
    order = list(nodes)
    assert all(order.index(source) < order.index(name) for name, node in nodes.items() for source in reads(node))


def reads(node: Node) -> list[str]:
    return list(node.stage.inputs.values())


def test_a_cycle_is_named_stage_by_stage(refusal: Callable[..., str]) -> None:
    assert refusal("stages.scale_up.inputs.source=moe") == (
        "stages: scale_up -> moe -> scale_out -> dense -> scale_up is a cycle; make one of them read another stage"
    )


def test_a_stage_cannot_read_itself(refusal: Callable[..., str]) -> None:
    assert "dense -> dense is a cycle" in refusal("stages.dense.inputs.source=dense")


def test_equal_flops_can_close_a_cycle_too(refusal: Callable[..., str]) -> None:
    line = refusal("stages.prepare.total_tokens=null", "stages.prepare.equal_flops=moe")
    assert "prepare -> moe -> scale_out -> dense -> scale_up -> prepare is a cycle" in line


@pytest.mark.parametrize(
    "word",
    [
        "stages.dense.inputs.source=scaleup",
        "stages.control.equal_flops=scaleup",
        "stages.evaluate.inputs.scale_up=scaleup",
        "report.chain=[scaleup]",
        "report.control=scaleup",
    ],
)
def test_an_unknown_stage_is_refused_with_the_nearest_name(refusal: Callable[..., str], word: str) -> None:
    place = word.partition("=")[0]
    assert refusal(word).startswith(f"{place}: there is no stage 'scaleup'; did you mean 'scale_up'? (valid: ")


@pytest.mark.parametrize(
    ("place", "stage"),
    [
        ("stages.dense.inputs.source", "corpus"),
        ("stages.dense.inputs.source", "evaluate"),
        ("stages.evaluate.inputs.moe", "tokenizer"),
        ("stages.control.equal_flops", "tokens"),
        ("report.chain", "corpus"),
        ("report.control", "evaluate"),
    ],
)
def test_a_stage_without_a_checkpoint_is_no_source(refusal: Callable[..., str], place: str, stage: str) -> None:
    value = f"[{stage}]" if place.endswith("chain") else stage
    line = refusal(f"{place}={value}")
    assert line.startswith(f"{place}: stage '{stage}' makes no checkpoint; ")
    assert "valid: control, dense, export, moe, prepare, scale_out, scale_up" in line


def test_an_input_of_the_wrong_kind_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal("stages.dense.inputs.tokens=corpus") == (
        "stages.dense.inputs.tokens: stage 'corpus' is of kind corpus, this input reads tokenize; valid: tokens"
    )


def test_a_stage_declares_which_inputs_it_reads(refusal: Callable[..., str]) -> None:
    assert refusal("stages.export.inputs.source=null") == (
        "stages.export: inputs: 'source' is missing; a export stage reads source"
    )
    assert refusal("+stages.export.inputs.tokens=tokens") == (
        "stages.export: inputs: a export stage does not read 'tokens'; it reads source"
    )


def test_a_stage_set_to_null_is_left_out(build: Build) -> None:
    assert build().keys() - build(*NO_CONTROL).keys() == {"control"}


def test_an_input_set_to_null_is_left_out(build: Build) -> None:
    nodes = build("stages.evaluate.inputs.control=null", "stages.evaluate.inputs.prepare=null")
    assert set(nodes["evaluate"].stage.inputs) == {"tokens", "scale_up", "dense", "scale_out", "moe"}


def test_a_stage_left_out_is_missed_by_its_readers(refusal: Callable[..., str]) -> None:
    assert refusal("stages.control=null").startswith("stages.evaluate.inputs.control: there is no stage 'control'; ")


def test_a_lineage_counts_the_tokens_and_flops_of_its_line_of_checkpoints(build: Build) -> None:
    nodes = build()
    line = [nodes[name] for name in ("prepare", "scale_up", "dense", "scale_out", "moe", "export")]
    for last in range(1, len(line) + 1):
        assert line[last - 1].lineage_tokens == sum(node.tokens for node in line[:last])
        assert line[last - 1].lineage_flops == sum(node.flops for node in line[:last])


def test_the_flops_of_a_stage_are_its_models_per_token_times_its_tokens(build: Build) -> None:
    for node in build().values():
        if node.stage.kind == "pretrain":
            assert node.model is not None
            assert node.flops == node.tokens * node.model.flops_per_token(node.stage.sequence_length)


def test_a_partial_batch_is_not_trained(build: Build) -> None:
    nodes = build("stages.prepare.batch_tokens=4096", "stages.prepare.total_tokens=100_000")
    assert nodes["prepare"].tokens == 24 * 4096


@pytest.mark.parametrize(
    "words", [(), ("stages.prepare.total_tokens=819200",), ("model.hidden_size=48", "seed=3"), ("growth=fpi",)]
)
def test_a_control_at_equal_flops_costs_what_the_other_line_costs_within_one_batch(
    build: Build, words: tuple[str, ...]
) -> None:
    nodes = build(*words)
    control, moe = nodes["control"], nodes["moe"]
    assert control.model is not None
    assert isinstance(control.stage, PretrainStage)
    batch = control.stage.batch_tokens * control.model.flops_per_token(control.stage.sequence_length)
    assert 0 <= moe.lineage_flops - control.lineage_flops < batch


def test_equal_flops_becomes_tokens_before_anything_runs(build: Build) -> None:
    stage = build()["control"].stage
    assert isinstance(stage, PretrainStage)
    assert stage.equal_flops is None
    assert stage.total_tokens is not None and stage.total_tokens % stage.batch_tokens == 0


def test_a_line_that_already_costs_more_cannot_be_made_equal(refusal: Callable[..., str]) -> None:
    line = refusal("stages.control.equal_flops=prepare")
    assert line.startswith("stages.control.equal_flops: the line of 'prepare' costs ")
    assert line.endswith(" a batch; name a stage that costs more")


def test_a_growth_keeps_the_sizes_that_it_does_not_name(build: Build) -> None:
    nodes = build("stages.scale_up.model.hidden_size=128", "stages.scale_up.model.num_hidden_layers=6")
    small, large = nodes["prepare"].model, nodes["scale_up"].model
    assert small is not None
    assert large is not None
    assert (large.hidden_size, large.num_hidden_layers) == (128, 6)
    kept = ("vocab_size", "head_dim", "num_key_value_heads", "rope_theta", "qkv_bias", "tie_word_embeddings")
    assert all(getattr(large, field) == getattr(small, field) for field in kept)


def test_heads_that_a_growth_does_not_name_follow_the_hidden_size(build: Build) -> None:
    words = (
        "model.head_dim=16",
        "stages.scale_up.model.num_attention_heads=null",
        "stages.scale_up.model.hidden_size=96",
    )
    model = build(*words)["dense"].model
    assert model is not None
    assert (model.num_attention_heads, model.head_dim) == (6, 16)


@pytest.mark.parametrize(("hidden_size", "heads"), [(80, 6), (96, 6), (112, 8)], ids=["80", "96", "112"])
def test_heads_that_follow_the_hidden_size_fill_whole_groups(build: Build, hidden_size: int, heads: int) -> None:
    words = (
        *("model.head_dim=16", "model.num_attention_heads=4", "model.num_key_value_heads=2"),
        *("stages.scale_up.model.num_attention_heads=null", f"stages.scale_up.model.hidden_size={hidden_size}"),
    )
    model = build(*words)["dense"].model
    assert model is not None
    assert (model.num_attention_heads, model.num_key_value_heads) == (heads, 2)


def test_a_continued_stage_has_the_model_of_its_source(build: Build) -> None:
    nodes = build()
    assert nodes["dense"].model == nodes["scale_up"].model
    assert nodes["moe"].model == nodes["scale_out"].model == nodes["export"].model
    assert nodes["control"].model == nodes["prepare"].model


def test_a_growth_to_an_impossible_shape_names_the_growth(refusal: Callable[..., str]) -> None:
    assert refusal("model.num_key_value_heads=2", "stages.scale_up.model.num_attention_heads=7").startswith(
        "stages.scale_up.model: num_attention_heads 7 is not a multiple of num_key_value_heads 2; "
    )
    assert refusal("stages.scale_out.model.num_experts=8", "stages.scale_out.model.num_experts_per_tok=9").startswith(
        "stages.scale_out.model: num_experts_per_tok 9 is not between 1 and num_experts 8"
    )


def test_a_sequence_longer_than_the_context_is_refused(refusal: Callable[..., str]) -> None:
    context = "model.max_position_embeddings=512"
    remedy = "exceeds the model's max_position_embeddings 512; lower the one or raise the other"
    for stage in ("prepare", "evaluate"):
        place = f"stages.{stage}.sequence_length"
        assert refusal(context, f"{place}=1024") == f"{place}: 1024 {remedy}"


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal("stages.tokenizer.vocab_size=4096", "model.vocab_size=4095") == (
        "stages.prepare: the model's vocab_size 4095 is smaller than the tokenizer's 4096; raise model.vocab_size"
    )


def test_a_language_that_the_corpus_does_not_have_is_refused(refusal: Callable[..., str]) -> None:
    assert refusal("+data.mixture.zn=0.1") == (
        "stages.prepare.mixture.zn: not in the corpus; did you mean 'zh'? (valid: en, zh)"
    )


def test_moments_are_kept_of_a_growth_only_if_it_grows_them(build: Build, refusal: Callable[..., str]) -> None:
    assert refusal("stages.dense.optimizer_state=keep", "stages.scale_up.optimizer_state=reset") == (
        "stages.dense.optimizer_state: 'scale_up' is a scale_up stage and has no moments to keep; use reset, or "
        "set stages.scale_up.optimizer_state to grow"
    )
    build("stages.dense.optimizer_state=keep", "stages.scale_up.optimizer_state=grow")


def test_moments_can_only_be_kept_or_grown_of_a_stage_that_has_them(build: Build, refusal: Callable[..., str]) -> None:
    of_export = "stages.scale_up.inputs.source=export", "stages.export.inputs.source=prepare"
    assert refusal(*of_export, "stages.scale_up.optimizer_state=grow") == (
        "stages.scale_up.optimizer_state: 'export' is a export stage and has no moments to grow; use reset, or "
        "continue a pretrain stage"
    )
    twice = "stages.scale_out.inputs.source=scale_up", "stages.scale_out.optimizer_state=grow"
    assert refusal(*twice, "stages.scale_up.optimizer_state=reset") == (
        "stages.scale_out.optimizer_state: 'scale_up' is a scale_up stage and has no moments to grow; use reset, or "
        "set stages.scale_up.optimizer_state to grow"
    )
    build(*twice, "stages.scale_up.optimizer_state=grow")


def test_moments_of_another_optimizer_are_not_kept_whether_they_were_grown_or_not(
    build: Build, refusal: Callable[..., str]
) -> None:
    of_prepare = "stages.moe.inputs.source=prepare", "stages.moe.optimizer_state=keep"
    assert refusal(*of_prepare, "stages.moe.optimizer.name=muon") == (
        "stages.moe.optimizer_state: 'prepare' has the moments of adamw, not of muon to keep; use reset, or one "
        "optimizer for both"
    )
    through_growth = "stages.scale_up.optimizer_state=grow", "stages.dense.optimizer_state=keep"
    assert refusal(*through_growth, "stages.prepare.optimizer.name=muon") == (
        "stages.dense.optimizer_state: 'scale_up' has the moments of muon, not of adamw to keep; use reset, or one "
        "optimizer for both"
    )
    build(*through_growth, *(f"stages.{stage}.optimizer.name=muon" for stage in ("prepare", "dense", "control")))
