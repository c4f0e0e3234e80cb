"""The HTML page of a comparison: table, sheet and interactive maps in a single file.

Bokeh draws the maps: its 1 MB of script is inlined, so that the page opens from disk without a
network, and it draws thousands of points on a canvas without a delay. (Plotly's script is four
times as large, Altair loads its own from a CDN.) Checkboxes and the card of the hovered image are
plain HTML: Bokeh's widgets need another script and cannot show the color of a class.
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

from common.display.tables import Row

TEMPLATE = Path(__file__).with_name("page.html")
MAP = 372  # pixels, side of a map; three fit side by side
THUMB = 48  # pixels, the largest side of an image in the page
CARD = 112  # pixels, side of the image in the hover card


@dataclass(frozen=True)
class Map:
    """One latent space: `points` float (N,2) and the `predictions` of its classifier.

    `predictions` int (N,), or None if there is no classifier.
    """

    title: str
    note: str
    points: ndarray
    predictions: ndarray | None = None


def build(
    title: str,
    facts: Sequence[str],
    warnings: Sequence[str],
    table: Sequence[Row],
    sheet: bytes,
    maps: Sequence[Map],
    images: ndarray,
    labels: ndarray,
    class_names: Sequence[str],
    colors: Sequence[str],
) -> str:
    """The page as self-contained HTML.

    Args:
        facts: lines under the title. warnings: highlighted lines.
        table: its first row is the header; a row without cells is the title of a section.
        sheet: a PNG. images: uint8 (N,C,S,S), C 1 or 3. labels: int (N,), into class_names.
        colors: #rrggbb of each class.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, divisions = components(_figures(maps, labels, colors), wrap_script=False)
    page_data = {
        "names": list(class_names),
        "colors": list(colors),
        "labels": labels.tolist(),
        "maps": [
            {
                "title": m.title,
                "predictions": None if m.predictions is None else m.predictions.tolist(),
            }
            for m in maps
        ],
        "columns": math.ceil(math.sqrt(len(images))),
        "card": CARD,
    }
    panels = "".join(
        f'<figure class="map"><figcaption><b>{html.escape(m.title)}</b>'
        f"<span>{html.escape(m.note)}</span></figcaption>{division}</figure>"
        for m, division in zip(maps, divisions, strict=True)
    )
    chips = "".join(
        f'<label class="chip"><input type="checkbox" checked data-class="{n}">'
        f'<i style="background:{color}"></i>{html.escape(name)}</label>'
        for n, (name, color) in enumerate(zip(class_names, colors, strict=True))
    )
    parts = {
        "TITLE": html.escape(title),
        "FACTS": "".join(f"<li>{html.escape(fact)}</li>" for fact in facts),
        "WARNINGS": "".join(f'<p class="warning">{html.escape(w)}</p>' for w in warnings),
        "TABLE": _table(table),
        "SHEET": base64.b64encode(sheet).decode(),
        "COUNT": f"{len(images):,}",
        "CHIPS": chips,
        "MAPS": panels,
        "ATLAS": _atlas(images),
        "CARD": str(CARD),
        "BOKEH": Resources(mode="inline", components=["bokeh"]).render_js(),
        # "</" would end the script
        "DATA": json.dumps(page_data).replace("</", "<\\/"),
        "SCRIPT": script.replace("</", "<\\/"),
    }
    pieces = TEMPLATE.read_text(encoding="utf-8").split("@@")  # text and @@NAME@@ in turn
    return "".join(parts[piece] if n % 2 else piece for n, piece in enumerate(pieces))


def _figures(maps: Sequence[Map], labels: ndarray, colors: Sequence[str]) -> tuple:
    """A Bokeh figure per map, all with the same points, filter and highlighted point."""
    from bokeh.models import BooleanFilter, CDSView, ColumnDataSource, CustomJS, HoverTool
    from bokeh.plotting import figure

    columns = {"color": [colors[label] for label in labels]}
    for n, m in enumerate(maps):
        points = np.asarray(m.points, np.float32)
        wrong = np.zeros(len(labels), bool) if m.predictions is None else m.predictions != labels
        columns |= {f"x{n}": points[:, 0], f"y{n}": points[:, 1]}
        columns[f"ring{n}"] = ["#111111" if w else "rgba(0,0,0,0)" for w in wrong]
        columns[f"size{n}"] = np.where(wrong, 8, 6).astype(np.float32)
    points = ColumnDataSource(columns, name="points")
    shown = BooleanFilter(booleans=[True] * len(labels), name="shown")
    hovered = ColumnDataSource(
        {name: [] for name in columns if name[0] in "xy"} | {"color": []}, name="hovered"
    )
    figures = []
    for n, m in enumerate(maps):
        # fixed ranges, so that filters do not zoom, and equal ones for an aspect ratio of 1
        low, high = np.min(m.points, axis=0), np.max(m.points, axis=0)
        half = 0.54 * max(float((high - low).max()), 1e-6)
        x, y = ((float(c) - half, float(c) + half) for c in (low + high) / 2)
        plot = figure(
            frame_width=MAP, frame_height=MAP, x_range=x, y_range=y, name=f"map{n}",
            tools="pan,wheel_zoom,box_zoom,reset", toolbar_location="above",
        )  # fmt: skip
        place = {"x": f"x{n}", "y": f"y{n}"}
        dots = plot.scatter(
            **place, size=f"size{n}", source=points, view=CDSView(filter=shown), fill_color="color",
            line_color=f"ring{n}", line_width=1.3, fill_alpha=0.75,
        )  # fmt: skip
        dots.nonselection_glyph = None
        for size, color, width in ((22, "#ffffff", 6), (22, "#111111", 2.5)):
            halo = {"size": size, "fill_color": None, "line_color": color, "line_width": width}
            plot.scatter(**place, source=hovered, **halo)
        plot.scatter(**place, source=hovered, size=10, fill_color="color", line_color="#ffffff")
        on_hover = CustomJS(code="window.onHover(cb_data)")
        plot.add_tools(HoverTool(renderers=[dots], tooltips=None, callback=on_hover, name="hover"))
        plot.toolbar.logo, plot.toolbar.autohide = None, True
        plot.axis.visible = plot.grid.visible = False
        plot.outline_line_color, plot.min_border = "#dddddd", 4
        figures.append(plot)
    return tuple(figures)


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
    thumb, columns = min(side, THUMB), math.ceil(math.sqrt(count))
    atlas = Image.new("L" if channels == 1 else "RGB", (thumb * columns,) * 2)
    for n, image in enumerate(images):
        tile = Image.fromarray(image[0] if channels == 1 else image.transpose(1, 2, 0))
        tile = tile if side == thumb else tile.resize((thumb, thumb), Image.Resampling.LANCZOS)
        atlas.paste(tile, (n % columns * thumb, n // columns * thumb))
    file = io.BytesIO()
    atlas.save(file, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
