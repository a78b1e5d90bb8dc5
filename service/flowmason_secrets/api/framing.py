"""Where requests begin in what a client sends, for the one method that no parser knows."""

# Bytes of a request's head, of the trailers of a body, and of what is neither.
MAX_HEAD = 16 << 10

# What handlers see of the method LIST, which aiohttp's parser in C refuses: a method of the same
# length that it knows (RFC 2068 §19.6.1.2). It has the first two letters in common, so that nothing
# has to be kept back when these are all that has arrived.
LIST = "LINK"

_LINE, _END = b"\r\n", b"\r\n\r\n"


class Framing:
    """Follows the requests of one connection (RFC 9112 §6, §7.1) and replaces the method LIST.

    It changes no length and keeps nothing back. What it does not understand it leaves to the
    parser, that is stricter: from there on it only passes on.
    """

    __slots__ = ("_chunked", "_fields", "_kept", "_left", "_lost", "_trailers")

    def __init__(self) -> None:
        # All but the first line of the last plain request: the next one may end in the same.
        self._fields = b""
        # What was passed on of the head or the line that is arriving.
        self._kept = b""
        # Bytes that are left of a body or a chunk, with the end of the line behind it.
        self._left = 0
        # Whether a chunked body is arriving, and whether its trailers are.
        self._chunked = False
        self._trailers = False
        self._lost = False

    def translated(self, data: bytes) -> bytes:
        """The bytes for the parser; as many as came."""
        if self._left >= len(data) or self._lost:
            self._left -= 0 if self._lost else len(data)
            return data
        if not (self._kept or self._left or self._chunked) and self._is_plain(data):
            return data
        before = len(self._kept)
        whole = self._kept + data
        changed = bytearray(whole)
        place: int | None = 0
        self._kept = b""
        while place is not None and place < len(whole):
            begin, place = place, self._step(whole, changed, place)
            if place is None:
                self._kept = whole[begin:]
        self._lost = self._lost or len(self._kept) > MAX_HEAD
        if self._lost:
            self._kept = b""
        return bytes(changed[before:])

    def _is_plain(self, data: bytes) -> bool:
        """Whether it is one request without a body, as nearly all are, and not LIST."""
        if data[0] in b"L\r\n":
            return False
        fields = data[data.find(_LINE) :]
        if fields == self._fields:
            return True
        head = fields.lower()
        plain = (
            len(head) - head.find(_END) == len(_END)
            and b"content-length" not in head
            and b"transfer-encoding" not in head
        )
        if plain:
            self._fields = fields
        return plain

    def _step(self, whole: bytes, changed: bytearray, place: int) -> int | None:
        """Go on from this place. Returns where to; None if it has to be tried again with more."""
        if self._left:
            taken = min(self._left, len(whole) - place)
            self._left -= taken
            return place + taken
        if self._lost:
            return len(whole)
        if self._chunked:
            return self._line(whole, place)
        # Parsers pass over empty lines before a request (RFC 9112 §2.2).
        if whole[place] in _LINE:
            return place + 1
        _replace(changed, place)
        end = whole.find(_END, place)
        if end < 0:
            return None
        self._begin_body(whole[place : end + 2].lower())
        return end + len(_END)

    def _begin_body(self, head: bytes) -> None:
        fields = [line.partition(b":") for line in head.split(_LINE)[1:]]
        lengths = [value.strip() for name, _, value in fields if name == b"content-length"]
        codings = [value for name, _, value in fields if name == b"transfer-encoding"]
        if codings:
            self._chunked = codings[-1].rpartition(b",")[2].strip() == b"chunked"
            self._lost = bool(lengths) or not self._chunked
        elif lengths:
            self._lost = len(lengths) > 1 or not (lengths[0].isdigit() and len(lengths[0]) < 19)
            self._left = 0 if self._lost else int(lengths[0])

    def _line(self, whole: bytes, place: int) -> int | None:
        """The line before a chunk, or one of the trailers."""
        end = whole.find(_LINE, place)
        if end < 0:
            return None
        line = whole[place:end]
        if self._trailers:
            self._trailers = self._chunked = bool(line)
            return end + len(_LINE)
        digits = line.partition(b";")[0].strip()
        try:
            size = int(digits, 16)
        except ValueError:
            size = -1
        self._lost = not 0 <= size < 1 << 62
        if size > 0 and not self._lost:
            self._left = size + len(_LINE)
        self._trailers = size == 0
        return end + len(_LINE)


def _replace(changed: bytearray, place: int) -> None:
    """Let LIST be what handlers see of it, and whatever else begins like either be no method."""
    method = changed[place : place + 4]
    if method.startswith(b"LIS"):
        changed[place : place + 3] = b"LIN"
        if len(method) == 4:
            changed[place + 3] = ord("K") if method == b"LIST" else 0
    elif method.startswith(b"LIN"):
        changed[place + 2] = 0
