"""Empty qcow2 images that name any backing file, as no tool would write them, and cases of such names."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

CLUSTER = 65536


def overlay(path: Path, backing: str | bytes, fmt: str | None = None, size: int = 1 << 20) -> Path:
    """Write an image of `size` bytes with nothing in it whose header names `backing` (qcow2.txt, "Header")."""
    name = backing if isinstance(backing, bytes) else backing.encode()
    extensions = b""
    if fmt is not None:
        raw = fmt.encode()
        extensions += struct.pack(">II", 0xE2792ACA, len(raw)) + raw.ljust(-(-len(raw) // 8) * 8, b"\0")
    extensions += bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        104 + len(extensions) if name else 0,
        len(name),
        16,
        size,
        0,
        1,
        3 * CLUSTER,
        CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        4,
        104,
    )
    image = bytearray(4 * CLUSTER)
    start = header + extensions + name
    image[: len(start)] = start
    image[CLUSTER : CLUSTER + 8] = struct.pack(">Q", 2 * CLUSTER)
    image[2 * CLUSTER : 2 * CLUSTER + 8] = struct.pack(">4H", 1, 1, 1, 1)
    path.write_bytes(image)
    return path


def prepare(root: Path) -> None:
    """The files that the cases name."""
    (root / "a.img").write_bytes(b"\x11" * CLUSTER + bytes(15 * CLUSTER))
    (root / "a:b.img").write_bytes(bytes(CLUSTER))
    (root / "empty.img").write_bytes(b"")
    overlay(root / "q.qcow2", "")
    (root / "short.img").write_bytes((root / "q.qcow2").read_bytes()[:60])
    overlay(root / "o.qcow2", "a.img", "raw")
    (root / "sub").mkdir()
    overlay(root / "sub" / "rel.qcow2", "../a.img", "raw")
    overlay(root / "sub" / "rel2.qcow2", "rel.qcow2", "qcow2")


class Case(NamedTuple):
    """A backing name and its format, and what QSD 10.0.2 makes of it: the message after "Could not open backing
    file: ", or (driver and filename of the backing node, those of its ``file`` child)."""

    name: str
    fmt: str | None
    result: str | tuple[tuple[str, str], ...]


FILE_A = ("file", "a.img")
RAW_A = (("raw", "a.img"), FILE_A)
PART = '{"driver":"raw","offset":512,"file":{"driver":"file","filename":"a.img"}}'

CASES = [
    # Paths and protocols.
    Case("a.img", "raw", RAW_A),
    Case("a.img", None, RAW_A),
    Case("file:a.img", None, RAW_A),
    Case("a.img", "file", (FILE_A,)),
    Case("file:a.img", "file", (FILE_A,)),
    Case("q.qcow2", "qcow2", (("qcow2", "q.qcow2"), ("file", "q.qcow2"))),
    Case("q.qcow2", None, (("qcow2", "q.qcow2"), ("file", "q.qcow2"))),
    Case("q.qcow2", "raw", (("raw", "q.qcow2"), ("file", "q.qcow2"))),
    Case("sub/rel2.qcow2", None, (("qcow2", "sub/rel2.qcow2"), ("file", "sub/rel2.qcow2"))),
    Case("empty.img", None, (("raw", "empty.img"), ("file", "empty.img"))),
    Case("./a:b.img", None, (("raw", "./a:b.img"), ("file", "./a:b.img"))),
    Case("a:b.img", None, "Unknown protocol 'a'"),
    Case("/foo:bar", None, "Could not open '/foo:bar': No such file or directory"),
    Case("foo/b:bar", None, "Could not open 'foo/b:bar': No such file or directory"),
    Case("nosuch.img", None, "Could not open 'nosuch.img': No such file or directory"),
    Case("nosuch.img", "raw", "Could not open 'nosuch.img': No such file or directory"),
    Case("sub", None, "'file' driver requires 'sub' to be a regular file"),
    Case("sub", "raw", "'file' driver requires 'sub' to be a regular file"),
    Case("file:", None, "The 'file' block driver requires a file name"),
    Case("file:/dev/null", None, "'file' driver requires '/dev/null' to be a regular file"),
    Case("/dev/zero", "file", "'file' driver requires '/dev/zero' to be a regular file"),
    Case("/dev/null", None, (("raw", "/dev/null"), ("host_device", "/dev/null"))),
    Case("host_device:/dev/null", None, (("raw", "/dev/null"), ("host_device", "/dev/null"))),
    Case("host_device:a.img", None, "'host_device' driver requires 'a.img' to be either a character or block device"),
    Case("null-co://", None, (("raw", "null-co://"), ("null-co", "null-co://"))),
    Case("null-aio://", None, (("raw", "null-aio://"), ("null-aio", "null-aio://"))),
    Case("null-co://x", None, "The only allowed filename for this driver is 'null-co://'"),
    Case("null-co:", None, "The only allowed filename for this driver is 'null-co://'"),
    Case("a.img", "null-co", "The only allowed filename for this driver is 'null-co://'"),
    Case("raw:a.img", None, "Unknown protocol 'raw'"),
    Case("qcow2:q.qcow2", None, "Unknown protocol 'qcow2'"),
    Case("foo:bar", "raw", "Unknown protocol 'foo'"),
    Case("a.img", "nosuch", "Unknown driver 'nosuch'"),
    Case("a.img", "qcow2", "Image is not in qcow2 format"),
    Case("short.img", None, "qcow2 header too short"),
    # json: names.
    Case(
        f"json:{PART}",
        None,
        (("raw", 'json:{"offset": 512, "driver": "raw", "file": {"driver": "file", "filename": "a.img"}}'), FILE_A),
    ),
    Case('json:{"driver":"raw","file.driver":"file","file.filename":"a.img"}', "raw", RAW_A),
    Case('json:{"file":{"driver":"file","filename":"a.img"}}', None, RAW_A),
    Case('json:{"file.filename":"q.qcow2"}', None, (("qcow2", "q.qcow2"), ("file", "q.qcow2"))),
    Case('json:{"driver":"qcow2","file.filename":"q.qcow2"}', "raw", (("raw", "q.qcow2"), ("file", "q.qcow2"))),
    Case('json:{"file.filename":"file:a.img"}', None, "Could not open 'file:a.img': No such file or directory"),
    Case('json:{"file":"by-name"}', None, (("raw", "null-co://"), ("null-co", "null-co://"))),
    Case('json:{"file":"nosuch"}', None, "Cannot find device='nosuch' nor node-name='nosuch'"),
    Case("json:{'driver':'null-co'}", None, (("null-co", "null-co://"),)),
    Case('json:{"driver":"null-co","node-name":"named"}', None, (("null-co", "null-co://"),)),
    Case('json:{"driver":"null-co","node-name":"top"}', None, "Duplicate nodes with node-name='top'"),
    Case(
        'json:{"driver":"null-co","size":4096,"read-zeroes":true}',
        None,
        (("null-co", 'json:{"read-zeroes": true, "driver": "null-co", "size": 4096}'),),
    ),
    Case(
        'json:{"driver":"null-co","cache.direct":true,"cache":{"no-flush":true},"detect-zeroes":"on"}',
        None,
        (("null-co", "null-co://"),),
    ),
    Case(
        'json:{"driver":"raw","file":{"driver":"raw","file":{"driver":"file","filename":"a.img"}}}',
        None,
        (
            (
                "raw",
                'json:{"driver": "raw", "file": {"driver": "raw", "file": {"driver": "file", "filename": "a.img"}}}',
            ),
            ("raw", "a.img"),
        ),
    ),
    Case(
        'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"o.qcow2"}}',
        None,
        (
            ("qcow2", 'json:{"backing": null, "driver": "qcow2", "file": {"driver": "file", "filename": "o.qcow2"}}'),
            ("file", "o.qcow2"),
        ),
    ),
    Case("json:{", None, "Could not parse the JSON options: JSON parse error, premature EOI"),
    Case("json:[]", None, "Invalid JSON object given"),
    Case(f"json:{PART} 1", None, "Could not parse the JSON options: Expecting at most one JSON value"),
    Case("json:{}", None, "Must specify either driver or file"),
    Case('json:{"filename":"a.img"}', None, "Must specify either driver or file"),
    Case('json:{"driver":5}', None, "Must specify either driver or file"),
    Case('json:{"driver":"nosuch"}', None, "Unknown driver 'nosuch'"),
    Case('json:{"driver":"file"}', None, "The 'file' block driver requires a file name"),
    Case('json:{"driver":"file","filename":7}', None, "The 'file' block driver requires a file name"),
    Case('json:{"driver":"null-co"}', "raw", 'A block device must be specified for "file"'),
    Case('json:{"driver":"raw","file":[1]}', None, "Must specify either driver or file"),
    Case(
        'json:{"driver":"file","filename":"a.img","foo":1}',
        None,
        "Block protocol 'file' doesn't support the option 'foo'",
    ),
    Case(
        'json:{"driver":"raw","file":{"driver":"file","filename":"a.img","foo":1}}',
        None,
        "Block protocol 'file' doesn't support the option 'foo'",
    ),
    Case(
        'json:{"driver":"raw","foo":1,"file":{"driver":"file","filename":"a.img"}}',
        None,
        "Block format 'raw' does not support the option 'foo'",
    ),
    Case(
        'json:{"driver":"raw","offset":"zz","file":{"driver":"file","filename":"a.img"}}',
        None,
        "Parameter 'offset' expects a non-negative number below 2^64",
    ),
    Case(
        'json:{"driver":"raw","offset":1.5,"file":{"driver":"file","filename":"a.img"}}',
        None,
        "Parameter 'offset' expects a non-negative number below 2^64",
    ),
    Case(
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"q.qcow2"},"l2-cache-size":"64K"}',
        None,
        (("qcow2", "q.qcow2"), ("file", "q.qcow2")),
    ),
    Case(
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"q.qcow2"},"lazy-refcounts":"on"}',
        None,
        (("qcow2", "q.qcow2"), ("file", "q.qcow2")),
    ),
    Case('json:{"driver":"file","filename":"a.img","aio":"zz"}', None, "invalid parameter value: zz"),
    Case('json:{"driver":"file","filename":"a.img","detect-zeroes":"zz"}', None, "invalid parameter value: zz"),
    Case('json:{"driver":"file","filename":"a.img","discard":"zz"}', None, "Invalid discard option"),
    Case(
        'json:{"driver":"file","filename":"a.img","cache":{"zz":1}}',
        None,
        "Block protocol 'file' doesn't support the option 'cache.zz'",
    ),
    Case(
        'json:{"driver":"raw","file":"by-name","file.driver":"file"}',
        None,
        "Cannot reference an existing block device with additional options or a new filename",
    ),
    Case('json:{"driver":"file","filename":"a.img","node-name":"1"}', None, "Invalid node-name: '1'"),
    Case('json: {"driver":"null-co"} ', None, (("null-co", "null-co://"),)),
    Case('JSON:{"driver":"null-co"}', None, "Unknown protocol 'JSON'"),
    Case("json:", None, "Could not parse the JSON options: Expecting a JSON value"),
    Case('json:{"a":' + "[" * 500 + "]" * 500 + "}", None, "Must specify either driver or file"),
    Case(
        'json:{"driver":"raw","offset":-1,"file":{"driver":"file","filename":"a.img"}}',
        None,
        "Value '-1' is out of range for parameter 'offset'",
    ),
]


def top(filename: str, **more: Any) -> dict[str, Any]:
    """``blockdev-add`` of an overlay as the node "top"."""
    return {
        "driver": "qcow2",
        "node-name": "top",
        "read-only": True,
        "file": {"driver": "file", "filename": filename},
        **more,
    }


BY_NAME = {"driver": "null-co", "node-name": "by-name", "read-only": True}


def shape(graph: dict[str, Any], nodes: list[dict[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Driver and filename of the backing node of "top" and of its ``file`` child, from the replies of
    ``x-debug-query-block-graph`` and ``query-named-block-nodes``."""
    names = {vertex["id"]: vertex["name"] for vertex in graph["nodes"]}
    children = {(names[edge["parent"]], edge["name"]): names[edge["child"]] for edge in graph["edges"]}
    known = {node["node-name"]: node for node in nodes}
    found = []
    name = children.get(("top", "backing"))
    while name is not None and len(found) < 2:
        found.append((known[name]["drv"], known[name]["file"]))
        name = children.get((name, "file"))
    return tuple(found)
