"""`import moewright.auto` makes transformers know what is ours: the model type and the experts implementation
"moewright"."""

from moewright.backbone import auto_type, experts_registry

experts_registry.register()
auto_type.register()
