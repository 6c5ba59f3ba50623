"""Continuing texts: greedy, or drawn with a seed. The same checkpoint, prompt and settings give the same text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aquilamoe.checkpoint.hf_config import read_eos_token_id
from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.config.evaluation import GenerationConfig
from aquilamoe.data.tokenizer import encode, load_tokenizer
from aquilamoe.model.transformer import Decoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CUT = "\N{REPLACEMENT CHARACTER}"  # what a character becomes of which only the first bytes were generated


class Generator:
    """A checkpoint's model and tokenizer, to continue texts with."""

    def __init__(self, model: Decoder, tokenizer: "Tokenizer", eos_token_id: int | None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.eos_token_id = eos_token_id

    @staticmethod
    def open(directory: Path) -> "Generator":
        """Of a Hugging Face directory that has a tokenizer.json, in float32."""
        return Generator(load_model(directory), load_tokenizer(directory), read_eos_token_id(directory))

    def continue_texts(self, prompts: Sequence[str], settings: GenerationConfig) -> list[str]:
        """The continuation of each prompt, without the prompt."""
        rows = [self.encode(prompt) for prompt in prompts]
        written = continuations(self.model, rows, settings, self.eos_token_id)
        return [self.decode(tokens) for tokens in written]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; an empty one is what follows the end of a text."""
        tokens = encode(self.tokenizer, [text])[0]
        return tokens or [self.eos_token_id or 0]

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens))).rstrip(CUT)


@torch.no_grad()
def continuations(
    model: Decoder, prompts: Sequence[Sequence[int]], settings: GenerationConfig, eos_token_id: int | None
) -> list[list[int]]:
    """Tokens that follow each prompt (one token at least), up to `settings.max_new_tokens` or the end of the text.

    A step computes the whole context again, of which the model sees its last `max_position_embeddings` tokens: no
    keys and values are kept. Prompts go together; shorter ones are filled up behind, where a causal model never looks.
    """
    assert all(prompts)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    window, rows = model.config.max_position_embeddings, [list(prompt) for prompt in prompts]
    open_rows = list(range(len(rows)))
    for _ in range(settings.max_new_tokens):
        seen = [rows[index][-window:] for index in open_rows]
        longest = max(map(len, seen))
        tokens_bt = torch.tensor([row + [0] * (longest - len(row)) for row in seen], device=device)
        hidden_btd, _ = model.model(tokens_bt)
        last_b = torch.tensor([len(row) - 1 for row in seen], device=device)
        logits_bv = model.lm_head(hidden_btd[torch.arange(len(seen), device=device), last_b])
        for index, token in zip(open_rows, _choose(logits_bv, settings.temperature, generator), strict=True):
            rows[index].append(token)
        open_rows = [index for index in open_rows if rows[index][-1] != eos_token_id]
        if not open_rows:
            break
    written = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [row[:-1] if row and row[-1] == eos_token_id else row for row in written]


def _choose(logits_bv: Tensor, temperature: float, generator: torch.Generator) -> list[int]:
    if temperature == 0:
        return [int(token) for token in logits_bv.argmax(dim=-1)]
    shares_bv = (logits_bv.float().cpu() / temperature).softmax(dim=-1)
    return [int(token) for token in torch.multinomial(shares_bv, 1, generator=generator).squeeze(1)]
