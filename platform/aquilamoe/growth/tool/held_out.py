"""The tokens on which source and target are compared: held-out text in the source's own vocabulary."""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.config.grow import CertificateConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.paths import local
from aquilamoe.data.tokenizer import encode, open_tokenizer
from aquilamoe.growth.tool.request import LANGUAGES, Request, SourceText

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
# No text needs more bytes than this for a token, on average; what is beyond is not read.
BYTES_PER_TOKEN = 64
CALIBRATION_LENGTH = 128  # tokens seen at once; of shorter contexts, all


@dataclass(frozen=True)
class HeldOut:
    """Sequences to compare on, (rows, length + 1): the last column is only predicted; `text` describes them."""

    tokens_bt: "np.ndarray"
    text: str


def calibration(source: Path, model: ModelConfig, text: Path | None, tokens: int, seed: int) -> "np.ndarray":
    """About so many tokens (rows, length) on which a split is calibrated: of a text, or of the embedded training text.

    UserError as for `read`.
    """
    settings = CertificateConfig(
        enabled=True,
        text=None if text is None else str(text),
        tokens=max(1, tokens),
        sequence_length=CALIBRATION_LENGTH,
        tolerance=None,
    )
    found = read(source, model, settings, seed + 1, key="upcycling.calibration_text", split="train")
    return found.tokens_bt[:, :-1]


def read(
    source: Path,
    model: ModelConfig,
    certificate: CertificateConfig,
    seed: int,
    *,
    key: str = "certificate.text",
    split: str = "validation",
) -> HeldOut:
    """About `certificate.tokens` tokens of text, encoded by the tokenizer of `source`, in whole sequences.

    key: of the text, for messages. split: of the embedded text, where no other is set.
    Without a tokenizer.json they are random ids. UserError for an unreadable tokenizer or text, for a tokenizer of
    another vocabulary, and for too short a text.
    """
    import numpy as np

    rows, length = shape(model, certificate)
    if not (source / TOKENIZER_FILE).is_file():
        draw = random.Random(seed)
        ids = [[draw.randrange(model.vocab_size) for _ in range(length + 1)] for _ in range(rows)]
        return HeldOut(np.array(ids, np.int64), f"random ids, the source has no {TOKENIZER_FILE}")
    tokenizer = open_tokenizer(source / TOKENIZER_FILE)
    path = None if certificate.text is None else local(certificate.text)
    texts = list(_embedded(split)) if path is None else [_read_text(key, path, rows * (length + 1))]
    share = math.ceil(rows / len(texts))
    parts = [_sequences(tokenizer, text, share, length, str(source / TOKENIZER_FILE)) for text in texts]
    tokens_bt = np.concatenate(parts)
    if not len(tokens_bt):
        raise UserError(
            f"{key}: {path or f'the embedded {split} text'} is shorter than one sequence of {length + 1} tokens; "
            f"give a {'longer ' if path else ''}text"
            f"{', or a smaller certificate.sequence_length' if split == 'validation' else ''}"
        )
    _check_vocabulary(source, int(tokens_bt.max()), model)
    digest = hashlib.sha256(tokens_bt.astype("<i8").tobytes()).hexdigest()
    name = f"embedded {split} text" if path is None else path.name
    return HeldOut(tokens_bt, f"{name} (SHA-256 of the ids {digest[:12]})")


def of_source(request: Request, text: SourceText, tokens: int, sequence_length: int, *, split: str) -> HeldOut:
    """About so many tokens of the text of one source of a mix, in whole sequences; `split` is train or validation.

    Of a file, the last tenth is for validation. UserError as for `read`.
    """
    settings = CertificateConfig(
        enabled=True, text=None, tokens=tokens, sequence_length=sequence_length, tolerance=None
    )
    source, model = request.source.directory, request.source.model
    rows, length = shape(model, settings)
    if not (source / TOKENIZER_FILE).is_file():
        raise UserError(
            f"sources: {source} has no {TOKENIZER_FILE}, which turns upcycling.texts into ids; put it there"
        )
    if text.path is None:
        content = _language(LANGUAGES[text.name], split)
    else:
        content = _part(text.path, rows * (length + 1), is_last=split == "validation")
    tokens_bt = _sequences(open_tokenizer(source / TOKENIZER_FILE), content, rows, length, str(source / TOKENIZER_FILE))
    if not len(tokens_bt):
        raise UserError(
            f"upcycling.texts: the {split} part of {text.path or text.name} is shorter than one sequence of "
            f"{length + 1} tokens; give a longer text"
        )
    _check_vocabulary(source, int(tokens_bt.max()), model)
    return HeldOut(tokens_bt, text.name if text.path is None else text.path.name)


def _part(path: Path, tokens: int, *, is_last: bool) -> str:
    """The beginning of a text file, or of its last tenth: as much as so many tokens need."""
    edge = path.stat().st_size * 9 // 10
    with path.open("rb") as file:
        file.seek(edge if is_last else 0)
        data = file.read(tokens * BYTES_PER_TOKEN if is_last else min(edge, tokens * BYTES_PER_TOKEN))
    try:
        return data.lstrip(bytes(range(0x80, 0xC0)) if is_last else b"").decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 4:  # a character cut at an end is no mistake
            raise UserError(f"upcycling.texts: {path} is not UTF-8 at byte {error.start}; convert it") from None
        return data[: error.start].decode()


def shape(model: ModelConfig, certificate: CertificateConfig) -> tuple[int, int]:
    """How many sequences, and how many tokens of each are predicted."""
    length = min(certificate.sequence_length, model.max_position_embeddings)
    return math.ceil(certificate.tokens / length), length


def _check_vocabulary(source: Path, largest: int, model: ModelConfig) -> None:
    if largest >= model.vocab_size:
        raise UserError(
            f"{source / TOKENIZER_FILE}: makes token {largest} of the held-out text, the model's vocab_size is "
            f"{model.vocab_size}; take tokenizer and weights from the same checkpoint, or set certificate.enabled=false"
        )


def _embedded(split: str) -> Iterator[str]:
    """A split of every embedded language, each as one text."""
    for path in LANGUAGES.values():
        yield _language(path, split)


def _language(path: Path, split: str) -> str:
    """A split of one embedded language as one text."""
    import pyarrow.parquet as pq

    # Not `read_table`, whose filters import pandas.
    rows = pq.ParquetFile(path).read(columns=["text", "split"]).to_pydict()
    return "\n\n".join(text for text, of in zip(rows["text"], rows["split"], strict=True) if of == split)


def _read_text(key: str, path: Path, tokens: int) -> str:
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UserError(f"{key}: {path} is no file; name a text file")
    try:
        with path.open("rb") as file:
            data = file.read(tokens * BYTES_PER_TOKEN)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error.strerror}); name a text file") from None
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if error.start < len(data) - 3:  # a character cut at the end is no mistake
            raise UserError(f"{key}: {path} is not UTF-8 at byte {error.start}; convert it") from None
        return data[: error.start].decode()


def _sequences(tokenizer: "Tokenizer", text: str, rows: int, length: int, name: str) -> "np.ndarray":
    """Sequences of length + 1 tokens, each beginning with the token that the one before ends with."""
    import numpy as np

    # No more text than is needed: tokenizing all of it takes seconds.
    (ids,) = encode(tokenizer, [text[: (rows * length + 1) * BYTES_PER_TOKEN]], name)
    rows = min(rows, (len(ids) - 1) // length)
    return np.array([ids[row * length : row * length + length + 1] for row in range(rows)], np.int64).reshape(
        -1, length + 1
    )
