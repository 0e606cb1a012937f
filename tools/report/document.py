"""What the pages share: one HTML file that refers to nothing outside itself, its style and its pictures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

THUMBNAIL = 256  # pixels: larger pictures are shrunk to this
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser may load for the page: its own pictures and style, no script and nothing from elsewhere."""


def document(title: str, content: str, style: str = "") -> str:
    """A whole page: `content` is HTML, `title` plain text, `style` goes after the common one."""
    title = html.escape(title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{title}</h1></header>\n{content}</main>\n</body>\n</html>\n"
    )


def section(title: str, content: str) -> str:
    """A titled box; `content` is HTML, `title` plain text."""
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{content}</section>\n"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """(name, value) pairs of plain text as a list."""
    rows = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>\n" for name, value in pairs)
    return f"<dl>\n{rows}</dl>\n"


def thumbnail(file: Path) -> bytes:
    """The picture as PNG bytes, at most `THUMBNAIL` pixels a side."""
    with Image.open(file) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """The bytes of a file of MIME type `kind`, as an address to refer to."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


STYLE = """
:root { color-scheme: light; --ink: #1f2937; --soft: #5b6472; --line: #e2e5ea; --blue: #0b62a8; --tint: #fff4e5; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f6f8; color: var(--ink); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 0 0 .9rem; }
h3 { font-size: .95rem; font-weight: 600; margin: 0; color: var(--soft); }
.lead { font-size: 1.1rem; max-width: 46rem; margin: .4rem 0 1.3rem; }
.note { color: var(--soft); font-size: .88rem; margin: .7rem 0 0; max-width: 52rem; }
.gallery { margin-top: .9rem; }
section, .card { background: #fff; border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.3rem 1.4rem; margin-top: 1.25rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 1rem; }
.card { padding: 1rem 1.2rem; }
.big { font-size: 2.1rem; font-weight: 700; line-height: 1.2; margin: .1rem 0 .5rem; color: var(--blue); }
.bar { height: 10px; border-radius: 5px; background: #e6eaf0; overflow: hidden; }
.bar span { display: block; height: 100%; border-radius: 5px; background: var(--blue); }
.ends { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem; font-size: .85rem;
  color: var(--soft); margin: .5rem 0 0; }
.ends b { color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-size: .9rem; vertical-align: bottom; }
tbody th { font-weight: 500; }
th small, td small { display: block; font-weight: 400; font-size: .78rem; color: var(--soft); }
td.own { background: var(--tint); font-weight: 700; }
tr.student th, tr.student td, tfoot th, tfoot td { font-weight: 700; }
tfoot th, tfoot td { border-bottom: 0; border-top: 2px solid var(--ink); color: var(--blue); }
figure { margin: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1.2rem; }
.plots figcaption { font-weight: 600; margin-bottom: .2rem; }
.plots img { width: 100%; height: auto; display: block; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 1.1rem 1.4rem; }
.trio { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; text-align: center; font-size: .8rem; }
.trio span, .trio small { display: block; color: var(--soft); }
.trio img { width: 100%; aspect-ratio: 1; border-radius: 6px; display: block; image-rendering: pixelated; }
.gallery figcaption { font-size: .88rem; margin-top: .2rem; }
dl { margin: 0; display: grid; gap: .45rem; }
dl div { display: grid; grid-template-columns: 9rem 1fr; gap: .8rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 520px) {
  main { padding: 1.2rem .75rem 2rem; }
  section { padding: 1rem .9rem; }
  h1 { font-size: 1.4rem; }
  table { font-size: .86rem; }
  th, td { padding: .4rem .3rem; }
  th:first-child { white-space: normal; }
  dl div { grid-template-columns: 1fr; gap: 0; }
}
"""
