"""Links of README and docs/ lead somewhere, and the pages build."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_calibtip
from tests.docs.pages import PAGES, ROOT, anchors, links

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="MkDocs is not installed: pip install '.[docs]'",
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(ROOT), f"{page.name}: {link} leads to no file"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link} leads to no heading of {target.name}"


def test_readme_is_short_and_names_every_page():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 150
    named = {(ROOT / link.partition("#")[0]).resolve() for link in links(readme)}
    assert {page for page in PAGES if page.name not in ("README.md", "index.md", "digits_to_onnx.md")} <= named


def test_citation_names_this_version_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == lightning_calibtip.__version__
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]][::4] == ["Hubara", "Soudry"] and paper[
        "year"
    ] == 2021


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@needs_mkdocs
def test_pages_build_and_fetch_nothing_from_elsewhere(tmp_path):
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stdout + built.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    # Examples are code; Markdown by itself would take them for quotations.
    assert "lightning_calibtip.AdaQuantOptions" in reference and "<blockquote>" not in reference
    for page in (tmp_path / "site").glob("*.html"):
        fetched = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"?(?:https?:)?//[^\">]+", page.read_text())
        assert not fetched, f"{page.name} fetches {fetched}"


@needs_mkdocs
@pytest.mark.parametrize(
    ("addition", "complaint"),
    [
        ("[broken](nowhere.md)", "nowhere.md"),
        ("[broken](stages.md#nowhere)", "#nowhere"),
        (None, "not included in the"),
    ],
    ids=["link", "anchor", "page outside of the navigation"],
)
def test_build_fails_for_what_leads_nowhere(addition, complaint, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api.md"))
    settings = (ROOT / "mkdocs.yml").read_text()
    # The reference takes long, and none of this is about it.
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"  - mkdocstrings:\n(?:    .*\n)+", "", settings))
    (tmp_path / "docs" / "api.md").write_text("# API reference\n\n## Registries\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    page = tmp_path / "docs" / ("orphan.md" if addition is None else "index.md")
    page.write_text(f"# Page\n\n{addition or ''}\n")
    built = build(tmp_path, tmp_path / "site")
    assert built.returncode == 1 and complaint in built.stdout + built.stderr
