"""compose.yaml: real containers, which are killed."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator

import aiohttp
import pytest
import yarl
from testing import (
    CLUSTER,
    LATER,
    TIMEOUT,
    Client,
)

PROJECT = f"faces-test-{uuid.uuid4().hex[:8]}"  # two runs on one machine do not meet


def run(*command: str) -> str:
    environment = os.environ | {"PORT": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def compose(*arguments: str) -> str:
    file = str(CLUSTER / "compose.yaml")
    return run("docker-compose", "-p", PROJECT, "-f", file, *arguments)


def containers(service: str, *options: str) -> list[str]:
    """Return the ids of the containers of a service."""
    labels = {"project": PROJECT, "service": service}
    filters = [f"--filter=label=com.docker.compose.{key}={labels[key]}" for key in labels]
    return run("docker", "ps", "-q", *filters, *options).split()


@pytest.fixture(scope="module")
def composed() -> Iterator[str]:
    """The URL of two web processes and three workers behind nginx."""
    for command in ("docker", "docker-compose"):
        if not shutil.which(command):
            pytest.skip(f"{command} is missing")
    if subprocess.run(["docker", "info"], capture_output=True, timeout=TIMEOUT).returncode:
        pytest.skip("a Docker engine is missing")
    try:
        compose("up", "-d", "--build", "--scale", "web=2", "--scale", "worker=3")
        yield f"http://127.0.0.1:{compose('port', 'nginx', '80').rpartition(':')[2]}"
    finally:
        compose("down", "-v", "-t", "1")
        for image in run("docker", "images", "--format={{.Repository}}", f"{PROJECT}*").split():
            run("docker", "rmi", "--no-prune", image)  # the next run needs its layers


async def healthy(service: str, count: int) -> None:
    """Wait until as many containers of a service are healthy."""
    async with asyncio.timeout(TIMEOUT):
        while len(containers(service, "--filter=health=healthy")) < count:  # noqa: ASYNC110
            await asyncio.sleep(0.2)


async def until_connected(url: str, client: Client) -> None:
    """Wait until nginx has passed watchers on to both web processes."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                await client.watch(url)
                seen = [await client.json(f"{url}/health") for _ in range(9)]
                if all(each.get("clients") for each in seen):
                    return
            await asyncio.sleep(0.05)


async def test_compose_runs_it_all(composed: str, client: Client) -> None:
    await healthy("web", 2)
    await healthy("worker", 3)
    await until_connected(composed, client)
    watchers = [await client.watch(composed) for _ in range(5)]
    for _ in range(3):
        posted = await client.post(composed)
        assert posted["url"] == f"{composed}/image/{posted['id']}"
        assert (await client.get(posted["url"]))[0] == 200
        assert {await next_message() for next_message in watchers} == {posted["url"]}
    promised = await client.post(composed, **LATER)
    assert (await client.get(promised["url"]))[0] == 200

    # A large upload passes through nginx, and is refused before it is over.
    reader, writer = await asyncio.open_connection("127.0.0.1", yarl.URL(composed).port)
    async with asyncio.timeout(TIMEOUT):
        writer.write(b"POST /image HTTP/1.1\r\nHost: large\r\nContent-Length: 21000000\r\n\r\n")
        writer.write(bytes(20 * 2**20 + 1))
        answer = await reader.readuntil(b"}\n")
        writer.close()
        await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_compose_survives_its_redis_and_restarts_what_crashed(
    composed: str, client: Client
) -> None:
    next_message = await client.watch(composed)
    old = await client.post(composed)
    assert await next_message() == old["url"]
    as_root = ("--pid=host", "--user=root", "--entrypoint=sh")
    crashed = [containers("worker")[0], *containers("redis")]
    states = [run("docker", "inspect", "-f", "{{.State.Pid}}", each) for each in crashed]
    image = run("docker", "inspect", "-f", "{{.Image}}", containers("web")[0])
    run("docker", "run", "--rm", *as_root, image, "-c", f"kill -9 {' '.join(states)}")
    for each in crashed:
        async with asyncio.timeout(TIMEOUT):
            state = "{{.RestartCount}} {{.State.Health.Status}}"
            while run("docker", "inspect", "-f", state, each) != "1 healthy":  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    for _ in range(6):
        await client.until(composed, status="ok")
    assert (await client.get(old["url"]))[0] == 200  # from the file of Redis
    posted = await client.post(composed)
    assert await next_message() == posted["url"]
