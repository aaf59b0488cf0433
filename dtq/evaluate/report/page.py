# SPDX-License-Identifier: Apache-2.0
"""Pages from the templates in ``templates/``: text is escaped, images are inline."""

from __future__ import annotations

import base64
import html
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape


def render(template: str, **values: Any) -> str:
    """Fill in a template. HTML escapes all text that the template does not mark as safe."""
    return _environment().get_template(template).render(**values)


def image_source(png: bytes) -> str:
    """The ``src`` of an inline image."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(["html"]),  # Markdown templates use the filter cell
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = _cell
    return environment


def _cell(text: str) -> str:
    """Escaped text that fits into one cell of a Markdown table."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
