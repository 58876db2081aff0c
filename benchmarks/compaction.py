"""Does a sequence that leaves early stop costing, at any batch size?

    python -m benchmarks.compaction [--json FILE]

Equally many sequences leave behind each layer, in mixed order, as a substitute for the exits' heads has it: the real
head runs, and then its answer is made sure or unsure. `speedup` is that over the same encoder without exits, `ideal`
the layers it saves, and `share` one over the other; `bound` is the speed-up where the fewer sequences of each layer
were packed beforehand and there are neither exits nor heads: what smaller batches allow. `never` is the time of asking
every exit and leaving at none, over that of the encoder without exits. `decision` is the time of one exit, from the
states to who stays, over a layer's: the exit's norm and head, the score, and reading it; `criterion alone` the same
without norm and head.
"""

import argparse

import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, at_least_one, device_in_use, interleaved_seconds, show
from moe.batch import PackedBatch, pack_lengths, select, to_device
from moe.config import EncoderConfig
from moe.exits.config import CriterionConfig, EntropyConfig, LearnedExitConfig, MaxProbabilityConfig, PatienceConfig
from moe.exits.criteria import ExitSays, score
from moe.exits.inference import early_exit, listen
from moe.exits.remainder import begin
from moe.tasks.config import ClassificationConfig, TaskConfig, TokenClassificationConfig
from moe.tasks.model import TaskModel
from routing import Tokens

BATCHES = (1, 8, 32, 128)
CRITERIA = (MaxProbabilityConfig(), EntropyConfig(), PatienceConfig(), LearnedExitConfig())


class Prescribed(nn.Module):
    """A head whose answers are sure for the sequences that are to leave, and unsure for the others."""

    def __init__(self, head: nn.Module, layer: int, last: Tensor) -> None:
        super().__init__()
        self.head, self.layer = head, layer
        self.last = last  # [B] the layer behind which each is to leave

    def forward(self, x: Tensor, batch: PackedBatch) -> Tensor:
        """`[T, D]` -> `[B, C]`."""
        logits: Tensor = self.head(x, batch)
        logits[:, 0] += 1e3 * (self.last[batch.seq_index] <= self.layer)
        return logits


def build(options: argparse.Namespace, task: TaskConfig, exits: bool, router: bool = False) -> TaskModel:
    config = EncoderConfig.model_validate(
        {
            "width": options.width,
            "depth": options.depth,
            "block": {"attention": {"heads": options.width // 64}, "feed_forward": {"width": 4 * options.width}},
            "exits": {"layers": tuple(range(options.depth - 1)), "router": {} if router else None} if exits else None,
        }
    )
    torch.manual_seed(0)
    return TaskModel(config, task).eval().to(device_in_use())


def leaving(batch: int, depth: int) -> Tensor:
    """The layer behind which each sequence leaves: equally many for each layer, one alone in the middle."""
    if batch == 1:
        return torch.tensor([(depth - 1) // 2])
    spread = torch.arange(batch) * depth // batch
    return spread[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def shorter(batch: PackedBatch, ids: Tensor, stay: Tensor) -> tuple[PackedBatch, Tokens]:
    there, rows = select(batch, stay.nonzero().squeeze(1).tolist())
    return there, Tokens(ids[rows], there.cu_seqlens)


@torch.inference_mode()
def measure_compaction(options: argparse.Namespace, sequences: int) -> Row:
    """One batch size: sequences that leave one by one, and sequences that could but don't."""
    device, task = device_in_use(), ClassificationConfig(labels=("a", "b", "c"))
    plain, exits, prescribed = (build(options, task, with_exits) for with_exits in (False, True, True))
    last = leaving(sequences, options.depth).to(device)
    for layer, module in prescribed.exits.items():
        module.head = Prescribed(module.head, int(layer), last)
    batch = to_device(pack_lengths([options.length] * sequences), device)
    ids = torch.randint(plain.config.vocab_size, (sequences * options.length,), device=device)
    sure, never = MaxProbabilityConfig(threshold=0.999), MaxProbabilityConfig(threshold=1.0)
    left = early_exit(prescribed, ids, batch=batch, criterion=sure).exit_layer
    assert torch.equal(left, last), "the sequences leave as prescribed"
    assert (early_exit(exits, ids, batch=batch, criterion=never).exit_layer == options.depth - 1).all()
    beforehand = [shorter(batch, ids, last >= layer) for layer in range(options.depth)]

    def bound() -> None:
        """Batches that were packed before."""
        x = plain.encoder.embed(ids, batch)
        for layer, (there, tokens) in enumerate(beforehand):
            plain.encoder.run_block(layer, x[: len(tokens.ids)], there, tokens)

    seconds = interleaved_seconds(
        {
            "bound": bound,
            "plain": lambda: plain(ids, batch=batch),
            "leaving": lambda: early_exit(prescribed, ids, batch=batch, criterion=sure),
            "never": lambda: early_exit(exits, ids, batch=batch, criterion=never),
        },
        options.rounds,
    )
    speedup = seconds["plain"] / seconds["leaving"]
    ideal = options.depth * sequences / float((last + 1).sum())
    return {
        "batch": sequences,
        "speedup": speedup,
        "ideal": ideal,
        "bound": seconds["plain"] / seconds["bound"],
        "share": speedup / ideal,
        "never": seconds["never"] / seconds["plain"],
    }


@torch.inference_mode()
def measure_decision(options: argparse.Namespace, task: TaskConfig, criterion: CriterionConfig, sequences: int) -> Row:
    """One exit over one layer."""
    device, model = device_in_use(), build(options, task, exits=True, router=criterion.kind == "learned")
    batch = to_device(pack_lengths([options.length] * sequences), device)
    ids = torch.randint(model.config.vocab_size, (sequences * options.length,), device=device)
    here, _ = begin(model, ids, batch, None, None, in_grid=False)
    _, memory = score(criterion, task.kind, listen(model, criterion, 0, here, 1.0), batch)

    def judge(says: ExitSays) -> list[bool]:
        scores, _ = score(criterion, task.kind, says, batch, memory, here.owner)
        sure: list[bool] = (scores >= 0.9).tolist()
        return sure

    says = listen(model, criterion, 1, here, 1.0)
    seconds = interleaved_seconds(
        {
            "layer": lambda: model.encoder.run_block(0, here.x, batch, here.tokens),
            "decision": lambda: judge(listen(model, criterion, 1, here, 1.0)),
            "criterion": lambda: judge(says),
        },
        options.rounds,
    )
    return {
        "batch": sequences,
        "task": task.kind,
        "criterion": criterion.kind,
        "decision": seconds["decision"] / seconds["layer"],
        "criterion alone": seconds["criterion"] / seconds["layer"],
    }


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--width", type=at_least_one, default=256)
    parser.add_argument("--depth", type=at_least_one, default=6)
    parser.add_argument("--length", type=at_least_one, default=64, help="tokens of each sequence (64)")
    parser.add_argument("--batches", type=at_least_one, nargs="+", default=BATCHES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure_compaction(options, sequences) for sequences in options.batches]
    show("Compaction: speed-up over the encoder without exits", rows, options.json)
    labelled = {"classification": ClassificationConfig, "token_classification": TokenClassificationConfig}
    decisions = [
        measure_decision(options, kind(labels=tuple("abcdefgh")), criterion, sequences)
        for sequences in options.batches
        for kind in labelled.values()
        for criterion in CRITERIA
    ]
    show("An exit's decision over a layer's time", decisions, None)


if __name__ == "__main__":
    main()
