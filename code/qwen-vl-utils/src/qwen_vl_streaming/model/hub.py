"""Models on the hub as folders of its cache: the hub is asked once in a process, and not waited for.

Libraries that are given a hub's id ask for each file that a model may have, several times where nothing answers. They
are given the folder instead, and ask for nothing. Knows nothing of what the files hold.
"""

import functools
import json
import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..common.errors import InputError
from ..common.redact import Redacting

logger = logging.getLogger(__name__)
logger.addFilter(Redacting())  # the hub's address may hold a password
Answer = TypeVar("Answer")

SECONDS = 20.0
"""How long the hub has to answer."""
HUB_ERRORS = (OSError, ValueError, *HfHubHTTPError.__bases__)
"""What the hub's client raises: its own errors, and those of whichever HTTP library it is built on."""
WEIGHTS = ("*.safetensors", "*.bin")
BESIDE = ("*.json", "*.txt", "*.jinja")
"""What a model's folder holds beside its weights, of what is needed."""
BELOW = [f"*/{pattern}" for pattern in (*WEIGHTS, "*.json", "*.txt")]
"""In folders of a repository there may be the same again for other programs."""
INDEX = {"model.safetensors": "model.safetensors.index.json", "pytorch_model.bin": "pytorch_model.bin.index.json"}


def ask(question: Callable[[], Answer]) -> Answer:
    """The answer to a `question` to the hub, within SECONDS whatever the network does: a client's own limits are for
    each address of a name and each piece of an answer, and none is for looking up the name. Raises what the question
    raises, and TimeoutError."""
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
    """The folder of the model `name`: that folder, or for a hub's id the one in the cache, fetched where the hub has
    another commit than the cache. Without `weights` those may be missing in it.

    Where the hub cannot be reached, or does not let this user in, a whole model in the cache will do; a warning says
    so, once. Raises InputError where there is none. The hub's client locks the files that several processes fetch.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        raise InputError(f"no model could be loaded from {str(name)!r}: it is not there, check the path") from None
    return from_hub(str(name), BESIDE, missing_file, weights)


@functools.cache
def commit_on_hub(name: str) -> str | Exception:
    """The newest commit of the model `name`, or what the hub's client raises; asked once."""
    try:
        return ask(lambda: HfApi().model_info(name, timeout=SECONDS).sha)
    except HUB_ERRORS as error:
        return error


@functools.cache
def from_hub(name: str, beside: tuple[str, ...], missing: Callable[[Path], str | None], weights: bool = True) -> Path:
    """As `model_folder`, for the id `name` of a model of any kind: of what is fetched `beside` the weights, and with
    what `missing` says of a folder. Raises InputError and, for what is no id, HFValidationError."""
    before, commit = cached_folder(name), commit_on_hub(name)
    if isinstance(commit, Exception):
        return _cached(name, missing, commit)
    if before and before.name == commit and not missing(before):
        return before
    try:
        # By its commit, so that the cache goes on naming the commit before until this one is whole.
        fetch = functools.partial(snapshot_download, name, revision=commit, ignore_patterns=BELOW)
        folder = Path(fetch(allow_patterns=list(beside)))
        for pattern in WEIGHTS if weights and missing(folder) else ():  # a repository may have both kinds
            logger.info("fetching the weights of %s from %s", name, constants.ENDPOINT)
            fetch(allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
        if weights:
            snapshot_download(name, allow_patterns=["config.json"])
        return folder
    except GatedRepoError as error:
        return _cached(name, missing, error)
    except HUB_ERRORS as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        use = ""
        if before and not missing(before):
            use = f", or with HF_HUB_OFFLINE=1 to use the cached commit {before.name}"
        raise InputError(
            f"{name} could not be fetched from {constants.ENDPOINT} ({reason:.150}): see to the network and to room in "
            f"{constants.HF_HUB_CACHE}, and give the same command again{use}"
        ) from error


def _cached(name: str, missing: Callable[[Path], str | None], error: Exception) -> Path:
    """What the cache has of `name` where the hub has answered with `error`. Raises InputError."""
    folder, offline = cached_folder(name), isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
    lacks = missing(folder) if folder else None
    if folder and not lacks:
        if not offline:
            _warn(f"{name}: {_reason(error)}; going on from the cached {folder}")
        return folder
    have = (
        f"{folder} lacks {lacks}"
        if folder
        else f"there is no such folder, nor is it in the cache {constants.HF_HUB_CACHE}"
    )
    if offline:
        fix = f"check the path, or run `hf download {name}` where there is a network, without HF_HUB_OFFLINE"
    elif isinstance(error, GatedRepoError):
        fix = f"ask for access at {constants.ENDPOINT}/{name} and log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        fix = "check the path or id, and for a private one log in with `hf auth login`"
    else:
        fix = f"check the path, or run `hf download {name}` where there is a network"
    raise InputError(f"no model could be loaded from {name!r} ({_reason(error)}, and {have}): {fix}") from error


@functools.cache
def _warn(line: str) -> None:
    """Once in a process."""
    logger.warning(line)


def _reason(error: Exception) -> str:
    """Why the hub is of no use now."""
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "access to it must be requested on the hub"
    if isinstance(error, RepositoryNotFoundError):
        return f"{constants.ENDPOINT} has no such model, or none that you may see"
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return f"{constants.ENDPOINT} cannot be reached: {said:.150}"


def cached_folder(name: str) -> Path | None:
    """The folder in the cache of the commit that was last seen of `name`, whole or not."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def missing_file(folder: Path) -> str | None:
    """A file of a model that `folder`, which has a config.json, lacks; None where it is whole."""
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
