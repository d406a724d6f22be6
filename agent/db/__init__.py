"""PostgreSQL: the queries, the schema, and what they mean in the domain's words."""
