"""`python -m tests.soak`: the random tests for longer, with seeds that no test run has.

Bounded in time (`--minutes`) and in rounds (`--rounds`). Each round is one random workload, one through the compress
filter, one of an image with a data file that is resized again and again, one storm of concurrent requests, one of
changes of the graph under load, one of all features of qcow2 at once, one stream of a chain under load, one mirror or
active commit, one of backups that come to nothing, one kill -9, and fuzz on both protocols. The first failure ends it,
prints what it was and how to do that round again (`--seed`), and leaves the files there.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.drivers.qcow2 import mangled, test_check, test_check_only, test_check_repair
from tests.jobs import test_backup
from tests.support import images
from tests.support.daemon import DaemonProcess
from tests.support.nbd import is_alive
from tests.system import (
    fuzz,
    test_concurrency,
    test_crash,
    test_feature_storm,
    test_graph_changes,
    test_mirror_live,
    test_random_compressed,
    test_random_workload,
    test_stream_live,
)


def workload(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_random_workload.KINDS))
    spec = test_random_workload.KINDS[kind]
    # Not compared with what the real daemon ends with: it may trim a little more or less than we do.
    test_random_workload.run_workload("pyqsd", root / "workload", spec, 1500, seed)
    return kind


def data_file(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_random_workload.DATA_FILES))
    test_random_workload.run_data_file(root / "data", test_random_workload.DATA_FILES[kind], 1500, seed)
    return kind


def compressed(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_random_compressed.KINDS))
    test_random_compressed.run_workload(root / "compressed", kind, seed, 1000)
    return kind


def storm(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_concurrency.KINDS))
    test_concurrency.storm(root / "storm", kind, seed, requests=2000)
    return kind


def crash(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_crash.KINDS))
    (root / "crash").mkdir()
    test_crash.crash(root / "crash", test_crash.KINDS[kind], seed, "pyqsd")
    return kind


def graph(root: Path, seed: int) -> str:
    commands = test_graph_changes.storm(root / "graph", seed, steps=400, kill=bool(seed % 2))
    return f"{commands} changes, then {'SIGKILL' if seed % 2 else 'the usual end'}"


def stream(root: Path, seed: int) -> str:
    rng = random.Random(seed)
    return test_stream_live.live(root / "stream", seed, rng.choice(test_stream_live.ENDS))


def mirror(root: Path, seed: int) -> str:
    rng = random.Random(seed)
    return test_mirror_live.live(root / "mirror", seed, rng.choice(test_mirror_live.ENDS))


def features(root: Path, seed: int) -> str:
    kind = random.Random(seed).choice(list(test_feature_storm.KINDS))
    return f"{kind}: {test_feature_storm.storm(root / 'features', kind, seed, steps=200)} commands"


def abuse(root: Path, seed: int) -> str:
    rng = random.Random(seed)
    workdir = root / "abuse"
    workdir.mkdir()
    images.create(workdir / "victim.qcow2", 4 << 20)
    (workdir / "other.img").write_bytes(b"\x11" * 65536)
    args = [
        *("--blockdev", "qcow2,node-name=victim,file.driver=file,file.filename=victim.qcow2"),
        *("--blockdev", "file,node-name=other,filename=other.img,read-only=on"),
        *("--nbd-server", "addr.type=unix,addr.path=nbd.sock"),
        *("--export", "nbd,id=v,node-name=victim,writable=on", "--export", "nbd,id=o,node-name=other"),
    ]
    with DaemonProcess("pyqsd", args, workdir=workdir) as daemon:
        before = daemon.rss()
        for number in range(200):
            fuzz.attack_handshake(workdir / "nbd.sock", rng, rng.choice(("victim", "other", "nosuch")))
            fuzz.attack_requests(workdir / "nbd.sock", rng, rng.choice(("victim", "other")))
            daemon.qmp.send_raw(fuzz.broken_qmp(rng) + b"\n\xff\n")
            daemon.qmp.send({"execute": "query-version", "id": f"sync-{number}"})
            while daemon.qmp.reply().get("id") != f"sync-{number}":
                pass
        is_alive(workdir / "nbd.sock", "other", b"\x11" * 512)
        assert daemon.rss() < before + (96 << 20), f"grew from {before} to {daemon.rss()} bytes"
    images.assert_clean(workdir / "victim.qcow2")
    return "both protocols"


def check(root: Path, seed: int) -> str:
    rng = random.Random(seed)
    kind = rng.choice(list(mangled.KINDS))
    workdir = root / "check"
    workdir.mkdir()
    mangled.make(workdir / "sound.qcow2", kind)
    image = (workdir / "sound.qcow2").read_bytes()
    for number in range(5 if kind == "large" else 50):
        data = bytearray(image)
        what = mangled.damage(data, seed * 1000 + number)
        (workdir / "damaged.qcow2").write_bytes(data)
        test_check.compare(workdir / "damaged.qcow2", what)
        test_check_repair.check_repair(workdir, kind, image, seed * 1000 + number, rng.choice(("all", "leaks")))
    return kind


def check_only(root: Path, seed: int) -> str:
    workdir = root / "check-only"
    workdir.mkdir()

    def sound(kind: str) -> bytes:
        path = workdir / f"{kind}.qcow2"
        if not path.exists():
            mangled.make(path, kind)
        return path.read_bytes()

    for number in range(100):
        test_check_only.check_random_damage(workdir, sound, seed * 1000 + number)
    return ""


def backup(root: Path, seed: int) -> str:
    for test in (test_backup.test_bitmaps, test_backup.test_stopping_it_at_any_moment):
        workdir = root / test.__name__
        workdir.mkdir()
        test(seed, workdir)
    return ""


PARTS = {
    "workload": workload,
    "compressed": compressed,
    "data-file": data_file,
    "storm": storm,
    "graph": graph,
    "features": features,
    "stream": stream,
    "mirror": mirror,
    "backup": backup,
    "crash": crash,
    "abuse": abuse,
    "check": check,
    "check-only": check_only,
}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="stop after so long (10)")
    parser.add_argument("--rounds", type=int, default=1000, help="stop after so many rounds (1000)")
    parser.add_argument("--seed", type=int, help="the first round's seed (default: from the clock)")
    parser.add_argument("--part", action="append", choices=PARTS, help="only these parts")
    args = parser.parse_args(argv)
    seed = int(time.time()) if args.seed is None else args.seed
    deadline = time.monotonic() + args.minutes * 60
    done = 0
    for number in range(args.rounds):
        root = Path(tempfile.mkdtemp(prefix="pyqsd-soak-"))
        for name in args.part or PARTS:
            if time.monotonic() > deadline:
                shutil.rmtree(root)
                print(f"{done} rounds, no failure")
                return 0
            begin = time.monotonic()
            try:
                what = PARTS[name](root, seed + number)
            except BaseException as exc:
                if isinstance(exc, KeyboardInterrupt):
                    print(f"interrupted after {done} rounds")
                    return 130
                traceback.print_exc()
                print(f"FAILED: --seed {seed + number} --part {name}; files in {root}")
                return 1
            print(f"seed {seed + number}: {name} ({what}): {time.monotonic() - begin:.1f} s", flush=True)
        shutil.rmtree(root)
        done += 1
    print(f"{done} rounds, no failure")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
