"""The pages that docs/pages.py fills from committed results are what it writes of them today, word by word and plot by plot."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def elsewhere(pages, tmp_path, monkeypatch):
    """Let the script write pages and pictures in a copy, in which something else stands at every place that it fills."""
    (tmp_path / "pictures").mkdir()
    for page, parts in pages.PARTS.items():
        text = committed(page)
        for part in parts:
            mark = f"<!-- measured: {part} -->\n"
            assert text.count(mark) == 1, f"{page} has no place for {part}"
            text = text.replace(mark, f"{mark}0.99\n")
        (tmp_path / page).write_text(text, encoding="utf-8")
    monkeypatch.setattr(pages, "HERE", tmp_path)

    def write(name):
        monkeypatch.setattr("sys.argv", ["docs/pages.py", name])
        pages.main()
        return tmp_path

    return write


def committed(page):
    return (DOCS / page).read_text(encoding="utf-8")


def plots_unlike_the_committed(folder):
    made = sorted((folder / "pictures").glob("*.svg"))
    assert made
    return [path.name for path in made if path.read_bytes() != (DOCS / "pictures" / path.name).read_bytes()]


def test_comparisons(elsewhere):
    folder, hint = elsewhere("comparison"), "run: python docs/pages.py comparison"
    assert (folder / "comparison.md").read_text(encoding="utf-8") == committed("comparison.md"), hint
    assert not plots_unlike_the_committed(folder), hint


def test_measurements(elsewhere, pages):
    folder, hint = elsewhere("speed"), "run: python docs/pages.py speed"
    for page in pages.PARTS:
        assert (folder / page).read_text(encoding="utf-8") == committed(page), f"{page}: {hint}"
    assert not plots_unlike_the_committed(folder), hint
