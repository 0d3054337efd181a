"""The page in a real browser: upload, run, downloads, a narrow window, several users, and what is left of them."""

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import rasterio
from conftest import make_scene, write_tiff
from mapping_networks import contextual
from rasterio.transform import Affine

from hf_seg.demo.settings import DemoSettings
from hf_seg.hub.export import export_model
from hf_seg.mapping.raster import predict_raster

pytest.importorskip("gradio", reason="make test-page installs Gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="make test-page installs playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to open the page with")

FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update"
PROJECT = Path(__file__).parents[1]
UTM = {"crs": "EPSG:32631", "transform": Affine(0.5, 0, 4e5, 0, -0.5, 5e6)}
LARGE, UPLOAD_MIB = 900, 2  # a scene that takes some seconds to map


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "toy"
    export_model(contextual(), folder, crop_size=64, recipe="", results=None)
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small scenes, a large one, and a text in a file that ends in .tif."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, name in enumerate(("port", "field")):
        write_tiff(folder / f"{name}.tif", make_scene(np.random.default_rng(number), 90 + 30 * number)[0], **UTM)
    write_tiff(folder / "large.tif", make_scene(np.random.default_rng(2), LARGE)[0], compress="deflate", **UTM)
    (folder / "letter.tif").write_text("Dear page, I am no raster.")
    (folder / "heavy.tif").write_bytes(bytes((UPLOAD_MIB << 20) + 1))
    return folder


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Any]:
    from hf_seg.demo.serve import serving

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = DemoSettings(port=port, sample_size=96, max_megapixels=1, max_upload_mib=UPLOAD_MIB)
    with serving([str(model)], settings) as server:
        yield server
    assert not server.sessions.root.exists()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        flags = [f"--{flag}" for flag in FLAGS.split()]
        browser = running.chromium.launch(executable_path=CHROMIUM, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Callable[..., Any]]:
    """Open the page as a new user; nothing of it may come from elsewhere or fail."""
    contexts, problems = [], []

    def visit(width: int = 1400, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda each: is_elsewhere(each.url) and problems.append(f"asks {each.url}"))
        page.on("pageerror", lambda error: problems.append(f"error {error}"))
        page.on("response", lambda each: each.status >= 500 and problems.append(f"{each.status} {each.url}"))
        page.goto(server.url)
        page.wait_for_selector("#run")
        return page

    def is_elsewhere(url: str) -> bool:
        return not url.startswith((server.url, "data:", "blob:"))

    yield visit
    for context in contexts:
        context.close()
    assert problems == []


def choose(page: Any, scene: Path) -> None:
    """Upload a scene, in place of the last one, and wait until the page shows it."""
    if page.query_selector("#upload .file-preview"):
        page.click("#upload button[aria-label='Clear']")
    page.set_input_files("#upload input[type=file]", scene)
    page.wait_for_selector('.hfs-viewer[data-state="scene"]')


def map_it(page: Any) -> None:
    page.click("#run:enabled")
    page.wait_for_selector('.hfs-viewer[data-state="map"]')
    page.wait_for_selector("#run:enabled")


def download(page: Any, key: str, folder: Path) -> tuple[Path, str]:
    """Click a download; return the file and its address."""
    with page.expect_download() as started:
        page.click(f"#download-{key}")
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path, started.value.url


def eventually(holds: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def status_of(url: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None) -> int:
    """Ask the server as no browser would; paths go out as they are."""
    host, path = urlsplit(url).netloc, url.partition(urlsplit(url).netloc)[2]
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request(method, path, body=body, headers=headers or {})
    status = connection.getresponse().status
    connection.close()
    return status


def test_an_uploaded_scene_is_mapped_shown_and_downloaded(
    visit: Callable[..., Any], scenes: Path, model: Path, tmp_path: Path
) -> None:
    page = visit()
    choose(page, scenes / "port.tif")
    assert page.inner_text("#status") == "90 × 90 pixels, 1 band of uint8, EPSG:32631"
    map_it(page)
    predict_raster(
        model, scenes / "port.tif", tmp_path / "expected.tif", cog=True, confidence=True, show_progress=False
    )
    files = {key: download(page, key, tmp_path)[0] for key in ("map", "confidence", "gpkg", "geojson", "zip")}
    assert files["map"].name == "port_map.tif" and files["geojson"].name == "port_map.geojson"
    for key, expected in (("map", "expected.tif"), ("confidence", "expected_confidence.tif")):
        with rasterio.open(files[key]) as file, rasterio.open(scenes / "port.tif") as scene:
            assert (file.crs, file.transform, file.shape) == (scene.crs, scene.transform, scene.shape)
            with rasterio.open(tmp_path / expected) as other:
                assert np.array_equal(file.read(1), other.read(1))
    assert files["gpkg"].stat().st_size > 1000 and files["zip"].stat().st_size > 1000

    with rasterio.open(files["map"]) as file:
        classes = file.read(1)
    rows = page.locator(".hfs-legend button")
    assert rows.count() == 8
    water = rows.filter(has_text="water").inner_text().split("\n")
    assert water[0] == "water" and water[1] == f"{100 * (classes == 6).mean():.1f} %"


def test_both_maps_move_together_fade_and_tell_what_is_under_the_pointer(
    visit: Callable[..., Any], scenes: Path
) -> None:
    page = visit()
    choose(page, scenes / "port.tif")
    map_it(page)

    def colors(pane: str) -> list[int]:
        """Number of different colours in a pane, then those of its middle row."""
        return page.evaluate(
            """pane => {
                const canvas = document.querySelector(`[data-pane=${pane}] canvas`);
                const pixels = new Uint32Array(
                    canvas.getContext("2d").getImageData(0, canvas.height >> 1, canvas.width, 1).data.buffer);
                return [new Set(pixels).size, ...pixels];
            }""",
            pane,
        )

    before = {pane: colors(pane) for pane in ("scene", "map")}
    assert before["scene"][0] > 20 and before["map"][0] >= 2
    page.hover('[data-pane="scene"] canvas')
    page.wait_for_function("/ % confident .*EPSG:32631/.test(document.querySelector('.hfs-readout').textContent)")
    east = float(page.inner_text(".hfs-readout").rpartition("· ")[2].partition(",")[0])
    assert east == pytest.approx(4e5 + 0.5 * 45, abs=1)
    page.mouse.wheel(0, -480)
    page.wait_for_timeout(300)
    assert all(colors(pane)[1:] != before[pane][1:] for pane in before)
    page.click('[data-zoom="fit"]')
    page.mouse.move(0, 0)
    page.wait_for_timeout(300)
    assert colors("map") == before["map"]
    page.fill(".hfs-fade input", "100")  # nothing is that certain
    page.wait_for_timeout(300)
    assert page.inner_text(".hfs-kept") == "0 % of the map is above" and colors("map")[1:] != before["map"][1:]
    for row in page.locator(".hfs-legend button").all():
        row.click()
    page.wait_for_timeout(300)
    assert colors("map")[0] <= 3  # the frame and the ground behind it


@pytest.mark.parametrize(("width", "columns"), [(390, 1), (1400, 2)])
def test_no_window_is_too_narrow(visit: Callable[..., Any], width: int, columns: int) -> None:
    page = visit(width, has_touch=True)
    page.click("#sample-0")
    page.wait_for_selector('.hfs-viewer[data-state="scene"]')
    map_it(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    lefts = page.evaluate("[...document.querySelectorAll('.hfs-pane')].map(each => each.getBoundingClientRect().left)")
    assert len({*lefts}) == columns


def test_two_fingers_zoom_and_one_moves_a_map_that_is_zoomed(visit: Callable[..., Any]) -> None:
    page = visit(390, has_touch=True, is_mobile=True)
    page.tap("#sample-0")
    page.wait_for_selector('.hfs-viewer[data-state="scene"]')
    canvas = page.locator('[data-pane="map"] canvas')
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    devices = page.context.new_cdp_session(page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": number} for number, (x, y) in enumerate(points)]
        devices.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})

    assert canvas.evaluate("each => each.style.touchAction") == "pan-y"  # one finger scrolls the page
    touch("touchStart", (x - 20, y), (x + 20, y))
    for step in range(20, 90, 5):
        touch("touchMove", (x - step, y), (x + step, y))
    touch("touchEnd")
    page.wait_for_function("document.querySelector('[data-pane=map] canvas').style.touchAction === 'none'")
    assert page.evaluate("visualViewport.scale") == 1  # the map is zoomed, not the page
    scrolled = page.evaluate("scrollY")
    touch("touchStart", (x, y))
    for step in range(0, 80, 10):
        touch("touchMove", (x, y - step))
    touch("touchEnd")
    page.wait_for_timeout(300)
    assert page.evaluate("scrollY") == scrolled


def test_what_is_no_raster_or_too_large_is_refused_on_the_page(visit: Callable[..., Any], scenes: Path) -> None:
    page = visit()
    page.set_input_files("#upload input[type=file]", scenes / "letter.tif")
    error = page.wait_for_selector(".hfs-error").inner_text()
    assert error == "letter.tif is not a GeoTIFF that can be mapped: its content is not that of a TIFF file"
    assert page.is_disabled("#run")
    page.set_input_files("#upload input[type=file]", scenes / "heavy.tif")
    page.wait_for_selector("text=/maximum allowed size/")
    choose(page, scenes / "field.tif")  # the page is as good as new
    assert page.is_enabled("#run")


def test_two_users_at_the_same_time_get_their_own_maps(
    visit: Callable[..., Any], server: Any, scenes: Path, tmp_path: Path
) -> None:
    users = {name: visit() for name in ("port", "field")}
    for name, page in users.items():
        choose(page, scenes / f"{name}.tif")
    for page in users.values():
        page.click("#run:enabled")
    links = {}
    for name, page in users.items():
        page.wait_for_selector('.hfs-viewer[data-state="map"]')
        file, links[name] = download(page, "map", tmp_path)
        with rasterio.open(file) as class_map, rasterio.open(scenes / f"{name}.tif") as scene:
            assert class_map.shape == scene.shape and class_map.tags()["scene"] == f"{name}.tif"
    folders = {name: Path(link.partition("file=")[2]).parents[1] for name, link in links.items()}
    assert folders["port"] != folders["field"] and all(len(folder.name) == 32 for folder in folders.values())
    users["port"].context.close()
    assert eventually(lambda: not folders["port"].exists())  # nothing is left of one, all of the other
    assert folders["field"].exists()
    assert status_of(links["port"]) == 403 and status_of(links["field"]) == 200


def test_a_run_is_stopped_and_the_page_can_map_again(visit: Callable[..., Any], server: Any, scenes: Path) -> None:
    page = visit()
    choose(page, scenes / "large.tif")
    page.click("#run:enabled")
    assert eventually(lambda: any(server.sessions.root.glob("*/*/.large_map.tif.partial")))
    page.click("#stop:enabled")
    page.wait_for_selector("text=Stopped.")
    assert eventually(lambda: not any(server.sessions.root.glob("*/*/.large_map.tif.partial")))
    assert page.locator('.hfs-viewer[data-state="scene"]').count() == 1
    choose(page, scenes / "port.tif")
    map_it(page)


def test_a_user_who_waits_can_leave_the_queue(visit: Callable[..., Any], server: Any, scenes: Path) -> None:
    first, second = visit(), visit()
    choose(first, scenes / "large.tif")
    choose(second, scenes / "port.tif")
    first.click("#run:enabled")
    assert eventually(lambda: any(server.sessions.root.glob("*/*/.large_map.tif.partial")))
    second.click("#run:enabled")
    second.click("#stop:enabled")
    second.wait_for_selector("text=Stopped.")
    assert first.is_enabled("#stop")  # the run of the other goes on
    first.click("#stop")
    map_it(second)


def test_a_closed_tab_ends_the_run_and_leaves_nothing(visit: Callable[..., Any], server: Any, scenes: Path) -> None:
    page = visit()
    choose(page, scenes / "large.tif")
    page.click("#run:enabled")
    assert eventually(lambda: any(server.sessions.root.glob("*/*/.large_map.tif.partial")))
    page.context.close()
    assert eventually(lambda: not any(server.sessions.root.glob("*/*/*large*")))
    server.sessions.sweep(unused_seconds=-1)
    assert not any(server.sessions.root.rglob("large*"))


def test_no_file_of_the_computer_is_served(server: Any, model: Path, tmp_path: Path) -> None:
    (server.sessions.root.parent / "secret.txt").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    (server.sessions.get("someone").new_folder() / "link.txt").symlink_to(tmp_path / "secret.txt")
    (link,) = server.sessions.root.glob("*/*/link.txt")
    paths = [
        "/etc/passwd",
        f"{model}/config.json",
        f"{server.sessions.root}/../secret.txt",
        str(tmp_path / "secret.txt"),
    ]
    paths += ["../../etc/passwd", "setup.cfg", str(link), str(server.sessions.root), f"{server.sessions.root}/"]
    for path in paths:
        assert status_of(f"{server.url}gradio_api/file={path}") == 403, path
    assert status_of(f"{server.url}gradio_api/file=http://127.0.0.1:{urlsplit(server.url).port}/config") == 403
    assert status_of(f"{server.url}gradio_api/proxy=http://example.org/") == 403
    for page in ("docs", "openapi.json", "monitoring", "gradio_api/runs"):
        assert status_of(f"{server.url}{page}") in (403, 404), page
    server.sessions.close("someone")


def test_the_app_of_the_space_starts_and_ends_without_a_trace(model: Path, scenes: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MODELS": str(model), "SAMPLES": str(scenes / "port.tif"), "OPTIONS": f"--port {port}"}
    environment = {**os.environ, **variables, "PYTHONPATH": str(PROJECT), "TMPDIR": str(tmp_path)}
    app = subprocess.Popen([sys.executable, str(PROJECT / "space" / "app.py")], env=environment, stdout=subprocess.PIPE)
    assert app.stdout is not None and b"in a browser" in app.stdout.readline()
    assert status_of(f"http://127.0.0.1:{port}/") == 200 and any(tmp_path.glob("hf_seg_demo_*"))
    app.send_signal(signal.SIGTERM)
    assert app.wait(timeout=30) == 0
    assert not any(tmp_path.glob("hf_seg_demo_*"))


def form(name: str, content: bytes, count: int = 1) -> tuple[bytes, dict[str, str]]:
    """Build a request with files."""
    part = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    body = (part + content + b"\r\n") * count + b"--edge--\r\n"
    return body, {"Content-Type": "multipart/form-data; boundary=edge"}


def uploaded(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_an_upload_stays_in_its_folder_and_many_files_are_limited_as_one(server: Any) -> None:
    root, url = server.sessions.root, f"{server.url}gradio_api/upload"
    before = uploaded(root)
    assert status_of(url, "POST", *form("../../../escaped.tif", b"up and away")) == 200
    (new,) = uploaded(root) - before
    assert Path(new).name == "escaped.tif" and len(Path(new).parent.name) == 64
    assert not any(server.sessions.root.parent.glob("*escaped*"))
    (root / new).unlink()
    before = uploaded(root)
    assert status_of(url, "POST", *form("part.tif", bytes(UPLOAD_MIB << 18), count=5)) == 413
    assert uploaded(root) == before


def test_a_cancelled_upload_leaves_nothing(server: Any) -> None:
    root = server.sessions.root
    before = uploaded(root)
    body, headers = form("half.tif", bytes(1 << 20))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        lines = ["POST /gradio_api/upload HTTP/1.1", f"Host: {address.netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: 1 << 19])
        assert eventually(lambda: len(uploaded(root)) > len(before))
    assert eventually(lambda: uploaded(root) == before)
