"""Hooks of mkdocs: equations become MathML, which browsers draw without scripts.

Pages write equations as GitHub does: ```math blocks, and $`...`$ within a line. The site brings the
part of the font STIX Two Math that they need, as many systems have none for equations.
"""

import html
import io
import re
from importlib import resources
from typing import Any
from xml.etree.ElementTree import Element

from fontTools import subset
from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor
from mkdocs.structure.files import File, Files

# |x| and norms: browsers would space the bars as operators, and stretch some of them.
BARS = re.compile(r'<mo(?: stretchy="false")?>(&#x0007C;|&#x02016;)</mo>')
INLINE = r"\$`([^`]+)`\$"
BEFORE_CODE = 195  # `code` has priority 190
FONT = "assets/math.woff"
CHARACTERS = [
    *range(0x20, 0x7F),
    *range(0x391, 0x3F6),  # Greek
    *range(0x2016, 0x2036),  # norms, dots, primes
    *range(0x2102, 0x2132),  # the letters that the alphabets below leave out
    *range(0x2200, 0x22C8),  # operators
    *range(0x27E8, 0x27EA),  # angle brackets
    *range(0x1D434, 0x1D468),  # italic
    *range(0x1D49C, 0x1D4D0),  # script
    *range(0x1D6E2, 0x1D71C),  # Greek, italic
]


class InlineMath(InlineProcessor):
    """$`...`$ within a line."""

    def handleMatch(  # type: ignore[override]  # noqa: N802
        self, m: re.Match[str], data: str
    ) -> tuple[str | Element, int, int]:
        return self.md.htmlStash.store(mathml(m[1], "inline")), m.start(0), m.end(0)


class Math(Extension):
    """The inline form; blocks are a custom fence of pymdownx.superfences."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.inlinePatterns.register(InlineMath(INLINE, md), "math", BEFORE_CODE)


def on_config(config: Any) -> Any:
    """Called by mkdocs before it reads pages."""
    config.markdown_extensions.append(Math())
    fence = {"name": "math", "class": "math", "format": block}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [fence]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it knows the site's files."""
    files.append(File.generated(config, FONT, content=font()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs with a page's text: a mean and its spread stay on one line."""
    return markdown.replace(" ± ", "\u00a0±\u00a0")


def font() -> bytes:
    """STIX Two Math's glyphs for `CHARACTERS`, as WOFF."""
    options = subset.Options(flavor="woff", layout_features=["*"])
    whole = resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
    with resources.as_file(whole) as path:
        found = subset.load_font(path, options)
    subsetter = subset.Subsetter(options)
    subsetter.populate(unicodes=CHARACTERS)
    subsetter.subset(found)
    out = io.BytesIO()
    subset.save_font(found, out, options)
    return out.getvalue()


def block(source: str, *_: Any, **__: Any) -> str:
    """A fenced equation."""
    return f'<div class="math">{mathml(source, "block")}</div>'


def mathml(latex: str, display: str) -> str:
    """LaTeX as MathML.

    Raises:
        ValueError: it has a command that the converter does not know.
    """
    made = convert(latex.strip(), display=display)
    made = BARS.sub(r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', made)
    if unknown := re.search(r"\\[A-Za-z]+", html.unescape(made)):
        raise ValueError(f"{unknown[0]} in an equation: no MathML for it")
    return made
