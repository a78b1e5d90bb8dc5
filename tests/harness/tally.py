"""How many cases a table had: the test run prints it at its end."""

from collections import Counter

TALLIES: "list[Tally]" = []


class Tally:
    """Counts the cases of a table by row and column."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._cells: dict[str, Counter[str]] = {}
        TALLIES.append(self)

    def count(self, row: str, column: str) -> None:
        """One more case ran."""
        self._cells.setdefault(row, Counter())[column] += 1

    def counted(self, row: str, column: str) -> int:
        """How many cases ran."""
        return self._cells.get(row, Counter())[column]

    def lines(self) -> list[str]:
        """What to print: a line for each row, and the total."""
        if not self._cells:
            return []
        columns = list(dict.fromkeys(column for row in self._cells.values() for column in row))
        width = max(map(len, self._cells))
        total = sum(row.total() for row in self._cells.values())
        return [
            f"{self._title}: {total} cases",
            *(
                f"{name:<{width}} {row.total():5}  "
                + ", ".join(f"{column} {row[column]}" for column in columns)
                for name, row in self._cells.items()
            ),
        ]
