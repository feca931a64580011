"""Which tensors of a model belong to which tasks."""
