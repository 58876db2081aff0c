"""A folder serves us and transformers alike, both ways, with the same outputs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="needs the extra hf")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    logging,
    pipeline,
)

import moe.huggingface
from moe.pretrained import load_model
from routing import Tokens
from routing.errors import UserError
from tests.moe.huggingface.folders import ENCODER, TASKS, model_for, saved, tokenizer

logging.set_verbosity_error()
logging.disable_progress_bar()

AUTO = {
    None: AutoModelForMaskedLM,
    "classification": AutoModelForSequenceClassification,
    "multi_label": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "embedding": AutoModel,
}
IDS = torch.randint(5, 20, (4, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])  # on either side
REAL = MASK.bool()


def theirs(model: torch.nn.Module, kind: str | None) -> Tensor:
    """Ours is laid out likewise: for every sequence, or for every real token."""
    out = model(input_ids=IDS, attention_mask=MASK)
    if kind == "embedding":
        return out.pooler_output
    if kind == "question_answering":
        return torch.stack([out.start_logits, out.end_logits], -1)[REAL]
    return out.logits[REAL] if kind in (None, "token_classification") else out.logits


def ours(model: torch.nn.Module, kind: str | None) -> Tensor:
    logits = model(IDS, MASK).logits
    if kind is None:
        return logits[REAL.flatten()]
    if kind == "regression":
        return 2.5 + 1.5 * logits
    return logits[REAL] if kind in ("token_classification", "question_answering") else logits


@pytest.mark.parametrize("kind", AUTO)
def test_a_folder_of_ours_is_read_by_transformers_and_one_of_theirs_by_us(kind: str | None, tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", kind)
    loaded, told = AUTO[kind].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert type(loaded).__name__ == json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    assert torch.equal(theirs(loaded, kind), ours(model, kind))
    for parameter in loaded.parameters():  # what comes back is what is saved, not what was read
        parameter.data += 0.125
    loaded.save_pretrained(tmp_path / "theirs")
    back = load_model(tmp_path / "theirs")
    assert back.config == model.config
    assert getattr(back, "task", None) == getattr(model, "task", None)
    assert torch.equal(ours(back, kind), theirs(loaded, kind))
    assert not torch.equal(ours(back, kind), ours(model, kind))


@pytest.mark.parametrize("kind", [None, "classification"])
def test_a_folder_with_exits_is_read_without_them(kind: str | None, tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", kind, exits={"layers": [0]})
    loaded, told = AUTO[kind].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert told["unexpected_keys"]
    assert all(name.startswith("exits.0.") for name in told["unexpected_keys"])
    assert torch.equal(theirs(loaded, kind), ours(model, kind))
    loaded.save_pretrained(tmp_path / "theirs")
    assert load_model(tmp_path / "theirs").config == model.config.model_copy(update={"exits": None})


@pytest.mark.parametrize("kind", [None, "token_classification"])
def test_a_head_for_something_else_is_drawn_afresh(kind: str | None, tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", kind, width=64)
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", id2label=labels, label2id={name: i for i, name in labels.items()}
    ).eval()
    assert torch.equal(model.encoder(IDS, MASK).last_hidden_state, loaded.encoder(IDS, MASK).last_hidden_state)
    weight = loaded.head.dense.weight  # the masked-LM head has one of the same name and shape
    assert 0.018 < weight.std() < 0.022
    assert not loaded.head.dense.bias.any()
    if kind is None:
        assert not torch.equal(weight, model.head.dense.weight)
    loaded.save_pretrained(tmp_path / "theirs")
    task = moe.task_from_pretrained(tmp_path / "theirs").task
    assert (task.kind, task.labels) == ("classification", ("no", "yes", "perhaps"))


def test_a_renamed_label_is_saved(tmp_path: Path) -> None:
    saved(tmp_path / "ours", "classification")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert loaded.config.id2label == {0: "good", 1: "bad", 2: "so so"}
    loaded.config.id2label = {0: "gut", 1: "schlecht", 2: "nun ja"}
    loaded.save_pretrained(tmp_path / "theirs")
    assert moe.task_from_pretrained(tmp_path / "theirs").task.labels == ("gut", "schlecht", "nun ja")


def test_every_state_and_every_routers_statistics_come_out(tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", None)
    loaded = AutoModel.from_pretrained(tmp_path / "ours")
    out = loaded(IDS, attention_mask=MASK, token_type_ids=torch.zeros_like(IDS), output_hidden_states=True)
    inner = model.encoder(IDS, MASK)
    assert_close(out.last_hidden_state, inner.last_hidden_state)
    assert len(out.hidden_states) == 4
    assert_close(out.hidden_states[-1], inner.last_hidden_state)
    assert_close(
        model.encoder.final_norm(model.encoder.blocks[2](*_packed(model, out.hidden_states[2])).x),
        inner.last_hidden_state[REAL],
    )
    assert all(not states[~REAL].any() for states in out.hidden_states)
    assert {name: stats.assigned.tolist() for name, stats in out.router_stats.items()} == {
        name: stats.assigned.tolist() for name, stats in inner.routing.items()
    }
    assert loaded(IDS, attention_mask=MASK).hidden_states is None


def _packed(model: moe.MaskedLM, grid: Tensor) -> tuple[Tensor, moe.PackedBatch, Tokens]:
    batch = moe.pack(MASK)
    return grid[REAL], batch, Tokens(IDS[REAL], batch.cu_seqlens)


def test_padding_and_its_side_change_nothing(tmp_path: Path) -> None:
    saved(tmp_path / "ours", "classification")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    texts = ["the cat sat on a mat", "me"]
    alone = torch.cat([loaded(**words(text, return_tensors="pt")).logits for text in texts])
    for side in ("left", "right"):
        words.padding_side = side
        assert_close(loaded(**words(texts, padding=True, return_tensors="pt")).logits, alone)


def test_the_tokenizer_knows_its_special_tokens_and_the_models_length(tmp_path: Path) -> None:
    saved(tmp_path / "ours", None, positions={"max_length": 7})
    words = AutoTokenizer.from_pretrained(tmp_path / "ours")
    names = (words.pad_token, words.unk_token, words.cls_token, words.sep_token, words.mask_token)
    assert names == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pair = words(["the cat", "a dog ran"], ["it is", "me"], padding=True)
    expected = tokenizer().encode("the cat", "it is")
    assert pair["input_ids"][0] == expected.ids
    assert pair["token_type_ids"][0] == expected.type_ids
    assert len(words("the cat sat on a mat and a dog ran", truncation=True)["input_ids"]) == 7
    assert AutoConfig.from_pretrained(tmp_path / "ours").max_position_embeddings == 7


def test_pipelines(tmp_path: Path) -> None:
    model = saved(tmp_path / "mlm", None)
    ids = torch.tensor([tokenizer().encode("the [MASK] sat").ids])
    best = model(ids).logits[2].argmax()
    found = pipeline("fill-mask", model=str(tmp_path / "mlm"))("the [MASK] sat")
    assert found[0]["token"] == best
    for kind in ("classification", "regression", "token_classification"):
        saved(tmp_path / kind, kind)
    labels = pipeline("text-classification", model=str(tmp_path / "classification"), top_k=None)("the cat")[0]
    assert {one["label"] for one in labels} == set(TASKS["classification"]["labels"])
    assert sum(one["score"] for one in labels) == pytest.approx(1)
    number = pipeline("text-classification", model=str(tmp_path / "regression"))("the cat")[0]["score"]
    tuned = moe.task_from_pretrained(tmp_path / "regression")
    score = tuned(torch.tensor([tokenizer().encode("the cat").ids])).logits.item()
    assert number == pytest.approx(2.5 + 1.5 * score)
    states = pipeline("feature-extraction", model=str(tmp_path / "mlm"))("the cat", return_tensors=True)
    assert_close(states, model.encoder(torch.tensor([tokenizer().encode("the cat").ids])).last_hidden_state)
    words = pipeline("token-classification", model=str(tmp_path / "token_classification"))("the cat")
    assert [one["word"] for one in words] == ["the", "cat"]
    assert {one["entity"] for one in words} <= {"N", "V"}


@pytest.mark.parametrize(
    ("made", "given", "first"),
    [
        ("Model", {}, ["last_hidden_state", "pooler_output", "hidden_states"]),
        ("ForMaskedLM", {"labels": IDS}, ["loss", "logits", "hidden_states"]),
        ("ForTokenClassification", {"labels": IDS % 2}, ["loss", "logits", "hidden_states"]),
        (
            "ForQuestionAnswering",
            {"start_positions": IDS[:, 0] * 0, "end_positions": IDS[:, 0] * 0},
            ["loss", "start_logits", "end_logits", "hidden_states"],
        ),
    ],
)
def test_as_tuples_outputs_are_in_transformers_order(made: str, given: dict[str, Tensor], first: list[str]) -> None:
    config = moe.huggingface.RoutedEncoderConfig(encoder=ENCODER)
    model = getattr(moe.huggingface, f"RoutedEncoder{made}")(config).eval()
    output = model(IDS, attention_mask=MASK, output_hidden_states=True, **given)
    assert list(output) == [*first, "aux_loss", "router_stats"]
    as_tuple = model(IDS, attention_mask=MASK, output_hidden_states=True, return_dict=False, **given)
    assert_close(as_tuple[0], output[first[0]])
    assert_close(as_tuple[1], output[first[1]])


def test_new_words_get_embeddings_and_a_bias(tmp_path: Path) -> None:
    model = saved(tmp_path / "ours", None)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    loaded.resize_token_embeddings(23)
    assert_close(theirs(loaded, None)[:, :20], ours(model, None))
    assert loaded(torch.tensor([[22]])).logits.shape == (1, 1, 23)
    loaded.save_pretrained(tmp_path / "theirs")
    assert moe.from_pretrained(tmp_path / "theirs").config.vocab_size == 23


def test_recomputed_layers_have_the_same_gradients(tmp_path: Path) -> None:
    loaded = moe.huggingface.RoutedEncoderForMaskedLM(moe.huggingface.RoutedEncoderConfig(encoder=ENCODER)).train()
    grads = []
    for recompute in (False, True):
        if recompute:
            loaded.activation_checkpointing_enable()
        assert loaded.is_activation_checkpointing == recompute
        loaded.zero_grad()
        loaded(IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in loaded.named_parameters()})
    for name, grad in grads[0].items():
        assert_close(grads[1][name], grad)


def test_importing_moe_imports_no_transformers() -> None:
    code = "import sys, moe, moe.pretrained; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def damaged(folder: Path, change: str) -> None:
    if change == "encoder":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"width": 16', '"widht": 16'))
    elif change == "format":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    else:
        tensors = load_file(folder / "model.safetensors")
        del tensors["encoder.blocks.1.feed_forward.experts.up"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("encoder", r"the config holds an invalid encoder config: (.|\n)*did you mean 'width'"),
        ("format", "the config has format 9; this version reads format 1"),
        ("weights", "no weights for blocks.1.feed_forward.experts.up of the encoder"),
    ],
)
def test_broken_folders_are_refused(change: str, told: str, tmp_path: Path) -> None:
    saved(tmp_path / "ours", None)
    damaged(tmp_path / "ours", change)
    with pytest.raises(UserError, match=told):
        AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")


def test_what_cannot_be_given_is_refused() -> None:
    config = moe.huggingface.RoutedEncoderConfig(encoder=ENCODER)
    model = moe.huggingface.RoutedEncoderModel(config)
    with pytest.raises(ValueError, match="output_attentions can't be given"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="input_ids is None"):
        model()
    with pytest.raises(ValueError, match=r"input_ids has shape \(4, 5\) but token_type_ids \(4, 4\)"):
        model(IDS, token_type_ids=IDS[:, 1:])
    with pytest.raises(ValueError, match="every_n_layers"):
        model.activation_checkpointing_enable(every_n_layers=2)
    deep = moe.huggingface.RoutedEncoderConfig(encoder={**ENCODER, "stochastic_depth": {"kind": "linear"}})
    with pytest.raises(ValueError, match="in training with stochastic depth"):
        moe.huggingface.RoutedEncoderModel(deep).train()(IDS, output_hidden_states=True)
    config = moe.huggingface.RoutedEncoderConfig(encoder=ENCODER, num_labels=3, problem_type="regression")
    with pytest.raises(UserError, match="num_labels 3; a model predicts one number here"):
        moe.huggingface.RoutedEncoderForSequenceClassification(config)
    config = moe.huggingface.RoutedEncoderConfig(encoder=ENCODER, id2label={0: "a", 1: "a"})
    with pytest.raises(UserError, match="labels repeat a"):
        moe.huggingface.RoutedEncoderForTokenClassification(config)


def test_an_untouched_config_describes_our_default(tmp_path: Path) -> None:
    config = moe.huggingface.RoutedEncoderConfig()
    assert config.encoder_config() == moe.EncoderConfig()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).encoder == config.encoder
    assert model_for(None).config == moe.huggingface.RoutedEncoderConfig(encoder=ENCODER).encoder_config()
