"""The report page: its content is the records' content, it needs nothing else, and missing or hostile input is fine."""

import copy
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markupsafe import escape

from aquilamoe.reports import lineage_page, page, paper
from aquilamoe.reports.ancestry import graph_svg
from aquilamoe.reports.conclusion import checkpoints, find, parts_note, scale_note, story, verdict
from aquilamoe.reports.curves import Series, chain_of, crossing
from aquilamoe.reports.figure import loss_figure
from aquilamoe.reports.stage_rows import HEADER, NOT_REACHED, stage_rows
from aquilamoe.reports.template import Heading

Records = dict[str, dict[str, Any]]
Curves = dict[str, list[dict[str, Any]]]

DASH = "\N{EN DASH}"  # what a cell without a value shows
CHAIN = ["prepare", "scale_up", "dense", "scale_out", "moe"]
FLOPS_PER_TOKEN = {"small": 4.6e6, "dense": 1.45e7, "moe": 2.1e7}


def trained_points(
    tokens: int,
    flops_per_token: float,
    before: tuple[int, float],
    losses: tuple[float, float],
    cooldown: float = 0.0,
    sparse: bool = False,
) -> list[dict[str, Any]]:
    """Points of a stage that falls from one loss to another, steeply first, by `cooldown` of it over its last fifth."""
    noise, steps = random.Random(tokens), max(60, tokens // 4096)
    points: list[dict[str, Any]] = []
    for step in range(steps + 1):
        done, share = tokens * step // steps, step / steps
        fall = (1 - math.exp(-5.5 * share**0.62)) / (1 - math.exp(-5.5))
        loss = losses[0] + (losses[1] + cooldown - losses[0]) * fall - cooldown * max(0.0, share - 0.8) / 0.2
        point = {
            "step": step,
            "tokens": done,
            "lineage_tokens": before[0] + done,
            "lineage_flops": before[1] + done * flops_per_token,
            "time": 1.7e9 + step,
        }
        if step:
            points.append({**point, "train/loss": loss - 0.03 + noise.gauss(0, 0.06), "train/grad_norm": 1.0})
            if sparse:
                points[-1]["router/load_max_over_mean"] = 1.08 + 0.5 * math.exp(-6 * share) + noise.gauss(0, 0.02)
        if step % max(1, steps // 24) == 0 or step == steps:
            points.append({**point, "val/loss": round(loss + noise.gauss(0, 0.004), 4)})
    return points


def record(stage: str, kind: str, inputs: dict[str, str], metrics: dict[str, Any], spent: float) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if kind == "corpus":
        hashes = ["b60979fd144c5330e378327c4e8d57784dde798c6696c1a6ac4102fba3e8dc49"]
        hashes += ["f7e777098b10722d05d82a2cae04692622b5080351dd3cd5b6365033637d40ef"]
        config = {"sources": {"en": {"sha256": hashes[0]}, "zh": {"sha256": hashes[1]}}}
    if kind == "scale_up":
        config = {"growth": {"method": "aki_pro", "norm": "exact", "depth": "interpolate", "noise": 0.0}}
    if kind == "scale_out":
        config = {"upcycling": {"method": "copy", "noise": 0.0, "router_std": 0.02}}
    prints = {name: f"{abs(hash_of(name)):016x}" for name in [stage, *inputs.values()]}
    return {
        "stage": stage,
        "kind": kind,
        "fingerprint": prints[stage],
        "recipe": {"kind": kind, "version": 1, "config": config, "inputs": {}},
        "inputs": {
            role: {"stage": name, "fingerprint": prints[name], "directory": f"{name}-{prints[name]}"}
            for role, name in inputs.items()
        },
        "metrics": metrics,
        "files": {"model/model.safetensors": {"sha256": "0" * 64, "bytes": 2_800_000}},
        "versions": {"aquilamoe": "0.1.0", "torch": "2.13.0", "python": "3.11.2"},
        "git_commit": "4f1c2e7a9b3d5c6f8e0a1b2c3d4e5f6a7b8c9d0e",
        "started": "2026-01-02T03:04:05+00:00",
        "finished": "2026-01-02T03:05:41+00:00",
        "seconds": spent,
    }


def hash_of(name: str) -> int:
    """A stable stand-in for a fingerprint."""
    return random.Random(name).getrandbits(64)


def example(grown: float = 3.62, control: float = 3.55) -> tuple[Records, Curves]:
    """A small embedded experiment; the two arguments are the final losses of the chain and of the control."""
    small, dense, moe = FLOPS_PER_TOKEN["small"], FLOPS_PER_TOKEN["dense"], FLOPS_PER_TOKEN["moe"]
    n_small, n_dense, n_moe = 3_300_000, 1_200_000, 400_000
    f_small = n_small * small
    f_dense = f_small + n_dense * dense
    f_moe = f_dense + n_moe * moe
    n_control = int((f_moe - f_small) / small)
    curves = {
        "prepare": trained_points(n_small, small, (0, 0.0), (8.34, 4.05)),
        "dense": trained_points(n_dense, dense, (n_small, f_small), (4.57, 3.81)),
        "moe": trained_points(n_moe, moe, (n_small + n_dense, f_dense), (3.82, grown), 0.14, True),
        "control": trained_points(n_control, small, (n_small, f_small), (4.05, control), 0.15),
    }

    def pretrain(stage: str, params: tuple[int, int], flops: float, recovery: float | None) -> dict[str, Any]:
        values = [point for point in curves[stage] if "val/loss" in point]
        last = values[-1]
        return {
            "params_total": params[0], "params_active": params[1], "tokens": last["tokens"],
            "flops": last["tokens"] * flops, "lineage_tokens": last["lineage_tokens"],
            "lineage_flops": last["lineage_flops"], "loss_start": values[0]["val/loss"], "loss_end": last["val/loss"],
            "loss_end/en": 3.31, "loss_end/zh": 4.7, "recovery_tokens": recovery, "recovery_flops": None,
            "tokens_per_s": 31234.5, "steps": last["step"],
        }  # fmt: skip

    def growth(params: tuple[int, int], before: float, after: float, preserving: bool) -> dict[str, Any]:
        return {
            "params_total": params[0], "params_active": params[1], "max_abs_dlogit": 4.1e-6 if preserving else 7.83,
            "kl": 2e-9 if preserving else 0.563, "source_loss": before, "target_loss": after, "tokens": 8192,
            "preserving": preserving, "tolerance": 1e-4, "passed": preserving, "source_final_loss": before,
        }  # fmt: skip

    ends = {stage: [p["val/loss"] for p in points if "val/loss" in p][-1] for stage, points in curves.items()}
    tokens = {"tokens": "tokens"}
    measured = {"prepare": ends["prepare"], "dense": ends["dense"], "moe": grown, "control": control}
    evaluated: dict[str, Any] = {}
    for role, loss in measured.items():
        evaluated[f"{role}/nats_per_token"] = loss
        evaluated |= {f"{role}/en/nats_per_token": loss - 0.3, f"{role}/zh/nats_per_token": loss + 0.9}
        evaluated |= {f"{role}/en/bits_per_byte": loss * 0.512, f"{role}/zh/bits_per_byte": loss * 0.687}
    small_size, dense_size, moe_size = (699_776, 699_776), (2_118_144, 2_118_144), (4_612_480, 2_904_064)
    source = {"source": "", **tokens}
    up, out = growth(dense_size, ends["prepare"], 4.57, False), growth(moe_size, ends["dense"], 3.82, True)
    records = [
        record("corpus", "corpus", {}, {"documents": 394}, 0.8),
        record("tokenizer", "tokenizer", {"corpus": "corpus"}, {"vocab_size": 4096}, 3.1),
        record("tokens", "tokenize", {"corpus": "corpus", "tokenizer": "tokenizer"}, {}, 2.2),
        record("prepare", "pretrain", tokens, pretrain("prepare", small_size, small, None), 96.4),
        record("scale_up", "scale_up", source | {"source": "prepare"}, up, 0.9),
        record("dense", "pretrain", source | {"source": "scale_up"}, pretrain("dense", dense_size, dense, 245_760), 84),
        record("scale_out", "scale_out", source | {"source": "dense"}, out, 0.7),
        record("moe", "pretrain", source | {"source": "scale_out"}, pretrain("moe", moe_size, moe, None), 63.2),
        record(
            "control", "pretrain", source | {"source": "prepare"}, pretrain("control", small_size, small, None), 171
        ),
        record("evaluate", "evaluate", {**tokens, **{name: name for name in measured}}, evaluated, 12.0),
        record("export", "export", {"source": "moe"}, {"params_total": 4_612_480, "params_active": 2_904_064}, 0.4),
    ]
    return {entry["stage"]: entry for entry in records}, curves


def html_of(tmp_path: Path, records: Records, curves: Curves, chain: list[str] | None = None, **options: Any) -> str:
    """Render and read the page back."""
    target = tmp_path / "reports" / "report.html"
    control = options.pop("control", "control")
    description = options.pop("description", "What was tried.")
    heading = Heading("embedded", description, *([options.pop("command")] if "command" in options else []))
    page.render(
        heading,
        target,
        records=records,
        curves=curves,
        chain=CHAIN if chain is None else chain,
        control=control,
        **options,
    )
    return target.read_text("utf-8")


class Reader(HTMLParser):
    """Collects text, ids, addresses and table rows, and checks that elements are closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.addresses += [
            value or "" for key, value in attrs if key in ("href", "src", "xlink:href", "action", "data")
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def section(self, first: str) -> list[list[str]]:
        """Rows that begin with a stage's name."""
        return [row for row in self.rows if row and row[0] == first]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def test_the_page_has_everything_a_reader_looks_for_in_order(tmp_path: Path) -> None:
    words = Reader(html_of(tmp_path, *example())).words
    expected = [
        "embedded",
        "A model of 700k parameters was trained on 3.3M tokens, grown to 2.12M parameters, trained on 1.2M tokens, "
        "upcycled to a Mixture of Experts of 4.61M parameters (2.9M active) and trained on 400k tokens.",
        "What was tried.",
        "scale-up",
        "700k \N{RIGHTWARDS ARROW} 2.12M",
        "scale-out",
        "the whole run",
        "Growth did not beat simply continuing the small model here: 3.620 against 3.550 nats/token",
        "at equal cumulative FLOPs (4.1e13)",
        "One seed, no interval",
        "This is a demonstration on two public-domain works, not a scaling result",
        "Jane Austen",
        "Beside the paper",
        "8x16B",
        "the paper, as published 4.12 3.35 2.39",
        "the paper, computed again 4.12",
        "Stages",
        "Evaluation",
        "Growth certificates",
        "python workflows/efficientscale.py",
        "6 per matrix parameter",
        "Bits per byte",
        "Recovery tokens",
    ]
    position = 0
    for text in expected:
        position = words.find(text, position)
        assert position >= 0, text


def test_the_numbers_of_the_tables_are_the_numbers_of_the_records(tmp_path: Path) -> None:
    records, curves = example()
    records["dense"]["metrics"] |= {"loss_start": 4.5712, "loss_end": 3.8126, "tokens_per_s": 7321.9}
    reader = Reader(html_of(tmp_path, records, curves))
    stage = reader.section("dense")[0]
    assert stage == ["dense", "2.12M", "2.12M", "1.2M", "1.74e13", "4.57", "3.81", "246k", "84", "7.32k"]
    assert reader.section("moe")[0][7] == NOT_REACHED
    assert [reader.section(name)[0][7] for name in ("prepare", "control", "scale_up", "corpus")] == [DASH] * 4
    evaluated = records["evaluate"]["metrics"]
    columns = ("nats_per_token", "en/nats_per_token", "en/bits_per_byte", "zh/nats_per_token", "zh/bits_per_byte")
    for name in ("prepare", "moe", "control"):
        assert reader.section(name)[1] == [name, *(f"{evaluated[f'{name}/{column}']:.3f}" for column in columns)]
    up, out = reader.section("scale_up")[1], reader.section("scale_out")[1]
    assert up[1:] == [
        "aki_pro, depth interpolate, noise 0, norm exact", "not preserving", "7.83", DASH, "0.563",
        f"{records['scale_up']['metrics']['source_loss']:.3f}", "4.570", "makes no claim",
    ]  # fmt: skip
    assert out[2:6] == ["preserving", "4.1e-06", "1.0e-04", "2.0e-09"]
    assert out[-1] == "passed"


def test_growth_rows_do_not_show_certificate_tokens_as_training_tokens() -> None:
    rows = {row.stage: row for row in stage_rows(example()[0])}
    assert rows["scale_up"].tokens is None
    assert rows["dense"].tokens == 1_200_000


def test_a_column_of_losses_is_of_the_same_tokens_for_growths_and_training() -> None:
    """What a certificate measured is on tokens of its own, and in a table of its own."""
    records = example()[0]
    rows = {row.stage: row for row in stage_rows(records)}
    for growth, before, after in (("scale_up", "prepare", "dense"), ("scale_out", "dense", "moe")):
        assert rows[growth].loss_start == rows[before].loss_end
        assert rows[growth].loss_end == rows[after].loss_start != records[growth]["metrics"]["target_loss"]
    alone = {name: record for name, record in records.items() if name != "dense"}
    assert stage_rows(alone)[1].loss_end is None, "it was not measured on these tokens"


@pytest.mark.parametrize(
    ("grown", "control", "outcome", "words"),
    [
        (3.31, 3.42, "beat", "Growth beat simply continuing the small model here: 3.310 against 3.420 nats/token"),
        (3.42, 3.31, "lost", "Growth did not beat simply continuing the small model here: 3.420 against 3.310"),
        (3.42, 3.4201, "level", "Growth and simply continuing the small model ended level here: 3.420 against 3.420"),
    ],
)
def test_the_finding_follows_the_numbers(
    tmp_path: Path, grown: float, control: float, outcome: str, words: str
) -> None:
    records, curves = example(grown, control)
    finding = find(records, CHAIN, "control")
    assert finding.outcome == outcome
    assert finding.headline.startswith(words)
    html = html_of(tmp_path, records, curves)
    assert f'class="finding {outcome}"' in html
    assert words in html
    by_measure = {row.measure: row for row in finding.comparisons}
    assert by_measure["zh, bits/byte"].grown == pytest.approx(grown * 0.687)
    assert by_measure["en, bits/byte"].difference == pytest.approx((grown - control) * 0.512, abs=1e-3)


def test_the_finding_states_why_the_curves_end_elsewhere_and_whether_they_contradict_it() -> None:
    records, _ = example(3.31, 3.42)
    for stage, loss in (("moe", 3.5), ("control", 3.4)):
        records[stage]["metrics"]["loss_end"] = loss
    records["moe"]["recipe"]["config"]["validation_tokens"] = 16_384
    note = parts_note(records, find(records, CHAIN, "control"))
    assert "validation while training, as in the curves, reads a fixed part of 16.4k tokens of it" in note
    assert note.endswith("On that part the order is reversed.")
    records["moe"]["metrics"]["loss_end"] = 3.3
    assert not parts_note(records, find(records, CHAIN, "control")).endswith("other way round.")
    del records["evaluate"]
    assert parts_note(records, find(records, CHAIN, "control")) == ""


def test_the_finding_names_the_part_of_the_held_out_text_that_was_evaluated() -> None:
    records, _ = example(3.31, 3.42)
    assert find(records, CHAIN, "control").comparisons[0].measure == "nats/token, all held-out text"
    records["evaluate"]["recipe"] = {"config": {"validation_tokens": 65_536}}
    assert (
        find(records, CHAIN, "control").comparisons[0].measure == "nats/token, 65.5k held-out tokens of each language"
    )


def test_a_difference_that_one_seed_cannot_resolve_is_called_that() -> None:
    assert "several paired seeds" in find(example(3.50, 3.51)[0], CHAIN, "control").caveats[-1]
    assert "several paired seeds" not in find(example(3.40, 3.51)[0], CHAIN, "control").caveats[-1]


def test_unequal_flops_are_not_called_equal() -> None:
    records, _ = example()
    records["control"]["metrics"]["lineage_flops"] *= 1.25
    finding = find(records, CHAIN, "control")
    assert "equal cumulative" not in finding.headline
    assert finding.caveats[0] == "The FLOPs are not equal: the control used 1.25 times those of the chain."


def test_without_an_evaluate_stage_the_finding_uses_validation_and_states_so() -> None:
    records, _ = example(3.62, 3.55)
    del records["evaluate"]
    finding = find(records, CHAIN, "control")
    assert finding.outcome == "lost"
    assert [row.measure for row in finding.comparisons] == ["nats/token, validation while training"]
    assert finding.comparisons[0].grown == records["moe"]["metrics"]["loss_end"]


def test_without_a_control_the_page_claims_nothing(tmp_path: Path) -> None:
    records, curves = example(3.31, 3.42)
    words = Reader(html_of(tmp_path, records, curves, control=None)).words
    assert "Whether growing paid is unknown: there is no control" in words
    assert "Growth beat" not in words
    assert "Dashed" not in words


def test_only_the_packaged_works_are_called_public_domain_and_only_small_runs_demonstrations() -> None:
    records, _ = example()
    records["corpus"]["recipe"]["config"]["sources"] = {"de": {"sha256": "1" * 64}, "en": {"sha256": None}}
    assert scale_note(records, CHAIN).startswith("This is a demonstration on its corpus (de, en), not a scaling result")
    records["moe"]["metrics"]["lineage_tokens"] = 3.6e12
    note = scale_note(records, CHAIN)
    assert "demonstration" not in note
    assert "3.6T training tokens" in note


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = html_of(tmp_path, *example())
    reader = Reader(html)
    inside = [address for address in reader.addresses if address.startswith("#")]
    assert set(reader.addresses) == {*inside, "data:,"}  # which is the icon, or one would be requested from a server
    assert {address[1:] for address in inside} <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert not reader.tags & {"img", "iframe", "object", "embed", "base"}
    assert not re.search(r"https?://", html)
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) == {"#"}
    assert len(html) < 300_000


def test_the_same_input_gives_the_same_bytes_in_any_process_and_under_any_matplotlib_settings(tmp_path: Path) -> None:
    import matplotlib

    script = (
        "import importlib.util, pathlib, sys;"
        "spec = importlib.util.spec_from_file_location('made', sys.argv[1]);"
        "made = importlib.util.module_from_spec(spec); spec.loader.exec_module(made);"
        "made.html_of(pathlib.Path(sys.argv[2]), *made.example())"
    )
    environment = {"PYTHONHASHSEED": "7", "MPLCONFIGDIR": matplotlib.get_configdir(), "SOURCE_DATE_EPOCH": "1"}
    subprocess.run([sys.executable, "-c", script, __file__, str(tmp_path / "other")], check=True, env=environment)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "svg.fonttype": "path", "font.size": 20}):
        html = html_of(tmp_path, *example())
    assert html == (tmp_path / "other" / "reports" / "report.html").read_text("utf-8")


def test_hostile_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    records, curves = example()
    evil = "<script>alert('$x^$')</script>\"&amp;"
    renamed: Records = {}
    for name, entry in copy.deepcopy(records).items():
        for source in entry["inputs"].values():
            source["stage"] = evil if source["stage"] == "dense" else source["stage"]
        renamed[evil if name == "dense" else name] = entry
    renamed["moe"]["versions"] = {evil: evil}
    renamed["moe"]["fingerprint"] = renamed["moe"]["git_commit"] = evil
    renamed["scale_up"]["recipe"]["config"]["growth"]["method"] = evil
    renamed["evaluate"]["metrics"][f"moe/{evil.replace('/', '')}/nats_per_token"] = 3.0
    curves[evil] = curves.pop("dense")
    chain = [evil if name == "dense" else name for name in CHAIN]
    html = html_of(tmp_path, renamed, curves, chain, description=evil, command=evil)
    reader = Reader(html)
    assert "script" not in reader.tags
    assert "<script" not in html
    assert reader.section(evil), "the name is shown as it is"
    assert evil in reader.words
    lineage_page.render(Heading(evil, "", evil), tmp_path / "lineage.html", records=renamed, chain=chain, tints={})
    html = (tmp_path / "lineage.html").read_text("utf-8")
    assert html.count("<script") == 1
    assert html.count(str(escape(evil))) >= 6, "its name, its parents' links, versions and the command"


@pytest.mark.parametrize(
    "missing", [[], ["corpus"], ["prepare"], ["scale_up"], ["evaluate"], ["moe", "control"], list(example()[0])]
)
def test_a_page_is_written_whatever_stage_is_missing(tmp_path: Path, missing: list[str]) -> None:
    records, curves = example()
    for name in missing:
        del records[name]
        curves.pop(name, None)
    reader = Reader(html_of(tmp_path, records, curves))
    stages = [row[0] for row in reader.rows if len(row) == 10]
    assert stages == (["stage", *records] if records else [])
    assert ("No stage has finished yet" in reader.words) == (not records)


def test_a_page_is_written_without_metrics_curves_or_details(tmp_path: Path) -> None:
    records, curves = example()
    bare: Records = {name: {"stage": name, "kind": entry["kind"]} for name, entry in records.items()}
    reader = Reader(html_of(tmp_path, bare, {}))
    assert "held-out loss, nats per token" not in reader.words
    assert "Whether growing paid is unknown" in reader.words
    assert reader.section("moe")[0][1:] == [DASH] * 9
    broken = {name: dict(entry, metrics=dict.fromkeys(entry["metrics"], math.nan)) for name, entry in records.items()}
    points = {name: [dict(point, **{"val/loss": math.inf}) for point in values] for name, values in curves.items()}
    words = Reader(html_of(tmp_path, broken, points)).words
    assert not re.search(r"\b(nan|inf|None)\b", words)


def test_the_published_factors_follow_from_the_published_numbers_but_for_the_one_whose_inputs_are_not() -> None:
    again = paper.recomputed()
    assert again.time == pytest.approx((5345 / 25) / (3600 / 279 + 1200 / 70 + 545 / 25))
    assert (round(again.time or 0, 2), again.devices, round(again.flops or 0, 2)) == (4.12, None, 2.39)
    assert paper.PUBLISHED == (4.12, 3.35, 2.39)


def test_the_same_factors_of_a_run_are_computed_from_its_records() -> None:
    records, curves = example()
    for name, rate, spent in (("prepare", 400.0, 10.0), ("dense", 200.0, 20.0), ("moe", 100.0, 10.0)):
        records[name]["metrics"]["tokens_per_s"] = rate
        records[name]["seconds"] = spent
        records[name]["cost"] = {"own": {"flops": 0.0, "device_seconds": spent, "energy_kwh": 0.0, "money": 0.0}}
    tokens, active = (3_300_000, 1_200_000, 400_000), (699_776, 2_118_144, 2_904_064)
    found = paper.of_run(records, CHAIN, Series((1.0, 4.0), (5.0, 3.0)), Series((1.0, 3.0), (4.0, 2.0)))
    assert found.time == pytest.approx(49e5 / 100 / sum(n / r for n, r in zip(tokens, (400, 200, 100), strict=True)))
    assert found.devices == pytest.approx(49e5 * 10 / 4e5 / 40)
    assert found.flops == pytest.approx(49e5 * active[2] / sum(n * a for n, a in zip(tokens, active, strict=True)))
    assert found.saving == pytest.approx(2 / 4), "the control is at 3.0 after 2, the line after 4"
    del records["dense"]["metrics"]["tokens_per_s"]
    assert paper.of_run(records, CHAIN, Series((), ()), None).time is None
    assert curves


def test_jumps_join_the_end_of_a_stage_and_the_first_validation_of_the_next() -> None:
    records, curves = example()
    stages, jumps = chain_of(records, curves, CHAIN)
    assert [stage.stage for stage in stages] == ["prepare", "dense", "moe"]
    assert [jump.label for jump in jumps] == ["scale-up", "scale-out"]
    assert [jump.flops for jump in jumps] == [stage.validation.x[-1] for stage in stages[:2]]
    assert jumps[0].before == records["scale_up"]["metrics"]["source_final_loss"]
    assert jumps[0].after == curves["dense"][0]["val/loss"]
    assert (jumps[1].source_params, jumps[1].target_params) == (2_118_144, 4_612_480)


def test_rows_carry_the_status_of_the_run_and_a_cell_for_each_heading() -> None:
    rows = stage_rows(example()[0], {"prepare": "cached", "dense": "run"})
    assert [row.status for row in rows if row.stage in ("prepare", "dense", "moe")] == ["cached", "run", ""]
    assert {len(row.cells()) for row in rows} == {len(HEADER)}
    assert [row.cells()[-1] for row in rows if row.stage in ("prepare", "moe")] == ["cached", "-"]


def test_the_graph_leaves_out_edges_that_a_longer_path_implies() -> None:
    records, _ = example()
    drawn = graph_svg(records, CHAIN, {})
    # corpus-tokenizer-tokens-prepare-scale_up-dense-scale_out-moe-export, moe-evaluate, prepare-control-evaluate
    assert drawn.count('class="edge"') == 11
    assert drawn.count("<rect") == len(records)


def test_evaluations_are_read_by_the_stage_behind_a_role() -> None:
    records, _ = example()
    entry = records["evaluate"]
    entry["inputs"]["final"] = {"stage": "moe"}
    entry["metrics"] = {"final/nats_per_token": 3.5, "final/zh/bits_per_byte": 2.5, "final/zh/nats_per_token": 4.5}
    assert [(point.stage, point.nats, point.lang_bits) for point in checkpoints(records)] == [("moe", 3.5, {"zh": 2.5})]


def test_the_summary_of_a_partial_chain_goes_as_far_as_the_chain() -> None:
    records, _ = example()
    assert story({"prepare": records["prepare"]}, CHAIN) == "A model of 700k parameters was trained on 3.3M tokens."
    assert story({}, CHAIN) == ""


def test_a_figure_is_also_a_file_of_its_own_in_two_formats(tmp_path: Path) -> None:
    from xml.etree import ElementTree

    records, curves = example()
    drawing = loss_figure(*chain_of(records, curves, CHAIN), None)
    assert drawing is not None
    drawing.save(tmp_path)
    assert ElementTree.parse(tmp_path / "loss.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert "var(" not in (tmp_path / "loss.svg").read_text("utf-8"), "which not every viewer knows"
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert loss_figure(*chain_of({}, {}, CHAIN), None) is None


def test_rows_are_quick_to_import() -> None:
    script = (
        "import sys, aquilamoe.reports.stage_rows, aquilamoe.reports.page;"
        "print(sorted({'torch', 'matplotlib', 'jinja2', 'mlflow', 'ray', 'numpy'} & set(sys.modules)))"
    )
    completed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert completed.stdout.strip() == "[]"


# Where the grown line crosses its control


def test_the_crossing_is_where_the_line_goes_below_its_control_for_good() -> None:
    control = Series((1.0, 2.0, 4.0), (4.0, 3.0, 2.0))
    assert crossing(Series((1.0, 2.0, 3.0, 4.0), (4.0, 3.2, 2.3, 1.9)), control) == pytest.approx(2.5)
    late = Series((1.0, 2.0, 3.0, 3.5, 4.0), (4.0, 2.9, 2.6, 2.15, 1.9))
    assert 3.5 > (crossing(late, control) or 0) > 3.0, "below once before does not count"
    assert crossing(Series((1.0, 4.0), (4.0, 2.1)), control) is None
    assert crossing(Series((2.0, 4.0), (2.5, 1.9)), control) == 2.0, "never above it"
    assert crossing(Series((9.0,), (1.0,)), control) is None and crossing(Series((), ()), control) is None


def test_the_page_and_the_terminal_show_where_and_by_how_much_growing_won(tmp_path: Path) -> None:
    won, curves = example(3.484, 3.550)
    for point in curves["moe"]:
        if "val/loss" in point:
            point["val/loss"] -= 0.4
    assert verdict(find(won, CHAIN, "control")) == "growing beat the control by 0.066 nats/token"
    assert verdict(find(example(3.62, 3.55)[0], CHAIN, "control")).startswith(
        "growing did not beat the control: it ended 0.070 "
    )
    assert verdict(find(example(3.5, 3.5)[0], CHAIN, "control")) == "growing and the control ended level"
    words = Reader(html_of(tmp_path, won, curves)).words
    assert "the grown line is below the control from" in words and "crosses the control" in words
    assert words.index("crosses the control") < words.index("Growth beat simply") < words.index("lower is better")
