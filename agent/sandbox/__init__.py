"""A stand-in for Ovation: its web API, an S3-compatible object store, and its webhook sender.

It imports nothing else of the agent, so that the agent's mistakes do not cancel out here; the released `ovation`
client, botocore, s5cmd and curl are its judges. Reading order: settings, records, documents, tokens, model, uploads,
api and its parts, lab; signatures, objects, bodies, s3 and its parts; outbox, webhooks; faults; admin, control, server.
"""
