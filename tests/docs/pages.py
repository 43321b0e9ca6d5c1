"""README and the pages of docs/: their code blocks, inline code, headings and links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block of a page; ``key`` names it by page and heading, with a number from the second one there on."""

    key: str
    language: str
    text: str


def blocks(language: str | None = None) -> list[Block]:
    """Code blocks of all pages, of one language or all."""
    found = []
    for page in PAGES:
        content = page.read_text()
        counts: dict[str, int] = {}
        for match in _FENCE.finditer(content):
            above = _HEADING.findall(_FENCE.sub("", content[: match.start()]))
            place = f"{page.name}: {above[-1]}"
            counts[place] = counts.get(place, 0) + 1
            key = place if counts[place] == 1 else f"{place} {counts[place]}"
            found.append(Block(key, match[1], match[2]))
    return [block for block in found if language is None or block.language == language]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def inline_code() -> list[tuple[str, str]]:
    """Page and text of each piece of code in the prose of all pages, on one line."""
    return [(page.name, " ".join(text.split())) for page in PAGES for text in re.findall(r"`([^`]+)`", prose(page))]


def anchors(page: Path) -> set[str]:
    """Anchors that the headings of a page get, in GitHub as in MkDocs."""
    titles = _HEADING.findall(prose(page))
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def links(page: Path) -> list[str]:
    """Targets of the links and pictures of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]+`", "", prose(page)))
