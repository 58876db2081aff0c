"""Routed encoders in transformers: importing this makes its Auto classes read our folders.

`from_pretrained(folder)` and `save_pretrained` of `AutoConfig`, `AutoModel`, `AutoModelForMaskedLM`,
`...ForSequenceClassification`, `...ForTokenClassification` and `...ForQuestionAnswering`; `AutoTokenizer` reads the
same folder by itself. Needs the extra `hf`.
"""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ImportError("moe.huggingface needs transformers: pip install 'routed-encoder[hf]'")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moe.huggingface.balance import BalanceCallback, update_balance
from moe.huggingface.config import RoutedEncoderConfig
from moe.huggingface.models import (
    RoutedEncoderForMaskedLM,
    RoutedEncoderForQuestionAnswering,
    RoutedEncoderForSequenceClassification,
    RoutedEncoderForTokenClassification,
    RoutedEncoderModel,
)
from moe.huggingface.outputs import RoutedAnswer, RoutedEncoderOutput, RoutedPrediction
from moe.pretrained import MODEL_TYPE

__all__ = [
    "BalanceCallback",
    "RoutedAnswer",
    "RoutedEncoderConfig",
    "RoutedEncoderForMaskedLM",
    "RoutedEncoderForQuestionAnswering",
    "RoutedEncoderForSequenceClassification",
    "RoutedEncoderForTokenClassification",
    "RoutedEncoderModel",
    "RoutedEncoderOutput",
    "RoutedPrediction",
    "update_balance",
]

AutoConfig.register(MODEL_TYPE, RoutedEncoderConfig, exist_ok=True)
for _auto, _model in (
    (AutoModel, RoutedEncoderModel),
    (AutoModelForMaskedLM, RoutedEncoderForMaskedLM),
    (AutoModelForSequenceClassification, RoutedEncoderForSequenceClassification),
    (AutoModelForTokenClassification, RoutedEncoderForTokenClassification),
    (AutoModelForQuestionAnswering, RoutedEncoderForQuestionAnswering),
):
    _auto.register(RoutedEncoderConfig, _model, exist_ok=True)
