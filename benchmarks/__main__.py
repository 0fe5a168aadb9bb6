"""`python -m benchmarks`: all servers in turns, round by round, in one run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import jobs, vhost_user, workloads
from benchmarks.report import TITLES, Results, number, table
from benchmarks.servers import SERVERS, Server
from benchmarks.workloads import Images, MiB, Run


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures pyqsd, qemu-storage-daemon and nbdkit side by side with fio's nbd engine.",
    )
    parser.add_argument("--list", action="store_true", help="list the workloads and end")
    parser.add_argument("--workload", action="append", metavar="TEXT", help="only workloads whose name contains TEXT")
    parser.add_argument("--server", action="append", choices=SERVERS, help="only these servers")
    parser.add_argument("--seconds", type=float, default=3, help="duration of each timed run (3)")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured (3)")
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="size of the images in MiB (512)")
    parser.add_argument("--dir", default="/var/tmp", help="where the images go; must be able to do O_DIRECT")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    return parser.parse_args(argv)


def machine() -> dict[str, str]:
    """What the numbers were measured on."""

    def first_line(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stdout.splitlines() or ["?"])[0]

    return {
        "cpus": str(len(os.sched_getaffinity(0))),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qsd": first_line("qemu-storage-daemon", "--version"),
        "nbdkit": first_line("nbdkit", "--version"),
        "fio": first_line("fio", "--version"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(argv: list[str]) -> int:
    args = parse(argv)
    every = workloads.WORKLOADS + vhost_user.WORKLOADS + jobs.WORKLOADS
    chosen = [w for w in every if not args.workload or any(text in w.name for text in args.workload)]
    if args.list:
        print("\n".join(f"{workload.name} ({workload.unit})" for workload in chosen))
        return 0
    if not chosen:
        print("no workload has such a name; --list shows them", file=sys.stderr)
        return 1
    for program in ("fio", "qemu-img"):
        if not shutil.which(program):
            print(f"{program} is not installed", file=sys.stderr)
            return 1
    servers = []
    for name in args.server or SERVERS:
        missing = Server(name).missing()
        if missing:
            print(f"{missing} is not installed: no column for {TITLES[name]}", file=sys.stderr)
        else:
            servers.append(name)
    results = Results()
    root = Path(tempfile.mkdtemp(prefix="pyqsd-bench-", dir=args.dir))
    try:
        images = Images(root, args.size * MiB)
        for round_ in range(args.rounds):
            for workload in chosen:
                line = []
                # Whoever comes first finds another cache and clock than who comes last: take turns.
                for name in servers[round_ % len(servers) :] + servers[: round_ % len(servers)]:
                    try:
                        value = workload.measure(Run(Server(name), images, root, args.seconds))
                    except LookupError:
                        continue  # this server has no such thing
                    except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
                        results.failures.append(f"{workload.name}, {name}: {exc}")
                        line.append(f"{name} FAILED")
                        continue
                    results.add(workload.name, name, value)
                    line.append(f"{name} {number(value)}")
                text = f"round {round_ + 1}/{args.rounds}  {workload.name}: {', '.join(line)}"
                print(text, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("interrupted; what there is so far:", file=sys.stderr)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    about = machine()
    print(table(results, chosen, servers, args.markdown))
    software = ", ".join(about[key] for key in ("qsd", "nbdkit", "fio"))
    print(f"\n{about['cpus']} CPUs, Linux {about['kernel']}, Python {about['python']}, {software};")
    print(f"median of {args.rounds} rounds of {args.seconds:g} s, {args.size} MiB images, {about['date']}.")
    if args.json:
        report = {"machine": about, "options": vars(args), "results": results.as_json(chosen)}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    for failure in results.failures:
        print(failure, file=sys.stderr)
    return 1 if results.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
