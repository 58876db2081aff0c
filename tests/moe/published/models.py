"""Small models of every published architecture, made here by transformers with random weights that matter."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="the referee is transformers, of the extra hf")

VOCABULARY, LENGTH = 40, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
BERTS = {**SIZES, "max_position_embeddings": 20}
DISTILLED = {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
MODERN = {
    **SIZES,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "cls_token_id": 2,
    "sep_token_id": 1,
    "local_attention": 6,
}


class Case(NamedTuple):
    family: str  # as transformers' classes are named
    config: dict[str, Any]
    segments: bool = False


CASES = {
    "bert": Case("Bert", BERTS, segments=True),
    "roberta": Case("Roberta", {**BERTS, "layer_norm_eps": 1e-5, "type_vocab_size": 1}),
    "xlm-roberta": Case("XLMRoberta", {**BERTS, "type_vocab_size": 1}),
    "camembert": Case("Camembert", {**BERTS, "pad_token_id": 3, "type_vocab_size": 1}),
    "electra": Case("Electra", {**BERTS, "embedding_size": 16}, segments=True),
    "electra-small": Case("Electra", {**BERTS, "embedding_size": 8}, segments=True),
    "distilbert": Case("DistilBert", {**DISTILLED, "max_position_embeddings": 20}),
    "distilbert-sinusoidal": Case(
        "DistilBert", {**DISTILLED, "max_position_embeddings": 20, "sinusoidal_pos_embds": True}
    ),
    "mpnet": Case("MPNet", BERTS),
    "modernbert": Case("ModernBert", MODERN),
    "modernbert-biased": Case(
        "ModernBert", {**MODERN, "attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
    ),
    "convbert": Case("ConvBert", {**BERTS, "embedding_size": 16, "conv_kernel_size": 5}, segments=True),
    "convbert-small": Case(
        "ConvBert",
        {**BERTS, "num_attention_heads": 4, "head_ratio": 4, "embedding_size": 8, "num_groups": 2},
        segments=True,
    ),
}


def published(name: str, purpose: str = "ForMaskedLM") -> Any:
    """One of `CASES` in evaluation mode; `purpose` is how its class's name ends, "Model" for the encoder alone."""
    case = CASES[name]
    config = getattr(transformers, f"{case.family}Config")(**case.config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{case.family}{purpose}")(config)
        for parameter in model.parameters():  # fresh ones are small, and biases zero
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Batch(NamedTuple):
    ids: Tensor  # [B, L]
    mask: Tensor  # [B, L]
    segments: Tensor  # [B, L]


def padded_batch(pad: int = 1) -> Batch:
    """Sequences of several lengths, right-padded; no real token is one of the special ones."""
    lengths = (LENGTH, 5, 1, 8)
    mask = torch.tensor([[1] * n + [0] * (LENGTH - n) for n in lengths])
    ids = torch.randint(4, VOCABULARY, mask.shape).where(mask.bool(), pad)
    return Batch(ids, mask, (torch.arange(LENGTH) >= 4).long().expand_as(ids) * mask)


def outputs(model: Any, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """A published masked language model's last states `[B, L, D]` and logits `[B, L, V]`."""
    given: dict[str, Any] = {"token_type_ids": batch.segments} if CASES[name].segments else {}
    with torch.no_grad():
        answer = model(batch.ids, attention_mask=batch.mask, output_hidden_states=True, **given)
        states = model.base_model(batch.ids, attention_mask=batch.mask, **given).last_hidden_state
    return states, answer.logits


def off(found: Tensor, right: Tensor) -> float:
    """The largest difference, in parts of the largest number."""
    return float(((found - right).abs().max() / right.abs().max()).detach())
