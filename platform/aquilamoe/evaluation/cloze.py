"""Tasks for lm-eval out of a corpus' own held-out text: files, which need no network and no other data.

`cloze_<source>`: a passage, its true continuation and three that follow other passages; which is likeliest? Chance is
0.25. `bits_<source>`: bits per byte of whole passages. Passages are the same for the same corpus.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from aquilamoe.config.messages import UserError
from aquilamoe.data.corpus import read_documents, source_names, split_file

CONTEXT_BYTES, ENDING_BYTES = 240, 60  # of UTF-8: about as many tokens in every language
CHOICES = 4
CLOZE = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 1.0}}
"""
BITS = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
metadata: {{version: 1.0}}
"""


def write_tasks(corpus: Path, folder: Path, items: int) -> list[str]:
    """Write the tasks of a prepared corpus, at most `items` items each; return their names.

    corpus: output folder of a corpus stage. UserError if a source's held-out text is too short for a choice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for source in source_names(corpus):
        passages = list(_passages(corpus, source, items))
        if len(passages) < CHOICES:
            raise UserError(
                f"{split_file(corpus, 'validation', source)}: {len(passages)} passages of "
                f"{CONTEXT_BYTES + ENDING_BYTES} bytes, a choice needs {CHOICES}; hold out more text "
                "(data.validation_fraction)"
            )
        texts = [{"text": context + ending} for context, ending in passages]
        names += [
            _write(folder, f"cloze_{source}", CLOZE, _items(passages, source)),
            _write(folder, f"bits_{source}", BITS, texts),
        ]
    return names


def _write(folder: Path, name: str, task: str, lines: list[dict[str, object]] | list[dict[str, str]]) -> str:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    (folder / f"{name}.yaml").write_text(task.format(name=name, data=json.dumps(str(data))), encoding="utf-8")
    return name


def _items(passages: list[tuple[str, str]], seed: str) -> list[dict[str, object]]:
    """The endings of each item in a random order."""
    draw, choices = random.Random(seed), []
    for index, (context, ending) in enumerate(passages):
        others = draw.sample([other for at, other in enumerate(passages) if at != index], CHOICES - 1)
        endings = [ending, *(other for _, other in others)]
        draw.shuffle(endings)
        choices.append({"context": context, "endings": endings, "answer": endings.index(ending)})
    return choices


def _passages(corpus: Path, source: str, items: int) -> Iterator[tuple[str, str]]:
    """(context, ending) spread evenly over the held-out text."""
    found = [
        passage
        for texts in read_documents(split_file(corpus, "validation", source))
        for text in texts
        for passage in _cut(" ".join(text.split()))
    ]
    step = max(1, len(found) // items)
    yield from found[::step][:items]


def _cut(text: str) -> Iterator[tuple[str, str]]:
    """One passage after the other, cut between words where there are words."""
    start = 0
    while True:
        middle = _word_end(text, start, CONTEXT_BYTES)
        end = _word_end(text, middle, ENDING_BYTES)
        if end >= len(text):
            return
        yield text[start:middle], text[middle:end]
        start = end


def _word_end(text: str, start: int, size: int) -> int:
    """The end of about `size` bytes from `start`: before a space if one is near, so that a piece begins with it."""
    end, taken = start, 0
    while end < len(text) and taken < size:
        taken += len(text[end].encode())
        end += 1
    space = text.find(" ", end, end + 20)
    return space if space >= 0 else end
