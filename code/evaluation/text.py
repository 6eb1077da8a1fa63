"""Numbers of things and tables as text, for the terminal."""

from collections.abc import Sequence


def counted(number: int, what: str) -> str:
    """Such as 1 video or 2 videos."""
    return f"{number} {what}{'s' * (number != 1)}"


def text_table(lines: Sequence[Sequence[str]], first: int = 0) -> str:
    """Cells in columns: the first, at least `first` wide, is aligned to the left, the others to the right."""
    columns = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = [max(8, length + 2) for length in columns[1:]]
    return "\n".join(
        f"{name:<{max(first, columns[0])}}"
        + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for name, *cells in lines
    )
