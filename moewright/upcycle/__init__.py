"""Dense to sparse: plan, measure, make."""
