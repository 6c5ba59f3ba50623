"""New and old parts of a grown model: each weight moves at its own rate, and what is frozen keeps its bytes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from aquilamoe.config import graph
from aquilamoe.config.growth import Growth
from aquilamoe.config.messages import UserError
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.growth.new_parts import counted, new_parts
from aquilamoe.model.marks import Marks
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import Job
from aquilamoe.training.loop import train
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.parts import Parts
from aquilamoe.training.step import TrainStep
from small_checkpoints import growth, upcycling
from token_files import write_token_file

SMALL = example.model(hidden_size=8, intermediate_size=12)
WIDER = Growth(SMALL, example.model(), growth(), seed=0)
DEEPER = Growth(example.model(num_hidden_layers=1), example.model(), growth(depth="stack", new_layers="zero"), seed=0)
SPARSE = Growth(
    WIDER.target, example.model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24), upcycling(), seed=0
)
GROWTHS = {"width": (WIDER,), "depth": (DEEPER,), "width and experts": (WIDER, SPARSE)}
RATE = 0.01
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    counts = {}
    for split in ("train", "validation"):
        stream = np.arange(4000, dtype=np.int64) * 7 % (example.VOCABULARY - 1)
        write_token_file(folder / f"{split}-en", example.VOCABULARY, np.array_split(stream, 40))
        counts[split] = TokenCounts(4000, 40, 4000)
    write_record(folder, TokensRecord(example.VOCABULARY, example.VOCABULARY - 1, {"en": counts}))
    return folder


def make_job(growths: tuple[Growth, ...], groups: Any, out: Path = Path(), **changes: Any) -> Job:
    optimizer = {**changes.pop("optimizer", {}), "groups": groups}
    job = example.job(out=out, network=growths[-1].target, optimizer=optimizer, learning_rate=RATE, **changes)
    return replace(job, marks=partial(new_parts, growths))


def new_parts_of(job: Job) -> Mapping[str, Marks]:
    assert job.marks is not None
    return job.marks()


def stepper(job: Job) -> TrainStep:
    model = Decoder(job.model)
    model.initialize(5)
    groups = job.stage.optimizer.groups
    parts = None if groups.are_one else Parts(model, new_parts_of(job), groups)
    optimizer = optimizers.build(model, job.stage.optimizer, RATE, parts.part_of if parts else {})
    return TrainStep(job, model, optimizer, ParallelContext(job.cluster), parts=parts)


def weights(of: TrainStep) -> State:
    return {name: parameter.detach().clone() for name, parameter in of.model.named_parameters()}


def new_of(growths: tuple[Growth, ...], name: str, shape: torch.Size) -> Tensor:
    return new_parts(growths)[name].part(tuple(slice(0, size) for size in shape)).expand(shape)


def rows(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (example.ROWS, example.LENGTH + 1))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("growths", GROWTHS.values(), ids=GROWTHS)
def test_a_step_moves_new_weights_by_their_ratio_and_old_ones_as_without_groups(
    growths: tuple[Growth, ...], optimizer: str
) -> None:
    plain, apart = (
        stepper(make_job(growths, groups, optimizer={"name": optimizer})) for groups in ({}, {"new": 1.5, "old": 1.0})
    )
    before = weights(plain)
    for each in (plain, apart):
        each.step(1, rows(1))
    after, found = weights(plain), weights(apart)
    seen = set()
    for name, start in before.items():
        is_new = new_of(growths, name, start.shape)
        seen |= set(is_new.unique().tolist())
        assert torch.equal(found[name][~is_new], after[name][~is_new]), name
        expected = start + 1.5 * (after[name] - start)
        torch.testing.assert_close(found[name][is_new], expected[is_new], rtol=1e-5, atol=1e-7)
    assert seen == {True, False}


@pytest.mark.parametrize("precision", ["fp32", "bf16_master"])
@pytest.mark.parametrize("frozen", ["old", "new"])
@pytest.mark.parametrize("growths", GROWTHS.values(), ids=GROWTHS)
def test_frozen_weights_keep_their_bytes_and_the_others_all_move(
    growths: tuple[Growth, ...], frozen: str, precision: str
) -> None:
    train_step = stepper(make_job(growths, {frozen: 0}, precision=precision))
    before = weights(train_step)
    for step in (1, 2, 3):
        values = train_step.step(step, rows(step))
    assert values[f"train/grad_norm_{frozen}"] == values[f"train/learning_rate_{frozen}"] == 0
    for name, found in weights(train_step).items():
        is_new = new_of(growths, name, found.shape)
        stays = is_new if frozen == "new" else ~is_new
        assert torch.equal(found[stays], before[name][stays]), name
        if name.endswith("proj.weight") and not stays.all():
            assert (found != before[name])[~stays].float().mean() > 0.9, name


def test_what_is_frozen_as_a_whole_has_no_gradient_and_no_moments() -> None:
    train_step = stepper(make_job((DEEPER,), {"old": 0}))
    train_step.step(1, rows(1))
    state = optimizers.read_state(train_step.model, train_step.optimizer)
    assert state and all(name.startswith("model.layers.1.") for name in state)


def test_frozen_gradients_are_no_part_of_the_norm_that_is_clipped() -> None:
    plain, apart = (stepper(make_job((WIDER,), groups)).step(1, rows(1)) for groups in ({"new": 1.1}, {"old": 0}))
    both = plain["train/grad_norm_new"] ** 2 + plain["train/grad_norm_old"] ** 2
    assert both**0.5 == pytest.approx(plain["train/grad_norm"], rel=1e-5)
    assert apart["train/grad_norm"] == pytest.approx(plain["train/grad_norm_new"], rel=1e-5)


def test_new_parts_come_to_their_rate_by_themselves() -> None:
    groups = {"new": {"learning_rate_ratio": 1.4, "rewarm_tokens": 4 * example.BATCH, "rewarm_from": 1.0}}
    train_step = stepper(make_job((WIDER,), groups))
    found = [train_step.step(step, rows(step)) for step in range(1, 7)]
    ratios = [values["train/learning_rate_new"] / RATE for values in found]
    assert ratios == pytest.approx([1.1, 1.2, 1.3, 1.4, 1.4, 1.4])
    assert {values["train/learning_rate_old"] for values in found} == {RATE}


def test_only_the_last_growths_count_if_the_groups_are_set_so() -> None:
    later = replace(SPARSE, num_trainings=1)
    groups = make_job((WIDER, later), {"new": 2.0, "growths": "last"}).stage.optimizer.groups
    assert counted((WIDER, SPARSE), groups) == (WIDER, SPARSE)
    assert counted((WIDER, later), groups) == (later,)
    parts = Parts(Decoder(SPARSE.target), new_parts((later,)), groups)
    assert parts.part_of["model.embed_tokens.weight"] == "old"
    assert parts.part_of["model.layers.0.mlp.experts.up_proj"] == "mixed"


def test_a_stage_with_a_frozen_source_resumes_with_identical_bytes(tokens: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"checkpoint_every_tokens": 4 * example.BATCH, "total_tokens": 6 * example.BATCH}
    found = []
    for name in ("whole", "broken"):
        job = replace(make_job((DEEPER,), {"old": 0}, tmp_path / name, **changes), tokens=tokens)
        if name == "broken":
            with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
                patch.setattr(TrainStep, "step", interrupted(TrainStep.step, 6))
                train(job)
        train(job)
        found.append({file: (job.out / file).read_bytes() for file in ("model/model.safetensors",)})
        found[-1]["moments"] = (job.out / "training" / "optimizer.safetensors").read_bytes()
    assert found[0] == found[1]
    model = Decoder(DEEPER.target)
    model.initialize(1)
    saved = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    names = [name for name in saved if not name.startswith("model.layers.1.")]
    assert len(names) > 10 and all(torch.equal(saved[name], model.get_parameter(name)) for name in names)
    points = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert points[-1]["train/grad_norm_new"] > 0


def interrupted(step: Callable[..., Any], at: int) -> Callable[..., Any]:
    def stopped(self: TrainStep, number: int, values: np.ndarray) -> Any:
        if number == at:
            raise InterruptedError
        return step(self, number, values)

    return stopped


# What is refused


def test_a_model_of_which_nothing_would_train_is_refused() -> None:
    with pytest.raises(UserError, match=r"^optimizer.groups: no weight is new, and all others are frozen; raise"):
        same = Growth(SMALL, SMALL, growth(), seed=0)
        Parts(Decoder(SMALL), new_parts((same,)), make_job((same,), {"old": 0}).stage.optimizer.groups)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("stages.prepare.optimizer.groups.old=0",), "stages.prepare.optimizer.groups: the stage trains from scratch"),
        (("+optimizer.groups.old=0",), "optimizer: groups are of one stage; set stages.NAME.optimizer.groups"),
        (("stages.control.optimizer.groups.old=0",), "stages.control.optimizer.groups: the line of 'prepare' has no"),
        (
            ("stages.dense.optimizer.groups.old=0", "stages.dense.optimizer.groups.new=0"),
            "stages.dense.optimizer.groups: new and old have learning_rate_ratio 0, so that nothing trains",
        ),
        (
            (
                "stages.dense.optimizer.groups.new.learning_rate_ratio=2",
                "stages.dense.optimizer.groups.new.rewarm_tokens=99_000_000",
            ),
            "stages.dense.optimizer.groups.new.rewarm_tokens: 99000000 exceed total_tokens",
        ),
        (
            ("stages.dense.optimizer.groups.old=0", "stages.scale_out.optimizer_state=grow"),
            "stages.scale_out.optimizer_state: 'dense' has no moments to grow of what its optimizer.groups froze",
        ),
    ],
)
def test_groups_that_cannot_be_are_one_line(
    compose: Callable[..., dict[str, Any]], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        graph.build(graph.parse(compose(*words)))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_groups_of_ones_are_no_part_of_a_recipe(compose: Callable[..., dict[str, Any]]) -> None:
    recipes = [
        graph.build(graph.parse(compose(*words)))["dense"].stage.model_dump()
        for words in ((), ("stages.dense.optimizer.groups.old=1",), ("stages.dense.optimizer.groups.old=0.5",))
    ]
    assert recipes[0] == recipes[1] and "groups" not in recipes[0]["optimizer"]
    assert recipes[2]["optimizer"]["groups"]["old"] == {"learning_rate_ratio": 0.5}
