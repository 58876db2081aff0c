"""stats.json: what `moe inspect` found, as types. `schema.json` beside this file is made of them:

    python -m training.inspection.schema > training/inspection/schema.json

Readers may rely on it: fields are only added within a `schema_version`; any other change raises it.

Shape legend: R routers, E choices of one, G groups of tokens, H heads, P checkpoints. A share is between 0 and 1.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("schema.json")

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Model(Section):
    """What was looked at."""

    path: str
    name: str  # short: the folder's, and of a run's checkpoint the step
    step: Count | None  # of a training checkpoint; null for a model folder
    width: Count
    depth: Count
    vocab_size: Count
    parameters: Count
    active_parameters: Count  # per token


class Data(Section):
    """The text it was looked at with: as it stands, nothing masked; cut as in training, `[CLS] ... [SEP]`."""

    files: list[str]
    documents: Count
    sequences: Count
    tokens: Count  # with [CLS] and [SEP], without padding
    max_length: Count


class Finding(Section):
    """One illness of one router."""

    kind: Literal["collapsed", "unbalanced", "dead", "identical", "position_only", "dropping"]
    router: str
    layer: Count
    choices: list[Count]  # concerned; of `identical` two or more that are alike
    value: float  # the figure that decided
    limit: float  # and what a healthy router keeps to
    sentence: str


class Verdict(Section):
    """Healthy or not, in sentences with numbers. `findings` is empty if and only if `healthy`."""

    healthy: bool
    summary: list[str]  # sentences, the most important first
    findings: list[Finding]
    notes: list[str]  # what isn't an illness: too little text to tell, what wasn't looked at
    untold: list[str] = []  # routers of which there is too little text to call them healthy


class Histogram(Section):
    """Tokens by a figure between 0 and 1, in bins of equal width."""

    counts: list[Count]


class Table(Section):
    """What each choice takes of each group of tokens: compare a row with the router's `load`."""

    groups: list[str]  # [G], those with tokens
    tokens: list[Count]  # [G]
    share: list[list[Share]]  # [G][E] of the group's assignments; a row sums to 1


class TypicalToken(Section):
    """A token that a choice takes more often than it takes tokens in general."""

    token: str
    id: Count
    count: Count  # times the choice took it
    of: Count  # times it occurs
    lift: float  # share of its occurrences that the choice took, over the choice's share of all tokens
    lift_low: float  # lower bound of the lift, simultaneous for all tokens and choices; the order, and above 1


class Word(Section):
    """A token whose choices depend on its context."""

    token: str
    id: Count
    count: Count  # occurrences
    agreement: Share  # of its assignments to the choices it takes most often (as many as a token takes)
    choices: list[tuple[Count, Share]]  # choice and share of its assignments, largest first; at most 4


class Context(Section):
    """How routing changes with context: the same token, different choices."""

    tokens: Count  # occurrences of tokens that are frequent enough to tell
    agreement: Share  # of their assignments to each token's own usual choices: 1 if the token alone decides
    chance: Share  # the same if choices didn't depend on the token
    words: list[Word]  # the most and the least dependent, least agreement first


class Similarity(Section):
    """Cosine similarity of a router's choices, `[E][E]`, 1 on the diagonal; null where it can't be told."""

    weight: list[list[float]] | None  # of their weights as they stand
    output: list[list[float]] | None  # of what they make of the same tokens, mean over a sample


class Router(Section):
    """One router: of a layer's experts, heads or splits."""

    name: str  # "3.experts"
    layer: Count
    routes: str  # "experts", "heads", "splits" or "depth"
    kind: str  # of the router: "token_choice", ...
    choices: Count  # E
    top_k: float  # choices a token takes, mean
    alike: bool  # its load is by design, the same choices or shares for all input: balance isn't to be expected
    tokens: Count  # that it saw; mixture of depths shows a layer's other routers some alone

    load: list[Share]  # [E] of all assignments, before capacity
    first: list[Share]  # [E] of tokens whose best choice it is
    probability: list[Share]  # [E] mean
    gate: list[float | None]  # [E] mean weight where it was chosen and kept; null if never
    dropped: list[Share]  # [E] of its assignments, by capacity

    max_over_mean: float  # load of the fullest over the mean
    max_violation: float  # MaxVio = max_over_mean - 1
    coefficient_of_variation: float  # of the load over choices
    load_entropy: float  # nats, of the load; at most log E
    entropy: float  # nats, of a token's probabilities, mean; at most log E
    dropped_fraction: Share
    confidence: Share  # a token's highest probability, mean
    margin: Share  # highest less second highest, mean
    confidence_histogram: Histogram
    margin_histogram: Histogram
    dead: list[Count]  # choices that take less than a hundredth of their fair share; [] if `alike`
    identical: list[tuple[Count, Count]]  # pairs of choices of the same output (or weights, where no output is told)
    similarity: Similarity

    known_by_token: (
        Share | None
    )  # share of the best choice's entropy that the token's id explains; null: none to explain
    known_by_position: Share | None  # and that its position explains

    takes: dict[str, Table]  # "word_part", "position", "sequence_length", "characters", "script"
    typical: list[list[TypicalToken]]  # [E], at most 12 each
    context: Context | None  # null if no token is frequent enough
    together: list[list[Share]] | None  # [E][E] of tokens that take both; diagonal: that take it. null if top_k is 1


class Flow(Section):
    """Where tokens go from one layer's best choice to the next layer's."""

    source: str  # a router's name
    target: str
    share: list[list[Share]]  # [E of source][E of target] of all tokens


class Way(Section):
    """One path."""

    choices: list[Count]  # a token's best choice at each router
    share: Share
    count: Count
    tokens: list[str]  # the most frequent that take it, 5 at most


class Paths(Section):
    """Ways through all layers with routers of one kind, in a sample of tokens."""

    routes: str
    routers: list[str]
    tokens: Count  # of the sample
    distinct: Count
    top: list[Way]  # at most 20, the most frequent first


class Agreement(Section):
    """Whether two routers divide tokens alike: normalised mutual information of best choices, corrected for chance."""

    routers: list[str]
    nmi: list[list[float | None]]  # [R][R]; null where a router has one choice in use


class Heads(Section):
    """The heads of one layer's attention, on a sample of sequences."""

    layer: Count
    router: str | None
    heads: Count
    shared: Count  # the first so many are always on; without a router all
    convolving: Count = 0  # the last so many have kernels' taps for probabilities (mixed attention)
    chosen: list[Share]  # [H] of tokens
    distance: list[float]  # [H] tokens between query and key, mean under the attention probabilities
    entropy: list[Share]  # [H] of the probabilities over its maximum, log of the sequence's length, mean
    sequences: Count


class ExampleSequence(Section):
    """A sequence, its tokens, and what each router chose for them."""

    tokens: list[str]  # [S] as text
    continues: list[bool]  # [S] whether no space stands before it
    routing: dict[str, "ExampleRouting"]  # by router


class ExampleRouting(Section):
    choices: list[list[int]]  # [S][K], best first; -1: none
    gates: list[list[float]]  # [S][K]
    kept: list[list[bool]]  # [S][K]


class Earning(Section):
    """What the loss would be without a choice."""

    choice: Count
    change: float  # of the loss, nats per target; positive: the choice earns something
    low: float  # its confidence interval
    high: float


class Switched(Section):
    layer: Count
    routes: Literal["experts", "heads"]
    router: str | None  # null for heads that are always on
    choices: list[Earning]  # those that were switched off, in order


class Ablation(Section):
    """Loss change when an expert or a head adds nothing, on a sample of sequences, masked as in evaluation."""

    sequences: Count
    targets: Count
    loss: float  # nats per target, with everything on
    confidence: Share  # of the intervals
    switched: list[Switched]


class ExitsByLength(Section):
    groups: list[str]  # of sequence lengths
    sequences: list[Count]
    mean_layers: list[float]  # layers that a sequence passed


class Exits(Section):
    """Where sequences leave a model with exits, by its own criterion: those of the text, or labelled examples."""

    layers: list[Count]  # after which there is one, the last layer included
    histogram: list[Count]  # sequences that left there
    by_length: ExitsByLength
    accuracy: list[Share | None] | None  # at those exits: of labels, of a masked language model of masked tokens
    labels: list[str] = []  # files of the labelled examples; none: the text's sequences


class PointRouter(Section):
    load: list[Share]
    max_over_mean: float
    max_violation: float
    entropy: float
    confidence: Share
    dropped_fraction: Share
    dead: Count


class Drift(Section):
    """How one router's routing of the same tokens differs between two checkpoints."""

    total_variation: Share  # half the sum of the loads' differences
    churn: Share  # tokens whose best choice is another one


class Point(Section):
    """One checkpoint, or model."""

    name: str  # no two points have the same
    step: Count | None
    routers: dict[str, PointRouter]
    drift: dict[str, Drift] | None  # since the point before; null for the first


class Compare(Section):
    """Two models, or a run's checkpoints in order, on the same tokens."""

    tokens: Count  # of the sample of which churn is told
    points: Annotated[list[Point], Field(min_length=2)]  # [P]


class Stats(Section):
    """stats.json."""

    schema_version: Literal[1]
    model: Model
    data: Data
    verdict: Verdict
    routers: list[Router]
    flows: list[Flow]
    paths: list[Paths]
    agreement: Agreement
    heads: list[Heads]
    examples: list[ExampleSequence]
    ablation: Ablation | None
    exits: Exits | None = None
    compare: Compare | None = None


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of stats.json."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Stats.model_json_schema()}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
