"""What a run says of itself: reports, diagnostics, checkpoints, sizes."""
