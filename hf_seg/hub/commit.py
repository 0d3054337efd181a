"""Send files to a repository on the Hub in one commit, which also deletes our own files of an earlier push."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from hf_seg.errors import UserError
from hf_seg.hub_client import limit_waiting, one_line

IN_GIT = 10 * 2**20  # bytes; larger files are stored apart from git, and so sent apart from the commit


class UnconfirmedError(UserError):
    """The answer to a commit was lost: the Hub may have all of it, or nothing."""


class Destination:
    """A repository on the Hub, and the branch to push to.

    Args:
        repository: user/name.
        kind: "model", "dataset" or "space".
        revision: branch; main if None.
    """

    def __init__(self, repository: str, kind: str, revision: str | None = None) -> None:
        limit_waiting()
        self.api = HfApi()
        self.place: dict[str, Any] = {"repo_id": repository, "repo_type": kind}
        self.revision = revision

    def open(self, *, private: bool, hint: str, **options: Any) -> None:
        """Create repository and branch if they are new.

        Args:
            private: create it as private.
            hint: what to do if it should be private, but exists and is public.
            options: more of `create_repo`.

        Raises:
            UserError: it should be private, but exists and is public.
        """
        self.api.create_repo(**self.place, private=private or None, exist_ok=True, **options)
        if private and not self.api.repo_info(**self.place).private:
            raise UserError(f"the repository exists already and is public: choose another name, or {hint}")
        if self.revision is not None:
            self.api.create_branch(**self.place, branch=self.revision, exist_ok=True)

    def upload(self, name: str, file: BinaryIO) -> CommitOperationAdd:
        """Upload a large file ahead of its commit, unless the Hub has it; the file is not needed any more."""
        # the Hub may keep a small file in git itself: then it is sent with the commit
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        addition = CommitOperationAdd(name, file.read() if size < IN_GIT else file)
        self.api.preupload_lfs_files(self.place["repo_id"], [addition], **self._where())
        return addition

    def commit(
        self,
        contents: Mapping[str, bytes | Path],
        message: str,
        is_ours: Callable[[str], bool],
        uploaded: Iterable[CommitOperationAdd] = (),
    ) -> str:
        """Add files, delete those of an earlier push, and return the address of the commit.

        Args:
            contents: name in the repository -> file or bytes.
            message: of the commit.
            is_ours: tells which other files in the repository are deleted.
            uploaded: what `upload` returned.

        Raises:
            UnconfirmedError: it may have arrived; any other error says that nothing did.
        """
        # not `upload_folder`: it sends 250 files and more, or any number after a failure, in several commits
        operations: list[Any] = [*uploaded, *(CommitOperationAdd(name, content) for name, content in contents.items())]
        sent = {each.path_in_repo for each in operations}
        # what is deleted follows from one commit: the Hub refuses this one if another came after that
        parent = self.api.repo_info(**self.place, revision=self.revision).sha
        remote = self.api.list_repo_files(**self.place, revision=parent)
        operations += [CommitOperationDelete(name) for name in remote if name not in sent and is_ours(name)]
        options = {"commit_message": message, "parent_commit": parent, **self._where()}
        try:
            return self.api.create_commit(self.place["repo_id"], operations, **options).commit_url
        except Exception as error:  # network, login, name: of many kinds
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is None or status >= 500:
                self._require_unchanged(parent, error)
            raise

    def _require_unchanged(self, parent: str | None, error: Exception) -> None:
        """Raise `UnconfirmedError` unless the branch is at the same commit as before."""
        repository = self.place["repo_id"]
        try:
            newest = self.api.repo_info(**self.place, revision=self.revision).sha
        except Exception:  # the network is gone
            newest = "unknown"
        if newest != parent:
            raise UnconfirmedError(
                f"the answer to the commit was lost ({one_line(error)}); {repository} has all of it or nothing, its "
                f"newest commit is {newest}; push again, which sends nothing twice"
            ) from None

    def _where(self) -> dict[str, Any]:
        return {"repo_type": self.place["repo_type"], "revision": self.revision}
