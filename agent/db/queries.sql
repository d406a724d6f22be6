-- name: take_hints
-- Keep hints and make their entities due after the quiet time; returns the message ids that were not known before.
-- Many hints on an entity in one call count like as many calls. Each further one starts the quiet time again, until the
-- longest wait is over. Without a source they are no deliveries, and only make their entities due. In the order of their
-- ids, so that those who write several rows at once do not wait for each other in a ring.
WITH hints AS (
    SELECT * FROM unnest(:entity_ids::text[], :entity_types::text[], :organizations::integer[], :gained::text[],
        :message_ids::text[]) WITH ORDINALITY AS h (entity_id, entity_type, organization, gained, message_id, place)),
kept AS (
    INSERT INTO deliveries (source, organization, entity_type, entity_id, message_id)
    SELECT :source::text, organization, entity_type, entity_id, message_id FROM hints
    WHERE :source::text IS NOT NULL ORDER BY message_id, place
    ON CONFLICT DO NOTHING
    RETURNING message_id, entity_id),
news AS (
    SELECT * FROM hints WHERE message_id IS NULL OR (message_id, entity_id) IN (SELECT message_id, entity_id FROM kept)),
due AS (
    INSERT INTO watched AS w (
        entity_id, entity_type, organization, changed_at, unquiet_since, due_at, gained, generation)
    SELECT entity_id, (array_agg(entity_type ORDER BY place))[1],
        (array_agg(organization ORDER BY place DESC) FILTER (WHERE organization IS NOT NULL))[1],
        now(), now(), now() + least(:settle::interval, :longest::interval),
        coalesce(array_agg(DISTINCT gained) FILTER (WHERE gained IS NOT NULL), '{}'), count(*)
    FROM news GROUP BY entity_id ORDER BY entity_id
    ON CONFLICT (entity_id) DO UPDATE SET
        organization = coalesce(excluded.organization, w.organization),
        changed_at = now(), unquiet_since = coalesce(w.unquiet_since, now()),
        due_at = least(now() + :settle::interval, coalesce(w.unquiet_since, now()) + :longest::interval),
        cause = 'webhook', gained = ARRAY(SELECT DISTINCT unnest(w.gained || excluded.gained)),
        generation = w.generation + excluded.generation, attempt = 0)
SELECT DISTINCT message_id FROM kept WHERE message_id IS NOT NULL;

-- name: sweep_deliveries$
-- Remove old deliveries, of the first so many only, and tell how many there were.
WITH first AS (SELECT id, received_at FROM deliveries ORDER BY id LIMIT :most),
gone AS (
    DELETE FROM deliveries WHERE id <= (SELECT max(id) FROM first WHERE received_at < now() - :age::interval) RETURNING 1)
SELECT count(*) FROM gone;

-- name: claim_watched
-- Take due entities to look at, longest due first, and raise each one's fence. What is leased to this holder and none of
-- what it knows to hold, it lost with its connection.
UPDATE watched SET
    lease_token = lease_token + 1, lease_until = now() + :lease, lease_holder = :holder, unquiet_since = NULL
WHERE entity_id IN (
    SELECT entity_id FROM watched
    WHERE due_at <= now() AND (lease_until IS NULL OR lease_until < now()
        OR (lease_holder = :holder AND entity_id <> ALL(:held::text[])))
    ORDER BY due_at LIMIT :most FOR UPDATE SKIP LOCKED)
RETURNING *;

-- name: leave_watched!
-- An agent stops: what it was looking at is for others to look at now.
UPDATE watched SET lease_until = NULL WHERE lease_holder = :holder AND lease_until IS NOT NULL;

-- name: judge_watched<!
-- Close a look. A hint that came during it keeps its own due_at. What was told to be gained is settled with history.
UPDATE watched SET
    judged_at = now(), reasons = :reasons, attempt = :attempt, lease_until = NULL,
    organization = coalesce(:organization, organization),
    history = coalesce(:history::text[], history),
    gained = CASE WHEN generation = :generation AND :history::text[] IS NOT NULL THEN '{}' ELSE gained END,
    due_at = CASE WHEN generation = :generation THEN :due_at ELSE due_at END
WHERE entity_id = :entity_id AND lease_token = :lease_token
RETURNING entity_id;

-- name: make_reconciliation_due!
-- An agent starts: what happened while none ran is to be found now.
UPDATE reconciliations SET due_at = now() WHERE due_at > now();

-- name: claim_reconciliation$
-- Take an organization whose walk is due; each agent that asks while another walks gets nothing. Who asks does not walk:
-- a lease of its own is of a walk that broke off.
INSERT INTO reconciliations AS r (organization, lease_token, lease_until, lease_holder)
VALUES (:organization, 1, now() + :lease, :holder)
ON CONFLICT (organization) DO UPDATE SET
    lease_token = r.lease_token + 1, lease_until = now() + :lease, lease_holder = :holder
    WHERE r.due_at <= now() AND (r.lease_until IS NULL OR r.lease_until < now() OR r.lease_holder = :holder)
RETURNING lease_token;

-- name: leave_walks!
-- An agent stops: where it walked, others may now.
UPDATE reconciliations SET lease_until = NULL WHERE lease_holder = :holder AND lease_until IS NOT NULL;

-- name: end_reconciliation!
-- Close a walk, or give it up, and say when the next one is due.
UPDATE reconciliations SET
    lease_until = NULL, due_at = now() + :next, finished_at = now(), activities = :activities, changed = :changed
WHERE organization = :organization AND lease_token = :lease_token;

-- name: note_listed$
-- Keep what a walk saw and make due what is new or changed since the last one; tells how many that are.
-- What was neither made nor changed since the agent was installed is only kept: a slow round looks at it.
WITH listed AS (
    SELECT * FROM unnest(:ids::text[], :listed_at::text[], :recent::boolean[]) AS l (id, listed_at, recent)),
noted AS (
    INSERT INTO watched AS w (entity_id, entity_type, organization, changed_at, listed_at, due_at, cause)
    SELECT id, 'Activity', :organization, CASE WHEN recent THEN now() ELSE to_timestamp(0) END, listed_at,
        CASE WHEN recent THEN now() END, 'reconcile' FROM listed
    ORDER BY id
    ON CONFLICT (entity_id) DO UPDATE SET
        listed_at = excluded.listed_at, organization = excluded.organization,
        changed_at = CASE WHEN excluded.due_at IS NULL THEN w.changed_at ELSE now() END,
        generation = w.generation + CASE WHEN excluded.due_at IS NULL THEN 0 ELSE 1 END,
        cause = CASE WHEN w.due_at IS NULL THEN 'reconcile' ELSE w.cause END,
        due_at = coalesce(w.due_at, excluded.due_at)
        WHERE w.listed_at IS DISTINCT FROM excluded.listed_at
    RETURNING due_at)
SELECT count(*) FROM noted WHERE due_at IS NOT NULL;

-- name: look_again_slowly$
-- Make due the Activities that nobody has looked at for longest, up to half of them among those that changed lately.
WITH idle AS (
    SELECT entity_id, judged_at, changed_at > now() - interval '7 days' AS lately FROM watched
    WHERE organization = :organization AND entity_type = 'Activity' AND due_at IS NULL
        AND (judged_at IS NULL OR judged_at < now() - :age::interval)),
recent AS (SELECT entity_id FROM idle WHERE lately ORDER BY judged_at NULLS FIRST LIMIT :most / 2),
rest AS (
    SELECT entity_id FROM idle WHERE entity_id NOT IN (SELECT entity_id FROM recent)
    ORDER BY judged_at NULLS FIRST LIMIT :most - (SELECT count(*) FROM recent)),
chosen AS (SELECT entity_id FROM recent UNION ALL SELECT entity_id FROM rest),
free AS (
    SELECT entity_id FROM watched WHERE entity_id IN (SELECT entity_id FROM chosen) AND due_at IS NULL
    FOR UPDATE SKIP LOCKED),
due AS (UPDATE watched SET due_at = now(), cause = 'reconcile' WHERE entity_id IN (SELECT entity_id FROM free) RETURNING 1)
SELECT count(*) FROM due;

-- name: installed_at$
-- When the agent was first installed on this database.
SELECT min(applied_at) FROM schema_migrations;

-- name: get_watched^
-- What is known of an entity's last look.
SELECT * FROM watched WHERE entity_id = :entity_id;

-- name: heard^
-- Since when (seconds) no webhook has come, and how many runs of the last day were found without one.
SELECT extract(epoch FROM now() - (SELECT max(received_at) FROM deliveries WHERE source = 'webhook'))::float8 AS last,
    (SELECT count(*) FROM jobs WHERE trigger = 'reconcile' AND created_at > now() - interval '1 day') AS found;

-- name: list_deliveries
-- The newest hints about an entity.
SELECT * FROM deliveries WHERE entity_id = :entity_id ORDER BY received_at DESC LIMIT :most;

-- name: plans_of_activity
-- What earlier runs of an Activity worked on.
SELECT plan FROM jobs WHERE activity_id = :activity_id;

-- name: insert_job^
-- Make a job with the Activity's next run number; nothing when one is live.
WITH made AS (
    INSERT INTO jobs (id, organization, activity_id, activity_name, project_id, run, plan, image_name,
        image_revision_id, trigger, requested_by, exact_of)
    SELECT :id, :organization, :activity_id, :activity_name, :project_id,
        coalesce((SELECT max(run) FROM jobs WHERE activity_id = :activity_id), 0) + 1,
        :plan, :image_name, :image_revision_id, :trigger, :requested_by, :exact_of
    ON CONFLICT DO NOTHING
    RETURNING *),
told AS (INSERT INTO job_events (job_id, state, attempt) SELECT id, state, attempt FROM made)
SELECT * FROM made;

-- name: live_job^
-- The job of an Activity that has not ended, if any.
SELECT * FROM jobs WHERE activity_id = :activity_id AND finished_at IS NULL;

-- name: claim_jobs
-- Take due jobs whose files are here or nowhere yet, longest due first, and raise each one's fence.
-- So many of each group of states. One that is bound to its place takes no others. What a batch job works at on a
-- compute node is for the agent that sees to it to take back.
-- From an agent that is gone, what it was to stage is taken over, and what somebody wants to end. One that has stopped
-- may be on its way back: only what it was to stage is taken over at once, the rest when it stays away.
-- Suspects, whose work has ended the process more than once, are taken by themselves, the worst first.
WITH due AS MATERIALIZED (
    SELECT job.id FROM jsonb_to_recordset(:wanted::text::jsonb) AS wanted (states text[], most integer)
    CROSS JOIN LATERAL (
        SELECT id FROM jobs
        WHERE finished_at IS NULL AND state = ANY(wanted.states) AND due_at <= now()
            AND lease_until IS NULL AND (suspicion >= :suspects_from) = :alone
            AND (place = :place OR (NOT :bound AND (
                place IS NULL OR ((state = 'staging' OR cancel_requested) AND NOT EXISTS (
                    SELECT 1 FROM agents a WHERE a.place = jobs.place
                        AND a.seen_at > now() - CASE WHEN state = 'staging' THEN :gone::interval ELSE :lost::interval END
                        AND (a.stopped_at IS NULL OR state <> 'staging'))
                    AND NOT EXISTS (SELECT 1 FROM node_runs n WHERE n.place = jobs.place)))))
        ORDER BY suspicion DESC, due_at LIMIT wanted.most FOR UPDATE SKIP LOCKED) job)
UPDATE jobs SET
    lease_token = lease_token + 1, lease_until = now() + :lease, lease_holder = :place, place = :place, alone = :alone
WHERE id = ANY(ARRAY(SELECT id FROM due))
RETURNING *, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds;

-- name: claim_queued
-- Let queued jobs in, each Project in turn, so that one's thousand do not starve another's one. Nothing is let in while
-- as many as `ahead` are being staged here or wait to be launched: what waits on the disk helps nobody. Nor are there
-- more than that with compute nodes.
WITH RECURSIVE projects AS (
    SELECT min(project_id) AS project_id FROM jobs WHERE state = 'queued'
    UNION ALL
    SELECT (SELECT min(project_id) FROM jobs WHERE state = 'queued' AND project_id > p.project_id)
    FROM projects p WHERE p.project_id IS NOT NULL),
busy AS (
    SELECT project_id, count(*) AS jobs FROM jobs
    WHERE finished_at IS NULL AND state IN ('staging', 'launching', 'running') GROUP BY project_id),
ahead AS (
    SELECT count(*) AS jobs FROM jobs
    WHERE finished_at IS NULL AND state IN ('staging', 'launching') AND place = :place
        AND (lease_until IS NOT NULL OR due_at <= now())),
handed_over AS (SELECT count(*) AS jobs FROM node_runs WHERE agent = :place),
turns AS MATERIALIZED (
    SELECT first.id, first.due_at, first.turn + coalesce(busy.jobs, 0) AS turn
    FROM projects p
    CROSS JOIN LATERAL (
        SELECT id, due_at, row_number() OVER (ORDER BY due_at, id) AS turn FROM (
            SELECT id, due_at FROM jobs
            WHERE state = 'queued' AND project_id = p.project_id AND due_at <= now() AND lease_until IS NULL
                AND suspicion < :suspects_from
            ORDER BY due_at LIMIT :most) q) first
    LEFT JOIN busy ON busy.project_id = p.project_id),
let_in AS MATERIALIZED (
    SELECT j.id FROM jobs j JOIN turns t ON t.id = j.id
    WHERE j.id = ANY(ARRAY(SELECT id FROM turns)) AND j.state = 'queued' AND j.lease_until IS NULL
    ORDER BY t.turn, t.due_at LIMIT greatest(0, least(
        :most, :ahead - (SELECT jobs FROM ahead) - (SELECT jobs FROM handed_over)))
    FOR UPDATE OF j SKIP LOCKED)
UPDATE jobs SET
    lease_token = lease_token + 1, lease_until = now() + :lease, lease_holder = :place, place = :place, alone = false
WHERE id = ANY(ARRAY(SELECT id FROM let_in))
RETURNING *, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds;

-- name: count_suspects$
-- How many jobs are due here whose work has ended the process more than once.
SELECT count(*) FROM jobs
WHERE finished_at IS NULL AND suspicion >= :suspects_from AND due_at <= now() AND lease_until IS NULL
    AND (place = :place OR (place IS NULL AND NOT :bound));

-- name: expire_leases!
-- An agent starts: the leases of the one that ran on its data directory before it end now. In the order of their ids:
-- what that one wrote last may not be committed yet.
WITH held AS (SELECT id FROM jobs WHERE lease_holder = :holder AND lease_until > now() ORDER BY id FOR UPDATE),
jobs_expired AS (
    UPDATE jobs SET lease_until = now() - interval '1 microsecond' WHERE id IN (SELECT id FROM held)),
looks AS (
    SELECT entity_id FROM watched WHERE lease_holder = :holder AND lease_until > now() ORDER BY entity_id FOR UPDATE)
UPDATE watched SET lease_until = now() - interval '1 microsecond' WHERE entity_id IN (SELECT entity_id FROM looks);

-- name: lapse_leases$
-- Free the jobs whose lease ran out, fence whoever held it, and tell how many there were. What this agent knows to hold
-- is not among them: it was only asleep. Whose step it was that ended the process is not known: all that it held are
-- under suspicion, or the one on trial. Only one that nothing else was worked at beside comes to be set aside by it.
-- Watching a container does nothing that could end a process.
WITH lapsed AS (
    SELECT id, lease_holder, alone, state FROM jobs
    WHERE lease_until < now() AND finished_at IS NULL AND NOT (lease_holder = :place AND id = ANY(:held::uuid[]))
    ORDER BY id FOR UPDATE SKIP LOCKED),
deaths AS (
    SELECT lease_holder, bool_or(alone) AS on_trial, count(*) AS jobs FROM lapsed WHERE state <> 'running' GROUP BY 1),
freed AS (
    UPDATE jobs j SET
        lease_until = NULL, lease_holder = NULL, lease_token = lease_token + 1, alone = false,
        place = CASE WHEN j.state = 'queued' THEN NULL ELSE place END,
        suspicion = suspicion + CASE
            WHEN j.state = 'running' OR (d.on_trial AND NOT j.alone) THEN 0
            WHEN (j.alone AND d.jobs = 1) OR suspicion < :set_aside_from - 1 THEN 1 ELSE 0 END
    FROM lapsed l LEFT JOIN deaths d USING (lease_holder)
    WHERE j.id = l.id
    RETURNING j.id, j.state, attempt),
told AS (
    INSERT INTO job_events (job_id, state, attempt, note)
    SELECT id, state, attempt, 'the agent that worked on it stopped answering' FROM freed)
SELECT count(*) FROM freed;

-- name: trust_job!
-- A suspect has not ended the process for a while: others may go on beside it.
UPDATE jobs SET alone = false WHERE id = :id AND lease_token = :lease_token;

-- name: renew_leases
-- Keep leases; tells for which jobs somebody asked for their end. The lease of what is missing is another's now. In the
-- order of their ids, as everybody writes.
WITH kept AS (
    SELECT * FROM jsonb_to_recordset(:leases::jsonb) AS k (id uuid, lease_token bigint, seconds float8)),
held AS (
    SELECT j.id, k.seconds FROM jobs j JOIN kept k USING (id)
    WHERE id = ANY(ARRAY(SELECT kept.id FROM kept)) AND j.lease_token = k.lease_token AND j.lease_until IS NOT NULL
    ORDER BY id FOR UPDATE OF j)
UPDATE jobs j SET lease_until = now() + held.seconds * interval '1 second' FROM held
WHERE j.id = ANY(ARRAY(SELECT held.id FROM held)) AND j.id = held.id
RETURNING j.id, j.cancel_requested;

-- name: release_lease!
-- Give a job back as it was: a shutdown is not an attempt.
UPDATE jobs SET
    lease_until = NULL, lease_holder = NULL, alone = false, due_at = now(),
    place = CASE WHEN state = 'queued' THEN NULL ELSE place END
WHERE id = :id AND lease_token = :lease_token AND lease_until IS NOT NULL;

-- name: move_jobs
-- Fenced moves, each by itself, told in job_events when anything but the time changed. Those that were made come back:
-- the lease of what is missing is another's now. One that keeps its lease is worked at on, in its next state.
-- Figures after a comma in what it waits for are like the time. Where a run ended, what changed on its Activity meanwhile
-- is to be judged. In the order of their ids, as everybody writes.
WITH moves AS (
    SELECT * FROM jsonb_to_recordset(:moves::jsonb) AS m (
        id uuid, lease_token bigint, from_state text, state text, wait float8, attempt integer, launch integer,
        waiting_for text, waiting_party text, elsewhere boolean, place text, verdict text, fault_class text,
        fault_message text, exit_code integer, native_id text, started_at timestamptz, terminal boolean, keep float8, note text,
        done jsonb, resources jsonb)),
before AS (
    SELECT id, j.state, j.attempt, j.launch, j.lease_holder AS holder,
        coalesce(j.waiting_party, split_part(j.waiting_for, ',', 1)) AS waits
    FROM jobs j JOIN moves USING (id) WHERE id = ANY(ARRAY(SELECT m.id FROM moves m)) ORDER BY id FOR UPDATE OF j),
moved AS (
    UPDATE jobs j SET
        -- Whoever asked for its end while the step ran need not wait: there is nothing more to do in these states.
        due_at = CASE WHEN cancel_requested AND m.state IN ('queued', 'staging') THEN now()
            ELSE now() + m.wait * interval '1 second' END,
        state = m.state, attempt = m.attempt, launch = m.launch, verdict = m.verdict,
        fault_class = m.fault_class, fault_message = m.fault_message, exit_code = m.exit_code,
        native_id = m.native_id, started_at = m.started_at,
        lease_until = now() + m.keep * interval '1 second', alone = false, suspicion = 0,
        lease_holder = CASE WHEN m.keep IS NOT NULL THEN lease_holder END,
        place = CASE WHEN m.elsewhere THEN NULL ELSE coalesce(m.place, j.place) END,
        waiting_for = m.waiting_for, waiting_party = m.waiting_party,
        waiting_since = CASE WHEN m.waiting_for IS NOT NULL THEN
            CASE WHEN j.state = m.state THEN coalesce(waiting_since, now()) ELSE now() END END,
        progress = CASE WHEN j.state = m.state THEN progress ELSE '{}' END,
        resources = j.resources || coalesce(m.resources, '{}'),
        finished_at = CASE WHEN m.terminal THEN now() END
    FROM moves m JOIN before USING (id)
    WHERE j.id = ANY(ARRAY(SELECT b.id FROM before b)) AND j.id = m.id
        AND j.lease_token = m.lease_token AND j.state = m.from_state AND j.lease_until IS NOT NULL
    RETURNING j.id, j.state, j.attempt, j.launch, j.waiting_for, m.note, m.done, cancel_requested, folder_id,
        m.place AS node, before.holder, due_at, lease_until, CASE WHEN m.terminal THEN activity_id END AS ended_for,
        coalesce(j.waiting_party, split_part(j.waiting_for, ',', 1)) AS waits),
looked_at AS (
    SELECT entity_id FROM watched WHERE entity_id = ANY(ARRAY(SELECT ended_for FROM moved WHERE ended_for IS NOT NULL))
    ORDER BY entity_id FOR UPDATE),
look_again AS (
    UPDATE watched SET due_at = now(), generation = generation + 1
    WHERE entity_id = ANY(ARRAY(SELECT entity_id FROM looked_at))),
handed_over AS (
    INSERT INTO node_runs (place, job_id, agent) SELECT node, id, holder FROM moved WHERE node IS NOT NULL),
told AS (
    INSERT INTO job_events (job_id, state, attempt, note, done)
    SELECT id, m.state, m.attempt, coalesce(m.waiting_for, m.note), m.done FROM moved m JOIN before b USING (id)
    WHERE (m.state, m.attempt, m.launch, m.waits) IS DISTINCT FROM (b.state, b.attempt, b.launch, b.waits))
SELECT id, cancel_requested, folder_id, due_at, lease_until FROM moved;

-- name: wake_waiting!
-- An outside party is back: what waits for it is due now. In the order of their ids, as everybody writes.
WITH waiting AS (
    SELECT id FROM jobs
    WHERE waiting_party = :party AND finished_at IS NULL AND lease_until IS NULL AND due_at > now()
    ORDER BY id FOR UPDATE)
UPDATE jobs SET due_at = now() WHERE id IN (SELECT id FROM waiting);

-- name: set_progress!
-- How far the current step is.
UPDATE jobs SET progress = :progress WHERE id = :id AND lease_token = :lease_token AND lease_until IS NOT NULL;

-- name: annotated$
-- Which annotations of a run are on its Activity.
SELECT annotated FROM jobs WHERE id = :id;

-- name: set_annotated$
-- One more is.
UPDATE jobs SET annotated = array_append(annotated, :kind::text)
WHERE id = :id AND lease_token = :lease_token AND lease_until IS NOT NULL
RETURNING id;

-- name: makers
-- Which job has made each of these Revisions.
SELECT DISTINCT revision_id, job_id FROM outputs WHERE revision_id = ANY(:revision_ids) AND linked;

-- name: set_folder$
-- The run's Folder, made once.
UPDATE jobs SET folder_id = :folder_id WHERE id = :id AND lease_token = :lease_token AND lease_until IS NOT NULL
RETURNING folder_id;

-- name: request_cancel$
-- Ask for a job's end; nothing when it has ended or is not there.
UPDATE jobs SET cancel_requested = true,
    due_at = CASE WHEN state IN ('queued', 'staging', 'launching', 'running') THEN now() ELSE due_at END
WHERE id = :id AND finished_at IS NULL RETURNING id;

-- name: get_job^
-- One job, with the machine that has its files.
SELECT jobs.*, a.host, a.seen_at AS host_seen_at, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds,
    coalesce(a.stopped_at IS NOT NULL OR a.seen_at < now() - :gone::interval, false) AS host_is_gone
FROM jobs LEFT JOIN agents a USING (place) WHERE id = :id;

-- name: list_jobs
-- The newest jobs, narrowed by whatever is named, with the machines that have their files. Stuck: it has not come on for
-- ten minutes although that is not its container's doing, or fails again and again.
SELECT jobs.*, a.host, a.seen_at AS host_seen_at, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds,
    coalesce(a.stopped_at IS NOT NULL OR a.seen_at < now() - :gone::interval, false) AS host_is_gone
FROM jobs LEFT JOIN agents a USING (place)
WHERE (:activity_id::text IS NULL OR activity_id = :activity_id) AND (:state::text IS NULL OR state = :state)
    AND (:project_id::text IS NULL OR project_id = :project_id) AND (:verdict::text IS NULL OR verdict = :verdict)
    AND (:since::interval IS NULL OR coalesce(finished_at, now()) > now() - :since)
    AND (NOT :stuck::boolean OR (finished_at IS NULL AND (attempt >= 3 OR suspicion > 1
        OR ((waiting_since < now() - interval '10 minutes'
            OR (lease_until IS NULL AND due_at < now() - interval '10 minutes'))
            AND NOT (state = 'staging' AND place IN (SELECT place FROM node_runs)))  -- Slurm's queue is as long as it is
        OR (a.seen_at < now() - :gone::interval))))
ORDER BY created_at DESC LIMIT :most;

-- name: list_events
-- A job's story, oldest first, from an event on.
SELECT * FROM job_events WHERE job_id = :job_id AND id > :after ORDER BY id;

-- name: next_job_due$
-- Seconds until the next job falls due here. One that is due already waits for a free place, not for time.
SELECT extract(epoch FROM min(due_at) - now())::float8 FROM jobs
WHERE finished_at IS NULL AND lease_until IS NULL AND due_at > now()
    AND (place = :place OR (place IS NULL AND NOT :bound));

-- name: next_look_due$
-- Seconds until the next entity is to be looked at.
SELECT extract(epoch FROM min(due_at) - now())::float8 FROM watched WHERE lease_until IS NULL;

-- name: list_outputs
-- What was put into Ovation for a job.
SELECT * FROM outputs WHERE job_id = :job_id ORDER BY kind, path;

-- name: save_output$
-- Record how far one output is, before the next call is made. Nothing: the lease is another's now.
INSERT INTO outputs AS o (job_id, kind, path, size, sha256, entity_id, revision_id, uploaded, linked)
SELECT id, :kind, :path, :size, :sha256, :entity_id, :revision_id, :uploaded, :linked
FROM jobs WHERE id = :job_id AND lease_token = :lease_token AND lease_until IS NOT NULL FOR SHARE
ON CONFLICT (job_id, kind, path) DO UPDATE SET
    size = excluded.size, sha256 = excluded.sha256, entity_id = excluded.entity_id,
    revision_id = excluded.revision_id, uploaded = excluded.uploaded, linked = excluded.linked
RETURNING path;

-- name: agent_seen!
-- This agent is here: what is being staged for it is not taken over by others.
INSERT INTO agents (place, host, version) VALUES (:place, :host, :version)
ON CONFLICT (place) DO UPDATE SET host = excluded.host, version = excluded.version, seen_at = now(), stopped_at = NULL,
    started_at = CASE WHEN :starts THEN now() ELSE agents.started_at END;

-- name: agent_stopped!
-- This agent has stopped in good order.
UPDATE agents SET seen_at = now(), stopped_at = now() WHERE place = :place;

-- name: jobs_on_disk
-- What the sweep asks of the jobs that have a directory on its disk.
-- What a compute node works at is on the disk of the agent that sees to it, as far as it is on record there.
SELECT id, state, coalesce((SELECT agent FROM node_runs n WHERE n.place = jobs.place), place)
    AS place, extract(epoch FROM now() - finished_at)::float8 AS ended_seconds FROM jobs WHERE id = ANY(:ids);

-- name: looks_waiting_due$
-- Ovation is back: what it was away for when it was looked at is due now. In the order of their ids, as everybody writes.
WITH waiting AS (
    SELECT entity_id FROM watched WHERE attempt > 0 AND due_at > now() ORDER BY entity_id FOR UPDATE),
due AS (UPDATE watched SET due_at = now() WHERE entity_id IN (SELECT entity_id FROM waiting) RETURNING 1)
SELECT count(*) FROM due;

-- name: claim_cancelled
-- Take jobs whose end was asked for before their container ran: they need no place, for nothing is done for them.
UPDATE jobs SET
    lease_token = lease_token + 1, lease_until = now() + :lease, lease_holder = :place, place = :place, alone = false
WHERE id IN (
    SELECT id FROM jobs
    WHERE cancel_requested AND finished_at IS NULL AND state IN ('queued', 'staging', 'launching')
        AND due_at <= now() AND lease_until IS NULL AND suspicion < :suspects_from
        AND (place = :place OR (NOT :bound AND (place IS NULL OR (NOT EXISTS (
            SELECT 1 FROM agents a WHERE a.place = jobs.place
                AND a.seen_at > now() - CASE WHEN state = 'launching' THEN :lost::interval ELSE :gone::interval END
                AND (a.stopped_at IS NULL OR state = 'launching'))
            AND NOT EXISTS (SELECT 1 FROM node_runs n WHERE n.place = jobs.place)))))
    ORDER BY due_at LIMIT :most FOR UPDATE SKIP LOCKED)
RETURNING *, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds;

-- name: count_work^
-- What there is to do, for whoever looks at the agent from outside. Of looks that wait for Ovation to come back, only
-- their change's age is told.
SELECT
    (SELECT coalesce(jsonb_object_agg(state, jobs), '{}') FROM (
        SELECT state, count(*) AS jobs FROM jobs WHERE finished_at IS NULL GROUP BY state) live) AS live,
    (SELECT count(*) FROM watched WHERE due_at <= now()) AS looks_due,
    (SELECT coalesce(extract(epoch FROM now() - min(due_at)), 0)::float8 FROM watched
        WHERE due_at <= now() AND lease_until IS NULL) AS oldest_look,
    (SELECT coalesce(extract(epoch FROM now() - min(changed_at)), 0)::float8 FROM watched
        WHERE due_at IS NOT NULL AND (judged_at IS NULL OR judged_at < changed_at OR attempt > 0)) AS oldest_unjudged,
    (SELECT count(*) FROM jobs WHERE lease_until > now()) AS leases,
    (SELECT coalesce(extract(epoch FROM now() - min(lease_until)), 0)::float8 FROM jobs
        WHERE lease_until < now()) AS lease_overdue,
    (SELECT coalesce(extract(epoch FROM now() - min(due_at)), 0)::float8 FROM jobs
        WHERE finished_at IS NULL AND state = 'running' AND place = :place AND lease_until IS NULL
            AND due_at <= now()) AS unwatched,
    (SELECT count(*) FROM agents WHERE stopped_at IS NULL AND seen_at > now() - :gone::interval
        AND place NOT IN (SELECT place FROM node_runs)) AS agents;

-- name: waiting_activities
-- Activities that were judged and not run since they changed, the last one first.
SELECT entity_id, organization, reasons, changed_at, judged_at, due_at FROM watched w
WHERE entity_type = 'Activity' AND reasons <> '{}' AND changed_at > now() - interval '7 days'
    AND NOT EXISTS (SELECT 1 FROM jobs j WHERE j.activity_id = w.entity_id
        AND (j.finished_at IS NULL OR j.finished_at > w.changed_at))
ORDER BY changed_at DESC LIMIT :most;

-- name: last_days
-- The last seven days (UTC), one a row. The runs that ended by verdict, how long they had waited for their start, and the
-- bytes that they brought.
SELECT day,
    count(j.id) FILTER (WHERE j.verdict = 'succeeded') AS succeeded,
    count(j.id) FILTER (WHERE j.verdict = 'failed') AS failed,
    count(j.id) FILTER (WHERE j.verdict = 'cancelled') AS cancelled,
    coalesce(percentile_cont(0.5) WITHIN GROUP (
        ORDER BY extract(epoch FROM j.started_at - j.created_at)::float8), 0)::float8 AS waited_seconds,
    coalesce(sum(o.bytes), 0)::float8 AS bytes
FROM generate_series(date_trunc('day', now(), 'UTC') - interval '6 days', date_trunc('day', now(), 'UTC'),
    interval '1 day') day
LEFT JOIN jobs j ON j.finished_at >= day AND j.finished_at < day + interval '1 day'
LEFT JOIN LATERAL (SELECT sum(size) AS bytes FROM outputs WHERE outputs.job_id = j.id AND linked) o ON true
GROUP BY day ORDER BY day;

-- name: count_here$
-- How many jobs are under way whose files are at this place.
SELECT count(*) FROM jobs WHERE finished_at IS NULL AND state <> 'queued' AND place = :place;

-- name: ask_log$
-- Ask the agent that has a log on its disk for a piece of it; questions that nobody fetched the answer of are removed.
WITH old AS (DELETE FROM log_questions WHERE asked_at < now() - interval '1 minute')
INSERT INTO log_questions (place, job_id, launch, stream, position, lines, most_bytes)
VALUES (:place, :job_id, :launch, :stream, :position, :lines, :most_bytes) RETURNING id;

-- name: log_questions
-- What this agent is asked.
SELECT * FROM log_questions WHERE place = :place AND answered_at IS NULL ORDER BY id LIMIT 100;

-- name: answer_log!
-- Answer a question.
UPDATE log_questions SET answered_at = now(), begins = :begins, content = :content WHERE id = :id;

-- name: fetch_log_answer^
-- Take an answer, once it is there.
DELETE FROM log_questions WHERE id = :id AND answered_at IS NOT NULL RETURNING begins, content;

-- name: adopt_node_runs!
-- Batch jobs on compute nodes whose agent is gone are seen to by this one, which can reach the same cluster.
UPDATE node_runs n SET agent = :agent
WHERE agent <> :agent AND NOT EXISTS (
    SELECT 1 FROM agents a WHERE a.place = n.agent AND a.seen_at > now() - :gone::interval);

-- name: node_runs
-- What this agent has handed over to compute nodes, and how the jobs stand.
SELECT n.place, n.job_id, n.directory, j.launch, j.resources, j.cancel_requested, j.lease_until IS NOT NULL AS held,
    CASE WHEN j.finished_at IS NOT NULL AND j.place = n.place THEN j.verdict END AS verdict, j.fault_class,
    j.finished_at IS NOT NULL OR j.place IS DISTINCT FROM n.place AS over
FROM node_runs n JOIN jobs j ON j.id = n.job_id WHERE n.agent = :agent ORDER BY n.made_at;

-- name: place_node_run$
-- Where a batch job's own files are, once and for all.
UPDATE node_runs SET directory = coalesce(directory, :directory) WHERE place = :place RETURNING directory;

-- name: node_run_waits!
-- What a batch job waits for before it begins.
UPDATE jobs SET waiting_for = :waiting_for
WHERE id = :id AND place = :place AND state = 'staging' AND lease_until IS NULL
    AND waiting_for IS DISTINCT FROM :waiting_for;

-- name: take_from_node^
-- Take a job back from a compute node that works at it no more.
UPDATE jobs SET
    lease_token = lease_token + 1, lease_until = now() + :lease, lease_holder = :agent, alone = false
WHERE id = :id AND place = :place AND finished_at IS NULL AND lease_until IS NULL
RETURNING *, extract(epoch FROM now() - waiting_since)::float8 AS waiting_seconds;

-- name: close_node_run$
-- A batch job is over, and nothing of it is left. What is kept of its run is on the disk of the agent that saw to it.
WITH closed AS (DELETE FROM node_runs WHERE place = :place RETURNING place),
forgotten AS (DELETE FROM agents WHERE place = :place),
here AS (UPDATE jobs SET place = :agent WHERE id = :id AND place = :place AND finished_at IS NOT NULL)
SELECT count(*) FROM closed;

-- name: node_run_goes_on$
-- Whether the job is still this batch job's to work at.
SELECT EXISTS (
    SELECT 1 FROM node_runs n JOIN jobs j ON j.id = n.job_id
    WHERE n.place = :place AND j.place = n.place AND j.finished_at IS NULL);
