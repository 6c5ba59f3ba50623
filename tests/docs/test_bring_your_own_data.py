"""The commands of docs/bring-your-own-data.md, run as they are written, on a few files."""

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aquilamoe.config import graph
from aquilamoe.pipeline import fingerprint
from aquilamoe.pipeline import plan as planning

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "bring-your-own-data.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("python workflows/efficientscale.py")]
LETTERS = {"en": "abcdefghijklmnop", "zh": "天下大势分久必合却说曹操"}

# In one process, because most of the time is what Python imports. A small vocabulary, as the files are small.
RUN = """
import glob, json, runpy, shlex, sys
sys.path.insert(0, sys.argv[1])
more = ["cluster=local_process", "tracking.enabled=false", "stages.tokenizer.vocab_size=300"]
more += ["data.validation_fraction=0.2"]  # of 60 documents
if __name__ == "__main__":
    for number, command in enumerate(json.loads(sys.argv[2])):
        # The tokenizer that the first command has made is one from elsewhere for another.
        made = (glob.glob("runs0/stages/tokenizer-*") or [""])[0]
        words = shlex.split(command.replace("my/tokenizer", made))
        sys.argv = ["efficientscale.py", *words[2:], *more, f"paths.root=runs{number}"]
        runpy.run_path(sys.path[0] + "/efficientscale.py", run_name="__main__")
"""


def documents(language: str, count: int = 60) -> list[str]:
    draw = random.Random(language)
    words = ["".join(draw.choices(LETTERS[language], k=4)) for _ in range(80)]
    return [" ".join(draw.choices(words, k=60)) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with my/en, my/zh and my/tokenizer, in which every command of the page has been run."""
    here = tmp_path_factory.mktemp("byod")
    (here / "my" / "en").mkdir(parents=True)
    (here / "my" / "zh").mkdir()
    lines = [json.dumps({"text": text}) for text in documents("en")]
    (here / "my" / "en" / "a.jsonl").write_text("\n".join([*lines[:30], '{"text": ', lines[3]]) + "\n")
    (here / "my" / "en" / "b.jsonl").write_text("\n".join([*lines[30:], '{"text": "short"}']) + "\n")
    table = {"text": documents("zh"), "quality": ["high", "low", "high"] * 20}
    pq.write_table(pa.table(table), here / "my" / "zh" / "a.parquet")
    commands = [*COMMANDS[:2], COMMANDS[3]]
    (here / "my" / "hub").mkdir()
    (here / "my" / "hub" / "a.jsonl").write_text("\n".join(lines))
    if importlib.util.find_spec("datasets"):  # whose reader refuses a file with a bad line as a whole
        commands.append(COMMANDS[2].replace("my/en", "my/hub"))
    (here / "run.py").write_text(RUN)
    done = subprocess.run(
        [sys.executable, "run.py", str(ROOT / "workflows"), json.dumps(commands)],
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return here


def counts(folder: Path, run: int) -> dict[str, float | str]:
    (record,) = (folder / f"runs{run}" / "stages").glob("corpus-*/record.json")
    metrics: dict[str, float | str] = json.loads(record.read_text())["metrics"]
    return metrics


def kept(folder: Path, run: int, source: str) -> float:
    return sum(float(counts(folder, run)[f"{split}/{source}/documents"]) for split in ("train", "validation"))


def test_the_page_has_the_commands_that_are_run() -> None:
    assert len(COMMANDS) == 4


def test_the_first_command_makes_token_files_and_counts_what_it_left_out(folder: Path) -> None:
    assert kept(folder, 0, "en") == 61
    assert counts(folder, 0)["left_out/en/not_json"] == counts(folder, 0)["duplicates/en/documents"] == 1
    assert counts(folder, 0)["left_out/en/first"] == "my/en/a.jsonl:31: not JSON"
    (tokens,) = (folder / "runs0" / "stages").glob("tokens-*")
    assert {path.name for path in tokens.glob("*.bin")} == {
        f"{split}-{source}.bin" for split in ("train", "validation") for source in ("en", "zh")
    }
    assert not (tokens / "checkpoints").exists()


def test_filters_keep_what_they_describe(folder: Path) -> None:
    assert kept(folder, 1, "en") == 60
    assert kept(folder, 1, "zh") == 40


def test_a_tokenizer_from_elsewhere_is_that_tokenizer(folder: Path) -> None:
    (learned,) = (folder / "runs0" / "stages").glob("tokenizer-*")
    (adopted,) = (folder / "runs2" / "stages").glob("tokenizer-*")
    assert (adopted / "tokenizer.json").read_bytes() == (learned / "tokenizer.json").read_bytes()


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="pip install -c constraints.txt -e '.[data]'")
def test_a_data_set_takes_the_place_of_a_path(folder: Path) -> None:
    assert kept(folder, 3, "en") == 60


def test_outputs_of_the_embedded_corpus_from_before_there_were_these_keys_are_found(
    compose: Callable[..., dict[str, Any]],
) -> None:
    recipes = planning.recipes(graph.build(graph.parse(compose())))
    prints = [fingerprint.fingerprint(recipes[name]) for name in ("corpus", "tokenizer", "tokens")]
    assert prints == ["1219e7f722a5", "957dc4fa80d8", "5a3adf25b411"]
