"""Diagrams: which rows a rank holds, a swap step by step, and the files of a checkpoint."""

from collections.abc import Callable

from launch.benchmark.formulas import chunk_rows_of
from launch.pictures.canvas import Canvas

RANKS, ROWS = 4, 8
ROW_HEIGHT, COLUMN, RANK_WIDTH = 13, 28, 76
Block = tuple[int, int, float, float]
"""First row, number of rows, and the start and end of the columns as fractions of the width."""
Holds = Callable[[int], Block]


def layouts_picture() -> Canvas:
    """One matrix of eight rows on four ranks, under four layouts."""
    canvas = Canvas(
        680, 488, "Which rows of a matrix each rank holds, live and averaged, under DDP, FSDP2, HSDP and TP"
    )
    canvas.rectangle(16, 16, 18, 18, fill="live-fill", outline="live")
    canvas.text(42, 31, "live weights", color="live")
    canvas.rectangle(160, 16, 18, 18, fill="average-fill", outline="average")
    canvas.text(186, 31, "average", color="average")
    canvas.text(280, 31, "one matrix of 8 rows on 4 ranks", color="muted")

    def whole(_: int) -> Block:
        return 0, ROWS, 0, 1

    def quarter(rank: int) -> Block:
        return rows_of(rank, RANKS), chunk_rows_of(ROWS, RANKS, rank), 0, 1

    def half(rank: int) -> Block:
        return rows_of(rank % 2, 2), ROWS // 2, 0, 1

    def half_split(rank: int) -> Block:
        return rows_of(rank % 2, 2) + rank // 2 * 2, 2, 0, 1

    def columns(rank: int) -> Block:
        return 0, ROWS, rank / RANKS, (rank + 1) / RANKS

    panels: list[tuple[str, str, Holds, Holds]] = [
        ("DDP", "averages: a quarter each", whole, quarter),
        ("FSDP2", "averages: the live shard", quarter, quarter),
        ("HSDP, 2 replicas of 2 shards", "averages: half of the live shard", half, half_split),
        ("TP, split by columns", "averages: the live block", columns, columns),
    ]
    for number, (name, note, live, average) in enumerate(panels):
        left, top = 16 + number % 2 * 338, 62 + number // 2 * 220
        canvas.text(left, top + 16, name, bold=True)
        canvas.text(left, top + 40, note, color="muted")
        for rank in range(RANKS):
            x = left + rank * RANK_WIDTH
            _matrix(canvas, x, top + 54, live(rank), "live")
            _matrix(canvas, x + COLUMN + 4, top + 54, average(rank), "average")
            canvas.text(x + COLUMN + 2, top + 54 + ROWS * ROW_HEIGHT + 22, f"rank {rank}", anchor="middle")
    return canvas


def rows_of(part: int, parts: int) -> int:
    """The first row of a part."""
    return sum(chunk_rows_of(ROWS, parts, index) for index in range(part))


def _matrix(canvas: Canvas, x: float, y: float, held: Block, color: str) -> None:
    first, rows, start, end = held
    canvas.rectangle(x, y, COLUMN, ROWS * ROW_HEIGHT, fill="empty", outline="grid")
    canvas.rectangle(
        x + start * COLUMN,
        y + first * ROW_HEIGHT,
        (end - start) * COLUMN,
        rows * ROW_HEIGHT,
        fill=f"{color}-fill",
        outline=color,
    )


def swap_picture() -> Canvas:
    """The weights of two DDP replicas during a swap; in each state, a rank's model is drawn as two halves of rows."""
    canvas = Canvas(680, 620, "A swap under DDP on two ranks: exchange, fill, evaluate, and back")
    for rank in range(2):
        x = 16 + rank * 176
        canvas.text(x, 32, f"rank {rank}", bold=True)
        canvas.text(x, 56, "model", color="muted")
        canvas.text(x + 78, 56, "averages", color="muted")
    states = [
        (
            "Training",
            ["Each rank averages its half of the rows,", "in storage of its own."],
            ("live", "live", "average"),
            ("live", "live", "average"),
        ),
        (
            "1. Exchange",
            [
                "Each rank exchanges its own rows in place,",
                "piece by piece through a small buffer.",
                "Nothing is sent.",
            ],
            ("average", "live", "live"),
            ("live", "average", "live"),
        ),
        (
            "2. Fill: only if averages are split",
            [
                "The ranks send each other their rows.",
                "Now every model is the average: evaluate.",
                "FSDP2 skips this step.",
            ],
            ("average", "average", "live"),
            ("average", "average", "live"),
        ),
        (
            "3. Exchange and fill again",
            ["Leaving the block undoes both steps. The live", "weights are bit-identical to those before."],
            ("live", "live", "average"),
            ("live", "live", "average"),
        ),
    ]
    for number, (title, text, *ranks) in enumerate(states):
        y = 76 + number * 138
        canvas.text(380, y + 18, title, bold=True)
        canvas.paragraph(380, y + 44, _wrapped(text), color="muted")
        for rank, (upper, lower, own) in enumerate(ranks):
            x = 16 + rank * 176
            for index, what in enumerate((upper, lower)):
                _box(canvas, x, y + index * 48, what)
            _box(canvas, x + 82, y + rank * 48, own)
        if number + 1 < len(states):
            canvas.arrow((172, y + 102), (172, y + 132), color="muted")
    return canvas


def _wrapped(lines: list[str]) -> list[str]:
    """Wrap text to the width of the right column."""
    wrapped, words = [""], " ".join(lines).split()
    for word in words:
        if len(wrapped[-1]) + len(word) > 31:
            wrapped.append("")
        wrapped[-1] = f"{wrapped[-1]} {word}".strip()
    return wrapped


def _box(canvas: Canvas, x: float, y: float, what: str) -> None:
    canvas.rectangle(x, y, 74, 44, fill=f"{what}-fill", outline=what)
    canvas.text(x + 37, y + 27, what, anchor="middle")


def checkpoint_picture() -> Canvas:
    """The file tree of a folder of checkpoints that two ranks saved."""
    canvas = Canvas(680, 380, "What a folder of checkpoints holds")
    rows = [
        (0, "checkpoints/", "the root: what save() and load() take"),
        (1, "step-0000000040/", "an older checkpoint; save() keeps three"),
        (1, "step-0000000050/", "complete, since it has this name"),
        (2, ".metadata", "written by DCP: which tensor is where"),
        (2, "__0_0.distcp", "tensors of rank 0: live, optimizer, averages"),
        (2, "__1_0.distcp", "tensors of rank 1"),
        (2, "manifest.json", "layouts, ties, size and checksum of each file"),
        (1, "step-0000000060.partial/", "being written; load() ignores it"),
    ]
    for number, (depth, name, note) in enumerate(rows):
        y = 40 + 44 * number
        x = 16 + 26 * depth
        above = max((index for index in range(number) if rows[index][0] <= depth), default=number)
        if depth:
            top = 40 + 44 * above + (-5 if rows[above][0] == depth else 9)
            canvas.line([(x - 14, top), (x - 14, y - 5), (x - 4, y - 5)], color="grid")
        canvas.text(x, y, name, mono=True, bold=name.endswith("50/"), color="ink" if "partial" not in name else "muted")
        canvas.text(298, y, note, color="muted")
    return canvas
