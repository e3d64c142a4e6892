"""`import moewright.auto` makes transformers know what is ours: the model type and the experts implementation
"moewright"."""

from moewright.backbone import experts_registry, native

experts_registry.register()
native.register()
