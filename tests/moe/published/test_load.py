"""Published models read from the files that transformers writes give transformers' outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moe
from moe.published.load import KINDS, Published, from_published
from routing.errors import UserError
from tests.moe.published.models import CASES, Batch, off, outputs, padded_batch, published

TOLERANCE = 1e-5  # relative to the largest number


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def ours(read: Published, batch: Batch) -> tuple[Tensor, Tensor]:
    segments = batch.segments if read.model.config.segments > 1 else None
    with torch.no_grad():
        states = read.model.encoder(batch.ids, batch.mask, segment_ids=segments).last_hidden_state
        logits = read.model(batch.ids, batch.mask, segment_ids=segments).logits
    return states, logits.view(*batch.ids.shape, -1)


def one_by_one(model: Any, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each sequence by itself: published convolutions reach into padding."""
    states, logits = [], []
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        parts = outputs(model, name, Batch(*(x[row : row + 1, :length] for x in batch)))
        states.append(parts[0][0])
        logits.append(parts[1][0])
    return torch.cat(states), torch.cat(logits)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_published_ones_with_padding_and_segments(name: str, tmp_path: Path) -> None:
    model = published(name)
    batch = padded_batch(pad=model.config.pad_token_id)
    read = from_published(saved(model, tmp_path))
    assert read.has_head
    assert read.left_out == ()
    real = batch.mask.bool()
    if name.startswith("convbert"):
        expected = one_by_one(model, name, batch)
    else:
        expected = tuple(x[real] for x in outputs(model, name, batch))
    for found, right in zip(ours(read, batch), expected, strict=True):
        assert off(found[real], right) < TOLERANCE
    assert read.model.encoder.config.num_params() == sum(p.numel() for p in read.model.encoder.parameters())


@pytest.mark.parametrize("name", CASES)
def test_an_encoder_alone_is_read_too_and_its_fresh_head_is_told(name: str, tmp_path: Path) -> None:
    model = published(name, "Model")
    batch = padded_batch(pad=model.config.pad_token_id)
    batch = Batch(*(x[:1] for x in batch))  # without padding
    given = {"token_type_ids": batch.segments} if CASES[name].segments else {}
    with torch.no_grad():
        expected = model(batch.ids, **given).last_hidden_state
    read = from_published(saved(model, tmp_path))
    assert not read.has_head
    assert off(ours(read, batch)[0], expected) < TOLERANCE
    assert all("pooler" in tensor for tensor in read.left_out)


def test_electras_discriminator_has_no_masked_lm_head(tmp_path: Path) -> None:
    read = from_published(saved(published("electra-small", "ForPreTraining"), tmp_path))
    assert not read.has_head
    assert len(read.left_out) == 4
    assert all(name.startswith("discriminator_predictions.") for name in read.left_out)


def test_heads_for_other_tasks_are_left_out_and_told(tmp_path: Path) -> None:
    read = from_published(saved(published("modernbert", "ForSequenceClassification"), tmp_path))
    assert not read.has_head  # though there is a dense layer and a norm of the same names
    assert "classifier.weight" in read.left_out


def test_a_model_that_was_read_is_saved_and_read_as_ours(tmp_path: Path) -> None:
    read = from_published(saved(published("mpnet"), tmp_path / "theirs"))
    moe.save_pretrained(read.model, tmp_path / "ours", tokenizer=read.tokenizer)
    again, batch = moe.from_pretrained(tmp_path / "ours"), padded_batch()
    assert torch.equal(again(batch.ids, batch.mask).logits, read.model(batch.ids, batch.mask).logits)


def test_layers_that_share_a_table_get_one_each(tmp_path: Path) -> None:
    read = from_published(saved(published("mpnet"), tmp_path))
    first, second = (block.attention.core.bias.weight for block in read.model.encoder.blocks)
    assert torch.equal(first, second)
    with torch.no_grad():
        first.zero_()
    assert second.any()


def test_shards_half_precision_and_the_tokenizer(tmp_path: Path) -> None:
    model = published("bert").half()
    whole, shards = saved(model, tmp_path / "whole"), saved(model, tmp_path / "shards", max_shard_size="5KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    (shards / "tokenizer.json").write_text('{"a": "ü"}', encoding="utf-8")
    one, many = from_published(whole), from_published(shards)
    assert (one.tokenizer, many.tokenizer) == (None, '{"a": "ü"}')
    for name, tensor in one.model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, many.model.state_dict()[name]), name


def test_older_files_name_norms_otherwise_and_hold_buffers_and_the_tied_table(tmp_path: Path) -> None:
    model = published("bert")
    folder = saved(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "LayerNorm" in name]:
        tensors[name.replace(".weight", ".gamma").replace(".bias", ".beta")] = tensors.pop(name)
    tensors["bert.embeddings.position_ids"] = torch.arange(20)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 16)
    save_file(tensors, folder / "model.safetensors")
    read, batch = from_published(folder), padded_batch(pad=0)
    assert read.left_out == ("cls.seq_relationship.weight",)
    real = batch.mask.bool()
    assert off(ours(read, batch)[1][real], outputs(model, "bert", batch)[1][real]) < TOLERANCE


def test_older_modernberts_say_their_layers_otherwise(tmp_path: Path) -> None:
    folder = saved(published("modernbert"), tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    new = from_published(folder).model.config
    thetas = {kind: rope["rope_theta"] for kind, rope in config.pop("rope_parameters").items()}
    del config["layer_types"]
    config |= {"global_rope_theta": thetas["full_attention"], "local_rope_theta": thetas["sliding_attention"]}
    path.write_text(json.dumps(config | {"global_attn_every_n_layers": 3}))
    assert from_published(folder).model.config == new
    assert [block.attention.kind for block in new.blocks()] == ["softmax", "local", "local", "softmax"]
    path.write_text(json.dumps(config | {"global_attn_every_n_layers": 2}))
    found = from_published(folder).model.config
    assert [block.attention.kind for block in found.blocks()] == ["softmax", "local", "softmax", "local"]


def with_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def with_tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def unknown_and_pickled(folder: Path) -> None:
    with_config(model_type="gpt2")(folder)
    pickled(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "config.json").unlink(),
            r"is no model folder: cannot read config.json \(No such.*give a local",
        ),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"holds \[\], not an object"),
        (with_config(model_type="t5"), r"a model of type 't5'; those that can be read are bert, roberta, .*modernbert"),
        (unknown_and_pickled, "a model of type 'gpt2'; those that"),  # before anybody converts it for nothing
        (with_config(hidden_act="gelu_new"), r"hidden_act: 'gelu_new'.*its GELU must be the exact one"),
        (with_config(position_embedding_type="relative_key"), "position_embedding_type: 'relative_key'"),
        (with_config(is_decoder=True), "is_decoder: True.*every token of an encoder sees all others"),
        (with_config(quantization_config={"bits": 4}), "weights must be plain numbers"),
        (with_config(hidden_size=None), "gives hidden_size as None; a bert model needs a whole number there"),
        (with_config(num_hidden_layers="two"), "gives num_hidden_layers as 'two'"),
        (with_config(num_attention_heads=3), "can't be reproduced here: (.|\n)*width 16 does not divide into 3 heads"),
        (with_config(hidden_size=32), r"does not fit the model's config: .* is \[.*, expected \["),
        (with_config(num_hidden_layers=1), r"no part of a bert encoder reads, such as encoder.layer.1.attention"),
        (with_config(num_hidden_layers=3), "has no tensor 'encoder.layer.2.attention.self.query.weight'"),
        (with_config(tie_word_embeddings=False), "the output layer of its masked-LM head isn't the embedding"),
        (
            with_tensors(lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(40, 16)})),
            "the output layer of its masked-LM head isn't the embedding",
        ),
        (
            with_tensors(lambda t: t.update({"bert.encoder.layer.0.adapter.weight": torch.ones(2)})),
            "no part of a bert encoder reads, such as encoder.layer.0.adapter.weight",
        ),
        (pickled, r"pytorch_model.bin but no model.safetensors; a pickle can run code.*save_pretrained\(NEW_FOLDER\)"),
        (lambda f: (f / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "not a whole safetensors file"),
    ],
)
def test_what_cannot_be_reproduced_is_refused_by_name(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = saved(published("bert"), tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        from_published(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_config(layer_types=["full_attention"]), "layer_types .*expected one for each of 4 layers"),
        (with_config(layer_types=["full_attention"] * 3 + ["chunked"]), "layer_types .*chunked"),
        (with_config(rope_scaling={"rope_type": "yarn"}), "stretches its rotary positions"),
        (with_config(hidden_activation="silu"), "hidden_activation: 'silu'"),
    ],
)
def test_modernberts_that_cannot_be_reproduced(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = saved(published("modernbert"), tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        from_published(folder)


@pytest.mark.parametrize("files", [None, {"a": "../model.safetensors"}, {"a": "/model.safetensors"}])
def test_an_index_that_leads_elsewhere_is_refused(files: Any, tmp_path: Path) -> None:
    folder = saved(published("bert"), tmp_path)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(UserError, match="no weight_map from tensors to files in the same folder"):
        from_published(folder)


def test_every_kind_is_tested() -> None:
    assert {CASES[name].family.lower() for name in CASES} == {kind.replace("-", "") for kind in KINDS}
