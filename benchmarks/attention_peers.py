"""transformers' attention layers, as their users run them: a grid `[B, S, D]` in, one out.

Each with the projections that our layer has, the output's too where transformers keeps it in another module.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Peer = Callable[[int, int, int], nn.Module]  # width, heads, length -> [B, S, D] -> [B, S, D]


class _Called(nn.Module):
    """A layer whose result is the first of a tuple, and the output projection that stands elsewhere."""

    def __init__(self, layer: nn.Module, width: int, **arguments: object) -> None:
        super().__init__()
        self.layer, self.arguments = layer, arguments
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, **self.arguments)
        return self.output(y[0] if isinstance(y, tuple) else y)


def bert(width: int, heads: int, length: int) -> nn.Module:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertSelfAttention

    config = BertConfig(hidden_size=width, num_attention_heads=heads, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    return _Called(BertSelfAttention(config), width)


def convbert(width: int, heads: int, length: int) -> nn.Module:
    from transformers import ConvBertConfig
    from transformers.models.convbert.modeling_convbert import ConvBertSelfAttention

    config = ConvBertConfig(
        hidden_size=width, num_attention_heads=heads, head_ratio=2, conv_kernel_size=9, attention_probs_dropout_prob=0.0
    )
    return _Called(ConvBertSelfAttention(config), width)


def nystromformer(width: int, heads: int, length: int) -> nn.Module:
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=width,
        num_attention_heads=heads,
        segment_means_seq_len=length,
        num_landmarks=min(64, length),
        conv_kernel_size=33,
        attention_probs_dropout_prob=0.0,
    )
    return _Called(NystromformerSelfAttention(config), width)


class _Longformer(nn.Module):
    """A window of 64 tokens to each side, no global tokens."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = LongformerConfig(
            hidden_size=width,
            num_attention_heads=heads,
            attention_window=[min(128, length)],
            attention_probs_dropout_prob=0.0,
        )
        self.layer = LongformerSelfAttention(config, 0)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], device=x.device)
        y = self.layer(
            x,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=False,
        )
        return self.output(y[0])


def longformer(width: int, heads: int, length: int) -> nn.Module:
    return _Longformer(width, heads, length)


EVERY_LENGTH = 10**9
# Each with the longest sequences it is asked for: ConvBERT's layer holds all scores of all heads.
PEERS: dict[str, tuple[Peer, int]] = {
    "BERT": (bert, EVERY_LENGTH),
    "ConvBERT": (convbert, 2048),
    "Longformer": (longformer, EVERY_LENGTH),
    "Nystromformer": (nystromformer, EVERY_LENGTH),
}
