"""Heads that draw heatmaps: ViTPose's deconvolutions of the token grid, or keypoint queries."""

from __future__ import annotations

from torch import Tensor, nn

from cmpose.config import ModelConfig
from cmpose.models.layers import Conv2d, ConvTranspose2d, LayerNorm, Linear, MultiheadAttention
from cmpose.models.vit import MLP, NORM_EPS, PATCH

STRIDE = 4
"""Input pixels per heatmap pixel, in both heads."""


class DeconvHead(nn.Module):
    """ViTPose's classic head: two stride-2 deconvolutions, then a 1×1 convolution.

    [B, N, D] → [B, K, h, w].
    """

    def __init__(self, width: int, grid: tuple[int, int], config: ModelConfig) -> None:
        super().__init__()
        self.grid = grid
        channels = config.head_channels
        layers: list[nn.Module] = []
        for in_channels in (width, channels):
            layers += [
                ConvTranspose2d(in_channels, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        self.deconv_layers = nn.Sequential(*layers)
        self.final_layer = Conv2d(channels, config.num_keypoints, 1)

    def reset(self) -> None:
        """Starts as ViTPose does: normal weights of standard deviation 0.001."""
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
                nn.init.normal_(module.weight, std=0.001)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, grid_tokens: Tensor) -> Tensor:
        B, _, D = grid_tokens.shape
        x = grid_tokens.transpose(1, 2).reshape(B, D, *self.grid)
        return self.final_layer(self.deconv_layers(x))


class TokenHead(nn.Module):
    """Keypoint queries cross-attend the fine tokens; a linear map of each query is its heatmap.

    queries [B, K, D], tokens [B, M, D] → [B, K, h, w].
    """

    def __init__(self, width: int, heads: int, grid: tuple[int, int], config: ModelConfig) -> None:
        super().__init__()
        self.heatmap_size = (grid[0] * PATCH // STRIDE, grid[1] * PATCH // STRIDE)
        self.norm_queries = LayerNorm(width, eps=NORM_EPS)
        self.norm_tokens = LayerNorm(width, eps=NORM_EPS)
        self.attention = MultiheadAttention(width, heads, batch_first=True)
        self.norm_mlp = LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.norm_out = LayerNorm(width, eps=NORM_EPS)
        self.out = Linear(width, self.heatmap_size[0] * self.heatmap_size[1])

    def reset(self) -> None:
        """Starts with nearly empty heatmaps, as the deconvolution head does."""
        nn.init.normal_(self.out.weight, std=0.001)
        nn.init.zeros_(self.out.bias)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        keys = self.norm_tokens(tokens)
        queries = queries + self.attention(self.norm_queries(queries), keys, keys)
        queries = queries + self.mlp(self.norm_mlp(queries))
        return self.out(self.norm_out(queries)).unflatten(-1, self.heatmap_size)
