"""Reading text, packing it into rows, and the isolation of packed documents."""

import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moewright.data import pack as pack_module
from moewright.data.config import DataConfig
from moewright.data.documents import read_documents
from moewright.data.pack import IGNORE, PackedRows, pack, rows_at, shuffled
from moewright.data.texts import digest, expand
from moewright.data.tokenizer import load_tokenizer
from moewright.errors import DataError, ModelError, UsageError
from tests.models import DECODERS, tiny_model, tiny_tokenizer

END_TOKEN = 256


def packed(documents: list[list[int]], sequence_length: int) -> PackedRows:
    """Rows over the given documents, each closed with the end token."""
    closed = [[*document, END_TOKEN] for document in documents]
    return PackedRows(
        np.concatenate([np.asarray(document, dtype=np.int32) for document in closed]),
        lengths=np.asarray([len(document) for document in closed]),
        sequence_length=sequence_length,
        end_token=END_TOKEN,
    )


# Documents


def test_all_kinds_of_files_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("über\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("pass")
    (tmp_path / "empty.py").write_text(" \n")
    (tmp_path / "c.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", "four"], "id": [1, 2]}), tmp_path / "d.parquet")
    documents = read_documents([str(tmp_path / "*")], cache_dir=tmp_path / "cache")
    assert documents["text"][:] == ["über\n", "pass", "one", "two", "three", "four"]
    names = ("a.txt", "b.py", "c.jsonl", "c.jsonl", "d.parquet", "d.parquet")
    assert documents["source"][:] == [str(tmp_path / name) for name in names]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    for text in ("first", "other"):
        (tmp_path / "a.txt").write_text(text)
        assert read_documents([str(tmp_path / "a.txt")], cache_dir=tmp_path / "cache")["text"][:] == [text]


def test_nothing_is_written_outside_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    read_documents(["a.txt"], cache_dir=tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "cache"]


def test_patterns_are_sorted_and_name_a_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "[x].txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = expand([str(tmp_path / "[x].txt"), str(tmp_path / "b.txt"), str(tmp_path / "**" / "*.txt")])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == ["[x].txt", "b.txt", "a.txt", "sub/c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xff", r"a\.txt: not UTF-8 at byte 3 \(0xff\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3\x28"}\n', r"a\.jsonl: not UTF-8 at byte 24 \(0xc3\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'["x"]\n', r"a\.jsonl:1: a JSON list"),
        ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: no field 'text'; it has 'body'"),
        ("a.jsonl", b'{"text": null}\n', r"a\.jsonl:1: field 'text' is null"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: field 'text' is int"),
        ("a.parquet", b"PAR1 no PAR1", r"a\.parquet: not a Parquet file"),
        ("a.txt", b" \n", r"no text in 1 files"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud800"}\n', r"a\.jsonl:2: field 'text' has half a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"[" * 200_000, r"a\.jsonl:1: not JSON \(maximum recursion depth"),
        ("a.jsonl", b'{"id": ' + b"9" * 5000 + b', "text": "x"}', r"a\.jsonl:1: not JSON \(Exceeds the limit"),
        ("a.txt", b"\xef\xbb\xbfab\xff", r"a\.txt: not UTF-8 at byte 5 \(0xff\)"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_documents([str(tmp_path / name)], cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}\n')
    documents = read_documents([str(tmp_path / "*")], cache_dir=tmp_path / "cache")
    assert documents["text"][:] == ["text", "one", "\ufefftwo"]


def test_the_digest_follows_order_kind_and_bytes(tmp_path: Path) -> None:
    for name, text in {"a.txt": "x", "b.txt": "y", "c.jsonl": "x", "d.txt": "x"}.items():
        (tmp_path / name).write_text(text)
    a, b, c, d = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.jsonl", "d.txt"))
    assert digest([a, b]) == digest([d, b])
    assert len({digest(files) for files in ([a, b], [b, a], [c, b], [a], [a, d])}) == 5
    (tmp_path / "b.txt").write_text("z")
    assert digest([a, b]) != digest([b, a])
    with pytest.raises(DataError, match="no such file"):
        digest([str(tmp_path / "none")])


def test_bad_parquet_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x", None]}), path)
    with pytest.raises(DataError, match="no column 'text'; it has 'body'"):
        read_documents([str(path)], cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: field 'body' is null"):
        read_documents([str(path)], field="body", cache_dir=tmp_path / "cache")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.txt: there is no such file"):
        expand([str(tmp_path / "no.txt")])
    with pytest.raises(DataError, match=r"\*\.txt: the pattern matches no file"):
        expand([str(tmp_path / "*.txt")])
    with pytest.raises(DataError, match="is a folder: name its files"):
        expand([str(tmp_path)])


@pytest.mark.parametrize(
    "changes",
    [{"files": ()}, {"sequence_length": 1}, {"eval_fraction": 1.0}, {"eval_fraction": -0.1}, {"eval_rows": -1}],
)
def test_impossible_data_settings_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(changes))}="):
        DataConfig(**({"files": ("a",), "sequence_length": 8} | changes))


# Packing


def test_a_row_reads_as_described() -> None:
    rows = packed([[1, 2, 3], [4], [5, 6, 7, 8]], 6)  # 1 2 3 E 4 E | 5 6 7 8 E
    batch = rows.batch([0, 1])
    E, X = END_TOKEN, IGNORE
    assert batch.input_ids.tolist() == [[1, 2, 3, E, 4, E], [5, 6, 7, 8, E, E]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 0]]
    assert batch.targets.tolist() == [[2, 3, E, X, E, X], [6, 7, 8, E, X, X]]
    assert batch.token_mask.tolist() == [[True] * 6, [True] * 5 + [False]]


def test_a_cut_document_restarts_and_keeps_its_target() -> None:
    batch = packed([[1, 2, 3, 4, 5]], 3).batch([0, 1])
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.targets.tolist() == [[2, 3, 4], [5, END_TOKEN, IGNORE]]


documents_strategy = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(documents=documents_strategy, sequence_length=st.integers(2, 12))
def test_every_token_is_predicted_once_and_only_within_its_document(
    documents: list[list[int]], sequence_length: int
) -> None:
    rows = packed(documents, sequence_length)
    batch = rows.batch(range(len(rows)))
    closed = [[*document, END_TOKEN] for document in documents]
    expected = Counter(pair for document in closed for pair in itertools.pairwise(document))
    scored = batch.targets != IGNORE
    found = zip(batch.input_ids[scored].tolist(), batch.targets[scored].tolist(), strict=True)
    assert Counter(found) == expected
    assert scored.any(dim=1).all(), "a row without a target"
    assert not (scored & ~batch.token_mask).any()
    assert int((batch.position_ids == 0).sum()) >= len(documents)
    steps = batch.position_ids.diff(dim=1)
    assert ((steps == 1) | (batch.position_ids[:, 1:] == 0)).all()


def test_pack_closes_orders_and_drops_nothing(tmp_path: Path) -> None:
    texts = [f"text {index}" for index in range(20)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    documents = read_documents([str(tmp_path / "a.jsonl")], cache_dir=tmp_path)
    tokenizer = tiny_tokenizer()
    arguments = {"sequence_length": 8, "cache_dir": tmp_path}
    first, again, other = (pack(documents, tokenizer, seed=seed, **arguments) for seed in (0, 0, 1))
    pieces = tokenizer.decode(first.tokens.tolist()).split("<|end|>")
    assert pieces.pop() == ""
    assert sorted(pieces) == sorted(texts)
    assert pieces != texts
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    lengths = np.diff([*first.starts, len(first.tokens)])
    longer = PackedRows(first.tokens, lengths=lengths, sequence_length=9, end_token=256)
    assert longer.fingerprint() != first.fingerprint()


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    documents = read_documents([str(tmp_path / "a.txt")], cache_dir=tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        pack(documents, tokenizer, sequence_length=8, seed=0, cache_dir=tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == len(load_tokenizer(tmp_path, vocabulary=257)) == 257
    with pytest.raises(ModelError, match="the tokenizer has 257 tokens, but the model's embedding has 256 rows"):
        load_tokenizer(tmp_path, vocabulary=256)


@pytest.mark.parametrize("content", ["", "{", '{"model": 3}', '{"model": {"type": "BPE", "vocab": [], "merges": 1}}'])
def test_a_broken_tokenizer_is_a_model_error(tmp_path: Path, content: str) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="no tokenizer that loads") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    total = 7
    epochs = [rows_at(epoch * total, count=total, total=total, seed=3) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    flat = [row for epoch in epochs for row in epoch]
    assert rows_at(5, count=13, total=total, seed=3) == flat[5:18]
    assert rows_at(0, count=total, total=total, seed=4) != epochs[0]


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        pack_module, "shuffled", lambda *args, **kwargs: calls.append(kwargs) or shuffled(*args, **kwargs)
    )
    read = [row for step in range(20) for row in rows_at(step * 5, count=5, total=50, seed=123)]
    assert [call["epoch"] for call in calls] == [0, 1]
    assert sorted(read) == sorted([*range(50)] * 2)


def test_no_two_orders_are_drawn_from_one_stream() -> None:
    orders = [
        shuffled(50, purpose=purpose, seed=seed, epoch=epoch).tolist()
        for purpose in ("documents", "rows", "held-out")
        for seed in (0, 50)
        for epoch in (0, 50)
    ]
    assert len({tuple(order) for order in orders}) == 12


# Isolation: the packed logits of each document equal those of the document alone


ISOLATED = [(family, {}, how) for family in DECODERS for how in ("sdpa", "eager")]
ISOLATED.remove(("gemma2", {}, "sdpa"))  # transformers has none that caps its scores
ISOLATED += [("mistral", {"sliding_window": 4}, how) for how in ("sdpa", "eager")]


@pytest.mark.parametrize(("family", "changes", "implementation"), ISOLATED)
def test_packed_documents_do_not_see_each_other(family: str, changes: dict[str, int], implementation: str) -> None:
    model = tiny_model(family, **changes)
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 1, 13, 2, 17, 3)
    documents = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    rows = packed(documents, 16)
    batch = rows.batch(range(len(rows)))
    assert not batch.token_mask.all(), "the last row is padded"
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        for row in range(len(rows)):
            starts = torch.nonzero(batch.position_ids[row] == 0).flatten().tolist()
            for start, stop in zip(starts, [*starts[1:], rows.sequence_length], strict=True):
                alone = model(input_ids=batch.input_ids[row : row + 1, start:stop], use_cache=False).logits
                torch.testing.assert_close(logits[row, start:stop], alone[0], atol=1e-5, rtol=1e-5)
