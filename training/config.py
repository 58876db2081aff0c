"""RunConfig: everything a run is, read from YAML and `a.b=value` overrides."""

from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from moe.attention.linformer import LinformerConfig
from moe.config import EncoderConfig, ExpertsConfig
from routing.config import Config
from routing.errors import UserError
from training.alarms import AlarmConfig, TellAlarm
from training.data.config import DataConfig
from training.data.stream import StreamCorpus
from training.data.tokenizer import TokenizerFile
from training.exit_objective import ExitObjectiveConfig, JointConfig
from training.start import fill_from_start


class ObjectiveConfig(Config):
    """Masked language modelling, and the routers' own losses, whose coefficients stand with each router."""

    # Counts that the balance and importance losses use under gradient accumulation: those of the current micro-batch
    # over all ranks, or those of the whole step, which is exact and costs one more forward pass.
    routing_totals: Literal["micro_batch", "step"] = "micro_batch"
    exits: ExitObjectiveConfig = JointConfig()  # of a model that has some


class LinearSchedule(Config):
    """Warm up, then fall linearly to `final` times the peak."""

    kind: Literal["linear"] = "linear"
    warmup: int = Field(default=100, ge=0)  # steps
    final: float = Field(default=0.0, ge=0, le=1)


class CosineSchedule(Config):
    """Warm up, then fall along half a cosine to `final` times the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=100, ge=0)
    final: float = Field(default=0.0, ge=0, le=1)


class StableSchedule(Config):
    """Warm up, stay, and fall linearly over the last `decay` share of the run (warmup-stable-decay)."""

    kind: Literal["stable"] = "stable"
    warmup: int = Field(default=100, ge=0)
    decay: float = Field(default=0.25, ge=0, le=1)
    final: float = Field(default=0.0, ge=0, le=1)


ScheduleConfig = Annotated[LinearSchedule | CosineSchedule | StableSchedule, Field(discriminator="kind")]


class AdamWConfig(Config):
    """AdamW (arXiv 1711.05101). Norms and biases don't decay."""

    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)  # 0: no clipping


class OptimizerConfig(AdamWConfig):
    """AdamW, and how its rate changes."""

    schedule: ScheduleConfig = StableSchedule()


class TrainConfig(Config):
    """The run's length and how its batches are cut."""

    max_steps: int = Field(default=1000, ge=1)
    step_tokens: int = Field(default=4096, ge=8)  # tokens of one optimizer step, over all ranks
    # Tokens a rank holds at once; the step is accumulated from as many micro-batches as it takes. A target:
    # a micro-batch may exceed it by less than one sequence.
    micro_batch_tokens: int = Field(default=4096, ge=8)
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast over float32 parameters
    activation_checkpointing: bool = False
    evaluate_every: int = Field(default=200, ge=1)  # steps; the end is always evaluated
    evaluation_tokens: int = Field(default=65_536, ge=1)  # of the held-out split


class ParallelConfig(Config):
    """How a model is spread over ranks; changes nothing of what is computed."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    # Ranks among which every layer's experts are spread (training/expert_parallel.py); 1: each holds all.
    expert: int = Field(default=1, ge=1)


class CheckpointConfig(Config):
    every: int = Field(default=500, ge=1)  # steps
    keep: int = Field(default=2, ge=1)
    # background: training goes on once each rank has copied its share to host memory; foreground: it waits until all is
    # on the disk, which takes the memory of one tensor.
    write: Literal["background", "foreground"] = "background"
    resume: str = "auto"  # "auto": the run's newest whole one, if any; "never"; or a checkpoint's path


class LogConfig(Config):
    every: int = Field(default=10, ge=1)  # steps between points in TensorBoard and lines on a plain console
    alarm: AlarmConfig | None = TellAlarm()  # when a router stays collapsed; null: none


# Of the DeepSpeed config, what the run's own sections decide.
GENERATED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization.stage",
    "torch_autocast",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
)


class EngineConfig(Config):
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # merged over the generated DeepSpeed config

    @model_validator(mode="after")
    def _leaves_the_generated_alone(self) -> "EngineConfig":
        for path in GENERATED:
            node: Any = self.deepspeed
            for key in path.split("."):
                node = node.get(key) if isinstance(node, dict) else None
            if node is not None:
                raise ValueError(
                    f"deepspeed sets {path}, which is generated from the sections train, optimizer and "
                    "parallel; set it there"
                )
        return self


class RunConfig(Config):
    """One run. YAML path = attribute path."""

    run_dir: str
    seed: int = Field(default=0, ge=0, lt=2**63 - 2**20)  # ranks add theirs
    start: str | None = None  # a model's folder to go on from (training/start.py); None: random weights
    model: EncoderConfig = EncoderConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if self.start is not None and not isinstance(self.data.tokenizer, TokenizerFile):
            raise ValueError(
                f"start = {self.start} is a model that has a tokenizer of its own, but data.tokenizer is of kind "
                f"{self.data.tokenizer.kind}; leave data.tokenizer out, and it is the folder's"
            )
        wanted = getattr(self.data.tokenizer, "vocab_size", 0)
        if wanted > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size is {wanted} but the embedding has model.vocab_size = "
                f"{self.model.vocab_size} rows; raise model.vocab_size or lower data.tokenizer.vocab_size"
            )
        if self.train.step_tokens < self.data.max_length:
            raise ValueError(
                f"train.step_tokens is {self.train.step_tokens} but one sequence may have data.max_length = "
                f"{self.data.max_length} tokens; raise train.step_tokens"
            )
        corpus = self.data.corpus
        if isinstance(corpus, StreamCorpus) and self.train.step_tokens // corpus.lanes < self.data.max_length:
            raise ValueError(
                f"train.step_tokens is {self.train.step_tokens}, of which each of data.corpus.lanes = {corpus.lanes} "
                f"lanes gives {self.train.step_tokens // corpus.lanes}, but one sequence may have data.max_length = "
                f"{self.data.max_length} tokens; raise train.step_tokens or lower data.corpus.lanes"
            )
        refuse_longer_sequences(self.model, self.data.max_length)
        refuse_unspreadable_experts(self.model, self.parallel.expert)
        return self


def refuse_longer_sequences(model: EncoderConfig, max_length: int) -> None:
    """Raise ValueError if an encoder can't take sequences of `data.max_length` tokens."""
    if model.positions and max_length > model.positions.max_length:
        raise ValueError(
            f"data.max_length is {max_length} but there are only model.positions.max_length = "
            f"{model.positions.max_length} learned positions; raise it or lower data.max_length"
        )
    for layer, block in enumerate(model.blocks()):
        attention = block.attention
        if isinstance(attention, LinformerConfig) and attention.max_length < max_length:
            raise ValueError(
                f"layer {layer}: linformer attention has projections for max_length = {attention.max_length} "
                f"tokens, but data.max_length is {max_length}; raise the first or lower the second"
            )


def refuse_unspreadable_experts(model: EncoderConfig, size: int) -> None:
    """Raise ValueError if `parallel.expert` = `size` ranks can't share every layer's experts."""
    fed = [block.feed_forward for block in model.blocks()]
    counts = {layer: ff.count for layer, ff in enumerate(fed) if isinstance(ff, ExpertsConfig)}
    if size > 1 and not counts:
        raise ValueError(f"parallel.expert is {size}, but no layer has experts to spread; set it to 1")
    valid = [n for n in range(1, max(counts.values(), default=1) + 1) if not any(c % n for c in counts.values())]
    for layer, count in counts.items():
        if count % size:
            raise ValueError(
                f"parallel.expert is {size}, but layer {layer} has {count} experts, which {size} ranks can't "
                f"share evenly; what fits every layer: {', '.join(map(str, valid))}"
            )


# What a resumed run may change: its length, its layout, and what it reports and keeps.
RESUMABLE = (
    "run_dir",
    "train.max_steps",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.evaluate_every",
    "parallel",
    "checkpoint",
    "log",
    "engine",
    "data.cache_dir",
    "data.num_proc",
)
# What each machine may have its own of.
LOCAL = ("data.cache_dir", "data.num_proc")


def load_run_config(path: Path, overrides: list[str]) -> RunConfig:
    """`load_config` of a pre-training.

    With `start`, the model and the tokenizer that the file doesn't give are those of that folder; overrides of
    `model` change them. A file that gives them, as a run's own `config.yaml` does, doesn't need the folder to be read.

    Raises:
        UserError: as `load_config`, and for a folder that holds no masked language model.
    """
    data = read_yaml(path)
    begins = [override for override in overrides if override.partition("=")[0] == "start"]
    for override in begins:
        apply_override(data, override)
    if isinstance(data.get("start"), str):
        fill_from_start(data, Path(data["start"]))
    return validated(data, [override for override in overrides if override not in begins], RunConfig, str(path))


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(path: Path, overrides: list[str], kind: type[ConfigT]) -> ConfigT:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), and validate.

    Raises:
        UserError: for a missing or malformed file, and for every invalid key or value, named by its path.
    """
    return validated(read_yaml(path), overrides, kind, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """A config file's sections.

    Raises:
        UserError: if it is missing or malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config {path}: {error}") from error
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds {type(data).__name__}, not sections such as `model:` and `train:`")
    return data


def validated(data: dict[str, Any], overrides: list[str], kind: type[ConfigT], source: str) -> ConfigT:
    """A config of a file's data, to which overrides are applied.

    Raises:
        UserError: for every invalid key or value, named by its path in `source`.
    """
    for override in overrides:
        apply_override(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(describe_errors(error, data, source)) from error


def describe_errors(error: ValidationError, data: dict[str, Any], source: str, what: str = "run") -> str:
    """One line per mistake: its path as in the YAML, what is wrong, and what was given."""
    lines = []
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        where = _yaml_path(problem["loc"], data, absent=problem["type"] == "missing")
        given = "" if isinstance(problem["input"], dict | Config) else f" (given: {problem['input']!r})"
        lines.append(f"  {where + ': ' if where else ''}{message}{_nearest_kind(problem.get('ctx', {}))}{given}")
    return f"{source} is not a valid {what}:\n" + "\n".join(lines)


def _nearest_kind(context: dict[str, Any]) -> str:
    """For a kind that doesn't exist; nothing for other mistakes, or where none is near."""
    valid = str(context.get("expected_tags", "")).replace("'", "").split(", ")
    near = get_close_matches(str(context.get("tag")), valid, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _yaml_path(loc: tuple[int | str, ...], data: Any, absent: bool) -> str:
    """pydantic's location without what it inserts for unions, which the YAML doesn't have.

    Args:
        absent: the last part is a key that should be there and isn't.
    """
    path: list[str] = []
    for i, part in enumerate(loc):
        if isinstance(data, dict) and (part in data or (absent and i == len(loc) - 1)):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(str(part))
    return ".".join(path)


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set what `a.b=value` says in a YAML file's data.

    Raises:
        UserError: for one that is malformed, or doesn't fit the data.
    """
    path, equals, value = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise UserError(f"override '{override}' is not of the form a.b=value, such as train.max_steps=100")
    node: Any = data
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(f"override '{override}': {'.'.join(keys[:i])} is a list of {len(node)}")
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
        else:
            raise UserError(f"override '{override}': {'.'.join(keys[:i])} is {node!r}, not a section")
        if last:
            try:
                node[slot] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UserError(f"override '{override}': the value is not valid YAML: {error}") from error
        else:
            if isinstance(node, dict) and node.get(slot) is None:
                node[slot] = {}
            node = node[slot]


def differences(
    old: dict[str, Any], new: dict[str, Any], free: Collection[str] = RESUMABLE, prefix: str = ""
) -> list[str]:
    """Lines `path: old -> new` for every leaf in which two resolved configs differ beyond the paths that are `free`."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        path = f"{prefix}{key}"
        if path in free or old.get(key) == new.get(key):
            continue
        before, after = old.get(key), new.get(key)
        sections, others = _by_number(before), _by_number(after)
        if isinstance(sections, dict) and isinstance(others, dict):
            lines += differences(sections, others, free, f"{path}.")
        else:
            lines.append(f"{path}: {before!r} -> {after!r}")
    return lines


def _by_number(value: Any) -> Any:
    """A list of sections, such as `model.overrides`, as sections under the numbers that overrides have for them."""
    sections = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
    return {str(n): entry for n, entry in enumerate(value)} if sections else value
