"""Where the zeros go: what moves the layers' offsets."""
