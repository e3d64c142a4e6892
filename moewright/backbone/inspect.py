"""The contents of a model folder, read without loading its weights."""

from pathlib import Path
from typing import Any

from moewright.backbone.blocks import moe_layers
from moewright.backbone.load import folder_dtype, open_skeleton
from moewright.backbone.sizes import parameter_counts
from moewright.backbone.skeleton import embedding_of, has_tied_head
from moewright.checkpoint.read import RECORD, ModelFolder
from moewright.family.table import family_of


def inspect_folder(path: str | Path, *, checksums: bool = False) -> dict[str, Any]:
    """Layers, experts, parameters (embeddings counted tied and untied), dtype and origin of a dense or sparse folder.

    Reads headers and configs, and of a sparse folder the two embeddings. With `checksums` every file is read and
    compared with what `moewright.json` remembers of it. Raises `ModelError`.
    """
    folder = ModelFolder(path)
    if checksums:
        folder.verify_checksums()
    model, written_as = open_skeleton(folder)
    family = family_of(model.config)
    places = family.places(model.config)
    counts, sparse = parameter_counts(model), moe_layers(model)
    tied = has_tied_head(model)
    again = embedding_of(model).numel() if tied else 0
    facts: dict[str, Any] = {
        "folder": str(folder.path),
        "kind": "sparse" if sparse else "dense",
        "model_type": written_as.name,
        "backbone": model.config.model_type,
        "layers": len(places),
        "hidden_size": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "dtype": str(folder_dtype(folder)).removeprefix("torch."),
        "embeddings": "tied" if tied else "untied",
        "parameters": {
            "total": counts.total,
            "active": counts.active,
            "total_untied": counts.total + again,
            "active_untied": counts.active + again,
        },
        "bytes": sum(info.end - info.start for info in folder.tensors.values()),
    }
    if checksums:
        facts["checksums"] = "match" if folder.record else f"not known: there is no {RECORD}"
    if sparse:
        moe = next(iter(sparse.values())).config
        facts["experts"] = {
            "sparse_layers": sorted(sparse) if len(family.stacks) == 1 else [places[n].label for n in sorted(sparse)],
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "expert_size": moe.expert_size,
            "router_order": moe.router_order,
        }
    else:
        facts["feed_forward_size"] = family.size_of(model.config, 0)
    origin = {key: value for key, value in (folder.record or {}).items() if key not in ("files", "backbone")}
    return facts | ({"origin": origin} if origin else {})
