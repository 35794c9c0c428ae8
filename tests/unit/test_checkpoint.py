from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.errors import CheckpointError
from finetune.recipe.files import compute_sha256
from finetune.training.checkpoint import has_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
]  # fmt: skip
LAYOUTS = {
    "plain": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.mT if tensor.ndim > 1 else tensor,
    "strided": lambda tensor: tensor[::2] if tensor.ndim else tensor,
    "part": lambda tensor: tensor[1:] if tensor.ndim else tensor,
    "expanded": lambda tensor: tensor.expand(3, *tensor.shape),
}


def get_bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """NaN payloads and negative zeros count, which == between tensors does not see."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1))
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


@st.composite
def groups(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    group: dict[str, torch.Tensor] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=12), max_size=4, unique=True)):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if dtype == torch.bool:
            tensor = torch.randint(0, 2, shape, generator=generator).bool()
        else:
            raw = torch.randint(0, 256, [*shape, dtype.itemsize], generator=generator, dtype=torch.uint8)
            tensor = raw.view(dtype).squeeze(-1)
        group[name] = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](tensor)
        if draw(st.booleans()):
            group[f"{name}.shared"] = tensor
    return group


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    tensors=st.dictionaries(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,8}", fullmatch=True), groups(), max_size=3),
    state=st.dictionaries(st.text(), values, max_size=4),
    step=st.integers(0, 10**9),
)
def test_a_checkpoint_comes_back_bit_for_bit(
    tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, object], step: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(Path(folder), step, tensors, state)  # type: ignore[arg-type]  # drawn values are JSON
        loaded = load_checkpoint(Path(folder))
        assert (loaded.step, loaded.path, loaded.skipped) == (step, path, [])
        assert loaded.state == state
        assert {key: {name: get_bits(tensor) for name, tensor in group.items()} for key, group in tensors.items()} == {
            key: {name: get_bits(tensor) for name, tensor in group.items()} for key, group in loaded.tensors.items()
        }


def test_a_trained_module_and_its_optimizer_go_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(13)
        module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        module[1].weight = module[0].weight
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()

    module, optimizer = build()
    train(module, optimizer)
    moments = {f"{i}.{k}": v for i, entry in optimizer.state_dict()["state"].items() for k, v in entry.items()}
    tensors = {"model": module.state_dict(), "optimizer": moments, "rng": {"torch": torch.get_rng_state()}}
    save_checkpoint(tmp_path, 1, tensors, {"groups": optimizer.state_dict()["param_groups"]})
    train(module, optimizer)

    other, other_optimizer = build()
    loaded = load_checkpoint(tmp_path)
    other.load_state_dict(loaded.tensors["model"])
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in loaded.tensors["optimizer"].items():
        number, key = name.split(".", 1)
        entries.setdefault(int(number), {})[key] = tensor
    other_optimizer.load_state_dict({"state": entries, "param_groups": loaded.state["groups"]})
    torch.set_rng_state(loaded.tensors["rng"]["torch"])
    train(other, other_optimizer)
    for name, tensor in module.state_dict().items():
        assert get_bits(other.state_dict()[name]) == get_bits(tensor)


def test_the_folder_is_what_the_docstring_says_and_holds_no_pickle(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 400, {"model": {"a.b": torch.ones(2)}, "empty": {}}, {"epoch": 1})
    assert path == tmp_path / "checkpoints" / "step-00000400"
    assert [entry.name for entry in path.parent.iterdir()] == ["step-00000400"]
    files = {entry.name for entry in path.iterdir()}
    assert files == {"model.safetensors", "empty.safetensors", "state.json", "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 400
    assert manifest["files"] == {
        name: {"bytes": (path / name).stat().st_size, "sha256": compute_sha256(path / name)}
        for name in files - {"manifest.json"}
    }


def test_the_newest_is_loaded_by_number_and_a_given_step_on_request(tmp_path: Path) -> None:
    for step in (2, 100_000_000, 10):
        save_checkpoint(tmp_path, step, {}, {"step": step})
    assert load_checkpoint(tmp_path).step == 100_000_000
    assert load_checkpoint(tmp_path, step=2).state == {"step": 2}


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"model": {"w": torch.tensor(value)}}, {})
    assert load_checkpoint(tmp_path).tensors["model"]["w"] == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_leftovers_of_a_crash_go_with_the_next_save(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-00000001" / "deeper").mkdir(parents=True)
    (folder / ".tmp-file").touch()
    (folder / ".tmp-link").symlink_to(outside)
    save_checkpoint(folder, 1, {}, {})
    assert [entry.name for entry in folder.iterdir()] == ["step-00000001"]
    assert (outside / "precious").exists()


@pytest.mark.parametrize(
    ("step", "tensors", "words"),
    [
        (-1, {}, "step must be at least 0, got -1"),
        (1, {"../model": {}}, "a key of tensors must be a plain file name, got '../model'"),
        (1, {"": {}}, "a key of tensors must be a plain file name, got ''"),
        (1, {"model": {"__metadata__": torch.ones(1)}}, "'__metadata__' is reserved by safetensors"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    tmp_path: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        save_checkpoint(tmp_path / "checkpoints", step, tensors, {})
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_run_without_checkpoints_says_so(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    assert not has_checkpoint(tmp_path / folder)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / folder)
    words = "at least one checkpoint must verify, got none. Start the run again."
    assert str(caught.value) == f"{tmp_path / folder}: {words}"
    with pytest.raises(CheckpointError, match="the checkpoint of step 7 must verify, got none"):
        load_checkpoint(tmp_path / folder, step=7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(steps=st.sets(st.integers(0, 99), min_size=1, max_size=6), keep=st.integers(1, 4), data=st.data())
def test_pruning_keeps_the_newest_and_the_best_and_nothing_else(
    steps: set[int], keep: int, data: st.DataObject
) -> None:
    best = data.draw(st.none() | st.sampled_from(sorted(steps)) | st.integers(100, 200))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for step in steps:
            (folder / f"step-{step:08d}").mkdir()
        (folder / "quarantine-step-00000001").mkdir()
        (folder / "notes.txt").touch()
        removed = prune_checkpoints(folder, keep, best)
        expected = set(sorted(steps)[-keep:]) | ({best} & steps)
        left = {entry.name for entry in folder.iterdir()} - {"quarantine-step-00000001", "notes.txt"}
        assert left == {f"step-{step:08d}" for step in expected}
        assert set(removed) == {f"step-{step:08d}" for step in steps - expected}
        assert len(list(folder.iterdir())) == len(expected) + 2


def test_pruning_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        prune_checkpoints(tmp_path, 0, None)
