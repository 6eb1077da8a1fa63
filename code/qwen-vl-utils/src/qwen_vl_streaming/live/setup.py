"""What happens before the first clip is fed: the model, the perception process, the source, compilation."""

import functools

import torch

from ..common.errors import InputError
from ..engine.step_runner import StepRunner
from ..model.modeling_qwen2_5_vl import load_model
from ..sessions import PerceptionClient, Session
from ..video.sources import Clip
from .intake import Intake

WARM_UP_STEPS = 12


def load_on(path: str, device: str, dtype: torch.dtype):
    """Load the model. The perception process calls this too."""
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # streams are made on the current one
    return load_model(path, "sdpa", dtype).to(device).eval()


def start_perception(path: str, device: torch.device, dtype: torch.dtype) -> PerceptionClient:
    """Start a perception process on another GPU. Raises InputError if there is only one."""
    where = "cpu"
    if device.type == "cuda":
        if torch.cuda.device_count() < 2:
            raise InputError("--way pipelined needs two GPUs, but found one: use --way fused")
        where = f"cuda:{((device.index or 0) + 1) % torch.cuda.device_count()}"
    return PerceptionClient(functools.partial(load_on, path, where, dtype))


def first_clip(intake: Intake, name: str) -> Clip:
    """Wait for the first clip, and leave it in the intake. Raises InputError if none comes."""
    while (clip := intake.peek()) is None and not intake.over:
        intake.wait()
    if clip is None and (clip := intake.peek()) is None:
        raise no_clip(intake, name)
    return clip


def no_clip(intake: Intake, name: str) -> InputError:
    """The error for a source that gave no clip."""
    if isinstance(intake.fault, InputError):
        return intake.fault
    why = f" ({intake.fault})" if intake.fault else ""
    return InputError(f"source {name} gave no clip{why}: check the source, or give another one")


def warm_up(session: Session, pixels: torch.Tensor) -> StepRunner:
    """Run a short session, so that compilation is over before the source starts. Returns its runner, for reuse."""
    with session:
        if session.max_clips > 1:
            session.feed(pixels)
        session.feed(pixels, last=True)
        for _ in range(WARM_UP_STEPS):
            if not session.idle:
                session.step()
    return session.runner
