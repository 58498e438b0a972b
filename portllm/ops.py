"""The op ``torch.ops.portllm.lowrank_add_``: schema, checks, fake kernel and the choice of backend."""

from __future__ import annotations

import importlib.util
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _native, reference
from .errors import BackendError, RecordError
from .record import Record, exchange_
from .reference import FLOAT_DTYPES

BACKENDS = ("torch", "cpu", "triton", "cuda")

_Launcher = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[float], Sequence[int], Sequence[int]], None
]

_ARGUMENTS = "Tensor(a!)[] weights, Tensor[] lora_A, Tensor[] lora_B, float[] scalings, int[] n_terms"
torch.library.define("portllm::lowrank_add_", f"({_ARGUMENTS}, str backend='auto', int[] modes=[]) -> ()")
# The compiled libraries only add implementations to these schemas, so the ops exist with and without them.
torch.library.define("portllm::lowrank_add_cpu_", f"({_ARGUMENTS}, int[] modes=[]) -> ()")
torch.library.define("portllm::lowrank_add_cuda_", f"({_ARGUMENTS}) -> ()")
torch.library.define(
    "portllm::lowrank_exchange_cpu_",
    f"({_ARGUMENTS.replace('n_terms', 'n_old, int[] n_new')}, Tensor lengths, Tensor data) -> (Tensor, Tensor, Tensor)",
)
# The same call, read once: prepare returns the number by which run and release know it.
torch.library.define("portllm::lowrank_add_cpu_prepare", f"({_ARGUMENTS.replace('(a!)', '')}, int[] modes=[]) -> int")
torch.library.define("portllm::lowrank_add_cpu_run", "(int prepared) -> ()")
torch.library.define("portllm::lowrank_add_cpu_release", "(int prepared) -> ()")


def lowrank_add_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    """In place, for each weight: ``W <- round(W + sum_t scaling_t * (lora_B_t @ lora_A_t))``.

    The same as ``torch.ops.portllm.lowrank_add_``.

    Args:
        weights: 2-D tensors [m, n] that do not overlap; bf16, fp16, fp32 or fp64; any strides; any devices.
        lora_A: [r, n] each; the terms of all weights one after the other; bf16, fp16, fp32 or fp64; any strides.
        lora_B: [m, r] each, as ``lora_A``.
        scalings: one factor for each term (alpha / r, or alpha / sqrt(r)).
        n_terms: how many terms belong to each weight; ``sum(n_terms)`` is the length of the factor lists.
        backend: "auto", or one of ``BACKENDS``.
        modes: empty, or four ints for each weight, one after the other: a ``noise.Mode``.

    Factors are used as stored; products and sums are fp32 (fp64 for fp64 weights), with one rounding into the weight's
    dtype: to nearest even, or as the weight's mode says. Deterministic on one backend.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit; nothing has been written then.
        BackendError: the backend is not available, or does not take such a weight; nothing has been written then.
    """
    if not weights:
        _check(
            weights, lora_A, lora_B, scalings, n_terms, backend, modes
        )  # without a tensor the dispatcher does not know where to go
    elif _watched(weights, lora_A, lora_B) or weights[0].is_meta:
        torch.ops.portllm.lowrank_add_(weights, lora_A, lora_B, scalings, n_terms, backend, modes)
    else:  # each step of the dispatcher copies the lists, which costs more than updating a small weight
        _bump_versions(_dispatch, weights, lora_A, lora_B, scalings, n_terms, backend, modes)


def lowrank_exchange_(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_old: Sequence[int],
    n_new: Sequence[int],
    records: Sequence[Record | None],
    backend: str = "auto",
) -> list[Record | None]:
    """In place, for each weight, in one pass: take off its old terms, to the last bit, and add its new ones.

    What the new terms leave is, bit for bit, ``lowrank_add_`` of them on the weights that the old ones were added
    to, and they can be taken off in the same way.

    Args:
        weights, lora_A, lora_B, scalings: as for ``lowrank_add_``; of each weight the old terms come first.
        n_old: how many terms are taken off each weight: exactly those that its record is of, in their order.
        n_new: how many are added.
        records: of each weight what an earlier call returned for it; None where n_old is 0.
        backend: "auto", or one of ``BACKENDS``; all but "cuda" keep records, which leaves it to "torch".

    Returns:
        The record of the new terms of each weight; None where there are none.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit; nothing has been written then.
        BackendError: the backend is not available, or the terms were not summed by it; nothing has been written.
        RecordError: a record is not that of what was added to the weight, or the weight has changed since. Weights
            may be changed by then: compare a checksum before, where that can happen (``portllm.undo`` does).
    """
    n_terms = [old + new for old, new in zip(n_old, n_new, strict=True)]
    _check(weights, lora_A, lora_B, scalings, n_terms)
    chosen = {kind: "torch" if name == "cuda" else name for kind, name in backends_for(weights, backend).items()}
    names = [chosen[weight.device, weight.dtype] for weight in weights]
    starts = [0, *accumulate(n_terms)]
    sums = {name: _summed_by(name) for name in {*names} - {"triton"}}  # asked once: it asks the library
    for i, (record, old) in enumerate(zip(records, n_old, strict=True)):
        if (record is None) != (old == 0):
            raise ValueError(f"lowrank_exchange_: weights[{i}] has {old} old terms and {record}")
        if record is not None:
            terms = slice(starts[i], starts[i] + old)
            by = sums.get(names[i]) or _summed_by(names[i], weights[i], lora_A[terms], lora_B[terms])
            if record.by != by:
                raise BackendError(
                    f"the terms of weights[{i}] were added by {record.by} and can be taken off by nothing else, which "
                    f"is not what runs here ({by}); see PORTLLM_BACKEND and PORTLLM_CPU_ISA"
                )
    made: list[Record | None] = [None] * len(weights)
    torch.autograd.graph.increment_version(weights)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        for native, exchange in (("cpu", _exchange_cpu), ("triton", _exchange_triton)):
            own = [i for i, name in enumerate(names) if name == native]
            if not own:
                continue
            flat = [t for i in own for t in range(starts[i], starts[i + 1])]
            made_there = exchange(
                [weights[i] for i in own],
                [lora_A[t] for t in flat],
                [lora_B[t] for t in flat],
                [scalings[t] for t in flat],
                [n_old[i] for i in own],
                [n_new[i] for i in own],
                [records[i] for i in own],
            )
            for i, record in zip(own, made_there, strict=True):
                made[i] = record
        for i, name in enumerate(names):
            if name == "torch":
                middle = starts[i] + n_old[i]
                before, after = (
                    (lora_A[part], lora_B[part], scalings[part])
                    for part in (slice(starts[i], middle), slice(middle, starts[i + 1]))
                )
                made[i] = exchange_(weights[i], before, after, records[i], sums[name])
    return made


def _summed_by(
    backend: str, weight: Tensor | None = None, lora_A: Sequence[Tensor] = (), lora_B: Sequence[Tensor] = ()
) -> str:
    """Whose sums a record is of: only the same ones, to the last bit, can be taken off again.

    Args:
        backend: one of ``BACKENDS``.
        weight, lora_A, lora_B: only "triton" needs them, whose tiles depend on them.
    """
    if backend == "triton":
        from . import kernels

        assert weight is not None
        return kernels.summed_by(weight, _narrowed(lora_A), _narrowed(lora_B))
    if backend == "cpu":
        return "cpu, amx, 1" if _native.isa() == "amx_bf16" else "cpu, fma, 1"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads"


def _exchange_cpu(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_old: Sequence[int],
    n_new: Sequence[int],
    records: Sequence[Record | None],
) -> list[Record | None]:
    lengths = [torch.empty(0, dtype=torch.int16), *(record.lengths for record in records if record is not None)]
    data = [torch.empty(0, dtype=torch.uint8), *(record.data for record in records if record is not None)]
    try:
        new_lengths, new_data, ends = torch.ops.portllm.lowrank_exchange_cpu_(
            weights, lora_A, lora_B, scalings, n_old, n_new, torch.cat(lengths), torch.cat(data)
        )
    except RuntimeError as error:
        raise RecordError(str(error).splitlines()[0]) from error
    made: list[Record | None] = []
    by = _summed_by("cpu")
    chunk = byte = 0
    for count, (chunks, bytes_) in zip(n_new, ends.view(-1, 2).tolist(), strict=True):
        made.append(Record(new_lengths[chunk:chunks], new_data[byte:bytes_], by) if count else None)
        chunk, byte = chunks, bytes_
    return made


def _exchange_triton(
    weights: Sequence[Tensor], lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *arguments: Any
) -> list[Record | None]:
    from . import kernels

    return kernels.lowrank_exchange_(weights, _narrowed(lora_A), _narrowed(lora_B), *arguments)


class Prepared:
    """``lowrank_add_`` on the same tensors again and again: checked and, for the compiled library, read in once.

    Args, arithmetic and errors are those of ``lowrank_add_``, raised here; the backend is chosen here too. Each call
    adds the terms once more, with the values that the tensors have then. It finds them where they are then, also
    after ``tensor.data = other`` or ``set_``; if they no longer fit each other it raises before the first write. It
    may be called from several threads, which then race for the weights' values as with any in-place op.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lora_A: Sequence[Tensor],
        lora_B: Sequence[Tensor],
        scalings: Sequence[float],
        n_terms: Sequence[int],
        backend: str = "auto",
        modes: Sequence[int] = (),
    ) -> None:
        self._arguments = list(weights), list(lora_A), list(lora_B), list(scalings), list(n_terms)
        self._backend, self._modes = backend, list(modes)
        self._number: int | None = None
        chosen = set(backends_for(weights, backend, modes).values())
        if chosen != {"cpu"} or _watched(weights, lora_A, lora_B):
            _check(*self._arguments, backend, modes)
            return
        with _explained(*self._arguments, self._modes):
            self._number = torch.ops.portllm.lowrank_add_cpu_prepare(*self._arguments, self._modes)
        weakref.finalize(self, torch.ops.portllm.lowrank_add_cpu_release, self._number).atexit = False

    def __call__(self) -> None:
        if self._number is None or _watched():
            lowrank_add_(*self._arguments, self._backend, self._modes)
        else:
            _bump_versions(self._run, *self._arguments)

    def _run(self, *arguments: Any) -> None:
        with _explained(*arguments, self._modes):
            torch.ops.portllm.lowrank_add_cpu_run(self._number)


def _watched(*lists: Sequence[Tensor]) -> bool:
    """Whether anything must see the op before a kernel does: a compiler, a tracer, a mode or a tensor subclass."""
    if torch.compiler.is_compiling() or torch._C._is_torch_function_mode_enabled():
        return True
    # A tracer, functorch and each mode of the dispatcher add a key of theirs; these two mean nothing.
    keys = torch._C._dispatch_tls_local_include_set()
    keys = keys.remove(torch._C.DispatchKey.BackendSelect).remove(torch._C.DispatchKey.ADInplaceOrView)
    return keys.raw_repr() != 0 or not {type(t) for tensors in lists for t in tensors} <= {Tensor, Parameter}


def _bump_versions(call: Callable[..., None], weights: Sequence[Tensor], *arguments: Any) -> None:
    # As for built-in in-place ops: autograd must see that the weights are no longer what it saved.
    torch.autograd.graph.increment_version(weights)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        call(weights, *arguments)


def _dispatch(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    chosen = backends_for(weights, backend, modes)
    launchers = {name: _launcher(name) for name in chosen.values()}
    if launchers.keys() != {"cpu"}:  # the compiled library checks for itself
        _check(weights, lora_A, lora_B, scalings, n_terms, backend, modes)
    if len(launchers) == 1:
        next(iter(launchers.values()))(weights, lora_A, lora_B, scalings, n_terms, modes)
        return
    starts = [0, *accumulate(n_terms)]
    for name, launch in launchers.items():
        indices = [i for i, weight in enumerate(weights) if chosen[weight.device, weight.dtype] == name]
        terms = [t for i in indices for t in range(starts[i], starts[i + 1])]
        launch(
            [weights[i] for i in indices],
            [lora_A[t] for t in terms],
            [lora_B[t] for t in terms],
            [scalings[t] for t in terms],
            [n_terms[i] for i in indices],
            [number for i in indices for number in modes[4 * i : 4 * i + 4]],
        )


def _check(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    backend: str = "auto",
    modes: Sequence[int] = (),
) -> None:
    total = sum(n_terms)
    if modes and len(modes) != 4 * len(weights):
        raise ValueError(f"lowrank_add_: modes has {len(modes)} ints, but {len(weights)} weights need four each")
    if any(not 0 <= flags < 8 for flags in modes[::4]):
        raise ValueError(f"lowrank_add_: modes has the flags {max(modes[::4], key=abs)}, of which there are three bits")
    lengths = len(lora_A), len(lora_B), len(scalings)
    if len(n_terms) != len(weights) or lengths != (total, total, total):
        raise ValueError(
            f"lowrank_add_: {len(weights)} weights and {len(n_terms)} entries of n_terms with sum {total}, "
            f"but {lengths[0]} lora_A, {lengths[1]} lora_B and {lengths[2]} scalings"
        )
    if len({weight.is_meta for weight in weights}) > 1:
        raise ValueError("lowrank_add_: some weights are meta tensors and some are not; nothing could be computed")
    stop = 0
    for i, (weight, count) in enumerate(zip(weights, n_terms, strict=True)):
        shape, device = weight.shape, weight.device
        if len(shape) != 2 or weight.dtype not in FLOAT_DTYPES:
            raise ValueError(f"lowrank_add_: weights[{i}] is {_describe(weight)}; it must be 2-D and floating point")
        if count < 1:
            raise ValueError(f"lowrank_add_: n_terms[{i}] is {count}; a weight needs at least one term")
        start, stop = stop, stop + count
        for t in range(start, stop):
            a, b = lora_A[t], lora_B[t]
            of_a, of_b = a.shape, b.shape
            fits = len(of_a) == len(of_b) == 2 and of_a[0] == of_b[1] > 0
            if not fits or of_b[0] != shape[0] or of_a[1] != shape[1]:
                raise ValueError(
                    f"lowrank_add_: lora_B[{t}] {tuple(of_b)} @ lora_A[{t}] {tuple(of_a)} "
                    f"does not give the shape {tuple(shape)} of weights[{i}]"
                )
            if a.dtype not in FLOAT_DTYPES or b.dtype not in FLOAT_DTYPES:
                raise ValueError(f"lowrank_add_: term {t} is {_describe(a)}, {_describe(b)}; factors are bf16 to fp64")
            if a.device != device or b.device != device:
                raise ValueError(f"lowrank_add_: term {t} lies on {a.device} and {b.device}, weights[{i}] on {device}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def asked_for(requested: str) -> str:
    """The backend that the caller names, or else the environment's PORTLLM_BACKEND: one of ``BACKENDS``, or "auto".

    Raises:
        BackendError: there is no such backend.
    """
    name = requested if requested != "auto" else os.environ.get("PORTLLM_BACKEND", "auto")
    if name not in ("auto", *BACKENDS):
        raise BackendError(f"there is no backend {name!r}; choose from {', '.join(BACKENDS)}")
    return name


def backend_for(weight: Tensor, requested: str = "auto", *, plain: bool = True) -> str:
    """The one place where the backend for a weight is chosen.

    Args:
        weight: only its device and dtype matter.
        requested: "auto", or one of ``BACKENDS``.
        plain: the call has no modes; "cuda" takes none.

    Order: ``requested``, else the environment's PORTLLM_BACKEND, else the fastest that is available for the
    weight's device and dtype: CPU: "cpu" (the compiled library), then "torch"; CUDA: "triton", then "torch".

    Raises:
        BackendError: the named backend does not exist, is not available here, or does not take this weight.
    """
    name = asked_for(requested)
    if name == "auto":
        # "cuda" is not yet measured: until it is, Triton goes first.
        fastest = {"cpu": "cpu", "cuda": "triton"}.get(weight.device.type, "torch")
        return fastest if _takes(fastest, weight) is None and unavailable(fastest) is None else "torch"
    reason = unavailable(name) or _takes(name, weight)
    if name == "cuda" and not plain:
        reason = reason or "it rounds to nearest only, and keeps no zeros; 'triton' and 'torch' do"
    if reason:
        raise BackendError(f"backend {name!r} cannot update a {_describe(weight)} on {weight.device}: {reason}")
    return name


def backends_for(
    weights: Sequence[Tensor], requested: str = "auto", modes: Sequence[int] = ()
) -> dict[tuple[torch.device, torch.dtype], str]:
    """``backend_for`` weights of each device and dtype, which is all that it depends on beside the modes."""
    kinds = {(weight.device, weight.dtype): weight for weight in weights}
    options = {"plain": False} if modes else {}
    return {kind: backend_for(weight, requested, **options) for kind, weight in kinds.items()}


def _takes(name: str, weight: Tensor) -> str | None:
    """Why the backend does not take this weight, or None."""
    device = weight.device.type
    if name == "cpu" and device != "cpu":
        return "it runs on the CPU only"
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and _interpreted()):
            return "it runs on CUDA devices (on the CPU with TRITON_INTERPRET=1)"
        if weight.dtype == torch.float64:
            return "it has no fp64"
    if name == "cuda":
        if device != "cuda":
            return "it runs on CUDA devices"
        if weight.dtype == torch.float64:
            return "it has no fp64"
    return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def unavailable(name: str) -> str | None:
    """Why a backend cannot be used in this process, in one line; None if it can."""
    if name == "cpu":
        return _native.load()
    if name == "cuda":
        return _native.load_cuda()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "torch sees no CUDA device"
    return None


def _launcher(name: str) -> _Launcher:
    if name == "cpu":
        return _cpu
    if name == "cuda":
        return _cuda
    if name == "triton":
        return _triton
    return reference.lowrank_add_


def _cpu(*arguments: Any) -> None:
    with _explained(*arguments):
        torch.ops.portllm.lowrank_add_cpu_(*arguments)


def _cuda(*arguments: Any) -> None:
    torch.ops.portllm.lowrank_add_cuda_(*arguments[:5])  # backend_for sees to it that there are no modes


@contextmanager
def _explained(*arguments: Any) -> Iterator[None]:
    """The compiled library refuses what ``_check`` does, before the first write, but in fewer words."""
    try:
        yield
    except RuntimeError:
        try:
            weights, lora_A, lora_B, scalings, n_terms, modes = arguments
            _check(weights, lora_A, lora_B, scalings, n_terms, modes=modes)
        except ValueError as error:
            raise error from None
        raise


def _triton(
    weights: Sequence[Tensor],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scalings: Sequence[float],
    n_terms: Sequence[int],
    modes: Sequence[int],
) -> None:
    from . import kernels

    kernels.lowrank_add_(weights, _narrowed(lora_A), _narrowed(lora_B), scalings, n_terms, modes)


def _narrowed(factors: Sequence[Tensor]) -> list[Tensor]:
    """For Triton, whose sums are fp32, in which an fp64 factor cannot say more than its fp32 rounding."""
    return [factor.float() if factor.dtype == torch.float64 else factor for factor in factors]


# Not torch.library.custom_op: its first call imports the compiler stack, a second of start-up.
torch.library.impl("portllm::lowrank_add_", "CompositeExplicitAutograd", _dispatch)
torch.library.impl("portllm::lowrank_add_", "ADInplaceOrView", partial(_bump_versions, torch.ops.portllm.lowrank_add_))
torch.library.register_fake("portllm::lowrank_add_", _check)
