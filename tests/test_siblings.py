"""Branch-train-mix: means, who owns which expert, and what is no sibling."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import load_file, save_file

from moewright.checkpoint.read import ModelFolder
from moewright.errors import ModelError, UsageError
from moewright.upcycle.config import UpcycleConfig
from moewright.upcycle.siblings import average, check_siblings, sibling_of
from tests.models import write_dense


def exact_mean(tensors):
    """In fractions, so that nothing is rounded before the end."""
    flat = [tensor.flatten().tolist() for tensor in tensors]
    return [float(sum(map(Fraction, values)) / len(values)) for values in zip(*flat, strict=True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_mean_is_rounded_once(dtype, count):
    draws = torch.Generator().manual_seed(count)
    tensors = [torch.randn(5, 7, generator=draws).to(dtype) for _ in range(count)]
    before = [tensor.clone() for tensor in tensors]
    found = average(iter(tensors), name="w", dtype=dtype)
    assert found.dtype == dtype
    right = torch.tensor(exact_mean(tensors), dtype=torch.float64).view(5, 7)
    # Half a unit in the last place, and what the wider sum may add to it: nothing for narrow dtypes.
    eps = torch.finfo(dtype).eps * (0.501 if dtype != torch.float64 else 4)
    largest = torch.stack([t.double().abs() for t in tensors]).amax(dim=0)
    assert ((found.double() - right).abs() <= eps * (right.abs() if dtype != torch.float64 else largest)).all()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_equal_siblings_are_their_own_mean(dtype, count):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(average([tensor] * count, name="w", dtype=dtype), tensor)


def test_the_mean_of_mixed_dtypes():
    narrow, wide = torch.tensor([1.0, 3.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-20, 1.0])
    for pair in ([narrow, wide], [wide, narrow]):
        assert average(pair, name="w", dtype=torch.float32).tolist() == [1.0 + 2**-21, 2.0]
    with pytest.raises(ModelError, match=r"w is \[3\] in sibling 1, \[2\]"):
        average([narrow, torch.zeros(3)], name="w", dtype=torch.float32)


def test_each_sibling_owns_whole_virtual_groups():
    for granularity in (1, 2, 4):
        experts = 6 * granularity
        owners = [sibling_of(j, granularity=granularity, siblings=3) for j in range(experts)]
        for group in range(6):
            assert set(owners[group * granularity : (group + 1) * granularity]) == {group % 3}
        UpcycleConfig(experts=experts, granularity=granularity, top_k=granularity, siblings=("b", "c"))
    with pytest.raises(UsageError, match=r"granularity=2 and 3 siblings: .* multiple of 6 experts"):
        UpcycleConfig(experts=8, granularity=2, top_k=2, siblings=("b", "c"))


def change_config(folder, **changes):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check(*folders):
    check_siblings([ModelFolder(folder) for folder in folders])


@pytest.fixture
def pair(tmp_path):
    return write_dense(tmp_path / "a", seed=0), write_dense(tmp_path / "b", seed=1)


def test_siblings_may_differ_in_what_changes_nothing(tmp_path, pair):
    a, b = pair
    check(a, b, write_dense(tmp_path / "c", seed=2))
    change_config(b, eos_token_id=[256, 257], use_cache=False, transformers_version="4.0.0", dtype="bfloat16")
    change_tensors(b, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    # A setting that is the family's default may be said or not.
    fields = json.loads((b / "config.json").read_text())
    del fields["attention_bias"], fields["hidden_act"]
    (b / "config.json").write_text(json.dumps(fields))
    check(a, b)


def test_a_tied_head_may_be_stored_or_not(tmp_path):
    a, b = (write_dense(tmp_path / name, tie_word_embeddings=True, seed=3) for name in "ab")
    change_tensors(b, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" in ModelFolder(b).tensors
    assert "lm_head.weight" not in ModelFolder(a).tensors
    check(a, b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, not 1e-06"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', not 'silu'"),
        ({"rope_theta": 5e5}, "rope_parameters is"),
        ({"num_attention_heads": 8}, "is 8, not 4"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, not False"),
    ],
)
def test_another_config_is_no_sibling(pair, changes, words):
    a, b = pair
    if "rope_theta" in changes:
        fields = json.loads((b / "config.json").read_text())
        fields.pop("rope_parameters", None)
        (b / "config.json").write_text(json.dumps(fields))
    change_config(b, **changes)
    with pytest.raises(ModelError, match=f"b is no sibling of .*a: .*{words}"):
        check(a, b)


def test_another_family_is_no_sibling(tmp_path):
    a, b = write_dense(tmp_path / "a"), write_dense(tmp_path / "b", "qwen3")
    with pytest.raises(ModelError, match="no sibling"):
        check(a, b)


def test_other_tensors_are_no_sibling(pair):
    a, b = pair
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(b, lambda tensors: tensors.update({name: tensors[name][:60].clone()}))
    with pytest.raises(ModelError, match=rf"{name} is \[60, 32\], not \[64, 32\]"):
        check(a, b)
    change_tensors(b, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"it lacks {name}"):
        check(a, b)
    with pytest.raises(ModelError, match=f"it has one tensor more, {name}"):
        check(b, a)


def test_another_vocabulary_is_no_sibling(pair):
    a, b = pair
    path = b / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(tokenizer))
    check(a, b)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"tokenizer\.json has another vocabulary"):
        check(a, b)
    path.unlink()
    check(a, b)
