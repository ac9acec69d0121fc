"""The pictures of the parts in the READMEs, from the VE lecture: `python docs/parts.py`."""

from base64 import b64decode
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
BEGINNINGS = ("One density", "What four methods put", "Truth, data and exact mean")  # of the alts


def figures() -> dict[str, bytes]:
    """`part-1.png`, ... and what is to be in them."""
    found = {}
    for cell in nbformat.read(HERE.parent / "VE-SDE_example.ipynb", 4).cells:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt", "")
            for i, beginning in enumerate(BEGINNINGS):
                if alt.startswith(beginning):
                    found[f"part-{i + 1}.png"] = b64decode(output.data["image/png"])
    return found


if __name__ == "__main__":
    for name, png in figures().items():
        (HERE / name).write_bytes(png)
        print(f"docs/{name}")
