"""The notebooks in Japanese: `python scripts/japanese.py` writes them to ja/.

Code, outputs and tags are carried over from the English ones. A Markdown cell keeps its Japanese
text, and in its metadata (`translates`) which English text that is the translation of. What has
no translation, or another English text by now, is listed with where the two differ; translate it
in ja/, then say so by --done. A cell that both lectures share is translated in the VE lecture.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import sys
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("VE-SDE_example", "VP-SDE_example", "solutions/VE-SDE_solutions")
NAMES = tuple(f"{name}.ipynb" for name in (*NAMES, "solutions/VP-SDE_solutions"))

DISPLAY, INLINE = re.compile(r"\$\$.+?\$\$", re.DOTALL), re.compile(r"\$[^$\n]+\$")
LINK, CODE = re.compile(r"\]\(([^)\s]+)\)"), re.compile(r"`[^`\n]+`")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
WORDS = re.compile(  # English for what Japanese may write as a number
    r"\b(one|once|two|twice|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty"
    r"|thirty|fifty|sixty|hundred|thousand|million|dozen|half|halves|third|quarter|tenth"
    r"|hundredth|first|second|both|single|per cent|nobody)s?",
    re.IGNORECASE,
)
# what may stand beside a formula, for GitHub to see it
BEFORE, AFTER = r"(?:^|[\s(\[|*])", r"(?:$|[\s)\]|*.,;:?!、。）」：；？！])"


def key(text: str) -> str:
    """What a translation remembers of its English text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def markdown(notebook: NotebookNode | None) -> list[NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "markdown"] if notebook else []


def translated(
    english: NotebookNode, former: NotebookNode | None, known: dict[str, str]
) -> NotebookNode:
    """The English notebook with the known translations, by `key`, in its Markdown cells.

    Where there is none, the text of the former Japanese notebook at this place, which remembers
    another English text; where there is nothing, the English text.
    """
    notebook, old = copy.deepcopy(english), markdown(former)
    keys = [key(cell.source) for cell in markdown(english)]
    there = SequenceMatcher(None, [c.metadata.translates for c in old], keys, autojunk=False)
    place = {}
    for _, a, b, c, d in there.get_opcodes():
        place |= dict(zip(range(c, d), old[a:b], strict=False))
    for i, cell in enumerate(markdown(notebook)):
        if keys[i] in known:
            cell.source, cell.metadata["translates"] = known[keys[i]], keys[i]
        elif i in place:
            cell.source = place[i].source
            cell.metadata["translates"] = place[i].metadata.translates
        else:
            cell.metadata["translates"] = ""
    return notebook


def differences(english: str, japanese: str) -> list[str]:
    """What must be the same in an English cell and its translation, and is not."""
    found = []
    plain = []
    for text in (english, japanese):
        for pattern in (DISPLAY, CODE, INLINE, LINK):
            text = pattern.sub(" ", text)
        plain.append(text)
    links = [Counter(LINK.findall(text)) for text in (english, japanese)]
    links[1] = Counter({other_language(link): n for link, n in links[1].items()})
    pairs = {
        "formulas": [Counter(DISPLAY.findall(text)) for text in (english, japanese)],
        "formulas in the text": [
            set(INLINE.findall(CODE.sub("", DISPLAY.sub("", text))))
            for text in (english, japanese)
        ],
        "code": [set(CODE.findall(text)) for text in (english, japanese)],
        "links": links,
        "lines": [re.findall(r"^(#+ ★?|- |\|(?=.*\|$)|\*\*\d\.)", t, re.M) for t in plain],
    }
    for what, (one, other) in pairs.items():
        if one != other:
            if isinstance(one, list):
                found.append(f"{what}: {one} and {other}")
            else:
                found.append(f"{what}: only in English {one - other}, in Japanese {other - one}")
    numbers = [Counter(NUMBER.findall(text)) for text in plain]
    missing, more = numbers[0] - numbers[1], numbers[1] - numbers[0]
    if missing or more.total() > len(WORDS.findall(plain[0])):
        found.append(f"numbers: only in English {missing}, in Japanese {more}")
    return found + layout(japanese)


def other_language(link: str) -> str:
    """The link to the same notebook in the other language; others as they are."""
    if "/own_problem." in link:
        return link.replace(".ja.md", ".md") if ".ja.md" in link else link.replace(".md", ".ja.md")
    if "/main/ja/" in link:
        return link.replace("/main/ja/", "/main/")
    return re.sub(r"/main/(?=[\w/-]+\.ipynb)", "/main/ja/", link)


def layout(japanese: str) -> list[str]:
    """Formulas and emphasis that GitHub would not see for want of a space beside them."""
    text = CODE.sub("x", DISPLAY.sub("", japanese))
    good = re.compile(rf"{BEFORE}\$[^$\n]+\$(?={AFTER})", re.M)
    tight = [m.group() for m in INLINE.finditer(text)]
    seen = [m.group().lstrip(" \n([|*") for m in good.finditer(text)]
    found = [f"no space beside {formula}" for formula in (Counter(tight) - Counter(seen))]
    for run in re.finditer(r"(\*+)([^\s*][^*\n]*?)\1", INLINE.sub("x", text)):
        outside = (run.string[: run.start()][-1:], run.string[run.end() :][:1])
        if any(c and c not in " \n|（）「」、。：.,;:()?？" for c in outside):
            found.append(f"no space beside {run.group()}")
    return found


def mark(english: NotebookNode, former: NotebookNode | None) -> NotebookNode:
    """The Japanese notebook as it is, each cell that is not the English one marked as done."""
    notebook = translated(english, former, {})
    for one, other in zip(markdown(english), markdown(notebook), strict=True):
        if one.source != other.source:
            other.metadata["translates"] = key(one.source)
    return notebook


def check(english: NotebookNode, japanese: NotebookNode) -> list[str]:
    """What is wrong with a cell's translation."""
    if english.cell_type != "markdown":
        return []
    stale = japanese.metadata.translates != key(english.source)
    return ["to be translated"] * stale + differences(english.source, japanese.source)


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--done", action="store_true", help="what was listed is translated now")
    parser.add_argument("--root", type=Path, default=ROOT)
    settings = parser.parse_args(arguments)
    english = [nbformat.read(settings.root / name, 4) for name in NAMES]
    paths = [settings.root / "ja" / name for name in NAMES]
    former = [nbformat.read(path, 4) if path.exists() else None for path in paths]
    if settings.done:
        former = [mark(*pair) for pair in zip(english, former, strict=True)]
    known = {c.metadata.translates: c.source for old in former[::-1] for c in markdown(old)}
    open_cells = 0
    for its, old, path in zip(english, former, paths, strict=True):
        notebook = translated(its, old, known)
        for i, (one, other) in enumerate(zip(its.cells, notebook.cells, strict=True)):
            wrong = check(one, other)
            if wrong:
                open_cells += 1
                print(f"{path.relative_to(settings.root)}, cell {i}: {one.source[:60]!r}")
                print(*(f"  {line}" for line in wrong), sep="\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, path)
    print(f"{open_cells} cells to be looked at" if open_cells else "ja/ is whole")
    return int(open_cells > 0)


if __name__ == "__main__":
    sys.exit(main())
