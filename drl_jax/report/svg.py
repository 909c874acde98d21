"""Figures of matplotlib as SVG elements of a page, in the page's colors.

A figure is drawn with colors that stand for CSS variables; `inline` replaces them. So one picture
is readable in a light and a dark page, and its text is text.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

# Colors that stand for those of the page: of text, of lines between things, and of data.
INK, LINE, SERIES = "#fe0001", "#fe0002", ("#fe0003", "#fe0004", "#fe0005")
_CSS = {
    INK: "currentColor",
    LINE: "var(--line)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, start=1)},
}
_STYLE = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.prop_cycle": mpl.cycler(color=SERIES),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.color": LINE,
    "ytick.labelcolor": INK,
}
# Pixels per inch of pictures within a figure.
_DPI = 96


@contextlib.contextmanager
def page_style() -> Iterator[None]:
    """Figures that are created in the block have the colors of the page."""
    with mpl.rc_context(_STYLE):
        yield


def inline(figure: Figure, name: str, label: str) -> Markup:
    """An SVG element of a figure of `page_style`.

    Its CSS variable `--width` is the width at which its letters have the size of the figure's.

    Args:
      figure: the figure.
      name: unique in the page; ids within the element depend on it.
      label: what the picture shows, for those who do not see it.
    """
    file = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        # The browser has fonts for them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", dpi=_DPI, metadata=empty)
    text = file.getvalue()
    # Without the XML declaration, and the style that would apply to the whole page.
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    # Names of groups, which are the same in all figures.
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    for color, variable in _CSS.items():
        text = text.replace(color, variable)
    start, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', start)[0]
    width = f"{72 * figure.get_figwidth():.0f}px"
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(label)}" style="--width: {width}"'
        f" {box}"
        f' xmlns:xlink="http://www.w3.org/1999/xlink">{rest}'
    )
