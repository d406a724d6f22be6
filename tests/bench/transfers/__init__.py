"""Transfers, side by side with s5cmd, boto3, curl and the released client: `python -m tests.bench.transfers`."""
