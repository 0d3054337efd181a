"""Tiles in a dataset repository on the Hub: its name, its commit and its files. Nothing of it is executed.

    dataset.json                             what the data are (`hf_seg.data.provenance`)
    data/train-00003-of-00012.parquet        rows as those of `hf_seg.data.open_earth_map`, with each file's bytes

A file is downloaded when it is needed, into the cache of huggingface_hub: scoring the val split fetches no other split.
`HF_HUB_OFFLINE=1` reads the cache alone.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_seg.data.scan import SPLITS
from hf_seg.errors import DatasetError, UserError
from hf_seg.hub_client import check_downloads, limit_waiting, one_line

DATASET_FILE = "dataset.json"
URI = "hf://datasets/"
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?")
_SHARD = re.compile(r"data/(\w+)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet")  # datasets may append a digest
_OWN_FOLDERS = ("data", "runs")  # of this project's commands: a missing one is never looked for on the Hub
_ALWAYS_THERE = (DATASET_FILE, "README.md")  # one of them tells, without the network, which commit a branch was


@dataclass(frozen=True)
class HubDataset:
    """One commit of a dataset repository.

    Attributes:
        repository: org/name.
        revision: the commit.
        files: their names; without the network, those in the cache.
    """

    repository: str
    revision: str
    files: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision[:12]}"

    @property
    def splits(self) -> list[str]:
        """The splits that have a shard."""
        found = {match[1] for name in self.files if (match := _SHARD.fullmatch(name))}
        return [split for split in SPLITS if split in found]

    def shards(self, split: str) -> list[str]:
        """Return the files of a split in their order.

        Raises:
            DatasetError: there is no such split, or a shard is missing.
        """
        matches = [match for name in self.files if (match := _SHARD.fullmatch(name)) and match[1] == split]
        names = {int(match[2]): match[0] for match in matches}
        if not matches:
            where = " in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            found = ", ".join(self.splits) or f"no {split}-00000-of-00001.parquet or the like in data/"
            raise DatasetError(f"{self} has no split {split!r}{where}; found {found}")
        total = int(matches[0][3])
        if [*sorted(names)] != [*range(total)] or len(matches) != total:
            hint = "; fetch it once without HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "; it must be pushed again"
            raise DatasetError(f"{self} is incomplete: {len(names)} of {total} shards of split {split!r}{hint}")
        return [names[number] for number in range(total)]

    def fetch(self, file: str) -> Path:
        """Return the place of a file in the cache; it is downloaded if it is not there.

        Raises:
            UserError: it cannot be downloaded, or differs from its checksum.
        """
        limit_waiting()
        try:
            path = Path(hf_hub_download(self.repository, file, repo_type="dataset", revision=self.revision))
        except Exception as error:  # network, login, disk: the Hub's client raises many kinds
            raise _explain(f"{self}, {file}", error) from None
        check_downloads([path], str(self))
        return path


def is_shard(name: str) -> bool:
    """Tell whether a file of a repository is a shard of a split."""
    return _SHARD.fullmatch(name) is not None


def parse_hub_id(name: str | Path) -> tuple[str, str | None] | None:
    """Return repository and revision (None: main) that the name of a dataset means; None for a folder.

    `hf://datasets/org/name[@revision]` is always on the Hub. `org/name[@revision]` is, unless there is such a folder,
    or a folder `org`, so that a misspelt path is not looked for on the Hub.

    Raises:
        UserError: a URI that cannot be read.
    """
    text = str(name)
    is_uri = text.startswith(URI)
    found = _ID.fullmatch(text.removeprefix(URI))
    if is_uri and found is None:
        raise UserError(f"{text}: expected {URI}org/name or {URI}org/name@revision")
    owner = text.partition("/")[0]
    if found is None or (not is_uri and (Path(owner).exists() or owner in _OWN_FOLDERS)):
        return None
    return found[1], found[2]


def find_hub_dataset(name: str | Path) -> HubDataset | None:
    """Find a dataset on the Hub, as `parse_hub_id` reads its name; None for a folder.

    A process asks the Hub once for a name, so that what it reads is of one commit.

    Raises:
        UserError: there is no such repository or revision, no access to it, or no network and nothing in the cache.
    """
    parsed = parse_hub_id(name)
    return None if parsed is None else _find(*parsed, constants.ENDPOINT, constants.HF_HUB_OFFLINE)


@lru_cache(maxsize=16)
def _find(repository: str, revision: str | None, endpoint: str, is_offline: bool) -> HubDataset:
    name = f"{repository}@{revision}" if revision else repository
    if is_offline:
        return _find_in_cache(name, repository, revision)
    limit_waiting()
    try:
        found = HfApi(endpoint=endpoint).dataset_info(repository, revision=revision)
        files = tuple(sorted(each.rfilename for each in found.siblings or []))
        for file in [each for each in _ALWAYS_THERE if each in files][:1]:  # the cache then knows the branch
            hf_hub_download(repository, file, repo_type="dataset", revision=revision)
    except Exception as error:  # network, login, name: the Hub's client raises many kinds
        raise _explain(name, error) from None
    return HubDataset(repository, str(found.sha), files)


def _find_in_cache(name: str, repository: str, revision: str | None) -> HubDataset:
    for file in _ALWAYS_THERE:
        cached = try_to_load_from_cache(repository, file, repo_type="dataset", revision=revision)
        if isinstance(cached, str):
            folder = Path(cached).parent  # a snapshot is named by its commit
            files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            return HubDataset(repository, folder.name, tuple(sorted(files)))
    raise UserError(
        f"{name}: no such folder, and HF_HUB_OFFLINE is set but no such dataset is in the cache "
        f"({constants.HF_HUB_CACHE}); run once without it, or correct the folder"
    )


def _explain(name: str, error: Exception) -> UserError:
    """Return what is wrong, and how to fix it, in one line."""
    repository = name.partition(",")[0].partition("@")[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError) or status == 403:
        return UserError(
            f"{name}: no access; ask for it on the page of the dataset, then `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{name}: the dataset {repository} has no such branch, tag or commit")
    if isinstance(error, RepositoryNotFoundError | HFValidationError) or status == 401:
        return UserError(
            f"{name}: no such folder, and no such dataset on the Hub, or a private one: correct the name, or log in "
            "with `hf auth login` or HF_TOKEN"
        )
    if constants.HF_HUB_OFFLINE and isinstance(error, EntryNotFoundError):
        return UserError(f"{name}: HF_HUB_OFFLINE is set, but the file is not in the cache; run once without it")
    return UserError(
        f"{name} cannot be downloaded ({one_line(error, 200)}); try again, or use what is in the cache with "
        "HF_HUB_OFFLINE=1"
    )
