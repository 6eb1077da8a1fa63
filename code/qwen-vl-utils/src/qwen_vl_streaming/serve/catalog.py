"""The models that are served: what each is called, how it runs, and what a viewer's request means for it.

Reads configs and processors, no weights.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.errors import InputError
from ..live.setup import check_schedule
from ..model.loading import load_config, tokens_per_second
from ..model.prompts import QUESTIONS, Template, load_processor, make_template
from ..model.quantization import check_precision
from ..model.trained import MODEL, check_trained, end_of_slot, wait_k
from ..sessions import GREEDY
from ..timeline.positions import clips_before_text
from ..timeline.timeline import Layout
from ..timeline.variants import Variant, chosen_variant, get_variant
from ..video.frames import FRAMES_PER_CLIP
from ..video.pixel_budget import SIDE_FACTOR, PixelBudget
from .model_spec import ModelSpec
from .options import Settings

FPS = 2.0
CHANNELS = 3
COMMON = ((720, 1280), (480, 640), (1280, 720))
"""Heights and widths of common sources."""
SCHEDULES = ("wait-1", "wait-2", "wait-3", "wait-5", GREEDY)


@dataclass(frozen=True)
class ServedModel:
    name: str
    path: str
    variant: Variant
    config: Any = field(repr=False)
    steps_per_second: float
    """Position steps of a second of video."""
    budget: PixelBudget
    processor: Any = field(repr=False)

    @property
    def mode(self) -> str:
        """The execution mode of its sessions; a variant that does not stream is "offline" for viewers."""
        return "fused" if self.variant.parallel else "serial" if self.variant.streams else "offline"

    @property
    def schedules(self) -> list[str]:
        """What a viewer may choose from, the checkpoint's own first."""
        own = (MODEL,) if self.end_of_slot else ()
        return list(dict.fromkeys((*own, self.wait_k, *SCHEDULES))) if self.variant.streams else []

    @property
    def wait_k(self) -> str:
        return f"wait-{wait_k(self.config)}"

    @property
    def end_of_slot(self) -> str | None:
        """The token with which the model ends slots, if it decides when to speak."""
        return end_of_slot(self.config)

    @functools.cached_property
    def end_of_slot_id(self) -> int | None:
        return self.template(QUESTIONS[-1]).end_of_slot

    @functools.cached_property
    def decode(self):
        """Token ids to text, without special tokens: what the tokenizer's own `decode` calls after some checks."""
        return self.processor.tokenizer.backend_tokenizer.decode

    def template(self, question: str) -> Template:
        return make_template(self.processor, question, self.end_of_slot)

    def layout(self, template: Template, size: tuple[int, int], seconds: float = FRAMES_PER_CLIP / FPS) -> Layout:
        """For frames of `size` (height, width)."""
        grid = size[0] // SIDE_FACTOR, size[1] // SIDE_FACTOR
        return template.layout(grid, self.steps_per_second * seconds)

    def most_clips(self, layout: Layout, limit: int | None) -> int | None:
        """Clips that a session can watch, or None for any number."""
        counts = [count for count in (clips_before_text(self.variant, layout), limit) if count is not None]
        return min(counts, default=None)

    def check_schedule(self, name: str | None) -> str:
        """The schedule to use. Raises InputError if it is unknown."""
        if not self.variant.streams:
            return self.wait_k
        return check_schedule(name or None, self.config, self.name, self.variant)

    def spec(self, settings: Settings, device: str) -> ModelSpec:
        """What its process on `device` needs to know."""
        template = self.template(QUESTIONS[-1])
        common = tuple(self.layout(template, self.budget.size(*size, frames=0)) for size in COMMON)
        widest = template.layout(self.budget.largest_grid, self.steps_per_second * FRAMES_PER_CLIP / FPS)
        clip_tokens = max(widest.tokens_per_clip, int(self.budget.most(FRAMES_PER_CLIP)) // SIDE_FACTOR**2)
        return ModelSpec(
            name=self.name,
            path=self.path,
            variant=self.variant.name,
            mode="fused" if self.variant.parallel else "serial",
            device=device,
            dtype=settings.dtype,
            weights=settings.weights,
            sessions=settings.sessions,
            limits=settings.pool_limits,
            tokens_after_end=settings.max_new_tokens,
            template=template,
            largest=replace(widest, prompt=widest.prompt + settings.limits.question_tokens),
            clip_tokens=clip_tokens,
            clip_bytes=clip_tokens * SIDE_FACTOR**2 * FRAMES_PER_CLIP * CHANNELS * settings.dtype.itemsize,
            common=common,
        )


def load_catalog(settings: Settings) -> dict[str, ServedModel]:
    """The models by name. Raises InputError if one cannot be served, or if they cannot share a page: the same frames
    go to all of them, so that all must take frames of the same size and prepare them alike."""
    models: dict[str, ServedModel] = {}
    first = None
    for given, path in settings.models.items():
        config = load_config(path)
        trained = getattr(config, "streaming_variant", None)
        variant = get_variant(trained or chosen_variant("group"))
        check_trained(config, path, variant, "train it again")
        check_precision(settings.weights, settings.devices[0], settings.dtype)
        name = variant.name if given.startswith("#") else given
        if name in models:
            raise InputError(f"two models are called {name}: give them names, --model NAME=DIR")
        processor = load_processor(path)
        model = ServedModel(
            name=name,
            path=path,
            variant=variant,
            config=config,
            steps_per_second=tokens_per_second(config),
            budget=PixelBudget.trained(config, settings.budget),
            processor=processor,
        )
        alike = model.budget, model.steps_per_second, processor.video_processor.to_dict()
        first = first or (name, alike)
        if alike != first[1]:
            raise InputError(
                f"models {first[0]} and {name} take frames of different sizes, so that one page cannot show both: "
                "serve them on two ports, or give --max-pixels-per-frame and the other sizes"
            )
        models[name] = model
    return models


def place(models: dict[str, ServedModel], settings: Settings) -> list[ModelSpec]:
    """Which model runs on which device: one per device if there are enough, as often as there are devices; otherwise
    they share the devices evenly."""
    names, devices = [*models], settings.devices
    return [
        models[names[index % len(names)]].spec(settings, devices[index % len(devices)])
        for index in range(max(len(names), len(devices)))
    ]
