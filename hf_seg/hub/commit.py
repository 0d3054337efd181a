"""Send files to a repository on the Hub in one commit, which also deletes our own files of an earlier push."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from hf_seg.errors import UserError

IN_GIT = 10 * 2**20  # bytes; larger files are stored apart from git, and so sent apart from the commit


class Destination:
    """A repository on the Hub, and the branch to push to.

    Args:
        repository: user/name.
        kind: "model", "dataset" or "space".
        revision: branch; main if None.
    """

    def __init__(self, repository: str, kind: str, revision: str | None = None) -> None:
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

    def upload(self, name: str, path: Path) -> CommitOperationAdd:
        """Upload a large file ahead of its commit, unless the Hub has it; the file is not needed any more."""
        # the Hub may keep a small file in git itself: then it is sent with the commit
        addition = CommitOperationAdd(name, path.read_bytes() if path.stat().st_size < IN_GIT else path)
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
        """
        # not `upload_folder`: it sends 250 files and more, or any number after a failure, in several commits
        operations: list[Any] = [*uploaded, *(CommitOperationAdd(name, content) for name, content in contents.items())]
        sent = {each.path_in_repo for each in operations}
        remote = self.api.list_repo_files(**self.place, revision=self.revision)
        operations += [CommitOperationDelete(name) for name in remote if name not in sent and is_ours(name)]
        repository = self.place["repo_id"]
        return self.api.create_commit(repository, operations, commit_message=message, **self._where()).commit_url

    def _where(self) -> dict[str, Any]:
        return {"repo_type": self.place["repo_type"], "revision": self.revision}


def one_line(error: Exception) -> str:
    """Return what an error of the Hub's client says, in one line without the token."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(get_token() or "\0", "...")[:300]  # a server may repeat what it was sent
