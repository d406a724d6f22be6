-- works from: 7
-- Batch jobs that do the rest of a run on a compute node, each in a directory of its own there: its place.
-- A row is there from the moment a job is handed over until the batch job is over and nothing of it is left.
CREATE TABLE node_runs (
    place       text        PRIMARY KEY,
    job_id      uuid        NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    agent       text        NOT NULL,   -- the agent that submits it and sees to its end
    directory   text,                   -- what the cluster and that agent share of it
    made_at     timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX node_runs_agent ON node_runs (agent);
CREATE INDEX node_runs_job ON node_runs (job_id);
