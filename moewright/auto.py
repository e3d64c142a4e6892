"""`import moewright.auto` makes transformers know what is ours: the experts implementation "moewright"."""

from moewright.backbone.experts_registry import register

register()
