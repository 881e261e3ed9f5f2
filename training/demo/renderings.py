"""The flag renderings: where each package keeps its pictures and how they become PIL images.

`flag-icons` is the rendering that is never trained on; it serves the tests and the demo questions.
"""

import io
import json
from pathlib import Path

from PIL import Image

#: rendering -> npm package and version, as `npm pack` names them
PACKAGES = {
    "svg-country-flags": "svg-country-flags-1.2.10",
    "country-flag-icons": "country-flag-icons-1.6.20",
    "flagpack": "iconify-json-flagpack-1.2.8",
    "circle-flags": "circle-flags-2.8.3",
    "flag-icons": "flag-icons-7.5.0",
}
TRAINED = ("svg-country-flags", "country-flag-icons", "flagpack", "circle-flags")
UNSEEN = "flag-icons"
LONG_SIDE = 640


def rasterise(svg: str, long_side: int = LONG_SIDE) -> Image.Image:
    """Draw an SVG text at ``long_side`` pixels, with its transparency."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=long_side)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


class Renderings:
    """Opens the flag of a country (two-letter code) in any rendering."""

    def __init__(self, packages: Path) -> None:
        self.packages = packages
        icons = self._folder("flagpack") / "icons.json"
        self._flagpack = json.loads(icons.read_text())

    def _folder(self, rendering: str) -> Path:
        return self.packages / PACKAGES[rendering] / "package"

    def open(self, rendering: str, code: str) -> Image.Image | None:
        """The flag with its transparency, or None where the rendering has none."""
        folder = self._folder(rendering)
        if rendering == "flagpack":
            return self._open_flagpack(code.lower())
        file = {
            "svg-country-flags": folder / "png1000px" / f"{code.lower()}.png",
            "country-flag-icons": folder / "3x2" / f"{code.upper()}.svg",
            "circle-flags": folder / "flags" / f"{code.lower()}.svg",
            "flag-icons": folder / "flags" / "4x3" / f"{code.lower()}.svg",
        }[rendering]
        if not file.is_file():
            return None
        if file.suffix == ".png":
            return Image.open(file).convert("RGBA")
        return rasterise(file.read_text())

    def _open_flagpack(self, code: str) -> Image.Image | None:
        names = self._flagpack
        icon = names["icons"].get({"gb": "gb-ukm"}.get(code, code))
        if icon is None:
            return None
        width, height = icon.get("width", names["width"]), icon.get("height", names["height"])
        head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return rasterise(f'{head} viewBox="0 0 {width} {height}">{icon["body"]}</svg>')


def on_grey(image: Image.Image, grey: int = 127) -> Image.Image:
    """``image`` without its transparency, on the grey that also pads the letterbox."""
    ground = Image.new("RGBA", image.size, (grey, grey, grey, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
