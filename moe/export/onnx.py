"""A model as an ONNX file that onnxruntime was seen to run as torch does. Needs the extra `onnx`."""

import logging
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe.export.graph import Graph
from moe.heads import MaskedLM
from moe.tasks.heads import per_token
from moe.tasks.model import TaskModel
from routing.errors import UserError

NAME = "model.onnx"
LIMIT = 1e-4  # of the difference from torch, over the largest output
_OPSET = 20


def export_onnx(model: MaskedLM | TaskModel, folder: Path) -> float:
    """Write `model.onnx`: `input_ids`, `attention_mask` `[batch, length]` int64 -> `logits` (see `moe.export.graph`).

    Any batch and any length, padding anywhere, float32 whatever the model's dtype.

    Returns:
        The largest difference from the model itself, over its largest output, on padded and on ragged input.

    Raises:
        UserError: without the extra `onnx`, for a model that can't be in a graph, or one whose graph says otherwise.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install 'routed-encoder[onnx]'")
    model = deepcopy(model).eval().float()
    write_graph(Graph(model), folder / NAME, model.config.vocab_size)
    error = difference(model, folder / NAME)
    if not error <= LIMIT:
        raise UserError(
            f"onnxruntime's outputs differ from torch's by {error:.1e} of the largest one, more than {LIMIT:.0e}: this "
            "graph isn't the model, and wasn't written"
        )
    return error


def write_graph(graph: torch.nn.Module, path: Path, vocab_size: int) -> None:
    """Trace a graph of two inputs at one size and write it for all sizes."""
    ids, mask = examples(vocab_size, (3, 7))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)  # of libraries that it would have had words for
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (ids, mask),
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(sizes, sizes),
                custom_translation_table={torch.ops.aten.repeat_interleave.Tensor: _repeat_interleave},
            )
            assert program is not None
            program.save(str(path))
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(f"torch can't write this model as ONNX: {str(error).strip().splitlines()[-1]}") from error
    finally:
        noisy.setLevel(level)


def difference(model: MaskedLM | TaskModel, path: Path) -> float:
    """Largest difference between onnxruntime's outputs and the model's, over the model's largest; NaN counts as inf."""
    run = session(path)
    worst, largest = 0.0, 0.0
    longest = model.config.positions.max_length if model.config.positions else 64
    for shape in ((1, 1), (2, min(9, longest)), (5, min(64, longest))):
        ids, mask = examples(model.config.vocab_size, shape)
        with torch.no_grad():
            said: Tensor = model(ids, mask).logits
        graphs = torch.from_numpy(run(ids, mask))
        if isinstance(model, MaskedLM):
            said = said.view_as(graphs)
        if isinstance(model, MaskedLM) or per_token(model.task):
            said, graphs = said[mask.bool()], graphs[mask.bool()]
        worst = max(worst, float((said - graphs).abs().nan_to_num(torch.inf).max()))
        largest = max(largest, float(said.abs().max()))
    return worst / max(largest, torch.finfo(torch.float32).tiny)


def session(path: Path, threads: int = 0) -> Any:
    """A call from ids and mask to numpy's logits, by onnxruntime on the CPU; 0 threads: as many as it likes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    running = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(ids: Tensor, mask: Tensor) -> np.ndarray:
        (logits,) = running.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        return np.asarray(logits)

    return run


def examples(vocab_size: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Ids at random and a mask: the first row full, then padded right, left, on both sides and between."""
    rows, length = shape
    drawn = torch.Generator().manual_seed(rows * length)
    ids = torch.randint(vocab_size, shape, generator=drawn)
    at, third = torch.arange(length), length // 3
    kinds = [at >= 0, at < length - third, at >= third, (at >= third) & (at < length - third), at % 3 != 1]
    mask = torch.stack([kinds[row % len(kinds)] for row in range(rows)]).long()
    return ids, mask


def _repeat_interleave(repeats: Any, output_size: Any = None) -> Any:
    """`torch.repeat_interleave` of [0, 1, ...]: how many of the sequences have ended before each place."""
    from onnxscript import opset20 as op

    ends = op.CumSum(repeats, op.Constant(value_int=0))
    places = op.Range(op.Constant(value_int=0), op.ReduceSum(repeats, keepdims=0), op.Constant(value_int=1))
    rows = op.Unsqueeze(places, op.Constant(value_ints=[1]))
    ended = op.GreaterOrEqual(rows, op.Unsqueeze(ends, op.Constant(value_ints=[0])))
    return op.ReduceSum(op.Cast(ended, to=7), op.Constant(value_ints=[1]), keepdims=0)
