"""The real form: a model of the hub, an evolved one, and the paper's tasks. Not run yet on real models.

For each task: a patch is learned on the base (``examples/train_patch.py``), and four models are asked the questions of
the validation split: base, base + patch, evolved, evolved + patch; with ``--refit`` evolved + refit as well. An option
is chosen by the log-likelihood of its tokens after the prompt; GSM8K is answered by greedy generation, and the last
number must be the right one. Prompts, options' words and training settings are our choice.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sizes import residue_to_patch
from torch import nn
from train_patch import Training, encode_rows, load_dataset, train
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import portllm

from .scores import candidates

Row = dict[str, Any]


@dataclass(frozen=True)
class RealTask:
    """A task of the hub.

    Attributes:
        data: "NAME:CONFIG" of the dataset.
        test: the split with public labels that is asked.
        prompt: of a row.
        options: of a row, to choose from; empty where the answer is generated.
        answer: the right option's index, or the text to learn.
    """

    data: str
    test: str
    prompt: Callable[[Row], str]
    options: Callable[[Row], Sequence[str]]
    answer: Callable[[Row], int | str]

    def example(self, row: Row) -> Row:
        """What a patch learns from a row."""
        answer = self.answer(row)
        return {
            "prompt": self.prompt(row),
            "completion": answer if isinstance(answer, str) else self.options(row)[answer],
        }


def _glue(name: str, prompt: Callable[[Row], str], *options: str) -> RealTask:
    return RealTask(f"nyu-mll/glue:{name}", "validation", prompt, lambda row: options, lambda row: row["label"])


TASKS: dict[str, RealTask] = {
    "boolq": RealTask(
        "google/boolq",
        "validation",
        lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
        lambda row: (" no", " yes"),
        lambda row: int(row["answer"]),
    ),
    "sst2": _glue("sst2", lambda row: f"Review: {row['sentence']}\nSentiment:", " negative", " positive"),
    "mrpc": _glue(
        "mrpc",
        lambda row: f"{row['sentence1']}\n{row['sentence2']}\nDo both sentences say the same?",
        " no",
        " yes",
    ),
    "rte": _glue("rte", lambda row: f"{row['sentence1']}\nDoes it follow that: {row['sentence2']}?", " yes", " no"),
    "wnli": _glue("wnli", lambda row: f"{row['sentence1']}\nDoes it follow that: {row['sentence2']}?", " no", " yes"),
    "winogrande": RealTask(
        "allenai/winogrande:winogrande_xl",
        "validation",
        lambda row: f"{row['sentence']}\nWho or what is meant by _?",
        lambda row: (f" {row['option1']}", f" {row['option2']}"),
        lambda row: int(row["answer"]) - 1,
    ),
    "gsm8k": RealTask(
        "openai/gsm8k:main",
        "test",
        lambda row: f"Question: {row['question']}\nAnswer:",
        lambda row: (),
        lambda row: f" {row['answer']}",
    ),
}
_NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("real form")
    group.add_argument("--model", metavar="BASE", help="hub id or directory")
    group.add_argument("--evolved", metavar="EVOLVED", help="the same, after whatever has become of it")
    group.add_argument("--tasks", default=",".join(TASKS), help="(default: %(default)s)")
    group.add_argument("--limit", type=int, help="questions of each task at most")
    group.add_argument("--steps", type=int, default=Training.steps, help="of each patch's training")
    group.add_argument("--refit", action="store_true", help="also learn each patch afresh on EVOLVED")
    group.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(arguments: argparse.Namespace) -> int:
    try:
        names = arguments.tasks.split(",")
        if unknown := [name for name in names if name not in TASKS]:
            raise ValueError(f"no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
        # All data before the first training: what cannot be read shall not cost hours.
        data = {n: (load_dataset(TASKS[n].data, "train"), load_dataset(TASKS[n].data, TASKS[n].test)) for n in names}
        results = {name: _one(TASKS[name], *data[name], arguments) for name in names}
    except (OSError, ValueError, portllm.PortllmError) as error:
        print(f"portability: {error}", file=sys.stderr)
        return 2
    for name, result in results.items():
        print(name, json.dumps(result, indent=1, ensure_ascii=False))
    if arguments.out:
        about = {key: getattr(arguments, key) for key in ("model", "evolved", "limit", "steps", "dtype", "device")}
        content = {"benchmark": "portability, real form", **about, "tasks": results}
        arguments.out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _one(task: RealTask, learned: Iterable[Row], asked: Iterable[Row], arguments: argparse.Namespace) -> Row:
    """One task; at most two models are in memory, while the next one is read."""
    questions = list(asked)[: arguments.limit]
    training = Training(steps=arguments.steps)
    peak = torch.cuda.max_memory_allocated if torch.cuda.is_available() else lambda: 0

    def load(name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(name, dtype=arguments.dtype).to(arguments.device).eval()

    def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> portllm.Patch:
        return train(model, encode_rows([task.example(row) for row in learned], tokenizer, training.length), training)

    def timed(run: Callable[[], Any]) -> tuple[Any, Row]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        value = run()
        return value, {"seconds": time.perf_counter() - start, "peak_bytes": peak()}

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load(arguments.model)
    result: Row = {"base": accuracy(model, tokenizer, task, questions)}
    patch, result["training"] = timed(lambda: learn(model, tokenizer))
    portllm.apply(model, patch)
    result["base + patch"] = accuracy(model, tokenizer, task, questions)
    model = load(arguments.evolved)
    result["evolved"] = accuracy(model, tokenizer, task, questions)
    if arguments.refit:
        refit, result["refitting"] = timed(lambda: learn(model, tokenizer))
        portllm.apply(model, refit)
        result["evolved + refit"] = accuracy(model, tokenizer, task, questions)
        result["residue_to_patch"] = residue_to_patch(refit, patch)
        model = load(arguments.evolved)
    _, result["porting"] = timed(lambda: portllm.apply(model, patch))
    result["evolved + patch"] = accuracy(model, tokenizer, task, questions)
    gained = result["base + patch"] - result["base"]
    result["kept"] = (result["evolved + patch"] - result["evolved"]) / gained if gained else None
    result["scores"] = candidates(portllm.drift(patch, arguments.evolved, arguments.model))
    return result


@torch.no_grad()
def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: RealTask, rows: Sequence[Row]) -> float:
    """The share of right answers; a question at a time, so that no padding can change a likelihood."""
    right = 0
    for row in rows:
        prompt, options = task.prompt(row), task.options(row)
        if options:
            scores = [log_likelihood(model, tokenizer, prompt, option) for option in options]
            right += scores.index(max(scores)) == task.answer(row)
        else:
            right += _last_number(_generated(model, tokenizer, prompt)) == _last_number(str(task.answer(row)))
    return right / len(rows)


@torch.no_grad()
def log_likelihood(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, option: str) -> float:
    """Of the option's tokens after the prompt, in nats; the sum over its tokens."""
    first = tokenizer(prompt)["input_ids"]
    second = tokenizer(option, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([first + second], device=next(model.parameters()).device)
    logits = model(input_ids=ids).logits[0, len(first) - 1 : -1].float().log_softmax(-1)
    return float(logits.gather(1, ids[0, len(first) :, None]).sum())


def _generated(model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    pad = tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=320, do_sample=False, pad_token_id=pad
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def _last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "").rstrip(".") if found else None
