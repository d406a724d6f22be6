-- Any number of agents on one database: where a job's files are, and which agents there are.
ALTER TABLE jobs
    ADD COLUMN place text,           -- the data directory that has the job's files; NULL: any agent may take it
    ADD COLUMN launch integer NOT NULL DEFAULT 1 CHECK (launch >= 1), -- which start of the container
    ADD COLUMN suspicion integer NOT NULL DEFAULT 0, -- how often the process ended in the middle of this state's work
    ADD COLUMN alone boolean NOT NULL DEFAULT false, -- its holder works at nothing else: a death now is its own doing
    ADD COLUMN waiting_party text,   -- the outside party that is away
    ADD COLUMN waiting_since timestamptz;

CREATE TABLE agents (
    place      text        PRIMARY KEY,
    host       text        NOT NULL,
    version    text        NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at    timestamptz NOT NULL DEFAULT now(),
    stopped_at timestamptz
);

-- Whose walk it is: a process that comes after another on its data directory need not wait for that one's lease.
ALTER TABLE reconciliations ADD COLUMN lease_holder text;

-- The next of each Project, without reading the whole queue.
CREATE INDEX jobs_queue ON jobs (project_id, due_at) WHERE state = 'queued';
CREATE INDEX jobs_leased ON jobs (lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX jobs_to_end ON jobs (due_at) WHERE cancel_requested AND finished_at IS NULL;
