"""Checkpoints of a training in progress: bit for bit, complete or absent, only the newest two."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import Optimizer

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, ModelConfig, OptimizerConfig
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import checkpoint, dcp_storage
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import FIRST
from aquilamoe.training.parallel import ParallelContext
from waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def _nothing_under_way() -> Iterator[None]:
    yield
    checkpoint.wait()


ALONE = ParallelContext(
    ClusterConfig(
        executor="process",
        address=None,
        workers=1,
        cpus_per_worker=1,
        gpus_per_worker=0,
        gpu_memory_bytes=0,
        max_failures=0,
        micro_batch_tokens=32,
        checkpoint_every_tokens=64,
        compile=False,
        flops_per_s=1e9,
    ),
    FIRST,
)


def save_checkpoint(out: Path, model: Decoder, optimizer: Optimizer, number: int) -> Path:
    """Write a checkpoint to its end."""
    made = checkpoint.save_checkpoint(out, model, optimizer, number)
    checkpoint.wait()
    return made


def untrained(experts: int = 0, seed: int = 1, tied: bool = False) -> tuple[Decoder, Optimizer]:
    model = Decoder(
        ModelConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=32,
            rope_theta=1e4,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            qkv_bias=True,
            tie_word_embeddings=tied,
            num_experts=experts,
            num_experts_per_tok=2 if experts else 0,
            moe_intermediate_size=24 if experts else 0,
        )
    )
    model.initialize(seed)
    adamw = OptimizerConfig(
        name="adamw", momentum=0.95, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0
    )
    optimizer = optimizers.build(model, adamw, 0.01)
    assert isinstance(optimizer, Optimizer)
    return model, optimizer


def step(model: Decoder, optimizer: optimizers.AnyOptimizer, seed: int = 0) -> None:
    tokens_bt = torch.randint(0, 32, (4, 9), generator=torch.Generator().manual_seed(seed))
    logits_btv, _ = model(tokens_bt)
    logits_btv.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(experts: int = 0, tied: bool = False) -> tuple[Decoder, Optimizer]:
    model, optimizer = untrained(experts, tied=tied)
    step(model, optimizer)
    return model, optimizer


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("experts", "tied"), [(0, False), (0, True), (4, False)])
def test_weights_moments_and_step_come_back_bit_for_bit(experts: int, tied: bool, tmp_path: Path) -> None:
    model, optimizer = trained(experts, tied)
    checkpoint.save(tmp_path, model, optimizer, 17)
    other, its_optimizer = untrained(experts, seed=2, tied=tied)
    assert checkpoint.load(tmp_path, other, its_optimizer) == 17
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[one][key], its_optimizer.state[two][key]), name
    step(model, optimizer, seed=1)
    step(other, its_optimizer, seed=1)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_the_same_state_is_always_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = trained(experts=4)
    for folder in ("one", "two"):
        checkpoint.save(tmp_path / folder, model, optimizer, 3)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) >= 4
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


MUON = OptimizerConfig(name="muon", momentum=0.9, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0)


@pytest.mark.parametrize("experts", [0, 4])
def test_the_state_of_muon_comes_back_bit_for_bit(experts: int, tmp_path: Path) -> None:
    model, other = (untrained(experts, seed=seed)[0] for seed in (0, 2))
    optimizer, its_optimizer = (optimizers.build(each, MUON, 0.01) for each in (model, other))
    step(model, optimizer)
    checkpoint.save(tmp_path, model, optimizer, 17)
    assert checkpoint.load(tmp_path, other, its_optimizer) == 17
    for seed in (1, 2):
        step(model, optimizer, seed=seed)
        step(other, its_optimizer, seed=seed)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))
    found = load_file(tmp_path / "training" / "optimizer.safetensors")
    if experts:
        assert found["model.layers.0.mlp.experts.up_proj/momentum_buffer"].shape[0] == experts


def test_the_state_of_another_optimizer_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint.save(tmp_path, model, optimizer, 3)
    with pytest.raises(UserError, match=r"optimizer.safetensors: there is no '.*/momentum_buffer', .*=reset"):
        checkpoint.load_moments(tmp_path, model, optimizers.build(model, MUON, 0.01))


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, *trained(), 3)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}


def test_moments_are_named_after_parameters(tmp_path: Path) -> None:
    model, optimizer = trained(experts=4)
    checkpoint.save(tmp_path, model, optimizer, 3)
    found = load_file(tmp_path / "training" / "optimizer.safetensors")
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(found) == {f"{name}/{key}" for name, _ in model.named_parameters() for key in keys}


def test_the_newest_two_checkpoints_are_kept_and_listed_newest_first(tmp_path: Path) -> None:
    model, optimizer = trained()
    for number in (8, 16, 24, 999_999_999, 1_000_000_000):
        made = save_checkpoint(tmp_path, model, optimizer, number)
        assert checkpoint.checkpoints(tmp_path)[0] == made and checkpoint.step_of(made) == number
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [1_000_000_000, 999_999_999]
    assert len(names(tmp_path / "checkpoints")) == 2


def test_a_checkpoint_that_was_being_written_or_removed_is_not_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer = trained()
    made = save_checkpoint(tmp_path, model, optimizer, 8)
    for leftover in (".step-000000016", ".step-000000004"):
        (made.parent / leftover / "model").mkdir(parents=True)
        (made.parent / leftover / "model" / "model.safetensors").write_bytes(b"half")
    assert checkpoint.checkpoints(tmp_path) == [made]
    second = save_checkpoint(tmp_path, model, optimizer, 16)
    assert names(made.parent) == [made.name, second.name]
    assert checkpoint.load(second, *untrained()) == 16


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_one_line_at_the_next_checkpoint_and_leaves_the_older_ones_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    made = save_checkpoint(tmp_path, model, optimizer, 8)
    with monkeypatch.context() as patched:
        patched.setattr(dcp_storage.os, "pwrite", full_disk)
        with pytest.raises(
            UserError, match=r"\.step-000000016/.*\.safetensors: the disk is full: .*; make room"
        ) as raised:
            save_checkpoint(tmp_path, model, optimizer, 16)
    assert "\n" not in str(raised.value)
    assert checkpoint.checkpoints(tmp_path) == [made]
    assert checkpoint.load(made, *untrained()) == 8
    assert save_checkpoint(tmp_path, model, optimizer, 16).exists()


def test_a_kill_while_an_old_checkpoint_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    for number in (8, 16):
        save_checkpoint(tmp_path, model, optimizer, number)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, model, optimizer, 24)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [24, 16]
    save_checkpoint(tmp_path, model, optimizer, 32)
    assert names(tmp_path / "checkpoints") == ["step-000000024", "step-000000032"]


def test_every_file_and_folder_is_on_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "sync_directory", synced.append)
    made = save_checkpoint(tmp_path, *trained(), 8)
    hidden = made.with_name(f".{made.name}")
    inside = [hidden / path.relative_to(made) for path in made.rglob("*")]
    assert set(synced) == {hidden, *inside, made.parent}
    assert synced[-1] == made.parent  # the rename itself


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    expected = save_checkpoint(tmp_path / "expected", model, optimizer, 8)
    begun, trained_on, pwrite = threading.Event(), threading.Event(), os.pwrite

    def late(descriptor: int, data: memoryview, offset: int) -> int:
        begun.set()
        assert trained_on.wait(PATIENCE_S)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(dcp_storage.os, "pwrite", late)
    made = checkpoint.save_checkpoint(tmp_path / "found", model, optimizer, 8)
    step(model, optimizer)
    assert begun.wait(PATIENCE_S) and not made.exists() and len(list(made.parent.glob(".step-*"))) == 1
    trained_on.set()
    assert checkpoint.checkpoints(tmp_path / "found") == [made]
    for file in FILES:
        assert (made / file).read_bytes() == (expected / file).read_bytes()


FILES = ("model/model.safetensors", "model/config.json", "training/optimizer.safetensors", "training/progress.json")


@pytest.mark.parametrize("file", [*FILES, "hashes.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "a bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    model, optimizer = trained()
    older, newer = (save_checkpoint(tmp_path, model, optimizer, number) for number in (8, 16))
    data = bytearray((newer / file).read_bytes())
    if damage == "gone":
        (newer / file).unlink()
    elif damage == "cut":
        (newer / file).write_bytes(data[:-7])
    else:
        data[-3] ^= 4
        (newer / file).write_bytes(data)
    caplog.clear()
    assert checkpoint.newest_intact(tmp_path, ALONE) == (older, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(f"{newer}: is passed over for the checkpoint before it")
    assert checkpoint.load(older, *untrained()) == 8
    caplog.clear()
    assert checkpoint.newest_intact(tmp_path, ALONE) == (older, 0) and not caplog.messages
    (older / "hashes.json").unlink()
    assert checkpoint.newest_intact(tmp_path, ALONE) == (None, 1)


def test_a_checkpoint_of_another_model_is_one_line(tmp_path: Path) -> None:
    made = save_checkpoint(tmp_path, *trained(experts=4), 8)
    with pytest.raises(
        UserError, match=r"cannot continue from this checkpoint \(.*; remove it and run again"
    ) as raised:
        checkpoint.load(made, *untrained())
    assert "\n" not in str(raised.value)


def test_every_byte_of_a_checkpoint_has_a_hash(tmp_path: Path) -> None:
    made = save_checkpoint(tmp_path, *trained(experts=4), 8)
    covered: dict[str, list[tuple[int, int]]] = {}
    for span in json.loads((made / "hashes.json").read_text()):
        covered.setdefault(span["file"], []).append((span["start"], span["start"] + span["length"]))
    assert set(covered) | {"hashes.json"} == {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    for file, spans in covered.items():
        end = 0
        for start, stop in sorted(spans):
            assert start == end, file
            end = stop
        assert end == (made / file).stat().st_size


def test_a_source_without_optimizer_state_is_one_line_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"optimizer\.safetensors: there is no optimizer state; set optimizer_state=reset"
    ):
        checkpoint.load_moments(tmp_path, *untrained())


def test_a_second_writer_waits_for_the_first_and_names_it(tmp_path: Path) -> None:
    with (
        checkpoint.only_writer(tmp_path),
        pytest.raises(UserError, match="another process has been training here"),
        checkpoint.only_writer(tmp_path, 0.2),
    ):
        pass
    with checkpoint.only_writer(tmp_path, 0.2):  # free again
        assert checkpoint.checkpoints(tmp_path) == []
