"""How many processes does a cluster need, and how long do its photos wait?

    python bench/scale.py

It simulates a queue that is served by many processes: photos arrive at random (Poisson), and each
takes as long as was measured, 0.7 to 1.3 times by chance. For each number of photos a second it
finds the fewest processes with which 99 of 100 photos wait less than a second, and prints the
percentiles. It also prints how busy the other parts are. docs/scale.md uses these numbers.
"""

import heapq
import math
import random
import statistics

# Seconds of CPU, as bench/cluster.py and bench/fanout.py measure them; see docs/scale.md.
ANNOTATE = {"640 x 480": 0.025, "2 MP": 0.077, "12 MP": 0.122}  # with Celery
WEB_PHOTO = 0.0016
WEB_MESSAGE = 0.000014  # a watcher and an image
REDIS_PHOTO = 0.0007
REDIS_NEWS = 0.000013  # a web process and an image
BUSY = 0.7  # what a part may be busy on average, so that it can catch up
PATIENCE = 1.0  # seconds, for 99 of 100 photos
PHOTOS = 200_000  # of each simulation


def simulate(rate: float, processes: int, seconds: float) -> list[float]:
    """Return how long each photo waits, sorted."""
    chance = random.Random(1)
    free_at = [0.0] * processes  # a heap: when each process is free
    now, waits = 0.0, []
    for _ in range(PHOTOS):
        now += chance.expovariate(rate)
        start = max(now, free_at[0])
        heapq.heapreplace(free_at, start + seconds * chance.uniform(0.7, 1.3))
        waits.append(start - now)
    return sorted(waits)


def find_processes(rate: float, seconds: float) -> tuple[int, list[float]]:
    """Return the fewest processes with which photos wait as little as they shall."""
    processes = math.ceil(rate * seconds)
    while True:
        waits = simulate(rate, processes, seconds)
        # Without spare time the queue would grow for ever, and a longer simulation show it.
        if rate * seconds / processes < 0.98 and waits[int(0.99 * PHOTOS)] < PATIENCE:
            return processes, waits
        processes += max(1, processes // 100)


def main() -> None:
    """Print the tables."""
    print("| photos a second | size | processes of workers | busy | p50 of waits | p99 |")
    print("| --- " * 6 + "|")
    for rate in (10, 1_000, 100_000):
        for size, seconds in ANNOTATE.items():
            processes, waits = find_processes(rate, seconds)
            cuts = statistics.quantiles(waits, n=100)
            busy = rate * seconds / processes
            waited = f"{cuts[49] * 1000:.0f} ms | {cuts[98] * 1000:.0f} ms"
            print(f"| {rate:,} | {size} | {processes:,} | {busy:.2f} | {waited} |")

    print("\n| photos a second | watchers | web processes | cores of Redis |")
    print("| --- " * 4 + "|")
    for rate in (10, 1_000, 100_000):
        for watchers in (1_000, 100_000, 10_000_000):
            seconds = rate * (WEB_PHOTO + watchers * WEB_MESSAGE)
            web = max(math.ceil(seconds / BUSY), math.ceil(watchers / 10_000))
            redis = rate * (REDIS_PHOTO + web * REDIS_NEWS) / BUSY
            print(f"| {rate:,} | {watchers:,} | {web:,} | {redis:,.2f} |")


if __name__ == "__main__":
    main()
