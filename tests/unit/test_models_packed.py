"""Linear layers through oneDNN say what torch's own say."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.artifact.export import speed
from finetune.artifact.export.speed import Contender
from finetune.models import packed
from finetune.models.packed import PackedLinear, pack_linear_layers, unpack_linear_layers
from finetune.tasks import MaskedLM

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster on this machine."""
    monkeypatch.setattr(packed, "is_packed_faster", lambda: True)


def build(width: int = 6, out: int = 5, *, bias: bool = True) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(width + out)
    plain = nn.Sequential(nn.Linear(width, out, bias=bias)).eval().requires_grad_(False)
    return plain, pack_linear_layers(copy.deepcopy(plain))


@needs_onednn
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_outputs_are_those_of_the_plain_layer(lead, width, out, bias, turned):
    """Any shape in front, none and empty ones too; also what is no block of memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "is_packed_faster", lambda: True)
        plain, fast = build(width, out, bias=bias)
    assert type(fast[0]) is PackedLinear
    x = torch.randn(width, *lead).movedim(0, -1) if turned else torch.randn(*lead, width)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_a_changed_weight_is_seen_and_a_copy_stands_alone():
    plain, fast = build()
    x = torch.randn(3, 6)
    with torch.inference_mode():
        fast(x)
    other = copy.deepcopy(fast)
    for layers in (plain, fast):
        layers[0].weight.mul_(2)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), plain(x))
        assert not torch.allclose(other(x), fast(x))
    assert fast.state_dict().keys() == plain.state_dict().keys()


@needs_onednn
def test_where_gradients_or_other_numbers_are_asked_for_it_is_a_plain_layer(monkeypatch: pytest.MonkeyPatch):
    plain, fast = build()
    monkeypatch.setattr(packed, "_multiply", lambda *_: pytest.fail("went through oneDNN"))
    x = torch.randn(3, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(fast(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(x).sum(), x)[0])
    with torch.inference_mode(), torch.autocast("cpu"):
        assert fast(x).dtype is torch.bfloat16
    with torch.inference_mode():
        assert fast.double()(x.double()).dtype is torch.float64
    assert torch.export.export(build()[1], (torch.randn(2, 6),)).module()(torch.zeros(2, 6)).shape == (2, 5)


def test_what_trains_is_large_or_is_not_faster_stays_as_it_is(monkeypatch: pytest.MonkeyPatch):
    assert type(pack_linear_layers(nn.Sequential(nn.Linear(2, 2)))[0]) is nn.Linear
    frozen = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "MOST_WEIGHTS", 3)
        assert type(pack_linear_layers(frozen)[0]) is nn.Linear
    monkeypatch.setattr(packed, "is_packed_faster", lambda: False)
    assert type(pack_linear_layers(frozen)[0]) is nn.Linear


@needs_onednn
def test_layers_are_plain_again_when_they_are_taken_back():
    plain, fast = build()
    x = torch.randn(3, 6)
    with torch.inference_mode():
        fast(x)
        assert torch.equal(unpack_linear_layers(fast)(x), plain(x))
    assert type(fast[0]) is nn.Linear
    assert fast[0].__dict__.keys() == plain[0].__dict__.keys()


@needs_onednn
def test_what_an_export_is_measured_against_has_plain_layers():
    """The pipeline that people have without this toolkit; the run itself keeps its fast layers."""
    seen = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
            seen.append((type(self.layer), tuple(input_ids.shape), tuple(attention_mask.shape)))

    def read(text: str, **_options: object) -> dict[str, torch.Tensor]:
        return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(1, len(text.split())))

    model = pack_linear_layers(Model().requires_grad_(False))
    speed._build_pipeline(MaskedLM(), Contender(model, read), 8)(["a b", "c"])
    assert seen == [(nn.Linear, (1, 2), (1, 2)), (nn.Linear, (1, 1), (1, 1))]
    assert type(model.layer) is PackedLinear
