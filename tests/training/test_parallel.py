"""Many processes compute what one does: the same gradient and the same losses, however the model is laid out."""

import ctypes
import faulthandler
import filecmp
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from aquilamoe.checkpoint.dtensor import gather, own_part
from aquilamoe.checkpoint.state_dict import load_state, save_model
from aquilamoe.config.growth import Growth
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.config.steps import GroupsConfig
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.growth.new_parts import new_parts
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import checkpoint, example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.loop import train
from aquilamoe.training.objective import RouterObjective
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.step import TrainStep
from token_files import write_token_file

pytestmark = pytest.mark.process

VOCABULARY, LENGTH, ROWS, STEPS = 50, 8, 8, 6
BATCH = LENGTH * ROWS
WORKERS, HANGS_AFTER_S = 4, 600.0
ROOM = 2**22  # bytes, for what is not tensors
M_MMAP_MAX, M_MMAP_THRESHOLD, FORGET_THE_PEAK = -4, -3, "5"  # malloc.h; proc(5), of clear_refs


def work(rank: int, world_size: int, folder: Path) -> None:
    """Be one of the workers: run what is read, together with the others, and send what it returns."""
    torch.set_num_threads(1)
    results, sys.stdout = sys.stdout.buffer, sys.stderr
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    while True:
        name, arguments = pickle.load(sys.stdin.buffer)
        faulthandler.dump_traceback_later(HANGS_AFTER_S, exit=True)
        try:
            result = globals()[name](Rank(rank, world_size, rank), *arguments)
        except BaseException as error:
            result = error.with_traceback(None)
        faulthandler.cancel_dump_traceback_later()
        pickle.dump(result, results)
        results.flush()


class World:
    """Processes that wait for something to do together; for good, because torch forgets no group of processes."""

    def __init__(self, world_size: int, folder: Path) -> None:
        support = str(Path(__file__).parents[1] / "support")
        self.processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(world_size), str(folder)],
                env={**os.environ, "PYTHONPATH": support},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(world_size)
        ]

    def run(self, name: str, arguments: tuple[Any, ...]) -> list[Any]:
        """What each process returns from a function of this file."""
        for process in self.processes:
            assert process.stdin
            pickle.dump((name, arguments), process.stdin)
            process.stdin.flush()
        return [pickle.load(process.stdout) for process in self.processes if process.stdout]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            assert process.stdin and process.stdout
            process.stdin.close()
            process.stdout.close()


class Workers:
    """Worlds of two and of four processes; this process is one alone."""

    def __init__(self, folder: Path) -> None:
        for size in (2, 4):
            (folder / str(size)).mkdir()
        self.worlds = {size: World(size, folder / str(size)) for size in (2, 4)}

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of this file on so many processes, its first argument the rank; return what each returns."""
        if world_size == 1:
            return [function(FIRST, *arguments)]
        results = self.worlds[world_size].run(function.__name__, arguments)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def end(self) -> None:
        for world in self.worlds.values():
            world.end()


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    found = Workers(tmp_path_factory.mktemp("workers"))
    yield found
    found.end()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    sources: dict[str, dict[str, TokenCounts]] = {}
    for split, size in (("train", 4000), ("validation", 300)):
        numbers = np.arange(size, dtype=np.int64)
        stream = (numbers * 7 + numbers // 9) % (VOCABULARY - 1)
        write_token_file(folder / f"{split}-en", VOCABULARY, np.array_split(stream, size // 100))
        sources.setdefault("en", {})[split] = TokenCounts(size, size // 100, size)
    write_record(folder, TokensRecord(VOCABULARY, VOCABULARY - 1, sources))
    return folder


def make_job(
    tokens: Path, out: Path, experts: int = 0, tied: bool = False, optimizer: str = "adamw", **changes: Any
) -> Job:
    """A job of STEPS steps; `changes` are fields of the stage or the cluster, by name."""
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 20,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "num_experts": experts,
        "total_tokens": STEPS * BATCH,
        "batch_tokens": BATCH,
        "sequence_length": LENGTH,
        "learning_rate": 0.01,
        "seed": 3,
        "optimizer": {"name": optimizer, "max_grad_norm": 0.5},
        "validate_every_tokens": 3 * BATCH,
        "validation_tokens": 160,
        "workers": WORKERS,
        "micro_batch_tokens": BATCH,
    }
    return example.job(tokens, out, **defaults | changes)


def losses(rank: Rank, job: Job) -> list[dict[str, float]]:
    """Train; what each step measured."""
    train(job, rank)
    points = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
    kept = ("train/loss", "train/balance_loss", "train/z_loss", "train/grad_norm", "val/loss")
    of_parts = ("train/grad_norm_new", "train/grad_norm_old", "train/learning_rate_new", "train/learning_rate_old")
    return [{key: point[key] for key in (*kept, *of_parts) if key in point} for point in points]


def losses_until(rank: Rank, job: Job, step: int) -> None:
    """Train, and be interrupted in a step."""

    def interrupted(self: TrainStep, at: int, rows: np.ndarray) -> dict[str, float]:
        if at == step:
            raise InterruptedError
        return original(self, at, rows)

    original = TrainStep.step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(TrainStep, "step", interrupted)
        train(job, rank)


def gradients(rank: Rank, job: Job, file: Path) -> float:
    """The norm that clipping sees, and all gradients of a step before and after it, whole, in float64."""
    group = ParallelContext(job.cluster, rank)
    torch.set_default_dtype(torch.float64)
    try:
        model = group.build(job.model, "fp32")
    finally:
        torch.set_default_dtype(torch.float32)
    initialize(model, 3)
    stepper = TrainStep(job, model, optimizers.build(model, job.stage.optimizer, 0.01), group)
    rows = np.random.default_rng(5).integers(0, VOCABULARY, (ROWS, LENGTH + 1))
    stepper.accumulate(np.array_split(rows, rank.world_size)[rank.rank], RouterObjective(job.stage.router, group))
    found = whole_gradients(model, "before")
    norm = group.clip(model, 0.5).item()
    found |= whole_gradients(model, "after")
    if group.is_first:
        save_file(found, file)
    return norm


def whole_gradients(model: Decoder, label: str) -> dict[str, torch.Tensor]:
    return {f"{label}/{name}": gather(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def initial_values_differ(rank: Rank, job: Job) -> list[str]:
    """Parameters whose part here is not that of the whole model from the same seed, or from its files."""
    group = ParallelContext(job.cluster, rank)
    whole = Decoder(job.model)
    whole.initialize(7)
    if group.is_first:
        save_model(whole, job.out / "model")
    group.wait()
    drawn, loaded = (group.build(job.model, "fp32") for _ in range(2))
    initialize(drawn, 7)
    load_state(loaded, job.out / "model")
    return [
        name
        for name, expected in whole.named_parameters()
        for model in (drawn, loaded)
        for part, place in [own_part(model.get_parameter(name))]
        if not torch.equal(part, expected[place])
    ]


def bytes_held(rank: Rank, job: Job) -> int:
    model = ParallelContext(job.cluster, rank).build(job.model, "fp32")
    return sum(own_part(parameter)[0].nbytes for parameter in model.parameters())


def model_to_publish(group: ParallelContext, config: ModelConfig) -> tuple[Decoder, optimizers.AnyOptimizer]:
    """This process's part of a model, and of moments that are functions of its values: nothing is ever whole."""
    model = group.build(config, "fp32")
    initialize(model, 3)
    adamw = optimizers.build(model, make_job(Path(), Path()).stage.optimizer, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    adamw.step()
    adamw.zero_grad()
    for number, value in enumerate(optimizers.read_state(model, adamw).values(), start=2):
        if value.ndim:
            part, place = own_part(value)
            part.copy_(torch.arange(place[0].start, place[0].stop).view(-1, *[1] * (value.ndim - 1)) / number)
    return model, adamw


def bytes_of_publishing(rank: Rank, job: Job, config: ModelConfig) -> dict[str, int]:
    """By how much this process's peak memory rises when the model is saved, and, to compare, gathered."""
    group = ParallelContext(job.cluster, rank)
    model, adamw = model_to_publish(group, config)
    found = {"part": sum(own_part(parameter)[0].nbytes for parameter in model.parameters())}
    largest = max(model.parameters(), key=torch.Tensor.numel)
    found["largest"] = 4 * largest.numel()
    extra: dict[str, torch.Tensor] = {}

    def save_checkpoint() -> None:
        checkpoint.save_checkpoint(job.out, model, adamw, 1, extra=extra, group=group)
        checkpoint.wait()

    for name, publish in (
        ("result", lambda: checkpoint.save(job.out / "result", model, adamw, 1, extra=extra, group=group)),
        ("checkpoint", save_checkpoint),
    ):
        group.wait()
        found[name] = rise_of_the_peak(publish)
    # Several times: what the background has not given back yet hides the first.
    found["gathering"] = max(rise_of_the_peak(lambda: gather(largest)) for _ in range(3))
    return found


def rise_of_the_peak(do: Callable[[], object]) -> int:
    """Bytes of memory in use at the peak of what is done, above those before it (glibc, Linux)."""
    libc = ctypes.CDLL(None)
    for parameter, value in ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 65536)):  # what is freed is given back at once
        libc.mallopt(parameter, value)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(FORGET_THE_PEAK)
    before = memory("VmRSS")
    do()
    return memory("VmHWM") - before


def memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def refusal_of(rank: Rank, job: Job) -> str:
    with pytest.raises(UserError) as raised:
        ParallelContext(job.cluster, rank)
    return str(raised.value)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 ddp": (2, {"parallel": "ddp"}),
    "2 fsdp, recomputed": (2, {"parallel": "fsdp", "activation_checkpointing": True}),
    "4 fsdp": (4, {"parallel": "fsdp"}),
    "4 hsdp": (4, {"parallel": "hsdp", "shard_size": 2}),
}
# The experts of "three" divide by no number of processes: each of them is cut.
MODELS: dict[str, dict[str, Any]] = {"dense tied": {"tied": True}, "moe": {"experts": 4}, "three": {"experts": 3}}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def alone(workers: Workers, tokens: Path, tmp_path_factory: pytest.TempPathFactory, model: str) -> Path:
    """What one process makes of a model: its training, and the gradient of a step of four micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    workers.run(1, losses, make_job(tokens, out, **MODELS[model]))
    workers.run(1, gradients, make_job(tokens, out, **MODELS[model]), out / "gradients")
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_and_its_norm_are_those_of_one_process(
    workers: Workers, tokens: Path, tmp_path: Path, alone: Path, layout: str, model: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    job = make_job(tokens, tmp_path, **MODELS[model], **changes, micro_batch_tokens=LENGTH)
    norms = workers.run(world_size, gradients, job, tmp_path / "gradients")
    one, many = load_file(alone / "gradients"), load_file(tmp_path / "gradients")
    assert one.keys() == many.keys() and len(one) > 20
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-9, atol=1e-12)
    before = [gradient for name, gradient in one.items() if name.startswith("before")]
    assert norms == pytest.approx([torch.nn.utils.get_total_norm(before).item()] * world_size, rel=1e-6)
    assert norms[0] > 0.5  # or else nothing was clipped


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_losses_are_those_of_one_process(
    workers: Workers, tokens: Path, tmp_path: Path, alone: Path, layout: str, model: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    found = workers.run(world_size, losses, make_job(tokens, tmp_path, **MODELS[model], **changes))[0]
    assert_same_losses(found, measured(alone))
    for file in ("model/model.safetensors", "training/optimizer.safetensors"):
        one, many = load_file(alone / file), load_file(tmp_path / file)
        assert list(one) == list(many)
        for name in one:
            torch.testing.assert_close(many[name], one[name], rtol=0, atol=2e-4)


def measured(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(actual) == len(expected) == STEPS + 1
    for here, there in zip(actual, expected, strict=True):
        assert here == pytest.approx({key: there[key] for key in here}, abs=1e-5)


@pytest.mark.parametrize(("layout", "model"), [("2 ddp", "moe"), ("4 fsdp", "moe"), ("4 hsdp", "three")])
def test_muon_orthogonalises_whole_matrices_however_they_are_cut(
    workers: Workers, tokens: Path, tmp_path: Path, layout: str, model: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    one = workers.run(1, losses, make_job(tokens, tmp_path / "one", optimizer="muon", **MODELS[model]))[0]
    job = make_job(
        tokens, tmp_path / "many", optimizer="muon", **MODELS[model], **changes, checkpoint_every_tokens=BATCH
    )
    workers.run(world_size, losses_until, job, 3)
    many = workers.run(world_size, losses, job)[0]
    for here, there in zip(many, one, strict=True):  # its iteration rounds to bf16
        assert here == pytest.approx(there, rel=3e-3)


FPI: dict[str, Any] = {
    "method": "fpi",
    "scope": "all",
    "norm": "exact",
    "maps": "circular",
    "noise": 0.0,
    "depth": "stack",
    "new_layers": "copy",
}


@pytest.mark.parametrize("groups", [{"new": 1.3}, {"old": 0}], ids=["faster", "frozen"])
@pytest.mark.parametrize("layout", ["2 ddp", "2 fsdp, recomputed", "4 hsdp"])
def test_new_and_old_parts_train_at_their_rates_however_they_are_cut(
    workers: Workers, tokens: Path, tmp_path: Path, layout: str, groups: dict[str, Any]
) -> None:
    world_size, changes = LAYOUTS[layout]
    jobs = []
    for name, laid_out in (("one", {}), ("many", changes)):
        job = make_job(tokens, tmp_path / name, experts=3, **laid_out)
        optimizer = job.stage.optimizer.model_copy(update={"groups": GroupsConfig.model_validate(groups)})
        source = job.model.model_copy(update={"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1})
        grown = (Growth(source, job.model, GrowthConfig(**FPI), seed=0),)
        stage = job.stage.model_copy(update={"optimizer": optimizer})
        jobs.append(replace(job, stage=stage, marks=partial(new_parts, grown)))
    one, many = workers.run(1, losses, jobs[0])[0], workers.run(world_size, losses, jobs[1])[0]
    for here, there in zip(many, one, strict=True):
        assert here == pytest.approx(there, abs=1e-5)
    assert {"train/grad_norm_new", "train/grad_norm_old"} <= one[-1].keys()
    file = "model/model.safetensors"
    alone, cut = load_file(tmp_path / "one" / file), load_file(tmp_path / "many" / file)
    for name in alone:
        torch.testing.assert_close(cut[name], alone[name], rtol=0, atol=2e-4)


# What a process holds


@pytest.mark.parametrize("layout", ["4 fsdp", "4 hsdp"])
def test_a_part_begins_with_the_values_of_the_whole(
    workers: Workers, tokens: Path, tmp_path: Path, layout: str, model: str
) -> None:
    world_size, changes = LAYOUTS[layout]
    found = workers.run(world_size, initial_values_differ, make_job(tokens, tmp_path, **MODELS[model], **changes))
    assert found == [[]] * world_size


def test_no_process_holds_more_than_its_part(workers: Workers, tokens: Path, tmp_path: Path) -> None:
    job = make_job(tokens, tmp_path, experts=4, parallel="fsdp")
    whole = 4 * job.model.num_params
    held = workers.run(4, bytes_held, job)
    assert sum(held) == whole and max(held) < 1.05 * whole / 4


@pytest.mark.parametrize("changes", [{}, {"expert_parallel": 2}], ids=["fsdp", "experts spread"])
def test_a_model_is_published_with_no_process_having_more_than_its_part_in_the_files_that_one_would_write(
    workers: Workers, tokens: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    job = make_job(tokens, tmp_path, experts=4, parallel="fsdp", **changes)
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
    config = job.model.model_copy(update={**sizes, "moe_intermediate_size": 1024})
    for found in workers.run(4, bytes_of_publishing, job, config):
        assert found["largest"] >= 2 * ROOM and found["gathering"] > 0.9 * found["largest"]  # it would be seen
        assert found["result"] < ROOM
        assert found["checkpoint"] < 3 * found["part"] + ROOM  # its own copy, with two moments, for the background
    alone = tmp_path / "alone"
    checkpoint.save(alone, *model_to_publish(ParallelContext(job.cluster), config), 1)
    names = sorted(str(path.relative_to(alone)) for path in alone.rglob("*") if path.is_file())
    assert len(names) >= 4
    for folder in (tmp_path / "result", tmp_path / "checkpoints" / "step-000000001"):
        for name in names:
            assert filecmp.cmp(folder / name, alone / name, shallow=False), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel": "hsdp", "shard_size": 3}, "cluster.shard_size: 2 workers are no multiple of a shard group of 3"),
        ({"parallel": "fsdp", "expert_parallel": 4}, "cluster.expert_parallel: 2 workers of a shard group are no "),
    ],
)
def test_processes_that_do_not_divide_are_refused(
    workers: Workers, tokens: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    found = workers.run(2, refusal_of, make_job(tokens, tmp_path, experts=4, **changes, workers=12))
    assert found[0] == found[1] and found[0].startswith(message) and "\n" not in found[0]


# Checkpoints


@pytest.mark.parametrize("sizes", [(4, 2, 1), (1, 4)])
def test_a_stage_goes_on_with_any_number_of_processes(
    workers: Workers, tokens: Path, tmp_path: Path, alone: Path, model: str, sizes: tuple[int, ...]
) -> None:
    for number, size in enumerate(sizes):
        layout = {"parallel": "hsdp", "shard_size": 2} if size == 4 else {"parallel": "fsdp"}
        job = make_job(tokens, tmp_path, **MODELS[model], **layout, checkpoint_every_tokens=BATCH)
        if number < len(sizes) - 1:
            workers.run(size, losses_until, job, 2 * number + 3)
    assert_same_losses(workers.run(sizes[-1], losses, job)[0], measured(alone))


def test_experts_spread_over_processes_go_on_in_fewer(workers: Workers, tokens: Path, tmp_path: Path) -> None:
    """Four processes with an expert each, then two with two, then one with all: the losses of one from the start."""
    for size, step in ((4, 3), (2, 5), (1, STEPS)):
        spread: dict[str, Any] = {"expert_parallel": size, "parallel": "fsdp"} if size > 1 else {}
        job = make_job(tokens, tmp_path / "many", experts=4, **spread, checkpoint_every_tokens=BATCH)
        if step < STEPS:
            workers.run(size, losses_until, job, step)
            assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(job.out)] == [step - 1, step - 2]
    found = workers.run(1, losses, job)[0]
    assert_same_losses(found, workers.run(1, losses, make_job(tokens, tmp_path / "one", experts=4))[0])


@pytest.mark.parametrize("spread", [{}, {"expert_parallel": 2}], ids=["fsdp", "experts spread"])
def test_an_interruption_changes_no_byte_with_the_same_processes(
    workers: Workers, tokens: Path, tmp_path: Path, spread: dict[str, Any]
) -> None:
    for name in ("whole", "broken"):
        job = make_job(tokens, tmp_path / name, experts=4, parallel="fsdp", **spread, checkpoint_every_tokens=2 * BATCH)
        if name == "broken":
            workers.run(4, losses_until, job, 6)
            assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(job.out)] == [4, 2]
        workers.run(4, losses, job)
    files = [
        path.relative_to(tmp_path / "whole")
        for part in ("model", "training")
        for path in (tmp_path / "whole" / part).rglob("*.*")
    ]
    assert len(files) >= 4
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "broken" / file).read_bytes()


def test_damage_that_one_process_reads_is_known_to_all(workers: Workers, tokens: Path, tmp_path: Path) -> None:
    job = make_job(tokens, tmp_path, parallel="fsdp", checkpoint_every_tokens=2 * BATCH)
    workers.run(2, losses_until, job, 6)
    file = tmp_path / "checkpoints" / "step-000000004" / "training" / "optimizer.safetensors"
    with file.open("r+b") as damaged:
        damaged.seek(-5, os.SEEK_END)
        damaged.write(b"x")
    workers.run(2, losses, job)
    points = measured(tmp_path)
    assert [point["step"] for point in points] == list(range(STEPS + 1))
    assert [point.get("checkpoint/passed_over") for point in points] == [None, None, None, 1, None, None, None]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
