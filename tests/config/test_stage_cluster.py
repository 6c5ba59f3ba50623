"""A stage's own keys of the cluster: where they count, what they leave as it was, and what is refused at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.config import graph, stage_cluster
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.estimates.dry_run_graph import shrunk
from aquilamoe.pipeline import cost
from aquilamoe.pipeline import plan as planning

Compose = Callable[..., dict[str, Any]]
EXPERTS_APART = ("cluster.workers=8", "cluster.parallel=fsdp", "cluster.expert_parallel=4")


@pytest.fixture
def clusters(compose: Compose) -> Callable[..., dict[str, ClusterConfig]]:
    def resolved(*words: str) -> dict[str, ClusterConfig]:
        experiment = graph.parse(compose(*words))
        return {name: stage_cluster.of(node, experiment.cluster) for name, node in graph.build(experiment).items()}

    return resolved


def test_a_stage_has_its_own_keys_and_all_others_of_the_cluster(
    clusters: Callable[..., dict[str, ClusterConfig]],
) -> None:
    plain = clusters()
    found = clusters("++stages.moe.cluster={workers:2,parallel:fsdp,checkpoint_every_tokens:8192}")
    changed = {"workers": 2, "parallel": "fsdp", "checkpoint_every_tokens": 8192}
    assert found.pop("moe") == plain.pop("moe").model_copy(update=changed)
    assert found == plain


def test_no_recipe_depends_on_where_a_stage_runs(compose: Compose) -> None:
    def recipes(*words: str) -> dict[str, Any]:
        return planning.recipes(graph.build(graph.parse(compose(*words))))

    assert recipes("++stages.moe.cluster={workers:2,parallel:fsdp}") == recipes()


def test_experts_are_divided_only_in_the_stages_that_have_some(
    clusters: Callable[..., dict[str, ClusterConfig]],
) -> None:
    found = clusters(*EXPERTS_APART)
    assert {name: found[name].expert_parallel for name in ("prepare", "dense", "moe", "control")} == {
        "prepare": 1,
        "dense": 1,
        "moe": 4,
        "control": 1,
    }


def test_another_division_of_the_model_needs_no_word_about_shard_groups(
    clusters: Callable[..., dict[str, ClusterConfig]],
) -> None:
    words = (
        "cluster.workers=8",
        "cluster.parallel=hsdp",
        "cluster.shard_size=4",
        "++stages.dense.cluster.parallel=ddp",
    )
    found = clusters(*words)
    assert (found["dense"].parallel, found["dense"].shard_size) == ("ddp", None)
    assert (found["moe"].parallel, found["moe"].shard_size) == ("hsdp", 4)


def test_a_null_key_is_as_the_clusters_and_a_null_group_has_none(
    clusters: Callable[..., dict[str, ClusterConfig]],
) -> None:
    assert clusters("++stages.moe.cluster={workers:null,parallel:null}") == clusters()
    assert clusters("++stages.moe.cluster=null") == clusters()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["++stages.dense.cluster={workers:8,parallel:fsdp,expert_parallel:8}"],
            "stages.dense.cluster.expert_parallel: 8 workers are to share experts, and the model is dense; set it to 1",
        ),
        (
            ["++stages.moe.cluster={workers:3,parallel:fsdp,expert_parallel:3}"],
            "stages.moe.cluster.expert_parallel: 8 experts are no multiple of 3 workers; choose from [1, 2, 4, 8]",
        ),
        (
            ["cluster.workers=3", "cluster.parallel=fsdp", "cluster.expert_parallel=3"],
            "cluster.expert_parallel: 8 experts are no multiple of 3 workers; choose from [1, 2, 4, 8]",
        ),
        (
            ["++stages.moe.cluster={workers:14,parallel:fsdp,expert_parallel:2}"],
            "stages.moe.cluster.expert_parallel: 7 workers are to share an expert, and divide neither of its "
            "352 and 128 rows and columns; set a larger expert_parallel",
        ),
        (
            ["++stages.moe.cluster.address=auto"],
            "stages.moe.cluster.address: 'auto' for one stage; all stages of a run have one, set cluster.address",
        ),
        (
            ["++stages.moe.cluster={workers:4,parallel:hsdp,shard_size:3}"],
            "stages.moe.cluster: 4 workers are no multiple of shard_size 3; choose a divisor of 4, or other workers",
        ),
    ],
)
def test_a_layout_that_workers_would_refuse_is_refused_before_any_starts(
    compose: Compose, words: list[str], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        graph.build(graph.parse(compose(*words)))
    assert str(raised.value) == message


def test_a_misspelt_key_is_refused_with_the_nearest(compose: Compose) -> None:
    with pytest.raises(UserError, match=r"^stages\.moe\.cluster\.workrs: unknown key; did you mean 'workers'\?"):
        graph.build(graph.parse(compose("++stages.moe.cluster.workrs=2")))


def test_a_stage_pays_for_its_own_devices(compose: Compose) -> None:
    experiment = graph.parse(compose("++stages.moe.cluster={workers:2,price_per_device_hour:3}"))
    nodes = graph.build(experiment)
    rates = {name: cost.rates(nodes[name], experiment.cluster) for name in ("dense", "moe", "evaluate")}
    assert {name: each.devices for name, each in rates.items()} == {"dense": 1, "moe": 2, "evaluate": 1}
    assert rates["moe"].price_per_device_hour == 3.0


def test_a_dry_run_has_one_worker_for_every_stage(compose: Compose, tmp_path: Path) -> None:
    small = graph.parse(shrunk(compose("++stages.moe.cluster={workers:2,parallel:fsdp}"), tmp_path)[0])
    moe = graph.build(small)["moe"]
    assert stage_cluster.of(moe, small.cluster).workers == 1
