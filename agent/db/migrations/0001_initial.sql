-- Deliveries as they came in, kept so that "why did this run?" has an answer.
CREATE TABLE deliveries (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    received_at timestamptz NOT NULL DEFAULT now(),
    source      text        NOT NULL CHECK (source IN ('webhook', 'hpc_run')),
    organization integer,
    entity_type text        NOT NULL,
    entity_id   text        NOT NULL
);
CREATE INDEX deliveries_entity ON deliveries (entity_id, received_at DESC);

-- What may have changed in Ovation and is to be looked at again. A row is due when due_at is set.
-- `generation` goes up with every hint, so that one that arrives during a look is not lost to that look's end.
CREATE TABLE watched (
    entity_id    text        PRIMARY KEY,
    entity_type  text        NOT NULL CHECK (entity_type IN ('Activity', 'Revision')),
    organization integer,    -- NULL until a payload or a look has named it
    changed_at   timestamptz NOT NULL,
    unquiet_since timestamptz, -- the first change since the last look: bounds the wait for a quiet time
    due_at       timestamptz,
    cause        text        NOT NULL DEFAULT 'webhook' CHECK (cause IN ('webhook', 'reconcile')),
    gained       text[]      NOT NULL DEFAULT '{}', -- the inputs and related files that somebody told were added
    listed_at    text,        -- the updated-at with which reconciliation last saw it
    history      text[],      -- what was linked before the agent was installed; NULL until somebody looked
    generation   bigint      NOT NULL DEFAULT 1,
    lease_token  bigint      NOT NULL DEFAULT 0,
    lease_until  timestamptz,
    lease_holder text,
    attempt      integer     NOT NULL DEFAULT 0,
    judged_at    timestamptz,
    reasons      text[]      NOT NULL DEFAULT '{}'
);
CREATE INDEX watched_due ON watched (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX watched_oldest_look ON watched (organization, judged_at NULLS FIRST) WHERE entity_type = 'Activity';

-- When each organization is to be walked next. Several agents share it; the one that holds the lease walks.
CREATE TABLE reconciliations (
    organization integer     PRIMARY KEY,
    due_at       timestamptz NOT NULL DEFAULT now(),
    lease_token  bigint      NOT NULL DEFAULT 0,
    lease_until  timestamptz,
    finished_at  timestamptz,
    activities   integer,
    changed      integer
);

CREATE TABLE jobs (
    id                uuid        PRIMARY KEY,
    organization      integer     NOT NULL,
    activity_id       text        NOT NULL,
    activity_name     text        NOT NULL,
    project_id        text        NOT NULL,
    run               integer     NOT NULL CHECK (run >= 1),
    plan              jsonb       NOT NULL,
    image_name        text        NOT NULL,
    image_revision_id text        NOT NULL,
    trigger           text        NOT NULL CHECK (trigger IN ('webhook', 'reconcile', 'hpc_run', 'rerun')),
    requested_by      text,
    state             text        NOT NULL DEFAULT 'queued' CHECK (state IN (
        'queued', 'staging', 'launching', 'running', 'collecting', 'reporting', 'succeeded', 'failed', 'cancelled')),
    due_at            timestamptz NOT NULL DEFAULT now(),
    attempt           integer     NOT NULL DEFAULT 0,
    waiting_for       text,
    lease_token       bigint      NOT NULL DEFAULT 0, -- the fence: every write of a step carries it
    lease_until       timestamptz,
    lease_holder      text,
    cancel_requested  boolean     NOT NULL DEFAULT false,
    verdict           text        CHECK (verdict IN ('succeeded', 'failed', 'cancelled')),
    fault_class       text        CHECK (fault_class IN (
        'user_code', 'image', 'memory', 'time_limit', 'node', 'input', 'platform', 'agent')),
    fault_message     text,
    exit_code         integer,
    native_id         text,
    folder_id         text, -- the run's Folder in Ovation, made once
    progress          jsonb       NOT NULL DEFAULT '{}',
    created_at        timestamptz NOT NULL DEFAULT now(),
    started_at        timestamptz,
    finished_at       timestamptz,
    UNIQUE (activity_id, run),
    CHECK ((fault_class IS NULL) = (fault_message IS NULL)),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL))
);
CREATE INDEX jobs_due ON jobs (state, due_at) WHERE finished_at IS NULL;
CREATE INDEX jobs_recent ON jobs (created_at DESC);
-- One live job an Activity.
CREATE UNIQUE INDEX jobs_live ON jobs (activity_id) WHERE finished_at IS NULL;

-- Every move, for whoever asks what happened.
CREATE TABLE job_events (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id  uuid        NOT NULL REFERENCES jobs ON DELETE CASCADE,
    at      timestamptz NOT NULL DEFAULT now(),
    state   text        NOT NULL,
    attempt integer     NOT NULL,
    note    text,
    done    jsonb       -- how far the step that was left had come: files and bytes
);
CREATE INDEX job_events_job ON job_events (job_id, id);

-- What was put into Ovation for a job, each row written before the next call is made.
CREATE TABLE outputs (
    job_id      uuid    NOT NULL REFERENCES jobs ON DELETE CASCADE,
    kind        text    NOT NULL CHECK (kind IN ('log', 'folder', 'output')),
    path        text    NOT NULL, -- relative, as it is in Ovation
    size        bigint,
    sha256      text,
    entity_id   text,             -- the Folder or File
    revision_id text,
    uploaded    boolean NOT NULL DEFAULT false,
    linked      boolean NOT NULL DEFAULT false,
    PRIMARY KEY (job_id, kind, path)
);
