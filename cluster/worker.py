#!/usr/bin/env python3
"""A worker of the cluster: takes photos from Redis and annotates them; it knows no HTTP."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from celery.signals import worker_init, worker_process_init

sys.path.insert(0, str(Path(__file__).parent.parent))

import server

SCRIPTS = {each.stem: each.read_text() for each in Path(__file__).parent.glob("lua/*.lua")}

OVERDUE = 20  # seconds; then a photo is sent again, and whatever still works on it is ended
MOST_STARTS = 3  # of the work on a photo
TIMEOUTS = {"socket_timeout": 3, "socket_connect_timeout": 3}  # seconds for an answer of Redis
CONNECTION = {**TIMEOUTS, "protocol": 2}  # with 3, redis-py 8.1 reuses connections that are closed
NAME = "faces-worker"  # of the connection of each process that annotates

detector: server.Detector | None = None
connection: redis.Redis
app = Celery("faces", broker="redis://localhost:6379/0")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # Redis may be away for days
    broker_transport_options={**TIMEOUTS, "ack_emulation": False},  # Redis has the photos anyway
    task_default_queue="faces:queue",
    task_ignore_result=True,  # it is in Redis
    task_acks_late=True,
    task_reject_on_worker_lost=True,  # if a process of a worker is killed, another one begins anew
    task_time_limit=OVERDUE,
    worker_prefetch_multiplier=1,  # what waits is there for all workers
)


def run(client: Any, script: str, *values: Any) -> Any:
    """Run a script in Redis, which does all of it in one step; await this in asyncio."""
    return client.eval(SCRIPTS[script], 0, *values)


@worker_init.connect
def prepare(**_: Any) -> None:
    """Load the detector for all processes of this worker; or end it, in words."""
    global connection, detector
    model, min_score = os.environ.get("FACES_MODEL", ""), os.environ.get("FACES_MIN_SCORE", "0")
    server.cv2.setNumThreads(1)  # a process has no copy of the threads of another
    try:
        url = app.conf.broker_url
        connection = redis.Redis.from_url(url, client_name=NAME, **CONNECTION)
        detector = detector or server.load_detector(model, float(min_score))
    except (OSError, ValueError) as error:
        sys.exit(f"It cannot start (--model, --min-score, --redis-url): {error}")


@worker_process_init.connect
def connect(**_: Any) -> None:
    """Connect a process to Redis, where web processes count it."""
    connection.ping()  # Celery logs its error, if Redis is away


@app.task(name="faces.annotate", autoretry_for=[Exception], default_retry_delay=1)
def annotate(photo_id: str) -> None:
    """Annotate a photo, and keep and publish what comes of it; do nothing if it is done."""
    begin = time.monotonic()
    count, waited, filename, photo = run(connection, "start", photo_id, OVERDUE)
    if not count:
        return
    try:
        if count > MOST_STARTS:
            raise server.BadPhoto(f"{MOST_STARTS} times its process failed; it is given up.")
        jpeg, known = server.annotate(photo, detector)
        took_ms = round((float(waited) + time.monotonic() - begin) * 1000)
        known |= {"filename": json.loads(filename), "took_ms": took_ms}
    except server.BadPhoto as error:
        jpeg, known = b"", {"error": str(error), "status": error.status}
    run(connection, "finish", photo_id, json.dumps({"id": photo_id} | known), jpeg)


def main() -> None:
    """Run `celery worker` with the options of the command line."""
    parser = server.make_parser()  # of its options, a worker needs three
    parser.add_argument("--redis-url", default=app.conf.broker_url, help="Redis")
    options = parser.parse_args()
    os.environ |= {"FACES_MODEL": options.model, "FACES_MIN_SCORE": str(options.min_score)}
    app.conf.broker_url = options.redis_url
    quiet = ["--loglevel=warning", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", *quiet, f"--concurrency={options.threads}"])


if __name__ == "__main__":
    main()
