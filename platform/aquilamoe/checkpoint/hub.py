"""Checkpoints of the Hugging Face hub, by `hf://ORG/NAME@REVISION`: found in the cache, downloaded, and published.

The only file that calls huggingface_hub. Addresses and tokens are the library's own: HF_ENDPOINT, HF_HOME, HF_TOKEN.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from aquilamoe.checkpoint.companions import CARRIED, TEMPLATE, TEMPLATES
from aquilamoe.config.external import ADDRESS, HUB
from aquilamoe.config.messages import UserError

PARTS = (
    *("config.json", "README.md", "*.safetensors", "*.safetensors.index.json"),
    *CARRIED,
    f"{TEMPLATES}/{TEMPLATE}",
)
# The same weights in the format of their authors, and what lies in folders: originals, other formats, checkpoints.
NOT_PARTS = ("consolidated*", "*/*.safetensors", "*/*.json", "*/tokenizer.model")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubAddress:
    """A repository of the hub.

    Attributes:
        name: ORG/NAME.
        revision: a branch, tag or commit; None is the main branch.
    """

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, key: str, text: str) -> Self:
        """Read `hf://ORG/NAME`, with or without `@REVISION`.

        Raises:
            UserError: beginning with `key`, for anything else.
        """
        found = ADDRESS.fullmatch(text)
        if found is None:
            raise UserError(f"{key}: '{text}' is no address of the hub; write {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
        return cls(found["name"], found["revision"])

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "")

    @property
    def command(self) -> str:
        """What downloads it, on any machine with a network."""
        revision = f" --revision {self.revision}" if self.revision else ""
        return f"hf download {self.name}{revision} --local-dir {self.name.partition('/')[2]}"


def find(key: str, address: HubAddress, downloads: bool) -> Path:
    """The snapshot of a repository: in the cache of this machine, or, if it may be, downloaded.

    Args:
        key: begins messages.
        address: of the repository.
        downloads: whether the network may be used.

    Raises:
        UserError: it is not there, or cannot be downloaded; with the command that downloads it elsewhere.
    """
    found = cached(address)
    if found is not None:
        return found
    if not downloads:
        raise missing(key, address, "is not on this machine, and only action=run downloads it")
    log.info("%s: downloading %s from the Hugging Face hub", key, address)
    return download(key, address)


def cached(address: HubAddress) -> Path | None:
    """The snapshot of a repository in the cache of this machine; None where there is none, or a part of one."""
    try:
        return _snapshot(address, local_files_only=True)
    except Exception:  # why it is not there matters only to who wants to download it
        return None


def download(key: str, address: HubAddress) -> Path:
    """The snapshot of a repository, from the cache or the network; only what belongs to a checkpoint.

    Raises:
        UserError: beginning with `key`, with the command that downloads it where there is a network.
    """
    try:
        return _snapshot(address, local_files_only=False)
    except Exception as error:  # the library's, the hub's and the network's: a hundred kinds
        raise missing(key, address, f"cannot be downloaded ({_reason(error)})") from None


def _snapshot(address: HubAddress, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    found = snapshot_download(
        address.name,
        revision=address.revision,
        allow_patterns=list(PARTS),
        ignore_patterns=list(NOT_PARTS),
        local_files_only=local_files_only,
    )
    return Path(found)


def missing(key: str, address: HubAddress, reason: str) -> UserError:
    """The one line for a repository that is not there, with the command to run."""
    folder = address.name.partition("/")[2]
    return UserError(
        f"{key}: {address} of the Hugging Face hub {reason}; where there is a network, run `{address.command}`, then "
        f"set {key} to {folder}"
    )


def push(key: str, directory: Path, name: str, files: Sequence[str]) -> str:
    """Publish files of a directory as a repository of the hub, which is made, private, if it is not there.

    Args:
        key: begins messages.
        directory: of the checkpoint.
        name: ORG/NAME.
        files: names in the directory.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub is not reached or refuses; with the command that publishes it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=directory, allow_patterns=list(files), commit_message=f"Add {directory.name}"
        )
    except Exception as error:  # as above
        raise UserError(
            f"{key}: {name} cannot be published ({_reason(error)}); the target is complete in {directory}: log in with "
            f"`hf auth login` or HF_TOKEN, then run `hf upload {name} {directory}`"
        ) from None
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """The first line of a library's message, after the kind of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no details'}"
