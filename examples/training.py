"""The training loop that the demo, ``train_patch.py`` and the portability benchmark share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn, optim
from tqdm import tqdm

Batch = tuple[Tensor, Tensor]  # token ids and labels, [rows, tokens]; a label of IGNORE is not learned
IGNORE = -100


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats a learned token. Rows may be padded on the right: a causal model never looks there."""
    device = next(model.parameters()).device
    ids, labels = (tensor.to(device) for tensor in batch)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def fit(
    model: nn.Module,
    batches: Iterable[Batch],
    steps: int,
    rate: float,
    name: str,
    each: Callable[[int], Any] = lambda step: None,
) -> None:
    """AdamW on what requires a gradient: ``rate`` after a tenth of the steps (3 or more), then down to nothing."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=max(0.1, 2 / steps))
    model.train()
    bar = tqdm(batches, name, total=steps, unit="step", disable=None, leave=False, ncols=79)
    for step, batch in enumerate(bar, start=1):
        value = loss(model, batch)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{value.item():.2f}")
        each(step)
    model.eval()
