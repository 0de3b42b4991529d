"""A worker of the cluster: takes photos from Redis and annotates them; it knows no HTTP."""

import json
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import redis
from celery import Celery
from celery.signals import worker_init, worker_process_init
from kombu.transport.redis import Transport

sys.path.insert(0, str(Path(__file__).parent.parent))

import server

# Each script is one step in Redis: all of it happens, or nothing.
SCRIPTS = {each.stem: each.read_text() for each in Path(__file__).parent.glob("lua/*.lua")}
NAME = "faces-worker"  # of the connection of each process that annotates
OVERDUE = 20  # seconds; then a photo is sent again, and whatever still works on it is ended
MOST_STARTS = 3  # of the work on a photo
CONNECTION = {"socket_timeout": 3, "socket_connect_timeout": 3}  # seconds for an answer of Redis
CONNECTION |= {"protocol": 2}  # with 3, redis-py 8.1 reuses connections that are closed


@dataclass(frozen=True)
class Config(server.Config):
    """The settings of server.py, and those of the cluster."""

    redis_url: str = server.option("redis://localhost:6379/0", "URL of Redis")
    keep_seconds: int = server.option(3600, "seconds for which Redis has an image", minimum=1)


config = Config()
detector: server.Detector | None = None
app = Celery("faces", broker=config.redis_url)
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,  # Redis may be away for days
    broker_transport_options={**CONNECTION, "ack_emulation": False},  # Redis has the photos anyway
    task_default_queue="faces:queue",
    task_acks_late=True,
    task_reject_on_worker_lost=True,  # if a process of a worker is killed, another one begins anew
    task_time_limit=OVERDUE,
    worker_enable_remote_control=False,
    worker_prefetch_multiplier=1,  # what waits is there for all workers
)
# Garbage in the queue would end a worker. As an error of its connection, it makes it connect anew.
Transport.connection_errors += (AttributeError, KeyError, TypeError, ValueError)
Transport.Channel.do_restore = False  # or it would put the garbage back


@worker_init.connect
def prepare(**_: object) -> None:
    """Load the detector for all processes of this worker; or end it, in words."""
    global connection, detector
    server.cv2.setNumThreads(1)  # a process has no copy of the threads of another
    try:
        server.check(config)
        patience = redis.retry.Retry(redis.backoff.ConstantBackoff(0.5), OVERDUE)
        options = CONNECTION | {"client_name": NAME, "retry": patience}
        connection = redis.Redis.from_url(app.conf.broker_url, **options)
        detector = detector or server.load_detector(config.model, config.min_score)
    except (OSError, ValueError) as error:
        sys.exit(f"It cannot start (--model, --redis-url): {error}")


worker_process_init.connect(lambda **_: connection.ping(), weak=False)  # web processes count these


@app.task(name="faces.annotate", autoretry_for=[Exception], default_retry_delay=1)
def annotate(photo_id: str) -> None:
    """Annotate a photo, and keep and publish what comes of it; do nothing if it is done."""
    begin = time.monotonic()
    with connection.pipeline(transaction=False) as step:
        step.eval(SCRIPTS["start"], 0, photo_id, str(uuid.uuid4()), OVERDUE)
        step.hmget(f"faces:photo:{photo_id}", "photo", "filename")
        (starts, waited), (photo, filename) = step.execute()
    if not starts:
        return
    try:
        if starts > MOST_STARTS:
            raise server.BadPhoto(f"{MOST_STARTS} times its process failed; it is given up.")
        jpeg, known = server.annotate(photo, detector)
        took_ms = waited + round((time.monotonic() - begin) * 1000)
        known |= {"filename": json.loads(filename), "took_ms": took_ms}
    except server.BadPhoto as error:
        jpeg, known = b"", {"error": str(error), "status": error.status}
    line = json.dumps({"id": photo_id} | known)
    try:
        with connection.pipeline() as step:
            step.hset(f"faces:image:{photo_id}", "jpeg", jpeg)
            step.eval(SCRIPTS["finish"], 0, photo_id, line, config.keep_seconds)
            step.execute()
    except redis.OutOfMemoryError:  # a script may exceed the memory, but takes longer
        connection.eval(SCRIPTS["finish"], 0, photo_id, line, config.keep_seconds, jpeg)


def main() -> None:
    """Run `celery worker` with the options of the command line."""
    global config
    config = Config(**vars(server.make_parser(Config).parse_args()))
    app.conf.broker_url = config.redis_url
    app.worker_main(["worker", "--loglevel=warning", f"--concurrency={config.threads}"])


if __name__ == "__main__":
    main()
