"""Report pages from Jinja templates, which extend those in this folder. Everything is escaped except Markup, the plots' SVG."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from src.engine.runs.text import decimal, printable, printable_lines


@dataclass(frozen=True)
class Link:
    """A table cell that leads to another file: plain text, and a target relative to the page."""

    text: str
    target: str

    @property
    def href(self) -> str:
        return quote(os.fsencode(self.target))


Cell = str | float | Link


def render(template: Path, **values: Any) -> str:
    """An HTML page. Control characters, and characters that turn or hide text, appear as escapes everywhere in it."""
    return printable_lines(_templates(template.parent).get_template(template.name).render(values))


@cache
def _templates(folder: Path) -> Environment:
    templates = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "printable": printable,
        "decimal": decimal,
        "pick": lambda row, *keys: [row[key] for key in keys],
    }
    return templates
