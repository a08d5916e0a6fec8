"""Fail if a page of the built documentation loads anything from a network.

    python scripts/check_site.py build/site

Links that a reader may click are allowed; scripts, styles, pictures, fonts and frames from
elsewhere are not.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "source": ("src", "srcset"),
    "iframe": ("src",),
    "video": ("src",),
    "audio": ("src",),
    "object": ("data",),
    "embed": ("src",),
    "image": ("href", "xlink:href"),
}
RELATIONS = {"stylesheet", "preconnect", "dns-prefetch", "preload", "prefetch", "icon", "manifest"}
ELSEWHERE = re.compile(r"\s*(https?:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"(?:@import\s+|url\()\s*['\"]?\s*((?:https?:)?//[^'\")\s]+)", re.IGNORECASE)


class Page(HTMLParser):
    """Collects what a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        names = LOADED.get(tag, ())
        if tag == "link" and RELATIONS & set(given.get("rel", "").split()):
            names = ("href",)
        self.found += [given[n] for n in names if ELSEWHERE.match(given.get(n, ""))]
        self.found += IN_STYLE.findall(given.get("style", ""))


def external(file: Path) -> list[str]:
    """Addresses on other machines that this file makes a browser load."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        return IN_STYLE.findall(text)
    page = Page()
    page.feed(text)
    return page.found + IN_STYLE.findall(text)


def main() -> None:
    site = Path(sys.argv[1])
    files = sorted(f for f in site.rglob("*") if f.suffix in (".html", ".css", ".svg"))
    if not files:
        sys.exit(f"{site} holds no pages.")
    found = [f"{file}: {address}" for file in files for address in external(file)]
    if found:
        sys.exit("loaded from a network:\n" + "\n".join(found))
    print(f"{len(files)} files, nothing is loaded from a network")


if __name__ == "__main__":
    main()
