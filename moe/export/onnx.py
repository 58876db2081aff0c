"""A model as an ONNX file that onnxruntime was seen to run as torch does. Needs the extra `onnx`."""

import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.config import EncoderConfig
from moe.export.graph import Graph
from moe.heads import MaskedLM
from moe.tasks.heads import per_token
from moe.tasks.model import TaskModel
from routing.errors import UserError

NAME = "model.onnx"
LIMIT = 1e-4  # of the difference from torch, over the largest output
_OPSET = 20


def export_onnx(model: MaskedLM | TaskModel, folder: Path) -> float:
    """Write `model.onnx`: `input_ids`, `attention_mask` and, for an encoder with segments, `token_type_ids`, all
    `[batch, length]` int64 -> `logits` (see `moe.export.graph`).

    Any batch and any length with at least one real token, padding anywhere; float32 whatever the model's dtype.

    Returns:
        The largest difference from the model itself, over its largest output, on padded and on ragged input.

    Raises:
        UserError: without the extra `onnx`, for a model that can't be in a graph, or one whose graph says otherwise.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install 'routed-encoder[onnx]'")
    model = deepcopy(model).eval().float()
    write_graph(Graph(model), folder / NAME, model.config)
    error = difference(model, folder / NAME)
    if not error <= LIMIT:
        raise UserError(
            f"onnxruntime's outputs differ from torch's by {error:.1e} of the largest one, more than {LIMIT:.0e}: this "
            "graph isn't the model, and wasn't written"
        )
    return error


def write_graph(graph: torch.nn.Module, path: Path, config: EncoderConfig) -> None:
    """Trace a graph at one size and write it for all sizes.

    Raises:
        UserError: if torch has no way to write it.
    """
    longest = config.positions.max_length if config.positions else None
    inputs = examples(config, (3, min(7, longest or 7)))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    noisy = logging.getLogger("torch")
    level = noisy.level
    noisy.setLevel(logging.CRITICAL)  # of what it would like to have been installed, and of symbols
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            traced = torch.export.export(graph.eval(), tuple(inputs.values()), dynamic_shapes=(sizes,) * len(inputs))
            program = torch.onnx.export(
                traced,
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                input_names=list(inputs),
                output_names=["logits"],
                custom_translation_table={torch.ops.aten.repeat_interleave.Tensor: _repeat_interleave},
            )
            assert program is not None
            program.save(str(path))
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.UserError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"torch can't write this model as ONNX: {reason}") from error
    finally:
        noisy.setLevel(level)


def difference(model: MaskedLM | TaskModel, path: Path) -> float:
    """Largest difference between onnxruntime's outputs and the model's, over the model's largest; NaN counts as inf."""
    run = session(path)
    worst, largest = 0.0, 0.0
    longest = model.config.positions.max_length if model.config.positions else 64
    for shape in ((1, 1), (2, min(9, longest)), (5, min(64, longest))):
        inputs = examples(model.config, shape)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            segments = inputs.get("token_type_ids")
            said: Tensor = model(inputs["input_ids"], inputs["attention_mask"], segment_ids=segments).logits
        graphs = torch.from_numpy(run(inputs))
        if isinstance(model, MaskedLM):
            said = said.view_as(graphs)
        if isinstance(model, MaskedLM) or per_token(model.task):
            said, graphs = said[real], graphs[real]
        worst = max(worst, float((said - graphs).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(said.abs().max()))
    return worst / max(largest, torch.finfo(torch.float32).tiny)


def session(path: Path, threads: int = 0) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """A call from named inputs to logits, by onnxruntime on the CPU; 0 threads: as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Tensor]) -> np.ndarray:
        (logits,) = running.run(None, {name: value.numpy() for name, value in inputs.items()})
        return np.asarray(logits)

    return run


def examples(config: EncoderConfig, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Ids at random and a mask: the first row full, then padded right, left, on both sides and between."""
    rows, length = shape
    drawn = torch.Generator().manual_seed(rows * length)
    at, third = torch.arange(length), length // 3
    kinds = [at >= 0, at < length - third, at >= third, (at >= third) & (at < length - third), at % 3 != 1]
    inputs = {
        "input_ids": torch.randint(config.vocab_size, shape, generator=drawn),
        "attention_mask": torch.stack([kinds[row % len(kinds)] for row in range(rows)]).long(),
    }
    if config.segments:
        inputs["token_type_ids"] = torch.randint(config.segments, shape, generator=drawn)
    return inputs


def _repeat_interleave(repeats: Any, output_size: Any = None) -> Any:
    """`torch.repeat_interleave` of [0, 1, ...]: how many of the sequences have ended before each place."""
    from onnxscript import opset20 as op

    ends = op.CumSum(repeats, op.Constant(value_int=0))
    places = op.Range(op.Constant(value_int=0), op.ReduceSum(repeats, keepdims=0), op.Constant(value_int=1))
    rows = op.Unsqueeze(places, op.Constant(value_ints=[1]))
    ended = op.GreaterOrEqual(rows, op.Unsqueeze(ends, op.Constant(value_ints=[0])))
    return op.ReduceSum(op.Cast(ended, to=7), op.Constant(value_ints=[1]), keepdims=0)
