"""Download OpenEarthMap and OpenEarthMap-SAR from Zenodo and unpack them into the layout that the loaders read.

Everything resumes: an archive grows as `<file>.<checksum>.part` and gets its name only after its size and md5 are
verified; files are unpacked atomically; complete files are kept. A hidden list of the unpacked files tells a later
call, without the network, that nothing is missing.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from http.client import HTTPException
from lzma import LZMAError
from pathlib import Path, PurePosixPath, PureWindowsPath
from ssl import SSLError
from struct import error as StructError
from typing import IO, Any, NamedTuple, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen
from zipfile import BadZipFile, ZipFile, ZipInfo
from zlib import error as ZlibError

from tqdm import tqdm

from hf_seg import __version__
from hf_seg.data.archives import ARCHIVES, Archive, Place
from hf_seg.errors import DISK_HINT, UserError, file_errors
from hf_seg.files import atomic_file, temporary_path, write_atomic
from hf_seg.locks import exclusive

HEADERS = {"User-Agent": f"hf_seg/{__version__}"}
TIMEOUT_SECONDS = 60.0
RETRIES = 6  # failures in a row, without a single new byte, after which to give up
BACKOFF_SECONDS = 2.0  # before the first retry; doubles up to a minute
CHUNK_BYTES = 1 << 20
ENCRYPTED = 1  # flag of a member
TRANSIENT_ERRORS = (URLError, HTTPException, ConnectionError, SSLError, TimeoutError)

Result = TypeVar("Result")


class DownloadError(UserError):
    """A dataset could not be downloaded or unpacked; the message names the file and how to fix it."""


class _RemoteFile(NamedTuple):
    url: str
    size: int  # in bytes
    md5: str


def download(name: str, destination: Path, *, unpack: bool = True, keep_archives: bool = False) -> Path:
    """Download and unpack every archive of `name`, and return the root folder of the dataset.

    They come from https://zenodo.org, or the address in the environment variable `HF_SEG_ZENODO_URL`.

    Args:
        name: a key of `ARCHIVES`.
        destination: folder for archives and datasets; created if it does not exist.
        unpack: False stops after the verified archives.
        keep_archives: keep the zip files after unpacking.

    Raises:
        DownloadError: unknown name, no space, no connection, wrong checksum, or an archive that cannot be trusted.
        UserError: another process is downloading the same archive to the same place.
        FileError: something below `destination` cannot be read or written.
    """
    if name not in ARCHIVES:
        raise DownloadError(f"unknown dataset {name!r}; choose from {', '.join(ARCHIVES)}")
    base_url = (os.environ.get("HF_SEG_ZENODO_URL") or "https://zenodo.org").rstrip("/")
    for archive in ARCHIVES[name]:
        archive_file = destination / archive.file_name
        lock = destination / f".{archive.file_name}.lock"
        with exclusive(archive_file, lock, hint="choose another folder"):
            _delete_left_over(archive_file)
            if unpack and _is_unpacked(_inventory(archive_file)):
                continue
            remote = _look_up(archive, f"{base_url}/api/records/{archive.record}")
            with file_errors(archive_file, "cannot be written", f"{DISK_HINT}, and run the same command again"):
                _fetch(remote, archive_file, archive.unpacked_bytes if unpack else 0)
            if unpack:
                sizes = extract(archive_file, destination, archive.place)
                with file_errors(archive_file, "cannot be deleted"):
                    if not keep_archives:
                        archive_file.replace(temporary_path(archive_file))
                    write_atomic(_inventory(archive_file), json.dumps(sizes))
                    temporary_path(archive_file).unlink(missing_ok=True)
    return destination / archive.root


def _delete_left_over(archive_file: Path) -> None:
    """Delete an archive that a killed run was about to delete, or give it back its name if it is still needed."""
    left = temporary_path(archive_file)
    if not left.exists():
        return
    with file_errors(archive_file, "cannot be deleted"):
        if _is_unpacked(_inventory(archive_file)):
            left.unlink()
        else:
            left.replace(archive_file)


def extract(archive_file: Path, destination: Path, place: Place) -> dict[str, int]:
    """Unpack a zip file, each member to `destination / place(member)`; files that exist at full size are kept.

    Returns the size in bytes of every file of the archive, by its path below `destination`.

    Raises:
        DownloadError: before anything is written, if a member is a link, encrypted, or would be written outside
            `destination` or to another's place, or if the disk is too small; later, if the archive is damaged.
        FileError: a file cannot be read or written.
    """
    try:
        with file_errors(archive_file, "cannot be unpacked"), ZipFile(archive_file) as archive:
            members = _plan_extraction(archive, place)
            missing = [path for path in members if not _has_size(destination / path, members[path].file_size)]
            unpacked = sum(members[path].file_size for path in missing)
            _require_space(destination, unpacked, f"to unpack {archive_file}")
            for path in tqdm(missing, desc=f"unpack {archive_file.name}", unit="file"):
                with (
                    archive.open(members[path]) as source,
                    atomic_file(destination / path) as temporary,
                    temporary.open("wb") as file,
                ):
                    shutil.copyfileobj(_Member(source), file, CHUNK_BYTES)
                    if file.tell() != members[path].file_size:
                        raise BadZipFile(f"{path} has another size than the directory says")
    except (BadZipFile, EOFError, ZlibError, LZMAError, StructError, NotImplementedError, UnicodeError) as error:
        raise DownloadError(f"{archive_file} is damaged ({error}); delete it and download it again") from error
    return {str(path): member.file_size for path, member in members.items()}


class _Member:
    """Content of a member; `BadZipFile` if it cannot be read, at its end if its checksum is wrong."""

    def __init__(self, source: IO[bytes]) -> None:
        self._source = source

    def read(self, size: int = -1, /) -> bytes:
        try:
            return self._source.read(size)
        except OSError as error:  # of bzip2, too; it must not count as one of the file that is written
            raise BadZipFile(error.strerror or str(error)) from error


def _inventory(archive_file: Path) -> Path:
    return archive_file.with_name(f".{archive_file.name}.files.json")


def _is_unpacked(inventory: Path) -> bool:
    """Tell whether every file of an earlier extraction exists at its size."""
    try:
        sizes = json.loads(inventory.read_text())
        return all(_has_size(inventory.parent / path, size) for path, size in sizes.items())
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):  # never unpacked, or damaged
        return False


def _fetch(remote: _RemoteFile, target: Path, reserve: int) -> None:
    """Download one file to `target`, complete and verified; `reserve` more bytes must be free for unpacking."""
    if target.exists():
        if not _has_size(target, remote.size) or not _has_md5(target, remote.md5):
            raise DownloadError(f"{target} is not the file at {remote.url}; move it away and run the command again")
        return
    # The checksum in the name prevents that one version of the file is continued with another.
    part = target.with_name(f"{target.name}.{remote.md5[:8]}.part")
    remaining = max(remote.size - _size(part), 0)
    purpose = f"for {target.name} ({remaining / 1e9:,.1f} GB to download, about {reserve / 1e9:,.1f} GB to unpack)"
    _require_space(target.parent, remaining + reserve, purpose)
    for stale in set(target.parent.glob(f"{target.name}.*.part")) - {part}:
        stale.unlink()
    _retry(lambda: _receive(remote, part), remote.url, progress=lambda: _size(part))
    if not _has_md5(part, remote.md5):
        part.unlink()
        raise DownloadError(f"{remote.url} arrived with a wrong md5 and was deleted; run the same command again")
    part.replace(target)


def _look_up(archive: Archive, record_url: str) -> _RemoteFile:
    """Read address, size and md5 of an archive from its Zenodo record."""
    content = _retry(lambda: _open(record_url).read(), record_url)
    try:
        file = {file["key"]: file for file in json.loads(content)["files"]}[archive.file_name]
        _, md5 = file["checksum"].split("md5:")
        remote = _RemoteFile(file["links"]["self"], int(file["size"]), md5)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"is no Zenodo record with a file {archive.file_name} ({error!r})"
        raise DownloadError(f"{record_url} {reason}; is its base address right?") from error
    if archive.md5 and remote.md5 != archive.md5:
        raise DownloadError(f"{record_url} lists {archive.file_name} with md5 {remote.md5}, expected {archive.md5}")
    if not remote.url.startswith(("http://", "https://")):
        raise DownloadError(f"{record_url} points to {remote.url}, which is no web address")
    return remote


def _open(url: str, headers: dict[str, str] = HEADERS) -> Any:
    return urlopen(Request(url, headers=headers), timeout=TIMEOUT_SECONDS)


def _retry(attempt: Callable[[], Result], url: str, progress: Callable[[], int] = lambda: 0) -> Result:
    """Repeat `attempt` over transient network errors; failures count only while `progress` sets no new record."""
    failures, best = 0, progress()
    while True:
        try:
            return attempt()
        except TRANSIENT_ERRORS as error:
            if isinstance(error, HTTPError) and error.code < 500 and error.code not in (408, 429):
                raise DownloadError(f"{url} answered {error.code} {error.reason}; check the address") from error
            failures = 0 if progress() > best else failures + 1
            best = max(best, progress())
            if failures > RETRIES:
                kept = f"; {progress():,} bytes are kept, run the same command again to resume" if progress() else ""
                raise DownloadError(f"{url} failed {failures} times in a row ({error}){kept}") from error
        time.sleep(min(BACKOFF_SECONDS * 2.0 ** max(failures - 1, 0), TIMEOUT_SECONDS))


def _receive(remote: _RemoteFile, part: Path) -> None:
    """Append to `part` what it lacks of `remote`, or start again; raises `ConnectionError` if it is to be retried."""
    offset = _size(part) if _size(part) <= remote.size else 0
    if _has_size(part, remote.size):
        return
    headers = HEADERS | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        response = _open(remote.url, headers)
    except HTTPError as error:
        if error.code != 416:  # range not satisfiable: `part` is not the beginning of the server's file
            raise
        response = error
    with response:
        content_range = response.headers.get("Content-Range") or ""
        resumes = re.fullmatch(rf"bytes {offset}-\d+/({remote.size}|\*)", content_range)
        if response.status == 416 or (response.status == 206 and not resumes):
            part.unlink(missing_ok=True)
            raise ConnectionError(f"the server resumed with {content_range!r} at byte {offset} of {remote.size}")
        offset = offset if response.status == 206 else 0
        # In a log file every update is a line: two a minute are enough there.
        pause = 0.1 if sys.stderr.isatty() else 30.0
        bar = tqdm(desc=part.name, total=remote.size, initial=offset, unit="B", unit_scale=True, mininterval=pause)
        with part.open("ab" if offset else "wb") as file, bar:
            while bar.n <= remote.size and (chunk := response.read1(CHUNK_BYTES)):
                file.write(chunk)
                bar.update(len(chunk))
    received = _size(part)
    if received > remote.size:
        part.unlink()
    if received != remote.size:
        raise ConnectionError(f"the transfer ended at byte {received} of {remote.size}")


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _has_md5(file: Path, md5: str) -> bool:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest() == md5


def _plan_extraction(archive: ZipFile, place: Place) -> dict[PurePosixPath, ZipInfo]:
    """Choose a place for every file of the archive; refuse a member that would be written anywhere else."""
    planned: dict[PurePosixPath, ZipInfo] = {}
    taken: dict[str, PurePosixPath] = {}  # by the name as file systems without upper and lower case have it
    for member in archive.infolist():
        # Windows paths know both separators, drive letters and shares, so that one parser recognises every escape.
        path = PureWindowsPath(member.filename)
        is_plain = stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)
        is_inside = not path.drive and not path.root and ".." not in path.parts
        is_name = bool(member.filename) and member.filename.isprintable()
        if not (is_inside and is_name and is_plain) or member.flag_bits & ENCRYPTED:
            raise DownloadError(f"{archive.filename} contains a member that is unsafe to unpack, {member.filename!r}")
        if member.is_dir() or path.parts[:1] in ((), ("__MACOSX",)) or path.name == ".DS_Store":
            continue
        target = place(PurePosixPath(*path.parts))
        if first := taken.get(str(target).casefold()):
            names = f"{planned[first].filename!r} and {member.filename!r}"
            raise DownloadError(f"{archive.filename}: {names} both belong at {target}; unpack this archive by hand")
        planned[target], taken[str(target).casefold()] = member, target
    for target in planned:
        if folder := next((each for each in target.parents if str(each).casefold() in taken), None):
            raise DownloadError(f"{archive.filename}: {folder} is a file and the folder of {target}; unpack it by hand")
    return planned


def _require_space(folder: Path, needed: int, purpose: str) -> None:
    """Create `folder`, and check that `needed` bytes are free there."""
    with file_errors(folder, "cannot be created", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        numbers = f"{needed / 1e9:,.1f} GB are needed {purpose}, {free / 1e9:,.1f} GB are free in {folder}"
        raise DownloadError(f"{numbers}; free disk space or choose another folder")
