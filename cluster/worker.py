#!/usr/bin/env python3
"""A worker of the cluster: takes photos from Redis and annotates them; it knows no HTTP."""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from typing import Any

import jobs  # isort: skip (it finds server.py)
import redis
from celery.signals import worker_init, worker_process_init
from jobs import app  # for `celery -A worker worker`

import server

MOST_STARTS = 3  # of the work on a photo
ERROR_SECONDS = 60  # to keep what is wrong with a photo
detector: server.Detector | None = None
connection: redis.Redis


@worker_init.connect
def prepare(**_: Any) -> None:
    """Load the detector for all processes of this worker; or end it, in words."""
    global connection, detector
    model, min_score = os.environ.get("FACES_MODEL", ""), os.environ.get("FACES_MIN_SCORE", "0")
    url, name = app.conf.broker_url, jobs.WORKER
    server.cv2.setNumThreads(1)  # a process has no copy of the threads of another
    try:
        connection = redis.Redis.from_url(url, client_name=name, **jobs.CONNECTION)
        detector = detector or server.load_detector(model, float(min_score))
    except (OSError, ValueError) as error:
        sys.exit(f"It cannot start (--model, --min-score, --redis-url): {error}")


@worker_process_init.connect
def connect(**_: Any) -> None:
    """Connect a process to Redis, where web processes count it."""
    with suppress(redis.RedisError):
        connection.ping()


@app.task(name=jobs.ANNOTATE, autoretry_for=[Exception], default_retry_delay=1)
def annotate(photo_id: str) -> None:
    """Annotate a photo, and keep and publish what comes of it; do nothing if it is done."""
    begin, key = time.monotonic(), jobs.PHOTO + photo_id
    steps = connection.pipeline().hmget(key, "json", "photo")
    (line, photo), (count, now) = jobs.run(steps, "start", photo_id, jobs.OVERDUE).execute()
    if not count:
        return
    try:
        if count > MOST_STARTS:
            raise server.BadPhoto(f"{MOST_STARTS} times its process failed; it is given up.")
        posted = json.loads(line)
        jpeg, known = server.annotate(photo, detector)
        seconds = float(now) - posted["at"] + time.monotonic() - begin
        known |= {"filename": posted["filename"], "took_ms": round(seconds * 1000)}
        stream, keep = jobs.IMAGES, posted["keep_seconds"]
    except server.BadPhoto as error:
        jpeg, known = b"", {"error": type(error).__name__, "text": str(error)}
        stream, keep = jobs.ERRORS, ERROR_SECONDS
    news = json.dumps({"id": photo_id} | known)
    steps = connection.pipeline().hset(jobs.IMAGE + photo_id, mapping={"json": news, "jpeg": jpeg})
    steps.expire(jobs.IMAGE + photo_id, keep)
    jobs.run(steps, "finish", photo_id, key, stream, news).execute()


def main() -> None:
    """Run `celery worker` with the options of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--redis-url", default=app.conf.broker_url, help="Redis")
    parser.add_argument("--threads", default=os.cpu_count(), type=int, help="photos at a time")
    parser.add_argument("--model", default="", help="YuNet network (.onnx) or cascade (.xml)")
    parser.add_argument("--min-score", default="0", help="score that a face needs")
    options = parser.parse_args()
    os.environ |= {"FACES_MODEL": options.model, "FACES_MIN_SCORE": options.min_score}
    app.conf.broker_url = options.redis_url
    quiet = ["--loglevel=warning", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    app.worker_main(["worker", *quiet, f"--concurrency={options.threads}"])


if __name__ == "__main__":
    main()
