"""Create a patch: LoRA training with transformers and PEFT; the adapter that comes out knows its base.

    python examples/train_patch.py MODEL DATA -o PATCH

MODEL is a hub id or a directory. DATA is a local .jsonl file, a local text file, or a hub id of a dataset (if the
package ``datasets`` is installed; NAME:CONFIG picks a configuration, and the split "train" is read). Rows with
``prompt`` and ``completion`` teach the completion alone, rows with ``text`` all of it; a text file is cut into blocks.
What is written is a PEFT adapter directory with the fingerprint of its base: `portllm check PATCH EVOLVED` says how
near a model is to it, and `portllm apply` patches one.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from training import IGNORE, Batch, fit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import portllm

Example = tuple[list[int], int]  # token ids, and how many of them are the prompt, which is not learned
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """Rank 8 on all linear layers is what is known of the paper; the rest is our choice."""

    rank: int = 8
    alpha: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    steps: int = 300
    batch: int = 8
    rate: float = 2e-4
    length: int = 512  # tokens; longer examples lose their beginning, so that the completion stays
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    try:
        rows = read_rows(arguments.data)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=arguments.dtype).to(arguments.device)
        training = Training(**{key: getattr(arguments, key) for key in Training.__dataclass_fields__})
        patch = train(model, encode_rows(rows, tokenizer, training.length), training)
        portllm.stamp(patch, model).save(arguments.out)
    except (OSError, ValueError, portllm.PortllmError) as error:
        print(f"train_patch: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {patch.num_parameters:,} numbers; its base: {arguments.model}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    standard = Training()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PATCH", help="new or empty directory")
    parser.add_argument("--rank", type=int, default=standard.rank)
    parser.add_argument("--alpha", type=int, default=standard.alpha)
    parser.add_argument("--targets", nargs="+", default=standard.targets, help="ends of module names (all-linear)")
    parser.add_argument("--steps", type=int, default=standard.steps)
    parser.add_argument("--batch", type=int, default=standard.batch, help="examples in a step")
    parser.add_argument("--rate", type=float, default=standard.rate, help="the learning rate's peak")
    parser.add_argument("--length", type=int, default=standard.length, help="tokens of an example at most")
    parser.add_argument("--seed", type=int, default=standard.seed)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        parser.error(f"{arguments.out} is not an empty directory; name a new one")
    if arguments.steps < 3 or arguments.batch < 1 or arguments.length < 2 or arguments.rank < 1:
        parser.error("--steps must be at least 3, --length 2, --batch and --rank 1")
    return arguments


def read_rows(data: str) -> list[Row]:
    """The rows of a .jsonl or text file, or of a dataset of the hub. Raises ValueError, OSError."""
    path = Path(data)
    if not path.is_file():
        return list(load_dataset(data, "train"))
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [{"text": text}]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a {type(row).__name__}, not an object")
            rows.append(row)
    return rows


def load_dataset(name: str, split: str) -> Any:
    """A dataset of the hub, "NAME" or "NAME:CONFIG". Raises ValueError without the package ``datasets``."""
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{name} is no local file, and reading a dataset of the hub needs the package datasets: "
            "pip install datasets"
        ) from None
    path, _, configuration = name.partition(":")
    return datasets.load_dataset(path, configuration or None, split=split)


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, length: int) -> list[Example]:
    """Token ids of each example; a text that is longer than ``length`` becomes several. Raises ValueError."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            prompt = tokenizer(row["prompt"])["input_ids"]
            completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
            ids = (prompt + completion)[-length:]
            examples.append((ids, max(0, len(ids) - len(completion))))
        elif isinstance(row.get("text"), str):
            ids = tokenizer(row["text"])["input_ids"] + end
            examples += [(ids[i : i + length], 0) for i in range(0, len(ids), length) if len(ids) - i > 1]
        else:
            keys = ", ".join(row) or "none"
            raise ValueError(f"row {number} has neither prompt and completion nor text (its keys: {keys})")
    if not examples:
        raise ValueError("there is nothing to learn: the data are empty")
    return examples


def batches(examples: Sequence[Example], rows: int, seed: int) -> Iterator[Batch]:
    """Without end; every example once before any comes again. Padded on the right with token 0, not learned."""
    rng = random.Random(seed)
    order: list[Example] = []
    while True:
        while len(order) < rows:
            order += rng.sample(examples, len(examples))
        chosen, order = order[:rows], order[rows:]
        ids = torch.zeros(rows, max(len(tokens) for tokens, _ in chosen), dtype=torch.long)
        labels = torch.full_like(ids, IGNORE)
        for i, (tokens, prompt) in enumerate(chosen):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        yield ids, labels


def train(model: PreTrainedModel, examples: Sequence[Example], training: Training) -> portllm.Patch:
    """Learn a LoRA on ``model``, which is left as it was."""
    torch.manual_seed(training.seed)
    targets = training.targets if isinstance(training.targets, str) else list(training.targets)
    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules=targets, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    supply = batches(examples, training.batch, training.seed)
    fit(tuned, (next(supply) for _ in range(training.steps)), training.steps, training.rate, "patch")
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        patch = portllm.Patch.load(folder)
    tuned.unload()
    return patch


if __name__ == "__main__":
    sys.exit(main())
