"""Looks into a picture: well-formed, no inline style, a title, links that can be reached, a table of the same figures."""

from __future__ import annotations

from xml.etree import ElementTree

from dashboard.pictures import Picture

NASTY = '<script>"&'


def shapes(picture: Picture | None, tag: str, class_: str = "") -> list[ElementTree.Element]:
    """The elements of a picture, which has to be well-formed, named, and readable without seeing it."""
    assert picture is not None
    root = ElementTree.fromstring(picture.svg)
    assert all("style" not in one.attrib for one in root.iter())
    known = {one.attrib["id"]: one.text for one in root.iter() if "id" in one.attrib}
    assert known[root.attrib["aria-labelledby"]] == picture.title
    if "aria-describedby" in root.attrib:
        assert known[root.attrib["aria-describedby"]]
    has_links = any(one.tag == "a" for one in root.iter())
    assert root.attrib["role"] == ("group" if has_links else "img")
    assert len(picture.rows) > 0
    assert {len(row) for row in picture.rows} == {len(picture.columns)}
    return [one for one in root.iter(tag) if class_ in one.attrib.get("class", "").split() or not class_]


def hover(one: ElementTree.Element) -> str:
    found = one.find("title")
    return (found.text or "") if found is not None else ""


def number(one: ElementTree.Element, name: str) -> float:
    return float(one.attrib[name])


def size(picture: Picture | None) -> tuple[float, float]:
    assert picture is not None
    root = ElementTree.fromstring(picture.svg)
    return float(root.attrib["width"]), float(root.attrib["height"])


def inside(picture: Picture | None) -> bool:
    """Whether every rectangle and every beginning of a text lies within the drawing."""
    width, height = size(picture)
    for one in [*shapes(picture, "rect"), *shapes(picture, "text")]:
        right = number(one, "x") + float(one.attrib.get("width", 0))
        bottom = number(one, "y") + float(one.attrib.get("height", 0))
        if not (0 <= number(one, "x") <= right <= width + 0.1 and number(one, "y") >= 0 and bottom <= height + 0.1):
            return False
    return True
