"""JSON as QMP takes it: values arrive in pieces of any size, one after the other, with nothing needed between them.

The grammar is RFC 8259 with single-quoted strings. A mistake is reported once, in QSD's words, and the stream goes on:
what follows the mistake is skipped up to a structural character, a control character (line ends are such) or a byte
0xFE or 0xFF, which no valid text has, so that a client can bring the stream to a known state (qmp-spec, "Recovering
from errors"). Memory is bounded by `MAX_SIZE` and `MAX_TOKENS`.

What clients really send, an object in a line of plain ASCII, takes a short road through the standard library's scanner,
which gives the same values.
"""

from __future__ import annotations

import json.scanner
import re
from typing import Any, Final

from pyqsd.qapi.errors import Error

#: The bytes in the tokens of one value.
MAX_SIZE = 64 << 20
#: The tokens of one value.
MAX_TOKENS = 2 << 20
#: Arrays and objects within each other.
MAX_NESTING = 1024


class Incomplete:
    """The type of `INCOMPLETE`."""


#: What `JsonStream.next` answers when it needs more input.
INCOMPLETE: Final = Incomplete()


def _error(text: str) -> Error:
    # A keyword may be as long as it likes; QSD tells its beginning.
    return Error(f"JSON parse error, {text[:1023]}")


# --- the short road ---------------------------------------------------------------------------------------------------


class _Unusual(ValueError):
    """The text needs the long road."""


def _unusual(_: str) -> Any:
    raise _Unusual


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Unusual
    return result


_context: Any = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_unusual)
_scan: Any = json.scanner.make_scanner(_context)
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_SHORT_ROAD_LIMIT = 1 << 20


def _decode_plain(line: bytes) -> Any:
    """The object in `line` (blanks around it allowed), if it is plain enough for the short road; else INCOMPLETE."""
    if len(line) > _SHORT_ROAD_LIMIT or not line.isascii() or b"\\u" in line or _LONG_NUMBER.search(line):
        return INCOMPLETE
    text = line.decode("ascii").strip(" \t\r\n")
    if text[:1] != "{":
        return INCOMPLETE
    try:
        value, end = _scan(text, 0)
    except (ValueError, StopIteration, RecursionError):
        return INCOMPLETE
    return value if end == len(text) else INCOMPLETE


# --- tokens -----------------------------------------------------------------------------------------------------------

# States of the lexer.
_START, _DQ, _DQ_ESCAPE, _SQ, _SQ_ESCAPE, _WORD, _RECOVERY = range(7)
_MINUS, _ZERO, _DIGITS, _POINT, _FRACTION, _E, _E_SIGN, _EXPONENT = range(7, 15)

_INT_STATES = {_ZERO, _DIGITS}
#: States in which a token is complete as soon as something else follows.
_TERMINAL = {_ZERO, _DIGITS, _FRACTION, _EXPONENT, _WORD}

_STRUCTURE = frozenset(b"{}[]:,")
_BLANKS = frozenset(b" \t\r\n")
_DIGIT = frozenset(b"0123456789")

# A token with everything needed to see that it is complete.
_TOKEN = re.compile(
    rb"[ \t\r\n]*(?:"
    rb"([{}\[\]:,])"
    rb'|("[^"\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*)*")'
    rb"|('[^'\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*)*')"
    rb"|(-?(?:0|[1-9][0-9]*)(?=[^0-9.eE])"
    rb"|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+(?=[^0-9eE])|(?:\.[0-9]+)?[eE][+-]?[0-9]+(?=[^0-9])))"
    rb"|([a-z]+(?=[^a-z]))"
    rb")"
)

# Runs that keep the lexer in its state.
_RUNS = {
    _START: re.compile(rb"[ \t\r\n]*"),
    _DQ: re.compile(rb'[^"\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^"\\\x00-\x1f\xfe\xff]*)*'),
    _SQ: re.compile(rb"[^'\\\x00-\x1f\xfe\xff]*(?:\\[\x20-\xfd][^'\\\x00-\x1f\xfe\xff]*)*"),
    _WORD: re.compile(rb"[a-z]*"),
    _RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f\xfe\xff{}\[\]:,]*"),
    _DIGITS: re.compile(rb"[0-9]*"),
    _FRACTION: re.compile(rb"[0-9]*"),
    _EXPONENT: re.compile(rb"[0-9]*"),
}


def _step(state: int, byte: int) -> int | None:
    """The state after `byte` inside a token; None when `byte` cannot follow."""
    if state in (_DQ_ESCAPE, _SQ_ESCAPE):
        return state - 1 if 0x20 <= byte <= 0xFD else None
    if state in (_DQ, _SQ):
        return state + 1 if byte == 0x5C else None
    digit = byte in _DIGIT
    if state == _MINUS:
        return _ZERO if byte == 0x30 else _DIGITS if digit else None
    if state in _INT_STATES:
        if byte == 0x2E:
            return _POINT
        if byte in b"eE":
            return _E
        return None
    if state == _POINT:
        return _FRACTION if digit else None
    if state == _FRACTION:
        return _E if byte in b"eE" else None
    if state == _E:
        return _E_SIGN if byte in b"+-" else _EXPONENT if digit else None
    if state == _E_SIGN:
        return _EXPONENT if digit else None
    return None


class JsonStream:
    """An incremental parser: `feed` bytes, then take values with `next` until it is `INCOMPLETE`."""

    def __init__(self) -> None:
        self._data = b""
        self._position = 0
        #: Up to where in `_data` the short road has been tried.
        self._tried = 0
        self._state = _START
        #: The token being read, across pieces.
        self._partial = bytearray()
        self._reset()

    def _reset(self) -> None:
        self._braces = 0
        self._brackets = 0
        #: The tokens of the value being read, a blank after each.
        self._tokens = bytearray()
        self._count = 0

    def feed(self, data: bytes) -> None:
        """Append input."""
        if self._position < len(self._data):
            data = self._data[self._position :] + data
            self._tried = max(0, self._tried - self._position)
        else:
            self._tried = 0
        self._data = bytes(data)
        self._position = 0

    @property
    def unread(self) -> int:
        """Bytes that were fed and not looked at yet."""
        return len(self._data) - self._position

    def next(self) -> Any:
        """The next value, or `INCOMPLETE`. Raises Error for a mistake in the input; the next call goes on after it."""
        data = self._data
        while self._position < len(data):
            if self._state == _START and not self._count and self._position >= self._tried:
                end = data.find(b"\n", self._position) + 1 or len(data)
                value = _decode_plain(data[self._position : end])
                self._tried = end
                if value is not INCOMPLETE:
                    self._position = end
                    return value
            token = self._token()
            if token is not None and self._add(token):
                return self._parse()
        return INCOMPLETE

    def finish(self) -> Any:
        """The last value, when the input ends here; `INCOMPLETE` if there is none. Raises Error."""
        token = bytes(self._partial)
        state = self._state
        self._partial.clear()
        self._state = _START
        if token:
            if state not in _TERMINAL:
                self._reset()
                raise _stray(token)
            if self._add(token):
                return self._parse()
        return self._parse() if self._count else INCOMPLETE

    # --- the lexer ---

    def _token(self) -> bytes | None:
        """The next whole token; None when the data has ended, or after a piece of a token."""
        data, position, state = self._data, self._position, self._state
        if state == _START:
            match = _TOKEN.match(data, position)
            if match is not None:
                self._position = match.end()
                return match[match.lastindex or 0]
        run = _RUNS.get(state)
        if run is not None:
            end = run.match(data, position).end()  # type: ignore[union-attr]
            if state not in (_START, _RECOVERY):
                self._partial += data[position:end]
            position = end
            self._position = position
            if len(self._partial) > MAX_SIZE:
                return self._oversized()
            if position == len(data):
                return None
        byte = data[position]
        if state == _RECOVERY:
            self._state = _START
            return None
        if state == _START:
            return self._first(byte)
        if (state == _DQ and byte == 0x22) or (state == _SQ and byte == 0x27):
            self._position += 1
            return self._finish_token(byte)
        after = _step(state, byte)
        if after is None:
            # No digit may follow a zero; otherwise what is complete ends here.
            if state in _TERMINAL and not (state == _ZERO and byte in _DIGIT):
                return self._finish_token(None)
            self._position += 1
            raise self._stray(byte)
        self._partial.append(byte)
        self._position += 1
        self._state = after
        return self._oversized() if len(self._partial) > MAX_SIZE else None

    def _first(self, byte: int) -> bytes | None:
        """The first byte of a token."""
        self._position += 1
        if byte in _STRUCTURE:
            return bytes((byte,))
        if byte == 0x22:
            self._state = _DQ
        elif byte == 0x27:
            self._state = _SQ
        elif byte == 0x2D:
            self._state = _MINUS
        elif byte == 0x30:
            self._state = _ZERO
        elif byte in _DIGIT:
            self._state = _DIGITS
        elif 0x61 <= byte <= 0x7A:
            self._state = _WORD
        else:
            raise self._stray(byte)
        self._partial.append(byte)
        return None

    def _finish_token(self, last: int | None) -> bytes:
        if last is not None:
            self._partial.append(last)
        token = bytes(self._partial)
        self._partial.clear()
        self._state = _START
        return token

    def _oversized(self) -> bytes:
        """A token that alone is beyond the limit: it is cut there, and `_add` refuses it."""
        excess = len(self._partial) - (MAX_SIZE + 1)
        self._position -= excess
        del self._partial[MAX_SIZE + 1 :]
        return self._finish_token(None)

    def _stray(self, byte: int) -> Error:
        self._partial.append(byte)
        error = _stray(bytes(self._partial))
        self._partial.clear()
        self._state = _RECOVERY
        self._reset()
        return error

    # --- values ---

    def _add(self, token: bytes) -> bool:
        """Count `token`; True when it completes a value, or makes that impossible."""
        if len(token) == 1:
            if token == b"{":
                self._braces += 1
            elif token == b"}":
                self._braces -= 1
            elif token == b"[":
                self._brackets += 1
            elif token == b"]":
                self._brackets -= 1
        limit = ""
        if len(self._tokens) - self._count + len(token) + 1 > MAX_SIZE:
            limit = "JSON token size limit exceeded"
        elif self._count + 1 > MAX_TOKENS:
            limit = "JSON token count limit exceeded"
        elif self._braces + self._brackets > MAX_NESTING:
            limit = "JSON nesting depth limit exceeded"
        if limit:
            self._reset()
            raise Error(limit)
        self._tokens += token
        self._tokens.append(0x20)
        self._count += 1
        return not ((self._braces > 0 or self._brackets > 0) and self._braces >= 0 and self._brackets >= 0)

    def _parse(self) -> Any:
        tokens = bytes(self._tokens)
        self._reset()
        value = _decode_plain(tokens)
        return value if value is not INCOMPLETE else _Parser(tokens).value()


def _stray(token: bytes) -> Error:
    return Error(f"JSON parse error, stray '{printable(token)}'")


def printable(raw: bytes) -> str:
    """`raw` as the text of a message: up to a NUL byte, with U+FFFD for each sequence that is not modified UTF-8."""
    raw = raw.partition(b"\0")[0]
    if raw.isascii():
        return raw.decode("ascii")
    parts: list[str] = []
    position = 0
    while position < len(raw):
        lead = raw[position]
        position += 1
        if lead < 0x80:
            parts.append(chr(lead))
            continue
        # As many bytes follow as the lead byte has ones at its left, less one.
        following = 7 - (lead ^ 0xFF).bit_length() if lead < 0xFE else 0
        code = lead & (0x7F >> following) if following else -1
        start = position
        while following > position - start and position < len(raw) and raw[position] & 0xC0 == 0x80:
            code = code << 6 | raw[position] & 0x3F
            position += 1
        shortest = (-1, 0x80, 0x800, 0x10000, 0x200000, 0x4000000)[position - start]
        complete = position - start == following and (code >= shortest or raw[start - 1 : position] == b"\xc0\x80")
        parts.append(chr(code) if complete and code >= 0 and _valid(code) else "\ufffd")
    return "".join(parts)


class _Parser:
    """Parses the tokens of one value. Nesting is kept on a list, not on the call stack."""

    def __init__(self, tokens: bytes) -> None:
        self._tokens = tokens
        self._position = 0

    def _next(self) -> bytes:
        """The next token; b"" at the end."""
        match = _TOKEN.match(self._tokens, self._position)
        if match is None:
            return b""
        self._position = match.end()
        return match[match.lastindex or 0]

    def value(self) -> Any:
        """The value. Raises Error."""
        # Containers that are open: the container, and for an object the key that its next value belongs to.
        stack: list[tuple[Any, str | None]] = []
        container: Any = None
        key: str | None = None
        wants_key = False
        while True:
            token = self._next()
            if not token:
                raise _error("premature EOI")
            if token in (b"{", b"["):
                if token == b"{":
                    inner: Any = {}
                    close = b"}"
                else:
                    inner = []
                    close = b"]"
                if self._peek() != close:
                    stack.append((container, key))
                    container, key, wants_key = inner, None, token == b"{"
                    continue
                self._next()
                value = inner
            else:
                value = _scalar(token)
            # `value` is complete: it is a key, or belongs into its container, which it may complete in turn.
            while True:
                if not stack:
                    return value
                if wants_key:
                    if not isinstance(value, str):
                        raise _error("key is not a string in object")
                    colon = self._next()
                    if colon != b":":
                        raise _error("missing : in object pair" if colon else "premature EOI")
                    key, wants_key = value, False
                    break
                if isinstance(container, dict):
                    if key in container:
                        raise _error("duplicate key")
                    container[key] = value
                    close, kind = b"}", "dict"
                else:
                    container.append(value)
                    close, kind = b"]", "list"
                token = self._next()
                if token == b",":
                    wants_key = kind == "dict"
                    break
                if token != close:
                    raise _error(f"expected separator in {kind}" if token else "premature EOI")
                value = container
                container, key = stack.pop()
                wants_key = isinstance(container, dict) and key is None

    def _peek(self) -> bytes:
        position = self._position
        token = self._next()
        self._position = position
        return token


_WORDS = {b"true": True, b"false": False, b"null": None}


def _scalar(token: bytes) -> Any:
    first = token[0]
    if first in b"\"'":
        return _string(token)
    if first in b"-0123456789":
        return _number(token)
    if first in _STRUCTURE:
        raise _error("expecting value")
    if token not in _WORDS:
        raise _error(f"invalid keyword '{token.decode('ascii')}'")
    return _WORDS[token]


def _number(token: bytes) -> int | float:
    if b"." in token or b"e" in token or b"E" in token:
        return float(token)
    if len(token) <= 20:
        number = int(token)
        if -(1 << 63) <= number < 1 << 64:
            return number
    return float(token)


_ESCAPES = {0x22: '"', 0x27: "'", 0x5C: "\\", 0x2F: "/", 0x62: "\b", 0x66: "\f", 0x6E: "\n", 0x72: "\r", 0x74: "\t"}
_PLAIN = re.compile(rb"[^\\]+")
_HEX = re.compile(rb"[0-9a-fA-F]{4}")


def _valid(code: int) -> bool:
    """Whether `code` is a character: no surrogate, no noncharacter."""
    return code <= 0x10FFFF and not (0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


def _string(token: bytes) -> str:
    body = token[1:-1]
    if b"\\" not in body:
        return _text(body)
    parts: list[str] = []
    position = 0
    while position < len(body):
        match = _PLAIN.match(body, position)
        if match is not None:
            parts.append(_text(match[0]))
            position = match.end()
            continue
        escape = body[position + 1]
        if escape == 0x75:
            char, position = _unicode_escape(body, position, token)
            parts.append(char)
            continue
        if escape not in _ESCAPES:
            raise _error("invalid escape sequence in string")
        parts.append(_ESCAPES[escape])
        position += 2
    return "".join(parts)


def _text(raw: bytes) -> str:
    # Modified UTF-8: two bytes may stand for NUL.
    try:
        text = raw.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        raise _error("invalid UTF-8 sequence in string")
    if not text.isascii() and not all(_valid(ord(char)) for char in set(text)):
        raise _error("invalid UTF-8 sequence in string")
    return text


def _unicode_escape(body: bytes, position: int, token: bytes) -> tuple[str, int]:
    """The character of the ``\\u`` escape at `position`, and the position after it."""
    match = _HEX.match(body, position + 2)
    code = int(match[0], 16) if match else -1
    if 0xD800 <= code <= 0xDBFF and body[position + 6 : position + 8] == b"\\u":
        low = _HEX.match(body, position + 8)
        trail = int(low[0], 16) if low else -1
        if 0xDC00 <= trail <= 0xDFFF:
            code = 0x10000 + ((code - 0xD800) << 10) + (trail - 0xDC00)
            if not _valid(code):
                raise _error(f"{printable(body[position : position + 12])} is not a valid Unicode character")
            return chr(code), position + 12
    if code < 0 or not _valid(code):
        raise _error(f"{printable(token[1 + position : 1 + position + 6])} is not a valid Unicode character")
    return chr(code), position + 6


def parse_text(text: str) -> Any:
    """The one value in `text` (command line). Raises Error."""
    stream = JsonStream()
    stream.feed(text.encode("utf-8", "surrogateescape"))
    value = stream.next()
    if value is INCOMPLETE:
        value = stream.finish()
        if value is INCOMPLETE:
            raise Error("Expecting a JSON value")
        return value
    try:
        alone = stream.next() is INCOMPLETE and stream.finish() is INCOMPLETE
    except Error:
        alone = False
    if not alone:
        raise Error("Expecting at most one JSON value")
    return value
