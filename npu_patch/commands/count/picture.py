"""The counts as a picture: for each measure a bar for each way, as long as its share of the unpatched one. SVG, for a
bar is a rectangle: nothing needs to be installed."""

from __future__ import annotations

from html import escape
from typing import Any

from npu_patch.commands.count.costs import MEASURES

LEFT, WIDTH, BAR, GAP = 190, 420, 14, 12
COLOURS = ("#9a9a9a", "#c7000b", "#3b6fb6")


def drawn(content: dict[str, Any]) -> str:
    parts: list[str] = []
    y = 34
    ways = list(content["ways"])
    for step, counted in content["steps"].items():
        parts.append(_text(8, y, f"{step}: {', '.join(ways)}", bold=True))
        y += GAP
        for measure, title in MEASURES.items():
            values = [counted[way]["total"][measure] for way in ways]
            most = max(values)
            parts.append(_text(8, y + BAR, title))
            for value, colour in zip(values, COLOURS, strict=False):
                length = WIDTH * value / most if most else 0
                parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 2}" fill="{colour}"/>')
                parts.append(_text(LEFT + length + 6, y + BAR - 3, _shown(measure, value)))
                y += BAR
            y += GAP
        y += GAP
    given = f"{content['images']} images" if content["images"] else f"{content['tokens']} tokens"
    title = f"{content['model']}, {given}, {content['dtype']}: simulated counts, no times"
    parts.insert(0, _text(8, 16, title, bold=True))
    size = f'width="{LEFT + WIDTH + 90}" height="{y}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">\n' + "\n".join(
        [*parts, "</svg>\n"]
    )


def _shown(measure: str, value: int) -> str:
    return f"{value / 1e6:.2f}" if "bytes" in measure else str(value)


def _text(x: float, y: float, text: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}"{weight}>{escape(text)}</text>'
