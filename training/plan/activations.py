"""What a micro-batch occupies: what each part of the model saves for backward, and works with meanwhile.

Read off the modules, whose tensors the terms name. Shape legend: T tokens of a micro-batch on one rank, R = T * K rows
of experts, D width, H heads, C channels of a head, E experts, F hidden width, P columns of `up`, N targets, V words.
"""

from collections.abc import Iterator
from typing import NamedTuple

from moe.attention.mixed import MixedAttentionConfig
from moe.config import AttentionConfig, BlockConfig, DenseConfig, ExpertsConfig, SoftmaxAttentionConfig
from moe.feed_forward import input_width
from moe.norms import PRE_NORM
from moe.positions.rotary import RotaryConfig
from routing import HashConfig
from routing.errors import UserError
from training.config import RunConfig
from training.plan.counts import count_parameters, expert_params, targets_per_sequence

FLOAT = 4  # bytes


class Part(NamedTuple):
    """A stretch of the model. All in bytes."""

    saved: float  # from its forward to its backward
    forward: float  # beside that, while its forward runs
    backward: float  # beside what is saved, while its backward runs, without gradients of parameters
    casts: float  # bfloat16 copies of matrices that autocast makes once per forward and keeps until its end
    parameters: int  # of this rank
    largest: int  # parameters whose gradients are made at once


class Usage(NamedTuple):
    """A moment of a micro-batch."""

    backward: bool
    activations: float  # bytes saved for backward
    workspace: float  # bytes that one part works with
    made: int  # parameters whose gradients this micro-batch has made
    fresh: int  # parameters of the part that is at work
    largest: int  # of these, whose gradients are made at once


def micro_batch(layers: list[list[Part]], kept: float, checkpointing: bool) -> Iterator[Usage]:
    """Walk through forward and backward.

    Args:
        layers: as `model_parts` returns them; blocks are those of several parts.
        kept: bytes of a block's input, which is what checkpointing keeps of it.
        checkpointing: whether a block's forward is done again when its backward comes.
    """
    held = casts = 0.0
    for layer in layers:
        again = checkpointing and len(layer) > 1
        held += kept if again else 0
        for part in layer:
            casts += part.casts
            held += 0 if again else part.saved
            yield Usage(False, held + casts, part.forward, 0, 0, 0)
    made = 0
    for layer in reversed(layers):
        again = checkpointing and len(layer) > 1
        if again:
            held += sum(part.saved + part.casts for part in layer)
        elif checkpointing:
            casts = layer[-1].casts  # forward is over: copies are held by those alone who saved them
        for part in reversed(layer):
            yield Usage(True, held + (0 if again else casts), part.backward, made, part.parameters, part.largest)
            held -= part.saved + (part.casts if again else 0)
            casts -= 0 if again else part.casts
            made += part.parameters
        held -= kept if again else 0


class Setting(NamedTuple):
    """What the parts have in common."""

    tokens: float  # T
    width: int  # D
    half: bool  # bfloat16 autocast
    cuda: bool
    dropout: bool
    expert_parallel: int

    @property
    def size(self) -> int:
        """Bytes of a number that matrix products work with."""
        return 2 if self.half else FLOAT


def model_parts(run: RunConfig, tokens: float, cuda: bool, expert_parallel: int) -> list[list[Part]]:
    """The embedding, every block (attention, feed-forward) and the head, in the order of forward."""
    model = run.model
    if model.positions:
        raise UserError("what learned positions keep in memory isn't known here; plan without model.positions")
    published = model.norm != PRE_NORM or model.embedding_width or model.segments or model.head_bias
    if published or any(getattr(block.feed_forward, "bias", False) for block in model.blocks()):
        raise UserError(
            "what an encoder made as published ones are keeps in memory isn't known here; plan without model.norm, "
            "embedding_width, segments, head_bias and feed-forward networks with bias"
        )
    setting = Setting(tokens, model.width, run.train.precision == "bf16", cuda, model.dropout > 0, expert_parallel)
    table = model.vocab_size * model.width
    embedding = Part(
        saved=tokens * (FLOAT * model.width + 16) + _mask(setting, FLOAT),
        forward=tokens * FLOAT * model.width,
        backward=2 * tokens * FLOAT * model.width + FLOAT * table,  # the head's gradient is there: this one is added
        casts=0,
        parameters=table + model.width,
        largest=0,
    )
    blocks = [[_attention(block.attention, setting), _feed_forward(block, setting)] for block in model.blocks()]
    return [[embedding], *blocks, [_head(run, setting)]]


def _mask(s: Setting, size: int | None = None) -> float:
    """What dropout saves: on a GPU a byte for each number, on a CPU the factors, in the dtype of what it is given."""
    return s.tokens * s.width * (1 if s.cuda else size or s.size) if s.dropout else 0.0


def _norm(s: Setting) -> float:
    """Input, and mean and deviation of every token."""
    return s.tokens * (FLOAT * s.width + 2 * FLOAT)


def _attention(config: AttentionConfig, s: Setting) -> Part:
    if isinstance(config, MixedAttentionConfig) and isinstance(config.positions, RotaryConfig) and not config.bias:
        return _mixed_attention(config, s)
    if not isinstance(config, SoftmaxAttentionConfig) or config != SoftmaxAttentionConfig(
        heads=config.heads, positions=config.positions if isinstance(config.positions, RotaryConfig) else RotaryConfig()
    ):
        raise UserError(
            f"what attention of kind {config.kind} keeps in memory isn't known here; plan with kind: softmax or "
            "kind: mixed, without biases or head_width and with rotary positions"
        )
    float_core = s.half and not s.cuda  # on a CPU the core is float32: query, key and value are copied
    core = 3 * FLOAT if float_core else 5 * s.size  # rotated query and key, and all three through the value's view
    # Mixed values: once where one kernel serves all sequences in the dtype of the output projection. In float32 on a
    # GPU they are joined from those of the sequences, under bf16 on a CPU rounded.
    mixed = s.size if s.half == s.cuda else FLOAT + s.size
    angles = 2 * FLOAT * (s.width // config.heads) // 2  # cosine and sine
    numbers = s.size + core + mixed  # normed input, core, mixed values
    gradients = 3 * (FLOAT if float_core else s.size)  # of query, key and value
    return Part(
        saved=_norm(s) + s.tokens * (s.width * numbers + angles + FLOAT * config.heads) + _mask(s),
        forward=s.tokens * s.width * (2 * FLOAT + 2 * s.size),
        backward=s.tokens * s.width * (2 * FLOAT + gradients + 3 * s.size),
        casts=2 * 4 * s.width**2 if s.half else 0,
        parameters=4 * s.width**2 + s.width,
        largest=3 * s.width**2,
    )


def _mixed_attention(config: MixedAttentionConfig, s: Setting) -> Part:
    """I: width of a half."""
    inner, heads = s.width // config.head_ratio, config.heads // config.head_ratio
    kernels = heads * config.kernel_size
    float_core = s.half and not s.cuda
    projected = 4 * inner * s.size  # query, key and both values; views keep it whole
    core = inner * (4 * FLOAT if float_core else 3 * s.size)  # query and key turned, on a CPU all three; mixed values
    span = s.width * s.size + 2 * inner * s.size  # convolved tokens; keys, and their products with the queries
    made = kernels * (FLOAT + s.size if s.half else FLOAT)  # softmax, and the kernels in the dtype of the values
    rows = 2 * 8 + 2  # where a token's row is, and a row's token; around a sequence there are some more
    angles = 2 * FLOAT * (inner // heads) // 2
    saved = s.width * s.size + projected + core + span + made + 2 * inner * s.size + rows + angles + FLOAT * heads
    parameters = config.num_params(s.width)
    return Part(
        saved=_norm(s) + s.tokens * saved + _mask(s),
        forward=s.tokens * s.width * (3 * FLOAT + 2 * s.size),
        backward=s.tokens * s.width * (4 * FLOAT + 3 * s.size),  # a CPU convolves in float32
        casts=2 * parameters if s.half else 0,
        parameters=parameters + s.width,
        largest=4 * inner * s.width,
    )


def _feed_forward(block: BlockConfig, s: Setting) -> Part:
    ff = block.feed_forward
    residual = s.tokens * s.width * FLOAT
    if isinstance(ff, DenseConfig):
        dense = _dense(ff, s)
        saved = _norm(s) + residual * s.size // FLOAT + dense.saved + _mask(s)
        return dense._replace(
            saved=saved,
            forward=2 * residual + dense.forward,
            backward=2 * residual + dense.backward,
            parameters=dense.parameters + s.width,
        )
    if not isinstance(ff, ExpertsConfig):
        raise UserError(
            f"what a feed-forward network of kind {ff.kind} keeps in memory isn't known here; plan with kind: dense or "
            "kind: experts"
        )
    experts, choosing = _experts(ff, s), _router(ff, s)
    shared = _dense(DenseConfig(width=ff.shared_width, activation=ff.activation), s) if ff.shared_width else NOTHING
    learns = ff.router.num_params(s.width, ff.count)
    copies = residual if learns else 0.0  # the router's input, float32
    if s.half and ff.shared_width:
        copies += residual / 2  # the shared expert's
    return Part(
        saved=_norm(s) + copies + choosing + experts.saved + shared.saved + _mask(s),
        forward=2 * residual + max(experts.forward, shared.forward),
        backward=2 * residual + max(experts.backward, shared.backward),
        casts=shared.casts,
        parameters=learns + experts.parameters + shared.parameters + s.width,
        largest=max(experts.largest, shared.largest),
    )


NOTHING = Part(0, 0, 0, 0, 0, 0)


def _dense(ff: DenseConfig, s: Setting) -> Part:
    """Without its input, which it may share."""
    columns = input_width(ff.width, ff.activation)
    parameters = ff.num_params(s.width)
    return Part(
        saved=s.tokens * s.size * (columns + _activated(ff.width, ff.activation)),
        forward=s.tokens * s.size * s.width,
        backward=s.tokens * s.size * columns,
        casts=2 * parameters if s.half else 0,
        parameters=parameters,
        largest=columns * s.width,
    )


def _activated(hidden: int, activation: str) -> int:
    """Numbers saved between the two matrices, beside the first one's output."""
    return hidden if activation == "gelu" else 2 * hidden  # gated: the activated gate, and its product


def _experts(ff: ExpertsConfig, s: Setting) -> Part:
    """Without the router's share of its input."""
    choices = ff.router.mean_choices(ff.count)
    rows = s.tokens * choices
    width, hidden, columns = s.width, ff.width, input_width(ff.width, ff.activation)
    parameters = ff.count // s.expert_parallel * expert_params(ff, width)
    plan = rows * (8 + 8 + 4 + 1)  # assignments, row_of, gates, kept
    # Experts elsewhere: rows are sent and arrive, twice; those that come back are kept until they are weighted.
    row = rows * s.size * width if s.expert_parallel > 1 else 0.0
    moved = 2 * row
    rounded = 2 * parameters if s.half else 0  # matrices as products take them
    if _fused(ff, s):
        own = s.tokens * width * s.size if s.half else 0.0  # in float32 the input is the router's
        made = rounded if s.cuda else 0  # on a CPU they are rounded on the way
        return Part(
            saved=(2 * row or own) + plan + rows * s.size * columns,
            forward=rows * s.size * (width + (hidden if s.cuda else 0)) + made + moved,
            # On a CPU the hidden rows' gradients wait in a thread's scratch, one expert's at a time.
            backward=rows * s.size * (width + (columns + hidden if s.cuda else 0)) + made + moved,
            casts=0,
            parameters=parameters,
            largest=parameters,
        )
    numbers = width + columns + _activated(hidden, ff.activation) + width  # gathered, up, down's input, masked
    return Part(
        saved=rounded + row + plan + rows * (8 + 1) + rows * s.size * numbers,
        forward=2 * rows * s.size * width + moved,
        backward=rows * s.size * max(width, hidden) + rounded / 2 + moved,
        casts=0,
        parameters=parameters,
        largest=ff.count // s.expert_parallel * columns * width,
    )


def _fused(ff: ExpertsConfig, s: Setting) -> bool:
    """Whether the backend keeps pre-activations alone; `auto` on a GPU is taken for `torch`, which needs more."""
    return ff.backend in ("cpu", "triton") or (ff.backend == "auto" and not s.cuda)


def _router(ff: ExpertsConfig, s: Setting) -> float:
    """Logits and probabilities, what statistics save of them, and the choices."""
    if isinstance(ff.router, HashConfig):
        return 0.0
    choices = ff.router.mean_choices(ff.count)
    return s.tokens * (4 * FLOAT * ff.count + (8 + FLOAT + 1) * choices + FLOAT)


def _head(run: RunConfig, s: Setting) -> Part:
    model = run.model
    targets = s.tokens * targets_per_sequence(run) / run.data.max_length
    words = model.vocab_size
    states = 3 * s.size + (FLOAT if not s.half else 0)  # dense's input and output, norm's input, output layer's input
    table = words * model.width
    return Part(
        saved=_norm(s) + targets * (s.width * (states + FLOAT) + words * FLOAT),  # logarithms of probabilities
        forward=s.tokens * FLOAT * s.width + targets * words * (s.size + (FLOAT if s.half else 0)),  # logits
        backward=2 * FLOAT * targets * words,  # gradients of logits and logarithms
        casts=2 * (table + s.width**2) if s.half else 0,
        parameters=count_parameters(model).head + model.width,
        largest=table,
    )
