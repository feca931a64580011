"""The layers of a run: prunable tensors with a soft threshold on each."""
