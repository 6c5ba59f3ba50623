"""The model card of a grown checkpoint: what it is, from what, by which command, and what was measured."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aquilamoe import format
from aquilamoe.checkpoint.safetensors_header import DTYPE_NAMES
from aquilamoe.config.grow import GrowConfig
from aquilamoe.growth.bounds import NEARLY_KL, NEARLY_LOSS
from aquilamoe.growth.tool.plan import sizes
from aquilamoe.growth.tool.remarks import deed, remarks
from aquilamoe.growth.tool.request import Request

CARD = "README.md"
# What a source's card states on rights and languages holds for what is grown from it.
CARRIED = ("license", "license_name", "license_link", "language")
PLAIN = r"([\w.+/-][\w .+/-]*|\"[\w .+/-]+\"|'[\w .+/-]+'|https?://[\w.+/#?=&%~-]+)"
LICENCE_FILES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
TOOL = "EfficientScale"
NEARLY = f"nearly function-preserving: KL below {NEARLY_KL:g} and loss within {NEARLY_LOSS:g} nats/token"


def render(
    request: Request,
    config: GrowConfig,
    command: str,
    record: Mapping[str, Any],
    digests: Mapping[str, Mapping[str, str]],
) -> str:
    """The text of README.md; paths appear by their last part, so that it does not depend on where it was made.

    digests: SHA-256 of the files of each source.
    """
    sources = [checkpoint_name(directory) for directory in request.directories]
    parts = [
        "---",
        *_front_matter(request, sources),
        "---",
        "",
        f"# {request.target.name}",
        "",
        _summary(request, sources),
        "",
        "## Recipe",
        "",
        "```",
        portable(command, config),
        "```",
        "",
        *_settings(request),
        "",
        "## Certificate",
        "",
        *_certificate(record["certificate"], request.preserving),
        "",
        "## Sizes",
        "",
        *_sizes(request),
        "",
        *_sources(sources, list(digests.values())),
        *_licence(request.source.directory, sources[0]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _sources(names: Sequence[str], digests: Sequence[Mapping[str, str]]) -> list[str]:
    lines = ["## Sources" if len(names) > 1 else "## Source", ""]
    where = "those of the grown tensors are in `record.json`"
    for name, files in zip(names, digests, strict=True):
        cells = [(file, f"`{digest}`") for file, digest in sorted(files.items())]
        lines += [f"`{name}`, identified by the SHA-256 of its files ({where}):", ""]
        lines += [*_table(("file", "SHA-256"), cells), ""]
    return lines


def checkpoint_name(directory: Path) -> str:
    """What a checkpoint is called: `owner/name` in a hub's cache, otherwise the name of its directory."""
    for part in directory.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return directory.name


def portable(command: str, config: GrowConfig) -> str:
    """The command as typed, with directories and files by their names alone."""
    names = {
        "source": checkpoint_name(Path(config.source)),
        "sources": _listed(checkpoint_name(Path(source)) for source in config.sources or ()),
        "upcycling.texts": _listed(Path(text).name for text in (config.upcycling and config.upcycling.texts) or ()),
        "target": Path(config.target).name,
        "certificate.text": Path(config.certificate.text or "").name,
    }
    words = []
    for word in shlex.split(command):
        key = word.partition("=")[0]
        words.append(f"{key}={names[key]}" if key in names and "=" in word else word)
    return shlex.join(words)


def _listed(names: Iterable[str]) -> str:
    return f"[{','.join(names)}]"


def _front_matter(request: Request, sources: Sequence[str]) -> list[str]:
    carried = _carried(request.source.directory)
    method = request.growth.method
    tags = [TOOL.lower(), request.kind.replace("_", "-"), method.replace("_", "-"), *(["moe"] * request.model.is_moe)]
    return [
        *(line for key in CARRIED for line in carried.get(key, [])),
        *_base_models([json.dumps(source, ensure_ascii=False) for source in sources]),
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        *(f"- {tag}" for tag in tags),
    ]


def _base_models(names: Sequence[str]) -> list[str]:
    return [f"base_model: {names[0]}"] if len(names) == 1 else ["base_model:", *(f"- {name}" for name in names)]


def _carried(source: Path) -> dict[str, list[str]]:
    """Lines of the front matter of the source's card, by key: a plain value, or a list below it."""
    try:
        text = (source / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    found = re.match(r"---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    carried: dict[str, list[str]] = {}
    key = ""
    for line in found[1].splitlines() if found else ():
        if start := re.match(r"([A-Za-z_]+):", line):
            key = start[1]
            carried[key] = [line]
        elif key:
            carried[key].append(line)
    return {key: lines for key, lines in carried.items() if key in CARRIED and _is_plain(lines)}


def _is_plain(lines: Sequence[str]) -> bool:
    """Whether lines are a value that needs no parser to be copied: words, a list of words, or a list below the key."""
    first, *rest = (line.rstrip() for line in lines)
    _, value = first.split(":", 1)
    if rest:
        return not value and all(re.fullmatch(rf"\s*- {PLAIN}", line) for line in rest)
    return bool(re.fullmatch(rf"\s*({PLAIN}|\[{PLAIN}(, *{PLAIN})*\])", value))


def _summary(request: Request, sources: Sequence[str]) -> str:
    old, new = request.source.model, request.model
    claim = "claims to compute the same function" if request.preserving else "does not claim to keep the function"
    if not request.preserving and request.growth.method == "split":
        claim = "is meant to be nearly function-preserving, which the certificate measures"
    if request.kind != "scale_out":
        what = f"{deed(request)} by `{request.growth.method}`"
    else:
        experts = f"{new.num_experts} experts, {new.num_experts_per_tok} for a token"
        what = f"{'mixed' if request.others else 'upcycled'} to {experts}, by `{request.growth.method}`"
    named = " and ".join(f"`{source}`" for source in sources)
    each = " each" if request.others else ""
    deed_of = "shrink" if request.kind == "shrink" else "growth"
    return (
        f"{named} with {format.count(old.num_params)} parameters{each}, {what} to {format.count(new.num_params)} "
        "parameters "
        f"({format.count(new.num_active_params)} active). It has not been trained since; the {deed_of} {claim}. "
        f"{' '.join([*remarks(request), f'Made by {TOOL}.'])}"
    )


def _settings(request: Request) -> list[str]:
    growth = request.growth.model_dump(mode="json")
    values = [*growth.items(), ("seed", request.seed), ("dtype", _dtypes(request))]
    return _table(("setting", "value"), [(key, f"`{value}`") for key, value in values])


def _dtypes(request: Request) -> str:
    """The type of the target, and of those tensors that are of another."""
    names = {DTYPE_NAMES[dtype] for dtype in request.dtypes.values()}
    others = sorted(names - {request.dtype_name})
    return f"{request.dtype_name}, some {' and '.join(others)}" if others else request.dtype_name


def _certificate(certificate: Mapping[str, Any] | None, preserving: bool) -> list[str]:
    if certificate is None:
        claim = " that it keeps the function" if preserving else ""
        return [f"None was made: nothing was measured, and the growth's claim{claim} is unproven here."]
    return _table(("measure", "value"), certificate_rows(certificate))


def certificate_rows(certificate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The measures of a certificate, in words."""
    difference, spread = certificate["max_abs_dlogit"], certificate["logit_spread"]
    rounding = certificate.get("rounding")
    before = f", before rounding to {rounding['dtype']}" if rounding else ""
    share = f"{difference / spread:.3g} of the logits' spread" if spread else "the source's logits are all equal"
    found = [("largest difference of a logit", f"{difference:.3g}, {share}{before}")]
    if certificate["preserving"]:
        found.append(("allowed", f"{certificate['tolerance']:.3g} of the spread"))
    if layers := certificate["layers"]:
        worst = max(range(len(layers)), key=layers.__getitem__)
        place = f"layer {worst - 1}" if worst else "the embedding"
        found.append(("largest difference of a layer", f"{layers[worst]:.3g} of what it adds, in {place}"))
    if certificate["ties"]:
        found.append(("ties", "logits differ by more where experts of equal score changed places"))
    if rounding:
        found += _rounding_rows(rounding)
    experts, mix = certificate.get("experts"), certificate.get("mix")
    of_source, of_target = ("sources", "mix") if mix else ("source", "target")
    return [
        *([("verdict", verdict(certificate))] if experts else []),
        *found,
        (f"KL({of_source}, {of_target}), nats/token", f"{certificate['kl']:.3g}"),
        (f"loss of the {of_source}, nats/token", f"{certificate['source_loss']:.5f}"),
        (f"loss of the {of_target}, nats/token", f"{certificate['target_loss']:.5f}"),
        *(_mix_rows(mix) if mix else []),
        *(_expert_rows(experts) if experts else []),
        ("tokens", f"{certificate['tokens']:,}"),
        ("text", str(certificate["text"])),
    ]


def verdict(certificate: Mapping[str, Any]) -> str:
    """Whether a growth to more experts kept the function: judged by KL and loss, which a few tokens do not decide."""
    kl, loss = certificate["kl"], certificate["target_loss"] - certificate["source_loss"]
    if certificate["preserving"]:
        return "function-preserving"
    if kl < NEARLY_KL and abs(loss) < NEARLY_LOSS:
        return NEARLY
    limits = f"KL {kl:.3g} and loss {loss:+.3g} nats/token; {NEARLY_KL:g} and {NEARLY_LOSS:g} would be nearly"
    return f"not function-preserving: {limits}"


def _mix_rows(mix: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Losses of all sources and of the mix on the text of each source, and who its tokens are sent to."""
    found = []
    for number, text in enumerate(mix["texts"]):
        losses = [f"source {source + 1} {losses[number]:.5f}" for source, losses in enumerate(mix["losses"])]
        found.append((f"losses on {text}", f"{', '.join(losses)}, mix {mix['mix_losses'][number]:.5f}"))
    for number, (text, share) in enumerate(zip(mix["texts"], mix["own_expert"], strict=True)):
        found.append((f"best expert on {text}", f"that of source {number + 1} for {share:.1%} of (token, layer)"))
    return found


def _expert_rows(experts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What tokens choose among copies of experts, and what keeps them apart."""
    found = [("warning", line) for line in experts["warnings"]]
    found.append(("same originals", f"{experts['same_originals']:.2%} of (token, layer)"))
    if experts["needed_shift"] is not None:
        found += [
            ("expected by the criterion", f"{1 - experts['fence']:.2%}: {experts['fence']:.2%} are at the fence"),
            ("M of the layers, measured", _range(experts["shift"])),
            ("M that 98 % of the tokens need", _range(experts["needed_shift"])),
        ]
    even = f"even would be {1 / experts['copies']:.2f}"
    smallest = f"{experts['smallest_copy']:.2f} on average, {experts['least_copy']:.2f} at least; {even}"
    return [
        *found,
        ("share of an expert's smallest copy", smallest),
        ("z-loss of a layer", f"{experts['z_loss_source']:.3g} before, {experts['z_loss_target']:.3g} after"),
    ]


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}" if len(values) > 1 else f"{values[0]:.3g}"


def _rounding_rows(rounding: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What rounding does to the target, and what it does to the source where its own weights are rounded once more."""

    def effect(whose: str) -> str:
        share, kl = rounding[f"{whose}_relative"], rounding[f"{whose}_kl"]
        return f"a logit by up to {share:.3g} of the spread, KL {kl:.3g} nats/token"

    return [
        (f"rounding to {rounding['dtype']} moves", f"{effect('target')}, on {rounding['tokens']:,} tokens"),
        ("the same, of the source's weights", f"{effect('source')}, rounded once more"),
    ]


def _sizes(request: Request) -> list[str]:
    old, new = request.source.model, request.model
    cells = [(size.field, size.source, size.target, size.why) for size in sizes(request)]
    cells.append(("parameters", f"{old.num_params:,}", f"{new.num_params:,}", ""))
    cells.append(("active parameters", f"{old.num_active_params:,}", f"{new.num_active_params:,}", ""))
    return _table(("", "source", "target", ""), cells)


def _licence(source: Path, name: str) -> list[str]:
    files = sorted(path.name for path in source.iterdir() if path.name.upper().startswith(LICENCE_FILES))
    stated = _carried(source).get("license")
    if not stated and not files:
        return []
    parts = ["The terms of the source hold for what is grown from it"]
    if stated:
        parts.append(f"its card states `{stated[0]}`")
    if files:
        parts.append(f"{', '.join(f'`{file}`' for file in files)} of `{name}` is here")
    return ["## Licence", "", f"{': '.join([parts[0], ', '.join(parts[1:])])}."]


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
