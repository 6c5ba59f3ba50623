"""Faithful small versions of published checkpoints, every operation on each of them, judged by transformers.

python tools/published.py [DIRECTORY]

A version has every field of the published config.json (`published_configs.json`), but for sizes: a few heads, layers
and neurons, a vocabulary of 96. Prints what it verified, and exits with 1 if anything is not as it was. Needs
no network; takes about a minute and 100 MB below DIRECTORY (a temporary folder), and writes docs/families.md.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from aquilamoe import api
from aquilamoe.config.messages import UserError

CONFIGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text(encoding="utf-8")
)
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "families.md"
PAGE = """# Families of checkpoints

Made by `python tools/published.py`, and verified by the tests. From {count} published configurations a small version
is made: every field of `config.json` as published, but few heads, layers, neurons and experts. Each operation is done
on it, and transformers judges the target: no missing or unexpected key and no warning when it is loaded; logits in
float32 within {tolerance} of their spread; equal tokenizer, chat template and generation settings; every field of
`config.json` that the operation does not change.

{table}

*wider*: hidden size and heads times 1.5, with LayerNorm times 2; *more neurons*: feed-forwards, or experts, times 1.5;
*deeper*: two silent layers. All three by `growth=fpi growth.noise=0.5 growth.norm=exact growth.depth=interpolate
growth.new_layers=zero`. *(more) experts*: `upcycling=copy` to 4 experts of which a token chooses 2, and of a mixture to
twice as many of which it chooses twice as many. *refused with*: in one line, where no architecture of transformers has
this beside experts.
"""
VOCABULARY, CONTEXT, LAYERS, EXPERTS, HEAD_DIM = 96, 24, 3, 4, 16
EXACT = {"norm": "exact", "depth": "interpolate", "new_layers": "zero"}
FPI = {"method": "fpi", "noise": 0.5, **EXACT}
TOLERANCE = 1e-4  # of the spread of the logits, in float32
# Fields of config.json that no architecture has beside experts, and what a refusal names.
REFUSED = {
    "no_rope_layers": "nope_layers",
    "layer_norm_eps": "layer_norm",
    "partial_rotary_factor": "partial_rotary_factor",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXT = "The mother of the river walked home."
# What a growth may change of config.json beside the sizes that it was given; the weights here are in float32.
FREE = {
    *("architectures", "model_type", "num_hidden_layers", "torch_dtype"),
    *("layer_types", "max_window_layers", "no_rope_layers"),
}
# Mixtral's and OLMoE's spelling of sizes of experts.
ALSO = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """What is done to a checkpoint.

    Attributes:
        title: the column of the table in docs/families.md.
        sizes: of the target, from the source's config.json; None where the family does not have them.
        method: the keyword of the API, `growth` or `upcycling`, and its settings.
    """

    title: str
    sizes: Callable[[Sizes], dict[str, Any] | None]
    method: tuple[str, Mapping[str, Any]] = ("growth", FPI)


def small(published: Sizes) -> dict[str, Any]:
    """A published config.json with small sizes: as many query heads per key-value head (at most 3), tied where tied."""
    group = min(3, published["num_attention_heads"] // published["num_key_value_heads"])
    heads = 2 * group
    kv_heads = heads if published["num_key_value_heads"] == published["num_attention_heads"] else 2
    wide = published["num_attention_heads"] * published.get("head_dim", 0) > published["hidden_size"]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * HEAD_DIM // (2 if wide else 1),
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "pad_token_id": min(published.get("pad_token_id") or 0, VOCABULARY - 1),  # has a row in the embedding
    }
    # Of lists with an entry for each layer the last: SmolLM3's fourth layer is the first that is another.
    layers = published["num_hidden_layers"]
    lists: dict[str, Any] = {
        key: value[-LAYERS:] for key, value in published.items() if isinstance(value, list) and len(value) == layers
    }
    if (scaling := published.get("rope_scaling")) and "long_factor" in scaling:
        pairs = int(HEAD_DIM * published.get("partial_rotary_factor", 1.0)) // 2
        factors = {key: scaling[key][-pairs:] for key in ("short_factor", "long_factor")}
        lists["rope_scaling"] = {**scaling, **factors}
    return {**published, **lists, **{key: value for key, value in sizes.items() if published.get(key) is not None}}


def _wider(config: Sizes) -> dict[str, Any]:
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    times = 2 if "layer_norm_eps" in config else 1.5  # LayerNorm keeps the function at integer ratios
    if heads == kv_heads:
        larger = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": heads}
        return {name: int(size * times) for name, size in larger.items()}
    if "long_factor" in (config.get("rope_scaling") or {}):  # a Phi-3's heads have to fill its hidden size
        return {"hidden_size": hidden * 4 // 3}
    return {
        "hidden_size": hidden * 3 // 2,
        **({"num_attention_heads": heads + kv_heads} if "head_dim" in config else {}),
    }


def _neurons(config: Sizes) -> dict[str, Any]:
    names = ("intermediate_size",) if not _is_sparse(config) else ("moe_intermediate_size", "intermediate_size")
    name = next(name for name in names if name in config)
    if name == "intermediate_size" and _is_sparse(config):
        return {"moe_intermediate_size": 60}
    return {name: config[name] * 3 // 2}


def _deeper(config: Sizes) -> dict[str, Any]:
    return {"num_hidden_layers": config["num_hidden_layers"] + 2}


def _is_sparse(config: Sizes) -> bool:
    return "num_experts_per_tok" in config


def _experts(config: Sizes) -> dict[str, Any]:
    if not _is_sparse(config):
        return {"num_experts": 4, "num_experts_per_tok": 2}
    return {"num_experts": 2 * EXPERTS, "num_experts_per_tok": 4}


OPERATIONS = {
    "wider": Operation("wider", _wider),
    "neurons": Operation("more neurons", _neurons),
    "deeper": Operation("deeper", _deeper),
    "larger": Operation("all of these", lambda config: {**_wider(config), **_neurons(config), **_deeper(config)}),
    "experts": Operation("(more) experts", _experts, ("upcycling", {"method": "copy"})),
}


def make(name: str, folder: Path) -> Path:
    """Write the small version of a published checkpoint: random weights in float32, a tokenizer, a template.

    Args:
        name: of `CONFIGS`.
        folder: where the directory of the checkpoint is made.

    Returns:
        The directory.
    """
    directory = folder / name.replace("/", "--").replace(" ", "-")
    config = small(CONFIGS[name])
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=config["eos_token_id"], temperature=0.6, top_p=0.9, do_sample=True
    )
    model.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _tokenizer().save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**settings, "tokenizer_class": _tokenizer_class(config)}), encoding="utf-8")
    return directory


def _tokenizer_class(config: Sizes) -> str:
    return "Qwen2Tokenizer" if config["model_type"].startswith("qwen") else "PreTrainedTokenizerFast"


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False)
    trained.train_from_iterator([TEXT] * 8, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


def apply(operation: Operation, source: Path, target: Path) -> Path:
    """Do an operation by the Python API, without a certificate: transformers judges."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    sizes = operation.sizes(config) or {}
    keyword, method = operation.method
    function: Any = api.grow if keyword == "growth" else api.upcycle
    function(source, target, model=sizes, **{keyword: method}, certificate={"enabled": False})
    return target


def problems(operation: Operation, source: Path, target: Path) -> Iterator[str]:
    """What transformers sees in a target that is not as in its source; nothing for a growth as it should be."""
    before, after = load(source), load(target)
    yield from (f"{target.name}: {line}" for line in after.notes)
    expected, logits = before.logits, after.logits
    error = (logits - expected).abs().max().item() / (expected.max() - expected.min()).item()
    if not error < TOLERANCE:
        yield f"logits differ by {error:.2g} of their spread, more than {TOLERANCE:g}"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (source / name).exists() and (source / name).read_bytes() != (target / name).read_bytes():
            yield f"{name} differs"
    yield from _changed_fields(operation, source, target)
    messages = [{"role": "user", "content": TEXT}]
    one, other = (AutoTokenizer.from_pretrained(path).apply_chat_template(messages) for path in (source, target))
    if one != other:
        yield "the template gives other tokens"


def _changed_fields(operation: Operation, source: Path, target: Path) -> Iterator[str]:
    old, new = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (source, target))
    sizes = operation.sizes(old) or {}
    named = {*sizes, *FREE, *(ALSO[name] for name in sizes if name in ALSO and name not in old)}
    follow = {"num_attention_heads", "num_key_value_heads", "shared_expert_intermediate_size"}
    for key, value in old.items():
        if key in named or (key in follow and "hidden_size" in sizes):
            continue
        if _meaning(new.get(key)) != _meaning(value):
            yield f"config.json: {key} is {new.get(key, 'missing')!r}, was {value!r}"


def _meaning(value: Any) -> Any:
    """Null, false and nothing mean the same to transformers, and so do both names of a kind of scaling."""
    if isinstance(value, dict):
        return {{"type": "rope_type"}.get(key, key): each for key, each in value.items()}
    return value or None


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as transformers reads it: float32 logits of fixed tokens, and what it noted while loading."""

    logits: Tensor
    notes: tuple[str, ...]


@cache
def load(directory: Path) -> Loaded:
    """Read a checkpoint by transformers and compute the logits of a fixed sequence, shape (1, tokens, vocabulary)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    notes = [f"{key}: {sorted(map(str, names))}" for key, names in info.items() if names and "keys" in key]
    notes += [str(each.message) for each in caught]
    with torch.inference_mode():
        return Loaded(model.eval()(tokens()).logits, tuple(notes))


def tokens(count: int = CONTEXT) -> Tensor:
    """A fixed sequence, shape (1, count)."""
    return torch.randint(VOCABULARY, (1, count), generator=torch.Generator().manual_seed(1))


def verify(name: str, keys: Iterable[str], folder: Path) -> dict[str, list[str]]:
    """Do operations on the small version of a published checkpoint.

    Args:
        name: of `CONFIGS`.
        keys: of `OPERATIONS`.
        folder: where sources and targets are made.

    Returns:
        By operation what is not as it was: nothing if all is.
    """
    source, found = make(name, folder), {}
    for key in keys:
        target = source.with_name(f"{source.name}-{key}")
        reason = _refused(CONFIGS[name], key)
        try:
            apply(OPERATIONS[key], source, target)
        except UserError as error:
            found[key] = [] if reason and reason in str(error) else [str(error)]
            continue
        found[key] = (
            [f"is not refused, {reason} is lost"] if reason else list(problems(OPERATIONS[key], source, target))
        )
    return found


def page() -> str:
    """The text of docs/families.md, which holds as long as `verify` finds nothing."""
    names: dict[str, list[str]] = {}
    for name, config in CONFIGS.items():
        names.setdefault(config["architectures"][0], []).append(name)
    titles = ["architecture", *(operation.title for operation in OPERATIONS.values()), "published configurations"]
    head = f"| {' | '.join(titles)} |"
    rows = [f"| `{name}` | {' | '.join(_cells(found))} | {', '.join(found)} |" for name, found in names.items()]
    return PAGE.format(
        count=len(CONFIGS),
        tolerance=f"{TOLERANCE:g}",
        table="\n".join([head, "|---" * (len(OPERATIONS) + 2) + "|", *rows]),
    )


def _refused(config: Sizes, key: str) -> str | None:
    """What the refusal of an operation names; None for one that can be done."""
    if key != "experts" or _is_sparse(config):
        return None
    return next((reason for field, reason in REFUSED.items() if field in config), None)


def _cells(names: Iterable[str]) -> Iterator[str]:
    """Whether these configurations keep the function, by operation: a row of the table."""
    for key in OPERATIONS:
        reasons = [_refused(CONFIGS[name], key) for name in names]
        refused = f"refused with `{reasons[-1]}`" if reasons[-1] else ""
        yield refused if all(reasons) else "; ".join(filter(None, ["exact", refused]))


def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    failed, width = 0, max(map(len, CONFIGS))
    print(f"{'':<{width}}  {'  '.join(operation.title for operation in OPERATIONS.values())}")
    for name in CONFIGS:
        found = verify(name, OPERATIONS, folder)
        cells = [f"{'FAILED' if found[key] else 'same':<{len(each.title)}}" for key, each in OPERATIONS.items()]
        print(f"{name:<{width}}  {'  '.join(cells)}", flush=True)
        for key, lines in found.items():
            print("".join(f"    {OPERATIONS[key].title}: {line}\n" for line in lines), end="")
        failed += any(found.values())
    if failed:
        raise SystemExit(f"error: {failed} of {len(CONFIGS)} configurations are not as they were")
    DOCUMENT.write_text(page(), encoding="utf-8")
    print(f"\n{len(CONFIGS)} configurations, {len(OPERATIONS)} operations each: everything as it was.")
    print(f"{DOCUMENT.name} is written.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
