"""Resolves models on the Hugging Face Hub to folders in the local cache, with one query per model and process.

Given an id, transformers requests each file that a model may have, and retries if the Hub does not answer. This project
passes it a local folder, which needs no requests. Independent of the contents of the files, except for the index of
sharded weights.
"""

import functools
import json
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..common.errors import InputError, first_line
from ..common.redact import Redacting

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())  # the Hub's address may contain a password
Answer = TypeVar("Answer")

SECONDS = 20.0
"""Timeout of a query to the Hub, in seconds."""
HTTP_ERRORS: Any = HfHubHTTPError.__bases__  # declared as types, which need not be exceptions
HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HTTP_ERRORS)
"""Errors that the Hub client raises: its own, and those of the HTTP library it is built on."""
WEIGHTS = ("*.safetensors", "*.bin")
BESIDE = ("*.json", "*.txt", "*.jinja")
"""Files that are fetched along with a model's weights."""
BELOW = [f"*/{pattern}" for pattern in (*WEIGHTS, "*.json", "*.txt")]
"""Files that are not fetched: subfolders of a repository may hold the same model in other formats."""
INDEX = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}


def ask(question: Callable[[], Answer]) -> Answer:
    """Calls `question`, a query to the Hub, and returns its result within SECONDS.

    The timeouts of HTTP clients apply to each address of a host and to each part of a response, and not at all to DNS
    lookups. The query runs in a daemon thread to limit the total time. Raises the exceptions of `question`, and
    TimeoutError.
    """
    answers: queue.Queue = queue.Queue(1)

    def answer() -> None:
        try:
            answers.put((question(), None))
        except Exception as error:  # raised again below
            answers.put((None, error))

    threading.Thread(target=answer, daemon=True).start()
    try:
        found, error = answers.get(timeout=SECONDS)
    except queue.Empty:
        raise TimeoutError(f"no answer within {SECONDS:.0f} s") from None
    if error is not None:
        raise error
    return found


def model_folder(name: str | Path, weights: bool = True) -> Path:
    """Returns the folder of the model `name`: the folder itself, or the folder in the cache for an id on the Hub.

    Fetches the model if the commit on the Hub is not the cached one or the cached model is incomplete. If `weights` is
    False, the weights may be missing. If the Hub cannot be reached or denies access, uses a complete model in the cache
    and logs one warning, or none in offline mode. Raises InputError if there is no such model. Several processes may
    call this at the same time: the Hub client locks the files it fetches.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        raise InputError(f"no model could be loaded from {str(name)!r}: the path does not exist: check it") from None
    return from_hub(str(name), BESIDE, missing_file, weights)


@functools.cache
def commit_on_hub(name: str) -> str | Exception | None:
    """Returns the latest commit of the model `name`, or the error that the Hub client raised. The result is cached."""
    try:
        return ask(lambda: HfApi().model_info(name, timeout=SECONDS).sha)
    except HUB_ERRORS as error:
        return error


@functools.cache
def from_hub(name: str, beside: tuple[str, ...], missing: Callable[[Path], str | None], weights: bool = True) -> Path:
    """Like `model_folder`, for the id `name` of any type of model.

    `beside` has the patterns of files to fetch along with the weights. `missing` returns the name of a file that a
    folder lacks, or None if it is complete. Raises InputError, and HFValidationError if `name` is not a valid id.
    """
    before, commit = cached_folder(name), commit_on_hub(name)
    if isinstance(commit, Exception):
        return _cached(name, missing, commit)
    if before and before.name == commit and not missing(before):
        return before
    try:
        # Fetch by commit, so that `main` in the cache refers to the previous commit until this one is complete.
        fetch = functools.partial(snapshot_download, name, revision=commit, ignore_patterns=BELOW)
        folder = Path(fetch(allow_patterns=list(beside)))
        for pattern in WEIGHTS if weights and missing(folder) else ():  # fetch only the first format that exists
            logger.info("downloading the weights of %s from %s", name, constants.ENDPOINT)
            fetch(allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
        if weights:  # without a revision, this makes `main` in the cache refer to the new commit
            snapshot_download(name, allow_patterns=["config.json"])
        return folder
    except GatedRepoError as error:
        return _cached(name, missing, error)
    except HUB_ERRORS as error:
        reason = first_line(error)
        use = ""
        if before and not missing(before):
            use = f", with HF_HUB_OFFLINE=1 to use the cached commit {before.name}"
        raise InputError(
            f"{name} cannot be downloaded from {constants.ENDPOINT} ({reason:.150}): check the network and the space "
            f"in {constants.HF_HUB_CACHE}, and run the same command again{use}"
        ) from error


def _cached(name: str, missing: Callable[[Path], str | None], error: Exception) -> Path:
    """Returns the cached folder of `name` after the Hub query failed with `error`.

    Raises InputError if it is missing or incomplete.
    """
    folder, offline = cached_folder(name), isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    lacks = missing(folder) if folder else None
    if folder and not lacks:
        if not offline:
            _warn(f"{name}: {_reason(error)}; using the cached {folder}")
        return folder
    have = f"{folder} lacks {lacks}" if folder else f"it is neither a folder nor in the cache {constants.HF_HUB_CACHE}"
    if offline:
        fix = f"check the path, or run `hf download {name}` on a machine with network access, without HF_HUB_OFFLINE"
    elif isinstance(error, GatedRepoError):
        fix = f"request access at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        fix = "check the path or id; if the model is private, log in with `hf auth login`"
    else:
        fix = f"check the path, or run `hf download {name}` on a machine with network access"
    raise InputError(f"no model could be loaded from {name!r} ({_reason(error)}, and {have}): {fix}") from error


@functools.cache
def _warn(line: str) -> None:
    """Logs each distinct warning once per process."""
    logger.warning(line)


def _reason(error: Exception) -> str:
    """Describes why the Hub query failed."""
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "the model is gated"
    if isinstance(error, RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no such model, or you cannot access it"
    reason = first_line(error)
    return f"{constants.ENDPOINT} cannot be reached: {reason:.150}"


def cached_folder(name: str) -> Path | None:
    """Returns the cached folder of the commit that `main` of `name` refers to, complete or not, or None if its
    config.json is not cached."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def missing_file(folder: Path) -> str | None:
    """Returns a file that a model in `folder` lacks, or None if it is complete. Does not check config.json."""
    needed: list[str] = []
    for weights, index in INDEX.items():
        if (folder / weights).is_file():
            break
        if (folder / index).is_file():
            try:
                shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
                return f"a readable {index}"
            needed += sorted(set(shards))
            break
    else:
        return next(iter(INDEX))
    if not (folder / "processor_config.json").is_file():
        needed.append("preprocessor_config.json")
    if not (folder / "tokenizer.json").is_file():
        needed += ["tokenizer_config.json", "vocab.json", "merges.txt"]
    return next((file for file in needed if not (folder / file).is_file()), None)
