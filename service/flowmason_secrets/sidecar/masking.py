"""Values out of what a program prints, however they are cut into pieces."""

from collections.abc import Iterable, Iterator

MARK = b"***"
# Shorter values are in every text: replacing them would hide nothing, and spoil everything.
SHORTEST = 4


class Masker:
    """Puts `***` in the place of values in a stream of bytes. Where values overlap, there is one
    mark for all of them. What comes out does not depend on how the stream is cut.

    Lines of values with several lines are values too.
    """

    def __init__(self, values: Iterable[str]) -> None:
        lines = (part for value in values for part in (value, *value.splitlines()))
        wanted = {line.encode() for line in lines}
        self._values = sorted(value for value in wanted if len(value) >= SHORTEST)
        # What may still become a value; of it, so many bytes have their mark already.
        self._held = b""
        self._covered = 0

    def feed(self, data: bytes) -> bytes:
        """What can be printed now that `data` has come too. Keeps back less than a value's size."""
        text = self._held + data
        hold = min((_beginning(text, value) for value in self._values), default=len(text))
        return self._release(text, hold)

    def end(self) -> bytes:
        """The rest, at the end of the stream."""
        return self._release(self._held, len(self._held))

    def _release(self, text: bytes, hold: int) -> bytes:
        """What is before `hold`, masked; everything behind it is kept."""
        out: list[bytes] = []
        at, covered = 0, self._covered if hold == 0 else 0
        for start, end in self._places(text):
            if start >= hold:
                break
            out.append(text[at:start])
            # One that goes on from before has its mark.
            if start > 0 or self._covered == 0:
                out.append(MARK)
            at, covered = min(end, hold), max(0, end - hold)
        out.append(text[at:hold])
        self._held, self._covered = text[hold:], covered
        return b"".join(out)

    def _places(self, text: bytes) -> Iterator[tuple[int, int]]:
        """Where values are, in order; those that overlap are one place."""
        found = [place for value in self._values for place in _occurrences(text, value)]
        if self._covered:
            found.append((0, self._covered))
        found.sort()
        start, end = 0, -1
        for begins, ends in found:
            if begins < end:
                end = max(end, ends)
                continue
            if end > 0:
                yield start, end
            start, end = begins, ends
        if end > 0:
            yield start, end


def _occurrences(text: bytes, value: bytes) -> Iterator[tuple[int, int]]:
    """Where the value is, also where it overlaps itself; a run of repetitions is one place."""
    # How far it has to be shifted onto itself, if it is a repetition of something.
    period = (value + value).find(value, 1)
    at = text.find(value)
    while at >= 0:
        end = at + len(value)
        while period < len(value) and text.startswith(value[:period], end):
            end += period
        yield at, end
        at = text.find(value, end - len(value) + 1)


def _beginning(text: bytes, value: bytes) -> int:
    """Where the longest end of the text begins that is a beginning, and no more, of the value."""
    start = max(0, len(text) - len(value) + 1)
    first = value[:SHORTEST]
    at = text.find(first, start)
    while at >= 0:
        if value.startswith(text[at:]):
            return at
        at = text.find(first, at + 1)
    # Too near to the end for all of `first`.
    for at in range(max(start, len(text) - len(first) + 1), len(text)):
        if first.startswith(text[at:]):
            return at
    return len(text)
