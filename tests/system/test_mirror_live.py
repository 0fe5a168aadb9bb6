"""Mirrors and active commits under a client that writes, over random chains: nothing is lost or mixed up, however the
job ends. The client goes on with the node that is in the place of the source then."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.support.nbd import NbdClient
from tests.support.qmp import QmpClient
from tests.system.test_stream_live import SECTOR, Chain, Model, ended, one_request

ENDS = ("completes", "soft", "cancelled", "killed", "quits")


def start(qmp: QmpClient, chain: Chain, rng: random.Random, speed: int) -> tuple[str, str, str]:
    """Begins the job `j`. What was begun, the image that it writes to, and its format."""
    more: dict[str, Any] = {"speed": speed}
    if rng.random() < 0.3:
        more["filter-node-name"] = "filter"
    kind = rng.choice(("commit", "drive", "node"))
    if kind == "commit":
        base = rng.choice(chain.names[:-1])
        qmp.execute("block-commit", job_id="j", device=chain.top, base_node=base, **more)
        return f"commit to {base}", chain.files[base], chain.formats[base]
    more["sync"] = rng.choice(("full", "top", "none"))
    more["copy-mode"] = rng.choice(("background", "write-blocking"))
    more["granularity"] = rng.choice((0, 512, 4096, 1 << 20))
    more["buf-size"] = rng.choice((0, 70_000))
    fmt = "qcow2"
    if kind == "drive":
        more.pop("filter-node-name", None)
        more["unmap"] = rng.random() < 0.7
        qmp.execute(
            "drive-mirror", job_id="j", device=chain.top, target="target", format=fmt, node_name="target", **more
        )
    else:
        more["sync"] = "full"
        fmt = rng.choice(("raw", "qcow2"))
        options = f"cluster_size={rng.choice((512, 4096, 1 << 16))}" if fmt == "qcow2" else ""
        images.create(chain.root / "target", chain.sizes[chain.top], fmt, options)
        images.io(chain.root / "target", "write -P 99 0 100k", fmt=fmt)
        discard = rng.choice(("unmap", "ignore"))
        file = {"driver": "file", "filename": "target"}
        qmp.execute("blockdev-add", driver=fmt, node_name="target", file=file, discard=discard)
        qmp.execute("blockdev-mirror", job_id="j", device=chain.top, target="target", **more)
    return f"{kind} {more}", "target", fmt


def tell(qmp: QmpClient, rng: random.Random) -> None:
    """A command about the job, or one that shows it."""
    kind = rng.choice(("pause", "resume", "set-speed", "change", "query"))
    if kind == "set-speed":
        qmp.command("block-job-set-speed", device="j", speed=rng.choice((0, 1 << 20, 8 << 20)))
    elif kind == "change":
        qmp.command("block-job-change", id="j", type="mirror", **{"copy-mode": "write-blocking"})
    elif kind == "query":
        qmp.execute(rng.choice(("query-block-jobs", "query-named-block-nodes", "x-debug-query-block-graph")))
    else:
        qmp.command(f"block-job-{kind}", device="j")


def is_ready(qmp: QmpClient) -> bool:
    return any(event["event"] == "BLOCK_JOB_READY" for event in qmp.events)


def live(root: Path, seed: int, end: str) -> str:
    """One run; what was done."""
    rng = random.Random(seed)
    root.mkdir()
    chain = Chain(root, rng)
    model = Model(chain.content(chain.top))
    unit = SECTOR if end == "killed" else rng.choice((1, SECTOR))
    with DaemonProcess("pyqsd", chain.argv(), workdir=root) as daemon:
        qmp = daemon.qmp
        with NbdClient(root / "nbd.sock", "e") as client:
            for _ in range(rng.randrange(10)):
                one_request(client, model, rng, unit)
            speed = rng.choice((0, 1 << 20)) if end in ("completes", "soft") else rng.choice((1 << 17, 1 << 20))
            what, image, fmt = start(qmp, chain, rng, speed)
            stop_at, number = rng.randint(5, 100), 0
            while number < stop_at or (end in ("completes", "soft") and not is_ready(qmp)):
                number += 1
                one_request(client, model, rng, unit)
                assert not ended(daemon)
                if number > 100:
                    qmp.command("block-job-resume", device="j")
                    qmp.command("block-job-set-speed", device="j", speed=0)
                elif rng.random() < 0.1:
                    tell(qmp, rng)
            if end in ("completes", "soft", "cancelled"):
                qmp.command("block-job-resume", device="j")
                force = {"force": True} if end == "cancelled" else {}
                if end == "completes":
                    qmp.execute("block-job-complete", device="j")
                else:
                    qmp.execute("block-job-cancel", device="j", **force)
                while not ended(daemon):
                    if end != "soft":
                        one_request(client, model, rng, unit)
                copied = bytearray(model.now)
                # The source may be what is below the copy.
                for _ in range(0 if end == "soft" and "'none'" in what else 10):
                    one_request(client, model, rng, unit)
                assert not qmp.execute("query-block-jobs")
                drivers = [node["drv"] for node in qmp.execute("query-named-block-nodes")]
                assert "mirror_top" not in drivers
                client.disconnect()
            elif end == "killed":
                daemon.kill()
            else:
                assert daemon.terminate() == 0
        events = [
            event for event in qmp.events if event["event"].startswith("BLOCK_JOB") and "READY" not in event["event"]
        ]
    if end in ("completes", "soft"):
        assert [(event["event"], event["data"].get("error")) for event in events] == [("BLOCK_JOB_COMPLETED", None)]
    if end != "completes":
        model.check(chain.content(chain.top), end == "killed")
    if end in ("completes", "soft"):
        chain.files["copy"], chain.formats["copy"] = image, fmt
        if end == "completes":
            copied = model.now
        content = chain.content("copy")
        # The base of a commit may be longer.
        assert content[: len(copied)] == copied
    return f"{what}, {end}"


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_client_writes_meanwhile(tmp_path: Path, seed: int, end: str) -> None:
    live(tmp_path / "live", seed * len(ENDS) + ENDS.index(end), end)
