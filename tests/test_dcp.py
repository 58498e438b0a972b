"""torch.distributed.checkpoint directories: patched chunk by chunk, they load as what live apply makes of the whole."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import TensorProperties

import portllm
from portllm import CheckpointError, Patch, PlanError, PortllmError, apply_checkpoint, ops
from portllm.checkpoint import plan_checkpoint
from portllm.cli import main

from . import distributed
from .tiny import same_bits, snapshot, write_adapter, write_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
BACKENDS = [name for name in ("torch", "cpu") if ops.unavailable(name) is None]
# No size is a multiple of four, and one is below it, so that every way of cutting has uneven and empty chunks.
OUT, IN, VOCAB, SMALL = 23, 18, 30, 3
LAYERS = ("model.layers.0", "model.layers.1")
Q_PROJ = "model.layers.0.q_proj.weight"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(IN, OUT), nn.Linear(IN, SMALL, bias=False)
        self.norm = nn.Parameter(torch.randn(IN))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x * self.norm).sum() + self.v_proj(x).sum()


class Model(nn.Module):
    """Weights under names such as ``model.layers.0.q_proj.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(VOCAB, IN), "layers": nn.ModuleList()})
        self.model["layers"] = nn.ModuleList(Layer() for _ in LAYERS)  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.model["embed_tokens"](tokens)
        return sum(layer(x) for layer in self.model["layers"])  # type: ignore[misc,union-attr,return-value]


def whole_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {name: tensor.detach().to(dtype) for name, tensor in Model().state_dict().items()}


def adapter(path: Path, **settings: Any) -> Path:
    """Factors for all linear layers and the embedding, and a bias of each q_proj."""
    named: dict[str, Tensor] = {}
    for layer in LAYERS:
        for module, out in (("q_proj", OUT), ("v_proj", SMALL)):
            named[f"base_model.model.{layer}.{module}.lora_A.weight"] = torch.randn(4, IN)
            named[f"base_model.model.{layer}.{module}.lora_B.weight"] = torch.randn(out, 4)
        named[f"base_model.model.{layer}.q_proj.base_layer.bias"] = torch.randn(OUT)
    named["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(4, VOCAB)
    named["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(IN, 4)
    targets = ["q_proj", "v_proj", "embed_tokens"]
    return write_adapter(path, named, target_modules=targets, bias="lora_only", **settings)


def live(named: Mapping[str, Tensor], patch: Any, **options: Any) -> dict[str, Tensor]:
    copy = {name: tensor.clone() for name, tensor in named.items()}
    portllm.apply(copy, patch, **options)
    return copy


def empty(value: Any) -> Any:
    """A state dict of the same form, to load into."""
    if isinstance(value, dict):
        return {key: empty(item) for key, item in value.items()}
    if isinstance(value, list):
        return [empty(item) for item in value]
    return torch.full_like(value, 7) if isinstance(value, Tensor) else None


def load(path: Path, like: Any) -> Any:
    into = empty(like)
    dcp.load(into, checkpoint_id=path)
    return into


def assert_same(found: Any, expected: Any, name: str = "") -> None:
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key, item in expected.items():
            assert_same(found[key], item, f"{name}.{key}")
    elif isinstance(expected, Tensor):
        assert same_bits(found, expected), name
    else:
        assert found == expected, name


def assert_patched(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], named: Mapping[str, Tensor], backend: str
) -> None:
    """``named``, in chunks, has become what live apply makes of the whole, to the bit but for plain torch.

    Its matrix products depend on the shapes of the matrices, in the last bits of the sum.
    """
    assert found.keys() == expected.keys()
    if backend != "torch":
        assert_same(found, expected)
        return
    for name, tensor in named.items():
        size = tensor.abs().max() + (expected[name] - tensor).abs().max()
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=float(size) * 2**-18)


def assert_archives_sound(path: Path) -> None:
    """Every chunk is a zip archive whose CRCs are right."""
    for place in dcp.FileSystemReader(path).read_metadata().storage_data.values():
        data = (path / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def training_state(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a training run saves: tensors of the optimizer under the weights' names, numbers, texts."""
    state = {name: {"exp_avg": torch.randn(t.shape), "step": torch.tensor(3.0)} for name, t in named.items()}
    groups = [{"lr": 0.1, "params": list(named)}]
    return {"model": dict(named), "optim": {"state": state, "param_groups": groups}, "step": 17, "note": "run 3"}


# -- written by one process ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_state_is_patched_in_its_weights_alone(tmp_path: Path, dtype: torch.dtype, backend: str) -> None:
    state = training_state(whole_tensors(dtype))
    dcp.save(state, checkpoint_id=tmp_path / "model")
    patch = adapter(tmp_path / "adapter")
    report = apply_checkpoint(tmp_path / "model", patch, tmp_path / "out", 0.5, backend=backend)
    expected = state | {"model": live(state["model"], patch, scale=0.5, backend=backend)}
    assert_same(load(tmp_path / "out", state), expected)
    before, after = snapshot(tmp_path / "model"), snapshot(tmp_path / "out")
    assert before.keys() == after.keys() == {".metadata", "__0_0.distcp"}
    assert before[".metadata"] == after[".metadata"]
    assert len(before["__0_0.distcp"]) == len(after["__0_0.distcp"])
    assert_archives_sound(tmp_path / "out")
    assert (report.shards, report.tensors_updated) == (1, 7)
    assert report.tensors_copied == len(dcp.FileSystemReader(tmp_path / "model").read_metadata().storage_data) - 7


@pytest.mark.parametrize("nested", [False, True])
def test_weights_at_the_top_and_deep_below(tmp_path: Path, nested: bool) -> None:
    named = whole_tensors()
    state = {"app": {"state": {"weights": named, "epoch": 3}}} if nested else {**named, "optimizer": {"lr": 0.1}}
    dcp.save(state, checkpoint_id=tmp_path / "model")
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(tmp_path / "model", patch, tmp_path / "out")
    expected = live(named, patch)
    found = load(tmp_path / "out", state)
    assert_same(found["app"]["state"]["weights"] if nested else {name: found[name] for name in named}, expected)


def test_names_that_were_not_flattened(tmp_path: Path) -> None:
    """Without planner data the names are whole names; those of the optimizer's tensors are no weights'."""
    named = whole_tensors()
    state = {**named, **{f"optim.state.{name}.exp_avg": torch.randn(t.shape) for name, t in named.items()}}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, checkpoint_id=tmp_path / "model", planner=planner)
    assert dcp.FileSystemReader(tmp_path / "model").read_metadata().planner_data is None
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(tmp_path / "model", patch, tmp_path / "out")
    assert_same(load(tmp_path / "out", state), state | live(named, patch))


def test_several_files_of_several_threads(tmp_path: Path) -> None:
    state = training_state(whole_tensors())
    writer = dcp.FileSystemWriter(tmp_path / "model", single_file_per_rank=False, thread_count=2)
    dcp.save(state, storage_writer=writer)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "left_over.distcp").write_text("of another save")
    patch = adapter(tmp_path / "adapter")
    report = apply_checkpoint(tmp_path / "model", patch, tmp_path / "out", link=True)
    assert_same(load(tmp_path / "out", state), state | {"model": live(state["model"], patch)})
    before, after = snapshot(tmp_path / "model"), snapshot(tmp_path / "out")
    assert before.keys() - {"left_over.distcp"} == after.keys()
    assert report.shards > 20
    assert sum(os.path.samefile(tmp_path / "model" / n, tmp_path / "out" / n) for n in after) == report.shards - 7


def test_pieces_smaller_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portllm.pieces.rows_per_block", lambda columns: 4)
    monkeypatch.setattr("portllm.reference.rows_per_block", lambda columns: 4)
    monkeypatch.setattr("portllm.copying.CHUNK_BYTES", 4 * IN * 2)
    state = training_state(whole_tensors())
    dcp.save(state, checkpoint_id=tmp_path / "model")
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(tmp_path / "model", patch, tmp_path / "out")
    assert_same(load(tmp_path / "out", state), state | {"model": live(state["model"], patch)})
    assert_archives_sound(tmp_path / "out")


def test_a_tied_weight_changes_under_all_of_its_names(tmp_path: Path) -> None:
    """A state dict, and so the checkpoint, holds it once for each name; a model that is not tied has other numbers."""
    named = whole_tensors() | {"lm_head.weight": torch.randn(VOCAB, IN).to(torch.bfloat16)}
    tied = named | {"lm_head.weight": named["model.embed_tokens.weight"]}
    patch = write_adapter(
        tmp_path / "adapter",
        {f"base_model.model.lm_head.lora_{m}.weight": torch.randn(s) for m, s in (("A", (4, IN)), ("B", (VOCAB, 4)))},
        target_modules=["lm_head"],
    )
    for name, weights in (("parted", named), ("tied", tied)):
        dcp.save({"model": weights}, checkpoint_id=tmp_path / name)
        report = apply_checkpoint(tmp_path / name, patch, tmp_path / f"{name}-out")
        assert any("is tied to lm_head.weight: patched once" in text for text in report.warnings) == (name == "tied")
        expected = {key: tensor.clone() for key, tensor in weights.items()}
        if name == "tied":
            expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
        portllm.apply(expected, patch)
        assert_same(load(tmp_path / f"{name}-out", {"model": weights}), {"model": expected})


def test_dry_run_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = training_state(whole_tensors())
    dcp.save(state, checkpoint_id=tmp_path / "model")
    patch = adapter(tmp_path / "adapter")
    checkpoint, plan = plan_checkpoint(tmp_path / "model", patch)
    assert_same({name: checkpoint.read(name) for name in plan.tensors}, {n: state["model"][n] for n in plan.tensors})
    assert main(["apply", str(patch), str(tmp_path / "model"), "--dry-run"]) == 0
    assert "would change 7 tensors" in capsys.readouterr().out
    portllm.stamp(Patch.load(patch), tmp_path / "model").save(tmp_path / "stamped")
    assert main(["check", str(tmp_path / "stamped"), str(tmp_path / "model"), "--part", "model"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    small = f"{patch}@0.001"
    assert main(["apply", small, str(tmp_path / "model"), "-o", str(tmp_path / "out"), "-q"]) == 0
    assert "patched 7 tensors" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "stamped"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "evolved"


# -- written by several processes ------------------------------------------------------------------------------------


def _save_sharded(place: str) -> None:
    """On each rank: the same weights under several placements, a model of FSDP2 with its optimizer, HF storage."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    warnings.simplefilter("ignore")
    root, world = Path(place), dist.get_world_size()
    named = torch.load(root / "whole.pt")
    flat = init_device_mesh("cpu", (world,))
    meshes = {"rows": (flat, [Shard(0)]), "columns": (flat, [Shard(1)]), "replicas": (flat, [Replicate()])}
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        meshes |= {"grid": (grid, [Shard(0), Shard(1)]), "strided": (grid, [Shard(0), Shard(0)])}
    for name, (mesh, placements) in meshes.items():
        sharded = {}
        for key, tensor in named.items():
            fit = [p if not isinstance(p, Shard) or p.dim < tensor.dim() else Replicate() for p in placements]
            sharded[key] = distribute_tensor(tensor, mesh, fit)
        dcp.save({"model": sharded, "step": 3}, checkpoint_id=root / name)
        if name in ("rows", "grid"):
            writer = dcp.HuggingFaceStorageWriter(str(root / f"hf-{name}"), save_distributed=True)
            dcp.save(sharded, storage_writer=writer)
            form = SerializationFormat.SAFETENSORS
            writer = dcp.FileSystemWriter(root / f"safetensors-{name}", serialization_format=form)
            dcp.save({"model": sharded, "step": 3}, storage_writer=writer)
    model = Model()
    model.load_state_dict(named)
    for layer in model.model["layers"]:  # type: ignore[union-attr]
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(VOCAB)).backward()
    optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "step": 3}, checkpoint_id=root / "fsdp")
    trained = {name: tensor.full_tensor() for name, tensor in weights.items()}
    moments = {name: each["exp_avg"].full_tensor() for name, each in state["state"].items()}
    if dist.get_rank() == 0:
        torch.save({"model": trained, "moments": moments}, root / "fsdp.pt")


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(f"sharded-{request.param}")
    torch.save(whole_tensors(torch.float32), root / "whole.pt")
    distributed.run(_save_sharded, request.param, root / "processes", str(root))
    return root


@pytest.mark.parametrize("layout", ["rows", "columns", "replicas", "grid", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_of_every_layout_get_the_bits_of_the_whole(
    sharded: Path, tmp_path: Path, layout: str, backend: str
) -> None:
    if not (sharded / layout).is_dir():
        pytest.skip("a grid takes four ranks")
    named = torch.load(sharded / "whole.pt")
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(sharded / layout, patch, tmp_path / "out", backend=backend)
    state = {"model": named, "step": 3}
    found, expected = load(tmp_path / "out", state), live(named, patch, backend=backend)
    assert found["step"] == 3
    assert_patched(found["model"], expected, named, backend)
    assert_archives_sound(tmp_path / "out")
    before, after = snapshot(sharded / layout), snapshot(tmp_path / "out")
    assert {name: len(data) for name, data in before.items()} == {name: len(data) for name, data in after.items()}
    assert before[".metadata"] == after[".metadata"]


def test_a_model_of_fsdp2_and_its_optimizer(sharded: Path, tmp_path: Path) -> None:
    patch = adapter(tmp_path / "adapter")
    whole = torch.load(sharded / "fsdp.pt")
    apply_checkpoint(sharded / "fsdp", patch, tmp_path / "out")
    expected = {"model": live(whole["model"], patch), "optim": {"state": {}}, "step": 3}
    expected["optim"]["state"] = {name: {"exp_avg": tensor} for name, tensor in whole["moments"].items()}
    found = load(tmp_path / "out", expected)
    assert_patched(found.pop("model"), expected.pop("model"), whole["model"], BACKENDS[-1])
    assert_same(found, expected)


@pytest.mark.parametrize("layout", ["rows", "grid"])
def test_shards_of_hugging_face_storage(sharded: Path, tmp_path: Path, layout: str) -> None:
    source = sharded / f"hf-{layout}"
    if not source.is_dir():
        pytest.skip("a grid takes four ranks")
    named = torch.load(sharded / "whole.pt")
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(source, patch, tmp_path / "out")
    into = {name: torch.empty_like(tensor) for name, tensor in named.items()}
    dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path / "out")))
    assert_patched(into, live(named, patch), named, BACKENDS[-1])
    assert snapshot(source).keys() == snapshot(tmp_path / "out").keys()


@pytest.mark.parametrize("layout", ["rows", "grid"])
def test_safetensors_inside_distcp_files(sharded: Path, tmp_path: Path, layout: str) -> None:
    """torch writes this form but cannot read it from such files, so the chunks are read here."""
    source = sharded / f"safetensors-{layout}"
    if not source.is_dir():
        pytest.skip("a grid takes four ranks")
    named = torch.load(sharded / "whole.pt")
    patch = adapter(tmp_path / "adapter")
    apply_checkpoint(source, patch, tmp_path / "out")
    assert_same(_read_safetensors(source), named)
    assert_patched(_read_safetensors(tmp_path / "out"), live(named, patch), named, BACKENDS[-1])
    before, after = snapshot(source), snapshot(tmp_path / "out")
    assert {name: len(data) for name, data in before.items()} == {name: len(data) for name, data in after.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The model in .distcp files that end with a safetensors archive."""
    from safetensors.torch import load as load_archive

    metadata = dcp.FileSystemReader(path).read_metadata()
    wholes: dict[str, Tensor] = {}
    for index, place in metadata.storage_data.items():
        if index.offset is not None:
            archive = load_archive((path / place.relative_path).read_bytes()[place.offset :])
            chunk = archive[index.fqn]
            about = metadata.state_dict_metadata[index.fqn]
            whole = wholes.setdefault(index.fqn.removeprefix("model."), torch.full(about.size, torch.nan))
            whole[tuple(slice(o, o + s) for o, s in zip(index.offset, chunk.shape, strict=True))] = chunk
    return {f"model.{name.removeprefix('model.')}": tensor for name, tensor in wholes.items()}


# -- refusals --------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, model: Path, patch: Any, **options: Any) -> PortllmError:
    """The error of a call that must not leave anything behind."""
    before = snapshot(tmp_path)
    with pytest.raises(PortllmError) as raised:
        apply_checkpoint(model, patch, None if options.get("in_place") else tmp_path / "out", **options)
    assert snapshot(tmp_path) == before
    return raised.value


@pytest.fixture
def model(tmp_path: Path) -> Path:
    dcp.save(training_state(whole_tensors()), checkpoint_id=tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"in_place": True}, "is not patched in place; write a patched copy"),
        ({"dtype": torch.float32}, "dtype would change the layout of a torch.distributed.checkpoint directory"),
        ({"tied": "untie"}, "tied='untie' (--untie) would change the layout"),
        ({"resize": True}, "resize (--resize-vocab) would change the layout"),
        ({"part": "ema"}, "no part 'ema' with tensors in it; it has 'model'"),
    ],
)
def test_what_would_change_the_layout(tmp_path: Path, model: Path, options: dict[str, Any], text: str) -> None:
    assert text in str(refusal(tmp_path, model, adapter(tmp_path / "adapter"), **options))


def test_weights_in_two_parts_are_ambiguous_until_one_is_named(tmp_path: Path) -> None:
    named = whole_tensors()
    state = {"model": named, "ema": {name: tensor + 1 for name, tensor in named.items()}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "model")
    patch = adapter(tmp_path / "adapter")
    error = refusal(tmp_path, tmp_path / "model", patch)
    assert isinstance(error, PlanError)
    assert "in several parts: 'model', 'ema'; say which one is to be patched, such as part='model' (--part)" in str(
        error
    )
    apply_checkpoint(tmp_path / "model", patch, tmp_path / "out", part="ema")
    assert_same(load(tmp_path / "out", state), state | {"ema": live(state["ema"], patch)})


def test_a_patch_for_another_model(tmp_path: Path, model: Path) -> None:
    assert "the patch matches nothing" in str(refusal(tmp_path, model, write_adapter(tmp_path / "other")))
    named = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.randn(4, IN + 1)}
    named["base_model.model.model.layers.0.q_proj.lora_B.weight"] = torch.randn(OUT, 4)
    other = write_adapter(tmp_path / "wide", named, target_modules=["q_proj"])
    assert f"lora_B @ lora_A is [{OUT}, {IN + 1}]" in str(refusal(tmp_path, model, other, strict=False))


def test_no_model_in_it(tmp_path: Path) -> None:
    dcp.save({"step": torch.zeros(3), "names": {"a": torch.zeros(2)}}, checkpoint_id=tmp_path / "model")
    text = "no tensor with a name such as layers.0.weight: no model in it"
    assert text in str(refusal(tmp_path, tmp_path / "model", adapter(tmp_path / "adapter")))


def test_part_is_for_dcp_only(tmp_path: Path) -> None:
    error = refusal(tmp_path, write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter"), part="model")
    assert "part='model' is only for torch.distributed.checkpoint directories; leave it out" in str(error)


def _shorter(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", os.path.getsize(path / "__0_0.distcp") - 1)


def _edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        metadata = pickle.loads((path / ".metadata").read_bytes())
        change(metadata)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))

    return edit


def _of_weight(metadata: Any) -> Any:
    """The places of the first q_proj's weight."""
    return next(place for index, place in metadata.storage_data.items() if index.fqn.endswith("layers.0.q_proj.weight"))


class Evil:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


class Sly:
    """A pickle that asks a harmless class for what is not."""

    def __reduce__(self) -> Any:
        return getattr, (TensorProperties, "__init__")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no metadata": (lambda p: (p / ".metadata").unlink(), "holds .distcp files, but no .metadata: the save was cut"),
    "metadata of each rank": (lambda p: (p / ".metadata").rename(p / "__0.metadata"), "use_collectives=True"),
    "no pickle": (lambda p: (p / ".metadata").write_bytes(b"\x80\x04N"), "not sound metadata of a DCP checkpoint"),
    "half a pickle": (lambda p: os.truncate(p / ".metadata", 300), "not sound metadata of a DCP checkpoint"),
    "code": (lambda p: (p / ".metadata").write_bytes(pickle.dumps(Evil(p / "evil"))), "posix.mkdir, which is no part"),
    "attribute": (lambda p: (p / ".metadata").write_bytes(pickle.dumps(Sly())), "asks for __init__ of"),
    "missing file": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp: missing, but holds"),
    "truncated": (_shorter, "; copy it again"),
    "planner": (_edit(lambda m: setattr(m, "planner_data", {"a": 3})), "planner data of an unknown kind (dict)"),
    "storage": (_edit(lambda m: setattr(m, "storage_data", None)), "does not say what is stored and where"),
    "no place": (_edit(lambda m: m.storage_data.clear()), "does not say where model.model.embed_tokens.weight is"),
    "outside": (_edit(lambda m: setattr(_of_weight(m), "relative_path", "../x")), "'../x', which is not a file in the"),
    "elsewhere": (_edit(lambda m: setattr(_of_weight(m), "offset", 9)), "is neither a zip archive of torch.save nor"),
    "packed": (_edit(lambda m: setattr(_of_weight(m), "transform_descriptors", ["zstd"])), "compressed or encrypted"),
    "holes": (
        _edit(lambda m: setattr(m.state_dict_metadata[f"model.{Q_PROJ}"], "size", torch.Size([99, 99]))),
        f"the chunks of model.{Q_PROJ} do not make up its [99, 99]",
    ),
    "dtype": (
        _edit(lambda m: setattr(m.state_dict_metadata[f"model.{Q_PROJ}"].properties, "dtype", torch.half)),
        "is a torch.bfloat16 tensor, torch.strided, not the torch.float16 tensor that was announced",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, model: Path, damage: str) -> None:
    change, text = DAMAGES[damage]
    change(model)
    error = refusal(tmp_path, model, adapter(tmp_path / "adapter"))
    assert isinstance(error, CheckpointError)
    assert text in str(error)
    assert "\n" not in str(error)


def test_a_tensor_that_is_not_stored_row_by_row(tmp_path: Path) -> None:
    named = whole_tensors()
    named["model.layers.0.q_proj.weight"] = named["model.layers.0.q_proj.weight"].T.contiguous().T
    dcp.save({"model": named}, checkpoint_id=tmp_path / "model")
    error = refusal(tmp_path, tmp_path / "model", adapter(tmp_path / "adapter"))
    assert f"q_proj.weight[0:{OUT}, 0:{IN}] is stored with strides [1, {OUT}], little-endian; save it from" in str(
        error
    )


def test_a_quantised_weight(tmp_path: Path) -> None:
    named = whole_tensors()
    named["model.layers.0.q_proj.weight"] = named["model.layers.0.q_proj.weight"].to(torch.int8)
    dcp.save({"model": named}, checkpoint_id=tmp_path / "model")
    assert "layers.0.q_proj.weight is int8" in str(refusal(tmp_path, tmp_path / "model", adapter(tmp_path / "adapter")))


@pytest.mark.parametrize("layout", ["rows", "columns", "replicas"])
def test_dora_needs_whole_vectors(sharded: Path, tmp_path: Path, layout: str) -> None:
    """Rows that lie whole in a chunk have their norms; those that chunks cut through are refused by name."""
    named = {f"base_model.model.{LAYERS[0]}.q_proj.lora_{m}.weight": torch.randn(s) for m, s in
             (("A", (4, IN)), ("B", (OUT, 4)))}  # fmt: skip
    named[f"base_model.model.{LAYERS[0]}.q_proj.lora_magnitude_vector.weight"] = torch.rand(OUT) + 0.5
    patch = write_adapter(tmp_path / "adapter", named, use_dora=True, target_modules=["layers.0.q_proj"])
    source = sharded / layout
    if layout == "columns":
        error = refusal(tmp_path, source, patch)
        assert isinstance(error, PlanError)
        assert "DoRA needs the norms of whole vectors of model.layers.0.q_proj.weight" in str(error)
        assert "save it with shards of rows" in str(error)
        return
    apply_checkpoint(source, patch, tmp_path / "out")
    whole = torch.load(sharded / "whole.pt")
    found, expected = load(tmp_path / "out", {"model": whole})["model"], live(whole, patch)
    changed = f"{LAYERS[0]}.q_proj.weight"
    torch.testing.assert_close(found.pop(changed), expected.pop(changed), rtol=2**-20, atol=2**-18)
    assert_same(found, expected)


def test_other_commands_say_what_the_directory_is(model: Path) -> None:
    with pytest.raises(
        CheckpointError, match=re.escape("a torch.distributed.checkpoint directory, which only `apply`")
    ):
        portllm.checkpoint_status(model)
