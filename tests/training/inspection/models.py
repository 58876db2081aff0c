"""Models whose health is known, as folders, and text for them."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from moe.config import BlockConfig, EncoderConfig, ExpertsConfig, SoftmaxAttentionConfig
from moe.experts.layer import MoEFeedForward
from moe.heads import MaskedLM
from moe.positions.learned import LearnedPositionsConfig
from moe.pretrained import save_pretrained
from routing import SelectionBiasConfig, TokenChoice, TokenChoiceConfig
from training.data.tokenizer import SPECIALS

WIDTH, PLACES, WORDS, LONGEST = 32, 8, 80, 24  # of the width so many are for positions alone
SICK = {0: "position_only", 1: "collapsed", 2: "dead", 3: "identical"}


def tokenizer_of(words: int = WORDS) -> str:
    """One token for each word, `w5` to `w79`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *(f"w{i}" for i in range(len(SPECIALS), words))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIALS)
    return str(tokenizer.to_str())


def write_text(path: Path, lines: int = 120, seed: int = 0) -> Path:
    generator = np.random.default_rng(seed)
    text = [
        " ".join(f"w{i}" for i in generator.integers(5, WORDS, generator.integers(8, LONGEST - 2)))
        for _ in range(lines)
    ]
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def build(sick: bool, depth: int = 5) -> MaskedLM:
    """A model whose routers read tokens and share them out fairly; if it is to be sick, each layer its own way."""
    torch.manual_seed(1)
    router = TokenChoiceConfig(top_k=1, renormalize=False, selection_bias=SelectionBiasConfig(rate=0.001))
    block = BlockConfig(
        attention=SoftmaxAttentionConfig(heads=2, positions=None),
        feed_forward=ExpertsConfig(count=4, width=16, router=router),
    )
    positions = LearnedPositionsConfig(max_length=LONGEST)
    config = EncoderConfig(vocab_size=WORDS, width=WIDTH, depth=depth, block=block, positions=positions, dropout=0.0)
    model = MaskedLM(config).eval()
    with torch.no_grad():
        nn.init.normal_(model.encoder.embeddings.tokens.weight)
        model.encoder.embeddings.tokens.weight[:, -PLACES:] = 0
        assert model.encoder.embeddings.positions is not None
        nn.init.normal_(model.encoder.embeddings.positions.weight)
        model.encoder.embeddings.positions.weight[:, :-PLACES] = 0
        for layer in range(depth):
            _router(model, layer).logits.weight.copy_(_reads(slice(0, WIDTH - PLACES)))
        if sick:
            _spoil(model)
    return model


def save(model: MaskedLM, folder: Path) -> Path:
    save_pretrained(model, folder, tokenizer_of())
    return folder


def _spoil(model: MaskedLM) -> None:
    attention, router = model.encoder.blocks[0].attention, _router(model, 0)
    attention.output.weight.zero_()  # so that the first router sees embeddings, and of them the positions alone
    router.logits.weight.copy_(_reads(slice(WIDTH - PLACES, WIDTH)))
    collapsed, dead = (_router(model, layer).selection_bias for layer in (1, 2))
    assert collapsed is not None
    assert dead is not None
    collapsed[3], dead[2] = 10.0, -10.0
    experts = _fed(model, 3).experts
    experts.up[1], experts.down[1] = experts.up[0], experts.down[0]


def _fed(model: MaskedLM, layer: int) -> MoEFeedForward:
    fed = model.encoder.blocks[layer].feed_forward
    assert isinstance(fed, MoEFeedForward)
    return fed


def _router(model: MaskedLM, layer: int) -> TokenChoice:
    router = _fed(model, layer).router
    assert isinstance(router, TokenChoice)
    return router


def _reads(where: slice) -> Tensor:
    """Router weights that see a part of the width; the norm before it takes a mean away, so each sums to zero."""
    weight = torch.zeros(4, WIDTH)
    part = torch.randn(4, where.stop - where.start)
    weight[:, where] = part - part.mean(1, keepdim=True)
    return weight
