"""The command ``portllm``. Imports torch only where a command needs it, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import PortllmError

if TYPE_CHECKING:
    import torch

    from .inplace import InPlaceReport
    from .movement import Drift
    from .patch import Patch

_EPILOG = """\
examples:
  portllm inspect ./adapter
  portllm check ./adapter ./evolved-model --base ./base-model
  portllm apply ./adapter ./evolved-model -o ./patched
  portllm apply ./math@0.7 ./style@0.5 ./evolved-model -o ./patched --dtype bfloat16
  portllm apply ./adapter ./evolved-model --in-place
  portllm remove ./evolved-model
  portllm combine ./math@0.7 ./style@0.5 -o ./both --method svd --rank 16

exit codes: 0 done; 1 status --verify found changes; 2 bad input, 130 interrupted, nothing was written
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (0, 2 for bad input, 130 for an interrupt)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no failure
    try:
        try:
            arguments = _parser().parse_args(argv)
            result: int = arguments.run(arguments)
        finally:
            print(end="", flush=True)  # now, not at exit, so that a reader who has gone is noticed here
        return result
    except KeyboardInterrupt:
        print("portllm: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; without this Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (PortllmError, OSError) as error:
        print(f"portllm: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="portllm",
        description="Port low-rank (LoRA) patches to evolved models, without training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"portllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = _command(commands, "apply", _apply, "write a patched copy of a safetensors checkpoint, shard by shard")
    _patches_argument(command)
    _model_argument(command)
    command.add_argument("-o", "--out", type=Path, help="the patched checkpoint; must not exist (see --overwrite)")
    _binding_arguments(command)
    command.add_argument("--resize-vocab", action="store_true", help="take over a vocabulary that the patch enlarged")
    command.add_argument(
        "--rounding",
        choices=("nearest", "stochastic", "auto"),
        default="nearest",
        help="into 16-bit weights: by chance keeps small patches, auto chooses for each weight",
    )
    command.add_argument("--seed", type=int, default=0, help="of stochastic rounding")
    command.add_argument("--keep-zeros", action="store_true", help="weights that are 0 stay 0 (2:4 sparsity)")
    _dtype_argument(command)
    command.add_argument("--backend", default="auto", help="auto, torch, cpu or triton")
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.add_argument("--link", action="store_true", help="hard links for shards in which nothing changes")
    command.add_argument("--in-place", action="store_true", help="change MODEL itself; `portllm remove` takes it back")
    command.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    command = _command(commands, "remove", _remove, "take patches off that were applied in place, to the last bit")
    command.add_argument("model", metavar="MODEL", help="safetensors checkpoint: directory or file")
    command.add_argument("--patch", metavar="NAME", help="only this one, see `portllm status` (default: all)")
    command.add_argument(
        "--subtract", action="store_true", help="where somebody else has changed the weights: subtract, not exactly"
    )
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    command = _command(commands, "status", _status, "what is applied to a checkpoint in place?")
    command.add_argument("model", metavar="MODEL", help="safetensors checkpoint: directory or file")
    command.add_argument("--verify", action="store_true", help="read what was changed, and compare it with its hashes")
    command.add_argument("--recover", action="store_true", help="complete what a crash has cut short, or take it back")

    command = _command(commands, "check", _check, "will a patch fit a model, how large is it, is the model its base?")
    command.add_argument("patch", metavar="PATCH")
    _model_argument(command)
    command.add_argument(
        "--base", help="the patch's base, to measure how MODEL has moved from it: will the skill carry?"
    )
    command.add_argument("--device", default="cpu", help="where to measure (--base)")
    _binding_arguments(command)
    command.add_argument("--all", action="store_true", help="a line for each weight, not for each kind")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    command = _command(commands, "combine", _combine, "make one patch of several, or of one at another strength")
    _patches_argument(command)
    command.add_argument(
        "-o", "--out", type=Path, required=True, help="the new patch; must not exist (see --overwrite)"
    )
    command.add_argument(
        "--method",
        default="concat",
        choices=("concat", "svd", "ties", "dare", "dare_ties"),
        help="concat (default) adds up exactly, at the sum of the ranks; svd gives the best of a lower rank",
    )
    command.add_argument("--rank", type=int, help="at most, for each module (svd, ties, dare)")
    command.add_argument("--energy", type=float, help="keep this share of each module's squared norm (svd, ties, dare)")
    command.add_argument("--density", type=float, help="the share of elements that ties and dare keep, such as 0.2")
    command.add_argument(
        "--majority-sign", default="total", choices=("total", "frequency"), help="how ties elects signs"
    )
    command.add_argument("--seed", type=int, default=0, help="of what dare drops")
    _dtype_argument(command)
    _setting_argument(command)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.add_argument("--all", action="store_true", help="a line for each module, not for each kind")

    command = _command(commands, "rebase", _rebase, "fit a patch to an evolved model that takes some of its skill")
    command.add_argument("patch", metavar="PATCH")
    _model_argument(command)
    command.add_argument("--base", required=True, help="the model that the patch was made on")
    command.add_argument(
        "-o", "--out", type=Path, required=True, help="the new patch; must not exist (see --overwrite)"
    )
    command.add_argument("--device", default="cpu", help="where to compute")
    _binding_arguments(command)
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    command = _command(commands, "inspect", _inspect, "what is in a patch?")
    command.add_argument("patch", metavar="PATCH")
    _setting_argument(command)
    command.add_argument("--all", action="store_true", help="a line for each module, not for each kind")

    command = _command(commands, "stamp", _stamp, "write the fingerprint of its base into a patch")
    command.add_argument("patch", metavar="PATCH")
    command.add_argument("base", metavar="BASE", help="the checkpoint that the patch was made on")
    _setting_argument(command)
    command.add_argument("-o", "--out", type=Path, help="another directory to write to (default: PATCH itself)")

    command = _command(commands, "extract", _extract, "make a patch of what a tuned model has over its base")
    command.add_argument("base", metavar="BASE", help="safetensors checkpoint: directory, file or hub id")
    command.add_argument("tuned", metavar="TUNED", help="the same, after fine-tuning or merging")
    command.add_argument("-o", "--out", type=Path, required=True, metavar="PATCH", help="adapter directory to write")
    size = command.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, help="the rank of every weight")
    size.add_argument("--energy", type=float, help="share of each difference's squared norm to keep, e.g. 0.95")
    size.add_argument("--budget", type=int, help="numbers in the factors, spent where they keep the most")
    command.add_argument("--max-rank", type=int, default=128, help="bound for --energy and --budget (128)")
    command.add_argument("--target-modules", nargs="+", metavar="NAME", help="ends of module names (all-linear)")
    command.add_argument(
        "--rest", choices=("error", "ignore", "save"), default="error", help="changed embeddings, norms and biases"
    )
    command.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the factors"
    )
    command.add_argument("--device", default="cpu", help="where to compute")
    command.add_argument("--no-stamp", action="store_true", help="leave out the base's fingerprint")
    command.add_argument("--work", type=Path, metavar="DIR", help="keep finished weights here, and go on from them")
    command.add_argument("--overwrite", action="store_true", help="replace PATCH if it exists")
    command.add_argument("--all", action="store_true", help="a line for each weight, not for each kind")
    command.add_argument("-q", "--quiet", action="store_true", help="no progress bar")

    _command(commands, "info", _info, "versions, and which backends can be used here, or why not")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    return parser


def _patches_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("patch", nargs="+", metavar="PATCH[@SCALE]", help="adapter directory or hub id")


def _dtype_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), help="cast while writing")


def _model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="safetensors checkpoint: directory, file or hub id")


def _setting_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ignore-setting", action="append", default=[], metavar="NAME", help="accept a setting that would be refused"
    )


def _binding_arguments(parser: argparse.ArgumentParser) -> None:
    _setting_argument(parser)
    parser.add_argument("--no-strict", action="store_true", help="apply what matches, leave out the rest")
    parser.add_argument("--untie", action="store_true", help="give tied weights that are patched a tensor each")
    parser.add_argument("--expert-layout", choices=("out_in", "in_out"), help="for square expert matrices only")


def _load(text: str, arguments: argparse.Namespace) -> Patch:
    from .patch import Patch

    return Patch.load(text, ignore_settings=tuple(arguments.ignore_setting))


def _scaled(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition("@")
    if not path or os.path.exists(text):
        return text, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PortllmError(f"{text}: {scale!r} after @ is not a finite number; write PATCH@0.7")
    return path, number


def _scaled_patches(arguments: argparse.Namespace) -> list[tuple[Patch, float]]:
    scaled = [_scaled(text) for text in arguments.patch]
    return [(_load(path, arguments), scale) for path, scale in scaled]


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    import torch

    return None if arguments.dtype is None else getattr(torch, arguments.dtype)


def _binding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "strict": not arguments.no_strict,
        "tied": "untie" if arguments.untie else "once",
        "expert_layout": arguments.expert_layout,
    }


def _apply(arguments: argparse.Namespace) -> int:
    patches = _scaled_patches(arguments)
    from .checkpoint import apply_checkpoint, plan_checkpoint
    from .inplace import InPlaceReport

    options = _binding(arguments) | {"resize": arguments.resize_vocab}
    if arguments.dry_run:
        _, plan = plan_checkpoint(arguments.model, patches, **options)
        if arguments.json:
            _print_json(plan.describe())
        else:
            rows = [("tensor", "expert", "rows", "columns", "rank", "scaling")]
            rows += [(a.name, "", "", "", "replaced", "") for a in plan.assigns]
            rows += [
                (
                    u.name,
                    "" if u.region.expert is None else str(u.region.expert),
                    f"{u.region.rows[0]}:{u.region.rows[1]}",
                    f"{u.region.columns[0]}:{u.region.columns[1]}",
                    "+".join(str(t.rank) for t in u.terms),
                    "+".join(f"{t.scaling:g}" for t in u.terms),
                )
                for u in plan.updates
            ]
            _print_table(rows)
            _print_warnings(plan.warnings)
            print(f"would change {len(plan.tensors)} tensors; nothing was written")
        return 0
    if arguments.out is None and not arguments.in_place:
        raise PortllmError("say where to write with -o OUT (or --dry-run, or --in-place)")
    report = apply_checkpoint(
        arguments.model,
        patches,
        arguments.out,
        in_place=arguments.in_place,
        **options,
        rounding=arguments.rounding,
        seed=arguments.seed,
        keep_zeros=arguments.keep_zeros,
        dtype=_dtype(arguments),
        backend=arguments.backend,
        overwrite=arguments.overwrite,
        link=arguments.link,
        progress=not (arguments.quiet or arguments.json),
    )
    if arguments.json:
        _print_json(report.as_dict())
        return 0
    _print_warnings(report.warnings)
    if isinstance(report, InPlaceReport):
        _print_in_place(report)
        return 0
    print(f"patched {report.tensors_updated} tensors, copied {report.tensors_copied}, in {report.shards} shards")
    print(
        f"read {report.bytes_read / 1e9:.2f} GB and wrote {report.bytes_written / 1e9:.2f} GB "
        f"in {report.seconds:.1f} s ({report.gigabytes_per_second:.2f} GB/s)"
    )
    if report.survival:
        shares = sorted(report.survival.values())
        median, least = shares[len(shares) // 2], shares[0]
        print(f"survives rounding: {median:.1%} of what was added (median of the weights; least {least:.1%})")
    print(report.out)
    return 0


def _print_in_place(report: InPlaceReport) -> None:
    print(f"changed {report.tensors_changed} tensors, {report.bytes_changed / 1e9:.2f} GB, in {report.seconds:.1f} s")
    for name in report.not_exact:
        print(f"warning: {name} had been changed since: subtracted, not exactly", file=sys.stderr)
    undo = f"; {report.undo_bytes / 1e6:.1f} MB take them off again" if report.patches else ""
    print(f"{report.model}: {' + '.join(report.patches) or 'no patch'} applied{undo}")


def _remove(arguments: argparse.Namespace) -> int:
    from .inplace import remove_from_checkpoint

    quiet = arguments.quiet or arguments.json
    report = remove_from_checkpoint(arguments.model, arguments.patch, subtract=arguments.subtract, progress=not quiet)
    if arguments.json:
        _print_json(report.as_dict())
    else:
        _print_in_place(report)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from .inplace import checkpoint_status, recover

    recovered = arguments.recover and recover(Path(arguments.model))
    status = checkpoint_status(arguments.model, verify=arguments.verify)
    if arguments.json:
        _print_json(status.as_dict() | {"recovered": recovered})
        return 0
    if recovered:
        print("what was cut short has been completed, or taken back")
    if status.pending:
        print("an operation is going on, or was cut short: --recover completes it, or takes it back")
    if not status.patches:
        print("no patch is applied in place")
        return 0
    rows = [("patch", "strength", "rank", "applied", "from")]
    rows += [(p.name, f"{p.strength:g}", ",".join(map(str, p.ranks)), p.applied, p.source) for p in status.patches]
    _print_table(rows)
    numbers = f"{status.tensors} tensors, {status.bytes / 1e9:.2f} GB, in {len(status.files)} files"
    bits = 8 * status.undo_bytes / max(1, status.bytes)
    print(f"{numbers}; the undo record takes {status.undo_bytes / 1e6:.1f} MB ({bits:.3f} bits a byte)")
    print(f"summed by: {'; '.join(status.summed_by) or 'nothing'}")
    if status.verified:
        print(f"changed since: {', '.join(status.changed)}" if status.changed else "all bytes are as they were left")
    return 1 if status.changed else 0


def _check(arguments: argparse.Namespace) -> int:
    patch = _load(arguments.patch, arguments)
    from .checkpoint import plan_checkpoint
    from .fingerprint import cached, check_weights

    checkpoint, plan = plan_checkpoint(arguments.model, patch, **_binding(arguments))
    result = check_weights(patch, plan, cached(checkpoint.read))
    drift = None if arguments.base is None else _drift(patch, arguments)
    if arguments.json:
        weights = [vars(w) | {"relative": w.relative} for w in result.weights]
        facts = {"verdict": result.verdict, "base": result.base, "weights": weights, "plan": plan.describe()}
        _print_json(facts if drift is None else facts | {"drift": drift.as_dict()})
        return 0
    rows = [("weights", "count", "rank", "|Δ|/|W| median", "max", "survives", "moved from base")]
    for kind, group in _groups(result.weights, lambda w: w.source, arguments.all).items():
        sizes = sorted(w.relative for w in group)
        moved = sorted(w.moved for w in group if w.moved is not None)
        survives = sorted(w.survival for w in group if not math.isnan(w.survival))
        rows.append(
            (
                kind,
                str(len(group)),
                ",".join(str(r) for r in sorted({r for w in group for r in w.ranks})),
                f"{sizes[len(sizes) // 2]:.2%}",
                f"{sizes[-1]:.2%}",
                f"{survives[len(survives) // 2]:.0%}" if survives else "?",
                f"{moved[len(moved) // 2]:.2%}" if moved else "?",
            )
        )
    _print_table(rows)
    for assign in plan.assigns:
        print(f"replaces {assign.name} {list(assign.value.shape)}")
    from .rounding import lost

    _print_warnings([*plan.warnings, *lost({w.source: w.survival for w in result.weights}, "nearest")])
    base = f" ({result.base})" if result.base else ""
    if drift is not None:
        _print_drift(drift, arguments)
        return 0
    print(
        {
            "base": f"fits; the model is the base that the patch was made on{base}, bit for bit",
            "evolved": f"fits; the model has evolved from the patch's base{base}",
            "unrelated": f"fits by name and shape, but the weights have nothing in common with the patch's base{base}: "
            "do not expect its skill to carry over",
            "unknown": f"fits; the patch has no fingerprint of its base{base}, `portllm stamp PATCH BASE` adds one",
        }[result.verdict]
    )
    return 0


def _drift(patch: Patch, arguments: argparse.Namespace) -> Drift:
    from .movement import drift

    return drift(
        patch,
        arguments.model,
        arguments.base,
        **_binding(arguments),
        device=arguments.device,
        progress=not (arguments.quiet or arguments.json),
    )


def _print_drift(drift: Drift, arguments: argparse.Namespace) -> None:
    """The movement D from the base W: by kind of weight, and what it says of the patch Δ."""
    from .movement import Movement

    print(f"\nfrom the base {arguments.base}, D = W'-W (V: the inputs that the patch reads):")
    rows = [("weights", "|D|/|W|", "|DV|/|WV|", "in inputs", "in outputs", "cos(D,Δ)", "|D in Δ's|/|Δ|", "outlook")]
    kinds = _groups(drift.weights, lambda w: w.source, arguments.all)
    totals = {kind: Movement.total(w.movement for w in group) for kind, group in kinds.items()}
    for kind, m in [*totals.items(), ("all", drift.total)]:
        shares = f"{m.distance:.2%}", f"{m.score:.2%}", f"{m.input_share:.2%}", f"{m.output_share:.2%}"
        rows.append((kind, *shares, f"{m.cosine:+.3f}", f"{m.interference:.2f}", m.outlook))
    _print_table(rows)
    print(
        {
            "base": "fits; the model has the same values as the base",
            "evolved": f"fits; the model has evolved from the base; skill {drift.total.outlook} "
            f"(score |DV|/|WV| {drift.total.score:.2%}; the scale is from tiny models)",
            "unrelated": "fits by name and shape, but the weights have nothing in common with the base: "
            "do not expect the patch's skill to carry over",
        }[drift.verdict]
    )


def _combine(arguments: argparse.Namespace) -> int:
    pairs = _scaled_patches(arguments)
    from .algebra import Combined, combine
    from .files import check_destination
    from .patch import LoraEntry

    size = sum(tensor.nbytes for source, _ in pairs for tensor in source.tensors.values())
    check_destination(arguments.out, [Path(source.name) for source, _ in pairs], arguments.overwrite, size)
    patch = combine(
        pairs,
        method=arguments.method,
        rank=arguments.rank,
        energy=arguments.energy,
        density=arguments.density,
        majority_sign=arguments.majority_sign,
        seed=arguments.seed,
        dtype=_dtype(arguments),
    )
    _save(patch, arguments)
    record = Combined.from_patch(patch)
    assert record is not None
    if arguments.json:
        _print_json({"out": str(arguments.out), **vars(record), **_numbers(patch)})
        return 0
    rows = [("modules", "count", "rank", "left off, median", "max")]
    loras = [entry for entry in patch.entries if isinstance(entry, LoraEntry)]
    for kind, group in _groups(loras, lambda e: e.module, arguments.all).items():
        errors = sorted(record.errors.get(e.module, 0.0) for e in group)
        ranks = ",".join(str(rank) for rank in sorted({e.lora_A.shape[0] for e in group}))
        rows.append((kind, str(len(group)), ranks, f"{errors[len(errors) // 2]:.2%}", f"{errors[-1]:.2%}"))
    _print_table(rows)
    _print_warnings(record.warnings)
    numbers = _numbers(patch)
    print(f"{arguments.method} of {len(pairs)}: {numbers['parameters']:,} numbers in {', '.join(numbers['dtypes'])}")
    print(arguments.out)
    return 0


def _rebase(arguments: argparse.Namespace) -> int:
    patch = _load(arguments.patch, arguments)
    from .files import check_destination
    from .rebasing import rebase

    inputs = [Path(arguments.patch), Path(arguments.model), Path(arguments.base)]
    check_destination(arguments.out, inputs, arguments.overwrite, sum(t.nbytes for t in patch.tensors.values()))
    made = rebase(
        patch,
        arguments.model,
        arguments.base,
        **_binding(arguments),
        device=arguments.device,
        progress=not (arguments.quiet or arguments.json),
    )
    _save(made, arguments)
    if arguments.json:
        _print_json({"out": str(arguments.out), **_numbers(made)})
    else:
        print(f"{arguments.out}: {arguments.patch}, rebased from {arguments.base} to {arguments.model}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    patch = _load(arguments.patch, arguments)
    from .fingerprint import Fingerprint
    from .patch import ExpertEntry, LoraEntry

    config, fingerprint = patch.config, Fingerprint.from_patch(patch)
    numbers = _numbers(patch)
    if arguments.json:
        entries = []
        for e in patch.entries:
            entry: dict[str, Any] = {
                "kind": type(e).__name__,
                "name": getattr(e, "module", None) or getattr(e, "name", ""),
            }
            if isinstance(e, LoraEntry):
                entry |= {"rank": e.lora_A.shape[0], "scaling": e.scaling, "dora": e.magnitude is not None}
                entry["shape"] = [e.lora_B.shape[0], *e.lora_A.shape[1:]]
            entries.append(entry)
        _print_json(
            {
                "base": config.base_model,
                "fingerprint": fingerprint is not None,
                **numbers,
                "peft_version": config.peft_version,
                "entries": entries,
            }
        )
        return 0
    print(f"base      {config.base_model or 'unknown'}{'' if fingerprint is None else ' (fingerprint kept)'}")
    print(f"numbers   {numbers['parameters']:,} in {', '.join(numbers['dtypes'])}")
    rows = [("modules", "count", "rank", "scaling", "kind")]
    for kind, group in _groups(patch.entries, lambda e: getattr(e, "module", None) or e.name, arguments.all).items():
        loras = [e for e in group if isinstance(e, LoraEntry)]
        what = {type(e).__name__.removesuffix("Entry").lower() for e in group}
        what |= {"dora" for e in loras if e.magnitude is not None}
        ranks = {e.lora_A.shape[0] for e in loras}
        scalings = {e.scaling for e in loras}
        for e in group:
            if isinstance(e, ExpertEntry):
                ranks |= {config.rank(p) for p in e.parameters}
                scalings |= {config.scaling(p) for p in e.parameters}
        rows.append(
            (
                kind,
                str(len(group)),
                ",".join(map(str, sorted(ranks))),
                ",".join(f"{s:g}" for s in sorted(scalings)),
                "+".join(sorted(what)),
            )
        )
    _print_table(rows)
    return 0


def _save(patch: Patch, arguments: argparse.Namespace) -> None:
    """Write a patch to OUT, synced to disk, or not at all."""
    from .files import fsync, whole_or_absent

    with whole_or_absent(arguments.out, arguments.overwrite, is_file=False) as temporary:
        patch.save(temporary)
        for file in temporary.iterdir():
            fsync(file)


def _numbers(patch: Patch) -> dict[str, Any]:
    return {
        "parameters": patch.num_parameters,
        "bytes": sum(tensor.nbytes for tensor in patch.tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in patch.tensors.values()}),
        "ranks": list(patch.ranks),
    }


def _stamp(arguments: argparse.Namespace) -> int:
    patch = _load(arguments.patch, arguments)
    from .fingerprint import stamp
    from .patch import adapter_directory

    if arguments.out is None and not os.path.exists(arguments.patch):
        raise PortllmError(f"{arguments.patch}: comes from the hub; say where to write with -o OUT")
    out = arguments.out or adapter_directory(Path(arguments.patch))
    stamp(patch, arguments.base).save(out)
    if arguments.json:
        _print_json({"out": str(out), "base": arguments.base})
    else:
        print(f"{out}: fingerprint of {arguments.base} kept")
    return 0


def _extract(arguments: argparse.Namespace) -> int:
    import torch

    from .extraction import extract
    from .files import check_destination

    inputs = [Path(arguments.base), Path(arguments.tuned)]
    check_destination(arguments.out, inputs, arguments.overwrite, 0)
    result = extract(
        arguments.base,
        arguments.tuned,
        rank=arguments.rank,
        energy=arguments.energy,
        budget=arguments.budget,
        max_rank=arguments.max_rank,
        target_modules=arguments.target_modules or "all-linear",
        rest=arguments.rest,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        stamp=not arguments.no_stamp,
        work=arguments.work,
        progress=not (arguments.quiet or arguments.json),
    )
    _save(result.patch, arguments)
    if arguments.json:
        _print_json(
            {
                "out": str(arguments.out),
                "parameters": result.patch.num_parameters,
                "weights": [vars(w) for w in result.weights],
                "unchanged": result.unchanged,
                "saved": result.saved,
                "ignored": result.ignored,
            }
        )
        return 0
    rows = [("weights", "count", "rank", "|D|/|W| median", "left out: median", "max")]
    for kind, group in _groups(result.weights, lambda w: w.name, arguments.all).items():
        sizes, errors = sorted(w.relative_size for w in group), sorted(w.relative_error for w in group)
        rows.append(
            (
                kind,
                str(len(group)),
                ",".join(map(str, sorted({w.rank for w in group}))),
                f"{sizes[len(sizes) // 2]:.2%}",
                f"{errors[len(errors) // 2]:.2%}",
                f"{errors[-1]:.2%}",
            )
        )
    _print_table(rows)
    for what, names in (("the same in both", result.unchanged), ("kept whole", result.saved)):
        if names:
            print(f"{what}: {len(names)} tensors")
    _print_warnings([f"changed, but not in the patch: {name}" for name in result.ignored])
    print(f"{arguments.out}: {result.patch.num_parameters:,} numbers")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from .info import gather

    facts = gather()
    if arguments.json:
        _print_json(facts)
        return 0
    for name, value in facts["versions"].items():
        print(f"{name:14}{value or 'not installed'}")
    print()
    for name, reason in facts["backends"].items():
        print(f"{'backend ' + name:16}{'ready' if reason is None else 'no: ' + reason}")
    for device, backend in facts["chosen"].items():
        print(f"{device:16}uses {backend}")
    return 0


def _groups(items: Iterable[Any], name: Any, each: bool) -> dict[str, list[Any]]:
    """Items by name with layer and expert numbers folded into ``*``, unless each is asked for."""
    groups: dict[str, list[Any]] = {}
    for item in items:
        parts = name(item).split(".")
        key = ".".join(part if each or not part.isdigit() else "*" for part in parts)
        groups.setdefault(key, []).append(item)
    return groups


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def _print_warnings(warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
