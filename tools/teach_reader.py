#!/usr/bin/env python
"""Teach the small language model to find words again, in words alone, and save that as a LoRA adapter.

In an imagined scene embeddings of words stand in place of the image tokens: the word for what a cell shows, the words
for its place (or of the attribute's column), and noise. The words are random ones of the vocabulary, so nothing can be
learned by heart. The linear layers of the kept layers train whole, and an SVD cuts their change to a rank that fits
into MEGABYTES. A tenth of the words is held out. An answer is right if every token of it, its end included, is the most
likely one behind those before it, so greedy decoding writes exactly this answer.

Every EVERY samples the tool prints right answers in % on held-out words and saves a checkpoint, from which the same
command goes on. 19,200 samples take about 75 minutes of one core with AVX-512 bf16.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from clips.common.errors import UserError, run_command
from clips.common.files import placing, replacing, sha256, write_json
from clips.common.flags import Parser
from clips.common.runtime import autocast, has_bf16
from clips.common.tensors import read_torch, write_weights
from clips.data.demo import BACKGROUNDS, CONCEPTS, IMAGE_SIZE, PLACES, capital, describe, draw_scene
from mllm import DEFAULT_LLM
from mllm.data import demo
from mllm.data.attributes import IS_VALUE, SHORT, WHAT_VALUE
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.data.dataset import pad_rows
from mllm.data.demo import DemoScene, QuestionAnswer
from mllm.model.forward import answer_logits, causal_lm_loss
from mllm.model.llm import LanguageModel, load_llm
from mllm.model.packing import PACKED, Counts, Packing

BATCH, RATE, WARMUP, FALLING = 16, 5e-4, 30, 0.3
"""Samples of a step, AdamW's rate, steps of its warm-up, share of the samples over which it falls to zero."""
EVERY = 1_600
MEGABYTES, HEADER = 8, 40_000
GRID = 6
COUNTS = {1: 5, 2: 6, 3: 5, 4: 2}
"""Things of a scene → relative frequency."""
SHARES = {"identity": 18, "sides": 18, "yes_no": 31, "caption": 3, "attribute": 15, "attribute_yes_no": 15}
"""Kind of a conversation → relative frequency; "sides" asks where things are and what is beside them."""
KINDS = (*demo.KINDS, "attribute", "attribute_yes_no")
WHAT_KIND = "What kind of {words} is this?"
SHOP = (
    "backpack bag band bath beauty belt black body book boots bottle boy bronze brown cap casual chain charcoal child "
    "clothes coat coffee copper cosmetics cream fashion flip fluorescent foot formal foundation free garment gift "
    "girl glass glove gold grey hair heel home jacket jewel kid laptop lime lip makeup mask messenger metallic mist "
    "mobile multi mustard nail navy neck night none pant party rain rose rust sea sets shoe short silver skin smart "
    "sock sport steel suit tablet tie tone track travel trunk vest vintage waist wallet wash water wear wedding women"
)
"""Words of shops, which are left out too, with their plurals, so that a reader can be measured on one."""


class Imagination:
    """Random names out of a vocabulary, and the embeddings that show them. `held_out` words are never in training."""

    def __init__(self, llm: LanguageModel, *, held_out: bool, words: Sequence[str] | None = None) -> None:
        table = llm.model.get_input_embeddings().weight.detach().float()
        self.centre = table.mean(0)
        self.spread = (table - self.centre).square().sum(1).mean().sqrt()
        self.units = unit(table - self.centre)
        self.tokenizer = llm.tokenizer
        vocabulary = llm.tokenizer.get_vocab()
        plain = re.compile("Ġ[b-df-hj-np-tv-z][a-z]{3,}")  # "a" is the right article
        taken = " ".join([*CONCEPTS, *CONCEPTS.values(), *BACKGROUNDS, *PLACES, SHOP]).lower()
        left_out = {form for word in re.findall("[a-z]+", taken) for form in (word, f"{word}s", f"{word}es")}
        found = sorted(token[1:] for token, number in vocabulary.items() if plain.fullmatch(token) and number < 30_000)
        of_split = [word for word in found if (hashlib.sha256(word.encode()).digest()[0] < 26) == held_out]
        self.words = list(words) if words else [word for word in of_split if word not in left_out]
        spellings = {word: capital(word) for word in self.words}
        self.capitals = [name for name in spellings.values() if {name, f"Ġ{name}"} <= vocabulary.keys()] or [
            *spellings.values()
        ]
        """Words that are one token at the start of an answer, too."""
        self.tokens = functools.cache(lambda name: llm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"])

    def name(self, rng: random.Random, words: Sequence[str]) -> str:
        """One word, two words, a plural, or two words in one."""
        first, second = rng.choice(words), rng.choice(words)
        forms = (first, f"{first} {second}", f"{first}s", f"{first}{second.lower()}")
        return rng.choices(forms, (75, 12, 8, 5))[0]

    def names(self, rng: random.Random, count: int, *, values: bool = False) -> list[str]:
        """Different names: of things, or `values` of attributes, of which most are capitalised."""
        found: dict[str, None] = {}
        while len(found) < count:
            words = rng.choices((self.capitals, self.words), (4, 1))[0] if values else self.words
            name = self.name(rng, words)
            found[" ".join(map(capital, name.split())) if values and rng.random() < 0.8 else name] = None
        return list(found)

    def directions(self, names: Sequence[str], weights: Tensor, noise: torch.Generator) -> Tensor:
        """Unit vectors [N, D] of N cells that show `names` by `weights` [N, names].

        Of several tokens the earlier ones weigh more, which tells their order.
        """
        total = torch.zeros(len(weights), self.units.shape[1])
        for name, column in zip(names, weights.T, strict=True):
            ids = self.tokens(name)
            shares = (0.5 + torch.rand(len(weights), len(ids), generator=noise)) * 0.7 ** torch.arange(len(ids))
            total += column[:, None] * unit(shares @ self.units[ids])
        return unit(total)

    def cells(
        self, shown: tuple[Sequence[str], Tensor], tags: tuple[Sequence[str], Tensor], rng: random.Random
    ) -> Tensor:
        """The embeddings [GRID², D] of cells that show names by weights; `tags` say their places or columns."""
        noise = torch.Generator().manual_seed(rng.getrandbits(60))
        a, b, n, lost = torch.rand(4, GRID**2, 1, generator=noise)
        stray, other = self.units[torch.randint(len(self.tokenizer), (2, GRID**2), generator=noise)]
        words = torch.where(lost < 0.05, stray, self.directions(*shown, noise))
        mixed = words + 0.5 * (0.6 + 0.8 * b) * self.directions(*tags, noise) + 0.6 * n * other
        return self.centre + (0.8 + 0.4 * a) * self.spread * unit(mixed)

    def scene(self, rng: random.Random) -> tuple[DemoScene, Tensor]:
        """A scene of the demo's kind with random names, and its cells."""
        *names, ground = self.names(rng, 1 + rng.choices(list(COUNTS), list(COUNTS.values()))[0])
        drawn = replace(draw_scene(rng, names), background=ground)
        weights = torch.zeros(GRID, GRID, len(names) + 1)
        weights[..., -1] = 1
        centres = (torch.arange(GRID) + 0.5) * IMAGE_SIZE / GRID
        for number, thing in enumerate(drawn.things):  # from back to front
            left, top, right, bottom = thing.box
            rows, columns = (centres > top) & (centres < bottom), (centres > left) & (centres < right)
            weights[rows[:, None] & columns] = torch.eye(len(names) + 1)[number]
        order = sorted(drawn.things, key=lambda thing: list(PLACES).index(thing.place))
        things = tuple((thing.concept, thing.place) for thing in order)
        scene = DemoScene("", b"", things, ground, describe(drawn, rng).caption, "")
        return scene, self.cells(([*names, ground], weights.flatten(0, 1)), (list(PLACES), PLACES_OF_CELLS), rng)

    def item(self, rng: random.Random) -> tuple[dict[str, str], Tensor]:
        """One item's attributes, column → value, and its cells. With several, a cell says whose value it shows."""
        count = rng.choice((1, 1, 2, 3))
        columns, values = self.names(rng, count), self.names(rng, count + 1, values=True)
        weights = torch.tensor([[rng.random() ** 3 for _ in columns] + [0.0] for _ in range(GRID**2)])
        edge = rng.choice((0, 0, 1))
        inside = torch.zeros(GRID, GRID, dtype=torch.bool)
        inside[edge : GRID - edge, edge : GRID - edge] = True
        weights[~inside.flatten()] = torch.eye(count + 1)[-1]  # what is behind the item
        tags = weights * (count > 1)
        return dict(zip(columns, values, strict=False)), self.cells(
            (values, weights), ([*columns, "background"], tags), rng
        )

    def sample(self, kind: str, rng: random.Random) -> tuple[list[QuestionAnswer], Tensor]:
        """A conversation of one kind of training or one question of KINDS, with its cells."""
        if kind.startswith("attribute"):
            item, cells = self.item(rng)
            yes_no = [(*pair, yes) for pair in item.items() for yes in (True, False)]
            if kind == "attribute":
                pairs = [(rng.choice((WHAT_VALUE, WHAT_KIND)).format(words=words), item[words]) for words in item]
            else:
                absent = self.names(rng, len(yes_no), values=True)
                pairs = [
                    (IS_VALUE.format(words=words, value=value if yes else other), "Yes" if yes else "No")
                    for (words, value, yes), other in zip(yes_no, absent, strict=True)
                ]
            (question, answer), *others = rng.sample(pairs, len(pairs))
            return [(f"{question}\n{SHORT}", answer), *others], cells
        scene, cells = self.scene(rng)
        things = rng.sample(scene.things, len(scene.things))
        if kind == "caption":
            return [(rng.choice(demo.CAPTION_PROMPTS), scene.caption)], cells
        first = [(demo.ask_count, 0.3), (demo.ask_background, 0.1)]
        pairs = [ask(scene, things[0], rng) for ask, share in first if rng.random() < share]
        if kind == "identity":
            pairs += [demo.ask_identity(scene, thing, rng) for thing in things]
        elif kind == "sides":
            pairs += filter(None, [demo.ask_relation(scene, thing, rng) for thing in things[:2]])
            pairs += [demo.ask_where(scene, thing, rng) for thing in things]
        else:
            asked = [(thing, yes) for thing in things for yes in (True, False)]
            pairs += [demo.is_there(scene, *about, rng, self.names(rng, 40)) for about in rng.sample(asked, len(asked))]
        return list(dict(pairs).items()), cells

    def question(self, kind: str, rng: random.Random) -> tuple[list[QuestionAnswer], Tensor]:
        """One question of one of KINDS, with its cells."""
        if kind not in demo.KINDS:
            pairs, cells = self.sample(kind, rng)
            return pairs[:1], cells
        while True:
            scene, cells = self.scene(rng)
            thing = rng.choice(scene.things)
            if kind == "yes_no":
                pair: Any = demo.is_there(scene, thing, rng.random() < 0.5, rng, self.names(rng, 40))
            else:
                pair = demo.KINDS[kind](scene, thing, rng)
            if pair is not None:
                return [pair], cells


def unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1)


def place_of(row: int, column: int) -> str:
    """The place of a cell: "center" for the four in the middle, else its quarter."""
    if {row, column} <= {GRID // 2 - 1, GRID // 2}:
        return "center"
    return f"{'top' if row < GRID // 2 else 'bottom'} {'left' if column < GRID // 2 else 'right'}"


PLACES_OF_CELLS = torch.eye(len(PLACES))[[list(PLACES).index(place_of(*divmod(i, GRID))) for i in range(GRID**2)]]


class Reader:
    """The language model while it is taught: its kept layers' linear weights train, all else is frozen."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm = llm
        llm.model.requires_grad_(False).set_attn_implementation(PACKED)
        layers = llm.model.model.layers.named_modules(prefix="model.layers")
        self.linear = {name: module for name, module in layers if isinstance(module, nn.Linear)}
        self.weights = {name: module.weight.requires_grad_() for name, module in self.linear.items()}
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.encoder = ConversationEncoder(llm.tokenizer, "auto", GRID**2)
        # As a LLaVA model holds them.
        self.llava: Any = SimpleNamespace(
            model=SimpleNamespace(language_model=llm.model.model), lm_head=llm.model.lm_head
        )
        self.device = torch.device("cpu")

    def batch(
        self, samples: Sequence[tuple[list[QuestionAnswer], Tensor]]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The arguments of `causal_lm_loss`."""
        turns = [demo.turns_of([(f"<image>\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]]) for pairs, _ in samples]
        encoded = [self.encoder.encode(conversation, 1, "imagined") for conversation in turns]
        ids = pad_rows([sample.input_ids for sample in encoded], self.llm.tokenizer.pad_token_id)
        labels = pad_rows([sample.labels for sample in encoded], IGNORE)
        mask = pad_rows([[1] * len(sample.input_ids) for sample in encoded], 0)
        image_id = self.encoder.image_id
        counts = Counts.of({"input_ids": ids, "attention_mask": mask, "labels": labels}, image_id)
        embeds = self.llm.model.get_input_embeddings()(ids)
        embeds[ids == image_id] = torch.cat([cells for _, cells in samples])
        return (embeds, mask, labels), {"learned": counts.learned, "packing": Packing.of(mask, counts)}

    def loss(self, samples: Sequence[tuple[list[QuestionAnswer], Tensor]]) -> Tensor:
        tensors, sizes = self.batch(samples)
        with autocast(self.device, enabled=has_bf16(self.device)):
            return causal_lm_loss(self.llava, *tensors, **sizes)

    @torch.no_grad()
    def right(self, imagination: Imagination, questions: int) -> dict[str, float]:
        """Right answers in % by kind."""
        right = {}
        for kind in KINDS:
            rng = random.Random(f"questions/{kind}")
            wrong: set[int] = set()
            for start in range(0, questions, 2 * BATCH):
                count = min(2 * BATCH, questions - start)
                (embeds, mask, labels), sizes = self.batch([imagination.question(kind, rng) for _ in range(count)])
                with autocast(self.device, enabled=has_bf16(self.device)):
                    logits, places = answer_logits(self.llava, embeds, mask, labels, **sizes)
                missed = places[logits.argmax(-1) != labels.flatten()[places + 1]]
                wrong.update((start + missed // labels.shape[1]).tolist())
            right[kind] = round(100 * (1 - len(wrong) / questions), 1)
        return right


def rate_at(step: int, steps: int) -> float:
    """Warm-up, constant, and at the end a fall to zero."""
    return RATE * min((step + 1) / WARMUP, 1.0, (steps - step) / (FALLING * steps))


def teach(reader: Reader, flags: Any, words: Sequence[str] | None = None) -> None:
    """Train up to `--samples`, from the last checkpoint on if there is one."""
    steps, path = flags.samples // BATCH, flags.output / "checkpoint.pt"
    known, unknown = (Imagination(reader.llm, held_out=held_out, words=words) for held_out in (False, True))
    optimizer = torch.optim.AdamW(reader.weights.values(), weight_decay=0.0, fused=True)
    done = 0
    settings = {name: getattr(flags, name) for name in ("layers", "samples", "seed")}
    if path.is_file():
        saved = read_torch(path)
        if saved["settings"] != settings:
            raise UserError(f"{path} is of {saved['settings']}, not of {settings}: name another --output")
        done = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for name, weight in reader.weights.items():
            weight.data.copy_(saved["weights"][name])
    begin, losses = time.monotonic(), []
    for step in range(done, steps):
        samples = []
        for number in range(step * BATCH, (step + 1) * BATCH):
            rng = random.Random(f"{flags.seed}/{number}")
            samples.append(known.sample(rng.choices(list(SHARES), list(SHARES.values()))[0], rng))
        optimizer.param_groups[0]["lr"] = rate_at(step, steps)
        loss = reader.loss(samples)
        loss.backward()
        nn.utils.clip_grad_norm_(reader.weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) * BATCH % EVERY == 0 or step + 1 == steps:
            mean, losses = sum(losses) / len(losses), []
            seconds = time.monotonic() - begin
            right = reader.right(unknown, flags.questions)
            print(f"{(step + 1) * BATCH:,} samples  {seconds:.0f} s  loss {mean:.3f}  {right}", flush=True)
            with placing(path) as file:
                weights = {name: weight.detach() for name, weight in reader.weights.items()}
                torch.save(
                    {"settings": settings, "step": step + 1, "weights": weights, "optimizer": optimizer.state_dict()},
                    file,
                )


@torch.no_grad()
def cut(reader: Reader, rank: int) -> dict[str, Tensor]:
    """Replace the weights' change by its best approximation of `rank`, and return its factors as PEFT names them."""
    factors = {}
    for name, weight in reader.weights.items():
        u, s, v = torch.linalg.svd(weight - reader.start[name], full_matrices=False)
        b, a = ((part.half()) for part in (u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * v[:rank]))
        weight.copy_(reader.start[name] + b.float() @ a.float())
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    return factors


def fitting_rank(reader: Reader) -> int:
    """The largest rank of an adapter of at most MEGABYTES in fp16."""
    return int((MEGABYTES * 1e6 - HEADER) // (2 * sum(sum(weight.shape) for weight in reader.weights.values())))


def save(reader: Reader, flags: Any, words: Sequence[str] | None = None) -> None:
    """Write the adapter with facts about it to `--output`/adapter, which is replaced."""
    rank = min(flags.rank, fitting_rank(reader))
    unknown = Imagination(reader.llm, held_out=True, words=words)
    whole = reader.right(unknown, flags.questions)
    factors = cut(reader, rank)
    kinds = sorted({name.rpartition(".")[2] for name in reader.linear})
    with replacing(flags.output / "adapter") as folder:
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=kinds, task_type="CAUSAL_LM", inference_mode=True,
            base_model_name_or_path=DEFAULT_LLM,
        ).save_pretrained(folder)  # fmt: skip
        file = folder / "adapter_model.safetensors"
        write_weights(factors, file)
        facts = {
            "layers": flags.layers, "seed": flags.seed, "samples": flags.samples, "rank": rank,
            "language_model": reader.llm.source, "bytes": file.stat().st_size, "sha256": sha256(file),
            "questions": flags.questions, "right, held-out words": reader.right(unknown, flags.questions),
            "right before the cut": whole,
        }  # fmt: skip
        write_json(folder / "reader.json", facts)
    print(facts)


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--output", type=Path, default=Path("runs/reader"), help="folder of checkpoint and adapter")
    p.add_argument("--layers", default="6,2", help="numbers of first and last layers that are kept")
    p.add_argument("--samples", type=int, default=19_200, help="imagined conversations to learn from")
    p.add_argument("--seed", type=int, default=0, help="seed of the conversations")
    p.add_argument("--rank", type=int, default=64, help="rank of the adapter, or less if it would not fit")
    p.add_argument("--questions", type=int, default=200, help="held-out questions of each kind")
    return p


def main() -> None:
    flags = parser().parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    reader = Reader(load_llm(layers=flags.layers))
    teach(reader, flags)
    save(reader, flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
