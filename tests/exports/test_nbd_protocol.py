"""The NBD wire format and the handshake, without sockets."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyqsd.exports.nbd import protocol as p
from pyqsd.exports.nbd.handshake import Handshake, match_query
from tests.exports import rawnbd as raw


@dataclass
class Offer:
    name: str
    description: str | None = None
    allocation_depth: bool = False
    size: int = 1 << 20
    flags: int = p.HAS_FLAGS
    minimum_block: int = 1
    maximum_payload: int = p.MAX_PAYLOAD
    bitmap_names: tuple[str, ...] = ()


EXPORTS = {
    offer.name: offer
    for offer in (Offer("disk", "a disk", True, bitmap_names=("b0", "b1")), Offer(""), Offer("big", minimum_block=512))
}


def shake() -> Handshake:
    return Handshake(EXPORTS.get, EXPORTS.values)


def feed(handshake: Handshake, data: bytes) -> bytes:
    handshake.feed(data)
    out = b""
    while (reply := handshake.step()) is not None:
        out += reply
    return out


def option(number: int, data: bytes = b"") -> bytes:
    return struct.pack(">QII", raw.IHAVEOPT, number, len(data)) + data


def replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, type, payload) of each reply; fails if something is left over."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack(">QIII", data[:20])
        assert magic == raw.REPLYMAGIC
        assert len(data) >= 20 + length
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def greeted(flags: int = 3) -> Handshake:
    handshake = shake()
    assert feed(handshake, struct.pack(">I", flags)) == b""
    return handshake


def test_hello() -> None:
    assert Handshake.hello() == b"NBDMAGICIHAVEOPT\x00\x03"


@pytest.mark.parametrize("flags", [4, 0x80000000, 7])
def test_unknown_client_flags_end_it(flags: int) -> None:
    handshake = shake()
    with pytest.raises(p.Violation, match="Unknown client flags"):
        feed(handshake, struct.pack(">I", flags))


def test_wrong_magic_is_noticed_before_the_option_is_complete() -> None:
    handshake = greeted()
    with pytest.raises(p.Violation, match="Bad magic"):
        feed(handshake, b"GET / HTTP/1.1")


def test_options_need_fixed_newstyle() -> None:
    with pytest.raises(p.Violation, match=r"Unsupported option 3 \(list\)"):
        feed(greeted(0), option(raw.OPT_LIST))
    handshake = greeted(0)
    out = feed(handshake, option(raw.OPT_EXPORT_NAME, b"disk"))
    assert out == struct.pack(">QH", 1 << 20, p.HAS_FLAGS) + bytes(124)
    assert handshake.chosen is EXPORTS["disk"]


def test_a_message_in_single_bytes_gives_the_same_replies() -> None:
    session = struct.pack(">I", 3) + b"".join(
        (
            option(raw.OPT_LIST),
            option(99, b"data of an unknown option"),
            option(raw.OPT_STRUCTURED_REPLY),
            option(raw.OPT_SET_META_CONTEXT, raw.meta("disk", "base:allocation", "qemu:dirty-bitmap:b1")),
            option(raw.OPT_INFO, raw.info("disk", 0, 1, 2, 3)),
            option(raw.OPT_LIST, b"unexpected"),
            option(raw.OPT_GO, raw.info("disk")),
        )
    )
    whole, pieces = shake(), shake()
    expected = feed(whole, session + b"rest")
    assert b"".join(feed(pieces, session[i : i + 1]) for i in range(len(session))) == expected
    for handshake in (whole, pieces):
        assert handshake.chosen is EXPORTS["disk"]
        assert handshake.mode == p.STRUCTURED
        assert handshake.contexts.ids == {0, 3}
    assert whole.rest() == b"rest"
    assert [kind for _, kind, _ in replies(expected)] == [
        *(p.REP_SERVER,) * 3,
        p.REP_ACK,
        p.REP_ERR_UNSUP,
        p.REP_ACK,
        p.REP_META_CONTEXT,
        p.REP_META_CONTEXT,
        p.REP_ACK,
        *(p.REP_INFO,) * 4,
        p.REP_ACK,
        p.REP_ERR_INVALID,
        *(p.REP_INFO,) * 3,
        p.REP_ACK,
    ]


def test_a_refused_option_is_answered_when_all_of_it_has_come() -> None:
    handshake = greeted()
    assert feed(handshake, struct.pack(">QII", raw.IHAVEOPT, 77, 5000) + bytes(4999)) == b""
    assert replies(feed(handshake, b"\0" + option(raw.OPT_ABORT)))[0][1] == p.REP_ERR_UNSUP
    assert handshake.ended


def test_skipped_data_is_not_kept() -> None:
    handshake = greeted()
    feed(handshake, struct.pack(">QII", raw.IHAVEOPT, 77, p.MAX_PAYLOAD))
    for _ in range(31):
        feed(handshake, bytes(1 << 20))
        assert len(handshake._data) == 0
    assert replies(feed(handshake, bytes(1 << 20)))[0][1] == p.REP_ERR_UNSUP


def test_too_long_options() -> None:
    with pytest.raises(p.Violation, match="larger than max len"):
        feed(greeted(), struct.pack(">QII", raw.IHAVEOPT, raw.OPT_LIST, p.MAX_PAYLOAD + 1))
    with pytest.raises(p.Violation, match="Bad length"):
        feed(greeted(), struct.pack(">QII", raw.IHAVEOPT, raw.OPT_EXPORT_NAME, 4097))
    handshake = greeted()
    feed(handshake, struct.pack(">QII", raw.IHAVEOPT, raw.OPT_INFO, (1 << 20) + 1))
    out = feed(handshake, bytes((1 << 20) + 1))
    assert replies(out)[0][1] == p.REP_ERR_TOO_BIG


def test_minimum_block_size_is_told_only_to_those_who_can_heed_it() -> None:
    handshake = greeted()
    refused = replies(feed(handshake, option(raw.OPT_INFO, raw.info("big"))))
    assert refused[-1][1] == p.REP_ERR_BLOCK_SIZE_REQD
    assert struct.pack(">HIII", 3, 512, 4096, p.MAX_PAYLOAD) in [data for _, _, data in refused]
    asked = replies(feed(handshake, option(raw.OPT_INFO, raw.info("big", 3))))
    assert asked[-1][1] == p.REP_ACK
    gone = replies(feed(handshake, option(raw.OPT_GO, raw.info("big"))))
    assert struct.pack(">HIII", 3, 1, 4096, p.MAX_PAYLOAD) in [data for _, _, data in gone]
    assert handshake.chosen is EXPORTS["big"]


def test_contexts_of_another_export_do_not_count() -> None:
    handshake = greeted()
    feed(handshake, option(raw.OPT_STRUCTURED_REPLY))
    feed(handshake, option(raw.OPT_SET_META_CONTEXT, raw.meta("disk", "base:allocation")))
    feed(handshake, option(raw.OPT_GO, raw.info("")))
    assert not handshake.contexts.ids


@pytest.mark.parametrize(
    ("query", "listed", "selected"),
    [
        ("base:", {0}, set()),
        ("base:allocation", {0}, {0}),
        ("base:alloc", set(), set()),
        ("base", set(), set()),
        ("", set(), set()),
        ("qemu:", {1, 2, 3}, set()),
        ("qemu:allocation-depth", {1}, {1}),
        ("qemu:dirty-bitmap:", {2, 3}, set()),
        ("qemu:dirty-bitmap:b1", {3}, {3}),
        ("qemu:dirty-bitmap:b", set(), set()),
        ("qemu:dirty-bitmap", set(), set()),
        ("other:thing", set(), set()),
    ],
)
def test_queries(query: str, listed: set[int], selected: set[int]) -> None:
    assert match_query(EXPORTS["disk"], query, True) == listed
    assert match_query(EXPORTS["disk"], query, False) == selected


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.ENOMEM, 12),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.ENOTSUP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.EBADF, 22),
        (errno.EINVAL, 22),
        (None, 5),
        (0, 5),
    ],
)
def test_error_numbers(number: int | None, error: int) -> None:
    assert p.nbd_error(number) == error


def test_status_payload() -> None:
    known = frozenset({0, 1, 5})
    good = struct.pack(">QII", 1 << 40, 5, 0)
    assert p.decode_status_payload(good, known) == (1 << 40, [5, 0])
    assert p.decode_status_payload(memoryview(good), known) == (1 << 40, [5, 0])
    for bad in (
        b"",
        good[:8],
        good[:-1],
        good + b"\0",
        struct.pack(">QI", 1, 2),
        struct.pack(">QII", 1, 0, 0),
        struct.pack(">Q4I", 1, 0, 1, 5, 0),
    ):
        assert p.decode_status_payload(bad, known) is None


def test_status_chunks() -> None:
    extents = [(4096, 0), (1 << 20, 3)]
    assert p.status_payload(7, extents, False) == struct.pack(">I4I", 7, 4096, 0, 1 << 20, 3)
    assert p.status_payload(7, extents, True) == struct.pack(">II4Q", 7, 2, 4096, 0, 1 << 20, 3)


def test_messages_are_cut() -> None:
    payload = p.error_payload(5, "x" * 5000)
    assert payload == struct.pack(">IH", 5, 4096) + b"x" * 4096
    assert p.sane_name("n" * 79) == "n" * 79
    assert p.sane_name("n" * 5000) == "n" * 80 + "..."


NAMES = st.one_of(st.sampled_from(["disk", "", "big"]), st.text(max_size=10)).map(str.encode)
BYTES = st.binary(max_size=64)
OPTIONS = st.one_of(
    st.tuples(st.integers(0, 12), BYTES),
    st.tuples(st.sampled_from([6, 7]), st.builds(lambda n, r: raw.info(n, *r), NAMES, st.lists(st.integers(0, 5)))),
    st.tuples(
        st.sampled_from([9, 10]),
        st.builds(
            lambda n, q: raw.meta(n, *q),
            NAMES,
            st.lists(st.sampled_from(["base:", "qemu:", "base:allocation", "qemu:dirty-bitmap:b0", "x:y", ""])),
        ),
    ),
    st.tuples(st.sampled_from([1]), NAMES),
    st.tuples(st.sampled_from([8, 11, 3, 5]), st.just(b"")),
).map(lambda pair: option(*pair))
DAMAGE = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(OPTIONS, max_size=8), DAMAGE, st.lists(st.integers(1, 50), max_size=10))
def test_fuzzed_handshake(messages: list[bytes], damage: list[tuple[int, int]], cuts: list[int]) -> None:
    """Whatever comes: a whole reply per option, or a Violation; never another exception, never endless memory."""
    data = bytearray(struct.pack(">I", 3) + b"".join(messages))
    for at, value in damage:
        if at < len(data):
            data[at] = value
    handshake = shake()
    out = b""
    try:
        for size in [*cuts, len(data)]:
            piece, data = data[:size], data[size:]
            out += feed(handshake, bytes(piece))
    except p.Violation:
        return
    if handshake.chosen is None:
        replies(out)
        assert len(handshake._data) < (1 << 20) + 64


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_fuzzed_status_payload(data: bytes) -> None:
    found = p.decode_status_payload(data, frozenset({0, 1, 2}))
    if found is not None:
        length, ids = found
        assert len(data) == 8 + 4 * len(ids)
        assert set(ids) <= {0, 1, 2}
        assert length == int.from_bytes(data[:8], "big")
