"""Links in README.md and docs/: each names a file that is there, and a heading that is in it. Nothing is asked of the network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def prose(text: str) -> str:
    """`text` without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """What a link may name in a page, as GitHub makes it of headings: the second of a name ends in -1."""
    found, seen = set(), Counter[str]()
    for heading in re.findall(r"^#{1,6} +(.*?)[ #]*$", prose(text), flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return found


def dead(page: Path) -> Iterator[str]:
    """Links of `page` that lead nowhere."""
    for link in re.findall(r"\]\(([^)\s]+)", prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists():
            yield f"{link}: no such file"
        elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            yield f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(dead(page)) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One, `two` and [three](x.md)\n## Again\n## Again\n```\n# no heading\n```\n")
    links = ["other.md", "other.md#one-two-and-three", "other.md#again-1", "#here", "https://example.org/#x"]
    gone = ["another.md", "other.md#again-2", "other.md#no-heading", "#there"]
    (tmp_path / "page.md").write_text("# Here\n" + " ".join(f"[words]({link})" for link in links + gone) + "\n```\n[code](gone.md)\n```\n")
    assert [one.rpartition(": ")[0] for one in dead(tmp_path / "page.md")] == gone
