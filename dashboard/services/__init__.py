"""Every write: keyword-only functions, each one transaction, guarded by the lifecycle and by the actor's role."""
