"""Charts from plugins: SVG reduced to what only draws.

The picture is embedded as an image (a data URI), where browsers run no script and fetch nothing;
what could do either is removed first all the same, so that the file is harmless when it is saved.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
MAX_CHARACTERS = 500_000

_ELEMENT_NAMES = (
    "svg g path rect circle ellipse line polyline polygon text tspan title desc defs symbol use "
    "linearGradient radialGradient stop clipPath mask pattern marker style"
)
_ATTRIBUTE_NAMES = (
    "id class x y x1 y1 x2 y2 cx cy r rx ry fx fy d points width height viewBox transform version "
    "preserveAspectRatio fill fill-opacity fill-rule stroke stroke-width stroke-opacity "
    "stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin stroke-miterlimit opacity "
    "color font font-family font-size font-style font-weight text-anchor dominant-baseline dx dy "
    "rotate textLength lengthAdjust clip-path clip-rule clipPathUnits mask offset stop-color "
    "stop-opacity gradientUnits gradientTransform patternUnits patternTransform markerWidth "
    "markerHeight refX refY orient markerUnits marker-start marker-mid marker-end display "
    "visibility vector-effect style type role"
)
_ELEMENTS = frozenset(_ELEMENT_NAMES.split())
_ATTRIBUTES = frozenset(_ATTRIBUTE_NAMES.split())
#: Left out without a word: they draw nothing.
_SILENT = ("metadata",)
#: References may point inside the picture only; CSS may neither import nor escape characters.
_UNSAFE = re.compile(r"url\(\s*[\"']?(?!#)|@|\\|javascript:|expression|&|<", re.IGNORECASE)


@dataclass(frozen=True)
class Chart:
    """A plugin's chart: a title and an image, or why there is none."""

    title: str
    uri: str = ""
    problem: str = ""


def sanitize_chart(chart: Mapping[str, str]) -> Chart:
    """Return the chart with its SVG sanitised; what was removed is named in ``problem``."""
    title = str(chart.get("title", "untitled"))[:200]
    text = chart.get("svg")
    if not isinstance(text, str):
        return Chart(title, problem="it has no svg")
    try:
        clean, removed = sanitize_svg(text)
    except ValueError as error:
        return Chart(title, problem=str(error))
    uri = "data:image/svg+xml;base64," + base64.b64encode(clean.encode()).decode()
    return Chart(title, uri, f"removed {', '.join(removed)}" if removed else "")


def sanitize_svg(text: str) -> tuple[str, list[str]]:
    """Return ``text`` with drawing elements and attributes only, and what was removed.

    Raises:
        ValueError: if it is too long, has a document type, is not XML or not SVG.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"its svg has more than {MAX_CHARACTERS:,} characters")
    text = re.sub(r"<!DOCTYPE\s+svg\s+PUBLIC\s+\"[^\"<>]*\"\s+\"[^\"<>]*\"\s*>", "", text, count=1)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("its svg declares a document type")
    try:
        root = ElementTree.fromstring(text.strip())
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"its svg is not XML: {error}") from error
    if root.tag != f"{{{SVG}}}svg":
        raise ValueError(f"its svg's root is {root.tag!r}")
    removed: dict[str, None] = {}
    _clean(root, removed)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    return ElementTree.tostring(root, encoding="unicode"), list(removed)


def _clean(element: ElementTree.Element, removed: dict[str, None]) -> None:
    for name in list(element.attrib):
        if not _allowed_attribute(name, element.attrib[name]):
            del element.attrib[name]
            removed[_local(name)] = None
    for child in list(element):
        if not _allowed_element(child):
            if isinstance(child.tag, str) and _local(child.tag) not in _SILENT:
                removed[f"<{_local(child.tag)}>"] = None
            element.remove(child)
        else:
            _clean(child, removed)


def _allowed_element(element: ElementTree.Element) -> bool:
    tag = element.tag
    if not isinstance(tag, str) or not tag.startswith(f"{{{SVG}}}") or _local(tag) not in _ELEMENTS:
        return False
    if _local(tag) == "style":
        return len(element) == 0 and not _UNSAFE.search(element.text or "")
    return True


def _allowed_attribute(name: str, value: str) -> bool:
    if name in ("href", f"{{{XLINK}}}href"):
        return value.startswith("#")
    return name in _ATTRIBUTES and not _UNSAFE.search(value)


def _local(name: object) -> str:
    return str(name).rpartition("}")[2]
