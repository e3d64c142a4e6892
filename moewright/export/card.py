"""The model card that goes into an exported folder."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from moewright import __version__
from moewright.backbone.blocks import moe_layers
from moewright.export.report import ExportReport


def model_card(
    report: ExportReport, model: PreTrainedModel, *, origin: Mapping[str, Any], record: Mapping[str, Any]
) -> str:
    """Markdown: what the model is, who loads it, where it came from. The same run gives the same text."""
    layers = moe_layers(model)
    moe = next(iter(layers.values())).config
    lines = [
        "---",
        "library_name: transformers",
        "tags: [mixture-of-experts, moewright]",
        "---",
        "",
        "# A mixture of experts",
        "",
        f"Written by moewright {__version__} as `{report.format}`: a {model.config.model_type} model with",
        f"{moe.num_experts} experts of width {moe.expert_size} in {len(layers)} layers, {moe.top_k} of them for each",
        f"token ({moe.router_order or moe.score}).",
        f"{report.parameters['total']:,} parameters, {report.parameters['active']:,} active for a token.",
        "",
        "## Who loads it",
        "",
        "| runtime | loads | why | evidence |",
        "|---|---|---|---|",
        *(f"| {row.runtime} | {row.loads} | {row.why} | {row.evidence} |" for row in report.runtimes),
        "",
        f"Loaded as {report.proof.loaded_as}, its logits differ from moewright's by",
        f"{report.proof.relative_logit_difference:.1e} of the largest, on texts of up to {report.proof.longest_text}",
        "tokens.",
        *(f"Not compared: {what}." for what in report.proof.not_compared),
        "",
        "## Where it comes from",
        "",
        f"A `{origin['format']}` folder with SHA-256 `{origin['sha256']}` over its config and weights.",
    ]
    upcycle = record.get("upcycle")
    if isinstance(upcycle, dict):
        settings = ", ".join(f"{key} {value}" for key, value in sorted(upcycle.get("settings", {}).items()))
        source = upcycle.get("source", {})
        lines += [
            "",
            f"Before that, upcycled from a dense {source.get('model_type')} model with SHA-256",
            f"`{source.get('sha256')}`: {settings}.",
        ]
    return "\n".join([*lines, ""])
