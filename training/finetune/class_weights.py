"""What each label's targets count. C labels."""

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from moe.tasks.config import ClassificationConfig, MultiLabelConfig, TaskConfig, TokenClassificationConfig
from routing.errors import UserError
from training.finetune.config import BalancedWeights, ClassWeights, GivenWeights
from training.finetune.losses import UNLABELLED


def class_weights(config: ClassWeights, task: TaskConfig, items: Dataset) -> Tensor | None:
    """`[C]` float32, or None where all count the same.

    Args:
        items: the encoded training set.

    Raises:
        UserError: for a label that isn't the task's or has no weight, or one that balance would need an example of.
    """
    if not isinstance(task, ClassificationConfig | MultiLabelConfig | TokenClassificationConfig):
        return None
    if isinstance(config, GivenWeights):
        unknown = [label for label in config.weights if label not in task.labels]
        missing = [label for label in task.labels if label not in config.weights]
        if unknown or missing:
            raise UserError(
                f"objective.class_weights must give each label a weight: unknown {', '.join(unknown) or 'none'}, "
                f"missing {', '.join(missing) or 'none'}; the labels are {', '.join(task.labels)}"
            )
        return torch.tensor([config.weights[label] for label in task.labels], dtype=torch.float32)
    if not isinstance(config, BalancedWeights):
        return None
    counts = label_counts(task, items)
    absent = [label for label, count in zip(task.labels, counts, strict=True) if not count]
    if absent:
        raise UserError(
            f"objective.class_weights: balanced needs an example of every label, and the training set has none of "
            f"{', '.join(absent)}; leave these labels out, or give weights"
        )
    if isinstance(task, MultiLabelConfig):
        return torch.tensor((len(items) - counts) / counts, dtype=torch.float32)
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)


def label_counts(
    task: ClassificationConfig | MultiLabelConfig | TokenClassificationConfig, items: Dataset
) -> np.ndarray:
    """`[C]` int64, how many targets each label has."""
    column = items.with_format("arrow")[:]["target"].combine_chunks()
    targets = (column if isinstance(task, ClassificationConfig) else column.flatten()).to_numpy()
    return np.bincount(targets[targets != UNLABELLED], minlength=task.outputs)
