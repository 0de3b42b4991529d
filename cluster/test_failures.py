"""Whatever is killed and whatever fails, the cluster loses no photo that it has accepted."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import cv2
import numpy as np
import yarl
from testing import (
    ASTRONAUT,
    DEADLY,
    LATER,
    LATEST,
    SLOW,
    TIMEOUT,
    Client,
    Cluster,
    photo_of_width,
    until,
)


# --- Whatever is killed, no photo is lost ---
async def test_a_process_of_a_worker_is_killed(cluster: Cluster, client: Client) -> None:
    cluster.odd_worker(threads=1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    waiting = asyncio.create_task(client.post(url, SLOW))
    os.kill(await cluster.begun(70), signal.SIGKILL)
    cluster.go_on(70)
    posted = await waiting
    assert await next_message() == posted["url"]
    assert (await client.get(posted["url"]))[0] == 200


async def test_whole_processes_are_killed_at_the_worst_moments(
    cluster: Cluster, client: Client
) -> None:
    """At once, as it takes a while until a photo is overdue."""
    queue, working = cluster.redis.client, cluster.odd_worker(1)
    (doomed, doomed_url), (_, url) = (cluster.web("--queue", "99") for _ in range(2))
    next_message = await client.watch(url)

    # One worker is killed in the middle of a photo, another before it reads what Redis gave it.
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    killed = time.monotonic()
    working.signal_all()
    stuck, promised, is_taken = cluster.odd_worker(1), [], False
    async with asyncio.timeout(TIMEOUT):
        while not is_taken:  # Redis may have told it in the last moment that there is none
            stuck.signal_all(signal.SIGCONT)
            await until(lambda: not queue.exists("faces:queue"))
            await until(cluster.redis.is_asked_for_photos)
            stuck.signal_all(signal.SIGSTOP)
            promised.append(await client.post(doomed_url, **LATER))
            is_taken = not queue.exists("faces:queue")
    stuck.signal_all()

    # A web process is killed while others' photos wait in the queue, and before it has sent one.
    promised += [await client.post(doomed_url, **LATER) for _ in range(3)]
    doomed.signal_all()
    queue.ltrim("faces:queue", 1, -1)
    cluster.go_on(70)
    cluster.odd_worker(2)
    ids = {each["id"] for each in [*promised, await waiting]}
    assert {await next_message() for _ in ids} == {f"{url}/image/{id}" for id in ids}
    assert time.monotonic() - killed < LATEST
    assert {(await client.get(f"{url}/image/{id}"))[0] for id in ids} == {200}
    assert {each["id"] for each in await client.json(f"{url}/image")} == ids
    assert queue.exists("faces:jobs", "faces:starts", "faces:queue") == 0
    assert queue.get("faces:bytes") == b"0"


async def test_processes_are_killed_at_random_moments(cluster: Cluster, client: Client) -> None:
    """Each photo is as wide as no other, which tells whether one got two ids."""
    seed = int(os.environ.get("SEED", time.time_ns()))
    print(f"SEED={seed}")
    chance = random.Random(seed)
    workers, webs = await cluster.start_many(3)
    next_message = await client.watch(webs[0][1])
    widths = itertools.count(1000)
    waiting: list[asyncio.Task[tuple[int, Any]]] = []
    promised: list[str] = []

    async def promise(url: str) -> None:
        with contextlib.suppress(aiohttp.ClientError):  # it was just killed
            status, known = await client.try_post(url, photo_of_width(next(widths)), **LATER)
            assert status == 202, known
            promised.append(known["id"])

    victims = ["process of a worker", "worker", "web"] * 2
    chance.shuffle(victims)
    for victim in victims:
        posts = [promise(chance.choice(webs)[1]) for _ in range(6)]
        waiting.append(
            asyncio.create_task(client.try_post(webs[0][1], photo_of_width(next(widths))))
        )
        killing = asyncio.create_task(asyncio.sleep(chance.uniform(0, 0.4)))
        await asyncio.gather(*posts, killing)
        if victim == "web":
            webs.pop()[0].signal_all()
        elif victim == "worker":
            workers.pop().signal_all()
        else:
            os.kill(chance.choice(chance.choice(workers).children()), signal.SIGKILL)

    url = webs[0][1]
    answers = [await each for each in waiting]
    assert [status for status, _ in answers] == [201] * len(waiting)
    expected = {f"{url}/image/{id}" for id in [*promised, *(known["id"] for _, known in answers)]}
    announced = []
    while expected - {*announced}:  # and maybe photos whose 202 was not received
        announced.append(await next_message())
    widths_announced = [(await client.json(f"{each}/meta"))["width"] for each in announced]
    assert len({*announced}) == len(announced) == len({*widths_announced})
    assert {(await client.get(each))[0] for each in announced} == {200}


async def test_a_photo_that_ends_its_process_is_given_up_after_three_starts(
    cluster: Cluster, client: Client
) -> None:
    cluster.odd_worker(2)
    _, url = cluster.web()
    next_message = await client.watch(url)
    deadly = asyncio.create_task(client.try_post(url, DEADLY))
    others = [await client.post(url) for _ in range(5)]
    assert [await next_message() for _ in others] == [each["url"] for each in others]
    status, problem = await deadly
    assert (status, "given up" in problem["detail"]) == (422, True)
    assert len(list(cluster.folder.glob("began-66-*"))) == 3
    assert (await client.post(url))["url"] == await next_message()


# --- Redis fails ---
async def test_redis_is_killed_and_started_again(cluster: Cluster, client: Client) -> None:
    """What was accepted is in its append-only file."""
    cluster.odd_worker(1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    known = await client.post(url)
    assert await next_message() == known["url"]
    assert (await client.get(known["url"]))[0] == 200
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    promised = await client.post(url, **LATER)
    cluster.redis.program.end(signal.SIGKILL)

    for path in ("/health", "/image", f"/image/{known['id']}", f"/image/{promised['id']}"):
        assert (await client.get(url + path))[0] == 503
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is away (--redis-url).")
    async with client.session.post(f"{url}/detect", data=ASTRONAUT) as answer:
        assert len((await answer.json())["faces"]) == 1
    cluster.redis.start()
    await client.until(url, status="ok")
    cluster.go_on(70)
    ids = {each["id"] for each in (promised, await waiting)}
    assert {await next_message() for _ in ids} == {f"{url}/image/{id}" for id in ids}
    assert {(await client.get(f"{url}/image/{id}"))[0] for id in ids} == {200}


async def test_redis_is_paused_for_5_s(cluster: Cluster, client: Client) -> None:
    cluster.odd_worker(1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    cluster.redis.program.signal_all(signal.SIGSTOP)
    cluster.go_on(70)
    (status, _), _ = await asyncio.gather(client.try_post(url), asyncio.sleep(5))
    cluster.redis.program.signal_all(signal.SIGCONT)
    assert status == 503
    await client.until(url, status="ok")
    urls = {(await client.post(url))["url"], (await waiting)["url"]}
    # What was refused was not kept, though Redis read it when it went on.
    assert {await next_message() for _ in urls} == urls
    assert {each["url"] for each in await client.json(f"{url}/image")} == urls


async def test_a_pause_of_redis_costs_no_start(cluster: Cluster, client: Client) -> None:
    """The worker asks again and again, and Redis answers it all at once."""
    worker, (_, url) = cluster.odd_worker(1), cluster.web()
    (process,) = worker.children()
    os.kill(process, signal.SIGSTOP)
    waiting = asyncio.create_task(client.post(url, SLOW))
    store = cluster.redis.client
    await until(lambda: store.exists("faces:jobs") and not store.exists("faces:queue"))
    cluster.redis.program.signal_all(signal.SIGSTOP)
    os.kill(process, signal.SIGCONT)
    await asyncio.sleep(7)  # seconds; it waits 3 for an answer
    cluster.redis.program.signal_all(signal.SIGCONT)
    await cluster.begun(70)
    (photo,) = store.keys("faces:photo:*")
    assert store.hget(photo, "starts") == b"1"
    cluster.go_on(70)
    assert (await client.get((await waiting)["url"]))[0] == 200


async def test_an_image_that_can_no_longer_be_looked_up_is_cut_off(
    cluster: Cluster, client: Client
) -> None:
    """And no error page is written into it."""
    cluster.worker()
    _, url = cluster.web("--keep", "1")
    noise = np.random.default_rng(1).integers(0, 255, (3500, 3500, 3), np.uint8)
    photo = cv2.imencode(".jpg", noise)[1].tobytes()  # more than the buffers of sockets hold
    assert 10e6 < len(photo) < 20e6
    large = await client.post(url, photo)
    small = await client.post(url)
    with socket.create_connection(("127.0.0.1", yarl.URL(url).port), TIMEOUT) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        path = yarl.URL(large["url"]).path
        reader.sendall(f"GET {path} HTTP/1.1\r\nHost: slow\r\nConnection: close\r\n\r\n".encode())
        received = reader.recv(1000)
        assert (await client.get(small["url"]))[0] == 200  # the copy of the large one goes
        cluster.redis.program.end(signal.SIGKILL)
        with contextlib.suppress(ConnectionResetError):
            while piece := await asyncio.to_thread(reader.recv, 65536):
                received += piece
    headers, _, image = received.partition(b"\r\n\r\n")
    (size,) = re.findall(rb"Content-Length: (\d+)", headers)
    assert 0 < len(image) < int(size)
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1" not in image and b"problem" not in image
    cluster.redis.start()
    await client.until(url, status="ok")


async def test_redis_has_lost_what_it_was_given(cluster: Cluster, client: Client) -> None:
    """As it does if it is killed without an append-only file."""
    _, url = cluster.web()
    waiting = asyncio.create_task(client.try_post(url))
    async with asyncio.timeout(TIMEOUT):
        while not cluster.redis.client.zcard("faces:jobs"):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    cluster.redis.client.config_set("appendonly", "no")
    cluster.redis.program.end(signal.SIGKILL)
    shutil.rmtree(cluster.redis.folder / "appendonlydir")
    cluster.redis.start()
    status, problem = await waiting
    assert (status, problem["detail"]) == (503, "Redis has lost the photo; post it again.")


async def test_redis_is_full(cluster: Cluster, client: Client) -> None:
    """Images go, the least recently used first; photos that were accepted stay."""
    cluster.odd_worker(1)
    _, url = cluster.web("--queue", "99")
    store = cluster.redis.client
    next_message = await client.watch(url)
    store.config_set("maxmemory", "16mb")
    noise = np.random.default_rng(1).integers(0, 255, (500, 69, 3), np.uint8)
    large = cv2.imencode(".png", cv2.resize(noise, (69, 5000)))[1].tobytes()
    promised = [await client.post(url, SLOW, **LATER)]
    while (answer := await client.try_post(url, large, **LATER))[0] == 202:
        promised.append(answer[1])
    assert "--maxmemory" in answer[1]["detail"]
    assert 2 * store.memory_usage(f"faces:photo:{promised[1]['id']}") * len(promised) > 16e6 - 2e6
    for number in range(60):
        store.set(f"faces:image:{number}", os.urandom(10**6), ex=1000)
    assert 0 < len(store.keys("faces:image:*")) < 30
    cluster.go_on(70)
    for each in promised:
        assert await next_message() == each["url"]

    store.config_set("maxmemory", "1mb")
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is full (--maxmemory).")


async def test_redis_becomes_full_while_a_photo_is_in_work(
    cluster: Cluster, client: Client
) -> None:
    """What was accepted is finished all the same."""
    cluster.odd_worker(1)
    _, url = cluster.web()
    next_message = await client.watch(url)
    waiting = asyncio.create_task(client.post(url, SLOW))
    await cluster.begun(70)
    cluster.redis.client.config_set("maxmemory", "1mb")
    cluster.go_on(70)
    assert await next_message() == (await waiting)["url"]


async def test_redis_wants_another_password(cluster: Cluster, client: Client) -> None:
    cluster.redis.client.config_set("requirepass", "secret")
    web, url = cluster.web()
    status, problem = await client.try_post(url)
    assert (status, problem["detail"]) == (503, "Redis is away (--redis-url).")
    assert "Redis is away: Authentication required" in web.log.read_text()


async def test_what_strangers_wrote_is_skipped(cluster: Cluster, client: Client) -> None:
    cluster.worker()
    web, url = cluster.web()
    next_message = await client.watch(url)
    store = cluster.redis.client
    garbage = [b"", b"\xff", b"{}", b"[]", b"7", b'{"id": 1, "faces": 5}', b'{"error": 1, "id": 2}']
    for line in garbage:
        store.xadd("faces:news", {"id": "garbage", "json": line})
        store.hset("faces:image:garbage", mapping={"json": line})
        assert (await client.get(f"{url}/image/garbage"))[0] == 404
    store.xadd("faces:news", {"other": "field"})
    store.lpush("faces:newest", "garbage", "nothing", b"\xff")
    store.set("faces:image:empty", "")
    store.zadd("faces:jobs", {"nothing": 0})  # and no photo
    assert (await client.get(f"{url}/image/empty"))[0] == 503
    async with asyncio.timeout(TIMEOUT):
        while store.exists("faces:jobs"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert (await client.get(f"{url}/image/nothing"))[0] == 404
    posted = await client.post(url)
    assert await next_message() == posted["url"]
    assert [each["id"] for each in await client.json(f"{url}/image")] == [posted["id"]]
    assert "stranger" in web.log.read_text()


def make_garbage(message: dict[str, Any]) -> Iterator[bytes | str]:
    """Yield what is no JSON, JSON that is no message, and messages that are almost good."""
    yield from (b"", b"\xff", b"no JSON", b"5", b"[]", b"{}", b'{"body": 1}')
    id, headers = "x", message["headers"]
    almost_good: list[dict[str, Any]] = [
        {"headers": 5},
        {"headers": {"task": "of a stranger", "id": id}},
        {"headers": {"task": ["a list"], "id": id}},
        {"headers": headers | {"eta": "never"}},
        {"headers": headers | {"timelimit": 5}},
        {"body": None},
        {"body": "no JSON"},
        {"body": "[]"},
        {"body": '[["too", "many"], {}, {}]'},
        {"body": '[[{"an": "object"}], {}, {}]'},
        {"properties": {}},
        {"content-type": "application/x-python-serialize"},
    ]
    for each in almost_good:
        yield json.dumps(message | each)


async def test_garbage_in_the_queue_of_celery_is_skipped(cluster: Cluster, client: Client) -> None:
    """The worker goes on, as the same process, and what is in work and what waits is not lost."""
    worker, (_, url) = cluster.odd_worker(1), cluster.web()
    next_message = await client.watch(url)
    queue = cluster.redis.client
    promised = [await client.post(url, SLOW, **LATER)]
    await cluster.begun(70)
    message = json.loads(queue.hget(f"faces:photo:{promised[0]['id']}", "message"))
    for garbage in make_garbage(message):
        queue.lpush("faces:queue", garbage)
    promised.append(await client.post(url, **LATER))
    cluster.go_on(70)
    assert {await next_message() for _ in promised} == {each["url"] for each in promised}
    assert (await client.post(url))["url"] == await next_message()
    assert worker.process.poll() is None
