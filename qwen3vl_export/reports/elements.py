"""Elements of HTML and SVG as trees, so that what is a text stays one: escaping is left to `xml.etree`."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from runtime.shown import escape_controls

Child = Element | str | None


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """Return an element.

    Args:
        tag: Its name.
        *children: Elements and texts, in order. Of a text, control characters are escaped; None is left out.
        **attributes: By name, where `_` stands for `-`, and one at the end is dropped (`class_`); None is left out, and
            a float is written with four digits behind the point at most.
    """
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), _attribute(value))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None:
            text = escape_controls(child, keeps_layout=True)
            if last is None:
                made.text = (made.text or "") + text
            else:
                last.tail = (last.tail or "") + text
    return made


def _attribute(value: object) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else escape_controls(str(value))
