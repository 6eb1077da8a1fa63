"""Tar shards on the Hugging Face hub, read in the ranges that are needed. Knows nothing about samples."""

import io
import logging
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, http_backoff
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.hub import HUB_ERRORS, ask

from .sources import HUB, HubFault, Unit, is_shard

logger = logging.getLogger(__name__)

JUMP_BYTES = 1 << 16  # fetched where a read lands elsewhere: a header and its JSON
READ_ON_BYTES = 1 << 23  # fetched at most where reads follow each other


def find_hub_units(name: str, splits: list[str], local: Path) -> dict[str, list[Unit]]:
    """The shards of the hub's dataset `name`, by split, at its newest commit.

    Raises InputError where it cannot be had, saying what to put into the folder `local` instead.
    """
    units: dict[str, list[Unit]] = {split: [] for split in splits}
    try:
        api = HfApi()
        repository = f"{name}@{ask(lambda: api.dataset_info(name).sha)}"
        for split in splits:
            try:
                entries = list(api.list_repo_tree(name, split, repo_type="dataset", revision=repository.split("@")[1]))
            except EntryNotFoundError:
                continue
            shards = sorted((e.path, e.size) for e in entries if hasattr(e, "size") and is_shard(e.path))
            units[split] = [
                Unit(HUB, split, path, path, f"{repository}:{size}", size=size, repository=repository)
                for path, size in shards
            ]
    except HUB_ERRORS as error:
        raise InputError(how_to_download(name, local, type(error).__name__)) from error
    found = {split: part for split, part in units.items() if part}
    if not found:
        raise InputError(how_to_download(name, local, "it has no tar shards in " + " or ".join(splits)))
    logger.info("streaming %s from the hub: %s", name, {split: len(part) for split, part in found.items()})
    return found


def how_to_download(name: str, local: Path, reason: str) -> str:
    """One line that says what to fetch, how, and where to put it."""
    return (
        f"{name} cannot be read from the hub ({reason}) and is not in {local}: where there is access (see hf auth "
        f"login), run hf download {name} --repo-type dataset --include 'train/*.tar' 'test/*.tar' --local-dir {local}"
    )


class RemoteFile(io.RawIOBase):
    """A file of a dataset on the hub, read-only and seekable; never more than 8 MiB of it in memory.

    A dropped connection is taken up again where it broke. Raises HubFault where the hub no longer answers.
    """

    def __init__(self, repository: str, path: str, size: int):
        super().__init__()
        name, _, revision = repository.partition("@")
        self.url = hf_hub_url(name, path, repo_type="dataset", revision=revision)
        self.size, self.position = size, 0
        self.block, self.block_start, self.fetch = b"", 0, JUMP_BYTES
        self.location = ""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.size)[whence])
        return self.position

    def read(self, count: int = -1) -> bytes:
        end = self.size if count < 0 else min(self.position + count, self.size)
        parts = []
        while self.position < end:
            within = self.position - self.block_start
            if not 0 <= within < len(self.block):
                follows = bool(self.block) and within == len(self.block)
                self.fetch = min(self.fetch * 4, READ_ON_BYTES) if follows else JUMP_BYTES
                self.block_start, within = self.position, 0
                self.block = self._range(self.position, min(self.position + self.fetch, self.size))
            parts.append(self.block[within : within + end - self.position])
            self.position += len(parts[-1])
        return b"".join(parts)

    def _range(self, start: int, end: int) -> bytes:
        """Bytes start…end-1. Where a shard really lies is asked once, and again when that answer has run out."""
        reason = ""
        for _ in range(3):
            try:
                self.location = self.location or get_hf_file_metadata(self.url).location
                own = urlsplit(self.location).netloc == urlsplit(constants.ENDPOINT).netloc
                headers = {**(build_hf_headers() if own else {}), "Range": f"bytes={start}-{end - 1}"}
                answer = http_backoff("GET", self.location, headers=headers, timeout=60)
                if answer.status_code == 206 and len(answer.content) == end - start:
                    return answer.content
                reason = f"status {answer.status_code}, {len(answer.content)} bytes of {end - start}"
            except HUB_ERRORS as error:
                reason = type(error).__name__
            self.location = ""
        raise HubFault(f"{self.url} no longer answers ({reason}): start again later, what was finished is kept")
