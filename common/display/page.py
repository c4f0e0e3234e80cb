"""The HTML page of a comparison: table, sheet and interactive maps in a single file.

page.html is its template and style. scatter.js draws one map on a canvas and knows the mouse and
the keys; page.js links the maps: selection, neighbors, colors, lists of pictures. All of it is
inlined, so that the page opens from disk without a network.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from .tables import Row

HERE = Path(__file__).parent
STEPS = 65535  # of coordinates and confidences in the page
THUMB = 48  # pixels, the largest side of an image in the page


@dataclass(frozen=True)
class Map:
    """One latent space, of N images.

    Attributes:
        points: float (N,2), where the images are drawn.
        neighbors: int (N,k), the nearest of the N images in the space itself, the nearest first.
        predictions: int (N,) of the space's classifier; None if there is no classifier.
        confidences: float (N,) in [0,1], the probability of each prediction.
    """

    title: str
    note: str
    points: ndarray
    neighbors: ndarray
    predictions: ndarray | None = None
    confidences: ndarray | None = None


def build(
    title: str,
    facts: Sequence[str],
    warnings: Sequence[str],
    table: Sequence[Row],
    sheet: bytes,
    maps: Sequence[Map],
    images: ndarray,
    indices: ndarray,
    labels: ndarray,
    class_names: Sequence[str],
    colors: Sequence[str],
    recommendation: Sequence[str] = (),
) -> str:
    """The page as self-contained HTML.

    Args:
        facts: lines under the title. warnings: highlighted lines.
        table: its first row is the header; a row without cells is the title of a section.
        sheet: a PNG. images: uint8 (N,C,S,S), C 1 or 3. indices: int (N,), by which the page calls
            the images. labels: int (N,), into class_names. colors: #rrggbb of each class.
        recommendation: lines "need: method" that are highlighted under the title.
    """
    page_data = {
        "names": list(class_names),
        "colors": list(colors),
        "indices": indices.tolist(),
        "labels": labels.tolist(),
        "maps": [_map_data(m) for m in maps],
        "columns": math.ceil(math.sqrt(len(images))),
    }
    figures = "".join(
        f'<figure class="map"><figcaption><b>{html.escape(m.title)}</b>'
        f"<span>{html.escape(m.note)}</span></figcaption></figure>"
        for m in maps
    )
    advice = "".join(f"<li>{_with_bold_need(line)}</li>" for line in recommendation)
    if advice:
        advice = f'<h2>Recommendation</h2><ul class="recommendation">{advice}</ul>'
    parts = {
        "TITLE": html.escape(title),
        "FACTS": "".join(f"<li>{html.escape(fact)}</li>" for fact in facts),
        "WARNINGS": "".join(f'<p class="warning">{html.escape(w)}</p>' for w in warnings),
        "TABLE": _table(table),
        "SHEET": base64.b64encode(sheet).decode(),
        "COUNT": f"{len(images):,}",
        "RECOMMENDATION": advice,
        "MAPS": figures,
        "ATLAS": _atlas(images),
        "COLUMNS": str(page_data["columns"]),
        # "</script" or "<!--" in a name would end the script
        "DATA": json.dumps(page_data).replace("<", "\\u003c"),
        "SCRIPTS": "".join((HERE / name).read_text("utf-8") for name in ("scatter.js", "page.js")),
    }
    # text and @@NAME@@ in turn
    pieces = (HERE / "page.html").read_text("utf-8").split("@@")
    return "".join(parts[piece] if n % 2 else piece for n, piece in enumerate(pieces))


def _with_bold_need(line: str) -> str:
    """A line of the recommendation as HTML, what it is about in bold."""
    need, colon, rest = (html.escape(part) for part in line.partition(":"))
    return f"<b>{need}</b>{colon}{rest}" if colon else need


def _map_data(m: Map) -> dict:
    """What the script needs of a map; numbers as by `_packed`."""
    low, high = np.min(m.points, axis=0), np.max(m.points, axis=0)
    side = 1.08 * max(float((high - low).max()), 1e-6)  # the same for x and y: aspect ratio 1
    places = (m.points - (low + high) / 2) / side + 0.5  # (N,2) in [0,1]
    columns = {"x": places[:, 0] * STEPS, "y": places[:, 1] * STEPS, "neighbors": m.neighbors}
    if m.predictions is not None:
        columns["predictions"] = m.predictions
    if m.confidences is not None:
        columns["confidences"] = m.confidences * STEPS
    return {"title": m.title, **{name: _packed(numbers) for name, numbers in columns.items()}}


def _packed(numbers: ndarray) -> str:
    """Numbers from 0 to STEPS, rounded: 16 bits each, little-endian, as base64."""
    return base64.b64encode(np.rint(numbers).astype("<u2").tobytes()).decode()


def _table(rows: Sequence[Row]) -> str:
    """The rows as an HTML table."""
    header, *others = rows
    heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in header.cells)
    lines = [f"<thead><tr><th>{html.escape(header.text)}</th>{heads}</tr></thead><tbody>"]
    for row in others:
        text = html.escape(row.text)
        if not row.cells:
            lines.append(
                f'<tr class="section"><th colspan="{1 + len(header.cells)}">{text}</th></tr>'
            )
            continue
        cells = "".join(
            f"<td{' class=best' if n in row.best else ''}>{html.escape(cell)}</td>"
            for n, cell in enumerate(row.cells)
        )
        lines.append(f"<tr><th>{text}</th>{cells}</tr>")
    return "".join(lines) + "</tbody>"


def _atlas(images: ndarray) -> str:
    """All images tiled in one square image as a data URI; 2,000 are 1 or 2 MB."""
    count, channels, side, _ = images.shape
    columns = math.ceil(math.sqrt(count))
    atlas = Image.new("L" if channels == 1 else "RGB", (side * columns,) * 2)
    for n, image in enumerate(images):
        tile = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        atlas.paste(tile, (n % columns * side, n // columns * side))
    file = io.BytesIO()
    atlas.save(file, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
