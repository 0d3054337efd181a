"""Archives that `hf-seg data download` must not unpack."""

import io
import stat
import struct
import zipfile
from pathlib import Path

from bad_inputs.case import Case, Make, both, folder, nothing, write

ARCHIVE = "remote/dfc25_track1_trainval.zip"
DOWNLOAD = "hf-seg data download oem-sar data"
GOOD = "dfc25_track1/train/labels/TrainArea_001.tif"


def zipped(members: dict[str, bytes], *, compression: int = zipfile.ZIP_DEFLATED, mode: int = 0) -> bytes:
    """Return a zip file; `mode` are the members' Unix type and rights."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = compression
            entry.external_attr = mode << 16
            archive.writestr(entry, content)
    return buffer.getvalue()


def directory_changed(content: bytes, at: int, value: bytes) -> bytes:
    """Change bytes of the first entry of the central directory."""
    start = content.index(b"PK\x01\x02") + at
    return content[:start] + value + content[start + len(value) :]


def _archive(wrong: str, content: bytes, says: str = "dfc25_track1_trainval.zip") -> Case:
    return Case("archive", wrong, write(ARCHIVE, content), DOWNLOAD, says, 1)


def _members(wrong: str, *names: str, mode: int = 0) -> Case:
    return _archive(wrong, zipped(dict.fromkeys(names, b"content"), mode=mode))


def _target(make: Make) -> Make:
    return both(write(ARCHIVE, zipped({GOOD: b"content"})), make)


def _link_out(work: Path) -> None:
    (work / "outside").mkdir()
    (work / "data").mkdir()
    (work / "data" / "dfc25_track1").symlink_to(work / "outside")


TINY = zipped({GOOD: b"content"})
BOMB = zipped({GOOD: bytes(50_000_000)})
ARCHIVES = (
    _archive("empty file", b""),
    _archive("random bytes", bytes(range(256)) * 8),
    _archive("an HTML page", b"<html>Just a moment...</html>"),
    _archive("cut in the middle", zipped({GOOD: bytes(range(256)) * 99}, compression=zipfile.ZIP_STORED)[:9000]),
    _archive("directory cut off", TINY[:-30]),
    _archive("member with a wrong checksum", directory_changed(TINY, 16, b"\1\2\3\4")),
    _archive(
        "member of damaged DEFLATE",
        TINY.replace(zipped({GOOD: b"content"})[30 + len(GOOD) : 33 + len(GOOD)], b"\xff\xff\xff", 1),
    ),
    _archive("member claims 4 GB", directory_changed(BOMB, 24, struct.pack("<I", 4_294_967_294))),
    _archive("member claims 10 bytes, has 50 MB", directory_changed(BOMB, 24, struct.pack("<I", 10))),
    _archive("member encrypted", directory_changed(TINY, 8, b"\1\0")),
    _archive("unknown compression", directory_changed(TINY, 10, b"\x63\0")),
    _archive(
        "LZMA that is damaged",
        directory_changed(zipped({GOOD: b"content" * 9}, compression=zipfile.ZIP_STORED), 10, b"\x0e\0"),
    ),
    _archive(
        "bzip2 that is damaged",
        directory_changed(zipped({GOOD: b"content" * 9}, compression=zipfile.ZIP_STORED), 10, b"\x0c\0"),
    ),
    _archive(
        "name that is no UTF-8",
        directory_changed(
            zipped({"dfc25_track1/tr\u00e4in/a.tif": b"x"}).replace("\u00e4".encode(), b"\xff\xfe"), 8, b"\0\x08"
        ),
    ),
    _archive("zip in place of a local header", TINY.replace(b"PK\x03\x04", b"XX\x03\x04", 1)),
    _members("..", "../../escaped.tif"),
    _members(".. after folders", "dfc25_track1/train/labels/../../../../escaped.tif"),
    _members("an absolute name", "/tmp/escaped.tif"),
    _members("a drive of Windows", "C:\\escaped.tif"),
    _members("a share of Windows", "\\\\server\\share\\escaped.tif"),
    _members("a link", GOOD, mode=stat.S_IFLNK | 0o777),
    _members("a device file", GOOD, mode=stat.S_IFCHR | 0o666),
    _members("a pipe", GOOD, mode=stat.S_IFIFO | 0o666),
    _members("one place twice", GOOD, f"other/{GOOD}"),
    _members("names that differ in case", GOOD, GOOD.replace("labels/T", "labels/t")),
    _members("a file where another has a folder", "dfc25_track1/train/x", "dfc25_track1/train/x/y.tif"),
    _archive("name of 300 letters", zipped({f"dfc25_track1/train/labels/{'a' * 300}.tif": b"content"}), "aaa"),
    _members("name with a line break", "../a\nb.tif"),
    Case("archive", "target folder is a file", _target(write("data", b"x")), DOWNLOAD, "data", 1),
    Case(
        "archive",
        "a folder in place of a file",
        _target(folder("data/dfc25_track1/train/labels/TrainArea_001.tif/x")),
        DOWNLOAD,
        "TrainArea_001.tif",
        1,
    ),
    Case(
        "archive",
        "another file of that name is there",
        _target(write("data/dfc25_track1_trainval.zip", b"mine")),
        DOWNLOAD,
        "dfc25_track1_trainval.zip",
        1,
    ),
    Case(
        "archive",
        "hidden list of files is a list",
        both(write(ARCHIVE, b"x"), write("data/.dfc25_track1_trainval.zip.files.json", "[1]")),
        DOWNLOAD,
        "dfc25_track1_trainval.zip",
        1,
    ),
    Case(
        "archive",
        "hidden list of files has other values",
        both(write(ARCHIVE, b"x"), write("data/.dfc25_track1_trainval.zip.files.json", '{"a": "b"}')),
        DOWNLOAD,
        "dfc25_track1_trainval.zip",
        1,
    ),
    Case("archive", "unknown name", nothing, "hf-seg data download oem-sars data", "oem-sars"),
    Case("archive", "no folder named", nothing, "hf-seg data download oem oem-sar", "oem-sar"),
)
