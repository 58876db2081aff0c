"""Whole encoders on text as it comes: real tokens a second, ours packed, transformers' padded.

Batches are sequences in the corpus's own order (no sorting by length), cut at 512 tokens; a peer's are padded to their
longest, as its users run them, ours packed; both beforehand, and padding counts for nothing. Every encoder has the same
width, depth, heads, vocabulary and active feed-forward width: ours routed has two of eight experts of half of it;
`limit` is our encoder with a dense feed-forward of it, what routing would cost if it cost nothing; `BERT` is dense;
`Switch` takes one of eight experts of all of it, drops what exceeds its default capacity and routes padding too.

`forward+backward` is a training step without its optimizer: forward, loss, gradients of all parameters. The loss is the
same for all, the mean square of the real tokens' states, without a head; ours routed adds its balance loss. No dropout.
bf16 is autocast over float32 parameters. `vs NAME` is the contender's tokens a second over NAME's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, device_in_use, interleaved_seconds, save, show
from benchmarks.contenders import LIMIT, leave_out
from moe.batch import PackedBatch, pack_lengths, to_device
from moe.config import BlockConfig, DenseConfig, EncoderConfig, ExpertsConfig, SoftmaxAttentionConfig
from moe.encoder import Encoder
from routing import TokenChoiceConfig, balance_loss
from training.data.config import DataConfig
from training.data.corpus import PythonDocsCorpus, TextCorpus
from training.data.prepare import prepare
from training.data.tokenizer import WordPieceTokenizer

EXPERTS, TOP_K, HEADS, LONGEST, VOCABULARY = 8, 2, 4, 512, 8192
MODES = ("forward", "forward+backward")
OURS, BERT, SWITCH = "ours routed", "BERT", "Switch"
NAMES = (LIMIT, OURS, BERT, SWITCH)


class Batch(NamedTuple):
    """The same sequences twice."""

    packed_ids: Tensor  # [T]
    packed: PackedBatch
    padded_ids: Tensor  # [B, L]
    mask: Tensor  # [B, L], 1 = real token


def batch_of(sequences: list[list[int]], device: torch.device) -> Batch:
    packed = pack_lengths([len(sequence) for sequence in sequences])
    ids = torch.tensor([token for sequence in sequences for token in sequence])
    mask = torch.zeros(packed.shape, dtype=torch.int64).view(-1).index_fill(0, packed.token_index, 1)
    padded = torch.zeros_like(mask).index_copy(0, packed.token_index, ids)
    grids = (grid.view(packed.shape).to(device) for grid in (padded, mask))
    return Batch(ids.to(device), to_device(packed, device), *grids)


def read_batches(file: Path | None, count: int, size: int, device: torch.device) -> list[Batch]:
    """`count` runs of `size` neighbouring sequences, spread evenly over the corpus."""
    corpus = PythonDocsCorpus() if file is None else TextCorpus(files=[str(file)])
    tokenizer = WordPieceTokenizer(vocab_size=VOCABULARY)
    rows = prepare(DataConfig(corpus=corpus, tokenizer=tokenizer, max_length=LONGEST)).train
    starts = np.linspace(0, max(0, len(rows) - size), count).astype(int).tolist()
    return [batch_of(rows[start : start + size]["input_ids"], device) for start in starts]


class Ours(nn.Module):
    """Our encoder over packed tokens."""

    def __init__(self, width: int, depth: int, hidden: int, routed: bool) -> None:
        super().__init__()
        router = TokenChoiceConfig(top_k=TOP_K)
        experts = ExpertsConfig(count=EXPERTS, width=hidden // TOP_K, router=router)
        block = BlockConfig(
            attention=SoftmaxAttentionConfig(heads=HEADS),
            feed_forward=experts if routed else DenseConfig(width=hidden),
        )
        config = EncoderConfig(vocab_size=VOCABULARY, width=width, depth=depth, block=block)
        self.encoder, self.active = Encoder(config), config.num_active_params()

    def forward(self, batch: Batch) -> Tensor:
        states, routing, _ = self.encoder(batch.packed_ids, batch=batch.packed)
        balance = sum(balance_loss(stats) for stats in routing.values())
        return states.float().square().mean() + 0.01 * balance


class Theirs(nn.Module):
    """A transformers encoder over a padded grid."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        experts = {name: p.numel() for name, p in encoder.named_parameters() if ".expert_" in name}
        whole = sum(p.numel() for p in encoder.parameters())  # a tied parameter comes once
        self.active = whole - sum(experts.values()) * (EXPERTS - 1) // EXPERTS

    def forward(self, batch: Batch) -> Tensor:
        states = self.encoder(input_ids=batch.padded_ids, attention_mask=batch.mask).last_hidden_state
        return (states.float() * batch.mask[:, :, None]).square().sum() / (batch.mask.sum() * states.shape[2])


def bert(width: int, depth: int, hidden: int) -> Theirs:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        intermediate_size=hidden,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Theirs(BertModel(config, add_pooling_layer=False))


def switch(width: int, depth: int, hidden: int) -> Theirs:
    from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel

    config = SwitchTransformersConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=width // HEADS,
        num_heads=HEADS,
        d_ff=hidden,
        num_layers=depth,
        num_sparse_encoder_layers=depth,
        num_experts=EXPERTS,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        dense_act_fn="gelu",
    )
    return Theirs(SwitchTransformersEncoderModel(config))


def encoders(width: int, depth: int, hidden: int, wanted: list[str]) -> dict[str, Ours | Theirs]:
    makers: dict[str, Callable[[], Ours | Theirs]] = {
        LIMIT: lambda: Ours(width, depth, hidden, routed=False),
        OURS: lambda: Ours(width, depth, hidden, routed=True),
        BERT: lambda: bert(width, depth, hidden),
        SWITCH: lambda: switch(width, depth, hidden),
    }
    built: dict[str, Ours | Theirs] = {}
    for name, make in makers.items():
        if name in wanted or name == LIMIT:
            try:
                built[name] = make().to(device_in_use())
            except ImportError as error:
                leave_out("encoders", name, error)
    return built


def one_pass(model: nn.Module, batches: list[Batch], mode: str, dtype: str) -> Callable[[], None]:
    """Every batch once."""
    parameters = list(model.parameters())
    train = mode == "forward+backward"

    def run() -> None:
        model.train(train)
        for batch in batches:
            with torch.set_grad_enabled(train), torch.autocast(device_in_use().type, enabled=dtype == "bf16"):
                loss = model(batch)
            if train:
                torch.autograd.grad(loss, parameters, allow_unused=True)

    return run


def measure(built: dict[str, Ours | Theirs], batches: list[Batch], case: str, dtype: str, rounds: int) -> list[Row]:
    tokens = sum(len(batch.packed_ids) for batch in batches)
    slots = sum(batch.mask.numel() for batch in batches)
    rows: list[Row] = []
    for mode in MODES:
        made = {name: one_pass(model, batches, mode, dtype) for name, model in built.items()}
        seconds = interleaved_seconds(made, rounds)
        for name, taken in seconds.items():
            row: Row = {
                "case": case,
                "dtype": dtype,
                "mode": mode,
                "contender": name,
                "active_params": built[name].active,
                "padding": 0.0 if isinstance(built[name], Ours) else 1 - tokens / slots,
                "tokens_per_s": tokens / taken,
                "ratio_to_limit": seconds[LIMIT] / taken,
            }
            rows.append(row | {f"vs {peer}": seconds[peer] / taken for peer in (BERT, SWITCH) if peer in seconds})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--data", type=Path, help="text, one paragraph a line (default: Python's documentation)")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME", help=str(NAMES))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024, help="active feed-forward width")
    parser.add_argument("--batches", type=int, default=4, help="in one timed pass")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches = read_batches(options.data, options.batches, options.batch, device_in_use())
    built = encoders(options.width, options.depth, options.hidden, options.contenders)
    case = f"d{options.width} x{options.depth} ff{options.hidden} B{options.batch}"
    rows = [r for dtype in options.dtypes for r in measure(built, batches, case, dtype, options.rounds)]
    show(f"Whole encoders, {device_in_use().type}, {options.threads} thread(s)", rows, None)
    save(rows, options.json)


if __name__ == "__main__":
    main()
