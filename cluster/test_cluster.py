"""What the cluster promises, with a real Redis and real processes."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import cv2
import numpy as np
import pytest
from testing import (
    ASTRONAUT,
    CLUSTER,
    LATER,
    SLOW,
    TIMEOUT,
    Client,
    Cluster,
    Redis,
    listens,
    photo_of_width,
    until,
)


# --- Many processes are one server ---
async def test_watch_at_one_process_post_at_another_fetch_at_a_third(
    cluster: Cluster, client: Client
) -> None:
    cluster.worker()
    (_, one), (_, two), (_, three) = (cluster.web() for _ in range(3))
    watchers = {url: await client.watch(url) for url in (one, two, three)}
    watchers["http://10.0.0.5:80"] = await client.watch(one, Host="10.0.0.5:80")
    posted = [await client.post(two, Prefer="") for _ in range(3)]
    for url, next_message in watchers.items():
        assert [await next_message() for _ in posted] == [f"{url}/image/{p['id']}" for p in posted]

    image = f"{three}/image/{posted[0]['id']}"
    assert (await client.get(image))[1].startswith(b"\xff\xd8")
    assert await client.json(f"{image}/meta") == posted[0] | {"url": image}
    listed = [each["id"] for each in await client.json(f"{three}/image")]
    assert listed == [each["id"] for each in posted[::-1]]

    # Each process makes small pictures of its own, and keeps them.
    wide = await client.post(two, photo_of_width(960))
    for url in (one, three, three):
        status, small = await client.get(f"{url}/image/{wide['id']}?width=480")
        pixels = cv2.imdecode(np.frombuffer(small, np.uint8), cv2.IMREAD_COLOR)
        assert (status, pixels.shape) == (200, (32, 480, 3))

    # What is answered at once can be fetched anywhere, and what is wrong with it too.
    promised = await client.post(one, **LATER)
    assert promised == {"id": promised["id"], "url": f"{one}/image/{promised['id']}"}
    assert (await client.get(f"{two}/image/{promised['id']}"))[0] == 200
    for photo, status in [(b"no photo", 415), (ASTRONAUT[:9000], 422)]:
        bad = (await client.post(one, photo, **LATER))["id"]
        answers = [await client.get(f"{url}/image/{bad}") for url in (one, two, three)]
        assert answers == [(status, answers[0][1])] * 3
        assert (await client.try_post(two, photo))[0] == status
    assert (await client.get(f"{three}/image/none"))[0] == 404


SERVER_TESTS = """
import json, sys, threading
import pytest, redis, server, web, worker

url, *options = sys.argv[1:]
worker.app.conf.broker_url = url
worker.prepare()
worker.connection = redis.Redis.from_url(url)  # without the name of those who are counted
create_alone = server.create_app


def work(is_over):
    queue = redis.Redis.from_url(url)
    while not is_over.is_set():
        if taken := queue.brpop(["faces:queue"], timeout=0.2):
            (photo_id,), *_ = json.loads(json.loads(taken[1])["body"])
            worker.annotate(photo_id)
    queue.close()


def create_app(config=server.Config(), detector=None):
    worker.connection.flushdb()
    worker.detector = detector = detector or server.load_detector()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "create_app", create_alone)
        app = web.create_app(worker.Config(**vars(config), redis_url=url))
    app[server.DETECTOR] = detector
    is_over = threading.Event()

    async def stop_working(app):
        is_over.set()

    app.on_cleanup.append(stop_working)
    for _ in range(config.threads):
        threading.Thread(target=work, args=[is_over], daemon=True).start()
    return app


server.create_app = create_app
sys.exit(pytest.main(["-q", "test_server.py", *options]))
"""


def test_the_tests_of_server_py_pass(redis: Redis) -> None:
    """All but two of its store in memory; the work of a worker is done by threads here."""
    own = [
        "test_the_image_that_was_not_used_for_longest_goes_first",
        "test_an_image_that_is_larger_than_the_room_is_kept_until_the_next",
    ]
    options = [f"--deselect=test_server.py::{name}" for name in own]
    environment = os.environ | {"PYTHONPATH": f"{CLUSTER}:{CLUSTER.parent}"}
    command = [sys.executable, "-c", SERVER_TESTS, redis.url, *options]
    done = subprocess.run(
        command, cwd=CLUSTER.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(own)} deselected" in done.stdout


# --- Limits ---
async def test_too_many_waiting_photos_are_refused_counted_over_the_cluster(
    cluster: Cluster, client: Client
) -> None:
    """Web processes count the processes of workers each second: the first ones, and more."""
    (_, one), (_, two) = (cluster.web("--queue", "1") for _ in range(2))
    promised: list[dict[str, Any]] = []
    for threads in (1, 2):
        cluster.odd_worker(threads)
        places = len(promised) + 2 * threads  # each works on one, and one waits
        async with asyncio.timeout(TIMEOUT):
            while len(promised) < places:
                url = (one, two)[len(promised) % 2]
                status, known = await client.try_post(url, SLOW, **LATER)
                if status == 202:
                    promised.append(known)
                await asyncio.sleep(0.05)
    for url in (one, two):
        status, problem = await client.try_post(url, SLOW)
        assert (status, problem["detail"]) == (503, "Too many photos wait (--queue).")
    cluster.go_on(70)
    assert {(await client.get(each["url"]))[0] for each in promised} == {200}
    await client.post(one)


async def test_too_many_who_wait_for_an_image_are_refused(cluster: Cluster, client: Client) -> None:
    """Those who left count too, until the photo is done: they take memory."""
    cluster.odd_worker(1)
    _, url = cluster.web("--max-clients", "2")
    promised = await client.post(url, SLOW, **LATER)
    await cluster.begun(70)
    looked_up = cluster.redis.calls("hmget")
    leaving, waiting = (asyncio.create_task(client.get(promised["url"])) for _ in range(2))
    await until(lambda: cluster.redis.calls("hmget") == looked_up + 2)
    leaving.cancel()
    status, answer = await client.get(promised["url"])
    assert (status, b"Too many wait for images (--max-clients)." in answer) == (503, True)
    cluster.go_on(70)
    assert (await waiting)[0] == 200
    assert (await client.get(promised["url"]))[0] == 200


async def test_an_image_is_kept_for_the_time_set(cluster: Cluster, client: Client) -> None:
    cluster.worker("--keep-seconds", "1000")
    (_, one), (_, two) = (cluster.web() for _ in range(2))
    store = cluster.redis.client
    begin, _ = store.time()
    posted = await client.post(one)
    end, _ = store.time()
    image = f"faces:image:{posted['id']}"
    urls = [f"{url}/image/{posted['id']}" for url in (one, two)]
    assert [(await client.get(url))[0] for url in urls] == [200, 200]
    assert begin + 1000 <= store.expiretime(image) <= end + 1001

    store.pexpire(image, 1)
    await until(lambda: not store.exists(image))
    assert [(await client.get(url))[0] for url in urls] == [404, 404]  # though they have a copy
    assert await client.json(f"{one}/image") == []


# --- Start and stop ---
async def test_a_worker_that_is_told_to_stop_finishes_its_photo(
    cluster: Cluster, client: Client
) -> None:
    worker, (_, url) = cluster.odd_worker(1), cluster.web()
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    later = await client.post(url, **LATER)
    worker.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(worker.until_it_says, "(Warm shutdown)")
    cluster.go_on(70)
    await waiting
    assert await asyncio.to_thread(worker.process.wait, TIMEOUT) == 0
    cluster.odd_worker(1)
    assert (await client.get(later["url"]))[0] == 200


async def test_a_web_process_that_is_told_to_stop_answers_who_waits(
    cluster: Cluster, client: Client
) -> None:
    cluster.odd_worker(1)
    web, url = cluster.web()
    next_message = await client.watch(url)
    posting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    promised = await client.post(url, **LATER)
    looked_up = cluster.redis.calls("hmget")
    getting = asyncio.create_task(client.get(promised["url"]))
    await until(lambda: cluster.redis.calls("hmget") > looked_up)
    web.process.send_signal(signal.SIGTERM)
    await until(lambda: not listens(url))
    cluster.go_on(70)
    assert await next_message() == (await posting)["url"]
    assert (await getting)[0] == 200
    assert await asyncio.to_thread(web.process.wait, TIMEOUT) == 0


@pytest.mark.parametrize("program", ["web.py", "worker.py"])
@pytest.mark.parametrize(
    "option, words",
    {
        "--redis-url=localhost": "Redis URL",
        "--model=no.onnx": "no.onnx",
        "--threads=0": "--threads must be",
        "--keep-seconds=0": "--keep-seconds must be",
    }.items(),
)
def test_what_cannot_start_says_so_in_one_line(program: str, option: str, words: str) -> None:
    command = [sys.executable, CLUSTER / program, option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
