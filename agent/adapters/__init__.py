"""One module an outside party: Ovation, the object store, the container runtime."""
