"""Run the tour, minisweet/tour/tour.ipynb, and compare its outputs with the stored ones.

    python .ci/tour.py            # fails if a cell raises, the number of its pictures or a table differs
    python .ci/tour.py --store    # runs it and stores the outputs

A cell that prints a table has a `tolerance` in its metadata: how far a number may be from the stored one. It covers
rounding; after a training it is larger, because processors round differently.
"""

import base64
import copy
import io
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

CLONE = Path(__file__).parents[1]
TOUR = CLONE / "minisweet" / "tour" / "tour.ipynb"


def printed(cell: NotebookNode) -> tuple[list[str], list[float]]:
    """What a cell printed: the text between the numbers, and the numbers."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    parts = re.split(r"(-?\d+(?:\.\d+)?)", " ".join(text.split()))
    return parts[::2], list(map(float, parts[1::2]))


def pictures(cell: NotebookNode) -> int:
    """The number of pictures that a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def with_few_colours(png: str) -> str:
    """A base64 PNG reduced to 32 colours, which makes it a third of the size."""
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(32).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def differences(stored: NotebookNode, new: NotebookNode) -> list[str]:
    """How the outputs of a cell that has just run differ from the stored ones."""
    messages = [] if pictures(new) == pictures(stored) else ["it shows another number of pictures than stored"]
    if (tolerance := stored.metadata.get("tolerance")) is not None:
        (old_text, old), (text, numbers) = printed(stored), printed(new)
        far = [f"{a} was {b}" for a, b in zip(numbers, old, strict=False) if abs(a - b) > tolerance]
        if text != old_text or far:
            messages.append(f"its table differs by more than {tolerance:g}: {', '.join(far) or text}")
    return messages


def main() -> None:
    """Run the tour, and compare or store its outputs."""
    stored, started = nbformat.read(TOUR, as_version=4), time.perf_counter()
    new, resources = copy.deepcopy(stored), {"metadata": {"path": TOUR.parent}}
    NotebookClient(new, timeout=1800, kernel_name="python3", record_timing=False, resources=resources).execute()
    print(f"{TOUR.name}: {len(new.cells)} cells in {time.perf_counter() - started:.0f} s")
    if "--store" in sys.argv:
        for cell in new.cells:
            for output in cell.get("outputs", []):
                if picture := output.get("data", {}).get("image/png"):
                    output.data["image/png"] = with_few_colours(picture)
        nbformat.write(new, TOUR)
        return
    pairs = [pair for pair in zip(stored.cells, new.cells, strict=True) if pair[0].cell_type == "code"]
    lines = [f"{old.source.splitlines()[0]!r}: {line}" for old, cell in pairs for line in differences(old, cell)]
    sys.exit("\n".join(lines) or None)


if __name__ == "__main__":
    main()
