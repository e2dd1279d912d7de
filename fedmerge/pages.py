"""What the pages of reports share: figures with their data, drawings that follow the page's colours, the templates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

TEMPLATES = ("page", "macros", "report", "benchmark")


class Plate(NamedTuple):
    """A figure of a page, and what stands beside it.

    Attributes:
        name: of its files.
        title: above it.
        caption: below it.
        figure: the drawing.
        headings: of the table of its data.
        lines: of that table.
        sources: the files that the data come from, below the page's folder.
        commands: those that made it.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    sources: Sequence[str]
    commands: Sequence[str]


def write_figures(plates: Iterable[Plate], write: Callable[[str, bytes], object]) -> list[tuple[Plate, Markup]]:
    """Write each figure as SVG and PNG, and return it with its drawing for the page.

    Args:
        plates: the figures.
        write: writes a file, by its name below the page's folder.
    """
    from markupsafe import Markup

    from fedmerge.figures import THEME, to_png, to_svg

    found = []
    for plate in plates:
        svg = to_svg(plate.figure)
        write(f"figures/{plate.name}.svg", svg)
        write(f"figures/{plate.name}.png", to_png(plate.figure))
        found.append((plate, Markup(_inline(svg, plate, THEME))))  # ElementTree has escaped it
    return found


def render(template: str, **values: Any) -> bytes:
    """Return a page; text in the values is escaped.

    Args:
        template: one of `TEMPLATES`.
        values: what it shows.
    """
    from jinja2 import DictLoader, Environment, StrictUndefined

    from fedmerge.figures import THEME

    folder = resources.files("fedmerge")
    texts = {
        f"{name}.html.jinja": folder.joinpath(f"{name}.html.jinja").read_text(encoding="utf-8") for name in TEMPLATES
    }
    environment = Environment(
        loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(f"{template}.html.jinja").render(theme=THEME, **values)
    return page.encode(errors="replace")  # a path in a configuration may be no Unicode


def _inline(svg: bytes, plate: Plate, theme: Mapping[str, str]) -> str:
    """Return an SVG file as an element of the page: its ids its own, its colours the page's, its size the column's."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    ids: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            value = re.sub(r"^#|(?<=url\(#)", lambda found: f"{found[0]}{plate.name}-", value)
            for colour_name, colour in theme.items():
                value = value.replace(colour, f"var(--{colour_name})") if name in ("style", "fill", "stroke") else value
            if name != "id":
                element.set(name.rpartition("}")[2], value)
            elif value not in ids:  # images of equal content have equal ids
                ids.add(value)
                element.set(name, f"{plate.name}-{value}")
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", f"{plate.title}. {plate.caption}")
    return ElementTree.tostring(root, encoding="unicode")
