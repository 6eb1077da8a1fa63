"""GPUs: a table of well-known cards, and the cards of this machine. Does not depend on models."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qwen_vl_streaming.common.errors import InputError, first_line

from .constants import GIB, MATRIX_SHARE

HOST_PCIE_5, HOST_PCIE_4 = 40e9, 20e9
"""Bytes/s of `Card.host_link`. PCIe 5: 7B with adapters on an H200, which fetches its weights 2.5 times in a pass
over 7,430 tokens, took 4.55 s for four. PCIe 4 was not measured, nor faster links than PCIe."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    gigabytes: tuple[int, ...]
    """Memory sizes that it is sold with; the first is the default."""
    tflops: float
    """Nominal dense bf16 matrix rate in TFLOP/s."""
    memory_rate: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s that reducing gradients among the GPUs of a machine reaches, as seen by a training step."""
    host_link: float = HOST_PCIE_4
    """Bytes/s between the host's memory and its own, for offload."""

    @property
    def rate(self) -> float:
        """Expected rate of a bf16 matrix product of 8192 x 8192, FLOP/s."""
        return MATRIX_SHARE * self.tflops * 1e12


OCCUPIED = 0.1
"""Share of a card's memory in use from which a refusal mentions the other processes."""
USABLE = 0.991
"""GiB that PyTorch sees per nominal GB: 79.2 of an H100 with 80, 139.8 of an H200 with 141."""
NVLINK, PCIE = 195e9, 10e9
CARDS = (
    Card("B200", (180, 192), 2250, 8.0e12, 2 * NVLINK, HOST_PCIE_5),
    Card("GB200", (186, 192), 2450, 8.0e12, 2 * NVLINK, HOST_PCIE_5),
    Card("H200", (141,), 989, 4.8e12, NVLINK, HOST_PCIE_5),
    Card("GH200", (96, 144), 989, 4.0e12, NVLINK, HOST_PCIE_5),
    Card("H100", (80, 94, 96), 989, 3.35e12, NVLINK, HOST_PCIE_5),
    Card("H800", (80,), 989, 3.35e12, NVLINK / 2, HOST_PCIE_5),
    Card("H20", (96, 141), 148, 4.0e12, NVLINK, HOST_PCIE_5),
    Card("A100", (80, 40), 312, 2.0e12, NVLINK / 2),
    Card("A800", (80, 40), 312, 2.0e12, NVLINK / 3),
    Card("L40S", (48,), 362, 0.86e12, PCIE),
    Card("L40", (48,), 181, 0.86e12, PCIE),
    Card("L4", (24,), 121, 0.3e12, PCIE),
    Card("A40", (48,), 150, 0.7e12, PCIE),
    Card("A10", (24,), 125, 0.6e12, PCIE),
    Card("A6000", (48,), 155, 0.77e12, PCIE),
    Card("RTX6000Ada", (48,), 364, 0.96e12, PCIE),
    Card("RTX5090", (32,), 210, 1.8e12, PCIE, HOST_PCIE_5),
    Card("RTX4090", (24,), 165, 1.0e12, PCIE),
    Card("RTX4080", (16,), 97, 0.72e12, PCIE),
    Card("RTX3090", (24,), 71, 0.94e12, PCIE),
)
SPACE_AND_MARKS = re.compile(r"[\s_-]+|NVIDIA|GeForce|Tesla|Generation", re.IGNORECASE)


@dataclass(frozen=True)
class Gpus:
    """The GPUs of a run. All are alike."""

    count: int
    """On all nodes together."""
    name: str
    memory: int
    """Bytes that a training process may use: those that are free, or all of a card that is not here."""
    rate: float
    """Measured or expected rate of a bf16 matrix product of 8192 x 8192, FLOP/s."""
    memory_rate: float
    link: float
    host_link: float
    """Bytes/s, see Card."""
    nodes: int = 1
    here: bool = False
    total: int = 0
    """Bytes of a card that is here, free or not."""

    def describe(self) -> str:
        """Such as 8 x H100 (79.2 GiB)."""
        nodes = f" on {self.nodes} nodes" if self.nodes > 1 else ""
        return f"{self.count} x {self.name}{nodes}, {self.memory / GIB:.1f} GiB {'free' if self.here else 'each'}"

    @property
    def occupied(self) -> str:
        """What to do where other processes use much of the memory, else an empty string."""
        if self.total - self.memory < OCCUPIED * self.total:
            return ""
        used = (self.total - self.memory) / GIB
        return f"; other processes use {used:.1f} GiB of one: end them (nvidia-smi lists them), or use another"


def find_card(name: str) -> Card | None:
    """The card of this name, as users or the driver write it, else None. The longest name that it contains counts."""
    plain = SPACE_AND_MARKS.sub("", name).upper()
    found = [card for card in CARDS if card.name.upper() in plain]
    return max(found, key=lambda card: len(card.name), default=None)


def parse_gpus(text: str, nodes: int = 1) -> Gpus:
    """GPUs that are not here, such as 8xH100-80GB, H200 or 2xA100-40GB. Raises InputError for unknown ones."""
    given = re.fullmatch(r"(?:(\d+)\s*x\s*)?([A-Za-z][\w .]*?)(?:-(\d+)(?:GB|GiB)?)?", text.strip(), re.IGNORECASE)
    example = "give COUNTxNAME-MEMORY, such as 8xH100-80GB"
    if not given:
        raise InputError(f"--gpus {text}: {example}")
    count, name, gigabytes = int(given[1] or 1), given[2], int(given[3] or 0)
    if not 1 <= count <= 1024:
        raise InputError(f"--gpus {text}: the number of GPUs must be between 1 and 1024")
    card = next((card for card in CARDS if card.name.upper() == SPACE_AND_MARKS.sub("", name).upper()), None)
    if card is None:
        known = ", ".join(card.name for card in CARDS)
        raise InputError(f"--gpus {text}: {name!r} is not known; known are {known}")
    if gigabytes and gigabytes not in card.gigabytes:
        sizes = " or ".join(f"{size}GB" for size in card.gigabytes)
        raise InputError(f"--gpus {text}: {card.name} has {sizes}")
    gib = (gigabytes or card.gigabytes[0]) * USABLE
    return Gpus(count * nodes, card.name, int(gib * GIB), card.rate, card.memory_rate, card.link, card.host_link, nodes)


@contextlib.contextmanager
def usable_gpus() -> Iterator[None]:
    """Raises InputError for errors of CUDA, such as a GPU that another process uses exclusively."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        raise InputError(
            f"a GPU of this machine cannot be used ({reason}): end the other processes on it, which nvidia-smi lists, "
            "or name others in CUDA_VISIBLE_DEVICES"
        ) from error


@usable_gpus()
def gpus_here(per_node: int, nodes: int = 1) -> Gpus:
    """The first `per_node` GPUs of this machine, with the smallest free memory of them. Raises InputError where they
    differ or cannot be used."""
    import torch

    if per_node > (count := torch.cuda.device_count()):
        raise InputError(f"{per_node} processes on a machine with {count} GPUs: lower NPROC_PER_NODE")
    names = [torch.cuda.get_device_name(index) for index in range(per_node)]
    if len(set(names)) > 1:
        raise InputError(
            f"the GPUs of this machine differ ({', '.join(dict.fromkeys(names))}), and the slowest would hold up the "
            "others: name GPUs of one kind in CUDA_VISIBLE_DEVICES"
        )
    memory, total = min(torch.cuda.mem_get_info(index) for index in range(per_node))
    if card := find_card(names[0]):
        name, rate, memory_rate = card.name, card.rate, card.memory_rate
        link, host_link = card.link, card.host_link
    else:
        name, rate, link, host_link = names[0], measured_rate(), PCIE, HOST_PCIE_4
        memory_rate = rate / 400
    return Gpus(per_node * nodes, name, memory, rate, memory_rate, link, host_link, nodes, here=True, total=total)


def all_nodes(found: Sequence[Gpus]) -> Gpus:
    """The GPUs of all nodes, from those that each has `found` of its own. The least of them holds for all.

    Raises InputError where they are of different kinds.
    """
    for node, gpus in enumerate(found):
        if gpus.name != found[0].name:
            raise InputError(
                f"the GPUs of the nodes differ: {found[0].name} on node 0, {gpus.name} on node {node}: use GPUs of "
                "one kind"
            )
    least = min(found, key=lambda gpus: gpus.memory)
    rate, count = min(gpus.rate for gpus in found), sum(gpus.count for gpus in found)
    return replace(least, count=count, rate=rate, nodes=len(found))


def measured_rate() -> float:
    """FLOP/s of a bf16 matrix product on the first GPU, for cards that the table lacks."""
    import torch

    side, repeats = 4096, 10
    a, b = torch.randn(2, side, side, device="cuda", dtype=torch.bfloat16)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for index in range(repeats + 2):
        if index == 2:
            start.record()
        a @ b
    stop.record()
    torch.cuda.synchronize()
    return 2 * side**3 * repeats / (start.elapsed_time(stop) / 1e3)
