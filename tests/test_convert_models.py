"""convert() on whole architectures: what it fuses, counted, and that they compute the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import batchops
from batchops import nn as bnn
from batchops._convert.methods import RewrittenMethod
from batchops._convert.tables import STOCK

from . import models
from .test_convert import assert_same_behaviour, fused_calls, unfused


def randomize(model: nn.Module) -> nn.Module:
    """Weights and statistics that no error hides behind (timm starts the last norms at zero)."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.weight.uniform_(0.5, 1.0)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def fused_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m) in STOCK]


def sums(model: nn.Module) -> int:
    """The places where a sum goes into a norm."""
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    read = [forward for forward in forwards if isinstance(forward, RewrittenMethod)]
    return sum(bool(site.add) for forward in read for site in forward.sites)


def run(model: nn.Module, inputs: Sequence[torch.Tensor], training: bool) -> list[torch.Tensor]:
    """Output, gradients and buffers of one step."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).train(training).to(inputs[0].dtype)
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = model(*inputs)
    # against fixed directions, so that no gradient is zero by symmetry
    y.mul(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    results = [y.detach(), *(x.grad for x in inputs), *(p.grad for p in model.parameters())]
    return results + [t.clone() for t in model.buffers()]


def assert_same_as_stock(ours: nn.Module, stock: nn.Module, *inputs: torch.Tensor) -> None:
    """In float64: in fewer bits, a relu that flips next to zero changes all that follows. Gradients
    that are zero by symmetry are sums of terms of the size of the input's gradient."""
    inputs = tuple(x.double() for x in inputs)
    for training in (True, False):
        expected, got = run(stock, inputs, training), run(ours, inputs, training)
        for index, (e, g) in enumerate(zip(expected, got, strict=True)):
            e, g = e.double(), g.double()
            scale = max(e.norm(), expected[1].norm())
            assert (g - e).norm() <= 1e-9 * scale, (training, index, float((g - e).norm() / scale))


COUNTS = {  # norms, those with an activation, those with a sum
    # stem 1, 8 blocks of 2, 3 projections; the stem's, every first and every last norm have a relu
    "resnet18": (20, 17, 8),
    # stem 1, 16 blocks of 3, 4 projections
    "resnet50": (53, 49, 16),
}


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_timm_resnet(name):
    stock = randomize(models.timm().create_model(name, num_classes=10))
    ours = copy.deepcopy(stock)
    keys, parameters = list(ours.state_dict()), list(ours.parameters())
    assert batchops.convert(ours) is ours
    x = torch.randn(4, 3, 32, 32)
    calls = fused_calls(ours, x)
    assert len(set(calls)) == len(calls)
    assert (len(fused_norms(ours)), len(calls), sums(ours)) == COUNTS[name]
    assert fused_calls(ours, x, method="forward_features") == calls
    assert [n for n, m in ours.named_modules() if getattr(m, "fused_with", None)] == sorted(
        calls, key=[n for n, _ in ours.named_modules()].index
    )
    assert [type(m) for m in ours.modules()] == [
        {nn.BatchNorm2d: bnn.BatchNorm2d}.get(type(m), type(m)) for m in stock.modules()
    ]
    assert list(ours.state_dict()) == keys
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True))
    assert_same_as_stock(ours, stock, x)

    batchops.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert [set(m.__dict__) for m in ours.modules()] == [set(m.__dict__) for m in stock.modules()]
    assert all(
        torch.equal(a, b)
        for a, b in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True)
    )
    assert all(
        torch.equal(a, b) for a, b in zip(run(ours, [x], True), run(stock, [x], True), strict=True)
    )


@pytest.mark.parametrize("option", [{"drop_path_rate": 0.2}, {"block_args": {"attn_layer": "se"}}])
def test_timm_blocks_with_something_between_norm_and_sum_stay_in_steps(option):
    stock = models.timm().create_model("resnet18", num_classes=10, **option)
    ours = batchops.convert(copy.deepcopy(stock))
    # 8 first norms, the stem's, and under drop_path the first block, whose rate is 0
    blocks = 1 if "drop_path_rate" in option else 0
    x = torch.randn(2, 3, 64, 64)
    assert len(fused_calls(ours, x)) == 9 + blocks
    results = []
    for model in (ours, stock):
        torch.manual_seed(3)  # both draw the same paths
        results.append(model.double().train()(x.double()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def as_torchvision(monkeypatch, kind, name="BasicBlock"):
    return getattr(models.as_torchvision(monkeypatch, **{name: kind}), name)


def residual_net(kind):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        *(nn.BatchNorm2d(8), nn.ReLU(), kind(8, 8), kind(8, 16, stride=2)),
    )


@pytest.mark.parametrize(("name", "norms"), [("BasicBlock", 2), ("Bottleneck", 3)])
def test_torchvision_blocks(monkeypatch, name, norms):
    kind = as_torchvision(monkeypatch, getattr(models, name), name)
    stock = randomize(residual_net(kind))
    ours = batchops.convert(copy.deepcopy(stock))
    assert sums(ours) == 2
    x = torch.randn(4, 3, 16, 16)
    assert len(fused_calls(ours, x)) == 1 + 2 * norms
    assert ours[4].downsample[1].fused_with is None
    assert type(ours[3]) is kind
    assert_same_as_stock(ours, stock, x)
    before = repr(ours)
    assert repr(batchops.convert(ours)) == before

    expected = run(ours, [x], True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other[3].forward.module is other[3]
        assert all(torch.equal(a, b) for a, b in zip(run(other, [x], True), expected, strict=True))
        batchops.revert(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in stock.modules()]
        assert_same_behaviour(other, copy.deepcopy(stock), x)
    block = batchops.revert(copy.deepcopy(ours)[3])  # a whole block is a part that can go back
    assert [type(m) for m in block.modules()] == [type(m) for m in stock[3].modules()]


def test_blocks_need_no_known_name():
    ours = batchops.convert(residual_net(models.BasicBlock))
    calls = ["1", "3.bn1", "3.bn2", "4.bn1", "4.bn2"]
    assert fused_calls(ours, torch.randn(2, 3, 8, 8)) == calls


class OtherForward(models.BasicBlock):
    """The known name, and a scaled shortcut."""

    def forward(self, x):
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += 0.5 * (x if self.downsample is None else self.downsample(x))
        return self.relu(branch)


class KeepsState(models.BasicBlock):
    """The known name and output, by super(), and something done on the way."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        return super().forward(x)


@pytest.mark.parametrize("kind", [OtherForward, KeepsState])
def test_a_known_name_with_another_forward_stays(monkeypatch, kind):
    stock = residual_net(as_torchvision(monkeypatch, kind))
    ours = batchops.convert(copy.deepcopy(stock))
    assert sums(ours) == 0
    assert_same_behaviour(ours, stock, torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("before", [True, False], ids=["before convert", "after convert"])
@pytest.mark.parametrize("name", ["bn1", "bn2", "relu"])
def test_a_hook_inside_a_block_sees_what_it_saw(monkeypatch, name, before):
    stock = randomize(residual_net(as_torchvision(monkeypatch, models.BasicBlock)))
    ours, x = copy.deepcopy(stock), torch.randn(4, 3, 16, 16)
    if not before:
        batchops.convert(ours)
    seen = {}
    for model in (ours, stock):
        seen[model] = []
        model[3].get_submodule(name).register_forward_hook(
            lambda m, i, o, into=seen[model]: into.append(o.detach().clone())
        )
    if before:
        batchops.convert(ours)
    ours(x), stock(x)
    torch.testing.assert_close(seen[ours], seen[stock])
    assert seen[ours]
    # the block's other norm and the other block's are fused as before
    other = {"bn1": ["3.bn2"], "bn2": ["3.bn1"], "relu": []}[name]
    assert fused_calls(ours, x) == ["1", *other, "4.bn1", "4.bn2"]


def test_what_a_block_must_not_have_may_come_later():
    stock = models.timm().create_model("resnet18", num_classes=10)
    ours = batchops.convert(copy.deepcopy(stock))
    assert sums(ours) == 8
    for model in (ours, stock):
        model.layer1[0].se = nn.Sigmoid()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), stock(x))


def test_a_block_in_a_hooked_model_fuses_and_its_own_hooks_see_the_output(monkeypatch):
    ours, seen = residual_net(as_torchvision(monkeypatch, models.BasicBlock)), []
    ours[3].register_forward_hook(lambda m, i, o: seen.append(o))
    ours.register_forward_hook(lambda m, i, o: seen.append(o))
    batchops.convert(ours)
    assert sums(ours) == 2
    y = ours(torch.randn(2, 3, 8, 8))
    assert len(seen) == 2
    assert seen[1] is y


def test_a_norm_of_a_block_used_from_outside_does_what_it_did(monkeypatch):
    kind = as_torchvision(monkeypatch, models.BasicBlock)

    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = kind(4, 4)

        def forward(self, x):
            return self.block(x) + self.block.bn2(x)

    stock = Peeks()
    ours = batchops.convert(copy.deepcopy(stock))
    assert sums(ours) == 1
    assert_same_behaviour(ours, stock, torch.randn(4, 4, 8, 8))


def test_converted_blocks_compile_and_export(monkeypatch):
    torch._dynamo.reset()
    stock = residual_net(as_torchvision(monkeypatch, models.BasicBlock))
    ours = batchops.convert(randomize(stock)).eval()
    assert sums(ours) == 2
    x = torch.randn(2, 3, 8, 8)
    expected = ours(x)
    assert torch.equal(torch.compile(ours, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.export.export(ours, (x,)).module()(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_layout_survive(monkeypatch, dtype, layout):
    kind = as_torchvision(monkeypatch, models.Bottleneck, "Bottleneck")
    stock = randomize(residual_net(kind)).to(dtype).to(memory_format=layout)
    ours = batchops.convert(copy.deepcopy(stock))
    assert all(p.dtype == dtype for p in ours.parameters())
    x = torch.randn(4, 3, 16, 16, dtype=dtype).to(memory_format=layout)
    y = copy.deepcopy(ours)(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    assert_same_as_stock(ours, stock, x)


@pytest.mark.parametrize("amp_dtype", [torch.bfloat16])
def test_autocast(monkeypatch, amp_dtype):
    stock = randomize(residual_net(as_torchvision(monkeypatch, models.BasicBlock)))
    ours = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(4, 3, 16, 16)
    exact = copy.deepcopy(stock).double()(x.double())
    with torch.autocast("cpu", amp_dtype):
        mine, theirs = ours(x), stock(x)
    assert mine.dtype == theirs.dtype
    assert (mine - exact).norm() <= 2 * (theirs - exact).norm()


# ------------------------------------------------------------------- norms with their activation


def test_timm_norms_with_an_activation():
    models.timm()
    from timm.layers import BatchNormAct2d

    stock = randomize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            BatchNormAct2d(4),
            BatchNormAct2d(4, apply_act=False),
            nn.Conv2d(4, 4, 3),
            BatchNormAct2d(4, act_layer=nn.Tanh),  # no such activation in the norms
            BatchNormAct2d(4, drop_layer=nn.Dropout),
        )
    )
    ours = copy.deepcopy(stock)
    keys = list(ours.state_dict())
    batchops.convert(ours)
    # of timm's class still: what freezes a model, or synchronises its norms, asks for it
    assert all(isinstance(m, BatchNormAct2d) for m in ours if not isinstance(m, nn.Conv2d))
    assert [isinstance(m, bnn.BatchNorm2d) for m in ours] == [0, 1, 1, 0, 0, 0]
    assert [type(m) for m in (ours[4], ours[5])] == [BatchNormAct2d] * 2
    assert [m.activation for m in (ours[1], ours[2])] == ["relu", None]
    assert list(ours.state_dict()) == keys
    x = torch.randn(4, 3, 8, 8)
    assert_same_behaviour(ours, stock, x)
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), ours):
        assert [type(m) for m in other] == [type(m) for m in ours]
        double = x.double()  # as assert_same_behaviour leaves the models
        assert torch.equal(copy.deepcopy(other).eval()(double), copy.deepcopy(ours).eval()(double))
        batchops.revert(other)
        assert [type(m) for m in other] == [type(m) for m in stock]
    assert_same_behaviour(ours, stock, x)


def test_timm_freezes_a_converted_norm_with_its_activation():
    models.timm()
    from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
    from timm.utils.model import freeze

    stock = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4)))
    ours = batchops.convert(copy.deepcopy(stock))
    for model in (stock, ours):
        freeze(model)
        assert type(model[1]) is FrozenBatchNormAct2d
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(ours(x), stock(x))


def test_timm_norm_with_a_hook_on_its_activation_stays():
    models.timm()
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(4)
    norm.act.register_forward_hook(lambda m, i, o: None)
    assert type(batchops.convert(nn.Sequential(norm))[0]) is BatchNormAct2d


def test_timm_norms_with_an_activation_stay_without_fuse():
    models.timm()
    from timm.layers import BatchNormAct2d

    assert type(batchops.convert(nn.Sequential(BatchNormAct2d(4)), fuse=False)[0]) is BatchNormAct2d


@pytest.mark.parametrize("fuse", [True, False])
def test_timm_norms_that_do_what_torchs_do(fuse):
    models.timm()
    from timm.layers import GroupNorm, GroupNorm1, LayerNorm, LayerNorm2d

    class Mine(LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    fast = LayerNorm(8)
    fast._fast_norm = True
    stock = randomize(
        nn.Sequential(
            *(nn.Conv2d(3, 4, 3), GroupNorm(4, 2), nn.SiLU(), GroupNorm1(4), LayerNorm2d(4)),
            *(LayerNorm(8), Mine(8), fast),
        )
    )
    ours = copy.deepcopy(stock)
    keys = list(ours.state_dict())
    batchops.convert(ours, fuse=fuse)
    assert [type(m) for m in ours] == [
        *(nn.Conv2d, bnn.GroupNorm, nn.SiLU, bnn.GroupNorm),
        *(LayerNorm2d, bnn.LayerNorm, Mine, LayerNorm),
    ]
    assert ours[1].fused_with == ("silu" if fuse else None)
    assert list(ours.state_dict()) == keys
    x = torch.randn(4, 3, 10, 10)
    assert_same_behaviour(ours, stock, x)
    for other in (pickle.loads(pickle.dumps(nn.Sequential(*ours[:6]))), copy.deepcopy(ours), ours):
        batchops.revert(other)
        assert all(type(m) is type(was) for m, was in zip(other, stock, strict=False))
    assert_same_behaviour(ours, stock, x)


def test_a_vision_transformer_of_timm():
    of = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    stock = randomize(models.timm().create_model("vit_tiny_patch16_224", num_classes=10, **of))
    ours = batchops.convert(copy.deepcopy(stock))
    assert [type(m) for m in ours.modules() if isinstance(m, nn.LayerNorm)] == [bnn.LayerNorm] * 5
    assert_same_as_stock(ours, stock, torch.randn(4, 3, 32, 32))
    batchops.revert(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert [set(m.__dict__) for m in ours.modules()] == [set(m.__dict__) for m in stock.modules()]


# -------------------------------------------------------------------------------- a diffusion UNet


class UNet(nn.Module):
    def __init__(self, norm, act):
        super().__init__()
        self.blocks = nn.ModuleList(models.UNetBlock(8, norm, act) for _ in range(2))

    def forward(self, x, embedding):
        for block in self.blocks:
            x = block(x, embedding)
        return x


@pytest.mark.parametrize(
    ("norm", "act", "name"),
    [
        (nn.BatchNorm2d, nn.ReLU, "relu"),
        (nn.BatchNorm2d, nn.SiLU, "silu"),
        (nn.GroupNorm, nn.SiLU, "silu"),
    ],
    ids=["batch norm, relu", "batch norm, silu", "group norm, silu"],
)
def test_unet_blocks(norm, act, name):
    models.needs(norm, name)
    stock = UNet(norm, act)
    ours = batchops.convert(copy.deepcopy(stock))
    for block in ours.blocks:
        for fused, place in ((block.norm1, block.act1), (block.norm2, block.act2)):
            assert type(fused) is getattr(bnn, norm.__name__)
            assert fused.fused_with == name
            assert type(place) is act
        assert block.embed[0] is not block.act1
    inputs = torch.randn(3, 8, 6, 6), torch.randn(3, 6)
    assert fused_calls(ours, *inputs) == [f"blocks.{b}.norm{n}" for b in (0, 1) for n in (1, 2)]
    # dropout included: both draw the same numbers
    assert_same_as_stock(ours, stock, torch.randn(3, 8, 6, 6), torch.randn(3, 6))
    assert unfused(batchops.revert(ours))


def test_a_block_that_is_given_another_class():
    """As fully_shard and replicate do."""
    stock = models.timm().create_model("resnet18")
    ours = batchops.convert(copy.deepcopy(stock))
    block = ours.layer1[0]
    x = torch.randn(2, 64, 8, 8)
    expected = block.train()(x)
    block.__class__ = type("Sharded", (type(block),), {})
    for other in (block, copy.deepcopy(block)):
        torch.testing.assert_close(other.train()(x), expected)


def test_sync_batch_norm_takes_no_activation_away():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    batchops.convert(model)
    # the ReLU is a module of its own still
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert [type(m) for m in synced[1:]] == [nn.SyncBatchNorm, nn.ReLU, nn.SyncBatchNorm]
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(synced.eval()(x), copy.deepcopy(model).eval()(x))
    built = nn.Sequential(bnn.BatchNorm2d(4, activation="relu"))
    with pytest.raises(RuntimeError, match=r"call batchops\.revert"):
        nn.SyncBatchNorm.convert_sync_batchnorm(built)
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model[3]))
    assert type(alone) is nn.SyncBatchNorm
    assert not hasattr(model[1], "qconfig")
    model[1].qconfig = "of torch.ao"
    assert copy.deepcopy(model)[1].qconfig == "of torch.ao"
    del model[1].qconfig
    assert not hasattr(model[1], "qconfig")
    with pytest.raises(AttributeError):
        del model[1].qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated as a whole
        torch.ao.quantization.quantize_dynamic(model)
    back = nn.SyncBatchNorm.convert_sync_batchnorm(batchops.revert(model))
    assert [type(m) for m in back[1:]] == [nn.SyncBatchNorm, nn.ReLU, nn.SyncBatchNorm]


# ------------------------------------------------------------------- ResNets for small images


@pytest.mark.parametrize(
    ("block", "calls"),
    [
        # the stem's, and in each of four blocks all norms but the projection's
        (models.SmallBlock, 1 + 4 * 2),
        (models.SmallBottleneck, 1 + 4 * 3),
        (models.PreActivated, 1 + 4 * 2),
        (models.OptionalProjection, 1 + 4 * 2),
    ],
)
def test_small_resnets(block, calls):
    stock = randomize(models.SmallResNet(block, counts=(2, 2), width=8))
    ours = batchops.convert(copy.deepcopy(stock))
    x = torch.randn(4, 3, 16, 16)
    assert len(fused_calls(ours, x)) == calls
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert_same_as_stock(ours, stock, x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert len(fused_calls(other, x)) == calls
    batchops.revert(ours)
    assert [set(m.__dict__) for m in ours.modules()] == [set(m.__dict__) for m in stock.modules()]
    assert all(
        torch.equal(a, b) for a, b in zip(run(ours, [x], True), run(stock, [x], True), strict=True)
    )
