"""What web processes and workers share: where Redis keeps what (README.md), and Celery's queue."""

import logging
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

sys.path.insert(0, str(Path(__file__).parent.parent))  # for server.py

JOBS, QUEUE = "faces:jobs", "faces:queue"  # photos in work, by when they are overdue; their ids
KEYS = [JOBS, "faces:starts", "faces:bytes", QUEUE]  # of the scripts
PHOTO, IMAGE = "faces:photo:", "faces:image:"  # and an id: hashes of JSON, and photo or JPEG
IMAGES, ERRORS = "faces:images", "faces:errors"  # streams: the news of photos, as JSON
SCRIPTS = {each.stem: each.read_text() for each in Path(__file__).parent.glob("lua/*.lua")}

OVERDUE = 20  # seconds; then a photo is sent again, and whatever still works on it is ended
TIMEOUTS = {"socket_timeout": 3, "socket_connect_timeout": 3}  # seconds for an answer of Redis
CONNECTION = {**TIMEOUTS, "protocol": 2}  # with 3, redis-py 8.1 reuses connections that are closed
WORKER = "faces-worker"  # the name of the connection of each process that annotates
ANNOTATE = "faces.annotate"  # the name of the task

log = logging.getLogger("faces.cluster")
app = Celery("faces", broker="redis://localhost:6379/0")
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # Redis may be away for days
    broker_transport_options={**TIMEOUTS, "ack_emulation": False},  # Redis has the photos anyway
    task_default_queue=QUEUE,
    task_ignore_result=True,  # it is in Redis
    task_acks_late=True,
    task_reject_on_worker_lost=True,  # if a process of a worker is killed, another one begins anew
    task_time_limit=OVERDUE,
    worker_prefetch_multiplier=1,  # what waits is there for all workers
)


def run(redis: Any, script: str, *values: Any) -> Any:
    """Run a script in Redis, which does all of it in one step; await this in asyncio."""
    return redis.eval(SCRIPTS[script], len(KEYS), *KEYS, *values)


def send(photo_id: str) -> None:
    """Send a photo to the workers; if that fails, it is sent again once it is overdue."""
    try:
        app.send_task(ANNOTATE, [photo_id], retry=False)
    except OperationalError as error:
        log.warning("%s is sent later: %s", photo_id, error)
