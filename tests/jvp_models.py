"""Tiny networks of the kinds that people sample from, with weights that leave no layer at zero.

Weights and inputs are representable in bfloat16, so that one float64 truth serves every dtype.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[..., Tensor]


@dataclass
class Case:
    """A model in float32, how to call it, and its inputs (x first) for three samples."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    call: Callable[[nn.Module], Call] = lambda model: model  # model -> function of the inputs
    rounds_to_float32: str = ""  # the module whose code computes parts in float32 whatever the model's dtype
    autocast: bool = False  # reduced precision is reached by autocast alone
    name: str = ""
    vectors: Tensor = field(init=False)
    models: dict[torch.dtype, nn.Module] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        randomise(self.model)
        self.inputs = tuple(representable(item) for item in self.inputs)
        self.vectors = representable(torch.randn(3, *self.inputs[0].shape))

    def at(self, dtype: torch.dtype) -> tuple[Call, tuple[Tensor, ...], Tensor]:
        """The call of the model in a dtype, its inputs and three directions; the same model object every time."""
        if self.autocast and dtype is not torch.float64:
            dtype = torch.float32
        if dtype not in self.models:
            self.models[dtype] = model = in_dtype(self.model, dtype)
            if isinstance(vars(model).get("dtype"), torch.dtype):  # torchcfm's networks cast their input to it
                model.dtype = dtype  # type: ignore[assignment]
        inputs = tuple(item.to(dtype) if item.is_floating_point() else item for item in self.inputs)
        return self.call(self.models[dtype]), inputs, self.vectors.to(dtype)

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor]:
        """Value and tangents by torch in float64."""
        with self.precision(torch.float64):
            return forward_mode(*self.at(torch.float64))

    @contextmanager
    def precision(self, dtype: torch.dtype) -> Iterator[None]:
        """float64: no detour through float32; bfloat16: autocast where the model knows no other way to it."""
        with ExitStack() as stack:
            if self.autocast and dtype is torch.bfloat16:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            if self.rounds_to_float32 and dtype is torch.float64:
                stack.enter_context(float64_stays(self.rounds_to_float32))
            yield


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy; diffusers' own `.to` warns about modules that it would keep in float32, of which there are none here."""
    model = copy.deepcopy(model)
    for module in model.modules():
        nn.Module.to(module, dtype)
    return model


@contextmanager
def float64_stays(module: str) -> Iterator[None]:
    """Casts to float32 leave float64 alone, and time embeddings are widened: what a float64 model would be."""
    to_float32, to = torch.Tensor.float, torch.Tensor.to
    owner: Any = importlib.import_module(module)
    with ExitStack() as stack:
        stay = lambda x, *rest: x if x.dtype is torch.float64 else to_float32(x, *rest)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "float", stay))
        keep = lambda x, *rest, **options: x if _narrows(x, rest) else to(x, *rest, **options)  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "to", keep))
        if hasattr(owner, "timestep_embedding"):
            embed = owner.timestep_embedding
            stack.enter_context(mock.patch.object(owner, "timestep_embedding", lambda *rest: embed(*rest).double()))
        yield


def _narrows(x: Tensor, arguments: tuple[Any, ...]) -> bool:
    return x.dtype is torch.float64 and arguments == (torch.float32,)


@contextmanager
def differentiable() -> Iterator[None]:
    """What torch.func.jvp needs: attention that has a forward derivative, and dense inputs of group_norm."""
    group_norm = F.group_norm
    dense = lambda x, *rest, **options: group_norm(x.contiguous(), *rest, **options)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH), mock.patch.object(F, "group_norm", dense):
        yield


def forward_mode(call: Call, inputs: tuple[Tensor, ...], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own value and tangents, vectorised over the directions."""
    x, *rest = inputs

    def push(vector: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(lambda x: call(x, *rest), (x,), (vector,))  # type: ignore[return-value]

    with differentiable(), torch.no_grad():
        out, tangents = torch.func.vmap(push, out_dims=(None, 0), randomness="same")(vectors)
    return out, tangents


def representable(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Random weights everywhere, gains of norms about 1; nothing that starts at zero stays there."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                new = torch.randn_like(parameter) / parameter[0].numel() ** 0.5
            elif name == "weight":
                new = 1 + 0.2 * torch.randn_like(parameter)
            else:
                new = 0.2 * torch.randn_like(parameter)
            parameter.copy_(representable(new))
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(representable(0.3 * torch.randn_like(module.running_mean)))
            module.running_var.copy_(representable(0.5 + torch.rand_like(module.running_var)))
    model.eval()


# -- multilayer perceptrons ------------------------------------------------------------------------------------------
class VelocityMLP(nn.Module):
    """v(t, x) with x and t joined, as flow-matching tutorials write it; one kind of activation a layer."""

    def __init__(self, width: int = 24, activations: tuple[nn.Module, ...] = (nn.SiLU(), nn.GELU(), nn.Tanh())) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(5 + 1, width)]
        for activation in activations:
            layers += [activation, nn.Linear(width, width)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None].expand(x.shape[0], 1)], dim=-1))  # type: ignore[no-any-return]


def mlp() -> Case:
    return Case(VelocityMLP(), (torch.randn(3, 5), torch.rand(3)))


def mlp_of_activations() -> Case:
    kinds = (
        nn.ReLU(), nn.GELU("tanh"), nn.Softplus(), nn.LeakyReLU(0.1), nn.ELU(), nn.SELU(), nn.Mish(), nn.Sigmoid(),
        nn.Hardtanh(-2, 2), nn.LogSigmoid(), nn.Softplus(2.0), nn.PReLU(),
    )  # fmt: skip
    return Case(VelocityMLP(16, kinds), (torch.randn(3, 5), torch.rand(3)))


# -- a residual network with batch norm ------------------------------------------------------------------------------
class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += self.shortcut(x)
        return self.relu(h)  # type: ignore[no-any-return]


class ResNetField(nn.Module):
    """Down, up again by a transposed convolution, the time as one more channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = self.stem(torch.cat([x, time], 1))
        return self.head(h + self.up(self.blocks(h)))  # type: ignore[no-any-return]


def resnet() -> Case:
    return Case(ResNetField(), (torch.randn(3, 3, 8, 8), torch.rand(3)))


# -- diffusers -------------------------------------------------------------------------------------------------------
def _diffusers(name: str, **options: Any) -> nn.Module:
    return getattr(pytest.importorskip("diffusers"), name)(**options)  # type: ignore[no-any-return]


def unet() -> Case:
    model = _diffusers(
        "UNet2DModel", sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    call = lambda model: lambda x, t: model(x, t).sample  # noqa: E731
    return Case(model, (torch.randn(3, 3, 8, 8), torch.tensor([3.0, 5.0, 8.0])), call)


def conditional_unet() -> Case:
    model = _diffusers(
        "UNet2DConditionModel", sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    call = lambda model: lambda x, t, text: model(x, t, text).sample  # noqa: E731
    return Case(model, (torch.randn(3, 4, 8, 8), torch.tensor([3.0, 5.0, 8.0]), torch.randn(3, 7, 12)), call)


def dit() -> Case:
    model = _diffusers(
        "DiTTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    call = lambda model: lambda x, t, label: model(x, timestep=t, class_labels=label).sample  # noqa: E731
    return Case(model, (torch.randn(3, 4, 8, 8), torch.tensor([3, 5, 8]), torch.tensor([1, 2, 7])), call)


def sd3() -> Case:
    model = _diffusers(
        "SD3Transformer2DModel", sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=6,
        out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([3.0, 5.0, 8.0]), torch.randn(3, 5, 12), torch.randn(3, 6)

    def call(model: nn.Module) -> Call:
        return lambda x, t, text, pooled: model(x, text, pooled, t, return_dict=False)[0]

    return Case(model, inputs, call, rounds_to_float32="diffusers")


def flux() -> Case:
    model = _diffusers(
        "FluxTransformer2DModel", patch_size=1, in_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    inputs = torch.randn(3, 9, 4), torch.tensor([0.125, 0.25, 0.5]), torch.randn(3, 5, 12), torch.randn(3, 6)
    image_ids = torch.stack(
        [torch.zeros(9), *(item.flatten() for item in torch.meshgrid(*(torch.arange(3.0),) * 2, indexing="ij"))], 1
    )

    def call(model: nn.Module) -> Call:
        ids = {"img_ids": image_ids, "txt_ids": torch.zeros(5, 3)}
        return lambda x, t, text, pooled: model(
            x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False, **ids
        )[0]

    return Case(model, inputs, call, rounds_to_float32="diffusers")


def pixart() -> Case:
    model = _diffusers(
        "PixArtTransformer2DModel", num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=1, cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=12,
    )  # fmt: skip
    mask = (torch.arange(7) < torch.tensor([[7], [4], [6]])).float()
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([3, 5, 8]), torch.randn(3, 7, 12), mask
    conditions = {"resolution": None, "aspect_ratio": None}

    def call(model: nn.Module) -> Call:
        return lambda x, t, text, mask: model(x, text, t, conditions, encoder_attention_mask=mask, return_dict=False)[0]

    return Case(model, inputs, call)


def autoencoder() -> Case:
    model = _diffusers(
        "AutoencoderKL", block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
    )  # fmt: skip
    return Case(model, (torch.randn(3, 4, 4, 4),), lambda model: lambda z: model.decode(z).sample)


# -- torchcfm --------------------------------------------------------------------------------------------------------
def flow_matching_unet() -> Case:
    wrapper = pytest.importorskip("torchcfm.models.unet.unet").UNetModelWrapper
    model = wrapper(
        dim=(3, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 1), attention_resolutions="4", num_heads=2,
        use_scale_shift_norm=True, resblock_updown=True, class_cond=True, num_classes=4,
    )  # fmt: skip
    call = lambda model: lambda x, t, y: model(t, x, y)  # noqa: E731
    inputs = torch.randn(3, 3, 8, 8), torch.tensor([0.25, 0.5, 0.75]), torch.tensor([0, 3, 1])
    return Case(model, inputs, call, rounds_to_float32="torchcfm.models.unet.unet", autocast=True)


DIFFUSERS = {
    "UNet2DModel": unet,
    "UNet2DConditionModel": conditional_unet,
    "DiTTransformer2DModel": dit,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
    "AutoencoderKL.decode": autoencoder,
}
CASES = {
    "MLP": mlp,
    "MLP of many activations": mlp_of_activations,
    "ResNet": resnet,
    **DIFFUSERS,
    "torchcfm": flow_matching_unet,
}
