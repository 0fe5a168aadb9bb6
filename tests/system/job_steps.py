"""Steps of differential sessions with block jobs."""

from __future__ import annotations

import json
from typing import Any

from tests.support import images, peers
from tests.system.differential import Context, Do, cmd

GRAPH = cmd("x-debug-query-block-graph")


def shown(value: Any) -> Any:
    """What query-named-block-nodes tells, but for how much is allocated, and how long files are that grow."""
    if isinstance(value, dict):
        hidden = {"actual-size"} | ({"virtual-size"} if value.get("format") == "file" else set())
        return {key: shown(item) for key, item in value.items() if key not in hidden}
    return [shown(item) for item in value] if isinstance(value, list) else value


NODES = Do("nodes", lambda context: shown(context.daemon.qmp.execute("query-named-block-nodes")))
FLAT = Do("flat nodes", lambda context: shown(context.daemon.qmp.execute("query-named-block-nodes", flat=True)))


def told(context: Context) -> list[Any]:
    """The events since the last time, in order; without those of a job that stands still while the graph is drained,
    which depend on when that is."""
    events = context.daemon.qmp.events
    found: list[Any] = []
    for event in events:
        data = event["data"]
        still = event["event"] == "JOB_STATUS_CHANGE" and data["status"] in ("paused", "running")
        if not still or context.keep.get(f"status {data['id']}") is None:
            found.append([event["event"], data])
        if still and data["status"] == "running":
            context.keep[f"status {data['id']}"] = True
    events.clear()
    return found


def until(context: Context, status: str, id: str = "j") -> None:
    """Wait until the job has this status, as the last event that comes with it tells; events stay."""
    qmp = context.daemon.qmp

    def there() -> bool:
        for event in qmp.events:
            data = event["data"]
            if status == "pending":
                if event["event"] == "BLOCK_JOB_PENDING" and data["id"] == id:
                    return True
            elif status == "ready":
                if event["event"] == "BLOCK_JOB_READY" and data["device"] == id:
                    return True
            elif event["event"] == "JOB_STATUS_CHANGE" and data == {"id": id, "status": status}:
                return True
        return False

    while not there():
        message = qmp.message()
        assert "event" in message, message
        qmp.events.append(message)


def job(command: str, /, until_status: str = "null", **arguments: Any) -> Do:
    """Starts the job `j` and waits for its end, or another status: the reply, and all events in order."""

    def run(context: Context) -> Any:
        context.keep.pop("status j", None)
        reply = context.daemon.qmp.raw_command(cmd(command, job_id="j", **arguments))
        if "error" not in reply:
            until(context, until_status)
        return reply, told(context)

    return Do(f"{command} {json.dumps(arguments)} until {until_status}", run)


def verb(command: str, /, until_status: str | None = None, **arguments: Any) -> Do:
    """A command about the job `j`: the reply, and the events until then (or until a status)."""

    def run(context: Context) -> Any:
        reply = context.daemon.qmp.raw_command(cmd(command, **arguments))
        if until_status is not None and "error" not in reply:
            until(context, until_status)
        return reply, told(context)

    return Do(f"{command} {json.dumps(arguments)}" + (f" until {until_status}" if until_status else ""), run)


def image(name: str) -> Do:
    """What qemu-img finds in an image that is no longer open: its backing file, where its data is, its content."""

    def run(context: Context) -> Any:
        path = context.workdir / name
        checked = peers.run("qemu-img", "check", "-q", path, ok=())
        # It cannot be checked where its backing file is not to be found.
        assert not checked.returncode or "Could not open backing file" in checked.stderr, checked.stderr
        info = images.info(path)
        known = {key: info.get(key) for key in ("backing-filename", "backing-filename-format", "virtual-size")}
        done = peers.run("qemu-img", "map", "--output=json", path, cwd=context.workdir, ok=())
        parts = [[e["start"], e["length"], e["depth"], e["zero"], e["data"]] for e in json.loads(done.stdout or "[]")]
        merged: list[list[Any]] = []
        for part in parts:
            # Where it is in the file may split it.
            if merged and merged[-1][2:] == part[2:]:
                merged[-1][1] += part[1]
            else:
                merged.append(part)
        return known, merged

    return Do(f"image {name}", run)


def same(left: str, left_format: str, right: str, right_format: str) -> Do:
    """Both images have the same content."""

    def run(context: Context) -> None:
        argv = ["qemu-img", "compare", "-f", left_format, "-F", right_format, left, right]
        peers.run(*argv, cwd=context.workdir)

    return Do(f"compare {left} with {right}", run)
