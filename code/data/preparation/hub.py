"""Data sets on the Hugging Face hub: listing their files and reading byte ranges. Does not depend on samples."""

import io
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import build_hf_headers, http_backoff
from qwen_vl_streaming.common.errors import InputError
from qwen_vl_streaming.model.hub import HUB_ERRORS, ask

from .videos import Seekable

SEEK_BYTES = 1 << 16  # first request after a seek: enough for a header and its JSON
SEQUENTIAL_BYTES = 1 << 23  # largest request while reads are sequential


class HubError(Exception):
    """The hub does not answer. Not an error of a sample, so no sample may be skipped because of it."""


def list_dataset(
    name: str, local: Path, fix: str, folders: tuple[str | None, ...] = (None,)
) -> tuple[str, dict[str, int]]:
    """List the files of the data set `name` on the hub at its newest commit.

    Lists the top level, or `folders` where given; a folder that does not exist is empty. Returns the repository as
    "owner/name@commit", and the size in bytes of each path. Raises InputError if the hub does not answer or refuses
    access; its message names the folder `local` and ends with `fix`.
    """
    try:
        api = HfApi()
        revision = ask(lambda: api.dataset_info(name).sha)
        sizes: dict[str, int] = {}
        for folder in folders:
            try:
                entries = list(api.list_repo_tree(name, folder, repo_type="dataset", revision=revision))
            except EntryNotFoundError:
                continue
            sizes |= {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    except HUB_ERRORS as error:
        raise InputError(
            f"{name} is not in {local} and cannot be read from the hub ({type(error).__name__}): {fix}"
        ) from error
    return f"{name}@{revision}", sizes


class RemoteFile(Seekable, io.RawIOBase):
    """A read-only, seekable file of a data set on the hub, given as "owner/name@commit". Buffers at most 8 MiB.

    Retries a dropped connection from where it broke. Raises HubError if the hub does not answer.
    """

    def __init__(self, repository: str, path: str, size: int):
        super().__init__()
        name, _, revision = repository.partition("@")
        self.url = hf_hub_url(name, path, repo_type="dataset", revision=revision)
        self.size = size
        self.block, self.block_start, self.request_bytes = b"", 0, SEEK_BYTES
        self.location = ""

    def readable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        end = self.size if count < 0 else min(self.position + count, self.size)
        parts = []
        while self.position < end:
            within = self.position - self.block_start
            if not 0 <= within < len(self.block):
                sequential = bool(self.block) and within == len(self.block)
                self.request_bytes = min(self.request_bytes * 4, SEQUENTIAL_BYTES) if sequential else SEEK_BYTES
                self.block_start, within = self.position, 0
                self.block = self._read_range(self.position, min(self.position + self.request_bytes, self.size))
            parts.append(self.block[within : within + end - self.position])
            self.position += len(parts[-1])
        return b"".join(parts)

    def _read_range(self, start: int, end: int) -> bytes:
        """Read bytes start…end-1. The download address is resolved once, and again when it has expired."""
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
        raise HubError(f"{self.url} does not answer ({reason}): run the same command again later to resume")
