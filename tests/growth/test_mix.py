"""Several checkpoints as the experts of one: what is shared, what routers find in text, measures and refusals."""

import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import aquilamoe
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.cli.commands import execute
from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import mix, mix_certificate, mix_router
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.lineage.artifacts import read_artifact
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.model.transformer import Decoder
from small_checkpoints import logits, model, tensor, tokens, upcycling

SIZES: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 4, "vocab_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"qkv_bias": False},
    "qwen2_moe": {},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": "head"},
}
NAMES = ("first", "second", "third")


def dense(**changes: Any) -> ModelConfig:
    return model(**SIZES | changes)


def mixed(source: ModelConfig, count: int = 2, chosen: int = 1, **changes: Any) -> ModelConfig:
    sizes = {"num_experts": count, "num_experts_per_tok": chosen, "moe_intermediate_size": None}
    return ModelConfig.model_validate(source.model_dump() | sizes | changes)


def method(count: int = 2, **changes: Any) -> Any:
    return upcycling(**{"method": "mix", "texts": NAMES[:count]} | changes)


@torch.no_grad()
def write(directory: Path, config: ModelConfig, seed: int, dtype: torch.dtype = torch.float64) -> Path:
    """A source that differs from others in every tensor."""
    decoder, random = Decoder(config).double(), torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        scale = 2.0 if "embed" in name else parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
        parameter.copy_(scale * noise + ("norm" in name))
    save_model(decoder, directory, dtype, eos_token_id=3)
    return directory


def texts(count: int = 2, rows: int = 16, length: int = 16, seed: int = 0) -> list[torch.Tensor]:
    """Random tokens, each source's out of a part of the vocabulary of its own."""
    random, part = torch.Generator().manual_seed(seed), SIZES["vocab_size"] // count
    return [torch.randint(part, (rows, length), generator=random) + number * part for number in range(count)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": (1,)}])
def test_equal_sources_make_the_files_that_copies_make(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    sources = [write(tmp_path / name, dense(), 0, dtype) for name in NAMES]
    target = mixed(dense(), 3, 2, **changes)
    mix.mix(sources, tmp_path / "mix", target, method(3, weights=(0.1, 0.7, 0.3)), 5)
    scale_out(sources[0], tmp_path / "copies", target, upcycling(), 5)
    for path in sorted((tmp_path / "copies").iterdir()):
        assert (tmp_path / "mix" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("router", ["normal", "ridge", "hidden"])
def test_another_order_of_the_sources_is_another_order_of_the_experts_only(router: str, tmp_path: Path) -> None:
    config, order = dense(), (2, 0, 1)
    sources = [write(tmp_path / name, config, seed) for seed, name in enumerate(NAMES)]
    found, weights = texts(3), (1.0, 2.0, 4.0)
    how = method(3, router_init=router, weights=weights)
    others = method(3, router_init=router, weights=[weights[place] for place in order])
    for name, places, settings in (("one", range(3), how), ("other", order, others)):
        directories, target = [sources[place] for place in places], mixed(config, 3, 2)
        routers = None
        if router != "normal":
            routers = mix_router.fit(directories, target, settings, 0, [found[place] for place in places])
        mix.mix(directories, tmp_path / name, target, settings, 0, routers=routers)
    with Reader(tmp_path / "one") as one, Reader(tmp_path / "other") as other:
        for name in one.names:
            role = name.split(".", 3)[-1]
            if role == tensor_names.ROUTER:
                if router != "normal":
                    assert torch.allclose(one.get(name)[list(order)], other.get(name), rtol=1e-9, atol=1e-12)
            elif ".experts." in name:
                before, _, rest = name.partition(".experts.")
                number, _, projection = rest.partition(".")
                there = f"{before}.experts.{order.index(int(number))}.{projection}"
                assert torch.equal(one.get(name), other.get(there)), name
            else:
                assert torch.equal(one.get(name), other.get(name)), name


@pytest.mark.parametrize("router", ["ridge", "hidden"])
def test_tokens_that_only_one_source_reads_go_to_its_expert(router: str, tmp_path: Path) -> None:
    config = dense(hidden_size=48, head_dim=8)
    sources = [write(tmp_path / name, config, seed) for seed, name in enumerate(NAMES[:2])]
    how, target = method(router_init=router), mixed(config)
    routers = mix_router.fit(sources, target, how, 0, texts(rows=64))
    mix.mix(sources, tmp_path / "mix", target, how, 0, routers=routers)
    decoder, shares = load_model(tmp_path / "mix", torch.float64), []
    for number, text_bt in enumerate(texts(rows=64, seed=1)):
        with torch.no_grad():
            routings = decoder(text_bt)[1]
        shares += [(routing.experts_nk[:, 0] == number).double().mean().item() for routing in routings]
    assert min(shares) > 0.95 if router == "ridge" else sum(shares) / len(shares) > 0.55


def test_the_ridge_router_solves_the_normal_equations() -> None:
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(count, 6, generator=random, dtype=torch.float64) + place for place, count in enumerate((40, 10))
    ]
    rows_ed = mix_router.router(inputs, method(router_init="ridge", ridge=0.1))
    moments_dd = torch.stack([x_nd.T @ x_nd / len(x_nd) for x_nd in inputs]).sum(dim=0)
    penalised_dd = moments_dd + 0.1 * moments_dd.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    means_ed = torch.stack([x_nd.mean(dim=0) for x_nd in inputs])
    factors_e = (rows_ed @ penalised_dd / means_ed).mean(dim=1)
    assert torch.allclose(rows_ed @ penalised_dd, factors_e[0] * means_ed, rtol=1e-9)

    # The factor is the best for the softmax of the scores: both neighbours have a larger cross entropy.
    def loss(factor: float) -> float:
        labels = enumerate(inputs)
        return sum(-(factor * x_nd @ rows_ed.T).log_softmax(dim=1)[:, label].mean().item() for label, x_nd in labels)

    assert loss(1.0) < min(loss(0.95), loss(1.05))


def test_shared_tensors_are_a_weighted_average_or_those_of_the_first(tmp_path: Path) -> None:
    sources = [write(tmp_path / name, dense(), seed) for seed, name in enumerate(NAMES[:2])]
    name, expert = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight"
    one, other = (tensor(source, name) for source in sources)
    for how, expected in ((method(weights=(1, 3)), 0.25 * one + 0.75 * other), (method(shared="base"), one)):
        shutil.rmtree(tmp_path / "mix", ignore_errors=True)
        mix.mix(sources, tmp_path / "mix", mixed(dense()), how, 0)
        assert torch.allclose(tensor(tmp_path / "mix", name), expected, rtol=1e-12, atol=0)
        assert torch.equal(tensor(tmp_path / "mix", expert), tensor(sources[1], expert.replace("experts.1.", "")))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_opens_a_mix_and_computes_it(family: str, tmp_path: Path) -> None:
    config = dense(**FAMILIES[family])
    sources = [write(tmp_path / name, config, seed) for seed, name in enumerate(NAMES[:2])]
    mix.mix(sources, tmp_path / "mix", mixed(config, 2, 2), method(), 0)
    opened: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mix", experts_implementation="eager", output_loading_info=True
    )
    assert not opened[1]["missing_keys"] and not opened[1]["unexpected_keys"]
    with torch.no_grad():
        theirs = opened[0](tokens()).logits
    assert (logits(tmp_path / "mix") - theirs).abs().max() < 1e-4


def test_the_certificate_has_the_losses_of_every_source_on_every_text(tmp_path: Path) -> None:
    config, found = dense(), texts()
    sources = [write(tmp_path / name, config, seed) for seed, name in enumerate(NAMES[:2])]
    how, target = method(router_init="ridge"), mixed(config)
    routers = mix_router.fit(sources, target, how, 0, found)
    mix.mix(sources, tmp_path / "mix", target, how, 0, routers=routers)
    certificate = mix_certificate.certify(sources, tmp_path / "mix", [("a", found[0]), ("b", found[1])], tolerance=1e-3)

    @torch.no_grad()
    def loss(directory: Path, text_bt: torch.Tensor) -> float:
        found = load_model(directory, torch.float64)(text_bt[:, :-1])[0]
        return torch.nn.functional.cross_entropy(found.flatten(0, 1), text_bt[:, 1:].flatten()).item()

    for source, losses in zip(sources, certificate["mix"]["losses"], strict=True):
        assert losses == pytest.approx([loss(source, text_bt) for text_bt in found], rel=1e-9)
    mix_losses = [loss(tmp_path / "mix", text_bt) for text_bt in found]
    assert certificate["mix"]["mix_losses"] == pytest.approx(mix_losses, rel=1e-9)
    assert certificate["target_loss"] == pytest.approx(sum(mix_losses) / 2, rel=1e-9)
    own = [certificate["mix"]["losses"][number][number] for number in range(2)]
    assert certificate["source_loss"] == pytest.approx(sum(own) / 2, rel=1e-9)
    assert not certificate["preserving"] and min(certificate["mix"]["own_expert"]) > 0.5
    json.dumps(certificate, allow_nan=False)


def letters(folder: Path) -> tuple[list[Path], list[Path]]:
    """Two sources with a tokenizer of single letters, and a file of text for each, of half of the alphabet."""
    vocabulary = {letter: number for number, letter in enumerate(string.ascii_lowercase)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    random, halves = Random(0), (string.ascii_lowercase[:13], string.ascii_lowercase[13:])
    files = [folder / f"{name}.txt" for name in NAMES[:2]]
    for file, half in zip(files, halves, strict=True):
        file.write_text("".join(random.choices(half, k=6000)))
    sources = [
        write(folder / name, dense(hidden_size=32, head_dim=8), seed, torch.float32)
        for seed, name in enumerate(NAMES[:2])
    ]
    for source in sources:
        tokenizer.save(str(source / "tokenizer.json"))
    return sources, files


def test_the_tool_mixes_certifies_and_describes_two_sources(tmp_path: Path) -> None:
    sources, files = letters(tmp_path)
    how = {"method": "mix", "texts": [str(file) for file in files], "calibration_tokens": 2048}
    arguments: dict[str, Any] = {"model": {"num_experts_per_tok": 1}, "upcycling": how}
    plan = aquilamoe.plan_growth(sources, tmp_path / "mix", **arguments)
    assert not plan.preserving and plan.model["num_experts"] == 2
    found = {line.tensor: line for line in plan.tensors}
    assert (
        found["model.layers.0.mlp.experts.1.up_proj.weight"].source == "model.layers.0.mlp.up_proj.weight of source 2"
    )
    assert found["model.norm.weight"].how == "average of 2 sources"
    certificate = {"tokens": 256, "sequence_length": 16}
    target = aquilamoe.upcycle(sources, tmp_path / "mix", certificate=certificate, **arguments)
    assert target.certificate is not None
    measured = target.certificate["mix"]
    assert measured["texts"] == ["first.txt", "second.txt"] and min(measured["own_expert"]) > 0.8
    assert set(target.record["recipe"]["inputs"]) == {"source", "source_2"}
    assert str(tmp_path) not in json.dumps(target.record), "paths are no part of what it is"
    card = (target.directory / "README.md").read_text()
    assert 'base_model:\n- "first"\n- "second"\n' in card and "losses on second.txt" in card
    parents = ArtifactGraph({}, {}).parents(read_artifact(target.directory))
    assert [(parent.role, parent.stage) for parent in parents] == [("source", "first"), ("source_2", "second")]
    assert all("no output here has its weights" in parent.problem for parent in parents)
    assert aquilamoe.upcycle(sources, tmp_path / "mix", **arguments).record == target.record
    files[1].write_text(files[1].read_text()[::-1])
    with pytest.raises(UserError, match="made by another recipe"):
        aquilamoe.upcycle(sources, tmp_path / "mix", **arguments)


def test_the_tool_refuses_texts_and_sources_that_do_not_go_together(tmp_path: Path) -> None:
    sources, files = letters(tmp_path)
    texts = [str(file) for file in files]
    for places, how, certificate, message in (
        (sources, texts[:1], {}, "texts: 1 named"),
        (sources, [*texts, texts[0]], {}, "upcycling.texts: 3 named, there are 2 sources"),
        (sources, ["fr", texts[0]], {}, r"'fr' is neither a language of the embedded corpus \(en, zh\) nor a file"),
        (sources, texts, {"text": texts[0]}, "a mix is measured on the held-out part"),
        (sources[:1], texts[:1] * 2, {}, "sources: 1 checkpoint; a mix makes an expert of each, name 2 or more"),
        (sources[0], texts, {}, "sources: required but not set"),
    ):
        with pytest.raises(UserError, match=message) as error:
            aquilamoe.upcycle(
                places,
                tmp_path / "mix",
                model={"num_experts_per_tok": 1},
                upcycling={"method": "mix", "texts": how},
                certificate=certificate,
            )
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="only upcycling=mix has several"):
        aquilamoe.upcycle(sources, tmp_path / "mix", model={"num_experts": 2, "num_experts_per_tok": 1})


def test_a_stage_mixes_two_lines_and_counts_what_they_share_once(
    compose: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    values = compose(*tiny, "until=scale_out", f"paths.root={tmp_path}", "tracking.enabled=false")
    stages, (one, other) = values["stages"], values["data"]["sources"]
    for name, language in (("branch", one), ("other", other)):
        inputs = {"source": "prepare", "tokens": stages["dense"]["inputs"]["tokens"]}
        stages[name] = stages["dense"] | {"inputs": inputs, "mixture": {language: 1.0}}
    stages["scale_out"] |= {
        "inputs": stages["scale_out"]["inputs"] | {"source": "branch", "source_2": "other"},
        "model": {"num_experts_per_tok": 1},
        "upcycling": {"method": "mix", "router_init": "ridge", "texts": [one, other], "calibration_tokens": 256},
    }
    nodes = graph.build(graph.parse(values))
    own = sum(nodes[name].flops for name in ("prepare", "branch", "other"))
    assert nodes["scale_out"].lineage_flops == own == nodes["moe"].ancestor_flops
    assert nodes["scale_out"].model is not None and nodes["scale_out"].model.num_experts == 2
    execute(values, "a test")
    (path,) = tmp_path.glob("stages/scale_out-*/record.json")
    record = json.loads(path.read_text())
    assert {"source", "source_2", "tokens"} == set(record["inputs"])
    assert record["metrics"]["lineage_flops"] == own and record["metrics"]["preserving"] is False
    certificate = json.loads((path.parent / "certificate.json").read_text())
    assert certificate["mix"]["texts"] == [one, other]
    assert record["metrics"][f"loss_{one}"] == certificate["mix"]["mix_losses"][0]
    stages["scale_out"]["upcycling"]["texts"] = [one, "xx"]
    with pytest.raises(UserError, match=r"stages.scale_out.upcycling.texts: 'xx' is not in the corpus"):
        graph.build(graph.parse(values))
    del stages["scale_out"]["inputs"]["source_2"]
    with pytest.raises(UserError, match=r"'source_2' is missing; upcycling.texts names 2 texts"):
        graph.parse(values)


def test_what_does_not_fit_together_is_refused_in_one_line(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name, dense(), seed) for seed, name in enumerate(NAMES[:2]))
    small = write(tmp_path / "small", dense(vocab_size=36), 0)
    rounded = write(tmp_path / "rounded", dense(), 0, torch.bfloat16)
    worded = shutil.copytree(other, tmp_path / "worded")
    (worded / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    target, how = mixed(dense()), method()
    for sources, changed, message in (
        ([one], target, "sources: 1 checkpoint; a mix makes an expert of each, name 2 or more"),
        ([one, one], target, "is named twice"),
        ([one, small], target, rf"vocab_size is 40 in {one} and 36 in {small}"),
        ([one, rounded], target, "is of float64, .* of bfloat16"),
        ([one, worded], target, "tokenizer.json of .* are not the same"),
        ([one, other], mixed(dense(), 4), "num_experts: target 4, but 2 sources make as many experts"),
        ([one, other], mixed(dense(), moe_intermediate_size=6), "moe_intermediate_size: target 6, source 12"),
        (
            [one, other],
            mixed(dense(), shared_expert_intermediate_size=12),
            "shared_expert_intermediate_size: target 12",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            mix.mix(sources, tmp_path / "target", changed, how, 0)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="source and target at once"):
        mix.mix([one, other], other, target, how, 0)


def test_settings_of_other_methods_and_missing_texts_are_refused() -> None:
    for changes, message in (
        ({"texts": ["zh"]}, "texts: 1 named"),
        ({"weights": [1]}, "weights: 1 named, expected 2"),
        ({"weights": [1, 1], "shared": "base"}, "expected none"),
        ({"calibration_tokens": 0}, "found on 256 tokens or more"),
        ({"common_row": True}, "common_row is of 'split'"),
        ({"method": "copy", "router_init": "ridge", "texts": None}, "router_init ridge; it is of 'mix'"),
        ({"method": "copy"}, "texts is of 'mix'"),
    ):
        with pytest.raises(ValidationError, match=message):
            method(**changes)
