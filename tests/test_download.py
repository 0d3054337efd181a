"""Downloads that resume, and archives that are unpacked only where they belong."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import struct
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import pytest

from hf_seg.data import download as module
from hf_seg.data.archives import ARCHIVES, place_open_earth_map, place_open_earth_map_sar
from hf_seg.data.download import DownloadError, download, extract
from hf_seg.errors import FileError, UserError
from hf_seg.locks import try_lock

NAME = "oem-sar-val-labels"  # the smallest archive
FILE_NAME = ARCHIVES[NAME][0].file_name
TILES = {f"ValArea_{number:03d}.tif": bytes([number]) * 40_000 for number in range(1, 6)}
UNREACHABLE = "http://127.0.0.1:9"


def make_zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


ARCHIVE = make_zip({f"val_labels/{name}": content for name, content in TILES.items()})


class Zenodo(ThreadingHTTPServer):
    """A record server on a real socket whose failures can be switched on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.content = ARCHIVE
        self.record: dict | None = None  # None: a record that describes `content`
        self.failures: list[int] = []  # status codes that the next requests for the file get
        self.drops: list[int] = []  # the next answers break off after that many bytes
        self.range_status = 206  # 200: ranges are ignored, 416: they are refused
        self.ranges: list[str | None] = []  # the Range header of every request for the file

    def describe(self, content: bytes) -> dict:
        links = {"self": f"{self.url}/api/files/{FILE_NAME}/content"}
        checksum = f"md5:{hashlib.md5(content).hexdigest()}"
        return {"files": [{"key": FILE_NAME, "size": len(content), "checksum": checksum, "links": links}]}


class Handler(BaseHTTPRequestHandler):
    server: Zenodo

    def do_GET(self) -> None:
        if self.path.startswith("/api/records/"):
            record = self.server.record or self.server.describe(self.server.content)
            return self.answer(200, json.dumps(record).encode())
        self.server.ranges.append(self.headers["Range"])
        if self.server.failures:
            return self.answer(self.server.failures.pop(0), b"")
        content = self.server.content
        offset = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        if not offset or self.server.range_status == 200:
            return self.answer(200, content)
        if self.server.range_status == 416 or offset >= len(content):
            return self.answer(416, b"")
        return self.answer(206, content[offset:], f"bytes {offset}-{len(content) - 1}/{len(content)}")

    def answer(self, status: int, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        is_file = self.path.startswith("/api/files/") and status < 400
        self.wfile.write(body[: self.server.drops.pop(0)] if is_file and self.server.drops else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(autouse=True)
def few_and_fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", 2)
    monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def zenodo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Zenodo]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Zenodo() as server:
        monkeypatch.setenv("HF_SEG_ZENODO_URL", server.url)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def part_of(folder: Path, content: bytes = ARCHIVE) -> Path:
    return folder / f"{FILE_NAME}.{hashlib.md5(content).hexdigest()[:8]}.part"


def labels_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "dfc25_track1/val/labels").iterdir()}


def test_download_leaves_the_unpacked_tiles_and_no_archive(zenodo: Zenodo, tmp_path: Path) -> None:
    assert download(NAME, tmp_path / "new/folder") == tmp_path / "new/folder/dfc25_track1"
    assert labels_in(tmp_path / "new/folder") == TILES
    assert not (tmp_path / "new/folder" / FILE_NAME).exists()


def test_archive_is_kept_on_request_and_alone_without_unpacking(zenodo: Zenodo, tmp_path: Path) -> None:
    download(NAME, tmp_path, unpack=False)
    assert (tmp_path / FILE_NAME).read_bytes() == ARCHIVE
    assert not (tmp_path / "dfc25_track1").exists()
    download(NAME, tmp_path, keep_archives=True)
    assert labels_in(tmp_path) == TILES
    assert (tmp_path / FILE_NAME).exists()
    assert len(zenodo.ranges) == 1  # the archive at hand was not fetched again


def test_dropped_connections_resume_where_they_broke_off(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.drops = [50_000, 30_000, 20_000, 10_000, 5_000]  # more drops than retries: progress forgives them
    download(NAME, tmp_path)
    offsets = [50_000, 80_000, 100_000, 110_000, 115_000]
    assert zenodo.ranges == [None, *(f"bytes={offset}-" for offset in offsets)]
    assert labels_in(tmp_path) == TILES


def test_failed_download_keeps_its_part_and_the_next_call_resumes_it(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.drops = [70_000, 0, 0, 0]
    with pytest.raises(DownloadError, match="70,000 bytes are kept, run the same command again to resume"):
        download(NAME, tmp_path)
    assert part_of(tmp_path).read_bytes() == ARCHIVE[:70_000]
    download(NAME, tmp_path)
    assert zenodo.ranges[-1] == "bytes=70000-"
    assert labels_in(tmp_path) == TILES


@pytest.mark.parametrize("range_status", [200, 416])
def test_server_that_does_not_resume_starts_again(zenodo: Zenodo, tmp_path: Path, range_status: int) -> None:
    zenodo.range_status = range_status
    part_of(tmp_path).write_bytes(b"not the beginning of the archive")
    download(NAME, tmp_path)
    assert zenodo.ranges == (["bytes=32-"] if range_status == 200 else ["bytes=32-", None])
    assert labels_in(tmp_path) == TILES


@pytest.mark.parametrize(("version", "held"), [(b"an older archive", ARCHIVE[:9]), (ARCHIVE, ARCHIVE + b"more")])
def test_part_that_cannot_belong_is_not_continued(zenodo: Zenodo, tmp_path: Path, version: bytes, held: bytes) -> None:
    part_of(tmp_path, version).write_bytes(held)
    download(NAME, tmp_path)
    assert zenodo.ranges == [None]
    assert labels_in(tmp_path) == TILES
    assert not part_of(tmp_path, version).exists()


@pytest.mark.parametrize("excess", [-100, 100])
def test_file_of_another_size_than_the_record_says_is_an_error(zenodo: Zenodo, tmp_path: Path, excess: int) -> None:
    zenodo.record = zenodo.describe(ARCHIVE)
    zenodo.record["files"][0]["size"] -= excess
    with pytest.raises(DownloadError, match=r"/content failed 3 times in a row"):
        download(NAME, tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_checksum_deletes_the_part_and_says_so(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.record = zenodo.describe(ARCHIVE)
    zenodo.content = ARCHIVE[:-1] + b"x"
    with pytest.raises(DownloadError, match="wrong md5 and was deleted; run the same command again"):
        download(NAME, tmp_path)
    assert not list(tmp_path.iterdir())


def test_server_errors_are_retried_and_client_errors_are_not(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.failures = [503, 429]
    download(NAME, tmp_path / "a")
    assert labels_in(tmp_path / "a") == TILES
    zenodo.failures, zenodo.ranges = [404] * 9, []
    with pytest.raises(DownloadError, match=r"/content answered 404 .*check the address"):
        download(NAME, tmp_path / "b")
    assert len(zenodo.ranges) == 1
    zenodo.failures, zenodo.ranges = [500] * 9, []
    with pytest.raises(DownloadError, match=r"failed 3 times in a row \(HTTP Error 500"):
        download(NAME, tmp_path / "c")
    assert len(zenodo.ranges) == 3


def test_unreachable_server_is_one_error_with_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_SEG_ZENODO_URL", UNREACHABLE)
    with pytest.raises(DownloadError, match=r"http://127\.0\.0\.1:9/api/records/14950559 failed 3 times"):
        download(NAME, tmp_path)


def test_too_little_space_is_found_before_the_first_byte_with_numbers(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.record = zenodo.describe(ARCHIVE)
    zenodo.record["files"][0]["size"] = 10**18
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(
        DownloadError, match=r"1,000,000,000\.2 GB are needed .* GB are free in .*choose another"
    ) as raised:
        download(NAME, tmp_path)
    stated = re.findall(r"([\d,.]+) GB are free", str(raised.value))
    assert float(stated[0].replace(",", "")) == pytest.approx(free / 1e9, abs=1.0)
    assert zenodo.ranges == []


def test_complete_dataset_needs_no_network_and_one_lost_tile_comes_back_alone(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(NAME, tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("HF_SEG_ZENODO_URL", UNREACHABLE)
        download(NAME, tmp_path)
    lost, *kept = sorted((tmp_path / "dfc25_track1/val/labels").iterdir())
    lost.unlink()
    times = [file.stat().st_mtime_ns for file in kept]
    download(NAME, tmp_path)
    assert labels_in(tmp_path) == TILES
    assert [file.stat().st_mtime_ns for file in kept] == times


@pytest.mark.parametrize("is_unpacked", [True, False])
def test_an_archive_that_a_kill_left_is_deleted_or_used_again(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_unpacked: bool
) -> None:
    download(NAME, tmp_path, keep_archives=True)
    (tmp_path / FILE_NAME).rename(tmp_path / f".partial.{FILE_NAME}")  # as before it is deleted
    if not is_unpacked:
        (tmp_path / f".{FILE_NAME}.files.json").unlink()
    download(NAME, tmp_path)
    assert labels_in(tmp_path) == TILES and len(zenodo.ranges) == 1  # it was downloaded once
    assert {path.name for path in tmp_path.iterdir()} == {"dfc25_track1", f".{FILE_NAME}.files.json"}


def test_a_second_download_of_an_archive_is_refused(zenodo: Zenodo, tmp_path: Path) -> None:
    with try_lock(tmp_path / f".{FILE_NAME}.lock"):
        with pytest.raises(UserError, match=rf"{FILE_NAME} is in use by another process \(pid {os.getpid()}\)"):
            download(NAME, tmp_path)
        assert zenodo.ranges == []


def test_foreign_file_with_the_name_of_the_archive_is_not_touched(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"mine")
    with pytest.raises(DownloadError, match=rf"{FILE_NAME} is not the file at .*; move it away"):
        download(NAME, tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == b"mine"


def test_record_must_list_the_pinned_checksum(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.record = zenodo.describe(ARCHIVE)
    zenodo.record["files"][0]["key"] = "OpenEarthMap.zip"
    with pytest.raises(DownloadError, match="expected 64155d1dc9d3b68536063f79878e1a67"):
        download("oem", tmp_path)


def test_records_that_cannot_be_trusted_are_refused(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.record = {"message": "gone"}
    with pytest.raises(DownloadError, match="is no Zenodo record"):
        download(NAME, tmp_path)
    zenodo.record = {"files": []}
    with pytest.raises(DownloadError, match=f"is no Zenodo record with a file {FILE_NAME}"):
        download(NAME, tmp_path)
    zenodo.record = zenodo.describe(ARCHIVE)
    zenodo.record["files"][0]["links"]["self"] = "file:///etc/hostname"
    with pytest.raises(DownloadError, match="no web address"):
        download(NAME, tmp_path)


def test_wrong_name_and_wrong_destination_are_clear_errors(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="unknown dataset 'oem-sra'; choose from oem, oem-sar,"):
        download("oem-sra", tmp_path)
    with pytest.raises(FileError, match=r"/file cannot be created \(File exists\); choose another folder"):
        download(NAME, tmp_path / "file")


def test_full_disk_is_one_error_that_names_the_file_and_keeps_the_part(
    zenodo: Zenodo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    part_of(tmp_path).write_bytes(ARCHIVE[:100])
    message = rf"{FILE_NAME} cannot be written \(No space left on device\); free disk space .* run the same command"
    with monkeypatch.context() as patch:
        patch.setattr(module.tqdm, "update", fail)  # called after each chunk
        with pytest.raises(FileError, match=message):
            download(NAME, tmp_path)
    assert part_of(tmp_path).exists()
    monkeypatch.setattr(module.shutil, "copyfileobj", fail)
    with pytest.raises(FileError, match=r"ValArea_001\.tif cannot be written \(No space left on device\)"):
        download(NAME, tmp_path)
    assert [*(tmp_path / "dfc25_track1/val/labels").iterdir()] == []


@pytest.mark.parametrize(
    ("member", "target"),
    [
        ("OpenEarthMap/OpenEarthMap_wo_xBD/r/labels/r_1.tif", "OpenEarthMap/OpenEarthMap_wo_xBD/r/labels/r_1.tif"),
        ("OpenEarthMap_wo_xBD/train.txt", "OpenEarthMap/OpenEarthMap_wo_xBD/train.txt"),
        ("copy/OpenEarthMap/OpenEarthMap_wo_xBD/val.txt", "OpenEarthMap/OpenEarthMap_wo_xBD/val.txt"),
        ("OpenEarthMap/README.md", "OpenEarthMap/README.md"),
    ],
)
def test_open_earth_map_is_placed_in_its_folder(member: str, target: str) -> None:
    assert place_open_earth_map(PurePosixPath(member)) == PurePosixPath(target)


@pytest.mark.parametrize(
    ("member", "target"),
    [
        ("dfc25_track1_trainval/train/rgb_images/TrainArea_0001.tif", "train/rgb_images/TrainArea_0001.tif"),
        ("a/b/train/labels/TrainArea_4333.tif", "train/labels/TrainArea_4333.tif"),
        ("sar_images/ValArea_001.tif", "val/sar_images/ValArea_001.tif"),
        ("dfc25_track1_test/TestArea_490.tif", "test/sar_images/TestArea_490.tif"),
        ("dfc25_track1_trainval/train/names.txt", "train/names.txt"),
        ("dfc25_track1_trainval/README.md", "README.md"),
    ],
)
def test_sar_tiles_are_placed_by_split_and_kind(member: str, target: str) -> None:
    assert place_open_earth_map_sar(PurePosixPath(member)) == PurePosixPath("dfc25_track1", target)


@pytest.mark.parametrize("folder", ["", "labels/", "val/labels/", "dfc25_track1_val_labels/sar_images/", "x/y/"])
def test_label_archives_are_placed_in_labels_whatever_their_folders(folder: str) -> None:
    for name, split in (("ValArea_001.tif", "val"), ("TestArea_1000.tif", "test")):
        target = place_open_earth_map_sar(PurePosixPath(folder + name), labels_only=True)
        assert target == PurePosixPath("dfc25_track1", split, "labels", name)


def write_zip(folder: Path, members: dict[str, bytes]) -> Path:
    file = folder / "archive.zip"
    file.write_bytes(make_zip(members))
    return file


@pytest.mark.parametrize("name", ["/etc/evil", "a/../../evil", "C:/evil", "c:evil", "..\\evil", "\\\\host\\evil"])
def test_members_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    archive = write_zip(tmp_path, {"good.tif": b"x", name: b"y"})
    with pytest.raises(DownloadError, match=r"archive\.zip contains a member that is unsafe to unpack, '.*evil'"):
        extract(archive, tmp_path / "out", PurePosixPath)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path: Path, kind: int) -> None:
    link = zipfile.ZipInfo("images")
    link.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(DownloadError, match="unsafe to unpack, 'images'"):
        extract(tmp_path / "archive.zip", tmp_path / "out", PurePosixPath)


def test_archive_larger_than_the_disk_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w") as archive:
        archive.writestr("tile.tif", b"x")
        archive.filelist[0].file_size = 10**18  # goes into the directory of the archive
    with pytest.raises(DownloadError, match=r"1,000,000,000\.0 GB are needed to unpack .*bomb\.zip"):
        extract(tmp_path / "bomb.zip", tmp_path / "out", PurePosixPath)


def test_two_members_for_one_place_are_refused(tmp_path: Path) -> None:
    archive = write_zip(tmp_path, {"labels/ValArea_001.tif": b"1", "colour/ValArea_001.tif": b"2"})
    with pytest.raises(DownloadError, match=r"'labels/ValArea_001\.tif' and 'colour/ValArea_001\.tif' both belong at"):
        extract(archive, tmp_path / "out", partial(place_open_earth_map_sar, labels_only=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/tile.tif", "a/Tile.tif"), "'a/tile.tif' and 'a/Tile.tif' both belong at a/Tile.tif"),
        (("a", "a/tile.tif"), "a is a file and the folder of a/tile.tif"),
        (("two\nlines.tif",), r"unsafe to unpack, 'two\nlines.tif'"),
    ],
)
def test_names_that_no_file_system_keeps_apart_are_refused(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    archive = write_zip(tmp_path, dict.fromkeys(names, b"x"))
    with pytest.raises(DownloadError) as caught:
        extract(archive, tmp_path / "out", PurePosixPath)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_a_member_without_a_name_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(""), b"x")
    with pytest.raises(DownloadError, match="unsafe to unpack, ''"):
        extract(tmp_path / "archive.zip", tmp_path / "out", PurePosixPath)


def change_directory(archive: Path, at: int, value: bytes) -> None:
    """Change bytes of the first entry of a zip file's central directory."""
    content = bytearray(archive.read_bytes())
    start = content.index(b"PK\x01\x02") + at
    content[start : start + len(value)] = value
    archive.write_bytes(content)


@pytest.mark.parametrize(
    ("at", "value"),
    [(24, struct.pack("<I", 1000)), (10, b"\x0c\0"), (10, b"\x0e\0"), (8, b"\0\x08")],
    ids=["size", "bzip2", "lzma", "name"],
)
def test_a_member_that_its_directory_describes_wrongly_is_the_archives_fault(
    tmp_path: Path, at: int, value: bytes
) -> None:
    archive = write_zip(tmp_path, {"tile.tif": b"\xff\xfe" * 99})
    if at == 8:  # the name is said to be UTF-8
        archive.write_bytes(archive.read_bytes().replace(b"tile", b"t\xffle"))
    change_directory(archive, at, value)
    with pytest.raises(DownloadError, match=r"archive\.zip is damaged"):
        extract(archive, tmp_path / "out", PurePosixPath)
    assert not (tmp_path / "out/tile.tif").exists()


@pytest.mark.parametrize("content", ["[1]", "null", '{"a": "b"}', "[" * 100_000])
def test_a_damaged_list_of_unpacked_files_counts_as_none(zenodo: Zenodo, tmp_path: Path, content: str) -> None:
    (tmp_path / f".{FILE_NAME}.files.json").write_text(content)
    root = download(NAME, tmp_path)
    assert {file.name for file in (root / "val/labels").iterdir()} == {*TILES}


def test_damaged_member_is_not_written_and_a_truncated_archive_not_unpacked(tmp_path: Path) -> None:
    archive = write_zip(tmp_path, {"good.tif": b"abc" * 99, "bad.tif": b"xyz" * 99})
    content = archive.read_bytes()
    archive.write_bytes(content[:-50])
    with pytest.raises(DownloadError, match=r"archive\.zip is damaged .*; delete it and download it again"):
        extract(archive, tmp_path / "out", PurePosixPath)
    assert not (tmp_path / "out").exists()
    archive.write_bytes(content.replace(b"xyz" * 9, b"xyy" * 9, 1))
    with pytest.raises(DownloadError, match=r"is damaged \(Bad CRC-32 for file 'bad\.tif'\)"):
        extract(archive, tmp_path / "out", PurePosixPath)
    assert (tmp_path / "out/good.tif").exists()
    assert not (tmp_path / "out/bad.tif").exists()


def test_extraction_resumes_after_a_kill_and_returns_every_size(tmp_path: Path) -> None:
    archive = write_zip(tmp_path, {"a/done.tif": b"12345", "a/half.tif": b"12345", "__MACOSX/a/._done.tif": b"junk"})
    folder = tmp_path / "out/a"
    folder.mkdir(parents=True)
    (folder / "done.tif").write_bytes(b"54321")  # of full size, so it stays
    (folder / "half.tif").write_bytes(b"12")
    (folder / ".partial.half.tif").write_bytes(b"123")
    assert extract(archive, tmp_path / "out", PurePosixPath) == {"a/done.tif": 5, "a/half.tif": 5}
    contents = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert contents == {"done.tif": b"54321", "half.tif": b"12345"}
