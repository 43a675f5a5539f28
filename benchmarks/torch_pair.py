"""The published joint step in PyTorch, the baseline of `benchmarks.against_torch`.

Parameters correspond to ours one to one, by the same names: `stage1_0/conv1/kernel` is `stage1_0.conv1.weight`. The
adapter uses the published names, including their misspelling, as written by `mj.transfers.export_published_adapter`.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # noqa: N812  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

import merge_jax as mj

__all__ = ["Adapter", "JointTraining", "load_model", "mobilenet_v2", "resnet"]


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, `[B, C, H, W] -> [B, 4 width, H/s, W/s]`."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.projects = stride != 1 or channels != 4 * width
        if self.projects:
            self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = F.relu(self.norm2(self.conv2(y)), inplace=True)
        y = self.norm3(self.conv3(y))
        shortcut = self.shortcut_norm(self.shortcut(x)) if self.projects else x
        return F.relu(y + shortcut, inplace=True)


def resnet(stages: Sequence[tuple[int, int, int]], num_classes: int, stem_width: int = 64) -> nn.Sequential:
    """Returns a ResNet of bottlenecks, images `[B, 3, H, W]` to logits `[B, num_classes]`.

    Args:
      stages: width, number of blocks and first stride of each stage, as in `mj.models.ResNet`.
      num_classes: size of the output.
      stem_width: channels after the stem.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(3, stem_width, 3, padding=1, bias=False),
        stem_norm=nn.BatchNorm2d(stem_width),
        stem_activation=nn.ReLU(inplace=True),
    )
    channels = stem_width
    for i, (width, blocks, first_stride) in enumerate(stages, start=1):
        for j in range(blocks):
            modules[f"stage{i}_{j}"] = _Bottleneck(channels, width, first_stride if j == 0 else 1)
            channels = 4 * width
    modules.update(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(channels, num_classes))
    return nn.Sequential(modules)


class _InvertedResidual(nn.Module):
    """Expand (1x1), filter (3x3 depthwise), project (1x1), `[B, C, H, W] -> [B, width, H/s, W/s]`."""

    def __init__(self, channels: int, expansion: int, width: int, stride: int) -> None:
        super().__init__()
        inner = expansion * channels
        self.expand = nn.Conv2d(channels, inner, 1)
        self.expand_norm = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner)
        self.depthwise_norm = nn.BatchNorm2d(inner)
        self.project = nn.Conv2d(inner, width, 1)
        self.project_norm = nn.BatchNorm2d(width)
        self.adds = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand_norm(self.expand(x)), inplace=True)
        y = F.relu6(self.depthwise_norm(self.depthwise(y)), inplace=True)
        y = self.project_norm(self.project(y))
        return x + y if self.adds else y


def mobilenet_v2(
    stages: Sequence[tuple[int, int, int, int]], num_classes: int, stem_width: int = 32, head_width: int = 1280
) -> nn.Sequential:
    """Returns a MobileNetV2 with a padded 1x1 stem, images `[B, 3, H, W]` to logits `[B, num_classes]`.

    Args:
      stages: expansion, width, number of blocks and first stride of each stage, as in `mj.models.MobileNetV2`.
      num_classes: size of the output.
      stem_width: channels after the stem.
      head_width: channels before the pooling.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(3, stem_width, 1, padding=1),
        stem_norm=nn.BatchNorm2d(stem_width),
        stem_activation=nn.ReLU6(inplace=True),
    )
    channels = stem_width
    for i, (expansion, width, blocks, first_stride) in enumerate(stages, start=1):
        for j in range(blocks):
            modules[f"stage{i}_{j}"] = _InvertedResidual(channels, expansion, width, first_stride if j == 0 else 1)
            channels = width
    modules.update(
        head=nn.Conv2d(channels, head_width, 1),
        head_norm=nn.BatchNorm2d(head_width),
        head_activation=nn.ReLU6(inplace=True),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(head_width, num_classes),
    )
    return nn.Sequential(modules)


def load_model(module: nn.Module, params: Any, batch_stats: Any) -> None:
    """Copies a Flax model's parameters and running statistics into the module of the same names.

    A leaf's matrix is `[out, in x window]`, which reshapes to torch's `[out, in, kh, kw]`.
    """
    torch_names = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
    state = module.state_dict()
    loaded = {name: array for name, array in state.items() if name.endswith("num_batches_tracked")}
    leaves: dict[str, Any] = jax.device_get({**mj.flatten(params), **mj.flatten(batch_stats)})
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        name = ".".join([*parents, torch_names.get(last, last)])
        matrix = np.array(mj.layouts.as_matrix(leaf, mj.layouts.matrix_spec(path, leaf.shape)))
        loaded[name] = torch.from_numpy(matrix).reshape(state[name].shape)
    module.load_state_dict(loaded)


class _Attention(nn.Module):
    """Rows of `x [r, c]` attend to rows of `y [s, k]`: `LayerNorm(x + attention)`, `[r, c]`."""

    def __init__(self, query_size: int, key_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        features = max((query_size + key_size) // 2, 128) // num_heads * num_heads
        self.fc_q = nn.Linear(query_size, features)
        self.fc_k = nn.Linear(key_size, features)
        self.fc_v = nn.Linear(key_size, features)
        self.fc_output = nn.Linear(features, query_size)
        self.norm = nn.LayerNorm(query_size, eps=1e-12)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = (
            # [1, h, r, d]: only with a batch are the fast kernels considered.
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)[None]
            for projection, tokens in ((self.fc_q, x), (self.fc_k, y), (self.fc_v, y))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)
        return self.norm(x + self.fc_output(mixed[0].transpose(0, 1).flatten(1)))


class _FeedForward(nn.Module):
    """`LayerNorm(x + Dropout(down(gelu(up(x)))))`, both weights divided by their spectral norms, `[m, n] -> [m, n]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.dense_up = nn.utils.parametrizations.spectral_norm(nn.Linear(size, 2 * size))
        self.dense_dowm = nn.utils.parametrizations.spectral_norm(nn.Linear(2 * size, size))
        self.dropout = nn.Dropout(0.2)
        self.layernorm = nn.LayerNorm(size, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense_dowm(F.gelu(self.dense_up(x), approximate="tanh"))
        return self.layernorm(x + self.dropout(y))


class _TransferLayer(nn.Module):
    """Four attentions between rows (x) and columns (y) of two matrices, averaged, then a feed-forward block."""

    def __init__(self, target_shape: Sequence[int], source_shape: Sequence[int], num_heads: int) -> None:
        super().__init__()
        (m, n), (p, q) = target_shape, source_shape
        self.attention_x_x = _Attention(n, q, num_heads)
        self.attention_x_y = _Attention(n, p, num_heads)
        self.attention_y_x = _Attention(m, q, num_heads)
        self.attention_y_y = _Attention(m, p, num_heads)
        self.output = _FeedForward(n)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        rows = self.attention_x_x(target, source) + self.attention_x_y(target, source.T)
        columns = self.attention_y_x(target.T, source) + self.attention_y_y(target.T, source.T)
        return self.output((rows + columns.T) / 4)


class Adapter(nn.ModuleList):
    """The published adapter: a stack of transfer layers, target `[m, n]` and source `[p, q]` to `[m, n]`."""

    def __init__(
        self, target_shape: Sequence[int], source_shape: Sequence[int], num_layers: int = 2, num_heads: int = 8
    ) -> None:
        """Makes the adapter for a target `[m, n]` and a source `[p, q]`."""
        super().__init__(_TransferLayer(target_shape, source_shape, num_heads) for _ in range(num_layers))

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        """Maps target and source to the new target matrix."""
        for layer in self:
            target = layer(target, source)
        return target


class JointTraining:
    """Source, target and adapter while they train, as published with the update `surrogate`; one step a call."""

    def __init__(
        self,
        source: nn.Module,
        target: nn.Module,
        adapter: Adapter,
        route: tuple[str, str],
        *,
        cycle: int | None,
        adapter_learning_rate: float = 1e-3,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """Takes over the modules, which are trained in place: give copies where they serve again.

        Args:
          source: the model that gives.
          target: the model that receives.
          adapter: the adapter of the two routed weights.
          route: the target's module and the source's, by their torch names, whose weights are routed.
          cycle: steps from one transfer to the next, or None for two plain training steps.
          adapter_learning_rate: of AdamW.
          channels_last: the memory format of both models and their images.
          compiled: run both models and the adapter through `torch.compile`.
        """
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        for model in (source, target):
            model.to(memory_format=self._format)  # pyright: ignore[reportCallIssue]  # Missing from its stubs.
        # Convolutions and dense layers alike: the weight itself, which `_matrix` reads and the transfer writes into.
        self._receiver = target.get_submodule(route[0]).get_parameter("weight")
        self._giver = source.get_submodule(route[1]).get_parameter("weight")
        self._source_optimizer, self._target_optimizer = (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for model in (source, target)
        )
        self._adapter_parameters = list(adapter.parameters())
        # Kernels decay; biases and LayerNorms, all of them vectors, do not.
        groups = [
            {"params": [p for p in self._adapter_parameters if p.ndim > 1], "weight_decay": 5e-4},
            {"params": [p for p in self._adapter_parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._adapter_optimizer = torch.optim.AdamW(groups, lr=adapter_learning_rate)
        self._source, self._target, self._adapter = (
            torch.compile(module) if compiled else module for module in (source, target, adapter)
        )
        self._cycle = cycle
        self._steps = 0

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Takes one step of all on one batch `[B, 3, H, W]`, `[B]`; returns the losses of source and target."""
        images = images.contiguous(memory_format=self._format)
        transfers = self._cycle is not None and self._steps % self._cycle == 0
        self._steps += 1
        proposal = self._transfer() if transfers else None
        source_loss = _learn(self._source, self._source_optimizer, images, labels)
        target_loss = _learn(self._target, self._target_optimizer, images, labels)
        if proposal is not None:
            self._learn_adapter(proposal)
        return source_loss, target_loss

    def _transfer(self) -> Tensor:
        # Clones, since both weights are written into before the adapter's backward pass reads these.
        proposal = self._adapter(_matrix(self._receiver).clone(), _matrix(self._giver).clone())
        with torch.no_grad():
            self._receiver.copy_(proposal.view_as(self._receiver))
        return proposal

    def _learn_adapter(self, proposal: Tensor) -> None:
        """Draws the adapter's output to where the target's optimizer went."""
        self._adapter_optimizer.zero_grad()
        proposal.backward(proposal.detach() - _matrix(self._receiver))
        nn.utils.clip_grad_norm_(self._adapter_parameters, 50.0)
        self._adapter_optimizer.step()


def _matrix(weight: Tensor) -> Tensor:
    return weight.detach().flatten(1)


def _learn(
    model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
