"""What a rank does about its own failure: it is told once, by the rank that failed first, whoever started the ranks."""

import os
import traceback
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from training.process import launched


def tells(error: Exception) -> bool:
    """Whether this rank is the one to tell: the first of its run that failed. To be asked once, before it leaves.

    Also leaves word of the error for torch's agent, if that started the rank.
    """
    get_error_handler().record_exception(error)
    if lost_others(str(error)):  # the others have told, or whoever started them does; without a launcher nobody would
        return not launched() and os.environ["LOCAL_RANK"] == "0"
    if not dist.is_initialized():  # nobody to ask; a mistake in the config is every rank's
        return os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.get_world_size() == 1:
        return True
    try:
        return bool(dist.distributed_c10d._get_default_store().add("ranks_failed", 1) == 1)
    except RuntimeError:  # rank 0, which kept the count, is gone
        return True


def explain(error: Exception) -> str:
    """What to print of an error that nobody foresaw, with the rank's name."""
    name = f"rank {os.environ['RANK']}"
    text = str(error)
    if lost_others(text):  # where it happened to wait for them says nothing
        return f"{name} lost another rank: {text.splitlines()[0]}"
    return f"{name} failed\n{''.join(traceback.format_exception(error)).rstrip()}"


def lost_others(text: str) -> bool:
    """Whether an error says that another rank is gone, in the words of gloo, NCCL or torch's store."""
    return any(word in text for word in ("gloo/transport", "ncclRemoteError", "NCCL communicator was aborted"))


def message_of(error_file: dict[str, Any]) -> str:
    """`TypeOfError: text` of the word that `tells` left, empty if there is none."""
    message = error_file["message"]
    return str(message["message"]) if isinstance(message, dict) else ""
