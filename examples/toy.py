"""A world small enough to learn in seconds: a language, a task, a Mistral-type model and its training.

The language is made of invented words with facts between them ("the miru kova teli a zuno ."). Two corpora
are written in it: A, which the base reads, and B, which contradicts A in part and adds a form of sentence.
The task is in neither: ``Q miru zuno kova A kova zuno miru .``, three nouns to be said in reverse order.
There are 32,768 questions, so that a model must learn the rule to answer unseen ones.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training import IGNORE, Batch, fit, loss
from transformers import MistralConfig, MistralForCausalLM
from transformers.utils import logging as transformers_logging

Facts = dict[str, list[str]]

ROW = 32  # tokens in a row of text
ROWS = 32  # rows in a batch, of text or of questions
SIGNS = [".", ",", ";", "?", "!", "Q", "A", "the", "a", "then", "so", "was", "by", "but", "is"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Book:
    """What a corpus says: adjectives and verbs of nouns, objects of verbs; ``has_news`` adds a form."""

    adjectives: Facts
    verbs: Facts
    objects: Facts
    has_news: bool

    def sentence(self, rng: random.Random) -> str:
        noun = rng.choice(list(self.adjectives))
        adjective = rng.choice(self.adjectives[noun])
        if self.has_news and rng.random() < 0.3:
            return f"but {noun} is {adjective} ; is {noun} {adjective} ? {noun} is {adjective} !"
        verb, other = rng.choice(self.verbs[noun]), rng.choice(self.verbs[noun])
        thing = rng.choice(self.objects[verb])
        endings = [
            f"then the {adjective} {noun} {other} .",
            f"so the {thing} was {verb} by the {noun} .",
            f"{noun} , {thing} , {noun} .",
        ]
        return f"the {adjective} {noun} {verb} a {thing} . {rng.choice(endings)}"


class World:
    """The words, the two corpora A and B, and batches of all that is read or asked."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(seed)
        syllables = [c + v for c in "kvtmzl" for v in "aeiou"]
        words = rng.sample([x + y for x in syllables for y in syllables], 96)
        self.nouns, self.adjectives, self.verbs = words[:32], words[32:64], words[64:]
        self.vocabulary = [*SIGNS, *words]
        self._ids = {word: i for i, word in enumerate(self.vocabulary)}

        def facts(subjects: list[str], values: list[str]) -> Facts:
            return {subject: rng.sample(values, 3) for subject in subjects}

        self.a = Book(
            facts(self.nouns, self.adjectives),
            facts(self.nouns, self.verbs),
            facts(self.verbs, self.nouns),
            has_news=False,
        )
        self.b = self.revised(self.a, 0.6, rng)

    def revised(self, book: Book, kept: float, rng: random.Random) -> Book:
        """A book that keeps about the share ``kept`` of what ``book`` says, contradicts the rest, and has news."""

        def revise(old: Facts, values: list[str]) -> Facts:
            return {k: v if rng.random() < kept else rng.sample(values, 3) for k, v in old.items()}

        return Book(
            revise(book.adjectives, self.adjectives),
            revise(book.verbs, self.verbs),
            revise(book.objects, self.nouns),
            has_news=True,
        )

    def encode(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split()]

    def prose(self, book: Book, rows: int, rng: random.Random) -> Tensor:
        """Rows of running text that begin anywhere in a sentence."""
        result = []
        for _ in range(rows):
            text: list[int] = []
            while len(text) < 2 * ROW:
                text += self.encode(book.sentence(rng))
            start = rng.randrange(ROW)
            result.append(text[start : start + ROW])
        return torch.tensor(result)

    def new_text(self, rng: random.Random, replay: float) -> Tensor:
        """What the evolving model reads: B, with a share of A."""
        old = round(ROWS * replay)
        new = self.prose(self.b, ROWS - old, rng)
        return torch.cat([self.prose(self.a, old, rng), new]) if old else new

    def questions(self, rows: int, rng: random.Random) -> Batch:
        """The task; only the answers are learned."""
        ids = torch.tensor([self._question(rng) for _ in range(rows)])
        labels = ids.clone()
        labels[:, :5] = IGNORE
        return ids, labels

    def _question(self, rng: random.Random) -> list[int]:
        three = rng.choices(self.nouns, k=3)
        return self.encode(" ".join(["Q", *three, "A", *reversed(three), "."]))


@dataclass(frozen=True)
class Score:
    """How often the whole answer is right, and the loss in nats a word on unseen text of A and B."""

    accuracy: float
    loss_a: float
    loss_b: float


def quieten() -> None:
    """Keep the libraries' own progress bars and future warnings out of the output."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers_logging.disable_progress_bar()


def new_model(world: World) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(world.vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=None,
        # With the usual 0.02 attention in so narrow a model hardly starts to learn in the time there is.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(world.seed)
    return MistralForCausalLM(config)


def load_model(path: Path) -> MistralForCausalLM:
    return MistralForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pretrain(model: nn.Module, world: World, steps: int) -> None:
    rng = random.Random(f"{world.seed} base")
    fit(model, (_all_learned(world.prose(world.a, ROWS, rng)) for _ in range(steps)), steps, 3e-3, "base")


def evolve(
    model: nn.Module,
    world: World,
    steps: int,
    rate: float,
    replay: float,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """Go on pretraining all weights on B; calls ``each`` after every step."""
    rng = random.Random(f"{world.seed} evolution")
    batches = (_all_learned(world.new_text(rng, replay)) for _ in range(steps))
    fit(model, batches, steps, rate, "evolution", each)


def learn_patch(model: nn.Module, world: World, steps: int, seed: int = 0) -> PeftModel:
    """Train a LoRA on ``model`` with PEFT; its start and its questions depend on the seeds alone."""
    torch.manual_seed(world.seed + 1000 * seed + 1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    rng = random.Random(f"{world.seed} task {seed}")
    fit(tuned, (world.questions(ROWS, rng) for _ in range(steps)), steps, 4e-3, "patch")
    return tuned


@torch.no_grad()
def score(model: nn.Module, world: World) -> Score:
    model.eval()
    ids, labels = world.questions(512, random.Random(f"{world.seed} test"))
    guesses = model(input_ids=ids).logits[:, :-1].argmax(-1)
    # Greedy decoding gives the right answer exactly if each word is the likeliest after right ones.
    is_right = (guesses == labels[:, 1:]) | (labels[:, 1:] == IGNORE)
    losses = []
    for book in (world.a, world.b):
        text = world.prose(book, 128, random.Random(f"{world.seed} held out"))
        losses.append(loss(model, (text, text)).item())
    return Score(is_right.all(1).double().mean().item(), *losses)


def _all_learned(ids: Tensor) -> Batch:
    return ids, ids
