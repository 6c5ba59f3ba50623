"""The plan of a growth is true: it is compared with what the growth does to real files."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from aquilamoe.checkpoint import safetensors_header, tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.state_dict import save_model
from aquilamoe.config import grow as grow_config
from aquilamoe.config import plugins
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.tool import plan
from aquilamoe.growth.tool.plan import ranges
from aquilamoe.growth.tool.request import Request, resolve
from aquilamoe.model.transformer import Decoder

CONF = Path(__file__).resolve().parents[3] / "conf"
LARGER = {
    "hidden_size": 12,
    "intermediate_size": 18,
    "num_attention_heads": 6,
    "num_hidden_layers": 5,
    "vocab_size": 24,
}
GROWTHS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fpi": ({"growth": "fpi", "new_layers": "zero"}, LARGER),
    "fpi scaled stack": ({"growth": "fpi", "new_layers": "scaled", "depth": "stack", "norm": "zero_pad"}, LARGER),
    "fpi by a list": ({"growth": "fpi", "depth": [2, 0, 0]}, {"num_hidden_layers": 3}),
    "fpi nothing": ({"growth": "fpi"}, {}),
    "aki": ({"growth": "aki"}, LARGER),
    "aki inner": ({"growth": "aki", "scope": "inner"}, {"intermediate_size": 18}),
    "aki transplant": ({"growth": "aki", "scope": "transplant"}, LARGER),
    "aki_pro": ({"growth": "aki_pro"}, LARGER),
    "random": ({"growth": "random"}, LARGER),
    "hypercloning": ({"growth": "hypercloning"}, {"hidden_size": 16, "num_attention_heads": 8, "num_hidden_layers": 4}),
    "lemon": ({"growth": "lemon"}, LARGER),
    "copy": ({"upcycling": "copy"}, {"num_experts": 4, "num_experts_per_tok": 2}),
    "noise": ({"upcycling": "noise", "router_init": "orthogonal"}, {"num_experts": 4, "num_experts_per_tok": 2}),
    "permute": ({"upcycling": "permute", "router_init": "zero"}, {"num_experts": 4, "num_experts_per_tok": 2}),
    "drop, fine-grained": (
        {"upcycling": "drop"},
        {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 6},
    ),
    "every other, shared expert": (
        {"upcycling": "copy", "layers": "every_other"},
        {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12},
    ),
}
SOURCE = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "max_position_embeddings": 32,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "qkv_bias": True,
    "tie_word_embeddings": False,
    "qk_norm": "none",
    "num_experts": 0,
    "num_experts_per_tok": 0,
    "moe_intermediate_size": 0,
    "shared_expert_intermediate_size": 0,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}
MOE = {**SOURCE, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 12}


def save(directory: Path, values: dict[str, Any]) -> Path:
    model = Decoder(ModelConfig.model_validate(values))
    model.initialize(0)
    with torch.no_grad():  # biases that are all zero would hide where they go
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter))
    save_model(model, directory, dtype=torch.float32)
    return directory


def request_for(source: Path, target: Path, settings: dict[str, Any], sizes: dict[str, Any]) -> Request:
    values = yaml.safe_load((CONF / "grow.yaml").read_text())
    values = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    for group in ("growth", "upcycling"):
        if group in settings:
            options = yaml.safe_load((CONF / group / f"{settings[group]}.yaml").read_text())
            changes = {key: value for key, value in settings.items() if key != group}
            values[group] = {**(values[group] or {}), **options, **changes}
    values |= {"source": str(source), "target": str(target), "model": {**values["model"], **sizes}}
    return resolve(grow_config.parse(values))


def digests(directory: Path) -> dict[str, str]:
    data = (directory / "model.safetensors").read_bytes()
    return {
        name: hashlib.sha256(data[info.start : info.end]).hexdigest()
        for name, info in safetensors_header.read(directory).items()
    }


def do(request: Request, source: Path, target: Path) -> dict[str, str]:
    grow: Any = scale_up if request.kind == "scale_up" else scale_out
    grow(source, target, request.model, request.growth, request.seed)
    return digests(target)


def change(source: Path, name: str, changed: Path) -> Path:
    """A copy of the source in which every element of one tensor is another number."""
    shutil.copytree(source, changed)
    info = safetensors_header.read(changed)[name]
    data = bytearray((changed / "model.safetensors").read_bytes())
    values = torch.frombuffer(data, dtype=torch.float32, offset=info.start, count=info.num_bytes // 4)
    values.mul_(1.5).add_(0.25)
    (changed / "model.safetensors").write_bytes(data)
    return changed


def reach(request: Request, source: Path, tmp_path: Path) -> dict[str, set[str]]:
    """Of each role in one layer or another of the source, the tensors of the target that a change of it changes."""
    before = do(request, source, tmp_path / "before")
    found = {}
    model = request.source.model
    roles = list(dict.fromkeys(role for layer in range(3) for role in tensor_names.role_shapes(model, layer)))
    roles = [role for role in roles if role not in tensor_names.filler_roles(model)]  # those must be zero
    layers = {role: [layer for layer in range(3) if role in tensor_names.role_shapes(model, layer)] for role in roles}
    chosen = [tensor_names.layer_name(model, layers[role][i % len(layers[role])], role) for i, role in enumerate(roles)]
    for index, name in enumerate([*tensor_names.outer_shapes(model), *chosen]):
        changed = change(source, name, tmp_path / f"changed-{index}")
        after = do(request, changed, tmp_path / f"after-{index}")
        found[name] = {tensor for tensor in before if before[tensor] != after[tensor]}
    return found


def check_truth(request: Request, source: Path, tmp_path: Path) -> None:
    planned = plan.origins(request)
    assert [origin.name for origin in planned] == list(tensor_names.tensor_shapes(request.model))
    assert {origin.name: origin.rows.shape for origin in planned} == tensor_names.tensor_shapes(request.model)
    for name, changed in reach(request, source, tmp_path).items():
        expected = {origin.name for origin in planned if name in origin.sources}
        silent = {origin.name for origin in planned if "silent" in origin.how}  # zero times a weight may be -0
        assert expected <= changed <= expected | silent, name


@pytest.mark.parametrize("name", GROWTHS)
def test_a_tensor_comes_from_those_that_the_plan_names_and_from_no_other(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", SOURCE)
    check_truth(request_for(source, tmp_path / "target", *GROWTHS[name]), source, tmp_path)


def test_experts_come_from_the_experts_that_the_plan_names(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {**MOE, "mlp_only_layers": [1], "qkv_bias": True})
    settings, sizes = {"upcycling": "noise"}, {"num_experts": 4, "num_experts_per_tok": 2}
    check_truth(request_for(source, tmp_path / "target", settings, sizes), source, tmp_path)


def test_a_new_method_has_a_plan_without_doing_anything_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source", SOURCE)

    class Halfway:
        @staticmethod
        def grow(layer: Any, upper_layer: Any, width: Any) -> dict[str, Any]:
            return {role: width.copy(role, (tensor + 2 * upper_layer[role]) / 3) for role, tensor in layer.items()}

        @staticmethod
        def keeps_function(*_: Any) -> bool:
            return False

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda folder, name: Halfway if name == "fpi" else load(folder, name))
    request = request_for(source, tmp_path / "target", {"growth": "fpi"}, LARGER)
    (query,) = (o for o in plan.origins(request) if o.name == "model.layers.2.self_attn.q_proj.weight")
    assert query.sources == ("model.layers.1.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight")
    check_truth(request, source, tmp_path)


def test_a_method_that_computes_in_memory_is_planned_in_general_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", SOURCE)

    class Swapped:
        @staticmethod
        def grow(layer: Any, upper_layer: Any, width: Any) -> dict[str, Any]:
            return {role: width.copy(role, upper_layer[role].whole() + layer[role].whole()) for role in layer}

        @staticmethod
        def keeps_function(*_: Any) -> bool:
            return False

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda folder, name: Swapped if name == "fpi" else load(folder, name))
    request = request_for(source, tmp_path / "target", {"growth": "fpi", "noise": 0}, LARGER)
    (up,) = (origin for origin in plan.origins(request) if origin.name == "model.layers.0.mlp.up_proj.weight")
    assert up.how == "neurons 12 -> 18; channels 8 -> 12; by method fpi"
    assert up.sources == ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    check_truth(request, source, tmp_path)


@pytest.mark.parametrize("name", GROWTHS)
def test_a_plan_makes_no_row_of_any_tensor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "source", SOURCE)
    request = request_for(source, tmp_path / "target", *GROWTHS[name])
    monkeypatch.setattr(Reader, "_view", lambda *_: pytest.fail("a row was read"))
    monkeypatch.setattr(Reader, "read_into", lambda *_: pytest.fail("bytes were read"))
    assert len(plan.lines(request, full=True)) == len(request.shapes)


def test_a_plan_of_any_growth_imports_no_torch(tmp_path: Path) -> None:
    source = save(tmp_path / "source", SOURCE)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2}
    growths: list[dict[str, Any]] = [
        *({"growth": {"method": name, "noise": 0.5, "norm": "exact"}, "model": LARGER} for name in ("fpi", "aki_pro")),
        *({"upcycling": name, "model": sizes} for name in ("noise", "permute", "drop")),
    ]
    code = "import sys, aquilamoe\n"
    code += "".join(f"aquilamoe.plan_growth({str(source)!r}, {str(tmp_path / 'x')!r}, **{how!r})\n" for how in growths)
    output = subprocess.check_output([sys.executable, "-c", f"{code}print('torch' in sys.modules)"], text=True)
    assert output == "False\n"


@pytest.mark.parametrize("name", GROWTHS)
def test_shared_lines_stand_for_every_tensor_once(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", SOURCE)
    request = request_for(source, tmp_path / "target", *GROWTHS[name])
    stood_for = 0
    for line in plan.lines(request, full=False):
        layers = named_layers(request, line.layers)
        experts = numbers(line.tensor.split(".experts.")[1].split(".")[0]) if ".experts." in line.tensor else [0]
        stood_for += (1 if line.layers == "" else len(layers)) * len(experts)
    assert stood_for == len(tensor_names.tensor_shapes(request.model)) == len(plan.lines(request, full=True))


def named_layers(request: Request, text: str) -> list[int]:
    everywhere = list(range(request.model.num_hidden_layers))
    if "*" not in text:
        return everywhere if text in ("", "all") else numbers(text)
    marked = [layer for layer in everywhere if f"{layer}*" in " ".join(plan.layers(request)).split()]
    return marked if text == "further *" else [layer for layer in everywhere if layer not in marked]


def numbers(text: str) -> list[int]:
    spans = [part.split("-") for part in text.split(", ")]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def test_ranges_are_read_back_as_what_they_were() -> None:
    for chosen in ([0], [0, 1], [0, 2, 3, 4, 9], list(range(40))):
        assert numbers(ranges(chosen)) == chosen


@pytest.mark.parametrize("name", GROWTHS)
def test_the_bytes_of_a_plan_are_what_is_written(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", SOURCE)
    request = request_for(source, tmp_path / "target", *GROWTHS[name])
    do(request, source, tmp_path / "target")
    cost = plan.cost(request, disk_bytes_per_s=1e6)
    assert cost.written_bytes == (tmp_path / "target" / "model.safetensors").stat().st_size
    assert cost.seconds == pytest.approx((cost.read_bytes + cost.written_bytes) / 1e6)


def test_sizes_that_were_not_named_are_shown_to_follow(tmp_path: Path) -> None:
    source = save(tmp_path / "source", SOURCE)
    sizes = {"hidden_size": 12, "num_hidden_layers": 4}
    request = request_for(source, tmp_path / "target", {"growth": "lemon"}, sizes)
    rows = {row.field: (row.source, row.target, row.why) for row in plan.sizes(request)}
    assert rows == {
        "hidden_size": ("8", "12", "named"),
        "num_hidden_layers": ("3", "4", "named"),
        "num_attention_heads": ("4", "6", "follows hidden_size at head_dim 2"),
        "rms_norm_eps": ("1e-06", "6.66667e-07", "follows hidden_size by growth.norm zero_pad"),
    }


def test_hundreds_of_layers_are_planned_on_a_screen(tmp_path: Path) -> None:
    source = save(tmp_path / "source", {**SOURCE, "num_hidden_layers": 100})
    request = request_for(source, tmp_path / "target", {"growth": "aki_pro"}, {**LARGER, "num_hidden_layers": 400})
    assert len(plan.lines(request, full=False)) < 30
    assert len(plan.layers(request)) == 400


def test_a_gap_between_layers_shows(tmp_path: Path, make: Callable[..., Request] = request_for) -> None:
    source = save(tmp_path / "source", SOURCE)
    request = make(source, tmp_path / "target", {"growth": "fpi", "new_layers": "zero"}, {"num_hidden_layers": 5})
    assert plan.layers(request) == ["0 <- 0", "1* <- 0", "2 <- 1", "3* <- 1", "4 <- 2"]
    downs = {line.layers: line.how for line in plan.lines(request, False) if line.tensor == "mlp.down_proj.weight"}
    assert downs == {"all but *": "copied", "further *": "zeros: a new layer is silent"}
