"""Routed encoders as transformers' models. Shape legend in `routing/types.py`; C outputs, V words."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe.batch import unpack
from moe.heads import MaskedLMHead
from moe.huggingface.config import RoutedEncoderConfig
from moe.huggingface.loss import classes_loss, span_loss, squared_loss, yes_or_no_loss
from moe.huggingface.outputs import RoutedAnswer, RoutedEncoderOutput, RoutedPrediction
from moe.huggingface.pretrained import RoutedEncoderPreTrained
from moe.tasks.config import MultiLabelConfig, RegressionConfig, TaskConfig
from moe.tasks.heads import build_head


class RoutedEncoderModel(RoutedEncoderPreTrained):
    """The encoder alone; its pooled states are those of the folder's embedding, or the mean's."""

    def __init__(self, config: RoutedEncoderConfig) -> None:
        super().__init__(config, config.embedding_task())
        self.head = build_head(config.embedding_task(), config.hidden_size)  # nothing to learn
        self.post_init()

    def task(self) -> TaskConfig:
        return self.config.embedding_task()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RoutedEncoderOutput | tuple[Any, ...]:
        """`[B, L]` ids, mask (1 = real token) and segments -> states and pooled states."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        output = RoutedEncoderOutput(
            last_hidden_state=unpack(encoded.states, encoded.batch),
            pooler_output=self.head(encoded.states, encoded.batch),
            **encoded.about,
        )
        return self.given(output, return_dict)


class RoutedEncoderForMaskedLM(RoutedEncoderPreTrained):
    """Logits for every token, zero at padding."""

    def __init__(self, config: RoutedEncoderConfig) -> None:
        super().__init__(config, None)
        self.head = MaskedLMHead(self.encoder.config)
        self.post_init()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers does it, and a bias of 0 for each new word."""
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        words = embeddings.num_embeddings
        bias = self.head.bias
        self.head.bias = nn.Parameter(F.pad(bias.detach(), (0, words - len(bias))), requires_grad=bias.requires_grad)
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RoutedPrediction | tuple[Any, ...]:
        """`labels [B, L]`: the token to predict, -100 where there is none."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        logits = unpack(self.head(encoded.states, self.encoder.embeddings.tokens.weight), encoded.batch)
        loss = None if labels is None else self.share(classes_loss(logits, labels), encoded, num_items_in_batch)
        return self.given(RoutedPrediction(loss=loss, logits=logits, **encoded.about), return_dict)


class RoutedEncoderForSequenceClassification(RoutedEncoderPreTrained):
    """One label, several labels or a number for a sequence, as `config.problem_type` says.

    A regression's `logits` are the number itself: `mean + std` times the output that a folder's task names.
    """

    def __init__(self, config: RoutedEncoderConfig) -> None:
        super().__init__(config, config.sequence_task())
        self.head = build_head(config.sequence_task(), config.hidden_size)
        self.post_init()

    def task(self) -> TaskConfig:
        return self.config.sequence_task()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RoutedPrediction | tuple[Any, ...]:
        """`labels`: `[B]` int64 for one label, `[B, C]` of 0 and 1 for several, `[B]` numbers for a regression.

        Where `problem_type` isn't set, more than one output and labels that aren't integers mean several labels.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        logits = self.head(encoded.states, encoded.batch)
        if self.config.problem_type is None and labels is not None and self.config.num_labels > 1:
            several = labels.is_floating_point()
            self.config.problem_type = ("multi" if several else "single") + "_label_classification"
        task = self.task()
        if isinstance(task, RegressionConfig):
            logits = task.mean + task.std * logits
        loss = None
        if labels is not None:
            losses = {RegressionConfig: squared_loss, MultiLabelConfig: yes_or_no_loss}
            summed = losses.get(type(task), classes_loss)(logits, labels)
            loss = self.share(summed, encoded, num_items_in_batch)
        return self.given(RoutedPrediction(loss=loss, logits=logits, **encoded.about), return_dict)


class RoutedEncoderForTokenClassification(RoutedEncoderPreTrained):
    """A label for each token; logits are zero at padding."""

    def __init__(self, config: RoutedEncoderConfig) -> None:
        super().__init__(config, config.token_task())
        self.head = build_head(config.token_task(), config.hidden_size)
        self.post_init()

    def task(self) -> TaskConfig:
        return self.config.token_task()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RoutedPrediction | tuple[Any, ...]:
        """`labels [B, L]` int64, -100 where there is none."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        logits = unpack(self.head(encoded.states, encoded.batch), encoded.batch)
        loss = None if labels is None else self.share(classes_loss(logits, labels), encoded, num_items_in_batch)
        return self.given(RoutedPrediction(loss=loss, logits=logits, **encoded.about), return_dict)


class RoutedEncoderForQuestionAnswering(RoutedEncoderPreTrained):
    """Where the answer begins and ends; padding can't be either."""

    def __init__(self, config: RoutedEncoderConfig) -> None:
        super().__init__(config, config.answer_task())
        self.head = build_head(config.answer_task(), config.hidden_size)
        self.post_init()

    def task(self) -> TaskConfig:
        return self.config.answer_task()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> RoutedAnswer | tuple[Any, ...]:
        """`start_positions`, `end_positions`: `[B]` int64, columns of `input_ids`; one beyond is no target."""
        encoded = self.encode(input_ids, attention_mask, token_type_ids, output_hidden_states, output_attentions)
        scores = self.head(encoded.states, encoded.batch)
        padding = unpack(scores.new_ones(len(scores)), encoded.batch) == 0
        grid = unpack(scores, encoded.batch).masked_fill(padding[:, :, None], torch.finfo(scores.dtype).min)
        start, end = grid.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.share(span_loss(start, end, start_positions, end_positions), encoded, num_items_in_batch)
        return self.given(RoutedAnswer(loss=loss, start_logits=start, end_logits=end, **encoded.about), return_dict)
