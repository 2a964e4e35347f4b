#!/usr/bin/env python
"""Teach the small language model to find words among image tokens, without any images, and save a LoRA adapter.

In an imagined scene, embeddings of words replace the image tokens: each is a mixture of the thing that the cell shows,
the cell's place (or a column of a table), and noise. The words are random words of the vocabulary, so nothing can be
learned by heart. All linear weights of the kept layers are trained. An SVD then reduces their change to a rank whose
float8 factors fit into `LARGEST` bytes. A tenth of the words is held out for measuring. An answer is right if each of
its tokens, end included, is the most likely one after the tokens before it, as greedy decoding would then write it.

Every `EVERY` samples the tool prints right answers in % on held-out words and saves a checkpoint, from which the same
command continues. 32,000 samples take about 90 minutes on one core with AVX-512 bf16.
"""

import argparse
import functools
import hashlib
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from clips.common.errors import UserError, run_command
from clips.common.files import placing, replacing, sha256, write_json
from clips.common.flags import Parser
from clips.common.runtime import autocast, has_bf16
from clips.common.tensors import read_torch, write_weights
from clips.data.demo import BACKGROUNDS, CONCEPTS, IMAGE_SIZE, PLACES, describe, draw_scene
from mllm import DEFAULT_LLM
from mllm.data import demo
from mllm.data.attributes import IS_VALUE, SHORT, WHAT_VALUE
from mllm.data.batches import pad_rows
from mllm.data.conversation import IGNORE, ConversationEncoder
from mllm.model.forward import PACKED, Counts, Packing
from mllm.model.llm import LanguageModel, load_llm

BATCH, RATE, WARMUP, FALLING, EVERY = 16, 5e-4, 30, 0.3, 3_200
"""Samples per step, AdamW's peak rate, warm-up steps, share of steps in which the rate falls to 0; EVERY is above."""
LARGEST, HEADER = 8_000_000, 40_000
GRID = 6
CELLS = torch.cartesian_prod(*[(torch.arange(GRID) + 0.5) / GRID] * 2).flip(1)
"""[GRID², 2]: x and y of the centre of each cell."""
PLACES_OF_CELLS = torch.eye(len(PLACES))[torch.cdist(CELLS, torch.tensor([*PLACES.values()])).argmin(1)]
COUNTS = {1: 5, 2: 6, 3: 5}
"""Number of things in a scene → relative frequency."""
KINDS = {
    "identity": (17, 25),
    "count": (1, 1),
    "where": (10, 21),
    "relation": (9, 16),
    "yes_no": (30, 8),
    "value": (15, 20),
    "is_value": (15, 6),
    "caption": (3, 3),
}
"""Kind of question about a scene, or about a row of a table → share of the conversations in %, before and after sample
`MATCHED`, because the model learns first whether a word is there, and later which word is where."""
NAMING = ("identity", "relation", "value")
"""Kinds whose answer is a name."""
FORMS = {"word": 58, "two words": 27, "plural": 9, "joined": 6}
"""Form of a name → relative frequency."""
MATCHED = 6_400
WHAT_KIND = "What kind of {words} is this?"
FASHION = (
    "backpack bag band bath beauty belt black body book boots bottle boy brief bronze brown cap care casual chain "
    "charcoal child clothes coat coffee copper cosmetics cream dress fall fashion flat flip fluorescent foot football "
    "formal foundation free garment gift girl glass glove gold good grey hair heel home jacket jewel kid laptop lime "
    "lip makeup mask messenger metallic mist mobile multi mustard nail navy neck night none pant party personal rain "
    "rose rust sea sets shirt shoe short silver skin smart sock sport sporting spring steel suit summer tablet tie "
    "tight tone track travel trunk vest vintage waist wallet wash watch water wear wedding winter women"
)
"""Words of the fashion photographs. They and their plurals are excluded too, so the adapter can be measured there."""

Sample = tuple[list[demo.QuestionAnswer], Tensor]
"""A conversation, and the embeddings [GRID², D] that replace its image tokens."""


class Imagination:
    """Makes conversations about random names from a vocabulary. `held_out` words never occur in training."""

    def __init__(self, llm: LanguageModel, *, held_out: bool, words: Sequence[str] = ()) -> None:
        table = llm.model.get_input_embeddings().weight.detach()
        self.centre = table.mean(0)
        self.spread = (table - self.centre).square().sum(1).mean().sqrt()
        self.units = F.normalize(table - self.centre)
        self.tokens = functools.cache(lambda name: llm.tokenizer(f" {name}", add_special_tokens=False)["input_ids"])
        vocabulary = llm.tokenizer.get_vocab()
        taken = re.findall("[a-z]+", " ".join([*CONCEPTS, *CONCEPTS.values(), *BACKGROUNDS, *PLACES, FASHION]).lower())
        excluded = {f"{word}{ending}" for word in taken for ending in ("", "s", "es")}
        plain = re.compile("Ġ([b-df-hj-np-tv-z][a-z]{3,})")  # words with the article "a", not "an"
        found = [plain.fullmatch(token) for token, number in sorted(vocabulary.items()) if number < 30_000]
        names = [match[1] for match in found if match and match[1] not in excluded]
        self.words = words or [w for w in names if (hashlib.sha256(w.encode()).digest()[0] < 26) == held_out]
        capitals = [word.capitalize() for word in self.words]
        self.values = capitals + 20 * [name for name in capitals if {name, f"Ġ{name}"} <= vocabulary.keys()]
        """Mostly words that are one token at the start of an answer too."""

    def names(self, rng: random.Random, count: int, words: Sequence[str]) -> list[str]:
        """Draw different names, each of them a word, two words, a plural, or two words joined (`FORMS`)."""
        names: dict[str, None] = {}
        while len(names) < count:
            first, second = rng.choices(words, k=2)
            forms = (first, f"{first} {second}", f"{first}s", f"{first}{second.lower()}")
            name = rng.choices(forms, [*FORMS.values()])[0]
            names[name.lower() if rng.random() < 0.2 else name] = None
        return list(names)

    def directions(self, names: Sequence[str], weights: Tensor, noise: torch.Generator) -> Tensor:
        """Mix names by `weights` [N, names] to unit vectors [N, D] of cells. The first tokens of a name weigh most."""
        total = torch.zeros(len(weights), self.units.shape[1])
        for name, column in zip(names, weights.T, strict=True):
            ids = self.tokens(name)
            shares = (0.5 + torch.rand(len(weights), len(ids), generator=noise)) * 0.7 ** torch.arange(len(ids))
            total += column[:, None] * F.normalize(shares @ self.units[ids])
        return F.normalize(total)

    def cells(self, shown: tuple[list[str], Tensor], tags: tuple[list[str], Tensor], rng: random.Random) -> Tensor:
        """Return embeddings [GRID², D] of cells from weighted names of their content (`shown`) and place or column."""
        noise = torch.Generator().manual_seed(rng.getrandbits(60))
        a, b, n, lost = torch.rand(4, GRID**2, 1, generator=noise)
        stray, other = self.units[torch.randint(len(self.units), (2, GRID**2), generator=noise)]
        words = torch.where(lost < 0.05, stray, self.directions(*shown, noise))
        names, weights = tags
        by_tag = self.directions(names, weights, noise)
        if names == [*PLACES]:  # "top left" and "top right" have a cosine of 0.9, so the common part is removed
            by_tag = F.normalize(by_tag - self.directions(names, torch.eye(len(names)), noise).mean(0))
        mixed = words + 0.5 * (0.6 + 0.8 * b) * by_tag + 0.6 * n * other
        return self.centre + (0.8 + 0.4 * a) * self.spread * F.normalize(mixed)

    def of_scene(self, kind: str, rng: random.Random, first: bool) -> Sample:
        """Return a conversation about a scene of the demo with random names."""
        *names, ground = self.names(rng, 1 + rng.choices([*COUNTS], [*COUNTS.values()])[0], self.words)
        drawn = replace(draw_scene(rng, names), background=ground)
        shown = torch.full((GRID**2,), len(names))
        for number, thing in enumerate(drawn.things):  # from back to front
            box = torch.tensor(thing.box) / IMAGE_SIZE
            shown[((box[:2] < CELLS) & (box[2:] > CELLS)).all(1)] = number
        weights = torch.eye(len(names) + 1)[shown]
        cells = self.cells(([*names, ground], weights), ([*PLACES], PLACES_OF_CELLS), rng)
        things = tuple((thing.concept, thing.place) for thing in drawn.things)
        scene = demo.DemoScene("", b"", things, ground, describe(drawn, rng).caption, "")
        if kind == "caption":
            return [(rng.choice(demo.CAPTION_PROMPTS), scene.caption)], cells
        turns = demo.talk_about(kind, scene, rng, self.names(rng, 40, self.words))
        if not turns or kind == "count" or not first:
            return turns, cells
        return [
            ask(scene, things[0], rng) for ask, share in demo.FIRST.items() if rng.random() < share / 3
        ] + turns, cells

    def of_table(self, kind: str, rng: random.Random, first: bool) -> Sample:
        """Return a conversation about a row of a table whose columns and values are random names."""
        columns = self.names(rng, rng.choice((1, 1, 2, 3)), self.words)
        *values, ground = self.names(rng, len(columns) + 1, self.values)
        weights = torch.tensor([[rng.random() ** 3 for _ in columns] + [0.0] for _ in CELLS])
        weights[((CELLS - 0.5).abs() > rng.choice((0.35, 0.35, 0.5))).any(1)] = torch.eye(len(columns) + 1)[-1]
        tags = ([*columns, "background"], weights * (len(columns) > 1))
        cells = self.cells(([*values, ground], weights), tags, rng)
        row = list(zip(columns, values, strict=True))
        if kind == "value":
            pairs = [(rng.choice((WHAT_VALUE, WHAT_KIND)).format(words=words), value) for words, value in row]
        else:
            others = iter([name for name in self.names(rng, 3 * len(columns), self.values) if name not in values])

            def is_value(fact: demo.QuestionAnswer, yes: bool) -> demo.QuestionAnswer:
                value = fact[1] if yes else next(others)
                return IS_VALUE.format(words=fact[0], value=value), "Yes" if yes else "No"

            pairs = demo.by_coin(row, is_value, rng)
        return [(f"{question}\n{SHORT}", answer) for question, answer in pairs], cells

    def sample(self, kind: str, rng: random.Random, *, first: bool = True) -> Sample:
        """Return a conversation with one kind of question, from the first scene that has such a question.

        With `first` some conversations about scenes begin with a question about the number of things or the background.
        """
        while True:
            pairs, cells = (self.of_table if "value" in kind else self.of_scene)(kind, rng, first)
            if pairs:
                return pairs, cells

    def question(self, kind: str, rng: random.Random) -> Sample:
        """Return one question without a conversation. A relation stands at the end of its conversation."""
        pairs, cells = self.sample(kind, rng, first=False)
        return pairs[-1:] if kind == "relation" else pairs[:1], cells

    def form(self, answer: str) -> str:
        """Return the form of the name in an answer, with or without an article."""
        name = answer.removeprefix("A ")
        return "two words" if " " in name else "one token" if len(self.tokens(name)) == 1 else "several tokens"


class Learner:
    """The language model during training. The linear weights of its layers are trained, and all others are frozen."""

    def __init__(self, llm: LanguageModel) -> None:
        self.llm, self.model = llm, llm.model.requires_grad_(False)
        self.model.set_attn_implementation(PACKED)
        linear = [name for name, module in self.model.model.named_modules() if isinstance(module, nn.Linear)]
        self.weights = {f"model.{name}": self.model.model.get_parameter(f"{name}.weight") for name in linear}
        self.start = {name: weight.clone() for name, weight in self.weights.items()}
        self.encoder = ConversationEncoder(llm.tokenizer, "auto", GRID**2)
        for weight in self.weights.values():
            weight.requires_grad_()

    def predict(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [n, V] for n answer tokens, the tokens [n], and the index of each token's sample [n]."""
        turns = [demo.turns_of([(f"<image>\n{pairs[0][0]}", pairs[0][1]), *pairs[1:]]) for pairs, _ in samples]
        encoded = [self.encoder.encode(conversation, 1, "imagined") for conversation in turns]
        ids = pad_rows([sample.input_ids for sample in encoded], self.llm.tokenizer.pad_token_id)
        labels = pad_rows([sample.labels for sample in encoded], IGNORE)
        mask = pad_rows([[1] * len(sample.input_ids) for sample in encoded], 0)
        image_id = self.encoder.image_id
        counts = Counts.of({"input_ids": ids, "attention_mask": mask, "labels": labels}, image_id)
        packing = Packing.of(mask, counts)
        embeds = self.model.get_input_embeddings()(ids)
        embeds[ids == image_id] = torch.cat([cells for _, cells in samples])
        rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        with autocast(embeds.device, enabled=has_bf16(embeds.device)):
            row, positions = embeds.flatten(0, 1)[packing.row][None], packing.position_ids
            out = self.model.model(inputs_embeds=row, position_ids=positions, use_cache=False, packing=packing)
            states = out.last_hidden_state[0, packing.in_row(rows * ids.shape[1] + columns)]
            return self.model.lm_head(states).float(), labels[rows, columns + 1], rows

    @torch.no_grad()
    def right(self, imagination: Imagination, questions: int) -> dict[str, float]:
        """Return the right answers in % for each kind and, where the answer is a name, for each form of the name."""
        right = {}
        for kind in [kind for kind in KINDS if kind != "caption"]:
            rng = random.Random(f"questions/{kind}")
            samples = [imagination.question(kind, rng) for _ in range(questions)]
            wrong: set[int] = set()
            for start in range(0, questions, 2 * BATCH):
                logits, tokens, rows = self.predict(samples[start : start + 2 * BATCH])
                wrong |= {start + row for row in rows[logits.argmax(-1) != tokens].tolist()}
            groups: dict[str, list[bool]] = {}
            for number, (pairs, _) in enumerate(samples):
                names = [kind, f"{kind}, {imagination.form(pairs[0][1])}"] if kind in NAMING else [kind]
                for name in names:
                    groups.setdefault(name, []).append(number not in wrong)
            right |= {name: round(100 * sum(group) / len(group), 1) for name, group in sorted(groups.items())}
        return right


def teach(learner: Learner, flags: argparse.Namespace, words: Sequence[str] = ()) -> None:
    """Train up to `--samples`, and resume from the last checkpoint if there is one."""
    steps, done, path = flags.samples // BATCH, 0, flags.output / "checkpoint.pt"
    known, unknown = (Imagination(learner.llm, held_out=held_out, words=words) for held_out in (False, True))
    optimizer = torch.optim.AdamW(learner.weights.values(), weight_decay=0.0, fused=True)
    settings = {"layers": flags.layers, "samples": flags.samples, "seed": flags.seed}
    if path.is_file():
        saved = read_torch(path)
        if saved["settings"] != settings:
            raise UserError(f"{path} has the settings {saved['settings']}, not {settings}: choose another --output")
        done = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        for name, weight in learner.weights.items():
            weight.data.copy_(saved["weights"][name])
    losses = []
    for step in range(done, steps):
        rngs = [random.Random(f"{flags.seed}/{step}/{number}") for number in range(BATCH)]
        shares = [before_after[step * BATCH >= MATCHED] for before_after in KINDS.values()]
        kinds = [rng.choices([*KINDS], shares)[0] for rng in rngs]
        logits, tokens, _ = learner.predict([known.sample(*pair) for pair in zip(kinds, rngs, strict=True)])
        loss = F.cross_entropy(logits, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(learner.weights.values(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARMUP, 1.0, (steps - step) / (FALLING * steps))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) * BATCH % EVERY == 0 or step + 1 == steps:
            right = learner.right(unknown, flags.questions)
            print(f"{(step + 1) * BATCH:,} samples  loss {sum(losses) / len(losses):.3f}  {right}", flush=True)
            losses = []
            state = {"settings": settings, "step": step + 1, "optimizer": optimizer.state_dict()}
            with placing(path) as file:
                torch.save(
                    state | {"weights": {name: weight.detach() for name, weight in learner.weights.items()}}, file
                )


@torch.no_grad()
def second_moments(learner: Learner, imagination: Imagination, batches: int = 25) -> dict[str, Tensor]:
    """Return the mean outer product [in, in] of the inputs of each weight, float64, scaled to a mean diagonal of 1."""
    sums: dict[str, Any] = dict.fromkeys(learner.weights, 0)

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].float().flatten(0, -2)
        sums[name] = sums[name] + (rows.T @ rows).double()

    hooks = [learner.model.get_submodule(n).register_forward_pre_hook(functools.partial(add, n)) for n in sums]
    for batch in range(batches):
        rngs = [random.Random(f"moments/{batch}/{number}") for number in range(BATCH)]
        kinds = [rng.choices([*KINDS], [after for _, after in KINDS.values()])[0] for rng in rngs]
        learner.predict([imagination.sample(*pair) for pair in zip(kinds, rngs, strict=True)])
    for hook in hooks:
        hook.remove()
    return {name: total / total.diagonal().mean() for name, total in sums.items()}


@torch.no_grad()
def save(learner: Learner, flags: argparse.Namespace, words: Sequence[str] = ()) -> None:
    """Write the adapter and facts about it to `--output`/adapter. The learner's weights become those with the adapter.

    The SVD is of the change times the root of the second moments of its inputs, because truncating it then changes the
    outputs least. The factors are float8, which costs less accuracy than halving the rank.
    """
    known, unknown = (Imagination(learner.llm, held_out=held_out, words=words) for held_out in (False, True))
    before = learner.right(unknown, flags.questions)
    rank = min(flags.rank, (LARGEST - HEADER) // sum(sum(weight.shape) for weight in learner.weights.values()))
    factors = {}
    for name, moments in second_moments(learner, known).items():
        values, vectors = torch.linalg.eigh(moments + 3e-3 * torch.eye(len(moments)))
        roots = values.clamp_min(3e-3).sqrt()
        change = (learner.weights[name] - learner.start[name]).double()
        u, s, v = torch.linalg.svd(change @ (vectors * roots) @ vectors.T, full_matrices=False)
        b, a = u * s.sqrt(), s.sqrt()[:, None] * v @ (vectors / roots) @ vectors.T
        balance = (a.norm() / b.norm()).sqrt()
        factors[f"base_model.model.{name}.lora_A.weight"] = (a / balance)[:rank]
        factors[f"base_model.model.{name}.lora_B.weight"] = (b * balance)[:, :rank]
    scale = 2.0 ** math.floor(math.log2(400 / max(factor.abs().max().item() for factor in factors.values())))
    for name, factor in factors.items():  # float8 has a range of 2^-9 to 448
        factors[name] = (factor * scale).to(torch.float8_e4m3fn)
    for name, weight in learner.weights.items():
        a, b = (factors[f"base_model.model.{name}.lora_{letter}.weight"].float() for letter in "AB")
        weight.copy_(learner.start[name] + b @ a / scale**2)
    kinds = sorted({name.rpartition(".")[2] for name in learner.weights})
    config = LoraConfig(r=rank, target_modules=kinds, task_type="CAUSAL_LM", inference_mode=True)
    config.lora_alpha = rank / scale**2  # type: ignore[assignment]
    config.base_model_name_or_path = DEFAULT_LLM
    with replacing(flags.output / "adapter") as folder:
        config.save_pretrained(folder)
        file = folder / "adapter_model.safetensors"
        write_weights(factors, file)
        facts: dict[str, Any] = {"layers": flags.layers, "seed": flags.seed, "samples": flags.samples, "rank": rank}
        facts |= {"language_model": learner.llm.source, "bytes": file.stat().st_size, "sha256": sha256(file)}
        facts |= {"questions": flags.questions, "right": learner.right(unknown, flags.questions), "right_whole": before}
        write_json(folder / "taught.json", facts)
    print(f"{flags.output}/adapter: {facts}")


def parser() -> Parser:
    p = Parser(__doc__)
    p.add_argument("--output", type=Path, default=Path("runs/adapter"), help="folder for checkpoint and adapter")
    p.add_argument("--layers", default="6,2", help="numbers of first and last layers that are kept")
    p.add_argument("--samples", type=int, default=32_000, help="imagined conversations to train on")
    p.add_argument("--seed", type=int, default=0, help="seed of the conversations")
    p.add_argument("--rank", type=int, default=96, help="rank of the adapter, reduced if it would not fit")
    p.add_argument("--questions", type=int, default=200, help="held-out questions per kind")
    return p


def main() -> None:
    flags = parser().parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    learner = Learner(load_llm(layers=flags.layers))
    teach(learner, flags)
    save(learner, flags)


if __name__ == "__main__":
    sys.exit(run_command(main))
