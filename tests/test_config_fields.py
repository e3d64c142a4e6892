"""Fields of a config.json that say yes or no: what is neither is refused, and never taken for one of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from moewright.backbone.load import load_model
from moewright.backbone.save import save_model
from moewright.errors import ModelError
from tests.sparse import grafted, model_of, moe_of


def edit(folder: Path, file: str, **fields: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))


READ = {
    "qwen2_moe, silent": ("norm_topk_prob", "qkv_bias", "tie_word_embeddings"),
    "qwen3_moe": ("norm_topk_prob", "use_sliding_window", "tie_word_embeddings"),
    "mixtral": ("tie_word_embeddings",),
    "flex_olmo": ("norm_topk_prob",),
    "glm4_moe": ("norm_topk_prob",),
    "switch_transformers": ("router_bias", "tie_word_embeddings"),
}


@pytest.mark.parametrize("value", ["false", "x", 1, 0, None])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in READ.items() for name in names])
def test_what_is_neither_true_nor_false_is_refused(tmp_path: Path, kind: str, name: str, value: Any) -> None:
    folder = save_model(model_of(kind), tmp_path / "out")
    (folder / "moewright.json").unlink()  # whose word on ties comes first
    load_model(folder)
    edit(folder, "config.json", **{name: value})
    with pytest.raises(ModelError, match=name) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    if kind != "glm4_moe":  # whose own class, without moewright.json, says it before us
        model_type = kind.split(",")[0]
        assert str(caught.value) == (
            f"config.json of type {model_type}: {name}={value!r}, where true or false is expected"
        )


@pytest.mark.parametrize("value", ["false", 1, None])
def test_nor_where_nllb_has_biases_of_its_routers(tmp_path: Path, value: Any) -> None:
    layers = dict.fromkeys(range(4), moe_of("m2m_100"))
    folder = save_model(grafted("m2m_100", layers), tmp_path / "out", format="nllb-moe")
    edit(folder, "config.json", router_bias=value)
    with pytest.raises(ModelError, match=r"nllb-moe: router_bias=.*, where true or false"):
        load_model(folder)


@pytest.mark.parametrize(("kind", "name"), [("mixtral", "tie_word_embeddings"), ("glm4_moe, silent", "selection_bias")])
def test_nor_in_our_own_record(tmp_path: Path, kind: str, name: str) -> None:
    folder = save_model(model_of(kind), tmp_path / "out")
    edit(folder, "moewright.json", **{name: "x"})
    with pytest.raises(ModelError, match=rf"moewright.json of type .*: {name}='x', where true or false"):
        load_model(folder)


def test_what_glm_is_told_of_its_weights_is_read_by_us_where_the_backbone_is_another(tmp_path: Path) -> None:
    folder = save_model(model_of("glm4_moe"), tmp_path / "out")
    edit(folder, "config.json", norm_topk_prob="false")
    with pytest.raises(ModelError, match="glm4_moe: norm_topk_prob='false', where true or false"):
        load_model(folder)
