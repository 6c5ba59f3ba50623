"""What an experiment's stages are as they are configured now, whether or not they have been run."""

from collections.abc import Mapping
from dataclasses import dataclass

from aquilamoe.config.graph import Node
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.fingerprint import Recipe, fingerprint


@dataclass(frozen=True)
class ExpectedStage:
    """A stage that an experiment describes; `inputs` are the stages that it reads, by role."""

    fingerprint: str
    recipe: Recipe
    inputs: Mapping[str, str]


def expected_stages(nodes: Mapping[str, Node]) -> dict[str, ExpectedStage]:
    """The stages of an experiment by name."""
    return {
        name: ExpectedStage(fingerprint(recipe), recipe, nodes[name].stage.inputs)
        for name, recipe in planning.recipes(nodes).items()
    }
