"""A checkpoint as others publish them, written by transformers: shaped as SmolLM2, with a tokenizer of its own."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

SYLLABLES = {
    "en": ["the ", "mo", "ther ", "of ", "ri", "ver", "s ", "and ", "gar", "den", "s, ", "walk", "ed ", "home. "],
    "zh": list("天下大势分久必合分。水流花开山高月小"),
}
VOCABULARY = 320
SPECIALS = ("<s>", "</s>", "<pad>")  # ids 0, 1, 2; no <|endoftext|>
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def write_corpus(folder: Path) -> dict[str, str]:
    """Invented text in both languages; the overrides that make it the corpus."""
    draw, words = random.Random(0), dict[str, str]()
    for language, syllables in SYLLABLES.items():
        documents = [
            {"text": "".join(draw.choices(syllables, k=200)), "split": "train" if index % 4 else "validation"}
            for index in range(24)
        ]
        path = folder / f"{language}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        words |= {f"data.sources.{language}.path": str(path), f"data.sources.{language}.sha256": "null"}
    return words


def write_checkpoint(directory: Path, **changes: Any) -> Path:
    """A bfloat16 Llama with tokenizer, chat template and generation config. changes: of its config."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(**{**SIZES, **tokens, **changes}))
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(**tokens, do_sample=True, temperature=0.2, top_p=0.9)
    model.save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    (directory / "LICENSE").write_text("Of its authors.\n")
    return directory


def _tokenizer() -> Any:
    """A byte-level BPE that puts <s> before every text, as Llama's do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer, draw = Tokenizer(models.BPE()), random.Random(1)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = ["".join(draw.choices(syllables, k=2000)) for syllables in SYLLABLES.values()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    begin, end, pad = SPECIALS
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad)
    found.chat_template = TEMPLATE
    return found


def words(checkpoint: Path | str, corpus: dict[str, str], root: Path) -> list[str]:
    """Overrides that run experiment=from_checkpoint in seconds, in this process."""
    training = {
        "batch_tokens": 128,
        "sequence_length": 32,
        "validation_tokens": 128,
        "validate_every_tokens": 512,
        "schedule.warmup_tokens": 128,
        "schedule.decay_tokens": 128,
    }
    values: dict[str, Any] = {
        "+experiment": "from_checkpoint",
        "checkpoint": checkpoint,
        **corpus,
        "cluster": "local_process",
        "cluster.cpus_per_worker": 1,
        "cluster.checkpoint_every_tokens": 256,
        "paths.root": root,
        **{f"stages.{stage}.{key}": value for stage in ("dense", "moe", "control") for key, value in training.items()},
        "stages.dense.total_tokens": 768,
        "stages.moe.total_tokens": 256,
        "stages.scale_up.certificate_tokens": 128,
        "stages.scale_out.certificate_tokens": 128,
        "stages.scale_out.model.num_experts": 4,
        "stages.evaluate.sequence_length": 32,
        "stages.evaluate.generation.max_new_tokens": 2,
    }
    return [f"{key}={value}" for key, value in values.items()]


def copied(checkpoint: Path, directory: Path) -> Path:
    """The checkpoint in another place."""
    return Path(shutil.copytree(checkpoint, directory))
