"""Dense to dense: a larger model from a trained one."""
