"""From a hint to a job: what webhooks tell is stored, and what it is about is read from Ovation and judged."""
