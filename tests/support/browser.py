"""The Chromium that tests drive, and what they measure of a page."""

import shutil

from playwright.sync_api import Page

# None: not on this machine.
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def text_contrasts(page: Page, selector: str) -> list[tuple[float, str]]:
    """The contrast of each visible element with text to its background, and the element."""
    colors = page.evaluate(
        """selector => {
          const canvas = document.createElement('canvas')
            .getContext('2d', {willReadFrequently: true});
          const rgb = (color) => {
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
          };
          const background = (e) => {
            const own = getComputedStyle(e).backgroundColor;
            return own === 'rgba(0, 0, 0, 0)' ? background(e.parentElement) : own;
          };
          const color = (e) => getComputedStyle(e)[e instanceof SVGElement ? 'fill' : 'color'];
          return [...document.querySelectorAll(selector)]
            .filter((e) => e.textContent.trim() && e.checkVisibility())
            .map((e) => [rgb(color(e)), rgb(background(e)), e.outerHTML]);
        }""",
        selector,
    )
    return [(_contrast(text, background), element) for text, background, element in colors]


def _contrast(one: list[int], other: list[int]) -> float:
    """Contrast of two sRGB colors, as WCAG defines it."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance([c / 255 for c in color]) for color in (one, other))
    return (high + 0.05) / (low + 0.05)
