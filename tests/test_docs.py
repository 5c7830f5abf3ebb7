"""The README and docs/: their Python runs, block after block, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.reference, pytest.mark.once]
ROOT = Path(__file__).parents[1]
PAGES = [pytest.param(page, id=page.name) for page in (*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")))]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page.values[0])])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.name}
    for i, block in enumerate(blocks(page)):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page):
    for target, _, section in re.findall(r"\]\((?!https?:)([^)#]+)(#([^)]+))?\)", page.read_text()):
        path = page.parent / target
        assert path.is_file(), target
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if section else []
        assert not section or section in {title.lower().replace(" ", "-") for title in titles}, section


def test_there_is_python_to_run():
    assert {page.name for page in (p.values[0] for p in PAGES) if blocks(page)} >= {"README.md", "similarities.md"}
