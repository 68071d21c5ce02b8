"""The page of all mixers, made from their docstrings and from nothing else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from linearize.files import write_text
from linearize.mixers import mixer_class, mixer_defaults, mixer_names

_HEADER = """# Mixers

Generated from the docstrings by `python scripts/document_mixers.py`. Choose one with `python train.py mixer=<name>`;
its arguments are keys of the command line, such as `window=16`.
"""


def mixers_page() -> str:
    """Markdown: a row for each mixer, then what its docstring says of it."""
    rows = ["| mixer | what it is | arguments |", "| --- | --- | --- |"]
    sections = []
    for name in mixer_names():
        summary, body = _docstring(name)
        arguments = ", ".join(f"`{key}={default}`" for key, default in mixer_defaults(name).items())
        rows.append(f"| [{name}](#{name}) | {summary.replace('|', chr(92) + '|')} | {arguments or 'none'} |")
        sections.append(f"## {name}\n\n{summary}\n\n{body}".rstrip())
    return "\n".join([_HEADER, *rows, "", "\n\n".join(sections)]) + "\n"


def write_page(path: str | Path) -> None:
    """Writes the page as a whole file."""
    write_text(path, mixers_page())


def _docstring(name: str) -> tuple[str, str]:
    """First paragraph, and the rest with its Google sections as lists; attributes and errors stay in the code."""
    text = inspect.getdoc(mixer_class(name)) or ""
    summary, _, rest = text.partition("\n\n")
    body = re.split(r"^(?:Attributes|Raises):$", rest, flags=re.MULTILINE)[0]
    description, _, arguments = body.partition("Args:\n")
    items = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", arguments, flags=re.MULTILINE)
    listed = [f"- `{key}`: {' '.join(meaning.split())}" for key, meaning in items if key != "shape"]
    return " ".join(summary.split()), "\n".join([description.strip(), "", *listed] if listed else [description.strip()])
