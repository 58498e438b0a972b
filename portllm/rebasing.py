"""Rebase a patch: what it writes on the evolved model is what it wrote on its base, without training.

With the patch Delta = U S V^T and the movement D = W' - W, the rebased patch is Delta' = Delta - U U^T D, of the same
rank, so that U^T (W' + Delta') = U^T (W + Delta): into the directions that the patch writes, the patched evolved weight
writes exactly what the patched base did. What the evolution had changed there is undone; all else of it stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bind import ExpertLayout, Options, Tied
from .errors import PlanError
from .fingerprint import METADATA_KEY
from .fingerprint import stamp as stamp_patch
from .live import Source, as_patches
from .movement import Pair, compared, directions
from .patch import LoraEntry, Patch
from .planning import Term, Update
from .readable import Model
from .reference import accumulation_dtype, ieee_matmul, row_blocks


def rebase(
    patch: Source,
    evolved: Model,
    base: Model,
    *,
    strict: bool = True,
    tied: Tied = "once",
    expert_layout: ExpertLayout | None = None,
    device: str | torch.device = "cpu",
    stamp: bool = True,
    progress: bool = False,
) -> Patch:
    """The patch for the evolved model that writes there what the patch wrote on its base; one weight at a time.

    In benchmarks/portability this kept more of the skill than the patch as it was; see there how much, and where not.
    Embeddings' factors, biases and replaced tensors stay as they are.

    Args:
        patch: a Patch, an adapter directory or a hub id.
        evolved, base: as ``portllm.drift``.
        strict, tied, expert_layout: as ``portllm.apply``.
        device: where to compute.
        stamp: keep the evolved model's fingerprint in the patch; this reads it once more.
        progress: show a bar.

    Raises:
        PatchError, PlanError, CheckpointError: as ``portllm.drift``; PlanError for DoRA, and for a weight that the
            evolved model stores in another layout than the patch's factors (stacked experts, transposed).
    """
    [(loaded, _)] = as_patches(patch)
    entries = {e.module: e for e in loaded.entries if isinstance(e, LoraEntry) and e.kind == "linear"}
    keys = {id(tensor): key for key, tensor in loaded.tensors.items()}
    tensors = dict(loaded.tensors)
    for pair in compared(loaded, evolved, base, Options(tied, expert_layout), strict, progress):
        entry = entries.get(pair.source)
        if entry is None and any(isinstance(e, LoraEntry) and e.module == pair.source for e in loaded.entries):
            continue  # an embedding
        if entry is None or entry.magnitude is not None or not _is_laid_out(entry, pair):
            raise PlanError(
                f"{pair.source} cannot be rebased: it has DoRA's magnitudes, or the model stores it in another layout "
                "than the patch's factors"
            )
        lora_A, lora_B = _rebased(entry, pair, torch.device(device))
        tensors[keys[id(entry.lora_A)]], tensors[keys[id(entry.lora_B)]] = lora_A, lora_B
    metadata = {key: value for key, value in loaded.metadata.items() if key != METADATA_KEY}
    made = Patch.from_tensors(tensors, loaded.config, name=loaded.name, metadata=metadata)
    return stamp_patch(made, evolved) if stamp else made


def _is_laid_out(entry: LoraEntry, pair: Pair) -> bool:
    """Whether the updates, one below the other, are the module's factors as they are."""
    terms = [term for update in pair.updates for term in update.terms]
    if len(terms) != len(pair.updates) or any(term.lora_A.shape != entry.lora_A.shape for term in terms):
        return False
    stacked = torch.cat([term.lora_B for term in terms])
    return stacked.shape == entry.lora_B.shape and torch.equal(stacked, entry.lora_B)


def _rebased(entry: LoraEntry, pair: Pair, device: torch.device) -> tuple[Tensor, Tensor]:
    """(lora_A [r, n], lora_B [m, r]) on the CPU, in fp32."""
    region = pair.updates[0].region
    whole = Update(pair.source, region, (Term(entry.lora_A, entry.lora_B, entry.scaling),), (pair.source,))
    U, S, V = directions(whole, device)
    moved = torch.zeros(U.shape[1], entry.lora_A.shape[1], dtype=torch.float64, device=device)  # U^T D
    start = 0
    with ieee_matmul():
        for before, after in zip(pair.before, pair.after, strict=True):
            dtype = torch.promote_types(accumulation_dtype(before), accumulation_dtype(after))
            left = U[start : start + len(before)].to(dtype)
            for rows in row_blocks(*before.shape):
                difference = after[rows].to(device, dtype) - before[rows].to(device, dtype)
                moved += (left[rows].T @ difference).double()
            start += len(before)
    if not moved.isfinite().all():
        raise PlanError(f"{pair.source} differs by numbers that are not finite; is one of the models broken?")
    wanted = S[:, None] * V.T - moved
    size = wanted.norm().sqrt()  # shared evenly between the factors
    lora_A = torch.zeros(entry.lora_A.shape, dtype=torch.float32)
    lora_B = torch.zeros(entry.lora_B.shape, dtype=torch.float32)
    if size > 0:
        lora_A[: len(wanted)] = (wanted / (entry.scaling * size)).float().cpu()
        lora_B[:, : len(wanted)] = (U * size).float().cpu()
    return lora_A, lora_B
