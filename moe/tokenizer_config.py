"""What transformers wants to know of a tokenizer beside its `tokenizer.json`."""

import json
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"

# The names that BERT's and RoBERTa's families give each role.
_ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}


def tokenizer_config(tokenizer: str, max_length: int | None = None) -> dict[str, Any]:
    """The content of a `tokenizer_config.json`, with which `AutoTokenizer` pads, cuts and finds the mask.

    Args:
        tokenizer: the content of a `tokenizer.json`; roles that none of its added tokens has are left out.
        max_length: tokens that the model takes at most; None: any number.
    """
    added = {token["content"] for token in json.loads(tokenizer).get("added_tokens", [])}
    roles = {role: next((name for name in names if name in added), None) for role, names in _ROLES.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **({} if max_length is None else {"model_max_length": max_length}),
        **{role: name for role, name in roles.items() if name is not None},
    }
