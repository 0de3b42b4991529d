"""The OpenAPI document and Swagger UI, with a real server, and how the other documents look."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import photos
import pytest
from helpers import INSTALL, NPM_INSTALL, ROOT, TIMEOUT, ask_json, post_photo, run_server
from pages import expect, unanswered
from photos import ASTRONAUT, ASTRONAUT_FILE

import server

if TYPE_CHECKING:
    from pages import Visit
    from playwright.async_api import Page, Route

pytestmark = pytest.mark.asyncio(loop_scope="session")
CDN = "https://cdn.jsdelivr.net"
DOCUMENT = json.loads((ROOT / "static" / "openapi.json").read_text())
PROBLEM = "application/problem+json"
EXAMPLES = {
    name: example["value"]
    for examples in (
        DOCUMENT["components"]["examples"],
        *(
            answer["content"][PROBLEM]["examples"]
            for answer in (
                DOCUMENT["components"]["responses"]["Refused"],
                DOCUMENT["components"]["responses"]["Busy"],
                DOCUMENT["paths"]["/faces"]["get"]["responses"]["426"],
            )
        ),
    )
    for name, example in examples.items()
}
SWAGGER_UI = Path(__file__).parent / "node_modules" / "swagger-ui-dist"
HTTP_METHODS = {"get", "post", "put"}


# --- The OpenAPI document ---


async def test_each_route_is_documented() -> None:
    routes = {
        (route.resource.canonical, route.method.lower())
        for route in server.create_app().router.routes()
        if route.resource is not None and route.resource.canonical != "/static"
    }
    documented = {
        (path, method)
        for path, item in DOCUMENT["paths"].items()
        for method in HTTP_METHODS & set(item)
    }
    gets = [path for path, method in documented if method == "get"]
    assert documented | {(path, "head") for path in gets} == routes  # HEAD goes without saying


async def test_the_server_answers_nothing_that_it_does_not_describe(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason=f"needs Schemathesis: {INSTALL}")
    with run_server(tracebacks=True) as running:  # it sends invalid HTTP, too
        command = [
            Path(sys.executable).with_name("schemathesis"),
            "run",
            f"{running.url}/openapi.json",
            # No schema tells what a photo is.
            "--exclude-checks=positive_data_acceptance,negative_data_rejection",
            "--max-examples=20",
            "--seed=1",
            "--no-color",
        ]
        done = await asyncio.to_thread(
            subprocess.run,
            command,
            cwd=tmp_path,
            env=os.environ | {"SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("hooks.py"))},
            stdout=subprocess.PIPE,
            text=True,
            timeout=10 * TIMEOUT,  # it sends 430 requests, one after the other
        )
    assert done.returncode == 0, done.stdout
    operations = [HTTP_METHODS & set(item) for item in DOCUMENT["paths"].values()]
    assert f"Tested: {sum(map(len, operations))}" in done.stdout


async def test_its_examples_of_an_image_are_real_answers(url: str) -> None:
    real, example = await post_photo(url), EXAMPLES["astronaut"]
    same = ("width", "height", "faces", "filename")
    assert {name: real[name] for name in same} == {name: example[name] for name in same}
    assert real.keys() == example.keys()
    assert await ask_json("GET", f"{url}/image") == [shorten(real)]
    assert EXAMPLES["images"] == [shorten(example)]


def shorten(image: dict[str, Any]) -> dict[str, Any]:
    """The JSON of an image, as it stands in the list."""
    faces = image.pop("faces")
    return image | {"face_count": len(faces)}


async def test_its_example_of_detected_faces_is_a_real_answer(url: str) -> None:
    real = await ask_json("POST", f"{url}/detect", data=ASTRONAUT)
    assert real | {"took_ms": 0} == EXAMPLES["detected"] | {"took_ms": 0}


NOBODY = "00000000-0000-4000-8000-000000000000"
EMPTY_FORM = {"data": b"--x--", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
ERRORS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("no_file", "POST", "/image", EMPTY_FORM),
    ("empty", "POST", "/image", {"data": b""}),
    ("other_host", "GET", "/health", {"headers": {"Host": "elsewhere.example"}}),
    ("other_site", "GET", "/health", {"headers": {"Origin": "https://elsewhere.example"}}),
    ("no_image", "GET", f"/image/{NOBODY}", {}),
    ("no_photo", "POST", "/image", {"data": b"a poem"}),
    ("damaged", "POST", "/detect", {"data": ASTRONAUT[:5000]}),
    ("too_large", "POST", "/image", {"data": io.BytesIO(bytes(21 * 2**20))}),
    ("too_many_pixels", "POST", "/image", {"data": photos.blank_png(20_000, 10_000)}),
    ("no_websocket", "GET", "/faces", {"headers": {"Host": "localhost:8282"}}),
]


@pytest.mark.parametrize(
    ("name", "method", "path", "options"), ERRORS, ids=[name for name, *_ in ERRORS]
)
async def test_its_examples_of_errors_are_real_answers(
    url: str, name: str, method: str, path: str, options: dict[str, Any]
) -> None:
    assert await ask_json(method, url + path, **options) == EXAMPLES[name]


@pytest.mark.parametrize("name", ["upload_timeout", "queue_full", "memory", "max_clients"])
async def test_its_other_examples_of_errors_are_texts_of_the_server(name: str) -> None:
    assert f'"{EXAMPLES[name]["detail"]}"' in (ROOT / "server.py").read_text("utf-8")


async def test_the_answer_that_the_readme_shows_is_a_real_one(url: str) -> None:
    shown = re.search(r"^( *)\{\n.*?^\1\}\n", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
    assert shown is not None
    real = await post_photo(url)
    differ = {"id": "", "url": "", "took_ms": 0}
    assert list((json.loads(shown[0]) | differ).items()) == list((real | differ).items())


async def test_server_py_alone_has_no_documents_and_says_so(tmp_path: Path) -> None:
    with run_server(program=Path(shutil.copy(ROOT / "server.py", tmp_path))) as running:
        for path in ("/openapi.json", "/docs"):
            assert (
                f"There is no GET {path}" in (await ask_json("GET", running.url + path))["detail"]
            )


# --- /docs ---


@pytest.fixture
def swagger_ui() -> Path:
    if not SWAGGER_UI.exists():
        pytest.skip(f"needs swagger-ui-dist: {NPM_INSTALL}")
    return SWAGGER_UI


async def visit_docs(visit: Visit, url: str, route: Callable[[Route], Awaitable[None]]) -> Page:
    page = await visit(url, allow=CDN, paused=True)  # the page waits 3 s for the CDN
    await page.route(f"{CDN}/**", route)
    await page.goto(f"{url}/docs")
    await page.clock.resume()
    return page


async def test_swagger_ui_posts_a_photo(url: str, visit: Visit, swagger_ui: Path) -> None:
    version = json.loads((swagger_ui / "package.json").read_text())["version"]

    async def from_npm(route: Route) -> None:
        file = route.request.url.removeprefix(f"{CDN}/npm/swagger-ui-dist@{version}/")
        await route.fulfill(path=swagger_ui / file, headers={"Access-Control-Allow-Origin": "*"})

    page = await visit_docs(visit, url, from_npm)
    await page.get_by_text("Post a photo", exact=True).click()
    await page.locator("input[type=file]").set_input_files(ASTRONAUT_FILE)
    await page.get_by_role("button", name="Execute").click()
    answer = page.locator(".live-responses-table")
    await expect(answer).to_contain_text('"filename": "astronaut.jpg"')
    await expect(answer).to_contain_text("201")


async def test_without_internet_a_page_of_our_own_shows_each_operation_and_posts(
    url: str, visit: Visit
) -> None:
    page = await visit_docs(visit, url, lambda route: route.abort())
    operations = [(path, set(item) & HTTP_METHODS) for path, item in DOCUMENT["paths"].items()]
    names = [f"{each.upper()} {path}" for path, all in operations for each in all]
    await expect(page.locator("h2")).to_have_count(len(names))
    assert sorted(await page.locator("h2").all_text_contents()) == sorted(names)
    post = page.locator("section").filter(has_text="POST /image").first
    await post.locator("input").set_input_files(ASTRONAUT_FILE)
    await post.get_by_role("button", name="Send").click()
    await expect(post.locator("output")).to_contain_text('"filename": "astronaut.jpg"')
    await expect(page.get_by_text("width (query)")).to_be_visible()


async def test_a_network_that_swallows_requests_shows_our_own_page_after_3_s(
    url: str, visit: Visit
) -> None:
    page = await visit(url, allow=CDN, paused=True)
    async with unanswered(page, f"{CDN}/**"):
        await page.goto(f"{url}/docs", wait_until="domcontentloaded")
        await page.clock.run_for(3000)
        await expect(page.locator("h2").first).to_be_visible()


# --- The documents in Markdown ---
WIDTH = 100  # characters, as in the code
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT))
)


def without_code(document: Path) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", document.read_text("utf-8"), flags=re.M | re.S)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)", without_code(document), re.M)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@each_document
async def test_a_document_is_wrapped_at_the_width_of_the_code(document: Path) -> None:
    lines = without_code(document).splitlines()
    assert [line for line in lines if len(line) > WIDTH and not line.startswith("|")] == []


@each_document
async def test_each_link_of_a_document_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(document))
    for link in [link for link in links if "://" not in link]:
        file, _, anchor = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


async def test_each_test_that_a_document_names_exists() -> None:
    tests = "".join(file.read_text("utf-8") for file in ROOT.glob("tests/test_*.py"))
    for document in DOCUMENTS:
        for name in re.findall(r"`(test_\w+)(?:\.\.\.)?`", document.read_text("utf-8")):
            assert len(re.findall(rf"def {name}", tests)) == 1, name


async def test_each_default_that_a_document_tells_is_that_of_the_option() -> None:
    defaults = vars(server.Config())
    told = r"\b(\d+)(?: \w+)?\s\(`--(max-mb|max-clients|upload-timeout)`\)"
    copies = [copy for each in DOCUMENTS for copy in re.findall(told, each.read_text("utf-8"))]
    assert copies
    for number, option in copies:
        assert int(number) == defaults[option.replace("-", "_")], option
