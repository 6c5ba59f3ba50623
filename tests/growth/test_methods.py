"""Methods of growth: where every row comes from, and how a new method is added."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import aquilamoe.growth.methods
from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.state_dict import save_model
from aquilamoe.config import plugins
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import rules
from aquilamoe.model.transformer import Decoder
from small_checkpoints import difference, grow, growth, logits, model, padded, tensor, write_source

ROOT = Path(__file__).resolve().parents[2]
METHODS = plugins.names("growth/methods")
SAME = 1e-10  # of logits around 1, in float64


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_copy_survive_a_growth_in_width(method: str, tmp_path: Path) -> None:
    source, how = model(), growth(method=method)
    if method == "lemon":
        how = growth(method=method, norm="zero_pad", new_layers="zero")
    sizes = {"hidden_size": 16, "num_attention_heads": 16} if method == "hypercloning" else {"hidden_size": 10}
    target = padded(source, how, **{"num_attention_heads": 10, **sizes})
    write_source(tmp_path / "source", source)
    preserving = method in ("fpi", "lemon", "hypercloning")
    assert rules.preserves(how, source, target) == preserving
    assert (difference(tmp_path / "source", grow(tmp_path, target, how)) < 1e-3) == preserving


def test_more_groups_for_the_same_query_heads_keep_the_function_unless_keys_come_from_above(tmp_path: Path) -> None:
    source, target = model(), model(num_key_value_heads=4)
    write_source(tmp_path / "source", source)
    for method, kept in (("fpi", True), ("aki_pro", True), ("aki", False)):
        how = growth(method=method)
        assert rules.preserves(how, source, target) == kept
        assert (difference(tmp_path / "source", grow(tmp_path, target, how, name=method)) < SAME) == kept


@pytest.mark.parametrize("scope", ["all", "inner", "transplant"])
def test_wider_heads_keep_the_function_where_keys_values_and_their_readers_are_the_layers_own(
    scope: str, tmp_path: Path
) -> None:
    source, target = model(), model(head_dim=8)
    write_source(tmp_path / "source", source)
    for method, kept in (("aki", False), ("aki_pro", scope != "transplant")):
        how = growth(method=method, scope=scope)
        assert rules.preserves(how, source, target) == kept
        assert (difference(tmp_path / "source", grow(tmp_path, target, how, name=method)) < SAME) == kept


def mark_layers(directory: Path, config: ModelConfig) -> None:
    """A checkpoint whose every tensor in layer l is l + 1 throughout."""
    decoder = Decoder(config).double()
    with torch.no_grad():
        for index, layer in enumerate(decoder.model.layers):
            for parameter in layer.parameters():
                parameter.fill_(index + 1)
        for outer in (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head):
            outer.weight.fill_(100.0)
    save_model(decoder, directory)


AKI_SIZES = {"hidden_size": 10, "intermediate_size": 16, "num_attention_heads": 10}


@pytest.mark.parametrize("method", ["aki", "aki_pro"])
def test_new_rows_come_from_the_layer_above_and_old_rows_from_the_layer(method: str, tmp_path: Path) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=3, **AKI_SIZES)
    mark_layers(tmp_path / "source", source)
    grow(tmp_path, target, growth(method=method, norm="copy"))
    head, new = [False] * 4, [True] * 4
    group = head * 4 + new
    new_rows = {
        tensor_names.Q_WEIGHT: group * 2,
        tensor_names.Q_BIAS: group * 2,
        tensor_names.K_WEIGHT: head * 2,
        tensor_names.K_BIAS: head * 2,
        tensor_names.V_WEIGHT: head * 2,
        tensor_names.V_BIAS: head * 2,
        tensor_names.O_WEIGHT: [False] * 8 + [True] * 2,
        tensor_names.GATE: [False] * 12 + [True] * 4,
        tensor_names.UP: [False] * 12 + [True] * 4,
        tensor_names.DOWN: [False] * 8 + [True] * 2,
        tensor_names.INPUT_NORM: [False] * 10,
        tensor_names.POST_ATTENTION_NORM: [False] * 10,
    }
    residual = torch.tensor([2.0, 2, 1, 1, 1, 1, 1, 1, 2, 2], dtype=torch.float64)
    q_channels = torch.tensor([2.0] * 4 + [1.0] * 12 + [2.0] * 4, dtype=torch.float64).repeat(2)
    ffn = torch.tensor([2.0] * 4 + [1.0] * 8 + [2.0] * 4, dtype=torch.float64)
    readers = {tensor_names.O_WEIGHT: q_channels, tensor_names.DOWN: ffn}
    assert set(new_rows) == set(tensor_names.role_shapes(target, 0))
    for layer, (own, above) in enumerate([(1.0, 2.0), (2.0, 3.0), (3.0, 3.0)]):
        for role, is_new in new_rows.items():
            grown = tensor(tmp_path / "target", tensor_names.layer_name(target, layer, role))
            rows = torch.where(torch.tensor(is_new), above, own).double()
            expected = rows if grown.dim() == 1 else rows[:, None] / readers.get(role, residual)
            torch.testing.assert_close(grown, expected, atol=0, rtol=0, msg=f"layer {layer}, {role}")


@pytest.mark.parametrize("method", ["aki", "aki_pro"])
@pytest.mark.parametrize("scope", ["inner", "transplant"])
def test_inner_scopes_leave_what_is_written_to_the_residual_stream_to_the_layer(
    scope: str, method: str, tmp_path: Path
) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=3, **AKI_SIZES)
    mark_layers(tmp_path / "source", source)
    grow(tmp_path, target, growth(method=method, norm="copy", scope=scope))
    up, down, o_proj = (
        tensor(tmp_path / "target", tensor_names.layer_name(target, 0, role))
        for role in (tensor_names.UP, tensor_names.DOWN, tensor_names.O_WEIGHT)
    )
    assert up[:12, 2].eq(1).all()  # channel 2 has one copy: what is read of it is what the source read
    assert up[12:, 2].eq(2).all()
    fan_out = 2.0 if scope == "transplant" else 1.0
    copies_of_neurons, copies_of_heads = [0.5] * 4 + [1.0] * 8 + [fan_out / 2] * 4, [0.5] + [1.0] * 3 + [fan_out / 2]
    assert down.unique(dim=0).tolist() == [copies_of_neurons]
    heads = [share for share in copies_of_heads * 2 for _ in range(4)]
    assert o_proj.unique(dim=0).tolist() == [heads]


def test_new_groups_of_keys_come_from_the_layer_above_in_aki_and_from_their_own_in_aki_pro(tmp_path: Path) -> None:
    source, target = model(), model(num_attention_heads=16, num_key_value_heads=4)
    mark_layers(tmp_path / "source", source)
    name = tensor_names.layer_name(target, 0, tensor_names.K_BIAS)
    for method, new_groups in (("aki", 2.0), ("aki_pro", 1.0)):
        grow(tmp_path, target, growth(method=method), name=method)
        assert tensor(tmp_path / method, name).tolist() == [1.0] * 8 + [new_groups] * 8


@pytest.mark.parametrize(
    ("depth", "origins", "uppers"),
    [
        ("interpolate", [1, 1, 2, 2, 3], [2, 2, 3, 3, 3]),
        ("stack", [1, 2, 3, 1, 2], [2, 3, 3, 2, 3]),
        ("stack_top", [1, 2, 3, 2, 3], [2, 3, 3, 3, 3]),
        ([0, 2, 2, 1, 0], [1, 3, 3, 2, 1], [2, 3, 3, 3, 2]),
    ],
)
def test_the_layer_above_is_one_of_the_source_whatever_the_depth(
    depth: str | list[int], origins: list[int], uppers: list[int], tmp_path: Path
) -> None:
    mark_layers(tmp_path / "source", model(num_hidden_layers=3))
    target = model(num_hidden_layers=5, intermediate_size=13)
    grow(tmp_path, target, growth(method="aki", depth=depth))
    ups = [tensor(tmp_path / "target", tensor_names.layer_name(target, layer, tensor_names.UP)) for layer in range(5)]
    assert [up[0, 0].item() for up in ups] == origins
    assert [up[12, 0].item() for up in ups] == uppers


def test_random_growth_starts_like_a_fresh_model(tmp_path: Path) -> None:
    source, target = model(), model(hidden_size=64, intermediate_size=64, initializer_range=0.03)
    write_source(tmp_path / "source", source)
    grow(tmp_path, target, growth(method="random"))
    drawn = {name: tensor(tmp_path / "target", name) for name in tensor_names.tensor_shapes(target)}
    for name, values in drawn.items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name.endswith(".bias"):
            assert not values.any()
        else:
            assert values.std().item() == pytest.approx(0.03, rel=0.1)
            assert abs(values.mean().item()) < 0.005
    assert drawn[tensor_names.EMBEDDING].ne(drawn[tensor_names.HEAD]).all()
    ups = [drawn[tensor_names.layer_name(target, layer, tensor_names.UP)] for layer in range(2)]
    assert ups[0].ne(ups[1]).all()


QUIET = """
from aquilamoe.growth.methods import fpi

def grow(layer, upper_layer, width):
    return {role: 0 * tensor for role, tensor in fpi.grow(layer, upper_layer, width).items()}

def keeps_function(units, num_layers, growth):
    return False
"""


def test_a_new_method_is_one_file_with_one_function_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package/growth/methods"
    folder.mkdir(parents=True)
    (folder / "quiet.py").write_text(QUIET)
    with pytest.raises(ValueError, match="'quiet' is not in growth/methods"):
        growth(method="quiet")
    monkeypatch.setattr(plugins, "PACKAGE_ROOT", tmp_path / "package")
    methods = aquilamoe.growth.methods
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    how = growth(method="quiet")
    write_source(tmp_path / "source", model())
    assert not rules.preserves(how, model(), model(hidden_size=10))
    assert not logits(grow(tmp_path, model(hidden_size=10), how)).any()


def test_one_file_and_one_yaml_are_a_new_method_of_the_command(tmp_path: Path) -> None:
    for folder in ("platform", "conf", "workflows"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "workflows/efficientscale.py", "action=plan", "growth=quiet"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "platform"), "COLUMNS": "200"}

    def plan(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)

    before = plan()
    assert before.returncode == 1
    assert "there is no conf/growth/quiet.yaml" in before.stderr
    (tmp_path / "platform/aquilamoe/growth/methods/quiet.py").write_text(QUIET)
    yaml = (ROOT / "conf/growth/aki_pro.yaml").read_text().replace("method: aki_pro", "method: quiet")
    (tmp_path / "conf/growth/quiet.yaml").write_text(yaml)
    after = plan()
    assert after.returncode == 0, after.stderr
    assert re.search(r"scale_up +to run", after.stdout)
    misspelt = plan("growth.method=quit")
    assert misspelt.returncode == 1
    assert "'quit' is not in growth/methods; did you mean 'quiet'?" in misspelt.stderr


def test_every_method_has_a_yaml_with_all_of_its_settings() -> None:
    files = {path.stem: path for path in (ROOT / "conf/growth").glob("*.yaml")}
    assert sorted(files) == METHODS
    for name, path in files.items():
        how = GrowthConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
        assert how.method == name
        keys = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line.partition(":")[0] for line in keys] == list(GrowthConfig.model_fields)
        assert all(" # " in line for line in keys)
