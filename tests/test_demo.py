"""What stands behind the page: whose files lie where, which uploads are refused, and what a run writes. No browser."""

import asyncio
import base64
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from conftest import make_scene, write_tiff
from mapping_networks import ROTATED, Constant, contextual, pointwise
from rasterio.transform import Affine

from hf_seg.demo.cli import main, parse
from hf_seg.demo.jobs import StoppedError, run_job, write_zip
from hf_seg.demo.models import Models
from hf_seg.demo.sessions import Sessions, take_upload
from hf_seg.demo.uploads import MAX_SIDE, check_scene, safe_name
from hf_seg.demo.view import MAX_SIDE as MAX_VIEW
from hf_seg.demo.view import area_text, view_scene
from hf_seg.errors import UserError
from hf_seg.hub.export import export_model
from hf_seg.inference.load import use_network
from hf_seg.labels import OPEN_EARTH_MAP

PROJECT = Path(__file__).parents[1]
UTM = {"crs": "EPSG:32631", "transform": Affine(0.5, 0, 4e5, 0, -0.5, 5e6)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy network."""
    folder = tmp_path_factory.mktemp("model") / "toy"
    export_model(contextual(), folder, crop_size=64, recipe="", results=None)
    return folder


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    (tmp_path / "root").mkdir()
    return Sessions(tmp_path / "root", keep_seconds=60)


def write_scene(path: Path, size: int = 70, **profile: Any) -> Path:
    write_tiff(path, make_scene(np.random.default_rng(0), size)[0], **{**UTM, **profile})
    return path


def upload(root: Path, name: str, content: bytes = b"content") -> Path:
    """Write a file where Gradio writes an upload: in a folder that is named after the content."""
    folder = root / ("f" * 64)
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


# Sessions


def test_each_user_has_a_folder_of_an_unguessable_name(sessions: Sessions) -> None:
    one, other = sessions.get("a").folder, sessions.get("b").folder
    assert sessions.get("a").folder == one != other
    assert len(one.name) == len(other.name) == 32  # 128 random bits
    assert one.stat().st_mode & 0o777 == 0o700
    with pytest.raises(UserError, match="belongs to no session"):
        sessions.get(None)


def test_nothing_is_left_of_a_closed_session(sessions: Sessions, tmp_path: Path) -> None:
    session = sessions.get("a")
    (session.new_folder() / "map.tif").write_text("map")
    sessions.close("a")
    assert session.stop.is_set() and not session.folder.exists()
    sessions.close("a")  # once more, and of one that never was
    sessions.close(None)
    assert sessions.get("a").folder != session.folder


def test_a_run_of_a_closed_session_keeps_its_folder_until_it_ends(sessions: Sessions) -> None:
    session = sessions.get("a")
    with sessions.running(session):
        folder = session.new_folder()
        sessions.close("a")
        assert session.stop.is_set() and folder.exists()
        sessions.sweep(unused_seconds=0)
        assert folder.exists()
    assert not session.folder.exists()


def test_two_users_share_an_upload_until_the_last_one_leaves(sessions: Sessions) -> None:
    file = upload(sessions.root, "same.tif")
    places = []
    for key in ("a", "b"):
        places.append(sessions.get(key).new_folder() / "same.tif")
        take_upload(file, places[-1])
    sessions.close("a")
    sessions.sweep(unused_seconds=-1)
    assert file.exists() and places[1].read_bytes() == b"content" and not places[0].exists()
    sessions.close("b")
    sessions.sweep(unused_seconds=-1)
    assert [*sessions.root.iterdir()] == []


def test_what_no_session_takes_is_deleted_when_it_is_old(sessions: Sessions) -> None:
    file, partial = upload(sessions.root, "late.tif"), sessions.root / "tmp1234"
    partial.write_bytes(b"half")
    sessions.sweep(unused_seconds=60)
    assert file.exists() and partial.exists()
    for path in (file, partial):
        os.utime(path, (time.time() - 61,) * 2)
    sessions.sweep(unused_seconds=60)
    assert [*sessions.root.iterdir()] == []
    with pytest.raises(UserError, match=r"^late\.tif is no longer on the server; upload it again$"):
        take_upload(file, sessions.get("a").new_folder() / "late.tif")


def test_a_resting_session_is_deleted_and_one_with_a_run_is_not(tmp_path: Path) -> None:
    sessions = Sessions(tmp_path, keep_seconds=-1)
    resting, busy = sessions.get("a"), sessions.get("b")
    with sessions.running(busy):
        sessions.sweep()
        assert not resting.folder.exists() and busy.folder.exists()


def test_sessions_of_many_threads_do_not_mix(sessions: Sessions) -> None:
    folders: list[Path] = []

    def visit(number: int) -> None:
        session = sessions.get(f"user {number % 4}")
        with sessions.running(session):
            sessions.sweep(unused_seconds=-1)
            (session.new_folder() / "map.tif").write_text(str(number % 4))
        folders.append(session.folder)

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 40 and len({*folders}) == 4
    found = [{path.read_text() for path in folder.glob("*/map.tif")} for folder in {*folders}]
    assert sorted(found, key=min) == [{"0"}, {"1"}, {"2"}, {"3"}]


# Uploads


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("scene.tif", "scene.tif"),
        ("Hafen Süd (2).TIFF", "Hafen_S_d_2.tif"),
        ("../../etc/passwd", "passwd.tif"),
        (r"C:\data\a.tif", "a.tif"),
        ("/vsicurl/http://x/y.tif", "y.tif"),
        ("..tif", "scene.tif"),
        ("a\nb.tif", "a_b.tif"),
        ("x" * 300 + ".tif", "x" * 60 + ".tif"),
        ("<script>.tif", "script.tif"),
    ],
)
def test_a_name_becomes_a_plain_file_name(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_the_header_of_a_scene_is_told(tmp_path: Path) -> None:
    facts = check_scene(write_scene(tmp_path / "a.tif"), max_megapixels=1)
    assert str(facts) == "70 × 70 pixels, 1 band of uint8, EPSG:32631"
    write_tiff(tmp_path / "b.tif", np.ones((3, 8, 9), np.float32))
    assert str(check_scene(tmp_path / "b.tif", max_megapixels=1)) == "9 × 8 pixels, 3 bands of float32, no CRS"


VRT = b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand><SourceFilename>/etc/passwd</SourceFilename>'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        VRT,
        b"II*\0",
        b"MM\0*" + bytes(64),
        b"II*\0" + VRT,
        b"II+\0\x08\0\0\0" + VRT,
    ],
    ids=["empty", "gif", "png", "vrt", "signature", "zeros", "vrt behind a signature", "vrt in a big tiff"],
)
def test_what_is_no_geotiff_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"^a\.tif is not a GeoTIFF that can be mapped: ") as error:
        check_scene(path, max_megapixels=1)
    assert "\n" not in str(error.value)


def write_sparse(path: Path, width: int, height: int, count: int = 1, **profile: Any) -> Path:
    """Write a file that contains no pixels: a decompression bomb of a few kilobytes."""
    profile = {"tiled": True, "compress": "deflate", "SPARSE_OK": True, "BIGTIFF": "YES", **profile}
    rasterio.open(path, "w", "GTiff", width, height, count, dtype="uint8", **profile).close()
    return path


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (MAX_SIDE + 1, 2), (2, MAX_SIDE + 1), (1001, 1000)])
def test_a_small_file_that_declares_a_huge_image_is_refused_unread(tmp_path: Path, width: int, height: int) -> None:
    path = write_sparse(tmp_path / "bomb.tif", width, height, blockxsize=4096, blockysize=4096)
    assert path.stat().st_size < 100_000
    with pytest.raises(UserError, match=rf"^bomb\.tif has {width:,d} × {height:,d} pixels; this page maps up to 1 mil"):
        check_scene(path, max_megapixels=1)


def test_a_raster_with_too_many_bytes_per_pixel_is_refused(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "deep.tif", 16, 16, count=65)
    with pytest.raises(UserError, match="has 65 bands, 65 bytes per pixel; this page takes up to 64"):
        check_scene(path, max_megapixels=1)


def test_overviews_in_a_file_of_the_server_are_refused(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif")
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE="/data/private.tif")
    (tmp_path / "a.tif.aux.xml").unlink(missing_ok=True)  # only the upload itself reaches the server
    with rasterio.open(path) as file:
        if not file.tags(ns="OVERVIEWS"):
            pytest.skip("this GDAL keeps the name beside the file")
    with pytest.raises(UserError, match="its overviews are in another file"):
        check_scene(path, max_megapixels=1)


def test_values_that_are_no_intensities_are_refused(tmp_path: Path) -> None:
    write_tiff(tmp_path / "complex.tif", np.ones((8, 8), np.complex64))
    with pytest.raises(UserError, match=r"complex\.tif is complex"):
        check_scene(tmp_path / "complex.tif", max_megapixels=1)


# Models


def test_a_long_path_is_shown_by_its_last_two_parts_unless_that_is_ambiguous(model: Path, tmp_path: Path) -> None:
    assert Models([str(model)]).labels() == [(f"{model.parent.name}/toy", str(model))]
    twin = tmp_path / model.parent.name / "toy"
    shutil.copytree(model, twin)
    assert Models([str(model), str(twin)]).labels() == [(str(model), str(model)), (str(twin), str(twin))]


def test_only_the_listed_models_are_loaded(model: Path) -> None:
    models = Models([str(model), str(model)])
    assert models.names == [str(model)]
    assert models.load(str(model)) is models.load(str(model))
    for other in ("/etc", f"{model}/../toy", "org/name"):
        with pytest.raises(UserError, match=r"^this page does not offer the model"):
            models.load(other)


def test_any_model_is_loaded_where_that_is_allowed(model: Path, tmp_path: Path) -> None:
    models = Models([str(model)], allow_any=True)
    other = f"{model.parent}/./toy"
    assert models.load(other) is models.load(other) is not models.load(str(model))
    with pytest.raises(UserError, match="nothing"):
        models.load(str(tmp_path / "nothing"))


# Runs


def inflate(text: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


@pytest.mark.parametrize("transform", [UTM["transform"], ROTATED], ids=["north up", "rotated"])
def test_a_run_writes_every_file_in_the_place_of_the_scene(tmp_path: Path, transform: Affine) -> None:
    import pyogrio

    scene, folder = write_scene(tmp_path / "port.tif", transform=transform), tmp_path / "out"
    folder.mkdir()
    mapped = run_job([use_network(pointwise(), crop_size=32)], scene, folder, abstain=0.3)
    assert {key: path.name for key, path in mapped.files.items()} == {
        "map": "port_map.tif",
        "confidence": "port_map_confidence.tif",
        "gpkg": "port_map.gpkg",
        "geojson": "port_map.geojson",
        "zip": "port_map.zip",
    }
    for key in ("map", "confidence"):
        with rasterio.open(mapped.files[key]) as file, rasterio.open(scene) as source:
            assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
            assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
    with rasterio.open(mapped.files["map"]) as file:
        classes = file.read(1)
    areas = [pyogrio.raw.read(mapped.files[key], layer=0) for key in ("gpkg", "geojson")]
    assert len(areas[0][2]) == len(areas[1][2]) > 1  # the same polygons
    assert areas[0][0]["crs"] == "EPSG:32631"
    with zipfile.ZipFile(mapped.files["zip"]) as archive:
        assert {*archive.namelist()} == {path.name for path in folder.iterdir()} - {"port_map.zip"}
    pixels = {OPEN_EARTH_MAP.names[i]: int((classes == i).sum()) for i in range(1, 9)}
    assert mapped.summary.pixels == pixels and mapped.summary.nodata_pixels == (classes == 0).sum() > 0


def test_the_page_gets_class_ids_confidence_and_areas(tmp_path: Path) -> None:
    scene, folder = write_scene(tmp_path / "port.tif"), tmp_path / "out"
    folder.mkdir()
    mapped = run_job([use_network(pointwise(), crop_size=32)], scene, folder, abstain=0.3)
    view = json.loads(json.dumps(mapped.view))  # what the browser gets
    assert (view["width"], view["height"], view["crs"], view["title"]) == (70, 70, "EPSG:32631", "port.tif")
    assert view["transform"] == [0.5, 0, 4e5, 0, -0.5, 5e6]
    assert view["metres"] == pytest.approx(0.5, rel=2e-3)  # the scale of UTM in the middle of its zone is 0.9996
    for key in ("classes", "confidence"):
        with rasterio.open(mapped.files["map" if key == "classes" else key]) as file:
            assert np.array_equal(inflate(view[key], (70, 70)), file.read(1))
    assert [row["name"] for row in view["legend"]] == list(OPEN_EARTH_MAP.names[1:])
    assert [tuple(row["color"]) for row in view["legend"]] == list(OPEN_EARTH_MAP.colors[1:])
    assert sum(row["share"] for row in view["legend"]) == pytest.approx(1)
    kept = 4900 - mapped.summary.nodata_pixels
    water = next(row for row in view["legend"] if row["name"] == "water")
    assert water["share"] == pytest.approx(mapped.summary.pixels["water"] / kept)
    assert view["no_class"] == pytest.approx(mapped.summary.nodata_pixels / 4900)


def test_a_map_without_any_class_still_has_its_files(tmp_path: Path) -> None:
    scene, folder = write_scene(tmp_path / "port.tif"), tmp_path / "out"
    folder.mkdir()
    mapped = run_job([use_network(Constant(), crop_size=32)], scene, folder, abstain=0.999)
    assert mapped.summary.nodata_pixels == 4900 and mapped.view["no_class"] == 1
    assert {*mapped.files} == {"map", "confidence", "gpkg", "geojson", "zip"}


def test_a_stopped_run_ends_between_two_windows(tmp_path: Path) -> None:
    scene, folder, seen = write_scene(tmp_path / "port.tif"), tmp_path / "out", []
    folder.mkdir()

    def on_progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_job([use_network(pointwise(), crop_size=32)], scene, folder, on_progress=on_progress)
    done, total = seen[-1]
    assert 3 <= done < total == 16 and not (folder / "port_map.tif").exists()


def test_a_large_scene_is_shown_reduced(tmp_path: Path) -> None:
    path = tmp_path / "wide.tif"
    write_tiff(path, np.full((4, 2 * MAX_VIEW), 9, np.uint8), **UTM)
    view = view_scene(path)
    assert (view["width"], view["height"]) == (MAX_VIEW, 2)
    assert view["transform"] == [1.0, 0, 4e5, 0, -1.0, 5e6] and "classes" not in view


def test_a_truncated_scene_is_a_mistake_of_one_line(tmp_path: Path) -> None:
    path = write_scene(tmp_path / "a.tif", 300, compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    check_scene(path, max_megapixels=1)  # the header is whole
    with pytest.raises(UserError, match=r"^a\.tif cannot be read; the file is damaged or truncated \(.+\)$"):
        view_scene(path)


def test_a_scene_without_georeference_has_neither_coordinates_nor_scale(tmp_path: Path) -> None:
    write_tiff(tmp_path / "a.tif", np.full((3, 8, 8), 9, np.uint8))
    view = view_scene(tmp_path / "a.tif")
    assert view["transform"] is view["crs"] is view["metres"] is None


@pytest.mark.parametrize(
    ("km2", "text"),
    [(1234.4, "1,234 km²"), (56.78, "56.8 km²"), (1.234, "1.23 km²"), (0.5, "50.00 ha"), (4e-5, "40 m²"), (0, "0 m²")],
)
def test_an_area_has_the_unit_of_its_size(km2: float, text: str) -> None:
    assert area_text(km2) == text


# The guard


def test_the_guard_refuses_to_fetch_limits_uploads_and_reports_cancelled_ones(tmp_path: Path) -> None:
    formparsers = pytest.importorskip("starlette.formparsers")
    from hf_seg.demo.guard import FORM_BYTES, Guard

    async def call(path: str, messages: list[dict[str, Any]]) -> list[Any]:
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            while (message := await receive())["more_body"]:
                sent.append(len(message["body"]))

        guard = Guard(app, folder=tmp_path, max_bytes=10)
        scope = {"type": "http", "path": path, "method": "POST", "headers": []}
        await guard(scope, receive, send)
        return sent

    part, end = (
        {"type": "http.request", "body": b"x" * 9, "more_body": True},
        {"type": "http.request", "more_body": False},
    )
    for path in ("/gradio_api/file=http://169.254.169.254/", "/gradio_api/proxy=https://example.org/"):
        assert asyncio.run(call(path, []))[0]["status"] == 403
    assert asyncio.run(call("/gradio_api/upload", [part, end])) == [9]
    big = {**part, "body": bytes(FORM_BYTES + 11)}
    with pytest.raises(formparsers.MultiPartException, match="exceeded the maximum allowed size of 10 bytes"):
        asyncio.run(call("/gradio_api/upload", [big]))
    assert asyncio.run(call("/gradio_api/queue/join", [big, end])) == [FORM_BYTES + 11]
    with pytest.raises(formparsers.MultiPartException, match="cancelled"):
        asyncio.run(call("/gradio_api/upload", [part, {"type": "http.disconnect"}]))


# The command line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model"),
        (["--model", "m", "--port", "0"], "port must be at least 1"),
        (["--model", "m", "--max_megapixels", "0"], "max_megapixels must be more than 0"),
        (["--model", "m", "--modle", "n"], r"unknown setting '--modle'; did you mean '--model'\?"),
        (
            ["--model", "m", "--any_model", "true", "--host", "0.0.0.0"],
            "would let others open folders of this computer",
        ),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(words)


def test_a_missing_package_says_how_to_install_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["--model", "m"])
    assert capsys.readouterr().err == "error: the page needs Gradio: pip install 'hf_seg[space]'\n"


def test_a_space_needs_what_setup_cfg_names_and_the_release_that_is_tested() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    named = [setup["options"]["install_requires"], setup["options.extras_require"]["space"]]
    lines = [
        line.strip() for line in "\n".join(named).splitlines() if line.strip() and not line.strip().startswith("#")
    ]
    assert (PROJECT / "space" / "requirements.txt").read_text().splitlines()[1:] == lines
    release = re.search("^sdk_version: (.*)$", (PROJECT / "space" / "README.md").read_text(), re.MULTILINE)
    assert release and f"\ngradio=={release[1]}\n" in (PROJECT / "space" / "constraints.txt").read_text()


def test_a_space_without_models_says_what_to_set() -> None:
    environment = {**os.environ, "MODELS": " ", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, str(PROJECT / "space" / "app.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: set the variable MODELS of this Space to the Hub ids of the models to offer, e.g. org/name\n"
    )


def test_help_is_fast_and_needs_no_gradio() -> None:
    code = "import sys; from hf_seg.demo.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'gradio', 'rasterio'} & {*sys.modules}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--max_megapixels" in done.stdout


def test_files_of_a_clock_before_1980_are_zipped(tmp_path: Path) -> None:
    (tmp_path / "map.tif").write_bytes(b"map")
    os.utime(tmp_path / "map.tif", (0, 0))
    write_zip(tmp_path / "map.zip", [tmp_path / "map.tif"])
    with zipfile.ZipFile(tmp_path / "map.zip") as archive:
        assert archive.read("map.tif") == b"map"
