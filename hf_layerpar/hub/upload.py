"""A folder's files as one commit on the Hub: whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

CARD_NAME = "README.md"


class Repository:
    """A model repository on the Hub, and a branch of it; both are made where they don't exist.

    `upload_folder` of huggingface_hub cuts what it sends into several commits, and one that is killed leaves a part of
    them. So everything here goes through `create_commit`: the files travel first, and one request then makes them the
    new revision.

    Raises HfHubHTTPError or OSError where the Hub refuses or can't be reached.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> None:
        """`options` are for `HfApi.create_repo`, such as private=True."""
        self.api = HfApi(token=token)
        self.revision, self.create_pr = revision, create_pr
        self.repo_id: str = self.api.create_repo(repo_id, exist_ok=True, **options).repo_id
        if revision is not None and not revision.startswith("refs/"):
            try:
                self.api.create_branch(self.repo_id, branch=revision, exist_ok=True)
            except HfHubHTTPError as error:
                if not (create_pr and error.response.status_code == 403):  # others' branches, which a PR may start from
                    raise

    def card(self) -> ModelCard | None:
        """The card that is there, if any."""
        try:
            path = hf_hub_download(self.repo_id, CARD_NAME, revision=self.revision, token=self.api.token)
        except RemoteEntryNotFoundError:  # and not its relative for a Hub that can't be asked
            return None
        return ModelCard.load(path, ignore_metadata_errors=True)

    def commit(
        self,
        files: Iterable[tuple[str, Path]],
        message: str,
        *,
        description: str | None = None,
        replaces: Callable[[str], bool] = lambda name: False,
    ) -> CommitInfo:
        """Commits `files` (path in the repository, file here).

        replaces: which of the other files there belong to what is replaced, and are deleted in the same commit.
        """
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files]
        kept = {operation.path_in_repo for operation in added}
        there = self.api.list_repo_files(self.repo_id, revision=self.revision)
        deleted = [CommitOperationDelete(path_in_repo=name) for name in there if name not in kept and replaces(name)]
        return self.api.create_commit(
            self.repo_id,
            operations=[*deleted, *added],
            commit_message=message,
            commit_description=description,
            revision=self.revision,
            create_pr=self.create_pr,
        )
