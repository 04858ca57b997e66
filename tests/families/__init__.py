"""A small builder of seeded checkpoints for each family."""
