"""What does the cluster cost, beside server.py alone on the same machine?

    python bench/cluster.py [--seconds 4] [--rounds 5] [--size "640 x 480"]

One web process, one worker with a process for each core, and a Redis of its own take turns with
server.py. For each size of photo it prints the rates of POST /image, their ratio, and what each
photo costs: milliseconds of CPU time in each process, the CPU time of server.py divided by that of
the cluster (which other programs on the machine disturb least), and the bytes through Redis, as
multiples of the photo's. Each number is the median of the rounds.
It needs redis-server, and what cluster/requirements.txt names.
"""

import argparse
import asyncio
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis
from speed import MEMORY, ROOT, SIZES, THREADS, make_photo, post

TICK = os.sysconf("SC_CLK_TCK")


def find_port() -> int:
    """Return a port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def running(ready: str, *command: str | Path) -> Iterator[tuple[int, str]]:
    """Run a program; yields its process id, and what it says when it is ready."""
    environment = os.environ | MEMORY
    with tempfile.NamedTemporaryFile("r+") as log:
        command = [str(each) for each in command]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            while not (said := re.search(ready, Path(log.name).read_text())):
                assert process.poll() is None, Path(log.name).read_text()
                time.sleep(0.05)
            yield process.pid, said[0]
        finally:
            process.terminate()
            process.wait()


def cpu_of(pid: int, children: bool = False) -> float:
    """Return the seconds of CPU that a process, or its children, have taken."""
    if children:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return sum(cpu_of(int(child)) for child in pids)
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", action="append", choices=SIZES, help="(default: all)")
    parser.add_argument("--model", default="")
    options = parser.parse_args()

    port = find_port()
    url = f"redis://127.0.0.1:{port}/0"
    python, model = sys.executable, ("--model", options.model)
    server = python, ROOT / "server.py", "--port", "0", *model
    web = python, ROOT / "cluster/web.py", "--port", "0", "--redis-url", url, *model
    worker = python, ROOT / "cluster/worker.py", "--redis-url", url, "--threads", str(THREADS)
    policy = "--save", "", "--maxmemory", "256mb", "--maxmemory-policy", "volatile-lru"
    with contextlib.ExitStack() as stack:
        start = stack.enter_context
        redis_pid, _ = start(
            running("Ready to accept", "redis-server", "--port", str(port), *policy)
        )
        worker_pid, _ = start(running("tasks", *worker, *model))
        web_pid, said = start(running(r"http://[^/\s]+", *web))
        cluster_port = int(said.rpartition(":")[2])
        server_pid, said = start(running(r"http://[^/\s]+", *server))
        alone_port = int(said.rpartition(":")[2])
        client = redis.Redis.from_url(url)
        pids = {"server.py": server_pid, "web": web_pid, "Celery": worker_pid, "Redis": redis_pid}

        def bytes_through_redis() -> int:
            """Return the bytes that have gone in and out of Redis."""
            stats = client.info("stats")
            return stats["total_net_input_bytes"] + stats["total_net_output_bytes"]

        def measure(photo: bytes, seconds: float) -> list[float]:
            """Post to one and to the other; return the columns of the table, CPU in ms."""
            before = [cpu_of(pid) for pid in pids.values()] + [cpu_of(worker_pid, children=True)]
            bytes_before = bytes_through_redis()
            alone, took_alone = asyncio.run(post(alone_port, b"/image", photo, seconds))
            rate, took = asyncio.run(post(cluster_port, b"/image", photo, seconds))
            after = [cpu_of(pid) for pid in pids.values()] + [cpu_of(worker_pid, children=True)]
            counts = [len(took_alone)] + [len(took)] * len(pids)
            steps = zip(before, after, counts, strict=True)
            cpu = [(end - begin) * 1000 / count for begin, end, count in steps]
            through = (bytes_through_redis() - bytes_before) / len(took) / len(photo)
            return [alone, rate, rate / alone, *cpu, cpu[0] / sum(cpu[1:]), through]

        columns = "alone", "cluster", "ratio", *pids, "annotate", "CPU ratio", "bytes through Redis"
        print(f"| photo | {' | '.join(columns)} |\n{'| --- ' * (len(columns) + 1)}|")
        for name in options.size or SIZES:
            photo = make_photo(*SIZES[name])
            for port in (alone_port, cluster_port):
                asyncio.run(post(port, b"/image", photo, 1))  # warm
            rounds = [measure(photo, options.seconds) for _ in range(options.rounds)]
            medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
            print(f"| {name} | {' | '.join(f'{each:.2f}' for each in medians)} |", flush=True)


if __name__ == "__main__":
    main()
