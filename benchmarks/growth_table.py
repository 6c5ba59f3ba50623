"""What every way of growing does to a model: exact or not, rank, and cost. Writes docs/growth-exactness.md.

python benchmarks/growth_table.py

Nothing in the table is typed: a small random checkpoint is grown by every case in float64, through files, and measured.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import OmegaConf
from torch import Tensor

from aquilamoe.checkpoint import tensor_names as names
from aquilamoe.checkpoint.reader import CheckpointWriter, Reader
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config.growth import ShrinkConfig
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import rules, shrink
from aquilamoe.growth.mix import mix
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.split import calibrate
from aquilamoe.model.transformer import Decoder

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/growth-exactness.md"
EXACT = 1e-10  # largest difference of a logit (around 1) in float64 that counts as rounding

SOURCE = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=1e4,
    rms_norm_eps=1e-2,
    initializer_range=0.02,
    qkv_bias=True,
    tie_word_embeddings=False,
    num_experts=0,
    num_experts_per_tok=0,
    moe_intermediate_size=0,
)
WIDER = {"hidden_size": 80, "intermediate_size": 200, "num_attention_heads": 12}
TWICE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 16}
DEEPER = {"num_hidden_layers": 6}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
TWO = {"num_experts": 2, "num_experts_per_tok": 1}
PARTS = {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 80}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 160}
ALTERNATING = {**EXPERTS, "mlp_only_layers": (0, 2)}
# Mixtures as sources, and sizes that fit no ratio; OLMoE's heads together are as wide as its residual stream.
OLMOE = {**EXPERTS, "qkv_bias": False, "qk_norm": "projection", "norm_topk_prob": False}
WIDER_EXPERTS = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 5, "moe_intermediate_size": 200}
WIDER_SHARED = {**WIDER_EXPERTS, "shared_expert_intermediate_size": 170}
WIDER_ALTERNATING = {**WIDER_EXPERTS, "intermediate_size": 180}
# Of Qwen3: norms on queries and keys, and no bias.
NORMED = {"qkv_bias": False, "qk_norm": "head"}


@dataclass(frozen=True)
class Case:
    """One line of the table: a YAML of conf/growth or conf/upcycling, what is changed in it, the sizes that grow."""

    yaml: str
    options: dict[str, Any]
    sizes: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)  # of the source

    @property
    def source(self) -> ModelConfig:
        return ModelConfig.model_validate(SOURCE.model_dump() | {"moe_intermediate_size": None} | self.changes)

    @property
    def how(self) -> GrowthConfig | UpcyclingConfig:
        values = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/{self.yaml}.yaml"))
        assert isinstance(values, dict)
        kind = GrowthConfig if self.yaml.startswith("growth/") else UpcyclingConfig
        return kind.model_validate({**values, **self.options})

    @property
    def target(self) -> ModelConfig:
        experts = {"moe_intermediate_size": None} if "num_experts" in self.sizes else {}
        target, how = ModelConfig.model_validate(self.source.model_dump() | experts | self.sizes), self.how
        if isinstance(how, GrowthConfig):
            target = target.model_copy(update={"rms_norm_eps": how.grown_eps(self.source, target.hidden_size)})
        return target

    @property
    def title(self) -> str:
        """The command-line arguments that request this growth."""
        group, name = self.yaml.split("/")
        options = [f"{group}.{key}={value}".replace(" ", "") for key, value in self.options.items()]
        return " ".join([f"{group}={name}", *options])


@dataclass(frozen=True)
class Measured:
    """What a case does.

    difference: the largest of a logit of the source's tokens.
    ups: up_proj of the second layer, a tensor for each expert.
    parameters, flops: of the target, to those of the source.
    reads: bytes read while growing, to those of the source.
    """

    difference: float
    ups: list[Tensor]
    parameters: float
    flops: float
    reads: float


def cases() -> list[Case]:
    """Every method with every option that it has."""
    found = [Case("growth/random", {}, WIDER)]
    for noise in (0.5, 0):
        found += [Case("growth/fpi", {"norm": norm, "noise": noise}, WIDER) for norm in ("exact", "zero_pad", "copy")]
    found += [Case("growth/fpi", {"norm": "copy"}, TWICE), Case("growth/fpi", {"maps": "sampled"}, WIDER)]
    for size in ({"head_dim": 16}, {"num_key_value_heads": 8}, {"vocab_size": 160}):
        found.append(Case("growth/fpi", {}, size))
    for method in ("aki", "aki_pro"):
        found += [Case(f"growth/{method}", {"scope": scope}, WIDER) for scope in ("all", "inner", "transplant")]
        found.append(Case(f"growth/{method}", {}, {"num_key_value_heads": 8}))
    found += [Case("growth/lemon", {}, WIDER | DEEPER), Case("growth/hypercloning", {}, TWICE)]
    for depth in ("interpolate", "stack", "stack_top", [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 3, 2]):
        for new_layers in ("copy", "zero", "scaled"):
            found.append(Case("growth/fpi", {"depth": depth, "new_layers": new_layers}, DEEPER))
    for method in ("copy", "permute", "noise", "drop"):
        found += [Case(f"upcycling/{method}", {}, sizes) for sizes in (EXPERTS, PARTS)]
    for init in ("variance", "orthogonal", "zero"):
        found.append(Case("upcycling/copy", {"router_init": init}, EXPERTS))
    of_two = {"texts": ["zh", "en"], "router_init": "normal"}
    found += [Case("upcycling/mix", of_two | shared, TWO) for shared in ({}, {"shared": "base"})]
    for sizes in (SHARED, ALTERNATING, SHARED | ALTERNATING | PARTS, {**EXPERTS, "norm_topk_prob": False}):
        found.append(Case("upcycling/copy", {}, sizes))
    found += [Case("growth/fpi", {"norm": norm}, WIDER, NORMED) for norm in ("exact", "zero_pad")]
    found += [Case("growth/aki_pro", {}, WIDER, NORMED), Case("upcycling/copy", {}, ALTERNATING, NORMED)]
    for family in (EXPERTS, SHARED, ALTERNATING, EXPERTS | NORMED):
        found += [Case("upcycling/copy", {}, {"num_experts": 16, "num_experts_per_tok": k}, family) for k in (4, 2)]
    blind = {"direction": "random", "calibration_tokens": 0, "common_row": False}
    for options in ({}, {"shift": 30.0}, blind):
        found.append(Case("upcycling/split", options, {"num_experts": 16, "num_experts_per_tok": 2}, EXPERTS))
    for sizes, family in _mixtures():
        found.append(Case("growth/fpi", {"new_layers": "zero"}, sizes, family))
        found += [Case(f"growth/{method}", {}, sizes, family) for method in ("fpi", "aki_pro") if family is EXPERTS]
    return sorted(found, key=lambda case: case.yaml.startswith("upcycling/"))


def _mixtures() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Sizes and sources: Mixtral, Qwen2-MoE with a shared expert, Qwen3-MoE with dense layers, OLMoE."""
    dense = {"mlp_only_layers": (0, 1, 3, 4)}  # the copies of layers 0 and 2 of 4, of which 6 are made
    return [
        (WIDER_EXPERTS | DEEPER, {**EXPERTS, "qkv_bias": False}),
        (WIDER_EXPERTS | DEEPER, EXPERTS),
        (WIDER_SHARED | DEEPER, SHARED),
        (WIDER_ALTERNATING | DEEPER | dense, ALTERNATING | NORMED),
        (WIDER_EXPERTS | DEEPER, OLMOE),
    ]


def ways_back() -> list[Case]:
    """Growths that keep the function, which shrink=exact takes back."""
    deeper = {"new_layers": "zero"}
    found = [Case("growth/fpi", options, WIDER | DEEPER) for options in (deeper, deeper | {"maps": "sampled"})]
    found += [Case("growth/fpi", {"norm": "copy", "noise": 0, **deeper}, sizes) for sizes in (TWICE, TWICE | DEEPER)]
    found += [Case("growth/lemon", {}, WIDER | DEEPER), Case("growth/hypercloning", {}, TWICE)]
    found += [Case("growth/fpi", {}, sizes) for sizes in ({"head_dim": 16}, {"num_key_value_heads": 8})]
    found += [Case("growth/fpi", {"norm": norm}, WIDER, NORMED) for norm in ("exact", "zero_pad")]
    found += [Case("growth/fpi", deeper, sizes, family) for sizes, family in _mixtures()]
    found += [Case("upcycling/copy", {}, sizes) for sizes in (EXPERTS, PARTS, SHARED, SHARED | ALTERNATING | PARTS)]
    found += [Case("upcycling/permute", {}, EXPERTS)]
    found += [
        Case("upcycling/copy", {}, {"num_experts": 16, "num_experts_per_tok": 4}, family) for family in (EXPERTS, OLMOE)
    ]
    return found


@torch.no_grad()
def write_source(
    directory: Path, config: ModelConfig = SOURCE, dtype: torch.dtype = torch.float64, seed: int = 0
) -> None:
    """A checkpoint as training leaves it: no gain is one, no bias zero, and every part of the network matters."""
    decoder = Decoder(config).double()
    random = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        values = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        is_matrix = parameter.dim() >= 2 and "embed" not in name
        scale, mean = (parameter.shape[-1] ** -0.5, 0.0) if is_matrix else (0.5, float("norm" in name))
        parameter.copy_(values * scale + mean)
    save_model(decoder, directory, dtype)


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Collect the bytes of all rows that are read."""
    get, rows, copy = Reader.get, Reader.rows, CheckpointWriter.copy
    sizes: list[int] = []

    def counting_get(reader: Reader, name: str) -> Tensor:
        sizes.append(reader.info(name).num_bytes)
        return get(reader, name)

    def counting_rows(reader: Reader, name: str, start: int, stop: int) -> Tensor:
        tensor = rows(reader, name, start, stop)
        sizes.append(tensor.nbytes)
        return tensor

    def counting_copy(writer: CheckpointWriter, names: Any, reader: Reader, source_name: str) -> None:
        sizes.append(reader.info(source_name).num_bytes)
        copy(writer, names, reader, source_name)

    with (
        patch.object(Reader, "get", counting_get),
        patch.object(Reader, "rows", counting_rows),
        patch.object(CheckpointWriter, "copy", counting_copy),
    ):
        yield sizes


@torch.no_grad()
def logits(directory: Path) -> Tensor:
    tokens_bt = torch.arange(64).view(2, 32) * 37 % SOURCE.vocab_size
    return load_model(directory, torch.float64)(tokens_bt)[0]


def grow(case: Case, source: Path, target: Path) -> None:
    how = case.how
    if isinstance(how, UpcyclingConfig) and how.method == "mix":
        other = source.with_name(f"{source.name}-other")
        if not other.exists():
            with Reader(source) as reader:
                write_source(other, case.source, reader.dtype(names.EMBEDDING), seed=1)
        mix([source, other], target, case.target, how, seed=0)
        return
    if isinstance(how, GrowthConfig):
        scale_up(source, target, case.target, how, seed=0)
        return
    split = None
    if how.method == "split":
        length, random = SOURCE.max_position_embeddings, torch.Generator().manual_seed(0)
        count = (how.calibration_tokens or 0) // length
        tokens_bt = torch.randint(SOURCE.vocab_size, (count, length), generator=random) if count else None
        split = calibrate(source, case.target, how, 0, tokens_bt)
    scale_out(source, target, case.target, how, seed=0, split=split)


def measure(case: Case, source: Path) -> Measured:
    """Grow the checkpoint in `source` and compare."""
    target = case.target
    with tempfile.TemporaryDirectory() as name:
        grown = Path(name) / "grown"
        with counted_reads() as sizes:
            grow(case, source, grown)
        before, after = logits(source), logits(grown)
        config = case.source
        roles = [
            role for role in names.role_shapes(target, 1) if role.endswith("up_proj.weight") and "shared" not in role
        ]
        with Reader(grown) as reader:
            ups = [reader.get(names.layer_name(target, 1, role)).clone() for role in roles]
    length = SOURCE.max_position_embeddings
    return Measured(
        difference=(before - after[..., : SOURCE.vocab_size]).abs().max().item(),
        ups=ups,
        parameters=target.num_params / config.num_params,
        flops=target.flops_per_token(length) / config.flops_per_token(length),
        reads=sum(sizes) / (before.element_size() * config.num_params),
    )


def table() -> list[tuple[Case, Measured]]:
    """Measure every case."""
    with tempfile.TemporaryDirectory() as name:
        return [(case, measure(case, source_of(case, Path(name)))) for case in cases()]


def table_back() -> list[str]:
    """Measure every way back."""
    with tempfile.TemporaryDirectory() as name:
        return [line_back(case, source_of(case, Path(name))) for case in ways_back()]


def source_of(case: Case, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """The checkpoint in `folder` that a case grows, written when it is first requested."""
    directory = folder / ("-".join(f"{key}={_cell(value)}" for key, value in case.changes.items()) or "plain")
    if not directory.exists():
        write_source(directory, case.source, dtype)
    return directory


def effective_rank(matrix: Tensor) -> float:
    """Exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(matrix)
    shares = values[values > values[0] * 1e-12] / values.sum()
    return torch.exp(-(shares * shares.log()).sum()).item()


def similarity(matrices: list[Tensor]) -> float:
    """Mean cosine between the weights of neighbours."""
    cosines = [torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for a, b in pairwise(matrices)]
    return sum(cosines) / len(cosines)


def line_back(case: Case, source: Path) -> str:
    """A row of the way back: grown, and shrunk to the sizes of the source at once."""
    with tempfile.TemporaryDirectory() as name:
        grown, back = Path(name) / "grown", Path(name) / "back"
        grow(case, source, grown)
        target = case.source.model_copy(update={"rms_norm_eps": case.target.rms_norm_eps})
        found = shrink.find(grown, target, ShrinkConfig(method="exact", layers=None))
        shrink.shrink(grown, back, target, found)
        difference = (logits(source) - logits(back)).abs().max().item()
        with Reader(source) as one, Reader(back) as other:
            same = sum(one.digest(each) == other.digest(each) for each in one.names)
            share = f"{same} of {len(one.names)}"
    assert difference <= EXACT, case
    return f"| grown by {' | '.join([f'`{case.title}`', _sizes(case), 'yes', '0', share])} |"


def _sizes(case: Case) -> str:
    sizes = ", ".join(f"{key} {_cell(getattr(case.source, key))} → {_cell(size)}" for key, size in case.sizes.items())
    if case.changes:
        sizes += f" (source: {', '.join(f'{key} {_cell(value)}' for key, value in case.changes.items())})"
    return sizes


def _cell(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).replace(" ", "").lower()


def line(case: Case, measured: Measured) -> str:
    """A row of the table."""
    exact = measured.difference <= EXACT
    up = measured.ups[0]
    if case.yaml.startswith("upcycling/"):
        learns_apart = f"{similarity(measured.ups):.2f}"
    else:
        learns_apart = f"{int(torch.linalg.matrix_rank(up))} of {min(up.shape)} ({effective_rank(up):.0f})"
    costs = [f"{cost:.2f}" for cost in (measured.parameters, measured.flops, measured.reads)]
    verdict = ["yes", "0"] if exact else ["no", f"{measured.difference:.1g}"]
    return f"| {' | '.join([f'`{case.title}`', _sizes(case), *verdict, learns_apart, *costs])} |"


HEAD = """# What growing does to a model

Made by `python benchmarks/growth_table.py`; no figure on this page is typed. A random checkpoint ({layers} layers,
hidden size {hidden}, {heads} query heads in {groups} groups) is grown in float64, through files, by every method and by
every option.

- **exact?** Whether the grown model computes the source's function: no logit of the source's tokens differs by more
  than {exact:g}. Where this column is yes, the certificate of a growth holds the method to it.
- **difference** The largest of those differences; the logits are around 1. `random` shows what forgetting costs. Of a
  `split` it is that of the few tokens whose experts change: [signed-split.md](signed-split.md) measures the others.
- **rank** Of the second layer's up_proj (of a Mixture of Experts, the first expert's), out of the largest possible, and
  its effective rank (the exponential of the entropy of the singular values). Copies that are identical have the
  rank of the source, and AdamW keeps it so.
- **similarity** Mean cosine between the up_proj of neighbouring experts. Parts of a feed-forward are not alike.
- `mix` makes experts of two checkpoints, and is compared with the first of them.
- **parameters**, **FLOPs** of a training token, and bytes of the rows **read** while growing: times the source's. Rows
  that get noise are read once more, for their size.
"""


BACK = """
## The way back

Grown in float64 as above, and shrunk at once to the source's sizes by `shrink=exact`, which finds the copies in the
weights. **tensors** is how many of the source's have their bytes again; all of them where ratios are powers of two and
copies have no noise.

| | sizes | exact? | difference | tensors |
|---|---|---|---|---|
"""


def page(rows: list[tuple[Case, str]], back: list[str]) -> str:
    """The document."""
    head = HEAD.format(
        layers=SOURCE.num_hidden_layers,
        hidden=SOURCE.hidden_size,
        heads=SOURCE.num_attention_heads,
        groups=SOURCE.num_key_value_heads,
        exact=EXACT,
    )
    parts = [head]
    for title, group, learns_apart in (("Scale-Up", "growth", "rank"), ("Scale-Out", "upcycling", "similarity")):
        columns = [title, "sizes", "exact?", "difference", learns_apart, "parameters", "FLOPs", "read"]
        lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [row for case, row in rows if case.yaml.startswith(group)]
        parts.append(f"\n## {title}\n\n" + "\n".join(lines) + "\n")
    return "".join(parts) + BACK + "".join(f"{row}\n" for row in back)


def main() -> None:
    torch.set_num_threads(1)
    measured = table()
    for case, result in measured:
        assert (result.difference <= EXACT) == rules.preserves(case.how, case.source, case.target), case
    rows = [(case, line(case, result)) for case, result in measured]
    PAGE.write_text(page(rows, table_back()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(measured)} ways of growing")


if __name__ == "__main__":
    main()
