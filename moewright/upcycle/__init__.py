"""Dense to sparse: plan, methods, scaling, verification."""
