from pathlib import Path

from linearize.mixers import mixer_names
from linearize.mixers._page import mixers_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mixers.md"


def test_the_page_is_what_the_docstrings_say():
    page = mixers_page()
    assert all(f"\n## {name}\n" in page for name in mixer_names())
    assert PAGE.read_text() == page, "run python scripts/document_mixers.py"
