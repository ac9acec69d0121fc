"""The Japanese lectures are the English ones: code and outputs the same, each text translated."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from notebooks import NOTEBOOKS, ROOT, SOLUTIONS

sys.path.insert(0, str(ROOT / "scripts"))
import japanese

every = pytest.mark.parametrize("path", NOTEBOOKS + SOLUTIONS, ids=lambda p: p.stem)


def twin(path):
    return ROOT / "ja" / path.relative_to(ROOT)


@every
def test_code_and_outputs_are_the_english_ones(path):
    english, other = nbformat.read(path, 4), nbformat.read(twin(path), 4)
    assert other.metadata == english.metadata
    assert [c.cell_type for c in other.cells] == [c.cell_type for c in english.cells]
    for one, two in zip(english.cells, other.cells, strict=True):
        if one.cell_type == "code":
            assert two == one
        else:
            assert two.metadata.get("tags") == one.metadata.get("tags")


@every
def test_every_text_is_translated(path):
    """Of the English text as it is now, with its formulas, numbers, code and links."""
    english, other = nbformat.read(path, 4), nbformat.read(twin(path), 4)
    pairs = list(zip(japanese.markdown(english), japanese.markdown(other), strict=True))
    remedy = "python scripts/japanese.py lists what is to be translated"
    assert not [two.source[:40] for one, two in pairs if japanese.check(one, two)], remedy
    for _, two in pairs:
        words = re.sub(r"`.*?`|\$.*?\$|\]\(.*?\)", "", two.source)
        assert re.search("[ぁ-んァ-ヶ一-龠]", words)


def test_the_lectures_share_their_japanese_where_they_share_their_english():
    shared = []
    for path in NOTEBOOKS:
        cells = nbformat.read(twin(path), 4).cells
        shared.append([c.source for c in cells if "shared" in c.metadata.get("tags", [])])
    assert shared[0] == shared[1]


@pytest.fixture
def copy(tmp_path):
    """A copy of all eight notebooks, what `scripts/japanese.py` writes to."""
    for path in NOTEBOOKS + SOLUTIONS:
        for file in (path, twin(path)):
            place = tmp_path / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    return tmp_path


def change(path, old, new):
    text = Path(path).read_text(encoding="utf-8")
    assert old in text
    Path(path).write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_command_changes_nothing_where_all_is_whole(copy, capsys):
    before = {p: p.read_bytes() for p in copy.rglob("*.ipynb")}
    assert japanese.main(["--root", str(copy)]) == 0
    assert {p: p.read_bytes() for p in copy.rglob("*.ipynb")} == before
    assert "whole" in capsys.readouterr().out


def test_an_english_cell_that_changed_is_listed_until_it_is_said_to_be_done(copy, capsys):
    """In both lectures, for it is shared; its Japanese is edited in the first, and goes to both."""
    for name in japanese.NAMES[:2]:
        change(copy / name, "uniform in angle;", "equally dense in angle;")
    assert japanese.main(["--root", str(copy)]) == 1
    listed = capsys.readouterr().out
    assert listed.count("to be translated") == 2
    first, second = (copy / "ja" / name for name in japanese.NAMES[:2])
    english = nbformat.read(copy / japanese.NAMES[0], 4).cells
    place = next(i for i, c in enumerate(english) if "equally dense in angle" in c.source)
    notebook = nbformat.read(first, 4)
    notebook.cells[place].source = edited = notebook.cells[place].source + "訂正。"
    nbformat.write(notebook, first)
    assert japanese.main(["--root", str(copy), "--done"]) == 0
    assert japanese.main(["--root", str(copy)]) == 0
    for path in (first, second):
        cell = nbformat.read(path, 4).cells[place]
        assert cell.source == edited
        assert cell.metadata.translates == japanese.key(english[place].source)


def test_what_is_not_translated_cannot_be_said_to_be_done(copy):
    """A new cell has its English text until it has a Japanese one."""
    name = japanese.NAMES[0]
    notebook = nbformat.read(copy / name, 4)
    notebook.cells.insert(8, nbformat.v4.new_markdown_cell("A new paragraph."))
    nbformat.write(notebook, copy / name)
    assert japanese.main(["--root", str(copy), "--done"]) == 1
    assert nbformat.read(copy / "ja" / name, 4).cells[8].source == "A new paragraph."
    assert japanese.main(["--root", str(copy)]) == 1


def test_code_and_outputs_are_carried_over(copy):
    change(copy / japanese.NAMES[0], "SEED = 0  #", "SEED = 1  #")
    assert japanese.main(["--root", str(copy)]) == 0
    assert "SEED = 1  #" in (copy / "ja" / japanese.NAMES[0]).read_text(encoding="utf-8")


ENGLISH = (
    "## A title\n\nWith $x_0$ and `code`, 0.25 of 1,000, see [there](https://a.org/b).\n\n$$y = x$$"
)
GOOD = (
    "## 題名\n\n $x_0$ と `code` では 1,000 のうち 0.25 です"
    "（[参照](https://a.org/b)）。\n\n$$y = x$$"
)


def test_a_good_translation_has_no_differences():
    assert japanese.differences(ENGLISH, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("$x_0$", "$x_1$", "formulas in the text"),
        ("$$y = x$$", "$$y = 2x$$", "formulas"),
        ("`code`", "`Code`", "code"),
        ("0.25", "0.52", "numbers"),
        ("1,000", "千", "numbers"),
        ("です", " 3 つです", "numbers"),
        ("a.org/b", "a.org/c", "links"),
        ("## 題名", "### 題名", "lines"),
        (" $x_0$ と", "この$x_0$ と", "no space beside"),
        (" $x_0$ と", " $x_0$と", "no space beside"),
        ("では", "では**強調**です", "no space beside"),
    ],
)
def test_each_kind_of_difference_is_seen(old, new, what):
    assert old in GOOD
    found = japanese.differences(ENGLISH, GOOD.replace(old, new))
    assert any(line.startswith(what) for line in found), found


def test_links_go_to_the_same_language():
    """A notebook's twin is in ja/; the switch of language goes the other way."""
    address = "https://github.com/UedaKenji/FI6_inverse_diffusion_model/blob/main/"
    pairs = {
        address + "VE-SDE_example.ipynb": address + "ja/VE-SDE_example.ipynb",
        address + "solutions/VP-SDE_solutions.ipynb": address
        + "ja/solutions/VP-SDE_solutions.ipynb",
        address + "docs/own_problem.md": address + "docs/own_problem.ja.md",
        "https://arxiv.org/abs/2011.13456": "https://arxiv.org/abs/2011.13456",
    }
    for english, other in pairs.items():
        assert japanese.other_language(english) == other
        assert japanese.other_language(other) == english
