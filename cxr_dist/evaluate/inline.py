"""Pictures inside a page: SVG with ids of its own, or PNG where that is smaller; nothing is fetched from anywhere."""

import base64
import io
import re

from markupsafe import Markup, escape
from PIL import Image

from cxr_dist.evaluate.plots.panels import Picture

__all__ = ["inline_figure", "inline_thumbnail"]

_SVG = re.compile(r"<svg\b[^>]*>")
_BOX = re.compile(r'viewBox="([\d. -]+)"')
_NOT_DRAWN = re.compile(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", re.DOTALL)
_REFERENCE = re.compile(r'\b(id=")|(url\(#)|(?:xlink:)?(href="#)')
_PATH = re.compile(r' d="([^"]*)"')
_LONG_NUMBER = re.compile(r"\d+\.\d\d\d+")
_THUMBNAIL_SIDE = 192
_THUMBNAIL_QUALITY = 80


def inline_figure(picture: Picture, alt: str) -> Markup:
    """The figure as HTML that draws it, with a text for those who do not see it.

    Ids get the figure's name, for many figures share a page; paths keep two decimals, a hundredth of a point.
    """
    drawn = _svg(picture, alt)
    image = base64.b64encode(picture.png).decode()
    if len(drawn) <= len(image) * 2:  # a sharp figure with text that can be found is worth twice the bytes
        return Markup(drawn)  # noqa: S704 - matplotlib escapes the text it draws, and `_svg` what it adds
    return Markup('<img class="plot" alt="{}" src="data:image/png;base64,{}">').format(alt, image)


def inline_thumbnail(png: bytes) -> str:
    """An encoded image as a small JPEG in a data URI: some 6 KB, where a PNG would be some 30."""
    with Image.open(io.BytesIO(png)) as image:
        small = image.convert("RGB" if image.mode in ("RGB", "RGBA", "P") else "L")
        small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, format="JPEG", quality=_THUMBNAIL_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(picture: Picture, alt: str) -> str:
    opening = _SVG.search(picture.svg)
    box = _BOX.search(opening[0]) if opening else None
    if opening is None or box is None:
        raise ValueError(f"{picture.name}: found no <svg> with a viewBox")
    body = _NOT_DRAWN.sub("", picture.svg[opening.end() :]).strip()
    body = _PATH.sub(lambda path: f' d="{_shorter(path[1])}"', body)
    body = _REFERENCE.sub(lambda found: next(filter(None, found.groups())) + picture.name + "-", body)
    return f'<svg class="plot" role="img" aria-label="{escape(alt)}" viewBox="{box[1]}">{body}'


def _shorter(path: str) -> str:
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", " ".join(path.split()))
