"""The pages in a real browser: at two widths, in light and dark, with keys, without scripts, and without a network."""

import math
import random
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.reports import lineage_page, router_page, template
from aquilamoe.reports.canvas import PALETTE, VARIABLES, themed
from aquilamoe.reports.template import Heading
from browser import Browser

CHAIN = ["prepare", "scale_up", "dense", "moe"]
PAGES = ("lineage.html", "router.html")
LINKS = [("Lineage", "lineage.html", True), ("Routers", "router.html", False)]


def record(stage: str, kind: str, inputs: dict[str, str], config: dict[str, Any], **metrics: Any) -> dict[str, Any]:
    return {
        "stage": stage,
        "kind": kind,
        "fingerprint": f"{sum(map(ord, stage)):016x}",
        "recipe": {"kind": kind, "version": 1, "config": config, "inputs": {}},
        "inputs": {role: {"stage": name, "fingerprint": "", "directory": name} for role, name in inputs.items()},
        "metrics": metrics,
        "files": {"model/model.safetensors": {"sha256": f"{len(stage):064x}", "bytes": 2_800_000}},
        "git_commit": "4f1c2e7a9b3d5c6f8e0a1b2c3d4e5f6a7b8c9d0e",
        "finished": "2026-01-02T03:05:41+00:00",
        "seconds": 9.5,
    }


def family() -> dict[str, dict[str, Any]]:
    """A line with a control beside it."""
    sizes = {"params_total": 699_776, "params_active": 699_776}
    trained = {"tokens": 1000, "lineage_tokens": 2000, "flops": 1e9, "lineage_flops": 2e9, "loss_start": 5.0}
    grown = {"source_loss": 4.0, "target_loss": 4.5, "max_abs_dlogit": 7.8, "kl": 0.5, "preserving": False}
    wide = {**sizes, "params_total": 2_118_144}
    records = [
        record("tokens", "tokenize", {}, {}),
        record("prepare", "pretrain", {"tokens": "tokens"}, {"learning_rate": 3e-3}, **sizes, **trained, loss_end=4.0),
        record("scale_up", "scale_up", {"source": "prepare"}, {"growth": {"method": "fpi"}}, **wide, **grown),
        record(
            "dense", "pretrain", {"source": "scale_up", "tokens": "tokens"}, {"learning_rate": 1e-3}, **wide, **trained,
            loss_end=3.5,
        ),
        record("moe", "pretrain", {"source": "dense"}, {"learning_rate": 1e-3}, **wide, **trained, loss_end=3.25),
        record("control", "pretrain", {"source": "prepare"}, {"learning_rate": 3e-3}, **sizes, **trained, loss_end=3.0),
    ]  # fmt: skip
    return {each["stage"]: each for each in records}


def shares(draw: random.Random, spread: float) -> list[float]:
    weights = [math.exp(draw.gauss(0, spread)) for _ in range(8)]
    return [weight / sum(weights) for weight in weights]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of a family of stages, and of routers with six layers of eight experts."""
    found, draw = tmp_path_factory.mktemp("pages"), random.Random(0)
    lineage_page.render(
        Heading("embedded", "", "python x"),
        found / PAGES[0],
        records=family(),
        chain=CHAIN,
        tints={"moe": PALETTE[0]},
        pages=LINKS,
    )
    points: list[dict[str, Any]] = [
        {
            "tokens": step * 4096,
            "load": [shares(draw, 2 / step) for _ in range(6)],
            "entropy": [1.9] * 6,
            "dropped": [0],
        }
        for step in range(1, 20)
    ]
    points[-1]["load"][3] = [0.0, 1.0, *[0.0] * 6]
    table = {
        "layers": [0, 1, 2, 3, 4, 5],
        "languages": {
            name: {"load": [shares(draw, 0.5) for _ in range(6)], "entropy": [1.9] * 6} for name in ("en", "zh")
        },
        "cosine": [[[1.0 if i == j else 0.75 for j in range(8)] for i in range(8)]] * 6,
    }  # fmt: skip
    router_page.render(
        Heading("embedded", ""),
        found / PAGES[1],
        records=family(),
        routers={"moe": points},
        routing={"moe": table},
        pages=LINKS,
    )
    return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_page_fits_its_window_logs_nothing_and_requests_nothing(
    browser: Browser, folder: Path, width: int, dark: bool
) -> None:
    for name in PAGES:
        browser.open(folder / name, width, dark)
        assert browser.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name
        assert browser.errors() == []
        assert browser.requests() == [(folder / name).as_uri()]
        red, green, blue = browser.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        assert (red + green + blue > 384) != dark
        figures = "[...document.querySelectorAll('figure svg')].filter(each => each.checkVisibility())"
        small = f"{figures}.map(each => each.getBoundingClientRect().width / each.viewBox.baseVal.width)"
        assert all(scale > 0.95 for scale in browser.evaluate(small)), "the writing in a figure can be read"


def test_a_page_that_does_what_it_may_not_is_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = '<body><p style="width:1500px">wide</p><script>console.error("no")</script><img src="x.png"></body>'
    (tmp_path / "bad.html").write_text(bad)
    browser.open(tmp_path / "bad.html", 400)
    assert browser.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert any("no" in message for message in browser.errors())
    assert browser.requests()[1:] == [(tmp_path / "x.png").as_uri()]


def test_a_page_cannot_load_anything_even_if_it_tries(browser: Browser, tmp_path: Path) -> None:
    context = {"experiment": "x", "trained": [], "examined": []}
    page = template.fill("router.html.jinja", context).replace("<footer>", '<img src="x.png"><footer>')
    (tmp_path / "page.html").write_text(page)
    browser.open(tmp_path / "page.html")
    assert any("Content Security Policy" in message for message in browser.errors())


def chosen(browser: Browser) -> list[str]:
    return list(
        browser.evaluate(
            "[...document.querySelectorAll('article.stage')].filter(each => each.checkVisibility())"
            ".map(each => each.querySelector('h2').innerText.split(' ')[0].trim())"
        )
    )


def test_keys_reach_every_stage_of_the_graph_and_choose_it(browser: Browser, folder: Path) -> None:
    browser.open(folder / PAGES[0])
    assert chosen(browser) == ["moe"], "the last of the line comes first"
    focus = "(document.activeElement.getAttribute('aria-label') || '').split(',')[0]"
    reached = []
    for _ in range(30):
        browser.press("TAB")
        if browser.evaluate("document.activeElement.classList.contains('node')"):
            assert (
                browser.evaluate("getComputedStyle(document.activeElement.querySelector('rect')).strokeWidth")
                == "3.5px"
            )
            reached.append(browser.evaluate(focus))
        elif reached:
            break
    assert reached == list(family())
    browser.evaluate("document.querySelector('a.node').focus()")
    for name in [*list(family())[1:], "tokens"]:
        browser.press("ARROW_DOWN")
        assert browser.evaluate(focus) == name, "arrows go around"
    browser.press("ARROW_UP")
    browser.press("ENTER")
    assert chosen(browser) == ["control"]


def test_choosing_a_stage_shows_what_changed_what_it_cost_and_its_bytes(browser: Browser, folder: Path) -> None:
    browser.open(folder / PAGES[0])
    browser.evaluate("document.querySelector('a.node[href=\"#stage-3\"]').dispatchEvent(new MouseEvent('click', "
                     "{bubbles: true, cancelable: true}))")  # fmt: skip
    assert chosen(browser) == ["dense"]
    words = browser.evaluate("document.querySelector('article.chosen').innerText")
    for text in ("as prepare, but learning_rate 0.003 -> 0.001", "1e9 own, 2e9 with its ancestors", f"{5:064x}"):
        assert text in words
    assert browser.evaluate("document.querySelector('a.node[aria-current]').getAttribute('href')") == "#stage-3"


def test_without_scripts_the_page_is_a_list_that_the_graph_leads_to(
    folder: Path, browser: Browser, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.html"
    plain.write_text((folder / PAGES[0]).read_text("utf-8").replace("script-src 'unsafe-inline'", "script-src 'none'"))
    browser.open(plain)
    assert chosen(browser) == list(family())
    targets = browser.evaluate(
        "[...document.querySelectorAll('a.node')].map(each => each.getAttribute('href').slice(1))"
    )
    assert all(browser.evaluate(f"!!document.getElementById('{target}')") for target in targets)


def test_the_router_page_names_experts_that_are_not_used(folder: Path) -> None:
    html = (folder / PAGES[1]).read_text("utf-8")
    assert "layer 3, expert 0; layer 3, expert 2" in html
    assert "<b>7</b><span>experts below a tenth of the mean load" in html
    assert "0.7500" in html, "the cosine between experts"


def test_every_colour_of_a_figure_has_its_dark_counterpart() -> None:
    css = Path(template.__file__).with_name("style.css").read_text("utf-8")
    dark = css[css.index("prefers-color-scheme: dark") :]
    for colour, name in VARIABLES.items():
        assert f"--{name}: {colour};" in css, "in light the figure is as it is drawn"
        assert f"--{name}: " in dark
    assert themed("fill:#1F2937") == "fill:var(--ink, #1F2937)"
