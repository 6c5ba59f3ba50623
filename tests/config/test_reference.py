"""Every key of a configuration has a description, and a number its unit."""

from typing import Any, get_args

import pytest
from pydantic import BaseModel

from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.reference import Key, keys, reachable
from aquilamoe.config.scaling import ScaleConfig
from aquilamoe.config.schema import ExperimentConfig

MODELS = reachable(ExperimentConfig, AblationConfig, GrowConfig, ScaleConfig)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_of_a_configuration_is_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    assert [key.name for key in keys(model) if len(key.description) < 3 or key.description.endswith(".")] == []


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_number_of_a_configuration_has_a_unit(model: type[BaseModel]) -> None:
    numbers = [key for key in keys(model) if key.values.partition(" or ")[0] in ("integer", "number")]
    assert [key.name for key in numbers if not key.unit and key.name != "seed"] == []


def test_the_keys_of_every_stage_and_of_nested_groups_are_among_those_tested() -> None:
    names = {model.__name__ for model in MODELS}
    stages: tuple[Any, ...] = get_args(get_args(get_args(ExperimentConfig.model_fields["stages"].annotation)[1])[0])
    assert len(stages) > 5
    assert {stage.__name__ for stage in stages} < names
    assert {"RoleConfig", "FiltersConfig", "HubConfig", "SparseUpcycling", "ControlsConfig"} < names


def test_a_key_is_read_from_its_field_as_a_user_types_it() -> None:
    found = {key.name: key for key in keys(ExperimentConfig)}
    assert found["json"].values == "true, false"
    assert found["tasks"].values == "list of text or null"
    assert found["stages"].values == "mapping of group"
    grow = {key.name: key for key in keys(GrowConfig)}
    assert grow["disk_bytes_per_s"] == Key(
        name="disk_bytes_per_s",
        values="number",
        unit="bytes/s",
        description="Disk rate that action=plan assumes, for reading and writing",
        models=(),
        required=True,
        default=None,
    )
