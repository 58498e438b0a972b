"""The small form's tasks: different in kind, in words of the toy's language, none of them in its texts.

A question is ``Q ... A ... .``; the answer's tokens alone are learned and counted. Every task has far more questions
than are ever asked, and none of the test's is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from toy import World
from training import IGNORE, Batch

TESTED = 512


@dataclass(frozen=True)
class Question:
    """``options`` are the words to choose from, the right one among them; empty where the answer is free text."""

    prompt: list[str]
    answer: list[str]
    options: tuple[str, ...] = ()


def reverse(world: World, rng: random.Random) -> Question:
    """Three nouns in reverse order."""
    three = rng.choices(world.nouns, k=3)
    return Question(three, three[::-1])


def majority(world: World, rng: random.Random) -> Question:
    """Are most of three nouns in the half that the world's seed has drawn? A classification with two labels."""
    three = rng.sample(world.nouns, 3)
    inside = sum(noun in _half(world.seed, *world.nouns) for noun in three)
    return Question(three, ["is" if inside >= 2 else "was"], ("is", "was"))


@cache
def _half(seed: int, *nouns: str) -> frozenset[str]:
    return frozenset(random.Random(f"{seed} half").sample(nouns, len(nouns) // 2))


def odd(world: World, rng: random.Random) -> Question:
    """Multiple choice: of four words, the one that is of another kind (noun, adjective, verb) than the others."""
    many, one = rng.sample([world.nouns, world.adjectives, world.verbs], 2)
    right = rng.choice(one)
    words = [*rng.sample(many, 3), right]
    rng.shuffle(words)
    return Question(words, [right], tuple(words))


def count(world: World, rng: random.Random) -> Question:
    """Arithmetic: how many of four words are nouns? The numerals are five of the verbs."""
    number = rng.randrange(5)
    others = rng.choices([*world.adjectives, *world.verbs[5:]], k=4 - number)
    words = [*rng.choices(world.nouns, k=number), *others]
    rng.shuffle(words)
    return Question(words, [world.verbs[number]])


TASKS: dict[str, Callable[[World, random.Random], Question]] = {
    "reverse": reverse,
    "majority": majority,
    "odd one out": odd,
    "count": count,
}


class Exam:
    """One task's questions in one world: fixed ones to be tested with, and others without end to learn from."""

    def __init__(self, world: World, task: str, tested: int = TESTED) -> None:
        self.world, self.task = world, task
        rng = random.Random(f"{world.seed} {task} test")
        self._test = [TASKS[task](world, rng) for _ in range(tested)]
        self._held_out = {tuple(question.prompt) for question in self._test}
        self._ids, self._labels = self._encode(self._test)

    def batch(self, rows: int, rng: random.Random) -> Batch:
        """Questions to learn from."""
        found: list[Question] = []
        while len(found) < rows:
            question = TASKS[self.task](self.world, rng)
            if tuple(question.prompt) not in self._held_out:
                found.append(question)
        return self._encode(found)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """The share of the test's answers that are right: whole, by greedy decoding, or the likeliest option."""
        model.eval()
        device = next(model.parameters()).device
        logits = model(input_ids=self._ids.to(device), use_cache=False).logits[:, :-1].float().cpu()
        labels = self._labels[:, 1:]
        if self._test[0].options:
            options = torch.tensor([self.world.encode(" ".join(q.options)) for q in self._test])
            at = (labels != IGNORE).double().argmax(1)  # the answer is one word
            scores = logits[torch.arange(len(at)), at].gather(1, options)
            right = options.gather(1, scores.argmax(1, keepdim=True)).squeeze(1) == labels[torch.arange(len(at)), at]
        else:
            # Greedy decoding gives the right answer exactly if each word is the likeliest after right ones.
            right = ((logits.argmax(-1) == labels) | (labels == IGNORE)).all(1)
        return right.double().mean().item()

    def _encode(self, questions: list[Question]) -> tuple[Tensor, Tensor]:
        rows = [self.world.encode(" ".join(["Q", *q.prompt, "A", *q.answer, "."])) for q in questions]
        ids = torch.tensor(rows)
        labels = ids.clone()
        labels[:, : len(questions[0].prompt) + 2] = IGNORE
        labels[:, -1] = IGNORE
        return ids, labels
