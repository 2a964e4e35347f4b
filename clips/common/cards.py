"""GPUs to plan with: their memory and bandwidths as makers state them, and the time of a run on them."""

from __future__ import annotations

from dataclasses import dataclass

from clips.common.errors import UserError
from clips.common.peaks import stated_peak

PER_MACHINE = 8
USABLE = 0.9
"""Share of a card's memory that a plan fills; the rest is for CUDA's context, NCCL's buffers and allocator gaps."""
BUS = 0.7
"""Share of a stated bandwidth that a collective reaches."""


@dataclass(frozen=True)
class Card:
    """One kind of GPU, PER_MACHINE of them in a machine."""

    name: str
    """Its name in clips/common/peaks.py."""
    memory_gb: float
    link_gb_s: float
    """To the other GPUs of its machine, each way."""
    network_gb_s: float
    """From a machine to the others, each way, for the usual network of this GPU."""

    @property
    def peak(self) -> float:
        """FLOP/s, dense bf16."""
        peak = stated_peak(self.name)
        if peak is None:
            raise ValueError(f"{self.name} has no peak in clips/common/peaks.py")
        return peak

    @property
    def usable(self) -> float:
        """Bytes that a run may fill."""
        return USABLE * self.memory_gb * 1e9


@dataclass(frozen=True)
class Machine:
    """The machine that a run is planned for."""

    card: Card
    gpus: int
    mfu: float
    """Share of the peak that is reached."""
    price: float | None = None
    """Price of a GPU hour."""

    def __str__(self) -> str:
        return f"{self.gpus} × {self.card.name} of {self.card.memory_gb:g} GB"

    @property
    def speed(self) -> float:
        """FLOP/s of one GPU."""
        return self.card.peak * self.mfu

    def collective_seconds(self, moved: float) -> float:
        """Seconds of a ring over all GPUs in which each sends `moved` bytes (2 n for an all-reduce of n bytes)."""
        card = self.card
        # Over several machines each GPU's ring crosses the network through its own adapter, so adapters add up.
        bus = card.link_gb_s if self.gpus <= PER_MACHINE else min(card.link_gb_s, card.network_gb_s)
        return moved * (self.gpus - 1) / self.gpus / (BUS * bus * 1e9)

    @property
    def rates(self) -> list[str]:
        """The assumptions about speed and communication, for a person."""
        card = self.card
        return [
            f"speed: {self.mfu:.0%} of {card.peak / 1e12:.0f} TFLOP/s (--mfu), as others publish: 13 % (open_clip, "
            "B/16 on A100), 20 % (NeMo, g/14 on H100), 23 % (a compiled ViT-S, H100); what checkpointing and GradCache "
            "compute again comes on top",
            f"communication: ring collectives at {BUS:.0%} of {card.link_gb_s:g} GB/s inside a machine of "
            f"{PER_MACHINE} and of {card.network_gb_s:g} GB/s between machines, none of it behind computation",
        ]

    def cost(self, hours: float) -> str:
        """ ", N at PRICE a GPU hour"; empty without a price."""
        return "" if self.price is None else f", {hours * self.price:,.0f} at {self.price:g} a GPU hour"


@dataclass(frozen=True)
class Time:
    """The time of `steps` optimizer steps. Computation and communication do not overlap."""

    steps: int
    compute_s: float
    communication_s: float
    """Of one optimizer step each."""

    @property
    def step_s(self) -> float:
        return self.compute_s + self.communication_s

    @property
    def hours(self) -> float:
        return self.steps * self.step_s / 3600

    def cells(self, batch_size: int, gpus: int) -> list[str]:
        """The cells of a table below TIME_HEAD."""
        return [
            f"{self.steps:,}", f"{self.step_s:.2f}", f"{self.communication_s / self.step_s:.0%}",
            f"{batch_size / self.step_s / gpus:,.1f}", f"{self.hours / 24:.1f}", f"{self.hours * gpus:,.0f}",
        ]  # fmt: skip


TIME_HEAD = ("steps", "step, s", "of it communication", "samples/s/GPU", "days", "GPU hours")

CARDS = {
    "b200": Card("B200", 180, 900, 400),
    "h200": Card("H200", 141, 450, 400),
    "h100": Card("H100", 80, 450, 400),
    "a100": Card("A100", 80, 300, 200),
    "a100-40": Card("A100", 40, 300, 200),
    "l40s": Card("L40S", 48, 32, 50),
    "rtx4090": Card("RTX 4090", 24, 32, 12.5),
}
"""`--kind` → what it is. NVLink or, for the last two, PCIe 4; networks of 8 × 400, 8 × 200, 400 and 100 Gbit/s."""


def card(kind: str) -> Card:
    """The card of `--kind`. Raises UserError with the known kinds."""
    if kind not in CARDS:
        raise UserError(f"--kind {kind!r} is not known; choose one of: {', '.join(CARDS)}")
    return CARDS[kind]
