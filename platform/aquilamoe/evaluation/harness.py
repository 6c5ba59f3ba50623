"""A checkpoint as lm-eval sees it, and its results on tasks. lm-eval is the optional extra `evaluation`."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tasks are local files: no network requests
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from aquilamoe.config.evaluation import GenerationConfig
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.data.tokenizer import encode
from aquilamoe.evaluation.generation import Generator

ROWS = 16  # continuations scored at once
Request = tuple[Any, list[int], list[int]]


def evaluate(writer: Generator, folders: Sequence[Path], names: Sequence[str], cache: Path) -> dict[str, Any]:
    """lm-eval's results for tasks of some folders; UserError for a task that is in none of them.

    cache: where `datasets` keeps its copies.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False)
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(
                f"tasks: there is no task '{name}' in {', '.join(map(str, folders))}; "
                f"{nearest(name, manager.all_tasks)}"
            )
    import datasets

    datasets.config.HF_DATASETS_CACHE = cache
    with _silent():
        results = simple_evaluate(model=Harness(writer), tasks=list(names), task_manager=manager, bootstrap_iters=0)
    assert results is not None, "the first process gets the results"
    return dict(results)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the standard error of lm-eval and of the git that it queries for a commit; errors are raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


class Harness(TemplateLM):
    """Scores and continues with our own model. The numbers are those of lm-eval's `hf` model on the same directory."""

    def __init__(self, writer: Generator) -> None:
        super().__init__()
        self.writer = writer
        self.window = writer.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.writer.eos_token_id or 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return encode(self.writer.tokenizer, [string])[0]

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether it is what greedy decoding gives."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            for index, score in zip(part, self._score([requests[index] for index in part]), strict=True):
                scores[index] = score
        return scores

    @torch.no_grad()
    def _score(self, requests: list[Request]) -> list[tuple[float, bool]]:
        rows = [(context + continuation)[-(self.window + 1) :] for _, context, continuation in requests]
        longest = max(map(len, rows)) - 1
        tokens_bt = torch.tensor([row[:-1] + [0] * (longest - len(row) + 1) for row in rows])
        logits_btv, _ = self.writer.model(tokens_bt)
        scores = []
        for logits_tv, row, (_, _, continuation) in zip(logits_btv, rows, requests, strict=True):
            targets_c = torch.tensor(continuation[-(len(row) - 1) :])
            logits_cv = logits_tv[len(row) - 1 - len(targets_c) : len(row) - 1].float()
            logs_c = logits_cv.log_softmax(dim=-1).gather(1, targets_c[:, None])
            scores.append((float(logs_c.sum()), bool((logits_cv.argmax(dim=-1) == targets_c).all())))
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows that do not overlap in what they score."""
        sums = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text), self.eot_token_id, self.window, context_len=1)
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            sums.append(sum(log for log, _ in scored))
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the first of the strings that end them."""
        texts = []
        for request in requests:
            prompt, options = request.args
            settings = GenerationConfig(
                max_new_tokens=int(options.get("max_gen_toks", 64)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
            )
            (text,) = self.writer.continue_texts([prompt], settings)
            for stop in options.get("until", []):
                text = text.partition(stop)[0] if stop else text
            texts.append(text)
        return texts
