"""stats.json -> one page that opens anywhere, offline: the figures, what draws them and nothing that is fetched."""

import base64
import gzip
import html
import json
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from moe.files import write_file

PAGE = Path(__file__).with_name("page")
SCRIPTS = ("dom.js", "plots.js", "overview.js", "router.js", "layers.js", "page.js")  # in this order


def write_report(stats: dict[str, Any], out: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        stats: what `schema.py` describes.
        out: the page's file; an older one is replaced.

    Raises:
        UserError: if it can't be written.
    """
    write_file(out, page_of(stats))


def page_of(stats: dict[str, Any]) -> str:
    """The page's HTML. Text of the data comes in as JSON alone, and into the document as text, never as markup."""
    parts = {
        "title": html.escape(f"Routing of {stats['model']['name']}"),
        "style": _read("page.css"),
        "verdict": _verdict(stats["verdict"]),
        "stats": _inert(json.dumps(stats, ensure_ascii=False, separators=(",", ":"), allow_nan=False)),
        "library": base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode(),
        "script": "\n".join(_read(name) for name in SCRIPTS),
    }
    page = _read("page.html")
    pieces = page.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def _verdict(verdict: dict[str, Any]) -> str:
    """In the page itself, so that it can be read where no script runs."""
    word = "healthy" if verdict["healthy"] else "ill"
    sentences = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in verdict["summary"])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in verdict["notes"])
    return f'<div class="verdict {word}">{sentences}</div>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


def _inert(text: str) -> str:
    """JSON that no HTML parser finds a tag in."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
