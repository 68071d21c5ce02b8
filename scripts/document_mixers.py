"""Makes docs/mixers.md from the mixers' docstrings: python scripts/document_mixers.py."""

from pathlib import Path

from linearize.mixers._page import write_page

if __name__ == "__main__":
    write_page(Path(__file__).resolve().parents[1] / "docs" / "mixers.md")
