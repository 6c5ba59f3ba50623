"""Which files of a checkpoint go along with what is made of it, and which links in it are followed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from aquilamoe.checkpoint import hf_config, links
from aquilamoe.checkpoint.companions import companions, copy_companions, left_behind
from aquilamoe.config.messages import UserError
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.tool import identity
from aquilamoe.growth.tool.request import open_checkpoint
from small_checkpoints import growth, model, padded, write_source

KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("tokenizer.model.v3", "vocab.json", "merges.txt", "qwen.tiktoken", "tekken.json", "chat_template.jinja"),
    *("generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md"),
    *("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"),
)
LEFT = (
    *("params.json", "adapter_config.json", "adapter_model.safetensors.bak", "model.onnx", "config.json.bak"),
    *("quantize_config.json", "hf_quant_config.json", "quant_strategy.json", "optimizer.pt", "scheduler.pt"),
    *("trainer_state.json", "training_args.bin", "rng_state.pth", "model.gguf", "tf_model.h5", "flax_model.msgpack"),
    *("modeling_small.py", "tokenizer.py", "vocab.json.orig", "LICENSE.py", "consolidated.00.pth", "notes.txt"),
)


def test_what_makes_and_reads_tokens_and_states_rights_goes_along_and_nothing_else(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for name in (*KEPT, *LEFT, "config.json", "README.md", "model.safetensors", ".gitattributes", "onnx/model.onnx"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name, encoding="utf-8")
    (source / "additional_chat_templates" / "evil.py").write_text("")
    copy_companions(source, target)
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {name: name for name in KEPT}
    assert left_behind(source) == sorted([*LEFT, "onnx/"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint with files of every sort that is read."""
    source = write_source(tmp_path / "source", model())
    for name in ("special_tokens_map.json", "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "x.jinja").write_text("x")
    return source


def shard(source: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))


READ = (
    *("config.json", "model.safetensors", "special_tokens_map.json", "tokenizer_config.json", "generation_config.json"),
    *("chat_template.jinja", "LICENSE", "README.md", "additional_chat_templates/x.jinja"),
    *("additional_chat_templates", "part.safetensors", "model.safetensors.index.json"),
)


def moved(source: Path, name: str, there: Path) -> Path:
    """The file, aside, and in its place nothing."""
    if name.startswith(("part", "model.safetensors.index")):
        shard(source)
    there.parent.mkdir(parents=True, exist_ok=True)
    (source / name).rename(there)
    return there


def away(source: Path, name: str) -> str:
    """A link to another directory of this machine."""
    there = moved(source, name, source.parent / "elsewhere" / "secret")
    (source / name).symlink_to(there)
    return str(there)


def relative(source: Path, name: str) -> str:
    there = moved(source, name, source.parent / "elsewhere" / "secret")
    (source / name).symlink_to(os.path.relpath(there, (source / name).parent))
    return str(there)


def chain(source: Path, name: str) -> str:
    """By way of another link beside it."""
    there = moved(source, name, source.parent / "elsewhere" / "secret")
    (source / "innocent").symlink_to(there)
    (source / name).symlink_to(source / "innocent")
    return str(there)


def dangling(source: Path, name: str) -> str:
    moved(source, name, source.parent / "elsewhere" / "secret").rename(source.parent / "gone")
    (source / name).symlink_to("../elsewhere/secret")
    return "../elsewhere/secret"


def circle(source: Path, name: str) -> str:
    moved(source, name, source.parent / "elsewhere" / "secret")
    (source / name).symlink_to(Path(name).name)
    return Path(name).name


def blobs_elsewhere(source: Path, name: str) -> str:
    """A directory `blobs` that is none of a cache."""
    there = moved(source, name, source.parent.parent / "blobs" / "secret")
    (source / name).symlink_to(there)
    return str(there)


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("lead", [away, relative, chain, dangling, circle, blobs_elsewhere])
def test_a_link_out_of_the_checkpoint_is_refused_naming_link_and_target(
    lead: Callable[[Path, str], str], name: str, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "a" / "b" / "source"
    source.parent.mkdir(parents=True)
    checkpoint.rename(source)
    target = lead(source, name)
    with pytest.raises(UserError) as caught:
        open_checkpoint("source", source)
    line = str(caught.value)
    assert line.startswith(f"{source / name}")
    assert f"is a link to {target}" in line
    assert "; put the file itself there" in line
    if name != "README.md":  # of which a growth reads nothing
        with pytest.raises(UserError, match="is a link to"):
            scale_up(source, tmp_path / "target", padded(model(), growth(), hidden_size=16), growth(), 0)
        assert not list((tmp_path).glob("target/*secret*"))


def test_a_link_to_a_file_of_this_machine_never_ends_in_a_target(checkpoint: Path) -> None:
    (checkpoint / "special_tokens_map.json").unlink()
    (checkpoint / "special_tokens_map.json").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"special_tokens_map\.json: is a link to /etc/hostname, outside of"):
        companions(checkpoint)


def test_links_that_stay_inside_are_followed_and_become_files(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "files").mkdir()
    for name in ("config.json", "model.safetensors", "LICENSE", "additional_chat_templates/x.jinja", "README.md"):
        there = checkpoint / "files" / Path(name).name
        (checkpoint / name).rename(there)
        (checkpoint / name).symlink_to(os.path.relpath(there, (checkpoint / name).parent))
    (tmp_path / "by another name").symlink_to(checkpoint)
    for source in (checkpoint, tmp_path / "by another name"):
        assert open_checkpoint("source", source).model == model()
        target = tmp_path / f"target of {source.name}"
        copy_companions(source, target)
        assert (target / "LICENSE").read_text() == "{}"
        assert not any(path.is_symlink() for path in target.rglob("*"))


def test_a_snapshot_of_a_hub_cache_consists_of_links_to_its_blobs(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / "0123"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(checkpoint.rglob("*")) if path.is_file()):
        blob, link = cache / "blobs" / f"{number:064x}", snapshot / path.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    assert open_checkpoint("source", snapshot).model == model()
    assert (snapshot / "additional_chat_templates" / "x.jinja") in companions(snapshot)
    (snapshot / "LICENSE").unlink()
    for elsewhere in (cache / "refs" / "main", cache / "blobs" / "deeper" / "x", tmp_path / "hub" / "blobs" / "x"):
        elsewhere.parent.mkdir(exist_ok=True)
        elsewhere.write_text("secret")
        (snapshot / "LICENSE").symlink_to(elsewhere)
        assert "outside of the checkpoint" in str(links.outside(snapshot / "LICENSE", snapshot))
        (snapshot / "LICENSE").unlink()


def test_blobs_that_are_themselves_a_link_are_not_a_cache(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    shutil.copytree(checkpoint, snapshot)
    (snapshot.parent.parent / "blobs").symlink_to("/etc")
    (snapshot / "NOTICE").symlink_to("../../blobs/hostname")
    with pytest.raises(UserError, match="NOTICE: is a link to /etc/hostname, outside of the checkpoint"):
        companions(snapshot)


def test_digests_of_a_source_name_its_templates_by_their_folder(checkpoint: Path) -> None:
    source = open_checkpoint("source", checkpoint)
    names = {str(path.relative_to(checkpoint)) for path in companions(checkpoint)}
    assert "additional_chat_templates/x.jinja" in names
    found = identity.digests([checkpoint / hf_config.CONFIG_FILE, *companions(checkpoint)])
    assert found.keys() == names | {"config.json"}
    assert source.directory == checkpoint
