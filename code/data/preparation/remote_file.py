"""A file of a dataset on the Hugging Face hub, read in the ranges that are needed. Knows nothing about samples."""

import io
from urllib.parse import urlsplit

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, http_backoff
from qwen_vl_streaming.model.hub import HUB_ERRORS

JUMP_BYTES = 1 << 16  # fetched where a read lands elsewhere: a header and its JSON
READ_ON_BYTES = 1 << 23  # fetched at most where reads follow each other


class HubFault(Exception):
    """The hub no longer answers: no fault of a sample, so it must not be taken for one."""


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
