"""Everything that answers HTTP, in the order in which a run meets it: webhooks, hpc_run, jobs, health."""
