"""Every link of a page leads somewhere, no page is lost, and pages and code use the words of technical prose."""

import re
from pathlib import Path

import pytest

from wording import FOLDERS, foreign, foreign_code

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
GENERATED = ("docs/studies/", "docs/benchmarks/", "docs/growth-exactness.md", "docs/families.md")
WRITTEN = [page for page in PAGES if not str(page.relative_to(ROOT)).startswith(GENERATED)]
BOARDS = ROOT / "dashboards" / "README.md"


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    dead = []
    for link in LINK.findall(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_index_of_the_documentation_has_every_page() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in LINK.findall(prose(DOCS / "README.md"))}
    pages = {page for page in DOCS.glob("*.md") if page.name != "README.md"}
    assert {page.name for page in pages - linked} == set()


@pytest.mark.parametrize("page", [*WRITTEN, BOARDS], ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_uses_the_words_of_technical_prose(page: Path) -> None:
    assert foreign(prose(page)) == []


def test_comments_of_the_configuration_and_the_makefile_use_the_words_of_technical_prose() -> None:
    files = [ROOT / "Makefile", *sorted((ROOT / "conf").rglob("*.yaml"))]
    comments = {
        file.relative_to(ROOT): re.findall(r"(?:^|\s)# *(.*)", file.read_text(encoding="utf-8")) for file in files
    }
    assert [(str(file), word) for file, lines in comments.items() for word in foreign("\n".join(lines))] == []


def test_a_word_in_code_or_in_the_target_of_a_link_is_no_prose() -> None:
    assert foreign("What was foretold, see [there](page.md#told)") == ["foretold: write estimate"]
    assert foreign("`foretold` and a [link](benchmarks/tracking.md#telling) to troubleshooting") == []


# Files that hold these words to search for them.
HOLDERS = {"tests/support/wording.py", "tests/test_docs.py"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_code_uses_the_words_of_technical_prose(folder: str) -> None:
    hits = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if name not in HOLDERS:
            hits[name] = list(foreign_code(path.read_text(encoding="utf-8")))
    assert {name: lines for name, lines in hits.items() if lines} == {}


def test_a_word_of_a_name_a_message_a_comment_and_an_argument_is_found() -> None:
    code = 'def was_told(found: int) -> str:  # nobody\n    return f"{found} is wanted" + tell\n'
    code += 'class Query:\n    rest: int\n\n    def answer(self) -> None:\n        self.said = "told"\n'
    assert [hit.partition(": write")[0] for hit in foreign_code(code)] == [
        "line 1: told",
        "line 1: nobody",
        "line 2: wanted",
        "line 6: answer",
        "line 7: said",
        "line 1: found as an argument or a field",
        "line 4: rest as an argument or a field",
        "line 7: said as an argument or a field",
    ]


def test_what_a_newcomer_looks_for_is_where_the_contributors_page_has_it() -> None:
    package = ROOT / "platform" / "aquilamoe"
    table = prose(ROOT / "CONTRIBUTING.md").partition("| you look for | it is |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([^`]+)`", row) for row in table.splitlines() if "`" in row]
    assert len(rows) > 10
    for row in rows:
        text = ""
        for place in row:
            path, _, name = place.rpartition(": ") if ".py" in place and ": " in place else ("", "", place)
            if ".py" in (path or place):
                text = (package / (path or place)).read_text(encoding="utf-8")
            if ".py" not in name:
                assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), place
