"""The public items of the library's face, a line each, as rustdoc's pages (`cargo doc`) show them.

The crates of the compiler, which the facade re-exports for tools, promise nothing before 1.0 and are not listed.

Names and kinds, with fields, variants and methods, and no signatures: those are in rustdoc's JSON alone, which stable
toolchains do not write. Left out: what comes with traits, and re-exports of whole crates.

    public_api.py DOC            prints the listing
    public_api.py DOC FILE       compares it with FILE; the exit code is 1 where they differ
"""

import difflib
import pathlib
import re
import sys

CRATES = ["einfall", "einfall_kernels", "einfall_runtime"]
# Where a page goes on with what traits give.
TRAITS = re.compile(r'id="(trait-implementations|synthetic-implementations|blanket-implementations|implementors)"')
MEMBER = re.compile(r'<(?:section|span|div|h3)[^>]*? id="(method|tymethod|variant|structfield|associatedconstant|associatedtype)\.([A-Za-z0-9_]+)"')
FIELD_OF_VARIANT = re.compile(r'id="variant\.([A-Za-z0-9_]+)\.field\.([A-Za-z0-9_]+)"')


def members(page):
    """`.field`, `::Variant`, `::method()` of a type's page."""
    text = page.read_text(encoding="utf-8")
    end = TRAITS.search(text)
    text = text[: end.start()] if end else text
    found = {f"::{variant}.{field}" for variant, field in FIELD_OF_VARIANT.findall(text)}
    for kind, name in MEMBER.findall(text):
        found.add({"structfield": f".{name}", "method": f"::{name}()", "tymethod": f"::{name}()"}.get(kind, f"::{name}"))
    return found


def listing(doc):
    lines = []
    for crate in CRATES:
        folder = doc / crate
        # The index of all items: pages of items that are gone may still lie there.
        index = (folder / "all.html").read_text(encoding="utf-8")
        for page in sorted({folder / link for link in re.findall(r'<li><a href="([^"]+\.html)"', index)}):
            kind, _, name = page.stem.partition(".")
            path = "::".join([crate, *page.parent.relative_to(folder).parts, name])
            lines.append(f"{kind} {path}")
            lines += sorted(f"{kind} {path}{m}" for m in members(page))
    return sorted(set(lines), key=lambda line: (line.split(" ", 1)[1], line))


def main():
    have = listing(pathlib.Path(sys.argv[1]))
    if len(sys.argv) == 2:
        print("\n".join(have))
        return 0
    want = pathlib.Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    differences = [d for d in difflib.unified_diff(want, have, sys.argv[2], "the sources", lineterm="", n=0)]
    if differences:
        print("\n".join(differences[:60]))
        print("The public items changed: `make public-api` writes them down.", file=sys.stderr)
    return 1 if differences else 0


sys.exit(main())
