"""The boards of Grafana and the configuration of Prometheus: what Grafana would only show on a screen."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from aquilamoe.training.ray import metrics_exporter
from query_boards import board_queries, plain

FOLDER = Path(__file__).parents[2] / "dashboards"
PROVISIONING = FOLDER / "grafana" / "provisioning"
BOARDS = sorted((FOLDER / "grafana" / "boards").glob("*.json"))
# Of Grafana's many units, those that the boards use.
UNITS = {"short", "percentunit", "s", "sci", "bytes", "Bps", "watt"}
KINDS = {"timeseries", "stat", "bargauge"}
COLUMNS = 24
OF_RAY = {"instance", "job", "le"}
every_board = pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def panels(path: Path) -> list[dict[str, Any]]:
    """All but the headings of rows."""
    return [panel for panel in read(path)["panels"] if panel["type"] != "row"]


def expressions(path: Path) -> Iterator[str]:
    yield from (target["expr"] for panel in panels(path) for target in panel["targets"])


def sources(value: Any) -> Iterator[Any]:
    """Every `datasource` anywhere in a board."""
    if isinstance(value, dict):
        yield from ([value["datasource"]] if "datasource" in value else [])
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from sources(part)


def test_there_is_a_board_for_training_one_for_routers_and_one_for_the_cluster() -> None:
    assert [path.stem for path in BOARDS] == ["cluster", "router", "training"]
    assert len({read(path)["uid"] for path in BOARDS}) == len({read(path)["title"] for path in BOARDS}) == 3


@every_board
def test_a_board_queries_the_data_source_that_is_provisioned(path: Path) -> None:
    (provisioned,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
    found = list(sources(read(path)))
    assert len(found) > 10
    assert all(source == {"type": provisioned["type"], "uid": provisioned["uid"]} for source in found)


@every_board
def test_every_panel_has_a_description_and_a_query(path: Path) -> None:
    for panel in panels(path):
        assert panel["type"] in KINDS
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters == sorted(set(letters)) and letters
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])


@every_board
def test_panels_have_an_id_and_a_place_of_their_own(path: Path) -> None:
    everything = read(path)["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= COLUMNS and place["h"] > 0 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (a, b)


@every_board
def test_a_board_uses_the_variables_that_it_has_and_no_others(path: Path) -> None:
    text = json.dumps(read(path)["panels"])
    used = {name for name in re.findall(r"\$(\w+)", text) if not name.startswith("__")}
    queries = [variable["query"]["query"] for variable in read(path)["templating"]["list"]]
    used |= set(re.findall(r"\$(\w+)", " ".join(queries)))
    assert used == {variable["name"] for variable in read(path)["templating"]["list"]}


def test_every_metric_of_training_is_on_a_board_and_a_board_knows_no_others(queried_metrics: set[str]) -> None:
    exported = {f"ray_{metrics_exporter.PREFIX}{name}" for name in metrics_exporter.SHARED}
    exported |= {f"ray_{metrics_exporter.PREFIX}{name}_total" for name in metrics_exporter.COUNTERS}
    exported |= {f"ray_{metrics_exporter.PREFIX}checkpoint_seconds_{part}" for part in ("bucket", "count")}
    assert {name for name in queried_metrics if metrics_exporter.PREFIX in name} == exported


@every_board
def test_a_query_of_a_metric_of_training_names_only_its_tags(path: Path) -> None:
    tags = {name: set(own) for name, (_, own) in (metrics_exporter.SHARED | metrics_exporter.COUNTERS).items()}
    tags["checkpoint_seconds"] = {"rank"}
    for expression in expressions(path):
        for name, selector in re.findall(r"ray_" + metrics_exporter.PREFIX + r"(\w+)\{(.*?)\}", expression):
            metric = re.sub(r"_(total|bucket|count)$", "", name)
            known = tags[metric] | set(metrics_exporter.TAGS) | OF_RAY
            assert set(re.findall(r"(\w+)\s*=", selector)) <= known, expression
            grouped = ",".join(re.findall(r"by \((.*?)\)", expression))
            assert {label.strip() for label in grouped.split(",") if label} <= known, expression


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)")


@promtool
def test_prometheus_understands_its_configuration(tmp_path: Path) -> None:
    """With a file of targets as Ray writes it: whether one is there now depends on other processes."""
    targets = tmp_path / "targets.json"
    targets.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ["127.0.0.1:8080"]}]))
    text = (FOLDER / "prometheus" / "prometheus.yml").read_text()
    assert text.count("/tmp/ray/prom_metrics_service_discovery.json") == 1
    file = tmp_path / "prometheus.yml"
    file.write_text(text.replace("/tmp/ray/prom_metrics_service_discovery.json", str(targets)))
    words = ["promtool", "check", "config", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_prometheus_understands_every_query(tmp_path: Path, plain_query: Callable[[str], str]) -> None:
    """Checked as rules, because it checks those without a server."""
    queries = [plain_query(expression) for path in BOARDS for expression in expressions(path)]
    assert len(queries) > 40
    rules = [{"record": f"query_{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_of_the_boards_reaches_prometheus_without_their_variables() -> None:
    queries = board_queries()
    assert not [each for each in queries if "$" in each.query or "label_values" in each.query]
    everything = [expression for path in BOARDS for expression in expressions(path)]
    assert [each.query for each in queries if not each.title.startswith("$")] == list(map(plain, everything))
    of_gpus = {each.title for each in queries if each.needs_gpu}
    assert of_gpus == {"GPUs in use", "GPU utilisation", "GPU memory", "GPU power"}


def test_the_list_of_metrics_of_a_query_leaves_out_functions_and_labels(metrics_of: Callable[[str], set[str]]) -> None:
    expression = 'sum by (a, b) (rate(x_total{c="y z", d=~"$e"}[$__rate_interval])) / ignoring (a) group_left count(w)'
    assert metrics_of(expression) == {"x_total", "w"}
