"""Build the documentation as a website: python tools/docs_site.py [--repository URL]

The pages of docs/ are copied to .site/, where a link to a file outside docs/ becomes a link into the repository at URL,
or, without one, the path of the file. zensical builds them into site/, in strict mode, and all links and anchors of the
website are checked.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
DOCS, PAGES, SITE = ROOT / "docs", ROOT / ".site", ROOT / "site"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
TABLES = "td:first-child code { white-space: nowrap; }\n"  # names of keys in one piece
MADE_HERE = ".made-by-docs-site"  # lies in the folders that a later build may remove
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def prepare(source: Path, target: Path, repository: str | None = None) -> None:
    """Copy the pages, with links that a website can follow.

    Args:
        source: folder of the pages, in a folder that has the files outside it.
        target: folder to make; one that an earlier build made is replaced.
        repository: address below which the files outside `source` are, e.g. of a branch on a server.

    Raises:
        SystemExit: `target` is a folder that no build has made.
    """
    make_empty(target)
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "tables.css").write_text(TABLES, encoding="utf-8")
    for page in target.rglob("*.md"):
        original = source / page.relative_to(target)
        page.write_text(rewritten(original, source, repository), encoding="utf-8")


def make_empty(folder: Path) -> None:
    """Make a folder, in place of the one that an earlier build made; SystemExit if another program made it."""
    if folder.exists():
        if not (folder / MADE_HERE).is_file():
            raise SystemExit(f"{folder}: not made by this program; move it, the website is built there")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MADE_HERE).touch()


def rewritten(page: Path, docs: Path, repository: str | None) -> str:
    """The text of a page, in which links that leave `docs` lead into the repository, or are paths."""

    def replace(link: re.Match[str]) -> str:
        image, text, target = link.groups()
        path = (page.parent / target.partition("#")[0]).resolve()
        if urlsplit(target).scheme or target.startswith("#") or path.is_relative_to(docs):
            return link[0]
        if not path.exists():
            raise SystemExit(f"{page}: links to {target}, which is not there; correct the link")
        name = path.relative_to(docs.parent).as_posix()
        if repository is not None:
            return f"{image}[{text}]({repository.rstrip('/')}/{name})"
        return f"`{name}`" if text.strip("`/") == name else f"{text} (`{name}`)"

    parts = FENCE.split(page.read_text(encoding="utf-8"))
    return "".join(part if part.startswith("```") else LINK.sub(replace, part) for part in parts)


class Page(HTMLParser):
    """Anchors and links of a page of the website."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the anchor of an element, and what it links to."""
        values = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := values.get(name))}
        self.links += [value for name in ("href", "src") if (value := values.get(name))]


def dead_links(site: Path) -> Iterator[str]:
    """A line for each link of a website to a file or an anchor that is not there."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            is_dead = not target.is_file() or (
                target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].anchors
            )
            if is_dead:
                yield f"{path.relative_to(site)}: {link} leads nowhere"


def build() -> None:
    """Let zensical build the website; SystemExit where it finds a dead link, or is not installed."""
    program = Path(sys.executable).parent / "zensical"
    if not program.exists():
        raise SystemExit("zensical: not installed; run: pip install -c constraints.txt -e '.[docs]'")
    words = [str(program), "build", "--strict"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{done.stdout}{done.stderr}\ndocs: zensical refuses the pages; correct what it lists above")


def main() -> None:
    """Build and check the website; exit status 1 and a line for each dead link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repository", help="address of the repository's files, e.g. https://HOST/NAME/blob/main")
    prepare(DOCS, PAGES, parser.parse_args().repository)
    make_empty(SITE)
    build()
    if dead := list(dead_links(SITE)):
        raise SystemExit("\n".join([*dead, f"docs: {len(dead)} dead links; correct them in docs/"]))
    print(f"{SITE / 'index.html'}: {sum(1 for _ in SITE.rglob('*.html'))} pages, no dead link or anchor")


if __name__ == "__main__":
    main()
