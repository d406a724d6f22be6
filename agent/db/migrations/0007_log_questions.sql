-- What one agent asks another one about a log that is on that one's disk. A row lives for seconds.
CREATE TABLE log_questions (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    place       text        NOT NULL,
    job_id      uuid        NOT NULL,
    launch      integer     NOT NULL,
    stream      text        NOT NULL CHECK (stream IN ('stdout', 'stderr')),
    position    bigint      NOT NULL,
    lines       bigint,      -- begin with no more than so many last lines, or bytes, of what is there
    most_bytes  bigint,
    asked_at    timestamptz NOT NULL DEFAULT now(),
    answered_at timestamptz,
    begins      bigint,      -- NULL in an answer: there is no such file
    content     bytea
);
CREATE INDEX log_questions_open ON log_questions (place) WHERE answered_at IS NULL;
