"""Reading Hugging Face model folders that we did not write, and do not trust."""

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moewright.checkpoint.ahead import HashesAhead
from moewright.checkpoint.check import difference
from moewright.checkpoint.disk import reading
from moewright.checkpoint.files import record_of
from moewright.checkpoint.tensorfile import TensorInfo, read_header, read_tensor
from moewright.checkpoint.untrusted import file_inside, parse_records, read_json
from moewright.errors import ModelError, listed

GRAIN = 2**15  # elements; from here on torch uses several threads
CONFIG = "config.json"
RECORD = "moewright.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
INSIDE = ".moewright-tmp"
"""The temporary folder of a model on its way into an existing folder."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Settings through which a config can make transformers import or download code. Such a choice is the caller's alone.
CODE_KEYS = frozenset({"auto_map", "attn_implementation", "experts_implementation", "trust_remote_code"})
# A number in spite of its name: by it, Gemma's configs before transformers 5 tell sliding layers from others.
PLAIN_PRIVATE = frozenset({"_sliding_window_pattern"})
DEQUANTISERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Classes of transformers that turn quantised weights into plain ones when they are loaded, by their method."""
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def interrupted_name(name: str) -> str:
    """The name of the old folder ``name`` while a new one is put in its place."""
    return f".{name}.moewright-old"


class ModelFolder:
    """A Hugging Face model folder opened for reading: headers are read and checked, no tensor is allocated.

    ``config`` is config.json without private keys (``_...``) and without ``auto_map`` and the like, at any depth:
    no code that a folder names is ever run. ``record`` is moewright.json, or None in a folder that we did not write.
    ``tensors`` lists the tensors in the order of their files and of their bytes.

    Tensors that hold NaN or Inf are refused when they are read, unless ``allow_nonfinite``. ``hashes`` are the hashes
    of its files, where they have been computed already.

    ModelError if the folder is missing, empty, damaged, quantised, holds only pickled weights, or names a file
    outside itself. Files are opened anew for each read, so nothing needs to be closed.
    """

    path: Path
    config: dict[str, Any]
    record: dict[str, Any] | None
    tensors: dict[str, TensorInfo]

    def __init__(self, path: str | Path, *, allow_nonfinite: bool = False, hashes: HashesAhead | None = None) -> None:
        self.path = Path(path)
        self.allow_nonfinite = allow_nonfinite
        self._hashes = hashes
        self._fingerprint: str | None = None
        self._told_of_dtypes = False
        self.config, self.record = read_description(self.path)
        with reading(self.path):
            self.tensors = _read_headers(self.path)
        quantised = [info.name for info in self.tensors.values() if info.dtype in FLOAT8]
        if quantised:
            raise _quantised(self.path, f"float8 tensors {listed(quantised)}", method="fp8")
        if blocks := [name for name in self.tensors if name.endswith("_blocks")]:
            raise _quantised(self.path, f"tensors {listed(blocks)}", method="mxfp4")

    def check(self, expected: Mapping[str, tuple[int, ...]], *, optional: Collection[str] = ()) -> None:
        """Compare names and shapes with ``expected``; ModelError lists the first five that differ.

        A name in ``optional`` may be absent, and may be present without being expected.
        """
        missing = [name for name in expected if name not in self.tensors and name not in optional]
        if missing:
            raise ModelError(f"{self.path}: tensors missing that {CONFIG} calls for: {listed(missing)}")
        unknown = [name for name in self.tensors if name not in expected and name not in optional]
        if unknown:
            raise ModelError(f"{self.path}: tensors that {CONFIG} has no place for: {listed(unknown)}")
        shapes = [(name, self.tensors[name].shape, expected[name]) for name in expected if name in self.tensors]
        wrong = [f"{name} is {list(stored)}, not {list(due)}" for name, stored, due in shapes if stored != tuple(due)]
        if wrong:
            raise ModelError(f"{self.path}: shapes that disagree with {CONFIG}: {listed(wrong)}")

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
        """Read one tensor, in its stored dtype, into memory of its own.

        With ``index``, a slice without step for each dim or for the first few, only the bytes of that part are read.
        ModelError if it holds NaN or Inf, unless the folder was opened with ``allow_nonfinite``.
        """
        with reading(self.path):
            tensor = read_tensor(self.tensors[name], index)
        if not self.allow_nonfinite and tensor.is_floating_point() and tensor.numel() > 0:
            # The extremes tell (NaN spreads to both) and, unlike isfinite, need no mask of the tensor's size.
            # Pieces that torch does not share out: its threads would spin against ours, which hash.
            extremes = (torch.aminmax(piece) for piece in tensor.view(-1).split(GRAIN))
            if not all(math.isfinite(low) and math.isfinite(high) for low, high in extremes):
                raise ModelError(
                    f"{self.tensors[name].file}: tensor {name} holds NaN or Inf; use an undamaged model "
                    "(upcycle --allow-nonfinite takes it as it is)"
                )
        return tensor

    def dtype(self, *, but: Callable[[str], bool] = lambda name: False) -> torch.dtype:
        """The dtype of the floating tensors; if they differ, the narrowest that holds all, with a UserWarning once.

        Tensors for whose names `but` is true do not count.
        """
        floating = (info for info in self.tensors.values() if info.dtype.is_floating_point)
        dtypes = sorted({info.dtype for info in floating if not but(info.name)}, key=str)
        if not dtypes:
            raise ModelError(f"{self.path}: no floating-point weights")
        widest = functools.reduce(torch.promote_types, dtypes)
        if len(dtypes) > 1 and not self._told_of_dtypes:
            names = " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            chosen = str(widest).removeprefix("torch.")
            warnings.warn(f"{self.path}: weights of mixed dtypes {names}; {chosen} is used for all", stacklevel=2)
            self._told_of_dtypes = True
        return widest

    def fingerprint(self) -> str:
        """SHA-256 (hex) over config.json and the weight files; reads every byte that was not hashed ahead."""
        if self._fingerprint is None:
            files = {file.name: file for file in (self.path / CONFIG, *self._weight_files())}
            with reading(self.path):
                fingerprint = self._hashes.record_of if self._hashes else record_of
                records = {name: fingerprint(files[name]) for name in files}
            text = "".join(f"{records[name]['sha256']}  {name}\n" for name in sorted(files))
            self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        return self._fingerprint

    def verify_checksums(self) -> None:
        """Compare every file that moewright.json lists with its size and SHA-256; nothing to do without a record.

        ModelError at the first file that differs, or if a weight file is not listed.
        """
        if self.record is None:
            return
        try:
            records = parse_records(self.record.get("files"))
        except ValueError as error:
            raise ModelError(f"{self.path / RECORD}: {error}; write the folder again") from error
        unlisted = sorted({file.name for file in self._weight_files()} - records.keys())
        if unlisted:
            raise ModelError(f"{self.path}: {RECORD} does not list {listed(unlisted)}; write the folder again")
        for name, record in records.items():
            with reading(self.path):
                there = os.path.lexists(self.path / name)
                fault = difference(file_inside(self.path, name) if there else self.path / name, record)
            if fault is not None:
                raise ModelError(f"{self.path}: {fault}; write the folder again, or delete {RECORD} if that was you")

    def _weight_files(self) -> set[Path]:
        return {info.file for info in self.tensors.values()}


def read_description(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """``config`` and ``record`` of a ModelFolder, whether or not the folder has weights. Raises ModelError."""
    path = Path(path)
    with reading(path):
        _require_content(path)
        config = _read_config(path)
        return config, read_json(file_inside(path, RECORD)) if (path / RECORD).exists() else None


def _require_content(path: Path) -> None:
    old = path.parent / interrupted_name(path.name)
    if not path.exists() and old.is_dir():
        raise ModelError(f"{path}: an overwrite was interrupted, the model is in {old}; rename it back or write again")
    if not path.exists():
        raise ModelError(f"{path}: no such folder; a folder with {CONFIG} and *.safetensors is needed")
    if not path.is_dir():
        raise ModelError(f"{path}: not a folder; a folder with {CONFIG} and *.safetensors is needed")
    if not any(path.iterdir()):
        raise ModelError(f"{path}: the folder is empty; {CONFIG} and *.safetensors are needed")
    if (path / INSIDE / CONFIG).exists() and not (path / CONFIG).exists():
        raise ModelError(f"{path}: a save into it was interrupted; save into it again")


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(file_inside(path, CONFIG))
    for key in ("quantization_config", "compression_config"):
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise _quantised(path, f"{key} in {CONFIG}", method=method)
    if config.get("auto_map") is not None:
        warnings.warn(f"{path}: auto_map in {CONFIG} is ignored, code from a model folder is never run", stacklevel=5)
    try:
        cleaned: dict[str, Any] = without_code(config)
    except RecursionError as error:
        raise ModelError(f"{path / CONFIG}: nested too deeply") from error
    return cleaned


def _quantised(path: Path, sign: str, *, method: object) -> ModelError:
    how = "use the model in float32, bfloat16 or float16"
    if isinstance(method, str) and method in DEQUANTISERS:
        option = f"quantization_config={DEQUANTISERS[method]}(dequantize=True)"
        how = f"dequantise it: AutoModelForCausalLM.from_pretrained(SRC, {option}).save_pretrained(DST)"
    return ModelError(f"{path}: quantised weights ({sign}); {how}")


def without_code(value: Any) -> Any:
    """A JSON value without private keys and without those that choose code, at any depth."""
    if isinstance(value, dict):
        return {
            key: without_code(inner)
            for key, inner in value.items()
            if key in PLAIN_PRIVATE or not (key.startswith("_") or key in CODE_KEYS)
        }
    if isinstance(value, list):
        return [without_code(item) for item in value]
    return value


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    single, index = (path / WEIGHTS).exists(), (path / INDEX).exists()
    if single and index:
        raise ModelError(f"{path}: both {WEIGHTS} and {INDEX}; remove the one that is out of date")
    if index:
        return _read_shards(path)
    if not single:
        raise _no_weights(path)
    tensors = read_header(file_inside(path, WEIGHTS))
    if not tensors:
        raise ModelError(f"{path / WEIGHTS}: holds no tensors")
    return tensors


def _no_weights(path: Path) -> ModelError:
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    if shards:
        return ModelError(f"{path}: {listed(shards)}, but no {INDEX} (for one file: no {WEIGHTS}); download it too")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if pickles:
        return ModelError(
            f"{path}: only pickled weights ({listed(pickles)}), which can run code; if you trust them, "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)"
        )
    return ModelError(f"{path}: no {WEIGHTS} and no {INDEX}; download the weights too")


def _read_shards(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX
    places = read_json(file_inside(path, INDEX)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: no weight_map; download the file again")
    for place in places.values():
        if not (isinstance(place, str) and place.endswith(".safetensors")):
            raise ModelError(f"{index}: {place!r} is not the name of a safetensors file")
    tensors: dict[str, TensorInfo] = {}
    unlisted: list[str] = []
    for shard in sorted(set(places.values())):
        for name, info in read_header(file_inside(path, shard)).items():
            if places.get(name) == shard:
                tensors[name] = info
            else:
                unlisted.append(name)
    if unlisted:
        raise ModelError(f"{index}: tensors in the shards that it lacks: {listed(unlisted)}; download the folder again")
    absent = [name for name in places if name not in tensors]
    if absent:
        raise ModelError(f"{index}: names tensors that its shards lack: {listed(absent)}; download the folder again")
    return tensors
