import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import commands
from aquilamoe.config.messages import UserError
from aquilamoe.lineage.artifacts import Artifact, read_artifact, weights_sha256
from aquilamoe.lineage.differences import circumstances, differ, differing_files, made
from aquilamoe.lineage.graph import ArtifactGraph, read_graph
from aquilamoe.lineage.lookup import find
from aquilamoe.lineage.tree import _loss, tree
from aquilamoe.lineage.verify import verify
from aquilamoe.pipeline import fingerprint as identity
from aquilamoe.pipeline.integrity import files_sha256
from aquilamoe.pipeline.records import seal
from aquilamoe.pipeline.store import Store

MODEL = {"hidden_size": 16, "num_experts": 0}
Query = Callable[..., list[str]]


@dataclass
class Shelf:
    """A store that is filled by hand: outputs of a few bytes, with the records that a runner would write."""

    root: Path

    def put(
        self, stage: str, kind: str = "pretrain", sources: dict[str, Artifact] | None = None, **config: Any
    ) -> Artifact:
        inputs = {role: source.fingerprint for role, source in (sources or {}).items()}
        recipe = identity.recipe(kind, 1, config, inputs)
        return self.publish(stage, recipe, sources or {})

    def publish(self, stage: str, recipe: dict[str, Any], sources: dict[str, Artifact]) -> Artifact:
        store, digest = Store(self.root), identity.fingerprint(recipe)
        partial = store.partial(stage, digest)
        (partial / "model").mkdir(parents=True)
        (partial / "metrics.jsonl").write_text("{}\n")
        (partial / "model" / "config.json").write_text("{}")
        for number in (1, 2):
            name = f"model-0000{number}-of-00002.safetensors"
            (partial / "model" / name).write_text(json.dumps([number, recipe], sort_keys=True))
        record = {
            "stage": stage,
            "kind": recipe["kind"],
            "fingerprint": digest,
            "recipe": recipe,
            "inputs": {
                role: {
                    "stage": each.stage,
                    "fingerprint": each.fingerprint,
                    "directory": each.directory.name,
                    "sha256": files_sha256(each.record),
                }
                for role, each in sources.items()
            },
            "metrics": {"params_total": 1000, "params_active": 400, "tokens": 512, "lineage_tokens": 2048},
            "versions": {"torch": "2.13.0"},
            "git_commit": "0123456789abcdef",
            "finished": f"2026-01-01T00:00:{len(list(store.stages.iterdir())):02}+00:00",
            "seconds": 1.5,
        }
        store.publish(partial, record)
        return read_artifact(store.directory(stage, digest))

    @property
    def library(self) -> ArtifactGraph:
        return read_graph(self.root / "stages")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def line(shelf: Shelf) -> list[Artifact]:
    """A corpus, a small model, the grown one, and its continuation."""
    tokens = shelf.put("tokens", "tokenize")
    small = shelf.put("prepare", sources={"tokens": tokens}, model=MODEL, learning_rate=0.003, total_tokens=512)
    grown = shelf.put(
        "grow",
        "scale_up",
        {"source": small, "tokens": tokens},
        model={**MODEL, "hidden_size": 32},
        growth={"method": "fpi"},
    )
    sources = {"source": grown, "tokens": tokens}
    return [
        tokens,
        small,
        grown,
        shelf.put("dense", sources=sources, model=None, learning_rate=0.001, total_tokens=512),
    ]


def expected(*entries: Artifact) -> dict[str, str]:
    return {entry.stage: entry.fingerprint for entry in entries}


def rewrite(entry: Artifact, **changes: Any) -> None:
    (entry.directory / "record.json").write_text(seal({**entry.record, **changes}))


def test_an_output_is_found_by_stage_directory_content_fingerprint_and_sha256(
    shelf: Shelf, line: list[Artifact]
) -> None:
    dense, shard = line[-1], next(iter(line[-1].weights.values()))
    paths = [dense.directory, dense.directory / "model", dense.directory / "model" / "model-00001-of-00002.safetensors"]
    prefixes = [dense.fingerprint[:digits] for digits in range(6, 13)]
    identities = [
        *prefixes,
        dense.fingerprint,
        dense.fingerprint[:8].upper(),
        shard,
        shard[:16],
        dense.weights_sha256 or "",
    ]
    for text in ["dense", dense.directory.name, *map(str, paths), *identities]:
        assert find(shelf.library, expected(*line), text).directory == dense.directory, text


def test_the_sha256_of_shards_is_that_of_what_sha256sum_prints(tmp_path: Path) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": str(n) * 64 for n in (2, 1)}
    (tmp_path / "sums").write_text("".join(f"{str(n) * 64}  model-0000{n}-of-00002.safetensors\n" for n in (1, 2)))
    assert weights_sha256(shards) == hashlib.sha256((tmp_path / "sums").read_bytes()).hexdigest()
    assert weights_sha256({"model.safetensors": "1" * 64}) == "1" * 64


def test_a_stage_without_an_output_as_configured_names_the_others_or_gives_the_newest(
    shelf: Shelf, line: list[Artifact]
) -> None:
    first, second = line[-1], shelf.put("dense", sources={"tokens": line[0]}, learning_rate=0.5)
    now = {"dense": "0" * 12}
    assert find(shelf.library, now, "dense", latest=True).directory == second.directory
    with pytest.raises(UserError) as error:
        find(shelf.library, now, "dense")
    assert str(error.value) == (
        "dense: has no output as it is configured now (000000000000); run it first (there are "
        f"{second.directory.name}, {first.directory.name}; action=why shows the differences)"
    )


def test_an_ambiguous_prefix_names_both_candidates(shelf: Shelf) -> None:
    entries = [shelf.put("prepare", learning_rate=rate) for rate in (1, 2)]
    for entry, digits in zip(entries, ("abcd11", "abcd22"), strict=True):
        files = {**entry.record["files"], "model/model.safetensors": {"sha256": digits * 10 + "0000", "bytes": 1}}
        rewrite(entry, files=files)
    with pytest.raises(UserError) as error:
        find(shelf.library, {}, "ABCD")
    names = [entry.directory.name for entry in entries]
    assert str(error.value) == (
        f"ABCD: is the beginning of abcd11abcd11 ({names[0]}) and of abcd22abcd22 ({names[1]}); give more digits"
    )
    assert find(shelf.library, {}, "abcd2").directory == entries[1].directory


def test_the_same_weights_under_two_names_are_the_output_that_had_them_first(shelf: Shelf) -> None:
    first, second = shelf.put("prepare", learning_rate=1), shelf.put("export", "export")
    rewrite(second, files=first.record["files"])
    assert find(shelf.library, {}, str(first.weights_sha256)).directory == first.directory


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dens", "dens: no such output; give a stage, .*; did you mean 'dense'?"),
        ("0000", "0000: no fingerprint and no SHA-256 of weights begins with this; give a stage"),
        ("/nowhere/x", "/nowhere/x: does not exist; give a stage"),
        ("{root}", "{root}: has no record.json; without it, how the output was made is unknown"),
        ("{root}/stages/moe-1.partial", "{root}/stages/moe-1.partial: is not complete; the command that started it"),
    ],
)
def test_an_unknown_output_is_one_line(shelf: Shelf, line: list[Artifact], text: str, message: str) -> None:
    (shelf.root / "stages" / "moe-1.partial").mkdir()
    with pytest.raises(UserError, match="^" + message.format(root=shelf.root)) as error:
        find(shelf.library, expected(*line), text.format(root=shelf.root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_text("{"), r"record.json: cannot be read \(.*\); it is .*; restore it, or remove"),
        (lambda path: path.write_text('{"recipe": {"kind": "x"}}'), "record.json: has no fingerprint; it is no record"),
        (lambda path: path.write_text("[]"), "record.json: has no fields; it is no record"),
        (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": "1"')), "no recipe.version"),
        (
            lambda path: path.write_text(path.read_text().replace('"files": {', '"files": {"../x": 1, ')),
            "has a files that is none",
        ),
        (
            lambda path: path.write_text(
                path.read_text().replace('"files": {', '"files": {"/x": {"sha256": "", "bytes": 1}, ')
            ),
            "'/x', which is",
        ),
        (
            lambda path: path.write_text(
                path.read_text().replace("0.003", "0.004").replace("0.001", "0.002").replace("fpi", "aki")
            ),
            "without its own",
        ),
        (lambda path: path.unlink(), "(record.json: is missing|has no record.json)"),
    ],
)
def test_a_damaged_record_is_one_line_for_a_query_and_a_branch_for_a_descendant(
    shelf: Shelf, line: list[Artifact], damage: Callable[[Path], None], message: str
) -> None:
    damage(line[2].directory / "record.json")
    for text in ("grow", line[2].directory.name, line[2].fingerprint, str(line[2].directory)):
        with pytest.raises(UserError, match=message):
            find(shelf.library, expected(*line), text)
    shown = tree(shelf.library, line[-1])
    assert re.search(rf"^├─ source: grow {line[2].fingerprint} .*{message}", "\n".join(shown), re.MULTILINE)


def test_a_tree_shows_every_ancestor_once_with_what_it_changed(shelf: Shelf, line: list[Artifact]) -> None:
    text = "\n".join(tree(shelf.library, line[-1]))
    for entry in line:
        assert (
            text.count(f"{entry.fingerprint}  {entry.kind}") - text.count(f"{entry.fingerprint}  {entry.kind} (above)")
            == 1
        )
        assert text.count(str(entry.weights_sha256)) == 1
    assert "recipe      as prepare, but learning_rate 0.003 -> 0.001\n" in text
    assert "recipe      model.hidden_size 16 -> 32; growth.method fpi\n" in text
    assert "parameters  1,000, 400 of them active" in text
    assert "tokens      512 own, 2,048 with its ancestors" in text
    assert text.count("(above)") == 2


def test_a_removed_ancestor_is_named_in_the_tree(shelf: Shelf, line: list[Artifact]) -> None:
    shutil.rmtree(line[1].directory)
    text = "\n".join(tree(shelf.library, line[-1]))
    assert f"source: prepare {line[1].fingerprint} {line[1].directory.name} is no longer in the store" in text


def test_two_outputs_differ_field_by_field_through_all_they_were_made_from(shelf: Shelf, line: list[Artifact]) -> None:
    tokens, small, *_ = line
    other = shelf.put("prepare", sources={"tokens": tokens}, model=MODEL, learning_rate=0.004, total_tokens=512)
    recipe = {**line[2].recipe, "version": 2, "inputs": {"source": other.fingerprint, "tokens": tokens.fingerprint}}
    grown = shelf.publish("grow", recipe, {"source": other, "tokens": tokens})
    again = shelf.put(
        "dense", sources={"source": grown, "tokens": tokens}, model=None, learning_rate=0.001, total_tokens=1024
    )
    assert differ(made(shelf.library, line[-1]), made(shelf.library, again)) == [
        "total_tokens 512 -> 1024",
        f"inputs.source grow {line[2].fingerprint} -> {grown.fingerprint}",
        "  code version 1 -> 2",
        f"  inputs.source prepare {small.fingerprint} -> {other.fingerprint}",
        "    learning_rate 0.003 -> 0.004",
    ]
    shutil.rmtree(small.directory)
    assert differ(made(shelf.library, line[-1]), made(shelf.library, again))[-1].endswith(
        f"(there is no record of {small.fingerprint}: nothing more is known)"
    )


def test_outputs_of_one_recipe_differ_in_files_packages_and_results(shelf: Shelf, tmp_path: Path) -> None:
    ours, theirs = shelf.put("prepare"), Shelf(tmp_path / "other").put("prepare")
    assert (differing_files(ours, theirs), circumstances(ours, theirs)) == ([], [])
    name = "model/model-00001-of-00002.safetensors"
    files = {**theirs.record["files"], name: {"sha256": "0", "bytes": 1}, "metrics.jsonl": {"sha256": "1", "bytes": 2}}
    rewrite(theirs, files=files, versions={"torch": "2.14.0"}, metrics={**theirs.metrics, "loss_end": 3.5})
    theirs = read_artifact(theirs.directory)
    assert differing_files(ours, theirs) == [name]
    assert circumstances(ours, theirs) == ["made by torch 2.13.0 -> 2.14.0", "result: loss_end (absent) -> 3.5"]


@pytest.mark.parametrize(
    ("losses", "shown"),
    [((6.615705239772797, 5.809366154670716), "6.6157 -> 5.8094"), ((6.6157052, 6.6157053), "6.6157052 -> 6.6157053")],
)
def test_results_have_as_many_digits_as_distinguish_them(
    shelf: Shelf, tmp_path: Path, losses: tuple[float, float], shown: str
) -> None:
    both = [shelf.put("prepare"), Shelf(tmp_path / "other").put("prepare")]
    for entry, loss in zip(both, losses, strict=True):
        rewrite(entry, metrics={**entry.metrics, "loss_end": loss})
    assert circumstances(*[read_artifact(entry.directory) for entry in both]) == [f"result: loss_end {shown}"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "model/config.json", "model/model-00002-of-00002.safetensors"])
def test_any_file_that_does_not_match_its_record_is_named(shelf: Shelf, line: list[Artifact], name: str) -> None:
    dense = line[-1]
    assert verify(dense, shelf.library).problems == []
    path = dense.directory / name
    whole = path.read_bytes()
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    digests = [hashlib.sha256(each).hexdigest()[:12] for each in (flipped, whole)]
    path.write_bytes(flipped)
    assert verify(dense).problems == [f"{name}: has SHA-256 {digests[0]}, its record states {digests[1]}"]
    path.write_bytes(whole + b"x")
    assert verify(dense).problems == [f"{name}: has {len(whole) + 1:,} bytes, its record states {len(whole):,}"]
    path.unlink()
    assert verify(dense).problems == [f"{name}: is missing"]


def test_a_changed_record_a_stranger_and_a_lost_ancestor_are_named(shelf: Shelf, line: list[Artifact]) -> None:
    dense = line[-1]
    (dense.directory / "model" / "note.txt").touch()
    recipe = {**dense.recipe, "config": {**dense.recipe["config"], "learning_rate": 9}}
    rewrite(dense, recipe=recipe)
    shutil.rmtree(line[2].directory)
    assert verify(read_artifact(dense.directory), shelf.library).problems == [
        f"record.json: its recipe has the fingerprint {identity.fingerprint(recipe)}, the record states "
        f"{dense.fingerprint}",
        "model/note.txt: is not in its record",
        f"record.json: was made from grow {line[2].fingerprint}; {line[2].directory.name} is no longer in the store",
    ]


def test_an_input_that_was_made_again_with_other_bytes_is_named_and_one_with_the_same_is_not(
    shelf: Shelf, line: list[Artifact]
) -> None:
    tokens, small, *_ = line
    curves = {**tokens.record["files"], "metrics.jsonl": {"sha256": "f" * 64, "bytes": 3}}
    rewrite(tokens, files=curves, seconds=77.0)
    assert verify(small, shelf.library).problems == []
    was = files_sha256(tokens.record)
    rewrite(tokens, files={**curves, "model/config.json": {"sha256": "f" * 64, "bytes": 2}})
    now = files_sha256(read_artifact(tokens.directory).record)
    assert verify(small, shelf.library).problems == [
        f"record.json: was made from tokens {tokens.fingerprint} when its files had SHA-256 {was[:12]}, now {now[:12]}"
    ]
    reference = {key: value for key, value in small.inputs["tokens"].items() if key != "sha256"}
    rewrite(small, inputs={"tokens": reference})
    assert verify(read_artifact(small.directory), shelf.library).problems == []  # one from before inputs had digests


@pytest.fixture
def root(finished_store: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_store, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def query(
    root: Path, tiny: list[str], compose: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> Query:
    """Do an action of the command in this process; the lines that it prints."""

    def run(*words: str) -> list[str]:
        capsys.readouterr()
        commands.execute(compose(*tiny, f"paths.root={root}", *words), "")
        return capsys.readouterr().out.splitlines()

    return run


def output(root: Path, stage: str) -> Path:
    return next((root / "stages").glob(f"{stage}-*"))


def test_the_tree_of_a_real_pipeline_leads_to_the_corpus(query: Query, root: Path) -> None:
    text = "\n".join(query("action=lineage", "checkpoint=moe"))
    assert [text.index(f" {stage} ") for stage in ("scale_out", "dense", "scale_up", "prepare")] == sorted(
        text.index(f" {stage} ") for stage in ("scale_out", "dense", "scale_up", "prepare")
    )
    weights = output(root, "moe") / "model" / "model.safetensors"
    assert f"SHA-256     {hashlib.sha256(weights.read_bytes()).hexdigest()}" in text
    assert "growth.method aki_pro" in text
    assert "does not claim to keep the function" in text
    assert "└─ corpus: corpus" in text


def test_why_names_the_changed_field_at_the_ancestor_that_has_it(query: Query) -> None:
    assert "as it is configured now." in query("action=why", "checkpoint=moe")[0]
    lines = query("action=why", "checkpoint=moe", "growth=fpi", "stages.moe.learning_rate=0.5")
    assert lines[1] == "  learning_rate 0.001 -> 0.5"
    assert [line.strip() for line in lines if "growth." in line] == [
        "growth.method aki_pro -> fpi",
        "growth.noise 0.0 -> 0.5",
    ]
    assert query("action=why", "checkpoint=moe", "other=dense")[1].endswith("see action=lineage")


def test_verify_fails_with_the_name_of_every_output_that_differs(query: Query, root: Path) -> None:
    assert len([line for line in query("action=verify") if line.endswith(" ok")]) == 11
    path = output(root, "dense") / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"^1 of 11 outputs do not match their records; remove their directories"):
        query("action=verify")
    with pytest.raises(UserError, match=r"^1 of \d outputs"):
        query("action=verify", "checkpoint=moe")
    assert all(line.endswith(" ok") for line in query("action=verify", "checkpoint=control"))


def test_a_checkpoint_is_rebuilt_to_the_byte_by_its_sha256_with_the_ancestors_that_are_whole(
    query: Query, root: Path
) -> None:
    path = output(root, "scale_out") / "model" / "model.safetensors"
    path.write_bytes(b"gone")
    weights = (output(root, "moe") / "model" / "model.safetensors").read_bytes()
    lines = query("action=rebuild", f"checkpoint={hashlib.sha256(weights).hexdigest()[:20]}", "seed=7")
    assert lines[0].endswith("; reusing tokens, dense.")
    assert [line.split()[0] for line in lines if line.endswith(" cached")] == ["tokens", "dense"]
    assert lines[-1].startswith("identical: 9 files, ")
    assert path.read_bytes() == b"gone"
    assert not (root / "rebuild").exists()


def test_a_rebuild_that_gives_other_bytes_names_the_files_and_keeps_them(query: Query, root: Path) -> None:
    entry = read_artifact(output(root, "scale_up"))
    name = "model/model.safetensors"
    rewrite(entry, files={**entry.record["files"], name: {**entry.record["files"][name], "sha256": "0" * 64}})
    for _ in range(2):  # what was kept is not taken for a new attempt
        with pytest.raises(UserError, match=r"1 of \d files differ after the rebuild; .* kept in"):
            query("action=rebuild", "checkpoint=scale_up")
    kept = next((root / "rebuild").glob("*/stages/scale_up-*"))
    assert hashlib.sha256((kept / name).read_bytes()).hexdigest() == entry.record["files"][name]["sha256"]


def test_a_recipe_of_other_code_is_not_rebuilt_and_the_message_names_that_code(query: Query, root: Path) -> None:
    entry = read_artifact(output(root, "export"))
    recipe = {**entry.recipe, "version": 77}
    digest = identity.fingerprint(recipe)
    other = entry.directory.rename(entry.directory.with_name(f"export-{digest}"))
    rewrite(Artifact(other, entry.record), recipe=recipe, fingerprint=digest, git_commit="0123456789abcdef")
    with pytest.raises(UserError) as error:
        query("action=rebuild", f"checkpoint={digest}")
    now = entry.recipe["version"]
    assert str(error.value) == (
        f"export {digest}: cannot be rebuilt by this code: export: version 77 -> {now}; "
        "check out 0123456789ab, which made it"
    )


def test_a_recipe_whose_record_is_gone_is_taken_from_the_experiment_or_missed(query: Query, root: Path) -> None:
    shutil.rmtree(output(root, "tokenizer"))
    assert "tokens" in query("action=rebuild", "checkpoint=prepare")[0]
    with pytest.raises(
        UserError, match=r"cannot be rebuilt, no record has the recipe of \w{12} \(tokenizer of tokens\)"
    ):
        query("action=rebuild", f"checkpoint={output(root, 'prepare')}", "stages.tokenizer.vocab_size=310")


def test_a_query_imports_nothing_heavy_and_writes_nothing(
    finished_store: Path, tiny: list[str], tmp_path: Path
) -> None:
    before = sorted(finished_store.rglob("*"))
    script = """
        import sys
        from aquilamoe.cli.program import run_pipeline
        words = sys.argv[1:]
        for action in ("lineage", "why", "verify"):
            sys.argv = ["efficientscale.py", *words, f"action={action}"]
            run_pipeline()
        print(*sorted({"torch", "ray", "mlflow", "numpy"} & set(sys.modules)), "none")
    """
    words = [
        *tiny,
        f"paths.root={finished_store}",
        f"checkpoint={read_artifact(output(finished_store, 'moe')).fingerprint}",
    ]
    code = "\n".join(line.removeprefix("        ") for line in script.splitlines())
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].strip() == "none"
    assert (sorted(finished_store.rglob("*")), list(tmp_path.iterdir())) == (before, [])


def test_a_loss_states_on_which_tokens_it_was_measured() -> None:
    assert (
        _loss({"source_loss": 3.0, "target_loss": 3.25})
        == "3.0000 -> 3.2500 nats per token, on the certificate's tokens"
    )
