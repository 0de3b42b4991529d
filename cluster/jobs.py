"""What web processes and workers share: where Redis keeps what, and the queue of Celery.

Redis keeps each photo that was accepted until it is done, so none is lost with a process. Celery
carries only their ids. If its worker is killed it may lose one, so web processes send again what is
overdue. A photo that comes twice is done once.
"""

import logging
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.exceptions import OperationalError

sys.path.insert(0, str(Path(__file__).parent.parent))  # for server.py

# These have no time to live, so Redis never drops them:
JOBS = "faces:jobs"  # a sorted set: the id of each photo in work, and when it is overdue
STARTS = "faces:starts"  # a hash: how often the work on each of them began
BYTES = "faces:bytes"  # a number: the bytes of all of them
QUEUE = "faces:queue"  # a list of Celery: their ids
KEYS = [JOBS, STARTS, BYTES, QUEUE]
PHOTO = "faces:photo:"  # and an id; a hash: the photo, and JSON
IMAGES, ERRORS = "faces:images", "faces:errors"  # streams: JSON of what came of the last photos
# This has one:
IMAGE = "faces:image:"  # and an id; a hash: what came of a photo, as JSON and JPEG

SCRIPTS = {each.stem: each.read_text() for each in Path(__file__).parent.glob("lua/*.lua")}
OVERDUE = 20  # seconds; whatever works on a photo for longer is ended
TIMEOUT = 3  # seconds for an answer of Redis
TIMEOUTS = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
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
