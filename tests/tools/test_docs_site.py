"""The website of docs/: no link leaves it for nowhere, and the page of the Python API is current."""

from pathlib import Path

import pytest

import api_page
import aquilamoe
import docs_site


def test_the_page_of_the_python_api_is_current() -> None:
    page = api_page.PAGE.read_text(encoding="utf-8")
    assert api_page.page() == page, f"docs/api.md is out of date; run {api_page.COMMAND}"


def test_the_page_of_the_python_api_has_every_public_name_and_every_argument() -> None:
    assert set(api_page.PUBLIC) == set(aquilamoe.__all__)
    page = api_page.PAGE.read_text(encoding="utf-8")
    for name in ("source", "target", "model", "growth", "upcycling", "seed", "certificate", "settings", "root"):
        assert f"| `{name}` | " in page
    for name in ("outputs", "output", "lineage"):
        assert f"### Store.{name}\n" in page


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder of pages beside a file that is not one of them."""
    (tmp_path / "docs" / "inner").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "a.yaml").touch()
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    return tmp_path / "docs"


@pytest.mark.parametrize(
    ("text", "website"),
    [
        ("[x](../other.md#other)", "[x](../other.md#other)"),
        ("[x](https://h/a)", "[x](https://h/a)"),
        ("[x](#here)", "[x](#here)"),
        ("[the file](../../conf/a.yaml)", "the file (`conf/a.yaml`)"),
        ("[`conf/`](../../conf)", "`conf`"),
        ("[conf/a.yaml](../../conf/a.yaml)", "`conf/a.yaml`"),
        ("```\n[x](../../conf/a.yaml)\n```", "```\n[x](../../conf/a.yaml)\n```"),
    ],
)
def test_a_link_that_leaves_the_pages_becomes_the_path_of_the_file(docs: Path, text: str, website: str) -> None:
    page = docs / "inner" / "page.md"
    page.write_text(text)
    assert docs_site.rewritten(page, docs, None) == website


def test_a_link_that_leaves_the_pages_leads_into_a_repository_whose_address_is_known(docs: Path) -> None:
    page = docs / "page.md"
    page.write_text("See [the file](../conf/a.yaml).")
    assert docs_site.rewritten(page, docs, "https://h/r/") == "See [the file](https://h/r/conf/a.yaml)."


def test_a_link_to_a_file_that_is_not_there_is_refused(docs: Path) -> None:
    page = docs / "page.md"
    page.write_text("[x](../conf/b.yaml)")
    with pytest.raises(SystemExit, match=r"page.md: links to ../conf/b.yaml, which is not there; correct the link"):
        docs_site.rewritten(page, docs, None)


def test_no_page_of_the_website_links_to_a_file_outside_it(tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    docs_site.prepare(docs_site.DOCS, pages)
    links = {page: docs_site.LINK.findall(docs_site.FENCE.sub("", page.read_text())) for page in pages.rglob("*.md")}
    assert sum(map(len, links.values())) > 100
    targets = [
        (page.parent / target.partition("#")[0]).resolve()
        for page, found in links.items()
        for _, _, target in found
        if "://" not in target
    ]
    assert [target for target in targets if not target.is_relative_to(pages) or not target.exists()] == []


def test_dead_links_and_anchors_of_a_website_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h2 id="x"></h2><a href="#x"></a><a href="#y"></a><a href="b.html#z"></a><a href="b.html#x"></a>'
        '<a href="https://h/#q"></a><img src="no.png"><a href="c.html"></a><a href="."></a>'
    )
    (tmp_path / "b.html").write_text('<a name="z"></a><a href="/a.html"></a>')
    (tmp_path / "index.html").write_text("")
    assert list(docs_site.dead_links(tmp_path)) == [
        f"a.html: {link} leads nowhere" for link in ("#y", "b.html#x", "no.png", "c.html")
    ]


def test_a_folder_of_the_user_is_kept_and_one_of_an_earlier_build_is_replaced(docs: Path, tmp_path: Path) -> None:
    mine = tmp_path / "site" / "mine.html"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(SystemExit, match=r"site: not made by this program; move it"):
        docs_site.prepare(docs, mine.parent)
    assert mine.is_file()

    docs_site.prepare(docs, tmp_path / ".site")
    (tmp_path / ".site" / "old.md").touch()
    docs_site.prepare(docs, tmp_path / ".site")
    assert (tmp_path / ".site" / "other.md").is_file() and not (tmp_path / ".site" / "old.md").exists()
