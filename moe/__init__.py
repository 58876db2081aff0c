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
from moe.experts.pruning import prune_experts
from moe.experts.usage import ExpertUsage, watch_experts
from moe.heads import MaskedLM, MaskedLMOutput
from moe.lora import LoraConfig, add_lora, load_adapter, merge_lora, save_adapter
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
    "ExpertUsage",
    "FrozenOutput",
    "LoraConfig",
    "MaskedLM",
    "MaskedLMOutput",
    "PackedBatch",
    "Published",
    "TaskModel",
    "TaskOutput",
    "UpcycleConfig",
    "UpcycleHeadsConfig",
    "add_exit_stats",
    "add_lora",
    "difference",
    "early_exit",
    "exit_report",
    "freeze_tokens",
    "from_pretrained",
    "from_published",
    "load_adapter",
    "merge_lora",
    "new_budget",
    "pack",
    "pack_lengths",
    "prune_experts",
    "prune_heads",
    "routed_heads_from_softmax",
    "save_adapter",
    "save_pretrained",
    "select",
    "task_from_pretrained",
    "unpack",
    "upcycle",
    "watch_experts",
    "with_task",
]
