"""moe: the encoder that obeys the router."""

from moe.attention.from_softmax import routed_heads_from_softmax
from moe.attention.pruning import prune_heads
from moe.batch import PackedBatch, pack, pack_lengths, select, unpack
from moe.config import EncoderConfig
from moe.encoder import Encoder, EncoderOutput
from moe.exits.budget import Budget, new_budget
from moe.exits.freezing import FrozenOutput, freeze_tokens
from moe.exits.inference import EarlyOutput, early_exit
from moe.exits.stats import ExitStats, add_exit_stats, exit_report
from moe.heads import MaskedLM, MaskedLMOutput
from moe.pretrained import from_pretrained, save_pretrained, task_from_pretrained
from moe.published.load import Published, from_published
from moe.tasks.model import TaskModel, TaskOutput, with_task
from moe.upcycling import UpcycleConfig, UpcycleHeadsConfig, difference, upcycle

__all__ = [
    "Budget",
    "EarlyOutput",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "ExitStats",
    "FrozenOutput",
    "MaskedLM",
    "MaskedLMOutput",
    "PackedBatch",
    "Published",
    "TaskModel",
    "TaskOutput",
    "UpcycleConfig",
    "UpcycleHeadsConfig",
    "add_exit_stats",
    "difference",
    "early_exit",
    "exit_report",
    "freeze_tokens",
    "from_pretrained",
    "from_published",
    "new_budget",
    "pack",
    "pack_lengths",
    "prune_heads",
    "routed_heads_from_softmax",
    "save_pretrained",
    "select",
    "task_from_pretrained",
    "unpack",
    "upcycle",
    "with_task",
]
