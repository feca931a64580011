"""For frameworks that hold the training loop; each module imports its own."""
