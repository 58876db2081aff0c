"""FinetuneConfig: everything a fine-tuning is, read from YAML and `a.b=value` overrides."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moe.config import EncoderConfig
from moe.exits.config import ExitsConfig
from moe.exits.criteria import check_criterion
from moe.lora import LoraConfig
from routing.config import Config
from training.config import AdamWConfig, EngineConfig, LogConfig, ParallelConfig, load_config
from training.exit_objective import ExitObjectiveConfig, JointConfig
from training.tasks.config import TaskDataConfig


class _Start(Config):
    """And what is changed about the encoder."""

    dropout: float | None = Field(default=None, ge=0, lt=1)  # of its sublayers; None: as it was trained with
    exits: ExitsConfig | None = None  # exits to add, behind which layers; those it was trained with don't stay


class PretrainedStart(_Start):
    """A folder that `save_pretrained` wrote: pre-trained, upcycled, or fine-tuned for something before."""

    kind: Literal["pretrained"] = "pretrained"
    path: str


class CheckpointStart(_Start):
    """A training checkpoint, or a run's folder for its last one."""

    kind: Literal["checkpoint"] = "checkpoint"
    path: str


class FreshStart(_Start):
    """Random weights, the baseline: an encoder as that in the folder `like`, or another, with its tokenizer."""

    kind: Literal["fresh"] = "fresh"
    like: str
    encoder: EncoderConfig | None = None


StartConfig = Annotated[PretrainedStart | CheckpointStart | FreshStart, Field(discriminator="kind")]


class EqualWeights(Config):
    """Every target counts the same."""

    kind: Literal["none"] = "none"


class BalancedWeights(Config):
    """Labels count in inverse proportion to their number in the training set.

    For one label of C: `n / (C n_c)`. For several labels at once: the positive targets of each count `(n - n_c) / n_c`.
    """

    kind: Literal["balanced"] = "balanced"


class GivenWeights(Config):
    """By label; for several labels at once it is the positive targets' that they multiply."""

    kind: Literal["given"] = "given"
    weights: dict[str, Annotated[float, Field(ge=0)]]


ClassWeights = Annotated[EqualWeights | BalancedWeights | GivenWeights, Field(discriminator="kind")]


class TaskObjectiveConfig(Config):
    """What is minimised, beside what the task itself says."""

    class_weights: ClassWeights = EqualWeights()
    temperature: float = Field(default=0.05, gt=0)  # of similarities, where a pair is told from others
    exits: ExitObjectiveConfig = JointConfig()  # what exits learn, where the model has some
    routing_totals: Literal["micro_batch", "step"] = "micro_batch"  # as in pre-training


class TrainedRouter(Config):
    """Trained as everything else."""

    kind: Literal["trained"] = "trained"


class FrozenRouter(Config):
    """Keeps its parameters, its selection bias and its centre."""

    kind: Literal["frozen"] = "frozen"


class RouterRate(Config):
    """Trained at a peak rate of its own, whatever `optimizer.layer_decay`."""

    kind: Literal["rate"] = "rate"
    lr: float = Field(gt=0)


class FinetuneRoutingConfig(Config):
    """What routed models need when they learn from few examples."""

    router: Annotated[TrainedRouter | FrozenRouter | RouterRate, Field(discriminator="kind")] = TrainedRouter()
    # Of the experts' hidden units, while training (Switch, arXiv 2101.03961, section 2.4: 0.4, beside 0.1 elsewhere).
    expert_dropout: float = Field(default=0.0, ge=0, lt=1)
    # Times the coefficients of pre-training of the losses that spread load: balance, importance, sequence_balance.
    balance_loss: float = Field(default=1.0, ge=0)


class FinetuneOptimizerConfig(AdamWConfig):
    """AdamW, warmed up and then let down linearly."""

    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)  # share of the steps
    final: float = Field(default=0.0, ge=0, le=1)  # times the peak, in the end
    # Each layer's rate over that of the layer above it (ULMFiT, arXiv 1801.06146): the head learns at `lr`.
    layer_decay: float = Field(default=0.9, gt=0, le=1)


class FinetuneTrainConfig(Config):
    """How long, how steps are cut, and which of its states a run keeps."""

    epochs: float = Field(default=3.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)  # instead of epochs
    step_examples: int = Field(default=32, ge=1)  # of one optimizer step, over all ranks
    micro_batch_tokens: int = Field(default=4096, ge=8)  # that a rank holds at once; a target
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    evaluate_every: int | None = Field(default=None, ge=1)  # steps; None: once an epoch. The end is always evaluated
    metric: str | None = None  # the best state is chosen by it, on held-out examples; None: the task's usual one
    patience: int | None = Field(default=None, ge=1)  # evaluations without a better one, after which a seed ends


class FinetuneConfig(Config):
    """One fine-tuning, of one or more seeds. YAML path = attribute path."""

    run_dir: str
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63 - 2**20)], ...] = Field(default=(0,), min_length=1)
    resume: Literal["auto", "never"] = "auto"  # auto: seeds that are finished aren't repeated
    model: StartConfig
    data: TaskDataConfig
    objective: TaskObjectiveConfig = TaskObjectiveConfig()
    routing: FinetuneRoutingConfig = FinetuneRoutingConfig()
    lora: LoraConfig | None = None  # train low-rank changes, beside the head and the routers; None: everything
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    train: FinetuneTrainConfig = FinetuneTrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    log: LogConfig = LogConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "FinetuneConfig":
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        if twice:
            raise ValueError(f"seeds repeat {', '.join(map(str, twice))}; give each once")
        if self.lora and self.parallel.expert > 1:
            raise ValueError(
                "lora changes whole stacks of experts, and parallel.expert spreads them over ranks; leave one out"
            )
        kind = self.data.task.kind
        if not isinstance(self.objective.class_weights, EqualWeights) and kind not in WEIGHTED:
            raise ValueError(
                f"objective.class_weights are of labels, and {kind} has none; leave them out, or choose a task of "
                f"{', '.join(WEIGHTED)}"
            )
        if self.model.exits is not None and self.model.exits.criterion is not None:
            check_criterion(self.model.exits.criterion, kind)
        return self


def load_finetune_config(path: Path, overrides: list[str]) -> FinetuneConfig:
    """`load_config` of a fine-tuning."""
    return load_config(path, overrides, FinetuneConfig)


WEIGHTED = ("classification", "multi_label", "token_classification")

# What a seed that is gone on with may differ in from those that are finished.
RESUMABLE = (
    "run_dir",
    "seeds",
    "resume",
    "log",
    "parallel",
    "engine",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "data.cache_dir",
    "data.num_proc",
)
